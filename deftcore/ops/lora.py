"""Frozen linear layer plus a low-rank adapter, as one op: gradients go to x and the factors only."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deftcore.ops._library import define, flatten_tokens
from deftcore.ops.autocast import autocast_dtype
from deftcore.ops.checks import check_bias, check_float, check_like, check_number, check_shape
from deftcore.ops.packed import PARTS, SCHEMA, Parts
from deftcore.ops.products import add_product_, linear, product
from deftcore.ops.products4 import multiply
from deftcore.ops.quant4 import check_weight, linear_4bit_grad
from deftcore.ops.quantized import QuantizedTensor


def lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedTensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float = 1.0,
    sigma: Tensor | None = None,
    minus: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    dropped_x: Tensor | None = None,
) -> Tensor:
    """y = x W^T + bias + scaling ((x A^T) * sigma) B^T - (x A0^T) B0^T, with W and A0 frozen (Hu et al., LoRA, arXiv
    2106.09685, eq. 3; sigma and the part of W that is taken away are KaSA's, arXiv 2412.06071, eq. 6 and 8).

    The low-rank terms are accumulated into the base product, 512 tokens at a time, and the backward keeps x, x A^T and
    x A0^T only. Over a dense W the products are the library's; a 4-bit W stays packed, forward and backward, and
    the low-rank terms are further columns of its native product. What is frozen gets no gradient even if it asks for
    one, and costs none.

    Args:
        x: [..., K]; lora_a: [R, K]; lora_b: [M, R]; bias: [M] or None. One dtype, one device; over a dense 16-bit W
            the factors may be float32 masters: their term is computed in float32 and rounded once, with the sum.
        weight: [M, K], in x's dtype or 4-bit.
        scaling: lora_alpha / r.
        sigma: [R], in the factors' dtype; None is ones.
        minus: A0 [R0, K] and B0 [M, R0], in the factors' dtype; None takes nothing away. B0 may be trained.
        dropped_x: [..., K], A's input where it differs from x (dropout), in the factors' dtype; None is x.

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
        sigma = None if sigma is None else sigma.to(dtype)
        minus = None if minus is None else (minus[0].to(dtype), minus[1].to(dtype))
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
    if sigma is not None:
        check_like("sigma", sigma, *like)
        check_shape("sigma", sigma, (rank,), "[R]")
    minus_a, minus_b = _checked_pair(minus, weight.shape, like)
    check_bias("bias", bias, weight.shape[0], "x", x)
    if dropped_x is not None:
        check_like("dropped_x", dropped_x, *like)
        check_shape("dropped_x", dropped_x, tuple(x.shape), "as x")
    check_number("scaling", abs(scaling), minimum=0.0)
    largest = torch.finfo(torch.promote_types(like[1].dtype, torch.float32)).max  # what the library's products take
    if abs(scaling) > largest:
        raise ValueError(f"scaling: must be at most {largest} in size, got {scaling}")
    low_rank = lora_a, lora_b, sigma, minus_a, minus_b
    if isinstance(weight, QuantizedTensor):
        return _lora_linear_4bit(x, dropped_x, *weight.parts(), *low_rank, bias, float(scaling))[0]
    return _lora_linear(x, dropped_x, weight, *low_rank, bias, float(scaling))[0]


def _checked_pair(pair: Any, shape: Sequence[int], like: tuple[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """A0 and B0, of a weight of a shape [M, K]; None, None where nothing is taken away."""
    if pair is None:
        return None, None
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise TypeError(f"minus: must be a pair of tensors A0 [R0, K] and B0 [M, R0], got {type(pair).__name__}")
    for name, matrix in zip(("minus[0]", "minus[1]"), pair, strict=True):
        check_like(name, matrix, *like)
        if matrix.dim() != 2:
            raise ValueError(f"{name}: must be a matrix, got shape {tuple(matrix.shape)}")
    rank = pair[0].shape[0]
    check_shape("minus[0]", pair[0], (rank, shape[1]), "[R0, K]")
    check_shape("minus[1]", pair[1], (shape[0], rank), "[M, R0]")
    return pair


# ---------------------------------------------------------------------------- the low-rank terms


Part = tuple[slice, Tensor, Tensor]  # columns of low, and the A and B that they belong to


class _LowRank(NamedTuple):
    """scaling ((x' A^T) * sigma) B^T - (x A0^T) B0^T, through low = [x' A^T, x A0^T] [T, R + R0]."""

    a: Tensor  # [R, K]
    b: Tensor  # [M, R]
    sigma: Tensor | None  # [R]
    minus_a: Tensor | None  # [R0, K]
    minus_b: Tensor | None  # [M, R0]

    def width(self) -> int:
        """R + R0."""
        return self.a.shape[0] + (0 if self.minus_a is None else self.minus_a.shape[0])

    def inputs(self) -> Tensor:
        """[A; A0]."""
        return self.a if self.minus_a is None else torch.cat([self.a, self.minus_a])

    def outputs(self) -> Tensor:
        """[B, B0]. A copy, but for few tokens cheaper than calls of their own, for many than another pass over y."""
        return self.b if self.minus_b is None else torch.cat([self.b, self.minus_b], 1)

    def low(self, x: Tensor, dropped_x: Tensor | None) -> Tensor:
        """[x' A^T, x A0^T]."""
        if dropped_x is None:
            return product(x.to(self.a.dtype), self.inputs().t())
        own = product(flatten_tokens(dropped_x), self.a.t())
        return own if self.minus_a is None else torch.cat([own, product(x.to(own.dtype), self.minus_a.t())], 1)

    def weights(self, scaling: float) -> tuple[Tensor | None, float]:
        """What low's columns are multiplied by: one number for each, or None, and one for all. Ones for sigma change
        no bit of plain LoRA's result."""
        if self.minus_a is None:
            return self.sigma, scaling
        own = self.a.new_full(self.a.shape[:1], scaling) if self.sigma is None else self.sigma * scaling
        return torch.cat([own, own.new_full(self.minus_a.shape[:1], -1.0)]), 1.0


def _setup(ctx: Any, inputs: tuple, first: int, low: Tensor, *weight: Tensor) -> None:
    """What both backwards keep.

    Args:
        inputs: the op's: x, dropped_x, the weight and, from `first` on, the adapter.
    """
    x, dropped_x, rest = *inputs[:2], inputs[first:]
    ctx.first = first
    # x only where A is trained; weights and factors are there anyway.
    kept = (x if dropped_x is None else dropped_x) if ctx.needs_input_grad[first] else None
    ctx.save_for_backward(kept, *rest[:5], low, *weight)
    ctx.scaling, ctx.shared, ctx.shape = rest[-1], dropped_x is None, x.shape
    ctx.mark_non_differentiable(low)


def _backward(ctx: Any, grad: Tensor, base: Callable[..., Tensor]) -> tuple:
    """The gradients of all inputs.

    Args:
        base: (grad [T, M], the weight's tensors, low [T, R], a [R, K]) to grad W + low a; or both None.
    """
    x, *factors, low = (saved := ctx.saved_tensors)[:7]  # asked for once: checkpointing unpacks them once
    terms, flat = _LowRank(*factors), flatten_tokens(grad)
    rank, wide = terms.a.shape[0], flat.to(terms.a.dtype)
    each, alpha = terms.weights(ctx.scaling)
    need_x, need_dropped = ctx.needs_input_grad[:2]
    need_a, need_b, need_sigma, _, need_minus, need_bias = ctx.needs_input_grad[ctx.first : ctx.first + 6]
    grad_x = grad_dropped = grad_a = grad_b = grad_sigma = grad_minus = None
    grad_low = product(wide, terms.outputs())
    if need_sigma:
        exact = torch.promote_types(grad_low.dtype, torch.float32)
        grad_sigma = ((grad_low[:, :rank].to(exact) * low[:, :rank]).sum(0) * ctx.scaling).to(grad_low.dtype)
    grad_low.mul_(alpha)
    if each is not None:
        grad_low.mul_(each)
    if need_x:
        low_rank: tuple[Tensor | None, Tensor | None] = None, None
        if ctx.shared:
            low_rank = grad_low, terms.inputs()
        elif terms.minus_a is not None:
            low_rank = grad_low[:, rank:], terms.minus_a
        grad_x = base(flat, saved[7:], *low_rank).reshape(ctx.shape)
    if need_dropped:
        grad_dropped = product(grad_low[:, :rank], terms.a).reshape(ctx.shape)
    if need_a:
        grad_a = product(grad_low[:, :rank].t(), flatten_tokens(x).to(wide.dtype))
    if need_b or need_minus:
        columns = low.shape[1] if need_minus else rank
        both = product(low[:, :columns].t(), wide).t().contiguous().mul_(alpha)
        both = both if each is None else both.mul_(each[:columns])
        grad_b, grad_minus = (both[:, :rank], both[:, rank:]) if need_minus else (both, None)
    grad_bias = flat.sum(0) if need_bias else None
    nothing = [None] * (ctx.first - 2)
    return (grad_x, grad_dropped, *nothing, grad_a, grad_b, grad_sigma, None, grad_minus, grad_bias, None)


# ---------------------------------------------------------------------------- dense weights


def _lora_linear_impl(x: Tensor, dropped_x: Tensor | None, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    terms, (bias, scaling), flat = _LowRank(*rest[:5]), rest[5:], flatten_tokens(x)
    low = terms.low(flat, dropped_x)
    each, alpha = terms.weights(scaling)
    left = low if each is None else low * each
    y = linear(flat, weight, bias).to(low.dtype)
    add_product_(y, left, terms.outputs().t(), beta=1.0, alpha=alpha)
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0]), low


def _lora_linear_fake(x: Tensor, dropped_x: Tensor | None, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    terms, tokens = _LowRank(*rest[:5]), x.shape[:-1].numel()
    return x.new_empty((*x.shape[:-1], weight.shape[0])), terms.a.new_empty((tokens, terms.width()))


def _lora_linear_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    _setup(ctx, inputs, 3, output[1], inputs[2])


def _lora_linear_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple:
    def base(flat: Tensor, weight: Sequence[Tensor], low: Tensor | None, a: Tensor | None) -> Tensor:
        found = product(flat, weight[0])
        if low is None or a is None:
            return found
        found = found.to(low.dtype)
        add_product_(found, low, a, beta=1.0, alpha=1.0)
        return found.to(flat.dtype)

    return _backward(ctx, grad, base)


# ---------------------------------------------------------------------------- 4-bit weights


def _lora_linear_4bit_impl(x: Tensor, dropped_x: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    w, terms, (bias, scaling) = Parts(*args[:PARTS]), _LowRank(*args[PARTS:-2]), args[-2:]
    flat = flatten_tokens(x)
    low = terms.low(flat, dropped_x)
    each, alpha = terms.weights(scaling)
    left = low * alpha if each is None else (low * alpha).mul_(each)
    y = multiply(flat, w, bias, left, terms.outputs())
    return y.reshape(*x.shape[:-1], w.rows), low


def _lora_linear_4bit_fake(x: Tensor, dropped_x: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    w, terms = Parts(*args[:PARTS]), _LowRank(*args[PARTS:-2])
    return x.new_empty((*x.shape[:-1], w.rows)), x.new_empty((x.shape[:-1].numel(), terms.width()))


def _lora_linear_4bit_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    weight = inputs[2 : 2 + PARTS]
    _setup(ctx, inputs, 2 + PARTS, output[1], *weight[:5])
    ctx.rest = weight[5:]


def _lora_linear_4bit_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple:
    return _backward(ctx, grad, lambda flat, packed, low, a: linear_4bit_grad(flat, *packed, *ctx.rest, low, a))


def lora_linear_ref(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, bias: Tensor | None,
    sigma: Tensor | None = None, minus: tuple[Tensor, Tensor] | None = None, dropped_x: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The definition, in plain PyTorch; any floating dtype."""
    low = F.linear(x if dropped_x is None else dropped_x, lora_a)
    y = F.linear(x, weight, bias) + scaling * F.linear(low if sigma is None else low * sigma, lora_b)
    return y if minus is None else y - F.linear(F.linear(x, minus[0]), minus[1])


_LOW_RANK = "Tensor lora_a, Tensor lora_b, Tensor? sigma, Tensor? minus_a, Tensor? minus_b, Tensor? bias, float scaling"
_lora_linear = define(
    f"lora_linear(Tensor x, Tensor? dropped_x, Tensor weight, {_LOW_RANK}) -> (Tensor, Tensor)",
    _lora_linear_impl,
    _lora_linear_fake,
    setup_context=_lora_linear_setup,
    backward=_lora_linear_backward,
)
_lora_linear_4bit = define(
    f"lora_linear_4bit(Tensor x, Tensor? dropped_x, {SCHEMA}, {_LOW_RANK}) -> (Tensor, Tensor)",
    _lora_linear_4bit_impl,
    _lora_linear_4bit_fake,
    setup_context=_lora_linear_4bit_setup,
    backward=_lora_linear_4bit_backward,
)
