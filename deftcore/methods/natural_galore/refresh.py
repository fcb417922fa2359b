"""A new subspace for a matrix, and its state taken there."""

from torch import Tensor

from deftcore.methods.natural_galore.inner import InnerRule
from deftcore.methods.natural_galore.state import Group, State, projected_shape, seed_of_step
from deftcore.methods.natural_galore.subspace import Subspace, find_subspace, turned
from deftcore.ops.natural import gram_of


def is_due(state: State, group: Group) -> bool:
    """Whether a matrix's next step is to find a subspace, for which it needs the whole gradient."""
    return not state or not state["found"] or state["step"] % group["update_proj_gap"] == 0


def refresh(gradient: Tensor, state: State, group: Group, inner: InnerRule) -> None:
    """Finds the subspace of a gradient [m, n]. Where that is zero or not finite the old one stays."""
    old = Subspace(state.get("left"), state.get("right"))
    exact, warm = group["refresh"] == "exact", bool(state["found"])
    new = find_subspace(gradient, old, warm=warm, exact=exact, seed=seed_of_step(state))
    if new is None:
        return
    state |= {name: factor for name, factor in vars(new).items() if factor is not None} | {"found": 1}
    if state["age"] and group["on_switch"] == "rotate":
        shape = projected_shape((gradient.shape[0], gradient.shape[1]), group)
        _rotate(state, new.turn_from(old), shape, group, inner)
    elif state["age"] and group["on_switch"] == "reset":
        _reset(state, inner)


def _reset(state: State, inner: InnerRule) -> None:
    state["age"] = 0
    for name in inner.moments:
        state[name].zero_()
    if "history" in state:
        state["slot"] = state["fill"] = 0


def _rotate(state: State, turn: Subspace, shape: tuple[int, int], group: Group, inner: InnerRule) -> None:
    moments = {name: state[name] for name in inner.moments}
    state |= inner.turn(moments, turn, state["age"], group)
    if "history" in state:
        for row in state["history"]:  # one by one: the window is most of the state
            row.copy_(turned(row.view(shape), turn).reshape(-1))
        state["gram"] = gram_of(state["history"])
