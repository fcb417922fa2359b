"""The spectral term of rows of logits: minus the sum of their largest singular values over their norm."""

from typing import NamedTuple

import torch
from torch import Tensor

from deftcore.ops.logit_rows import SQUARES, Rows, ranges, times_columns, times_rows

_OVERSAMPLING, _ITERATIONS = 5, 2  # of the randomised singular values
_FEW = 96  # rows up to which all inner products cost less than the random projections
_NOTHING = 1e-8  # norms below it have no spectrum
_SEED = 0xBA
_GRAM_BLOCK = 1 << 20  # numbers in float64 at a time


class Spectrum(NamedTuple):
    """The term of rows Z [N, V]; its gradient is share Z + left (right^T Z), where Z is finite."""

    value: Tensor
    left: Tensor  # [N, j]
    right: Tensor  # [N, j]
    share: Tensor


def spectrum_rank(count: int, width: int, k: int, nuclear: bool) -> int:
    """j, for as many rows, of which some may be left out."""
    shorter = min(count, width)
    return shorter if nuclear else min(k, shorter)


def spectrum(rows: Rows, stats: Tensor, k: int, nuclear: bool) -> Spectrum:
    """With a norm below 1e-8, or one that is not finite, or a side below 2, all of it is 0.

    d sigma_i = u_i v_i^T = u_i (u_i^T Z) / sigma_i, so that singular vectors of the rows are enough.
    """
    zero = torch.zeros((), dtype=rows.dtype, device=rows.logits.device)
    empty = zero.new_zeros(len(rows), spectrum_rank(len(rows), rows.width, k, nuclear))
    nothing = Spectrum(zero, empty, empty.clone(), zero.clone())
    shorter = min(rows.index.numel(), rows.width)
    norm = stats[:, SQUARES].double().sum().sqrt()
    if shorter < 2 or not bool(torch.isfinite(norm)) or float(norm) < _NOTHING:
        return nothing
    k = min(k, shorter)
    exact = nuclear or rows.index.numel() <= _FEW or k + _OVERSAMPLING >= shorter
    u, s = _all_values(rows) if exact else _random_values(rows, k)
    if not bool(torch.isfinite(s).all()):
        return nothing
    top, inverse = s[:k].sum(), torch.where(s > 0, 1 / s, 0.0)
    if nuclear:
        total = s.sum()
        c = (top - total * (torch.arange(len(s), device=s.device) < k)) / total.square()
        value, share = -top / total, torch.zeros_like(norm)
    else:
        # d |Z| = Z / |Z|
        u, inverse = u[:, :k], inverse[:k]
        c = -1 / norm
        value, share = -top / norm, top / norm**3
    left, right = empty.clone(), empty
    left[:, : u.shape[1]] = u
    right[:, : u.shape[1]] = u * (c * inverse)
    return Spectrum(value.to(rows.dtype), left, right, share.to(rows.dtype))


def _all_values(rows: Rows) -> tuple[Tensor, Tensor]:
    """U [N, j] and S [j] in float64 of all singular values that are not lost in rounding, from inner products."""
    count = rows.index.numel()
    gram = torch.zeros(count, count, dtype=torch.float64, device=rows.logits.device)
    for columns in ranges(0, rows.width, max(1, _GRAM_BLOCK // count)):
        z = rows.logits[rows.index, columns].double()
        z = z.masked_fill_(z == -torch.inf, 0.0)
        gram.addmm_(z, z.t())
    s, vectors = _roots(gram)
    return torch.zeros(len(rows), len(s), dtype=gram.dtype, device=gram.device).index_copy_(0, rows.index, vectors), s


def _random_values(rows: Rows, k: int) -> tuple[Tensor, Tensor]:
    """U [N, k + 5] and S [k + 5] of the largest singular values, by a random projection and power iterations (Halko et
    al., arXiv 0909.4061): never above the true ones."""
    generator = torch.Generator().manual_seed(_SEED)
    right = torch.randn(k + _OVERSAMPLING, rows.width, generator=generator).to(rows.logits.device, rows.dtype)
    for turn in range(_ITERATIONS + 1):
        left = torch.linalg.qr(times_rows(rows, right)).Q.contiguous()
        right = times_columns(rows, left, slice(0, rows.width))
        s, vectors = _roots(_gram(right))
        if turn < _ITERATIONS:  # orthonormal rows again, by what is much smaller than they
            right = ((vectors / s).t().to(rows.dtype)) @ right
    # Z ~ left right, and right right^T = vectors diag(s^2) vectors^T
    return left.double() @ vectors, s


def _gram(right: Tensor) -> Tensor:
    """right right^T in float64, by blocks of columns."""
    gram = torch.zeros(len(right), len(right), dtype=torch.float64, device=right.device)
    for columns in ranges(0, right.shape[1], max(1, _GRAM_BLOCK // len(right))):
        part = right[:, columns].double()
        gram.addmm_(part, part.t())
    return gram


def _roots(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values, largest first, and vectors [N, j] from inner products, without those lost in rounding."""
    squares, vectors = torch.linalg.eigh(gram)
    found = squares > squares[-1] * 4 * len(gram) * torch.finfo(torch.float64).eps
    return squares[found].flip(0).sqrt(), vectors[:, found].flip(1)
