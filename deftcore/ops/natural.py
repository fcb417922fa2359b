"""The natural gradient of a window of gradients: the last one behind the inverse of their damped empirical Fisher.

Das, *Natural GaLore*, arXiv 2410.16029, section 3.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

DAMPING_MODES = ("absolute", "relative")
FISHER_NORMS = ("sum", "mean")
_CHUNK = 1 << 18  # numbers of a window's row that are in float64 at a time
_CHUNK_OF_GRAM = 1 << 14  # where those of all rows are: they stay in a core's cache


@dataclass(frozen=True)
class Damping:
    """lambda of F = lambda I + (sum or mean of h h^T over the window), the damped empirical Fisher.

    Args:
        value: lambda itself ("absolute"), or its ratio to the window's mean squared norm ("relative").
        norm: "sum" or "mean": the latter is the former at a lambda as many times larger as the window has rows, times
            that number.
    """

    value: float
    mode: Literal["absolute", "relative"] = "absolute"
    norm: Literal["sum", "mean"] = "sum"


@dataclass
class Window:
    """The last projected gradients, as rows of a ring, and their products.

    Args:
        history: [s, k], float32, bfloat16 or float64.
        gram: [s, s], float64, history history^T; of rows that are filled.
        slot: the row of the current gradient. It takes the place of what stands there.
        fill: how many rows are filled with earlier ones, at most s.
        failures: int64 scalar, counts the steps in which the window did not hold.
        keep: whether the current gradient stays: `slot` and `fill` move on behind it.
    """

    history: Tensor
    gram: Tensor
    slot: int
    fill: int
    failures: Tensor
    keep: bool = True

    @property
    def rows(self) -> int:
        """How many rows count, the current one among them."""
        return min(self.fill + 1, self.history.shape[0])

    def clear(self) -> None:
        """No rows, none of them filled."""
        self.history.zero_()
        self.gram.zero_()
        self.slot = self.fill = 0

    def move_on(self) -> None:
        """To the next row, if the current one stays."""
        if self.keep:
            self.slot, self.fill = (self.slot + 1) % self.history.shape[0], self.rows


def natural_gradient(r: Tensor, window: Window, damping: Damping) -> Tensor:
    """N = F^-1 vec(R), with R as the window's current row.

    Push-through: (lambda I + K) c = e_slot, N = sum_j c_j h_j. Woodbury's form lambda^-1 R - lambda^-2 H^T z loses all
    digits where ||R||^2 is far above lambda. Rows count as the history's dtype holds them, the current one too, so
    that K is their Gram matrix exactly. Products are summed in float64: K + lambda I stays positive definite, and the
    sum over j, which cancels where rows are alike, keeps its digits.

    Args:
        r: R, of k elements; any floating dtype.
        window: its row and column of `slot` are written, and it moves on; cleared first where it does not hold.
    """
    rows, slot = window.rows, window.slot
    window.history[slot] = r.reshape(-1)
    filled = window.history[:rows]
    current = filled[slot]
    products = torch.zeros(rows, dtype=torch.float64, device=r.device)
    for part, part_of_current in zip(filled.split(_CHUNK, 1), current.split(_CHUNK), strict=True):
        products += part.double() @ part_of_current.double()
    window.gram[slot, :rows] = products
    window.gram[:rows, slot] = products
    gram = window.gram[:rows, :rows]
    ridge, factor = _ridge(gram, damping)
    unit = torch.zeros(rows, 1, dtype=torch.float64, device=r.device)
    unit[slot] = 1.0
    damped = gram + ridge * torch.eye(rows, dtype=torch.float64, device=r.device)
    root, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed) or not bool(torch.isfinite(damped).all()):
        return _start_anew(r, window, damping)
    window.move_on()
    c = factor * torch.cholesky_solve(unit, root).squeeze(1)
    n = torch.cat([c @ part.double() for part in filled.split(_CHUNK, 1)])
    return n.reshape(r.shape).to(r.dtype)


def _start_anew(r: Tensor, window: Window, damping: Damping) -> Tensor:
    """N of a window that R is alone in; R / lambda, of an empty one, where |R|^2 is not finite."""
    current = window.history[window.slot].clone()
    square = window.gram[window.slot, window.slot].clone()
    window.clear()
    window.failures += 1
    ridge, factor = _ridge(square.view(1, 1), damping)
    if not bool(square.isfinite()):
        return r * (factor / ridge) if ridge < float("inf") else r.clone()  # a relative lambda is NaN or infinite
    window.history[0] = current
    window.gram[0, 0] = square
    window.move_on()
    return (current.double() * (factor / (ridge + float(square)))).view(r.shape).to(r.dtype)


def gram_of(history: Tensor) -> Tensor:
    """[s, s], float64: the products of a window's rows, which `natural_gradient` keeps up to date row by row."""
    gram = torch.zeros(history.shape[0], history.shape[0], dtype=torch.float64, device=history.device)
    for part in history.split(_CHUNK_OF_GRAM, 1):
        wide = part.double()
        gram.addmm_(wide, wide.t())
    return gram


def _ridge(gram: Tensor, damping: Damping) -> tuple[float, float]:
    """What is added to the diagonal of K, and what N is multiplied with."""
    rows = gram.shape[0]
    ridge = damping.value
    if damping.mode == "relative":
        ridge *= float(gram.trace()) / rows
    if ridge == 0:  # every row is zero, and so is N
        return 1.0, 1.0
    return (ridge * rows, float(rows)) if damping.norm == "mean" else (ridge, 1.0)
