"""The state of a parameter: which tensors and numbers, how large, new, and as read from a file.

Numbers: `step`, steps taken; `age`, those that the moments have seen; `seed`, of all random draws. Of a matrix also
`found`, whether its subspace is of a gradient and not a stand-in, and `slot` and `fill` of the window.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deftcore.methods.natural_galore.options import HISTORY_DTYPES
from deftcore.methods.natural_galore.subspace import first_columns, sides_of
from deftcore.nn.sharding import is_sharded
from deftcore.ops.natural import Window

Group = Mapping[str, Any]
State = dict[str, Any]
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
_SEEDS = 1 << 20  # a parameter's own seed is the group's times this, plus its number


@dataclass(frozen=True)
class StateBytes:
    """Bytes of optimizer state: of the subspaces' factors, the moments, the windows of past gradients with their
    products; and what `torch.optim.AdamW` would hold for the same parameters."""

    subspaces: int = 0
    moments: int = 0
    windows: int = 0
    adamw: int = 0

    @property
    def total(self) -> int:
        """All that this optimizer holds."""
        return self.subspaces + self.moments + self.windows

    def __add__(self, other: "StateBytes") -> "StateBytes":
        return StateBytes(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def matrix_shape(p: Tensor, group: Group) -> tuple[int, int] | None:
    """The rows and columns by which a parameter is projected; None where it is not."""
    if group["rank"] is None or p.numel() == 0 or not (p.dim() == 2 or (p.dim() > 2 and group["flatten"])):
        return None
    return p.shape[0], p.numel() // p.shape[0]


def projected_shape(matrix: tuple[int, int], group: Group) -> tuple[int, int]:
    """The rows and columns of a matrix's projected gradient."""
    rank = min(group["rank"], *matrix)
    left, right = sides_of(matrix, group["projection"], group["side"])
    return rank if left else matrix[0], rank if right else matrix[1]


def shapes_of(p: Tensor, group: Group, moments: tuple[str, ...]) -> Shapes:
    """Shape and dtype of each tensor of a parameter's state, as this process holds it."""
    dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
    matrix = matrix_shape(p, group)
    if matrix is None:
        return {name: (tuple(local(p).shape), dtype) for name in moments}
    rank, compact = min(group["rank"], *matrix), projected_shape(matrix, group)
    left, right = sides_of(matrix, group["projection"], group["side"])
    found: Shapes = {"left": ((matrix[0], rank), dtype)} if left else {}
    found |= {"right": ((matrix[1], rank), dtype)} if right else {}
    found |= {name: (compact, dtype) for name in moments}
    if group["proj_type"] == "natural_galore":
        rows = group["natural_history"]
        found["history"] = ((rows, compact[0] * compact[1]), HISTORY_DTYPES[group["history_dtype"]] or dtype)
        found |= {"gram": ((rows, rows), torch.float64), "failures": ((), torch.int64)}
    return found


def state_bytes(p: Tensor, group: Group, moments: tuple[str, ...]) -> StateBytes:
    """What a parameter's state takes; tensors alone."""
    shapes = shapes_of(p, group, moments)
    sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, (shape, dtype) in shapes.items()}
    factors = sizes.pop("left", 0) + sizes.pop("right", 0)
    of_moments = sum(sizes.pop(name) for name in moments)
    return StateBytes(factors, of_moments, sum(sizes.values()), 2 * local(p).numel() * p.element_size())


def new_state(p: Tensor, group: Group, moments: tuple[str, ...], number: int) -> State:
    """Before the first step of the parameter of that number; the subspace is a stand-in, columns of the identity."""
    state: State = {"step": 0, "age": 0, "seed": group["seed"] * _SEEDS + number}
    for name, (shape, dtype) in shapes_of(p, group, moments).items():
        if matrix_shape(p, group) is None:
            state[name] = torch.zeros_like(p, dtype=dtype)  # sharded where p is
        elif name in ("left", "right"):
            state[name] = first_columns(shape[0], shape[1], torch.empty(0, dtype=dtype, device=p.device))
        else:
            state[name] = torch.zeros(shape, dtype=dtype, device=p.device)
    return state | {name: 0 for name in _numbers(state) if name not in state}


def _numbers(names: Any) -> list[str]:
    """What a state holds beside tensors of these names."""
    found = ["step", "age", "seed"]
    found += ["found"] if "left" in names or "right" in names else []
    return found + (["slot", "fill"] if "history" in names else [])


def state_from_file(stored: Mapping[str, Any], p: Tensor, group: Group, moments: tuple[str, ...], number: Any) -> State:
    """A copy of a stored state, where the parameter is.

    Raises:
        ValueError: it is not one of such a parameter, naming what differs.
    """
    shapes = shapes_of(p, group, moments)
    numbers = _numbers(shapes)
    if stored.keys() != {*shapes, *numbers}:
        odd = ", ".join(sorted({*shapes, *numbers} ^ stored.keys()))
        raise ValueError(f"state_dict: parameter {number} has the state of another optimizer, which differs in {odd}")
    state: State = {name: int(stored[name]) for name in numbers}
    for name, (shape, dtype) in shapes.items():
        found = tuple(local(stored[name]).shape)
        if found != shape:
            raise ValueError(f"state_dict: {name} of parameter {number} must be {shape}, got {found}")
        state[name] = stored[name].to(device=p.device, dtype=dtype, copy=True)
    return state


def window_of(state: State, keep: bool = True) -> Window | None:
    """The window of a Natural GaLore matrix; `keep`: see there."""
    if "history" not in state:
        return None
    return Window(**{name: state[name] for name in ("history", "gram", "slot", "fill", "failures")}, keep=keep)


def seed_of_step(state: State) -> int:
    """A seed for this step of this parameter; the same in every process."""
    return (state["seed"] * 1_000_003 + state["step"]) % 2**63


def rounding_seed(p: Tensor, state: State, group: Group) -> int | None:
    """That of stochastic rounding; None where there is none."""
    return seed_of_step(state) if group["stochastic_rounding"] and p.dtype == torch.bfloat16 else None
