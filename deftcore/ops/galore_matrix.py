"""A matrix of a GaLore or Natural GaLore step, and what the step is, in plain PyTorch.

A subspace has a left factor [m, r], a right factor [n, r], or both, with orthonormal columns; None is the identity. The
projected gradient R is then [r, n], [m, r] or [r, r], and k is its number of elements.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deftcore.ops.natural import Damping, Window, natural_gradient
from deftcore.ops.products import product


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
    r = r if left is None else product(left.t(), r)
    return r if right is None else product(r, right)


def back_project(u: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """L U Q^T: what `project` took, within the subspace."""
    full = u if left is None else product(left, u)
    return full if right is None else product(full, right.t())


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
