"""4-bit weights: quantise, dequantise, and linear layers that decode on the way (QLoRA, arXiv 2305.14314)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deftcore.ops._library import define, flatten_tokens
from deftcore.ops.autocast import autocast_dtype
from deftcore.ops.checks import check_bias, check_choice, check_float
from deftcore.ops.kernels import DTYPE_CODES, address, backend, give_workspace, native, stream
from deftcore.ops.packed import NESTED_BLOCK, PARTS, SCHEMA, Parts, dequantize_ref
from deftcore.ops.products4 import multiply, multiply_backward
from deftcore.ops.quantized import QUANT_TYPES, QuantizedTensor, check_block_size, dynamic_book

ACTIVATIONS = ("exact", "int8")
_TINY = torch.finfo(torch.float32).tiny
_MOST_INT8_TOKENS = 16  # more are bound by arithmetic, and take the exact product


def quantize_4bit(
    w: Tensor,
    *,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    parity: str | None = None,
) -> QuantizedTensor:
    """Rounds w to 4 bits with one scale, the largest magnitude, per block of the flattened tensor.

    QLoRA's block-wise quantisation (Dettmers et al., arXiv 2305.14314, section 3).

    Args:
        w: any shape; float32, bfloat16 or float16, finite.
        quant_type: "nf4" (quantiles of a normal distribution) or "fp4".
        block_size: 32, 64, ... 4096.
        double_quant: round the scales to 8 bits as well (4.13 instead of 4.5 bits a weight at block_size 64).
        parity: "bnb-cpu" rounds the scales with bitsandbytes' 65536-entry table, which is not always the nearest
            code, so that they come out byte for byte; None takes the nearest. Nibbles and plain scales are always
            bitsandbytes' own.

    Returns:
        QuantizedTensor on w's device.

    Raises:
        TypeError, ValueError: naming the argument; w with NaN or infinity.

    >>> quantize_4bit(torch.tensor([[1.0, -1.0, 0.0, 0.5]])).dequantize().tolist()
    [[1.0, -1.0, 0.0, 0.44070982933044434]]
    """
    if not isinstance(w, Tensor) or w.dtype not in DTYPE_CODES or w.layout != torch.strided:
        got = f"{w.dtype} {w.layout}" if isinstance(w, Tensor) else type(w).__name__
        raise TypeError(f"w: must be a dense float32, bfloat16 or float16 tensor, got {got}")
    check_choice("quant_type", quant_type, QUANT_TYPES)
    check_block_size(block_size)
    if not isinstance(double_quant, bool):
        raise TypeError(f"double_quant: must be a bool, got {type(double_quant).__name__}")
    if parity not in (None, "bnb-cpu"):
        raise ValueError(f"parity: must be None or 'bnb-cpu', got {parity!r}")
    if w.device.type == "meta" and double_quant:
        raise ValueError("w: double_quant needs values, got a meta tensor; pass double_quant=False")
    packed, absmax = _quantize_4bit(w.detach(), block_size, QUANT_TYPES[quant_type])
    if w.device.type != "meta" and not bool(torch.isfinite(absmax).all()):
        raise ValueError("w: has values that are not finite; 4-bit blocks cannot hold them")
    q = QuantizedTensor(packed, absmax, w.shape, w.dtype, quant_type, block_size)
    return nest_scales(q, parity) if double_quant and absmax.numel() else q


def nest_scales(q: QuantizedTensor, parity: str | None = None) -> QuantizedTensor:
    """q with its float32 scales rounded to 8 bits around their mean, in blocks of 256."""
    offset = q.absmax.mean()
    if not torch.isfinite(offset):  # the float32 sum, which bitsandbytes takes, overflows
        offset = q.absmax.double().mean().float()
    centred = q.absmax - offset
    blocks = F.pad(centred, (0, -len(centred) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    largest = blocks.abs().amax(1)
    inverse = (1 / largest)[:, None]
    exact = (inverse >= _TINY) & (inverse <= 1 / _TINY)  # else a product loses bits, or all of them
    value = torch.where(exact, blocks * inverse, blocks / largest[:, None])
    value = value.clamp(-1, 1).flatten()[: len(centred)]
    book = dynamic_book().to(centred.device)
    if parity == "bnb-cpu":
        bins = ((value + 1) * 0.5 * 65535 + 0.5).to(torch.int32)
        value = -1 + 2 * bins / 65535
    codes = torch.bucketize(value, (book[:-1] + book[1:]) * 0.5)  # midpoints strictly below: ties take the lower
    flat = (largest == 0).repeat_interleave(NESTED_BLOCK)[: len(centred)]
    codes = torch.where(flat, 0 if parity == "bnb-cpu" else 127, codes)
    outer = largest.repeat_interleave(NESTED_BLOCK)[: len(centred)]
    codes -= (book[codes] * outer + offset > torch.finfo(q.dtype).max).int()  # no scale is rounded up to infinity
    codes = codes.to(torch.uint8)
    return QuantizedTensor(
        q.packed, codes, q.shape, q.dtype, q.quant_type, q.block_size, largest, float(offset), q.code, book
    )


def dequantize_4bit(q: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """code[nibble] * scale, one float32 product rounded once (QLoRA, Dettmers et al., arXiv 2305.14314, eq. 6).

    Args:
        q: 4-bit weights of any shape.
        dtype: float32, bfloat16, float16 or float64, which holds the float32 values; None is the dtype q was made from.

    Returns:
        Tensor of q's shape on q's device.

    Raises:
        TypeError: naming the argument.

    >>> dequantize_4bit(quantize_4bit(torch.eye(2)), torch.float64).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    if not isinstance(q, QuantizedTensor):
        raise TypeError(f"q: must be a QuantizedTensor, got {type(q).__name__}")
    return q.dequantize(dtype)


def linear_4bit(x: Tensor, q: QuantizedTensor, bias: Tensor | None = None, *, activations: str = "exact") -> Tensor:
    """y = x W^T + bias for a 4-bit W [M, K], which stays packed (QLoRA, arXiv 2305.14314, eq. 5 without its adapter).

    Differentiable in x and bias.

    Sums are float32. With float32 and float16 inputs the weights enter exactly; with bfloat16 inputs they are rounded
    to bfloat16, as PyTorch's own bfloat16 weights are.

    With activations "int8" each block of x and the code book are rounded to 255 steps of their largest magnitude,
    for inference on a CPU. Let a be a block's largest |x|, c that of the code and s the block's scale: a product is off
    by at most s (a |code| + c |x| + a c / 254) / 254. More than 16 tokens, float64, other devices, rows that are not
    whole blocks and x with NaN or infinity take the exact product.

    Args:
        x: [..., K], float32, bfloat16, float16 or float64; under autocast in its dtype.
        q: of shape [M, K].
        bias: [M] in x's dtype, or None.
        activations: "exact" or "int8", which has no gradient.

    Returns:
        [..., M] in x's dtype.

    Raises:
        TypeError, ValueError: naming the argument.

    >>> linear_4bit(torch.ones(1, 4), quantize_4bit(torch.eye(4))).tolist()
    [[1.0, 1.0, 1.0, 1.0]]
    """
    check_float("x", x)
    check_choice("activations", activations, ACTIVATIONS)
    dtype = autocast_dtype(x)
    if dtype is not None:  # as nn.Linear would
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    check_weight("q", q, x)
    check_bias("bias", bias, q.shape[0], "x", x)
    int8 = activations == "int8"
    if int8 and torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError("activations: 'int8' has no gradient; take 'exact', or call it under torch.no_grad()")
    y = (linear_4bit_int8_op if int8 else linear_4bit_op)(flatten_tokens(x), *q.parts(), bias)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], q.shape[0])


def check_weight(name: str, q: Any, x: Tensor) -> None:
    """Raises unless q is a matrix that x [..., K] can be multiplied by."""
    if not isinstance(q, QuantizedTensor):
        raise TypeError(f"{name}: must be a QuantizedTensor, got {type(q).__name__}")
    if q.dim() != 2:
        raise ValueError(f"{name}: must be a matrix [M, K], got shape {tuple(q.shape)}")
    if x.dim() == 0 or x.shape[-1] != q.shape[1]:
        raise ValueError(f"x: last dimension must be {q.shape[1]} ({name}.shape[1]), got shape {tuple(x.shape)}")
    if q.device != x.device:
        raise ValueError(f"{name}: must be on {x.device} as x, got {q.device}")


# ---------------------------------------------------------------------------- quantise, dequantise


def _quantize_4bit_impl(w: Tensor, block_size: int, quant_type: int) -> tuple[Tensor, Tensor]:
    count = w.numel()
    packed = torch.empty(-(-count // 2), dtype=torch.uint8, device=w.device)
    absmax = torch.empty(-(-count // block_size), dtype=torch.float32, device=w.device)
    kernels = backend("quantize_4bit", w)
    if kernels is None:
        return quantize_ref(w, block_size, quant_type)
    w = w.contiguous()
    args = native.Quantize4bit(
        w=address(w), packed=address(packed), absmax=address(absmax), count=count, block_size=block_size,
        dtype=DTYPE_CODES[w.dtype], type=quant_type,
    )  # fmt: skip
    kernels.quantize_4bit(args, stream(w))
    return packed, absmax


def quantize_ref(w: Tensor, block_size: int, quant_type: int) -> tuple[Tensor, Tensor]:
    """The definition, in plain PyTorch: packed nibbles and plain scales."""
    flat = w.detach().float().flatten()
    count = len(flat)
    blocks = F.pad(flat, (0, -count % block_size)).view(-1, block_size)
    absmax = torch.where(torch.isfinite(blocks).all(1), blocks.abs().amax(1), torch.nan)
    floored = absmax.clamp(min=1e-38)
    value = (blocks * (1 / floored)[:, None]).clamp(-1, 1)
    if count % block_size:  # a short last block divides, and stores the floored scale
        value[-1] = blocks[-1] / floored[-1]
        absmax[-1] = floored[-1]
    code = torch.tensor(native.code_book(quant_type), device=w.device)
    ascending, order = code.sort(stable=True)
    if quant_type == QUANT_TYPES["fp4"]:  # the two zeros: 0 below 8
        order = torch.tensor([11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3], device=w.device)
    index = order[torch.bucketize(value.flatten()[: count + count % 2], (ascending[:-1] + ascending[1:]) * 0.5)]
    pairs = index.to(torch.uint8).view(-1, 2)
    return (pairs[:, 0] << 4) | pairs[:, 1], absmax


def _quantize_4bit_fake(w: Tensor, block_size: int, quant_type: int) -> tuple[Tensor, Tensor]:
    count = w.numel()
    return (
        w.new_empty((count + 1) // 2, dtype=torch.uint8),
        w.new_empty((count + block_size - 1) // block_size, dtype=torch.float32),
    )


# ---------------------------------------------------------------------------- linear_4bit


def _linear_4bit_impl(x: Tensor, *args: Any) -> Tensor:
    return multiply(x, Parts(*args[:PARTS]), args[PARTS])


def _linear_4bit_fake(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty((x.shape[0], Parts(*args[:PARTS]).rows))


def _linear_4bit_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    w = Parts(*inputs[1 : 1 + PARTS])
    ctx.save_for_backward(*w[:5])  # the packed bytes that are there anyway: nothing the size of x
    ctx.rest, ctx.has_bias = w[5:], inputs[-1] is not None


def _linear_4bit_backward(ctx: Any, grad: Tensor) -> tuple:
    grad_x = linear_4bit_grad(grad, *ctx.saved_tensors, *ctx.rest, None, None) if ctx.needs_input_grad[0] else None
    grad_bias = grad.sum(0) if ctx.has_bias and ctx.needs_input_grad[-1] else None
    return (grad_x, *[None] * PARTS, grad_bias)


def _linear_4bit_grad_impl(grad: Tensor, *args: Any) -> Tensor:
    return multiply_backward(grad, Parts(*args[:PARTS]), *args[PARTS:])


def _linear_4bit_grad_fake(grad: Tensor, *args: Any) -> Tensor:
    return grad.new_empty((grad.shape[0], Parts(*args[:PARTS]).cols))


# ---------------------------------------------------------------------------- linear_4bit, activations in int8


def takes_int8(x: Tensor, w: Parts) -> bool:
    """Whether x [T, K] is rounded to int8 where that is asked for; all else takes the exact product."""
    return (
        x.device.type == "cpu"
        and x.dtype in DTYPE_CODES
        and 0 < x.shape[0] <= _MOST_INT8_TOKENS
        and w.rows > 0
        and w.cols > 0
        and not w.column_blocks
        and w.cols % w.block_size == 0
        and bool(torch.isfinite(x).all())
    )


def int8_blocks(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Blocks of x [T, K] as whole numbers [T, K / block, block], and what a step of each is worth [T, K / block]."""
    blocks = x.contiguous().unflatten(1, (-1, block))
    absmax = blocks.abs().amax(2)
    return (blocks / torch.where(absmax > 0, absmax, 1.0).unsqueeze(2) * 127).round(), absmax / 127


def linear_4bit_int8_ref(x: Tensor, w: Parts, bias: Tensor | None = None) -> Tensor:
    """The definition, in plain PyTorch: x [T, K] finite, rows of w whole blocks."""
    x8, steps = int8_blocks(x.float(), w.block_size)
    largest = w.code.abs().max()
    code8 = (w.code / torch.where(largest > 0, largest, 1.0) * 127).round()
    ones = torch.ones(w.rows * w.cols // w.block_size)
    w8 = dequantize_ref(w._replace(code=code8, absmax=ones, nested_absmax=None), torch.float32)
    sums = (x8.unsqueeze(1) * w8.unflatten(1, (-1, w.block_size))).sum(3)  # whole numbers
    scales = dequantize_ref(w._replace(code=torch.ones(16)), torch.float32)[:, :: w.block_size]
    y = (sums * ((steps * (largest / 127)).unsqueeze(1) * scales)).sum(2)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def multiply_int8(x: Tensor, w: Parts, bias: Tensor | None = None) -> Tensor:
    """x [T, K] W^T + bias with x rounded to int8 where that is done; elsewhere exactly."""
    if not takes_int8(x, w):
        return multiply(x, w, bias)
    kernels = backend("linear_4bit_int8", x)
    if kernels is None:
        return linear_4bit_int8_ref(x, w, bias)
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    y = x.new_empty((x.shape[0], w.rows))
    call = native.Linear4bit(
        w=w.native(), x=address(x), bias=address(bias), low=0, lora=0, y=address(y), workspace=0, tokens=x.shape[0],
        rank=0, dtype=DTYPE_CODES[x.dtype],
    )  # fmt: skip
    _held = give_workspace(call, kernels.linear_4bit_int8_workspace(call), x)
    kernels.linear_4bit_int8(call, stream(x))
    return y


def _linear_4bit_int8_impl(x: Tensor, *args: Any) -> Tensor:
    return multiply_int8(x, Parts(*args[:PARTS]), args[PARTS])


_quantize_4bit = define(
    "quantize_4bit(Tensor w, int block_size, int quant_type) -> (Tensor, Tensor)",
    _quantize_4bit_impl,
    _quantize_4bit_fake,
)
# grad W + low lora
linear_4bit_grad = define(
    f"linear_4bit_backward(Tensor grad, {SCHEMA}, Tensor? low, Tensor? lora) -> Tensor",
    _linear_4bit_grad_impl,
    _linear_4bit_grad_fake,
)
linear_4bit_op = define(
    f"linear_4bit(Tensor x, {SCHEMA}, Tensor? bias) -> Tensor",
    _linear_4bit_impl,
    _linear_4bit_fake,
    setup_context=_linear_4bit_setup,
    backward=_linear_4bit_backward,
)
linear_4bit_int8_op = define(
    f"linear_4bit_int8(Tensor x, {SCHEMA}, Tensor? bias) -> Tensor",
    _linear_4bit_int8_impl,
    _linear_4bit_fake,
)
