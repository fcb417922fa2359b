"""Products of matrices by the library that has the fastest one for this processor."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Below either, finding oneDNN's kernel (about 12 us a call) costs more than the kernel spares.
_LEAST_ROWS, _LEAST_WORK = 16, 2**20
_ROWS = 512  # of a product that is added to something: not all of it is in memory at once, and what is stays in a cache


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, [l, m] and [m, n] of the same dtype to [l, n].

    PyTorch gives float32 products on a CPU to MKL, which takes AVX2 on other makers' processors than its own. oneDNN
    takes AVX-512 wherever it is, and half of the time. It is fastest where b^T, or else b, is contiguous.

    >>> product(torch.ones(1, 2), torch.eye(2)).tolist()
    [[1.0, 1.0]]
    """
    return _linear(a, b.t(), None, "none", [], "") if _has_linear(a, b) else a @ b


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, [T, K] and [M, K] to [T, M], by `product`."""
    if not _has_linear(x, weight.t()) or (bias is not None and bias.dtype != x.dtype):
        return F.linear(x, weight, bias)
    return _linear(x, weight, bias, "none", [], "")


def add_product_(out: Tensor, a: Tensor, b: Tensor, *, beta: float, alpha: float) -> None:
    """out <- beta out + alpha a @ b, as `Tensor.addmm_`, by `product`."""
    if not _has_linear(a, b):
        torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)
        return
    for rows, part in zip(out.split(_ROWS), a.split(_ROWS), strict=True):
        (rows if beta == 1 else rows.mul_(beta)).add_(product(part, b), alpha=alpha)


# What torch.compile makes of a Linear on a CPU: takes strided operands, where those of `to_mkldnn` would be copied.
_linear: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def _has_linear(a: Tensor, b: Tensor) -> bool:
    if _linear is None or a.device.type != "cpu" or a.dtype != torch.float32 or b.dtype != torch.float32:
        return False
    if a.shape[0] < _LEAST_ROWS or a.numel() * b.shape[1] < _LEAST_WORK:
        return False
    if not all(type(each) in (Tensor, nn.Parameter) for each in (a, b)):  # what torch.compile traces with, for one
        return False
    return not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad))
