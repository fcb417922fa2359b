"""One optimizer step of matrices whose state lives in a subspace of their gradients (GaLore, Natural GaLore).

A subspace has a left factor [m, r], a right factor [n, r], or both, with orthonormal columns; None is the identity. The
projected gradient R is then [r, n], [m, r] or [r, r], and k is its number of elements.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

DAMPING_MODES = ("absolute", "relative")
FISHER_NORMS = ("sum", "mean")
_CHUNK = 1 << 18  # numbers of a window's row that are in float64 at a time


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


@dataclass(kw_only=True)
class Matrix:
    """A weight, its gradient and its subspace. A step changes `weight` and the window in place.

    Args:
        weight: [m, n], any floating dtype; of any shape where it has no subspace.
        grad: of weight's shape, or R itself where `projected`.
        left, right: the subspace's factors, in the dtype to compute in; both None: R is the gradient.
        window: of the natural gradient; None is GaLore.
        projected: whether `grad` is R already.
        seed: of stochastic rounding into a bfloat16 weight; None rounds to the nearest.
    """

    weight: Tensor
    grad: Tensor
    left: Tensor | None
    right: Tensor | None
    window: Window | None = None
    projected: bool = False
    seed: int | None = None


@dataclass(kw_only=True)
class AdamMatrix(Matrix):
    """One with Adam's moments, of R's shape, in the factors' dtype; a step changes them in place.

    Args:
        age: steps that the moments have seen, this one included.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    age: int


def galore_step(
    matrices: Sequence[AdamMatrix],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    scale: float = 1.0,
    correct_bias: bool = True,
    damping: Damping | None = None,
) -> None:
    """One step of every matrix: R = L^T G Q; N = F^-1 R; U = Adam(N); W -= lr scale L U Q^T; W -= lr weight_decay W.

    Das, *Natural GaLore*, arXiv 2410.16029, section 3; Zhao et al., *GaLore*, arXiv 2403.03507. A window whose K
    + lambda I has no Cholesky factor does not hold: it starts anew with R alone, so that N = R / (lambda + |R|^2), and
    the failure is counted. Where |R|^2 is infinite or NaN, N is R / lambda, and the window is empty.

    Args:
        matrices: their dtypes, shapes and sides may differ.
        damping: of those with a window.
    """
    for matrix in matrices:
        galore_step_ref(matrix, lr, betas, eps, weight_decay, scale, correct_bias, damping)


# ---------------------------------------------------------------------------- reference


def galore_step_ref(
    matrix: AdamMatrix,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    scale: float,
    correct_bias: bool,
    damping: Damping | None,
) -> None:
    """The definition, in plain PyTorch, in the dtype of the moments."""
    moments = (matrix.exp_avg, matrix.exp_avg_sq)

    def rule(n: Tensor) -> Tensor:
        return adam(n, *moments, matrix.age, betas, eps, correct_bias)

    step_by(rule, matrix, lr=lr, weight_decay=weight_decay, scale=scale, damping=damping)


def step_by(
    rule: Callable[[Tensor], Tensor],
    matrix: Matrix,
    *,
    lr: float,
    weight_decay: float,
    scale: float,
    damping: Damping | None,
) -> None:
    """A step whose update U is what `rule` makes of R, or N, in the subspace."""
    r = matrix.grad if matrix.projected else project(matrix.grad, matrix.left, matrix.right)
    if matrix.window is not None and damping is not None:
        r = natural_gradient(r, matrix.window, damping)
    change = back_project(rule(r), matrix.left, matrix.right)
    update(matrix.weight, change, lr * scale, lr * weight_decay, matrix.seed)


def project(g: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """R = L^T G Q: g [m, n] of any dtype to [r or m, r or n] in that of the factors.

    >>> project(torch.ones(2, 3), None, torch.eye(3)[:, :1]).tolist()
    [[1.0], [1.0]]
    """
    factor = left if left is not None else right
    r = g if factor is None else g.to(factor.dtype)
    r = r if left is None else left.t() @ r
    return r if right is None else r @ right


def back_project(u: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """L U Q^T: what `project` took, within the subspace."""
    full = u if left is None else left @ u
    return full if right is None else full @ right.t()


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
    for part in history.split(_CHUNK, 1):
        gram += part.double() @ part.double().t()
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


def adam(
    n: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    age: int,
    betas: tuple[float, float],
    eps: float,
    correct_bias: bool,
) -> Tensor:
    """U = M / (sqrt(V) + eps), times sqrt(1 - b2^age) / (1 - b1^age); M and V move on in place.

    As the published code: eps stands outside the root, and is not divided by the correction.
    """
    first, second = betas
    n = n.to(exp_avg.dtype)
    exp_avg.mul_(first).add_(n, alpha=1 - first)
    exp_avg_sq.mul_(second).addcmul_(n, n, value=1 - second)
    correction = (1 - second**age) ** 0.5 / (1 - first**age) if correct_bias else 1.0
    return exp_avg.div(exp_avg_sq.sqrt().add_(eps)).mul_(correction)


def update(weight: Tensor, change: Tensor, rate: float, decay: float, seed: int | None = None) -> None:
    """W -= rate change; W -= decay W, rounded once into the weight's dtype.

    Args:
        change: of weight's shape, in the dtype to compute in.
        seed: of stochastic rounding into bfloat16; None rounds to the nearest.
    """
    value = weight.to(change.dtype) - rate * change
    if decay:
        value.mul_(1 - decay)
    weight.copy_(round_stochastically(value, seed) if seed is not None and weight.dtype == torch.bfloat16 else value)


def round_stochastically(x: Tensor, seed: int) -> Tensor:
    """bfloat16 of x: the neighbour above or below it, more likely the nearer one, so that x is the mean.

    The random bits are a hash of seed and place: the same on every device and in every process.

    >>> x = torch.full((1 << 12,), 1 + 2**-9)  # a quarter of the way from 1 to the next bfloat16
    >>> y = round_stochastically(x, seed=3)
    >>> y.unique().tolist(), bool((y.double().mean() - x[0]).abs() < 1e-3)
    ([1.0, 1.0078125], True)
    """
    place = torch.arange(x.numel(), device=x.device, dtype=torch.int64)
    bits = (place * 0x9E3779B1 + ((seed * 0x85EBCA6B) & 0xFFFFFFFF)) & 0xFFFFFFFF
    bits = ((bits ^ (bits >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    bits = ((bits ^ (bits >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    noise = ((bits ^ (bits >> 16)) & 0xFFFF).to(torch.int32).view(x.shape)
    x = x.float().contiguous()
    rounded = ((x.view(torch.int32) + noise) & -0x10000).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)
