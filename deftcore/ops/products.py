"""Products of matrices by the library that has the fastest one for this processor."""

import time
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Below either, finding oneDNN's kernel (about 12 us a call) costs more than the kernel spares.
_LEAST_ROWS, _LEAST_WORK = 16, 2**20
_ROWS = 512  # of a product that is added to something: not all of it is in memory at once, and what is stays in a cache
_TILE = 2**18  # numbers of a 16-bit matrix that are in memory as float32 at a time
_FEW = 4  # rows below which x W^T reads W once and waits for memory: PyTorch's then is no slower in 16 bits


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, [l, m] and [m, n] of the same dtype to [l, n].

    PyTorch gives float32 products on a CPU to MKL, which takes AVX2 on other makers' processors than its own. oneDNN
    takes AVX-512 wherever it is, and half of the time. It is fastest where b^T, or else b, is contiguous.

    16-bit products that a processor has no instructions for go through float32, tile by tile, and are rounded once:
    PyTorch's own take up to a hundred times as long. Which of the two is faster is timed, once a process and layout.

    >>> product(torch.ones(1, 2), torch.eye(2)).tolist()
    [[1.0, 1.0]]
    """
    if _goes_through_float32(a, b):
        return _through_float32(a.new_empty(a.shape[0], b.shape[1]), a, b)
    return _linear(a, b.t(), None, "none", [], "") if _has_linear(a, b) else a @ b


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, [T, K] and [M, K] to [T, M], by `product`."""
    if _goes_through_float32(x, weight.t()) and (bias is None or bias.dtype == x.dtype):
        return _through_float32(x.new_empty(x.shape[0], weight.shape[0]), x, weight.t(), bias=bias)
    if not _has_linear(x, weight.t()) or (bias is not None and bias.dtype != x.dtype):
        return F.linear(x, weight, bias)
    return _linear(x, weight, bias, "none", [], "")


def add_product_(out: Tensor, a: Tensor, b: Tensor, *, beta: float, alpha: float) -> None:
    """out <- beta out + alpha a @ b, as `Tensor.addmm_`, by `product`."""
    if out.dtype == a.dtype and _goes_through_float32(a, b):
        _through_float32(out, a, b, beta=beta, alpha=alpha)
        return
    if not _has_linear(a, b):
        torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)
        return
    for rows, part in zip(out.split(_ROWS), a.split(_ROWS), strict=True):
        (rows if beta == 1 else rows.mul_(beta)).add_(product(part, b), alpha=alpha)


# What torch.compile makes of a Linear on a CPU: takes strided operands, where those of `to_mkldnn` would be copied.
_linear: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def _has_linear(a: Tensor, b: Tensor) -> bool:
    if _linear is None or a.dtype != torch.float32 or b.dtype != torch.float32:
        return False
    return a.shape[0] >= _LEAST_ROWS and a.numel() * b.shape[1] >= _LEAST_WORK and _plain(a, b)


def _plain(*operands: Tensor) -> bool:
    """On the CPU, without gradients to record."""
    if not all(type(each) in (Tensor, nn.Parameter) for each in operands):  # what torch.compile traces with, for one
        return False
    recorded = torch.is_grad_enabled() and any(each.requires_grad for each in operands)
    return not recorded and all(each.device.type == "cpu" for each in operands)


# ---------------------------------------------------------------------------- 16 bits


def _goes_through_float32(a: Tensor, b: Tensor) -> bool:
    if a.dtype not in (torch.bfloat16, torch.float16) or b.dtype != a.dtype or not _plain(a, b):
        return False
    a_transposed, b_transposed = (each.stride(0) < each.stride(1) for each in (a, b))
    if a.numel() * b.shape[1] < _LEAST_WORK // 4 or (b_transposed and a.shape[0] < _FEW):
        return False
    return _float32_is_faster(a.dtype, a_transposed, b_transposed)


@cache
def _float32_is_faster(dtype: torch.dtype, a_transposed: bool, b_transposed: bool) -> bool:
    """Whether a 16-bit a @ b is clearly faster by way of float32 on this processor: both timed, on a small product."""
    a, b = torch.full((32, 256), 0.5, dtype=dtype, device="cpu"), torch.full((256, 256), 0.5, dtype=dtype, device="cpu")
    a = a.t().contiguous().t() if a_transposed else a
    b = b.t() if b_transposed else b
    out = torch.empty(32, 256, dtype=dtype, device="cpu")
    own, other = [], []
    for _ in range(4):  # the first finds the libraries' kernels; the least of the others is free of what else runs
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        middle = time.perf_counter()
        _through_float32(out, a, b)
        own.append(middle - start)
        other.append(time.perf_counter() - middle)
    return min(own[1:]) > 1.25 * min(other[1:])  # not by chance: one process should round as the next


def _through_float32(
    out: Tensor, a: Tensor, b: Tensor, *, bias: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0
) -> Tensor:
    """out <- beta out + alpha a @ b + bias, summed in float32 and rounded once."""
    columns = max(64, _TILE // max(1, b.shape[0]))
    for rows, left in zip(out.split(_ROWS), a.split(_ROWS), strict=True):
        left = left.float()
        for begin in range(0, b.shape[1], columns):
            tile = rows[:, begin : begin + columns]
            found = product(left, b[:, begin : begin + columns].float())
            if alpha != 1:
                found.mul_(alpha)
            if bias is not None:
                found.add_(bias[begin : begin + columns])
            if beta:
                found.add_(tile, alpha=beta)
            tile.copy_(found)
    return out
