"""Which subspace of a gradient the state lives in: choosing it, and going from one to the next."""

from dataclasses import dataclass

import torch
from torch import Tensor

from deftcore.ops.galore_matrix import project
from deftcore.ops.products import product

_OVERSAMPLE = 8  # columns beside the rank in a random start; they are dropped again
_SMALLEST = 1e-8  # gradients whose largest number is below are scaled


@dataclass(frozen=True)
class Subspace:
    """P of one or both sides: left [m, r], right [n, r], orthonormal columns; None is the identity."""

    left: Tensor | None
    right: Tensor | None

    def turn_from(self, old: "Subspace") -> "Subspace":
        """What takes state from an older subspace of the same sides into this one: left [r, r_old] and right, each
        P_new^T P_old, as the factors of `turned`."""
        pairs = ((self.left, old.left), (self.right, old.right))
        left, right = (None if a is None or b is None else a.t() @ b for a, b in pairs)
        return Subspace(left, right)

    def squared(self) -> "Subspace":
        """Both factors, elementwise."""
        return Subspace(*(None if x is None else x.square() for x in (self.left, self.right)))


def turned(x: Tensor, turn: Subspace) -> Tensor:
    """Q_left x Q_right^T."""
    return project(x, *(None if q is None else q.t() for q in (turn.left, turn.right)))


def sides_of(shape: tuple[int, int], projection: str, side: str) -> tuple[bool, bool]:
    """Whether a subspace of an [m, n] gradient has a left and a right factor: one-sided the shorter side's, the right
    one of a square."""
    if projection == "two_sided":
        return True, True
    right = shape[0] >= shape[1] if side == "auto" else side == "right"
    return not right, right


def first_columns(size: int, rank: int, like: Tensor) -> Tensor:
    """The first columns of the identity: a subspace as good as any other."""
    return torch.eye(size, rank, dtype=like.dtype, device=like.device)


def find_subspace(g: Tensor, old: Subspace, *, warm: bool, exact: bool, seed: int) -> Subspace | None:
    """The leading singular vectors of a gradient, as many as `old` has, on its sides.

    Args:
        g: [m, n].
        old: the subspace before it; its dtype is the one to compute in.
        warm: whether to start from it. Not: from random numbers, with a pass more.
        exact: by SVD; in place of subspace iteration with Rayleigh-Ritz (Halko, Martinsson, Tropp, arXiv 0909.4061).
        seed: of the random numbers.

    Returns:
        None where there is none: g is zero, or not finite.
    """
    factor = old.left if old.left is not None else old.right
    assert factor is not None
    g = g.to(factor.dtype)
    largest = float(torch.stack(g.aminmax()).abs().max()) if g.numel() else 0.0
    if not 0 < largest < float("inf"):
        return None
    if not _SMALLEST < largest < 1 / _SMALLEST:  # their squares would vanish, or overflow
        g = g / largest
    if exact:
        u, _, vh = torch.linalg.svd(g, full_matrices=False)
        return Subspace(
            None if old.left is None else u[:, : old.left.shape[1]].contiguous(),
            None if old.right is None else vh[: old.right.shape[1]].t().contiguous(),
        )
    return Subspace(
        None if old.left is None else _range(g, old.left, warm, seed),
        None if old.right is None else _range(g.t(), old.right, warm, seed),
    )


def _range(g: Tensor, old: Tensor, warm: bool, seed: int) -> Tensor:
    """The leading left singular vectors of g [a, b], as many as `old` [a, r] has, by products with g g^T."""
    a, rank = old.shape
    width = min(rank + _OVERSAMPLE, a)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(a, width - rank if warm else width, generator=generator, dtype=torch.float64)
    drawn = drawn.to(old.device, old.dtype) / a**0.5
    start = torch.cat([old, drawn], 1) if warm else drawn
    for _ in range(1 if warm else 2):
        start = torch.linalg.qr(product(product(start.t(), g), g.t()).t()).Q
    inner = product(start.t(), g)
    vectors = torch.linalg.eigh(inner @ inner.t()).eigenvectors  # ascending
    return product(start, vectors.flip(1)[:, :rank])  # as orthonormal as the two are
