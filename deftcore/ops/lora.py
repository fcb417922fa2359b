"""Frozen linear layer plus a low-rank adapter, as one op: gradients go to x and the factors only."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deftcore.ops._library import autocast_dtype, define, flatten_tokens
from deftcore.ops.checks import check_bias, check_float, check_like, check_number, check_shape
from deftcore.ops.packed import PARTS, SCHEMA, Parts
from deftcore.ops.quant4 import check_weight, linear_4bit_grad, multiply
from deftcore.ops.quantized import QuantizedTensor


def lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedTensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    dropped_x: Tensor | None = None,
) -> Tensor:
    """y = x W^T + bias + scaling (x A^T) B^T, with W frozen (Hu et al., LoRA, arXiv 2106.09685, eq. 3).

    The low-rank term is accumulated into the base product (no [.., M] temporary), and the backward keeps x and
    x A^T only. Over a dense W the products are the library's; a 4-bit W stays packed, forward and backward, and the
    low-rank terms are further columns of its native product. A frozen W gets no gradient even if it asks for one.

    Args:
        x: [..., K]; lora_a: [R, K]; lora_b: [M, R]; bias: [M] or None. One dtype, one device; over a dense 16-bit W
            the factors may be float32 masters: their term is computed in float32 and rounded once, with the sum.
        weight: [M, K], in x's dtype or 4-bit.
        scaling: lora_alpha / r.
        dropped_x: [..., K], the adapter's input where it differs from x (dropout), in the factors' dtype; None is x.

    Returns:
        [..., M].

    Raises:
        TypeError, ValueError: naming the argument.

    >>> one = torch.ones(1, 1)
    >>> lora_linear(one, one, one, one, scaling=2.0).tolist()
    [[3.0]]
    """
    check_float("x", x)
    dtype = autocast_dtype(x)
    if dtype is not None:  # as nn.Linear would
        x, lora_a, lora_b = x.to(dtype), lora_a.to(dtype), lora_b.to(dtype)
        weight = weight.to(dtype) if isinstance(weight, Tensor) else weight
        bias = None if bias is None else bias.to(dtype)
        dropped_x = None if dropped_x is None else dropped_x.to(dtype)
    packed = isinstance(weight, QuantizedTensor)
    masters = not packed and x.dtype.itemsize == 2 and getattr(lora_a, "dtype", None) == torch.float32
    like: tuple[str, Tensor] = ("lora_a", lora_a) if masters else ("x", x)
    if masters and lora_a.device != x.device:
        raise ValueError(f"lora_a: must be on {x.device} as x, got {lora_a.device}")
    for name, matrix, of in (("weight", weight, ("x", x)), ("lora_a", lora_a, like), ("lora_b", lora_b, like)):
        if isinstance(matrix, QuantizedTensor):
            continue
        check_like(name, matrix, *of)
        if matrix.dim() != 2:
            raise ValueError(f"{name}: must be a matrix, got shape {tuple(matrix.shape)}")
    if packed:
        check_weight("weight", weight, x)
    elif x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x: last dimension must be {weight.shape[1]} (weight.shape[1]), got {tuple(x.shape)}")
    rank = lora_a.shape[0]
    check_shape("lora_a", lora_a, (rank, weight.shape[1]), "[R, K]")
    check_shape("lora_b", lora_b, (weight.shape[0], rank), "[M, R]")
    check_bias("bias", bias, weight.shape[0], "x", x)
    if dropped_x is not None:
        check_like("dropped_x", dropped_x, *like)
        check_shape("dropped_x", dropped_x, tuple(x.shape), "as x")
    check_number("scaling", abs(scaling), minimum=0.0)
    if isinstance(weight, QuantizedTensor):
        return _lora_linear_4bit(x, dropped_x, *weight.parts(), lora_a, lora_b, bias, float(scaling))[0]
    return _lora_linear(x, dropped_x, weight, lora_a, lora_b, bias, float(scaling))[0]


def _lora_linear_impl(
    x: Tensor, dropped_x: Tensor | None, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    flat = flatten_tokens(x if dropped_x is None else dropped_x)
    low = flat.to(lora_a.dtype) @ lora_a.t()
    y = F.linear(x.reshape(flat.shape), weight, bias).to(low.dtype).addmm_(low, lora_b.t(), alpha=scaling)
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0]), low


def _lora_linear_fake(
    x: Tensor, dropped_x: Tensor | None, weight: Tensor, lora_a: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    tokens = x.shape[:-1].numel()
    return x.new_empty((*x.shape[:-1], weight.shape[0])), lora_a.new_empty((tokens, lora_a.shape[0]))


def _lora_linear_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, dropped_x, weight, lora_a, lora_b, _, scaling = inputs
    ctx.save_for_backward(x if dropped_x is None else dropped_x, weight, lora_a, lora_b, output[1])
    ctx.scaling, ctx.shared = scaling, dropped_x is None
    ctx.mark_non_differentiable(output[1])


def _lora_linear_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple:
    x, weight, lora_a, lora_b, low = ctx.saved_tensors
    flat = flatten_tokens(grad)
    wide = flat.to(lora_a.dtype)
    grad_low = (wide @ lora_b).mul_(ctx.scaling)
    need_x, need_dropped, _, need_a, need_b, need_bias = ctx.needs_input_grad[:6]
    grad_x = grad_dropped = None
    if need_x:
        grad_x = flat @ weight
        if ctx.shared:
            grad_x = torch.addmm(grad_x.to(wide.dtype), grad_low, lora_a).to(x.dtype)
        grad_x = grad_x.reshape(x.shape)
    if need_dropped:
        grad_dropped = (grad_low @ lora_a).to(x.dtype).reshape(x.shape)
    grad_a = grad_low.t() @ flatten_tokens(x).to(wide.dtype) if need_a else None
    grad_b = (wide.t() @ low) * ctx.scaling if need_b else None
    grad_bias = flat.sum(0) if need_bias else None
    return grad_x, grad_dropped, None, grad_a, grad_b, grad_bias, None


# ---------------------------------------------------------------------------- 4-bit weights


def _lora_linear_4bit_impl(x: Tensor, dropped_x: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    w, (lora_a, lora_b, bias, scaling) = Parts(*args[:PARTS]), args[PARTS:]
    flat = flatten_tokens(x if dropped_x is None else dropped_x)
    low = flat @ lora_a.t()
    y = multiply(x.reshape(flat.shape), w, bias, low * scaling, lora_b)
    return y.reshape(*x.shape[:-1], w.rows), low


def _lora_linear_4bit_fake(x: Tensor, dropped_x: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    w, lora_a = Parts(*args[:PARTS]), args[PARTS]
    return x.new_empty((*x.shape[:-1], w.rows)), x.new_empty((x.shape[:-1].numel(), lora_a.shape[0]))


def _lora_linear_4bit_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, dropped_x, *weight, lora_a, lora_b, _, scaling = inputs
    # x only where A is trained; packed bytes and factors are there anyway.
    kept = (x if dropped_x is None else dropped_x) if ctx.needs_input_grad[2 + PARTS] else None
    ctx.save_for_backward(kept, lora_a, lora_b, output[1], *weight[:5])
    ctx.rest, ctx.scaling, ctx.shared, ctx.shape = weight[5:], scaling, dropped_x is None, x.shape
    ctx.mark_non_differentiable(output[1])


def _lora_linear_4bit_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple:
    x, lora_a, lora_b, low, *tensors = ctx.saved_tensors
    flat = flatten_tokens(grad)
    grad_low = (flat @ lora_b).mul_(ctx.scaling)
    need_x, need_dropped, need_a, need_b = (ctx.needs_input_grad[i] for i in (0, 1, 2 + PARTS, 3 + PARTS))
    grad_x = grad_dropped = None
    if need_x:
        fused = (grad_low, lora_a) if ctx.shared else (None, None)
        grad_x = linear_4bit_grad(flat, *tensors, *ctx.rest, *fused).reshape(ctx.shape)
    if need_dropped:
        grad_dropped = (grad_low @ lora_a).reshape(ctx.shape)
    grad_a = grad_low.t() @ flatten_tokens(x) if need_a else None
    grad_b = (flat.t() @ low) * ctx.scaling if need_b else None
    grad_bias = flat.sum(0) if ctx.needs_input_grad[4 + PARTS] else None
    return (grad_x, grad_dropped, *[None] * PARTS, grad_a, grad_b, grad_bias, None)


def lora_linear_ref(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, bias: Tensor | None
) -> Tensor:
    """The definition, in plain PyTorch; any floating dtype."""
    return F.linear(x, weight, bias) + scaling * F.linear(F.linear(x, lora_a), lora_b)


_lora_linear = define(
    "lora_linear(Tensor x, Tensor? dropped_x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? bias, "
    "float scaling) -> (Tensor, Tensor)",
    _lora_linear_impl,
    _lora_linear_fake,
    setup_context=_lora_linear_setup,
    backward=_lora_linear_backward,
)
_lora_linear_4bit = define(
    f"lora_linear_4bit(Tensor x, Tensor? dropped_x, {SCHEMA}, Tensor lora_a, Tensor lora_b, Tensor? bias, "
    "float scaling) -> (Tensor, Tensor)",
    _lora_linear_4bit_impl,
    _lora_linear_4bit_fake,
    setup_context=_lora_linear_4bit_setup,
    backward=_lora_linear_4bit_backward,
)
