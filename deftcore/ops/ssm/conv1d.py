"""Causal depthwise convolution over time, as in front of Mamba's scans, in causal_conv1d's signatures."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deftcore.ops._library import define
from deftcore.ops.checks import check_float, check_integers, check_like, check_shape
from deftcore.ops.kernels import DTYPE_CODES, address, backend, native, stream
from deftcore.ops.ssm._layout import empty_like, strided, wide_dtype

MAX_WIDTH: int = native.max_conv_width


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    activation: str | None = None,
    *,
    seq_idx: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """out_t = f(bias + sum_k weight[:, k] x_{t - W + 1 + k}) per channel, f silu or the identity.

    The convolution of Mamba's block (Gu and Dao, arXiv 2312.00752, section 3.4).
    Sums are float32. Every argument but `seq_idx` is differentiable.

    Args:
        x: [B, C, L], any strides ([B, L, C] transposed needs no copy).
        weight: [C, W], W up to 16; bias: [C] or None. Any floating dtype.
        initial_states: [B, C, W - 1] in x's dtype, what came before x; None is 0.
        return_final_states: also return what the next call takes as `initial_states`, to go on with the last sequence.
        activation: None, "silu" or "swish" (the same).
        seq_idx: [B, L] integers; no tap reaches a step of another number. `initial_states` belong to the first. A
            negative number is padding: 0 comes out.

    Returns:
        out [B, C, L] in x's dtype; with `return_final_states` also the last W - 1 steps, [B, C, W - 1], with 0 for
            those of sequences before the last.

    Raises:
        TypeError, ValueError: naming the argument.

    >>> causal_conv1d(torch.ones(1, 1, 3), torch.ones(1, 2)).tolist()
    [[[1.0, 2.0, 2.0]]]
    """
    check_float("x", x)
    if x.dim() != 3:
        raise ValueError(f"x: must be [B, C, L], got shape {tuple(x.shape)}")
    taps, offset, silu = conv_parameters(x, weight, bias, activation)
    reach = weight.shape[1] - 1
    if initial_states is not None:
        check_like("initial_states", initial_states, "x", x)
        check_shape("initial_states", initial_states, (*x.shape[:2], reach), "[B, C, W - 1]")
    if seq_idx is not None:
        seq_idx = check_sequence(seq_idx, x.shape[0], x.shape[2], x)
    out = causal_conv1d_op(x, taps, offset, initial_states, seq_idx, silu)
    if seq_idx is not None and (seq_idx.device.type != "cpu" or torch.compiler.is_compiling() or (seq_idx < 0).any()):
        out = out.masked_fill((seq_idx < 0).unsqueeze(1), 0)
    if not return_final_states:
        return out
    window = next_window(x, initial_states, reach)
    since = _reach(seq_idx, x.shape[2])
    if since is not None and x.shape[2]:
        back = torch.arange(reach - 1, -1, -1, device=x.device)
        window = window.masked_fill(back > since[..., -1:], 0)
    return out, window


def next_window(x: Tensor, window: Tensor | None, reach: int) -> Tensor:
    """The last `reach` steps of x [B, C, L] and of what came before it, `window` [B, C, reach] or zeros."""
    if x.shape[2] >= reach:
        return x[..., x.shape[2] - reach :].clone(memory_format=torch.contiguous_format)
    before = x.new_zeros((*x.shape[:2], reach)) if window is None else window
    return torch.cat((before, x), -1)[..., x.shape[2] :].contiguous()


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last steps of each of several sequences that lie behind each other, as `causal_conv1d_update` takes them.

    Args:
        x: [T, C], any floating dtype.
        cu_seqlens: [sequences + 1], int32 or int64, rising from 0 to at most T: sequence i is x[cu[i]:cu[i + 1]].
        state_len: how many steps; a shorter sequence has zeros in front.

    Returns:
        [sequences, C, state_len] in x's dtype, differentiable.

    Raises:
        TypeError, ValueError: naming the argument.

    >>> causal_conv1d_varlen_states(torch.arange(1.0, 6)[:, None], torch.tensor([0, 1, 5]), 2).tolist()
    [[[0.0, 1.0]], [[4.0, 5.0]]]
    """
    check_float("x", x)
    if x.dim() != 2:
        raise ValueError(f"x: must be [T, C], got shape {tuple(x.shape)}")
    if isinstance(state_len, bool) or not isinstance(state_len, int) or state_len < 0:
        raise ValueError(f"state_len: must be an integer of at least 0, got {state_len!r}")
    ends = check_ends("cu_seqlens", cu_seqlens, x.shape[0], x)
    places = ends[1:, None] + torch.arange(-state_len, 0, device=x.device)
    inside = (places >= ends[:-1, None]).unsqueeze(-1)
    padded = torch.cat((x, x.new_zeros(1, x.shape[1])))  # an index that is outside needs a row to point at
    return torch.where(inside, padded[places.clamp(min=0)], 0).transpose(1, 2)


def check_ends(name: str, ends: Any, length: int, x: Tensor) -> Tensor:
    """Sequences' borders as int64; raises unless they rise from 0 to at most `length`."""
    if not isinstance(ends, Tensor) or ends.dim() != 1 or not ends.numel():
        raise ValueError(f"{name}: must be a tensor [sequences + 1], got {getattr(ends, 'shape', type(ends))}")
    check_integers(name, ends, tuple(ends.shape), "", "x", x)
    if ends.device.type == "cpu" and not torch.compiler.is_compiling():
        steps = ends.diff(prepend=ends.new_zeros(1))
        if ends[0] != 0 or (steps < 0).any() or ends[-1] > length:
            raise ValueError(f"{name}: must rise from 0 to at most {length}, got {ends.tolist()}")
    return ends.to(torch.int64)


def conv_parameters(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor | None, bool]:
    """weight as [W, C] and bias in the accumulation's dtype, and whether silu follows."""
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"activation: must be None, 'silu' or 'swish', got {activation!r}")
    return (*conv_taps(weight, bias, x.shape[1], x), activation is not None)


def conv_taps(
    weight: Tensor, bias: Tensor | None, channels: int, x: Tensor, prefix: str = ""
) -> tuple[Tensor, Tensor | None]:
    """weight [channels, W] as [W, channels] and bias in the accumulation's dtype; `prefix` of their names in errors."""
    check_float(f"{prefix}weight", weight)
    wide = wide_dtype(x)
    if weight.dim() != 2 or weight.shape[0] != channels or not 1 <= weight.shape[1] <= MAX_WIDTH:
        raise ValueError(
            f"{prefix}weight: shape must be ({channels}, W) with W in 1..{MAX_WIDTH}, got {tuple(weight.shape)}"
        )
    if bias is not None:
        check_float(f"{prefix}bias", bias)
        check_shape(f"{prefix}bias", bias, (channels,), "one per channel")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.device != x.device:
            raise ValueError(f"{prefix}{name}: must be on {x.device} as x, got {t.device}")
    return weight.to(wide).t().contiguous(), None if bias is None else bias.to(wide).contiguous()


def check_sequence(seq_idx: Any, batch: int, length: int, x: Tensor) -> Tensor:
    """seq_idx as contiguous int32; raises unless it is [batch, length] integers on x's device."""
    check_integers("seq_idx", seq_idx, (batch, length), "[B, L]", "x", x)
    return seq_idx.to(torch.int32).contiguous()


# ---------------------------------------------------------------------------- op


def conv_forward(
    x: Tensor, taps: Tensor, bias: Tensor | None, first: Tensor | None, sequence: Tensor | None, silu: bool
) -> Tensor:
    """out of x [B, C, L], taps [W, C], bias [C], first [B, C, W - 1] and sequence [B, L]."""
    kernels, out = backend("causal_conv1d", x), empty_like(x)
    if kernels is None:
        total, _, _ = _conv_ref(x, taps, bias, first, sequence)
        return out.copy_(F.silu(total) if silu else total)
    kernels.causal_conv1d(_native_args(x, out, taps, bias, first, sequence, silu), stream(x))
    return out


def conv_backward(
    grad: Tensor, x: Tensor, taps: Tensor, bias: Tensor | None, first: Tensor | None, sequence: Tensor | None,
    silu: bool, wanted: list[bool], grad_x: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, taps, bias and first; x's is written into `grad_x` where that is given."""
    kernels, empty = backend("causal_conv1d", x), taps.new_empty(0)
    grad_x = empty_like(x) if grad_x is None else grad_x
    if kernels is None:
        into_x, *rest = _conv_backward_ref(grad, x, taps, bias, first, sequence, silu)
        grad_taps, grad_bias, grad_first = (
            g if need else g.new_empty(0) for g, need in zip(rest, wanted[1:], strict=True)
        )
        return grad_x.copy_(into_x), grad_taps, grad_bias, grad_first
    grad_taps = torch.zeros_like(taps) if wanted[1] else empty
    grad_bias = torch.zeros_like(bias) if bias is not None and wanted[2] else empty.clone()
    grad_first = x.new_empty(first.shape if first is not None and wanted[3] else 0)
    args = native.CausalConv1dBackward(
        forward=_native_args(x, grad, taps, bias, first, sequence, silu), grad_x=strided(grad_x),
        grad_first=strided(grad_first if grad_first.numel() else None),
        grad_weight=address(grad_taps) if wanted[1] else 0, grad_bias=address(grad_bias) if grad_bias.numel() else 0,
    )  # fmt: skip
    kernels.causal_conv1d_backward(args, stream(x))
    return grad_x, grad_taps, grad_bias, grad_first


def _native_args(
    x: Tensor, out: Tensor, taps: Tensor, bias: Tensor | None, first: Tensor | None, sequence: Tensor | None, silu: bool
) -> Any:
    return native.CausalConv1d(
        x=strided(x), out=strided(out), first=strided(first if first is not None and first.numel() else None),
        weight=address(taps), bias=address(bias), sequence=address(sequence), batch=x.shape[0], length=x.shape[2],
        channels=x.shape[1], width=taps.shape[0], dtype=DTYPE_CODES[x.dtype], silu=silu,
    )  # fmt: skip


def _conv_fake(
    x: Tensor, taps: Tensor, bias: Tensor | None, first: Tensor | None, sequence: Tensor | None, silu: bool
) -> Tensor:
    return empty_like(x)


def _conv_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.silu = inputs[5]


def _conv_grad(ctx: Any, grad: Tensor) -> tuple:
    wanted = [bool(need) for need in ctx.needs_input_grad[:4]]
    found = _causal_conv1d_grad(grad, *ctx.saved_tensors, ctx.silu, wanted)
    return (*(g if need else None for g, need in zip(found, wanted, strict=True)), None, None)


def _conv_grad_fake(
    grad: Tensor, x: Tensor, taps: Tensor, bias: Tensor | None, first: Tensor | None, sequence: Tensor | None,
    silu: bool, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        empty_like(x), taps.new_empty(taps.shape if wanted[1] else 0),
        taps.new_empty(bias.shape if bias is not None and wanted[2] else 0),
        x.new_empty(first.shape if first is not None and wanted[3] else 0),
    )  # fmt: skip


# ---------------------------------------------------------------------------- references


def _reach(sequence: Tensor | None, length: int) -> Tensor | None:
    """Steps since each step's sequence began, [B, 1, L]; what came before x belongs to the first one."""
    if sequence is None:
        return None
    steps = torch.arange(length, device=sequence.device)
    begins = F.pad(sequence[:, 1:] != sequence[:, :-1], (1, 0))
    last = torch.where(begins, steps, -MAX_WIDTH).cummax(1).values
    return (steps - last).unsqueeze(1)


def _conv_ref(
    x: Tensor, taps: Tensor, bias: Tensor | None, first: Tensor | None, sequence: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The sums before the activation, x with what came before it, and the reach of each step."""
    width, length = taps.shape[0], x.shape[2]
    before = x.new_zeros((*x.shape[:2], width - 1)) if first is None else first
    padded, reach = torch.cat((before, x), -1).to(taps.dtype), _reach(sequence, length)
    total = torch.zeros(x.shape, dtype=taps.dtype, device=x.device)
    for k in range(width):
        term = taps[k, :, None] * padded[..., k : k + length]
        total = total + (term if reach is None else term * (reach >= width - 1 - k))
    return total if bias is None else total + bias[:, None], padded, reach


def _conv_backward_ref(
    grad: Tensor, x: Tensor, taps: Tensor, bias: Tensor | None, first: Tensor | None, sequence: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    total, padded, reach = _conv_ref(x, taps, bias, first, sequence)
    grad = grad.to(taps.dtype)
    if silu:
        sigmoid = torch.sigmoid(total)
        grad = grad * sigmoid * (1 + total * (1 - sigmoid))
    width, length = taps.shape[0], x.shape[2]
    into, grad_taps = torch.zeros_like(padded), torch.empty_like(taps)
    for k in range(width):
        seen = grad if reach is None else grad * (reach >= width - 1 - k)
        into[..., k : k + length] += taps[k, :, None] * seen
        grad_taps[k] = (seen * padded[..., k : k + length]).sum((0, 2))
    empty = taps.new_empty(0)
    return (
        into[..., width - 1 :].to(x.dtype), grad_taps, empty if bias is None else grad.sum((0, 2)),
        x.new_empty(0) if first is None else into[..., : width - 1].to(x.dtype).contiguous(),
    )  # fmt: skip


_TENSORS = "Tensor x, Tensor taps, Tensor? bias, Tensor? first, Tensor? sequence, bool silu"
_causal_conv1d_grad = define(
    f"causal_conv1d_grad(Tensor grad, {_TENSORS}, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    conv_backward,
    _conv_grad_fake,
)
causal_conv1d_op = define(
    f"causal_conv1d({_TENSORS}) -> Tensor",
    conv_forward,
    _conv_fake,
    setup_context=_conv_setup,
    backward=_conv_grad,
)
