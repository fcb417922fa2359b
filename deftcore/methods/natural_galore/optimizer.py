"""The optimizer: AdamW whose state, of the matrices that have a rank, lives in subspaces of their gradients."""

import difflib
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from deftcore._names import near
from deftcore.methods.natural_galore.backward import Hooks, average_over_processes, processes
from deftcore.methods.natural_galore.inner import ADAM, InnerRule
from deftcore.methods.natural_galore.options import OPTION_NAMES, GroupOptions, options_in
from deftcore.methods.natural_galore.refresh import is_due, refresh
from deftcore.methods.natural_galore.state import (
    State,
    StateBytes,
    local,
    matrix_shape,
    new_state,
    rounding_seed,
    state_bytes,
    state_from_file,
    window_of,
)
from deftcore.nn.sharding import flattened_by, is_sharded, sharded_as, whole
from deftcore.ops.checks import FLOAT_DTYPES, check_number
from deftcore.ops.galore import galore_step
from deftcore.ops.galore_matrix import AdamMatrix, Matrix, project, step_by
from deftcore.ops.natural import Damping

Group = dict[str, Any]


class NaturalGaLore(Optimizer):
    """AdamW in a low-rank subspace of each gradient, behind the inverse of its damped empirical Fisher.

    In place of `torch.optim.AdamW`. Only groups with a `rank` differ from it: those of `deftcore.galore_param_groups`,
    or groups as galore-torch's users write them, `{"params": ..., "rank": 128, "update_proj_gap": 200, "scale": 0.25,
    "proj_type": "natural_galore"}`. Parameters of other than two dimensions, and groups without a rank, take AdamW
    with eps outside the root and decay behind the step, as the published code.

    Das, *Natural GaLore*, arXiv 2410.16029; Zhao et al., *GaLore*, arXiv 2403.03507.

    Args:
        params: parameters, named ones, or groups.
        lr, betas, eps, weight_decay, correct_bias: of Adam; a group's own come first. lr may be a tensor of one number.
        options: defaults of the groups' options: the fields of
            `deftcore.methods.natural_galore.options.GroupOptions`.

    Raises:
        TypeError, ValueError: naming the option; sparse or complex parameters, a set; in a step a sparse gradient.

    Warns:
        UserWarning: a group's state takes more bytes than AdamW's would.

    >>> weight = torch.nn.Parameter(torch.zeros(16, 16))
    >>> optimizer = NaturalGaLore([{"params": [weight], "rank": 1}], lr=0.1, natural_history=2)
    >>> weight.grad = torch.ones(16, 16)
    >>> optimizer.step()
    >>> bool((weight < 0).all())
    True
    """

    inner: InnerRule = ADAM  # a subclass may have another; ADAM's step is one op over all matrices of a group

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        **options: Any,
    ) -> None:
        unknown = [name for name in options if name not in OPTION_NAMES]
        if unknown:
            raise TypeError(f"{unknown[0]}: no such option{near(unknown[0], OPTION_NAMES)}")
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        self._projected: dict[Tensor, Tensor] = {}  # sums of projected gradients of the step under way
        self._stepping: list[Hooks] = []  # those of `step_in_backward`
        super().__init__(params, {**adam, **options_in({**vars(GroupOptions()), **options})})

    # ------------------------------------------------------------------ groups and state

    def add_param_group(self, param_group: Group) -> None:
        """As PyTorch's; the group is checked first.

        Raises:
            TypeError, ValueError: naming the option, a key that is nearly one, or what is wrong with a parameter.
        """
        group = dict(param_group)
        for key in group:
            self._check_key(key)
        listed = group["params"]
        if isinstance(listed, set):
            raise TypeError("params: must be in an order that stays from run to run, got a set")
        group["params"] = [listed] if isinstance(listed, Tensor) else list(listed)
        group |= options_in({**self.defaults, **group})
        adam = {**self.defaults, **group}
        rate = adam["lr"]
        check_number("lr", float(rate) if isinstance(rate, Tensor) and rate.numel() == 1 else rate, minimum=0.0)
        for name in ("eps", "weight_decay"):
            check_number(name, adam[name], minimum=0.0)
        if len(adam["betas"]) != 2 or not all(0 <= beta < 1 for beta in adam["betas"]):
            raise ValueError(f"betas: must be two numbers in [0, 1), got {adam['betas']}")
        for each in group["params"]:
            p = each[1] if isinstance(each, tuple) else each
            if isinstance(p, Tensor) and (p.dtype not in FLOAT_DTYPES or p.layout != torch.strided):
                raise TypeError(f"params: must be dense and floating-point, got {p.dtype}, {p.layout}")
            if group["rank"] is not None and (by := flattened_by(p)):
                raise TypeError(f"params: no subspace of what {by} has flattened; FSDP2's matrices are gathered")
            if group["stochastic_rounding"] and isinstance(p, Tensor) and p.dtype == torch.float16:
                raise TypeError("stochastic_rounding: is for bfloat16 weights, got torch.float16")
        super().add_param_group(group)
        _warn_of_size(len(self.param_groups) - 1, self.param_groups[-1], self._bytes_of(self.param_groups[-1]))

    def _check_key(self, key: str) -> None:
        """Refuses what looks like an option misspelt. Others' keys are kept, `lr_scale` and `initial_lr` too."""
        if key in self.defaults or key in ("params", "param_names"):
            return
        close = difflib.get_close_matches(key, self.defaults, 3)
        if close and not any(f"_{name}_" in f"_{key}_" for name in close):
            raise TypeError(f"{key}: no such option of a group{near(key, self.defaults)}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_projected", {})
        self.__dict__.setdefault("_stepping", [])
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def estimate_state_bytes(self) -> StateBytes:
        """What the state takes once every parameter has had a step; tensors alone, of this process."""
        return sum((self._bytes_of(group) for group in self.param_groups), StateBytes())

    def _bytes_of(self, group: Group) -> StateBytes:
        trained = [p for p in group["params"] if p.requires_grad]
        return sum((state_bytes(p, group, self.inner.moments) for p in trained), StateBytes())

    def _parameters(self) -> Iterable[Tensor]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    def _group_of(self, p: Tensor) -> Group:
        return next(group for group in self.param_groups if any(each is p for each in group["params"]))

    def _state_of(self, p: Tensor, group: Group) -> State:
        if not self.state[p]:
            number = next(i for i, each in enumerate(self._parameters()) if each is p)
            self.state[p] = new_state(p, group, self.inner.moments, number)
        return self.state[p]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As PyTorch's, but the state keeps its own dtypes, and options that a stored group lacks stay as they are.

        Raises:
            ValueError: state that is not this optimizer's, naming what differs; nothing is changed.
        """
        kept: dict[Tensor, State] = {}

        def take(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            groups = [
                {**{name: value for name, value in own.items() if name != "param_names"}, **group}
                for own, group in zip(self.param_groups, given["param_groups"], strict=False)
            ]
            if len(groups) != len(given["param_groups"]):
                return given  # which PyTorch refuses
            rest = dict(given["state"])
            stored = [(number, group) for group in groups for number in group["params"]]
            for p, (number, group) in zip(self._parameters(), stored, strict=False):  # PyTorch compares their numbers
                if rest.get(number):
                    kept[p] = state_from_file(rest.pop(number), p, group, self.inner.moments, number)
            return {**given, "param_groups": groups, "state": rest}

        def put(_: Optimizer) -> None:
            self.state.update(kept)
            self._projected.clear()

        # The last hook before PyTorch's loading and the first one behind it, which has no state left to cast.
        hooks = [
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(put, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As PyTorch's; projected gradients too."""
        super().zero_grad(set_to_none)
        self._projected.clear()

    def diagnostics(self) -> list[dict[str, float]]:
        """Of each matrix with a window: its number among all parameters; `rho`, the window's mean squared norm over
        lambda (far below 1 the step is plain GaLore's); `window`, its rows; and `failures`, see `galore_step`."""
        found = []
        for number, p in enumerate(self._parameters()):
            window = window_of(self.state.get(p, {}))
            if window is None:
                continue
            group = self._group_of(p)
            mean = float(window.gram.diagonal()[: window.fill].sum()) / max(window.fill, 1)
            rho = (mean if group["damping_mode"] == "absolute" else 1.0) / group["damping"]
            found.append({"parameter": number, "rho": rho, "window": window.fill, "failures": int(window.failures)})
        return found

    # ------------------------------------------------------------------ steps

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient; the others' clocks stand still.

        Raises:
            TypeError: a sparse gradient; nothing is changed.
            RuntimeError: a parameter that has stepped in the backward has a gradient again.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        again = sum(p.grad is not None for hooks in self._stepping for p in hooks.parameters)
        if again:
            raise RuntimeError(
                f"step: {again} parameters have gradients, though they step in the backward. DistributedDataParallel "
                "puts them there, averaged, behind that step: use one of the two"
            )
        ready = [
            [p for p in group["params"] if p.grad is not None or p in self._projected] for group in self.param_groups
        ]
        for p in chain.from_iterable(ready):
            if p.grad is not None:
                _gradient_of(p)
        for group, parameters in zip(self.param_groups, ready, strict=True):
            self._advance(parameters, group)
        return loss

    def _advance(self, parameters: list[Tensor], group: Group) -> None:
        """One step of parameters of a group, all of which have gradients. Sharded matrices are gathered one by one."""
        matrices = [p for p in parameters if matrix_shape(p, group) is not None]
        gathered = [p for p in matrices if is_sharded(p)]
        whole_ones = [p for p in matrices if not is_sharded(p)]
        for batch in (whole_ones, *([p] for p in gathered)):
            self._advance_batch(batch, group, group["scale"])
        self._advance_batch([p for p in parameters if matrix_shape(p, group) is None], group, 1.0)

    def _advance_batch(self, parameters: list[Tensor], group: Group, scale: float) -> None:
        states = [self._state_of(p, group) for p in parameters]
        steps = [self._begin(p, state, group) for p, state in zip(parameters, states, strict=True)]
        damping = Damping(group["damping"], group["damping_mode"], group["fisher_norm"])
        options = {"lr": float(group["lr"]), "weight_decay": group["weight_decay"], "scale": scale, "damping": damping}
        moments: list[State] = [{name: local(state[name]) for name in self.inner.moments} for state in states]
        direction = self.inner.direction
        if direction is None:
            adam = {name: group[name] for name in ("betas", "eps", "correct_bias")}
            each = zip(steps, moments, states, strict=True)
            galore_step(
                [AdamMatrix(**vars(step), **own, age=state["age"]) for step, own, state in each], **adam, **options
            )
        else:
            for step, own, state in zip(steps, moments, states, strict=True):
                rule = partial(direction, moments=own, age=state["age"], group=group)
                step_by(rule, step, **options)
        for p, step in zip(parameters, steps, strict=True):
            if step.weight.data_ptr() != local(p).data_ptr():  # gathered, or of strides that no matrix has
                p.copy_(sharded_as(p, step.weight.reshape(p.shape)))
        for state, step in zip(states, steps, strict=True):
            if step.window is not None:
                state |= {"slot": step.window.slot, "fill": step.window.fill}

    def _begin(self, p: Tensor, state: State, group: Group) -> Matrix:
        """What one parameter's step needs. What is not projected steps where it lies, in its shards too."""
        shape = matrix_shape(p, group)
        if shape is None:
            matrix = Matrix(weight=local(p.detach()), grad=local(_gradient_of(p)), left=None, right=None)
        else:
            gradient, projected = self._gradient_of_matrix(p, shape, state, group)
            keep = state["step"] % group["history_every"] == 0
            matrix = Matrix(
                weight=whole(p.detach()).reshape(shape), grad=gradient, projected=projected,
                left=state.get("left"), right=state.get("right"), window=window_of(state, keep),
            )  # fmt: skip
        state["step"] += 1
        state["age"] += 1
        matrix.seed = rounding_seed(p, state, group)
        return matrix

    def _gradient_of_matrix(self, p: Tensor, shape: tuple[int, int], state: State, group: Group) -> tuple[Tensor, bool]:
        """The gradient [m, n], whose subspace is found where that is due; or the sum of projected ones, and True."""
        projected = self._projected.pop(p, None)
        if p.grad is None:
            assert projected is not None
            return projected, True
        gradient = whole(_gradient_of(p)).reshape(shape)
        if is_due(state, group):
            refresh(gradient, state, group, self.inner)
        if projected is None:
            return gradient, False
        return projected + project(gradient, state.get("left"), state.get("right")), True

    # ------------------------------------------------------------------ inside the backward

    def step_in_backward(self, *, average: bool = True) -> Hooks:
        """From now on each parameter steps as soon as its gradient is there, which is then freed: no two whole
        gradients need to be in memory, and `step` has nothing left to do. Not with clipping by the norm of all
        gradients, accumulation over batches, a gradient scaler, or DistributedDataParallel, whose gradients come later:
        `step` raises where it finds one.

        Args:
            average: over all processes, where there are several: of matrices the projected gradient, unless it is due.
                Every process must have a gradient of the same parameters, in one order, or they wait for each other
                forever.

        Returns:
            What ends it: `.remove()`, or a `with` block's end.

        Raises:
            RuntimeError: parameters are sharded.
        """
        for number, p in enumerate(self._parameters()):
            if is_sharded(p):
                raise RuntimeError(
                    f"step_in_backward: parameter {number} {tuple(p.shape)} is sharded; call `step` behind the backward"
                )

        @torch.no_grad()
        def step_now(p: Tensor) -> None:
            group = self._group_of(p)
            gradient = _gradient_of(p)
            if average and processes() > 1:
                average_over_processes(self._projected[p] if self._project(p, group) else gradient)
            self._advance([p], group)
            p.grad = None

        hooks = Hooks(self._parameters(), step_now)
        self._stepping = [*(each for each in self._stepping if each.parameters), hooks]
        return hooks

    def accumulate_in_subspace(self) -> Hooks:
        """From now on gradients of matrices are summed up as projections, and freed after each backward; in steps that
        find a subspace they stay whole. `step` uses the sums, which clipping by norm and gradient scalers do not see.

        Returns:
            What ends it: `.remove()`, or a `with` block's end.

        Raises:
            RuntimeError: there are several processes, over which gradients would have to be averaged first.
        """
        if processes() > 1:
            raise RuntimeError(f"accumulate_in_subspace: is for one process, there are {processes()}")

        @torch.no_grad()
        def add(p: Tensor) -> None:
            self._project(p, self._group_of(p))

        return Hooks(self._parameters(), add)

    def _project(self, p: Tensor, group: Group) -> bool:
        """Replaces a gradient by its projection, added to those of the step; not where it is needed whole."""
        state, shape = self.state.get(p, {}), matrix_shape(p, group)
        if shape is None or is_due(state, group):
            return False
        r = project(whole(_gradient_of(p)).reshape(shape), state.get("left"), state.get("right"))
        self._projected[p] = self._projected[p] + r if p in self._projected else r
        p.grad = None
        return True


def _gradient_of(p: Tensor) -> Tensor:
    """That of a parameter which has one, checked."""
    assert p.grad is not None
    if p.grad.layout != torch.strided:
        raise TypeError(f"grad: must be dense, got {p.grad.layout} of a parameter {tuple(p.shape)}")
    return p.grad


def _warn_of_size(number: int, group: Group, found: StateBytes) -> None:
    if group["rank"] is None or found.total <= found.adamw:
        return
    total, adamw, windows, moments, subspaces = (
        f"{size / 1e6:.3g} MB" for size in (found.total, found.adamw, found.windows, found.moments, found.subspaces)
    )
    warnings.warn(
        f"NaturalGaLore: the state of group {number} takes {total}, AdamW's would take {adamw}. Of it {windows} are "
        f"the window of past gradients (natural_history={group['natural_history']}), {moments} moments, {subspaces} "
        f"subspaces (rank={group['rank']}). A lower natural_history or rank takes less, as do "
        f"history_dtype='bfloat16', projection='two_sided' and proj_type='galore'",
        stacklevel=5,
    )
