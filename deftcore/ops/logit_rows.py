"""Rows of logits: what their softmaxes and entropies need, the gradient from that, the largest of each row, and
products with a few vectors. Native where there are kernels, else by blocks of rows or columns: nothing here is as large
as the logits, but the gradient in their dtype.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deftcore.ops.kernels import DTYPE_CODES, address, backend, native, stream

_BLOCK = 1 << 20  # elements of a block in float32: 4 MB
# Columns of the statistics, as in csrc/include/deftcore/logits.h.
LARGEST, LOG_SUM, TEACHER_LARGEST, TEACHER_LOG_SUM, DIVERGENCE, ENTROPY_LOG_SUM, ENTROPY, SQUARES = range(8)
STATS = 8


class Sharpness(NamedTuple):
    """1 / temperature of the divergence from the teacher, and of the entropy, which 0 leaves out."""

    of_divergence: float
    of_entropy: float


@dataclass(frozen=True)
class Rows:
    """Logits [..., V] as rows [N, V], those of them that `mask` [...] has and their first `width` columns; beside them
    the teacher's."""

    logits: Tensor
    teacher: Tensor | None
    mask: Tensor | None
    width: int

    @classmethod
    def of(cls, logits: Tensor, teacher: Tensor | None, mask: Tensor | None, width: int) -> "Rows":
        def flat(x: Tensor) -> Tensor:
            return x.detach().contiguous().view(-1, x.shape[-1])

        return cls(flat(logits), None if teacher is None else flat(teacher),
                   None if mask is None else mask.reshape(-1).contiguous(), width)  # fmt: skip

    def __len__(self) -> int:
        return self.logits.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """What sums are in: float32, float64 for float64."""
        return torch.promote_types(self.logits.dtype, torch.float32)

    @cached_property
    def divisor(self) -> Tensor | int:
        """The rows that count, at least one, without waiting for a device."""
        return max(len(self), 1) if self.mask is None else self.mask.sum().clamp(min=1)

    @cached_property
    def index(self) -> Tensor:
        """The rows that count."""
        every = torch.arange(len(self), device=self.logits.device)
        return every if self.mask is None else every[self.mask]

    def kernels(self) -> Any:
        """The native functions, None where there are none for these tensors."""
        if self.teacher is not None and self.teacher.dtype != self.logits.dtype:
            return None
        return backend("logit_rows", self.logits)

    def block(self, rows: slice, columns: slice) -> Tensor:
        """Logits in the wide dtype; 0 in rows that are left out."""
        return self._masked(self.logits, rows, columns)

    def teacher_block(self, rows: slice, columns: slice) -> Tensor:
        assert self.teacher is not None
        return self._masked(self.teacher, rows, columns)

    def finite(self, rows: slice, columns: slice) -> Tensor:
        """The same with 0 for minus infinity."""
        z = self.block(rows, columns)
        return z.masked_fill_(z == -math.inf, 0.0)

    def _masked(self, x: Tensor, rows: slice, columns: slice) -> Tensor:
        z = x[rows, columns].to(self.dtype, copy=True)
        return z if self.mask is None else z.masked_fill_(~self.mask[rows].unsqueeze(1), 0.0)

    def row_blocks(self, columns: int) -> Iterator[slice]:
        """Ranges of rows that together are all."""
        return ranges(0, len(self), max(1, _BLOCK // max(columns, 1)))


def ranges(begin: int, end: int, size: int) -> Iterator[slice]:
    for start in range(begin, end, size):
        yield slice(start, min(start + size, end))


# ---------------------------------------------------------------------------- statistics


def row_stats(rows: Rows, sharpness: Sharpness) -> Tensor:
    """[N, STATS] of rows; 0 in rows that are left out."""
    kernels = rows.kernels()
    if kernels is None:
        return row_stats_ref(rows, sharpness)
    stats = torch.empty(len(rows), STATS, dtype=torch.float32, device=rows.logits.device)
    kernels.logit_rows(_arguments(rows, stats, sharpness), stream(rows.logits))
    return stats


def _arguments(rows: Rows, stats: Tensor, sharpness: Sharpness) -> Any:
    return native.LogitRows(
        student=address(rows.logits), teacher=address(rows.teacher), mask=address(rows.mask), stats=address(stats),
        rows=len(rows), width=rows.width, stride=rows.logits.shape[1], dtype=DTYPE_CODES[rows.logits.dtype],
        sharpness=sharpness.of_divergence, entropy_sharpness=sharpness.of_entropy,
    )  # fmt: skip


def row_stats_ref(rows: Rows, sharpness: Sharpness) -> Tensor:
    """The definition, by blocks of rows, in plain PyTorch; any floating dtype."""
    stats = torch.zeros(len(rows), STATS, dtype=rows.dtype, device=rows.logits.device)
    columns = slice(0, rows.width)
    for block in rows.row_blocks(rows.width):
        z, out = rows.block(block, columns), stats[block]
        out[:, LARGEST] = z.amax(1)
        out[:, SQUARES] = rows.finite(block, columns).square().sum(1)
        x = z.sub_(out[:, LARGEST, None])
        if rows.teacher is not None:
            y = rows.teacher_block(block, columns)
            out[:, TEACHER_LARGEST] = y.amax(1)
            log_q, log_p = x * sharpness.of_divergence, y.sub_(out[:, TEACHER_LARGEST, None]) * sharpness.of_divergence
            out[:, LOG_SUM], out[:, TEACHER_LOG_SUM] = log_q.logsumexp(1), log_p.logsumexp(1)
            log_q, log_p = log_q.sub_(out[:, LOG_SUM, None]), log_p.sub_(out[:, TEACHER_LOG_SUM, None])
            p = log_p.exp()
            out[:, DIVERGENCE] = torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(1)
        if sharpness.of_entropy:
            x = x.mul_(sharpness.of_entropy)
            out[:, ENTROPY_LOG_SUM] = x.logsumexp(1)
            log_e = x.sub_(out[:, ENTROPY_LOG_SUM, None])
            e = log_e.exp()
            out[:, ENTROPY] = -torch.where(e == 0, 0.0, e * log_e).sum(1)
    return stats if rows.mask is None else stats.masked_fill_(~rows.mask.unsqueeze(1), 0.0)


# ---------------------------------------------------------------------------- the gradient


class Slopes(NamedTuple):
    """What the gradient of a row z with softmaxes q, p of the teacher, and e of the entropy is made of:
    terms[0] (q - p) + terms[1] e (log e + entropy) + terms[2] z + left (right^T Z), and `kept_grad` at `kept`."""

    terms: Tensor  # [3], wide
    kept: Tensor  # [N, K] int32 columns, -1 where there is none
    kept_grad: Tensor  # [N, K], wide
    left: Tensor  # [N, j], wide
    right: Tensor  # [N, j]


def rows_gradient(rows: Rows, stats: Tensor, sharpness: Sharpness, slopes: Slopes) -> Tensor:
    """The gradient of all logits [N, V], in their dtype."""
    grad = torch.empty_like(rows.logits)
    grad[:, rows.width :] = 0
    kernels, rank = rows.kernels(), slopes.left.shape[1]
    # the factor of the columns, which is made of the logits once more, is no larger than a block
    for columns in ranges(0, rows.width, max(1024, _BLOCK // rank // 1024 * 1024) if rank else rows.width):
        factor = times_columns(rows, slopes.right, columns) if rank else None
        if kernels is None:
            _gradient_ref(rows, stats, sharpness, slopes, factor, columns, grad)
            continue
        args = native.LogitRowsBackward(
            forward=_arguments(rows, stats, sharpness), slopes=address(slopes.terms), kept=address(slopes.kept),
            kept_grad=address(slopes.kept_grad), left=address(slopes.left), right=address(factor), grad=address(grad),
            begin=columns.start, end=columns.stop, most=slopes.kept.shape[1], rank=rank,
        )  # fmt: skip
        kernels.logit_rows_backward(args, stream(rows.logits))
    return grad


def _gradient_ref(
    rows: Rows, stats: Tensor, sharpness: Sharpness, slopes: Slopes, factor: Tensor | None, columns: slice, grad: Tensor
) -> None:
    for block in rows.row_blocks(columns.stop - columns.start):
        z = rows.block(block, columns)
        of = lambda at, block=block: stats[block, at, None]  # noqa: E731
        x, slope = z - of(LARGEST), torch.zeros_like(z)
        if sharpness.of_entropy:
            log_e = x * sharpness.of_entropy - of(ENTROPY_LOG_SUM)
            slope = slopes.terms[1] * log_e.exp() * (log_e + of(ENTROPY))
        if factor is not None:
            slope = slope.add_(slopes.terms[2] * z).addmm_(slopes.left[block], factor)
        slope = slope.masked_fill_(z == -math.inf, 0.0)
        if rows.teacher is not None:
            y = rows.teacher_block(block, columns) - of(TEACHER_LARGEST)
            q = (x * sharpness.of_divergence - of(LOG_SUM)).exp_()
            p = (y * sharpness.of_divergence - of(TEACHER_LOG_SUM)).exp_()
            slope = slope.add_(slopes.terms[0] * (q - p))
        kept = slopes.kept[block].long() - columns.start
        here = (kept >= 0) & (kept < z.shape[1])
        slope = slope.scatter_add_(1, kept.where(here, 0), slopes.kept_grad[block].where(here, 0.0))
        if rows.mask is not None:
            slope = slope.masked_fill_(~rows.mask[block].unsqueeze(1), 0.0)
        grad[block, columns] = slope.to(grad.dtype)


# ---------------------------------------------------------------------------- the largest


def top_logits(rows: Rows, most: int) -> Tensor:
    """[N, most] int32: the columns of each row's largest logits, in no order; -1 where there are no more."""
    top = getattr(rows.kernels(), "top_logits", None)
    if top is None:  # a library's
        found = rows.logits[:, : rows.width].topk(most, 1, sorted=False).indices.int()
        return found if rows.mask is None else found.masked_fill_(~rows.mask.unsqueeze(1), -1)
    found = torch.empty(len(rows), most, dtype=torch.int32, device=rows.logits.device)
    args = native.TopLogits(
        logits=address(rows.logits), mask=address(rows.mask), top=address(found), rows=len(rows), width=rows.width,
        stride=rows.logits.shape[1], most=most, dtype=DTYPE_CODES[rows.logits.dtype],
    )  # fmt: skip
    top(args, stream(rows.logits))
    return found


# ---------------------------------------------------------------------------- products


def times_rows(rows: Rows, factor: Tensor) -> Tensor:
    """Z factor^T [N, j] of a factor [j, width]; minus infinity is 0."""
    product, columns = torch.empty(len(rows), factor.shape[0], dtype=rows.dtype, device=factor.device), rows.width
    if _native_product(rows, product, factor, slice(0, columns), transposed=False):
        return product
    for block in rows.row_blocks(columns):
        torch.mm(rows.finite(block, slice(0, columns)), factor.t(), out=product[block])
    return product


def times_columns(rows: Rows, factor: Tensor, columns: slice) -> Tensor:
    """factor^T Z [j, columns] of a factor [N, j]; minus infinity is 0."""
    width = columns.stop - columns.start
    product = torch.empty(factor.shape[1], width, dtype=rows.dtype, device=factor.device)
    if _native_product(rows, factor, product, columns, transposed=True):
        return product
    product.zero_()
    for block in rows.row_blocks(width):
        product.addmm_(factor[block].t(), rows.finite(block, columns))
    return product


def _native_product(rows: Rows, of_rows: Tensor, of_columns: Tensor, columns: slice, *, transposed: bool) -> bool:
    multiply = getattr(rows.kernels(), "logit_product", None)
    if multiply is None:
        return False
    args = native.LogitProduct(
        logits=address(rows.logits), mask=address(rows.mask), of_rows=address(of_rows), of_columns=address(of_columns),
        rows=len(rows), stride=rows.logits.shape[1], begin=columns.start, end=columns.stop, rank=of_rows.shape[1],
        dtype=DTYPE_CODES[rows.logits.dtype], transposed=transposed,
    )  # fmt: skip
    multiply(args, stream(rows.logits))
    return True
