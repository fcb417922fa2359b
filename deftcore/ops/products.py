"""Products of matrices by whichever is fastest on this processor: PyTorch, oneDNN, or for 16 bits a kernel here."""

import time
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deftcore.ops._library import define, flatten_tokens
from deftcore.ops.checks import check_bias, check_float, check_like
from deftcore.ops.kernels import DTYPE_CODES, address, give_workspace, native

# Below either, finding oneDNN's kernel (about 12 us a call) costs more than the kernel spares.
_LEAST_ROWS, _LEAST_WORK = 16, 2**20
_ROWS = 512  # of a product that is added to something: not all of it is in memory at once, and what is stays in a cache
_HALVES = (torch.bfloat16, torch.float16)
_LEAST_WORK_16 = 2**15  # below which calling our kernel (about 10 us) costs more than PyTorch's worst
_FEW = 8  # rows up to which products wait for memory, and PyTorch has kernels of their own


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, [l, m] and [m, n] of the same dtype to [l, n].

    PyTorch gives float32 products on a CPU to MKL, which takes AVX2 on other makers' processors than its own. oneDNN
    takes AVX-512 wherever it is, and half of the time. It is fastest where b^T, or else b, is contiguous.

    16-bit products that a processor has no instructions for go through a kernel of ours, which sums in float32 and
    rounds once: PyTorch's own take up to a hundred times as long. Which of the two is faster is timed, once a process
    and layout.

    >>> product(torch.ones(1, 2), torch.eye(2)).tolist()
    [[1.0, 1.0]]
    """
    if _takes_ours(a, b):
        if _recorded(a, b):
            return linear_16bit_op(a, b.t(), None)
        return _multiply(a.new_empty(a.shape[0], b.shape[1]), a, b)
    return _linear(a, b.t(), None, "none", [], "") if _has_linear(a, b) else a @ b


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, [T, K] and [M, K] to [T, M], by `product`."""
    if _takes_ours(x, weight.t()) and (bias is None or bias.dtype == x.dtype):
        if _recorded(x, weight, *([] if bias is None else [bias])):
            return linear_16bit_op(x, weight, bias)
        return _multiply(x.new_empty(x.shape[0], weight.shape[0]), x, weight.t(), bias=bias)
    if not _has_linear(x, weight.t()) or (bias is not None and bias.dtype != x.dtype):
        return F.linear(x, weight, bias)
    return _linear(x, weight, bias, "none", [], "")


def add_product_(out: Tensor, a: Tensor, b: Tensor, *, beta: float, alpha: float) -> None:
    """out <- beta out + alpha a @ b, as `Tensor.addmm_`, by `product`. Not recorded."""
    if out.dtype == a.dtype and _takes_ours(a, b) and not _recorded(out, a, b):
        _multiply(out, a, b, beta=beta, alpha=alpha)
        return
    if not _has_linear(a, b):
        torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)
        return
    for rows, part in zip(out.split(_ROWS), a.split(_ROWS), strict=True):
        (rows if beta == 1 else rows.mul_(beta)).add_(product(part, b), alpha=alpha)


def plus_product(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y + a @ b, [l, n] plus [l, m] times [m, n], as `torch.addmm`, by `product`."""
    if y.dtype != a.dtype or not _takes_ours(a, b):
        return torch.addmm(y, a, b)
    if _recorded(y, a, b):
        return y + linear_16bit_op(a, b.t(), None)
    return _multiply(y.clone(), a, b, beta=1.0)


# What torch.compile makes of a Linear on a CPU: takes strided operands, where those of `to_mkldnn` would be copied.
_linear: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def _has_linear(a: Tensor, b: Tensor) -> bool:
    if _linear is None or a.dtype != torch.float32 or b.dtype != torch.float32:
        return False
    return a.shape[0] >= _LEAST_ROWS and a.numel() * b.shape[1] >= _LEAST_WORK and _plain(a, b)


def _plain(*operands: Tensor) -> bool:
    """On the CPU, without gradients to record."""
    return _on_cpu(*operands) and not _recorded(*operands)


def _on_cpu(*operands: Tensor) -> bool:
    """Whether each is a plain tensor there, and nothing that torch.compile traces with, for one."""
    return all(type(each) in (Tensor, nn.Parameter) and each.device.type == "cpu" for each in operands)


def _recorded(*operands: Tensor) -> bool:
    return torch.is_grad_enabled() and any(each.requires_grad for each in operands)


# ---------------------------------------------------------------------------- 16 bits


def ours_pays(dtype: torch.dtype) -> bool:
    """Whether some 16-bit product of this dtype is clearly faster by our kernel than by PyTorch on this processor."""
    layouts = [(few, a, b) for few in (False, True) for a in (False, True) for b in (False, True)]
    return dtype in _HALVES and any(_is_faster(dtype, *layout) for layout in layouts)


def linear_16bit(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias by the fastest product, [..., K] to [..., M]; differentiable, as often as one likes.

    Args:
        x: [..., K]; weight: [M, K]; bias: [M] or None. One floating dtype, one device.

    Raises:
        TypeError, ValueError: naming the argument.

    >>> linear_16bit(torch.ones(2), torch.eye(2)).tolist()
    [1.0, 1.0]
    """
    check_float("x", x)
    check_like("weight", weight, "x", x)
    if weight.dim() != 2:
        raise ValueError(f"weight: must be a matrix [M, K], got shape {tuple(weight.shape)}")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x: last dimension must be {weight.shape[1]} (weight.shape[1]), got {tuple(x.shape)}")
    check_bias("bias", bias, weight.shape[0], "x", x)
    y = linear_16bit_op(flatten_tokens(x), weight, bias)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], weight.shape[0])


def _takes_ours(a: Tensor, b: Tensor) -> bool:
    if a.dtype not in _HALVES or b.dtype != a.dtype or torch.compiler.is_compiling():
        return False
    if not _on_cpu(a, b) or a.numel() * b.shape[1] < _LEAST_WORK_16:
        return False
    a_transposed, b_transposed = (each.stride(0) < each.stride(1) for each in (a, b))
    return _is_faster(a.dtype, a.shape[0] <= _FEW, a_transposed, b_transposed)


@cache
def _is_faster(dtype: torch.dtype, few: bool, a_transposed: bool, b_transposed: bool) -> bool:
    theirs, ours = _seconds(dtype, few, a_transposed, b_transposed)
    return theirs > 1.25 * ours  # not by chance: one process should round as the next


def _seconds(dtype: torch.dtype, few: bool, a_transposed: bool, b_transposed: bool) -> tuple[float, float]:
    """What a small a @ b takes on this processor, by PyTorch and by ours."""
    rows, size = (2, 512) if few else (32, 256)
    a, b = (torch.full((n, size), 0.5, dtype=dtype, device="cpu") for n in (rows, size))
    a = a.t().contiguous().t() if a_transposed else a
    b = b.t() if b_transposed else b
    out = torch.empty(rows, size, dtype=dtype, device="cpu")
    theirs, ours = [], []
    for _ in range(4):  # the first finds the libraries' kernels; the least of the others is free of what else runs
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        middle = time.perf_counter()
        _multiply(out, a, b)
        theirs.append(middle - start)
        ours.append(time.perf_counter() - middle)
    return min(theirs[1:]), min(ours[1:])


def _multiply(
    out: Tensor, a: Tensor, b: Tensor, *, bias: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0
) -> Tensor:
    """out <- beta out + alpha a @ b + bias, summed in float32 and rounded once. All on the CPU."""
    if out.numel() == 0:
        return out
    if out.stride(1) != 1 and out.shape[1] > 1:
        if bias is not None or out.stride(0) != 1:
            whole = out.contiguous()
            out.copy_(_multiply(whole, a, b, bias=bias, beta=beta, alpha=alpha))
        else:
            _multiply(out.t(), b.t(), a.t(), beta=beta, alpha=alpha)
        return out
    a, b = (each if 1 in each.stride() else each.contiguous() for each in (a, b))
    bias = None if bias is None else bias.contiguous()
    (rows, inner), columns = a.shape, b.shape[1]
    args = native.Product(
        a=a.data_ptr(), b=b.data_ptr(), bias=address(bias), c=out.data_ptr(), workspace=0, rows=rows, inner=inner,
        columns=columns, a_row=a.stride(0), a_inner=a.stride(1), b_inner=b.stride(0), b_column=b.stride(1),
        c_row=out.stride(0), alpha=alpha, beta=beta, dtype=DTYPE_CODES[out.dtype],
    )  # fmt: skip
    _held = give_workspace(args, native.cpu.product_workspace(args), a)
    native.cpu.product(args, 0)
    return out


def _linear_16bit_impl(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear(x.detach(), weight.detach(), None if bias is None else bias.detach())


def _linear_16bit_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _linear_16bit_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, _ = inputs
    need_x, need_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if need_weight else None, weight if need_x else None)


def _linear_16bit_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    grad_x = None if weight is None else linear_16bit_op(grad, weight.t(), None)
    grad_weight = None if x is None else linear_16bit_op(grad.t(), x.t(), None)
    return grad_x, grad_weight, grad.sum(0) if ctx.needs_input_grad[2] else None


# Differentiable as often as one likes: its backward is made of it.
linear_16bit_op = define(
    "linear_16bit(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _linear_16bit_impl,
    _linear_16bit_fake,
    setup_context=_linear_16bit_setup,
    backward=_linear_16bit_backward,
)
