"""A whole Mamba or Mamba-2 block after its input projection, as one op, with frozen weights and LoRA inside.

Convolution, projections, scan and gate run forward keeping what the input projection gave and a few small tensors; the
backward computes the rest again and gives gradients to the input, the carried states and the LoRA factors only. Weights
are never merged. For trained base weights call the ops one by one.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deftcore.ops._layout import wide_dtype
from deftcore.ops._library import autocast_dtype, define
from deftcore.ops.checks import check_float, check_like, check_number, check_shape
from deftcore.ops.kernels import has_kernel, native
from deftcore.ops.packed import Parts
from deftcore.ops.quant4 import check_weight, multiply, multiply_backward
from deftcore.ops.quantized import QuantizedTensor
from deftcore.ops.ssm.conv1d import conv_backward, conv_forward
from deftcore.ops.ssm.scan import scan_backward, scan_forward
from deftcore.ops.ssm.ssd import ssd_backward, ssd_forward, steps_of

MASKED_STEP = -1e4  # softplus of it is 0: a masked step leaves the state as it is


class LoraPair(NamedTuple):
    """scaling dropout(x) a^T b^T, added to all outputs of a projection or to `rows` of them.

    a: [R, K]; b: [M, R], or one row for each of `rows` (start, stop).
    """

    a: Tensor
    b: Tensor
    scaling: float = 1.0
    rows: tuple[int, int] | None = None
    dropout: float = 0.0


class Projection(NamedTuple):
    """A frozen linear layer, [M, K] dense or in 4 bits, and the LoRA pairs over it."""

    weight: Tensor | QuantizedTensor
    bias: Tensor | None = None
    lora: tuple[LoraPair, ...] = ()


def project(x: Tensor, layer: Projection) -> Tensor:
    """x [..., K] through a projection, by plain differentiable operations; dropout applied."""
    weight = layer.weight
    dense = weight.dequantize(x.dtype) if isinstance(weight, QuantizedTensor) else weight
    y = F.linear(x, dense, layer.bias)
    for pair in layer.lora:
        dropped = F.dropout(x, pair.dropout) if pair.dropout else x
        low = F.linear(F.linear(dropped, pair.a.to(x.dtype)), pair.b.to(x.dtype)) * pair.scaling
        start, stop = pair.rows or (0, y.shape[-1])
        y = y + F.pad(low, (start, y.shape[-1] - stop))
    return y


def mamba_inner(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Projection,
    dt_proj: Projection,
    out_proj: Projection,
    A: Tensor,
    D: Tensor,
    *,
    mask: Tensor | None = None,
    conv_state: Tensor | None = None,
    initial_state: Tensor | None = None,
    norm_eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Mamba's block after `in_proj`: convolution, silu, x_proj, dt_proj, selective scan, gate, out_proj.

    Kept for the backward: xz, x_proj's output, and a state every 32 steps. Exponents, states and sums are float32.

    Args:
        xz: [B, L, 2 D], the scan's input first, its gate second.
        conv_weight: [D, W]; conv_bias: [D] or None.
        x_proj: [R + 2 N, D], rows in the order dt, B, C; dt_proj: [D, R], its bias enters the scan in float32;
            out_proj: [M, D]. Dense weights in xz's dtype.
        A: [D, N], negative; D: [D].
        mask: [B, L], 0 or False at padding: the state passes through it unchanged, 0 comes out, no gradient enters.
        conv_state: [B, D, W - 1] and initial_state: [B, D, N], what an earlier part of the sequences left; None is 0.
        norm_eps: FalconMamba's weightless RMS norms on dt, B and C, with this epsilon; None leaves them out.

    Returns:
        out [B, L, M], and the last state (float32), the next `initial_state`; the next `conv_state` is the last W - 1
        steps of the convolution's input.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_float("xz", xz)
    if xz.dim() != 3 or xz.shape[2] % 2:
        raise ValueError(f"xz: must be [B, L, 2 D], got shape {tuple(xz.shape)}")
    batch, length, width = xz.shape[0], xz.shape[1], xz.shape[2] // 2
    xz, (x_proj, dt_proj, out_proj) = _lower(xz, (x_proj, dt_proj, out_proj))
    wide = wide_dtype(xz)
    check_float("A", A)
    check_float("D", D)
    if A.dim() != 2 or A.shape[0] != width:
        raise ValueError(f"A: shape must be ({width}, N), got {tuple(A.shape)}")
    check_shape("D", D, (width,), "one per channel")
    states = A.shape[1]
    rank = _shape(dt_proj)[1]
    for name, layer, shape in (
        ("x_proj", x_proj, (rank + 2 * states, width)), ("dt_proj", dt_proj, (width, rank)),
        ("out_proj", out_proj, (_shape(out_proj)[0], width)),
    ):  # fmt: skip
        _check_projection(name, layer, shape, xz)
    conv_weight, conv_bias = _conv_parameters(conv_weight, conv_bias, width, xz)
    xz, mask = _mask(xz, mask, batch, length)
    first = _carried("initial_state", initial_state, (batch, width, states), xz, wide)
    window = _window(conv_state, batch, width, conv_weight.shape[0] - 1, xz)
    tensors, plan, seeds = _plan(xz, [x_proj, dt_proj._replace(bias=None), out_proj])
    settings = json.dumps({"layers": plan, "states": states, "norm_eps": norm_eps})
    out, last, _, _ = _mamba_inner(
        xz, conv_weight, conv_bias, A.detach().to(wide).t().contiguous(), D.detach().to(wide).contiguous(),
        None if dt_proj.bias is None else dt_proj.bias.detach().to(wide).contiguous(), mask, window,
        None if first is None else first.transpose(1, 2).contiguous(), tensors, seeds, settings,
        _keeps(xz, window, first, *tensors),
    )  # fmt: skip
    return out, last.transpose(1, 2)


def mamba2_inner(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    out_proj: Projection,
    *,
    head_dim: int,
    groups: int = 1,
    norm_groups: int | None = None,
    norm_eps: float = 1e-5,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    mask: Tensor | None = None,
    conv_state: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mamba-2's block after `in_proj`: convolution, silu, scan, gated RMS norm, out_proj.

    Kept for the backward: zxbcdt. Exponents, states, norms and sums are float32.

    Args:
        zxbcdt: [B, L, 2 D + 2 G N + H], gate z, x, B, C and dt in this order; D = H P.
        conv_weight: [D + 2 G N, W]; conv_bias: as many or None.
        dt_bias, A, D: [H], A negative.
        norm_weight: [D], of the norm over y silu(z), whose mean squares are over D / norm_groups channels; None is
            `groups`.
        out_proj: [M, D].
        mask, conv_state [B, D + 2 G N, W - 1], initial_state [B, H, P, N]: as in `mamba_inner`.

    Returns:
        out [B, L, M], and the last state (float32), the next `initial_state`; the next `conv_state` is the last W - 1
        steps of the convolution's input.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_float("zxbcdt", zxbcdt)
    if zxbcdt.dim() != 3:
        raise ValueError(f"zxbcdt: must be [B, L, 2 D + 2 G N + H], got shape {tuple(zxbcdt.shape)}")
    batch, length, total = zxbcdt.shape
    zxbcdt, (out_proj,) = _lower(zxbcdt, (out_proj,))
    wide = wide_dtype(zxbcdt)
    check_float("A", A)
    heads = A.shape[0] if A.dim() == 1 else 0
    width = heads * head_dim
    if heads == 0 or groups < 1 or heads % groups or (total - 2 * width - heads) % (2 * groups):
        raise ValueError(
            f"A: must be [H] with {groups} groups a divisor and 2 H {head_dim} + 2 G N + H = {total}, got {A.shape}"
        )
    states = (total - 2 * width - heads) // (2 * groups)
    norm_groups = groups if norm_groups is None else norm_groups
    if states < 1 or norm_groups < 1 or width % norm_groups:
        raise ValueError(f"norm_groups: must divide D = {width}, got {norm_groups} (N = {states})")
    for name, t, size in (("dt_bias", dt_bias, heads), ("D", D, heads), ("norm_weight", norm_weight, width)):
        check_float(name, t)
        check_shape(name, t, (size,), "one number each")
    check_number("norm_eps", norm_eps, minimum=0.0)
    _check_projection("out_proj", out_proj, (_shape(out_proj)[0], width), zxbcdt)
    channels = width + 2 * groups * states
    conv_weight, conv_bias = _conv_parameters(conv_weight, conv_bias, channels, zxbcdt)
    zxbcdt, mask = _mask(zxbcdt, mask, batch, length)
    first = _carried("initial_state", initial_state, (batch, heads, head_dim, states), zxbcdt, wide)
    window = _window(conv_state, batch, channels, conv_weight.shape[0] - 1, zxbcdt)
    tensors, plan, seeds = _plan(zxbcdt, [out_proj])
    settings = json.dumps(
        {"layers": plan, "heads": heads, "groups": groups, "states": states, "norm_groups": norm_groups,
         "norm_eps": norm_eps, "low": dt_limit[0], "high": dt_limit[1]}
    )  # fmt: skip
    return _mamba2_inner(
        zxbcdt, conv_weight, conv_bias, dt_bias.detach().to(wide), A.detach().to(wide),
        D.detach().to(wide).repeat_interleave(head_dim), norm_weight.detach().to(wide), mask, window,
        None if first is None else first.contiguous(), tensors, seeds, settings,
    )  # fmt: skip


# ---------------------------------------------------------------------------- arguments


def _shape(layer: Projection) -> tuple[int, int]:
    """Outputs and inputs of a projection."""
    if not isinstance(layer, Projection):
        raise TypeError(f"projections: must be Projection, got {type(layer).__name__}")
    if not isinstance(layer.weight, (Tensor, QuantizedTensor)):
        raise TypeError(f"a projection's weight: must be a Tensor or in 4 bits, got {type(layer.weight).__name__}")
    if len(layer.weight.shape) != 2:
        raise ValueError(f"a projection's weight: must be a matrix [M, K], got shape {tuple(layer.weight.shape)}")
    rows, columns = layer.weight.shape
    return int(rows), int(columns)


def _lower(x: Tensor, layers: Sequence[Projection]) -> tuple[Tensor, tuple[Projection, ...]]:
    """Under autocast, activations and weights in its dtype; LoRA factors in the activations' dtype always."""
    dtype = autocast_dtype(x)
    if dtype is not None:
        x = x.to(dtype)
        layers = [
            layer if isinstance(layer.weight, QuantizedTensor) else layer._replace(weight=layer.weight.to(dtype))
            for layer in layers
        ]
    return x, tuple(
        layer._replace(
            bias=None if layer.bias is None else layer.bias.to(x.dtype),
            lora=tuple(pair._replace(a=pair.a.to(x.dtype), b=pair.b.to(x.dtype)) for pair in layer.lora),
        )
        for layer in layers
    )


def _check_projection(name: str, layer: Projection, shape: tuple[int, int], x: Tensor) -> None:
    if isinstance(layer.weight, QuantizedTensor):
        if tuple(layer.weight.shape) != shape:
            raise ValueError(f"{name}: shape must be {shape}, got {tuple(layer.weight.shape)}")
        check_weight(name, layer.weight, x.new_empty((0, shape[1])))
    else:
        check_like(name, layer.weight, "the input", x)
        check_shape(name, layer.weight, shape, "outputs, inputs")
    if layer.bias is not None:
        check_float(f"{name}'s bias", layer.bias)
        check_shape(f"{name}'s bias", layer.bias, shape[:1], "one per output")
    for i, pair in enumerate(layer.lora):
        start, stop = pair.rows or (0, shape[0])
        if not 0 <= start < stop <= shape[0]:
            raise ValueError(f"{name}'s LoRA pair {i}: rows must lie in 0..{shape[0]}, got {pair.rows}")
        check_shape(f"{name}'s LoRA pair {i}: a", pair.a, (pair.a.shape[0], shape[1]), "[R, K]")
        check_shape(f"{name}'s LoRA pair {i}: b", pair.b, (stop - start, pair.a.shape[0]), "[rows, R]")
        if not 0 <= pair.dropout < 1:
            raise ValueError(f"{name}'s LoRA pair {i}: dropout must be in [0, 1), got {pair.dropout}")


def _conv_parameters(weight: Tensor, bias: Tensor | None, channels: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
    check_float("conv_weight", weight)
    if weight.dim() != 2 or weight.shape[0] != channels:
        raise ValueError(f"conv_weight: shape must be ({channels}, W), got {tuple(weight.shape)}")
    if bias is not None:
        check_float("conv_bias", bias)
        check_shape("conv_bias", bias, (channels,), "one per channel")
    wide = wide_dtype(x)
    return weight.detach().to(wide).t().contiguous(), None if bias is None else bias.detach().to(wide).contiguous()


def _mask(x: Tensor, mask: Tensor | None, batch: int, length: int) -> tuple[Tensor, Tensor | None]:
    """x with padding set to 0, and the mask as booleans; None where nothing is masked."""
    if mask is None:
        return x, None
    check_shape("mask", mask, (batch, length), "[B, L]")
    if mask.device != x.device:
        raise ValueError(f"mask: must be on {x.device} as the input, got {mask.device}")
    mask = mask.to(torch.bool)
    return x * mask.unsqueeze(-1), mask


def _carried(name: str, state: Tensor | None, shape: tuple[int, ...], x: Tensor, wide: torch.dtype) -> Tensor | None:
    if state is None:
        return None
    check_float(name, state)
    check_shape(name, state, shape, "the state's")
    return state.to(wide)


def _window(state: Tensor | None, batch: int, channels: int, reach: int, x: Tensor) -> Tensor | None:
    if state is None or reach == 0:
        return None
    check_float("conv_state", state)
    check_shape("conv_state", state, (batch, channels, reach), "[B, channels, W - 1]")
    return state.to(x.dtype)


def _keeps(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


# ---------------------------------------------------------------------------- projections inside the ops


@dataclass(frozen=True)
class _Pair:
    scaling: float
    start: int
    stop: int
    dropout: float


@dataclass(frozen=True)
class _Layer:
    """Where a projection's tensors stand in the op's list: weight (4-bit: packed, absmax, code, nested absmax and code
    where nested), bias, then a and b of each pair."""

    at: int
    packed: tuple[float, int, int, int, bool, bool] | None  # 4-bit: offset, rows, cols, block, column blocks, nested
    bias: bool
    pairs: tuple[_Pair, ...]
    seed: int

    @property
    def weights(self) -> int:
        return 1 if self.packed is None else 5 if self.packed[5] else 3

    def pair(self, i: int) -> int:
        return self.at + self.weights + self.bias + 2 * i


def _plan(x: Tensor, layers: list[Projection]) -> tuple[list[Tensor], list[dict[str, Any]], Tensor]:
    """The layers' tensors as one list, where they stand in it, and a seed for each pair's dropout."""
    tensors: list[Tensor] = []
    plan: list[dict[str, Any]] = []
    seeds = 0
    for layer in layers:
        at, packed = len(tensors), None
        if isinstance(layer.weight, QuantizedTensor):
            q = layer.weight.parts()
            nested = q.nested_absmax is not None
            tensors += [t for t in q[:5] if t is not None]
            packed = (q.offset, q.rows, q.cols, q.block_size, q.column_blocks, nested)
        else:
            tensors.append(layer.weight.detach())
        if layer.bias is not None:
            tensors.append(layer.bias.detach())
        pairs = []
        for pair in layer.lora:
            start, stop = pair.rows or (0, _shape(layer)[0])
            pairs.append(_Pair(float(pair.scaling), start, stop, float(pair.dropout)))
            tensors += [pair.a, pair.b]
        plan.append(asdict(_Layer(at, packed, layer.bias is not None, tuple(pairs), seeds)))
        seeds += len(pairs)
    drops = any(pair["dropout"] for layer in plan for pair in layer["pairs"])
    return tensors, plan, torch.randint(2**62, (seeds if drops else 0,))


@lru_cache(maxsize=1024)
def _decode(settings: str) -> tuple[list[_Layer], dict[str, Any]]:
    rest = json.loads(settings)
    layers = [
        _Layer(**{**layer, "pairs": tuple(_Pair(**pair) for pair in layer["pairs"])}) for layer in rest.pop("layers")
    ]
    return layers, rest


def _parts_of(layer: _Layer, tensors: list[Tensor]) -> Parts:
    assert layer.packed is not None
    own = tensors[layer.at : layer.at + layer.weights]
    offset, rows, cols, block_size, column_blocks, nested = layer.packed
    outer, outer_code = (own[3], own[4]) if nested else (None, None)
    return Parts(own[0], own[1], own[2], outer, outer_code, offset, rows, cols, block_size, column_blocks)


def _dropped(x: Tensor, layer: _Layer, i: int, seeds: Tensor) -> Tensor:
    """x after the dropout of pair i; the same whenever it is asked for."""
    p = layer.pairs[i].dropout
    if not p:
        return x
    generator = torch.Generator(x.device).manual_seed(int(seeds[layer.seed + i]))
    keep = torch.empty(x.shape, dtype=x.dtype, device=x.device).bernoulli_(1 - p, generator=generator)
    return x * keep.mul_(1 / (1 - p))


def _apply(x: Tensor, layer: _Layer, tensors: list[Tensor], seeds: Tensor) -> Tensor:
    """x [T, K] through a projection: [T, M]."""
    bias = tensors[layer.at + layer.weights] if layer.bias else None
    dense = layer.packed is None
    y = F.linear(x, tensors[layer.at], bias) if dense else multiply(x, _parts_of(layer, tensors), bias)
    for i, pair in enumerate(layer.pairs):
        a, b = tensors[layer.pair(i) : layer.pair(i) + 2]
        y[:, pair.start : pair.stop].addmm_(_dropped(x, layer, i, seeds) @ a.t(), b.t(), alpha=pair.scaling)
    return y


def _pull_back(g: Tensor, layer: _Layer, tensors: list[Tensor], seeds: Tensor) -> Tensor:
    """The gradient of x [T, K] from that of the outputs, [T, M]."""
    dx = g @ tensors[layer.at] if layer.packed is None else multiply_backward(g, _parts_of(layer, tensors))
    for i, pair in enumerate(layer.pairs):
        a, b = tensors[layer.pair(i) : layer.pair(i) + 2]
        low = g[:, pair.start : pair.stop] @ b
        if pair.dropout:
            dx += _dropped(low.mul_(pair.scaling) @ a, layer, i, seeds)
        else:
            dx.addmm_(low, a, alpha=pair.scaling)
    return dx


def _pair_gradients(
    x: Tensor, g: Tensor, layer: _Layer, tensors: list[Tensor], seeds: Tensor, grads: list[Tensor]
) -> None:
    """The gradients of a layer's factors, written to their places in `grads`."""
    for i, pair in enumerate(layer.pairs):
        at = layer.pair(i)
        a, b = tensors[at : at + 2]
        dropped, own = _dropped(x, layer, i, seeds), g[:, pair.start : pair.stop]
        grads[at] = ((own @ b).mul_(pair.scaling)).t() @ dropped
        grads[at + 1] = (own.t() @ (dropped @ a.t())).mul_(pair.scaling)


# ---------------------------------------------------------------------------- Mamba


def _flat(x: Tensor) -> Tensor:
    """[B, L, K] as [T, K]."""
    return x.reshape(x.shape[0] * x.shape[1], x.shape[2])


def _unflat(x: Tensor, like: Tensor) -> Tensor:
    """[T, K] as [B, L, K]."""
    return x.view(like.shape[0], like.shape[1], x.shape[1])


def _normed(x: Tensor, eps: float | None) -> Tensor:
    if eps is None:
        return x
    wide = x.to(wide_dtype(x))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _normed_backward(x: Tensor, grad: Tensor, eps: float | None) -> Tensor:
    if eps is None:
        return grad
    wide, grad = x.to(wide_dtype(x)), grad.to(wide_dtype(x))
    rho = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    v = wide * rho
    return rho * (grad - v * (grad * v).mean(-1, keepdim=True))


def _coefficients(projected: Tensor, states: int, eps: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """x_proj's output [B, L, R + 2 N] as dt's input [T, R] and B, C [B, L, 1, N] in the state's dtype."""
    rank = projected.shape[2] - 2 * states
    low, b, c = (_normed(t, eps) for t in projected.split([rank, states, states], dim=2))
    wide = wide_dtype(projected)
    return _flat(low), b.to(wide).unsqueeze(2).contiguous(), c.to(wide).unsqueeze(2).contiguous()


def _scan_input(
    xz: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, mask: Tensor | None, window: Tensor | None
) -> Tensor:
    """u [B, L, D]."""
    x = xz[..., : xz.shape[2] // 2].transpose(1, 2)
    u = conv_forward(x, conv_weight, conv_bias, window, None, True).transpose(1, 2).contiguous()
    return u if mask is None else u.mul_(mask.unsqueeze(-1))


def _steps(
    low: Tensor, layer: _Layer, tensors: list[Tensor], seeds: Tensor, shape: torch.Size, mask: Tensor | None
) -> Tensor:
    delta = _apply(low, layer, tensors, seeds).view(shape)
    return delta if mask is None else delta.masked_fill_(~mask.unsqueeze(-1), MASKED_STEP)


def _mamba_impl(
    xz: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, a: Tensor, d: Tensor, delta_bias: Tensor | None,
    mask: Tensor | None, window: Tensor | None, first: Tensor | None, tensors: list[Tensor], seeds: Tensor,
    settings: str, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (x_proj, dt_proj, out_proj), rest = _decode(settings)
    u = _scan_input(xz, conv_weight, conv_bias, mask, window)
    width = u.shape[2]
    projected = _unflat(_apply(_flat(u), x_proj, tensors, seeds), u)
    low, b, c = _coefficients(projected, rest["states"], rest["norm_eps"])
    delta = _steps(low, dt_proj, tensors, seeds, u.shape, mask)
    gate = xz[..., width:].transpose(1, 2)
    out, last, chunks = scan_forward(
        u.transpose(1, 2), delta.transpose(1, 2), a, b, c, d, gate, delta_bias, first, True, keep
    )
    y = _apply(_flat(out.transpose(1, 2)), out_proj, tensors, seeds)
    return _unflat(y, u), last, projected if keep else xz.new_empty(0), chunks


def _mamba_fake(xz: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, a: Tensor, *args: Any) -> tuple:
    tensors, settings, keep = args[5], args[7], args[8]
    (x_proj, _, out_proj), _ = _decode(settings)
    batch, length = xz.shape[:2]
    outputs = [tensors[layer.at].shape[0] if layer.packed is None else layer.packed[1] for layer in (x_proj, out_proj)]
    native_runs = has_kernel("selective_scan", xz)
    chunks = (batch, -(-length // native.scan_chunk), *a.shape) if keep and native_runs else (0,)
    return (
        xz.new_empty((batch, length, outputs[1])), a.new_empty((batch, *a.shape)),
        xz.new_empty((batch, length, outputs[0]) if keep else (0,)),
        a.new_empty(chunks) if native_runs else xz.new_empty(0),
    )  # fmt: skip


def _mamba_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *head, tensors, seeds, settings, _ = inputs
    _, _, projected, chunks = output
    ctx.save_for_backward(*head, projected, chunks, seeds, *tensors)
    ctx.settings = settings
    ctx.mark_non_differentiable(projected, chunks)


def _mamba_formula(ctx: Any, grad: Tensor, grad_last: Tensor, *_: Any) -> tuple:
    saved = ctx.saved_tensors  # read once: under activation checkpointing the tensors are recomputed
    *head, projected, chunks, seeds = saved[:12]
    tensors = list(saved[12:])
    need = ctx.needs_input_grad
    trained = [bool(n) for n in need[9]]
    grad_xz, grad_window, grad_first, grads = _mamba_inner_grad(
        grad, grad_last, *head, projected, chunks, tensors, seeds, ctx.settings, any(trained)
    )
    return (
        grad_xz, *[None] * 6, grad_window if need[7] else None, grad_first if need[8] else None,
        [g if wanted else None for g, wanted in zip(grads, trained, strict=True)], None, None, None,
    )  # fmt: skip


def _mamba_grad_impl(
    grad: Tensor, grad_last: Tensor, xz: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, a: Tensor, d: Tensor,
    delta_bias: Tensor | None, mask: Tensor | None, window: Tensor | None, first: Tensor | None, projected: Tensor,
    chunks: Tensor, tensors: list[Tensor], seeds: Tensor, settings: str, train: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    (x_proj, dt_proj, out_proj), rest = _decode(settings)
    eps, states = rest["norm_eps"], rest["states"]
    grads = [t.new_empty(0) for t in tensors]
    u = _scan_input(xz, conv_weight, conv_bias, mask, window)
    shape, width = u.shape, u.shape[2]
    low, b, c = _coefficients(projected, states, eps)
    delta = _steps(low, dt_proj, tensors, seeds, shape, mask)
    grad = _flat(grad)
    grad_out = _pull_back(grad, out_proj, tensors, seeds).view(shape).transpose(1, 2)
    grad_xz = torch.empty(xz.shape, dtype=xz.dtype, device=xz.device)
    gated = torch.empty(shape, dtype=xz.dtype, device=xz.device) if train and out_proj.pairs else None
    delta = delta.transpose(1, 2)
    wanted = [True, True, False, True, True, False, True, False, True]
    found = scan_backward(
        grad_out, grad_last, u.transpose(1, 2), delta, a, b, c, d, xz[..., width:].transpose(1, 2), delta_bias, first,
        chunks, True, wanted, (grad_out, delta, grad_xz[..., width:].transpose(1, 2)),
        None if gated is None else gated.transpose(1, 2),
    )  # fmt: skip
    grad_b, grad_c, grad_first = found[3], found[4], found[8]
    if gated is not None:
        _pair_gradients(_flat(gated), grad, out_proj, tensors, seeds, grads)
        del gated
    grad_delta = _flat(delta.transpose(1, 2))
    if train:
        _pair_gradients(low, grad_delta, dt_proj, tensors, seeds, grads)
    into_low = _unflat(_pull_back(grad_delta, dt_proj, tensors, seeds), u)
    raw = projected.split([into_low.shape[2], states, states], dim=2)
    grad_projected = torch.cat(
        [_normed_backward(x, g, eps).to(xz.dtype)
         for x, g in zip(raw, (into_low, grad_b.squeeze(2), grad_c.squeeze(2)), strict=True)], dim=2,
    )  # fmt: skip
    grad_projected = _flat(grad_projected)
    if train:
        _pair_gradients(_flat(u), grad_projected, x_proj, tensors, seeds, grads)
    grad_u = grad_out.transpose(1, 2)
    grad_u += _pull_back(grad_projected, x_proj, tensors, seeds).view(shape)
    if mask is not None:
        grad_u *= mask.unsqueeze(-1)
    _, _, _, grad_window = conv_backward(
        grad_u.transpose(1, 2), xz[..., :width].transpose(1, 2), conv_weight, conv_bias, window, None, True,
        [True, False, False, True], grad_xz[..., :width].transpose(1, 2),
    )  # fmt: skip
    return grad_xz, grad_window, grad_first, grads


def _grad_fake(tensors: list[Tensor], settings: str, train: bool) -> list[Tensor]:
    layers, _ = _decode(settings)
    grads = [t.new_empty(0) for t in tensors]
    for layer in layers if train else ():
        for i in range(2 * len(layer.pairs)):
            grads[layer.pair(0) + i] = torch.empty_like(tensors[layer.pair(0) + i])
    return grads


def _mamba_grad_fake(grad: Tensor, grad_last: Tensor, xz: Tensor, *args: Any) -> tuple:
    window, tensors, settings, train = args[6], args[10], args[12], args[13]
    return (
        xz.new_empty(xz.shape), xz.new_empty(0 if window is None else window.shape),
        grad_last.new_empty(grad_last.shape), _grad_fake(tensors, settings, train),
    )  # fmt: skip


# ---------------------------------------------------------------------------- Mamba-2


class _Mamba2(NamedTuple):
    """What forward and backward both compute."""

    conv_input: Tensor  # [B, conv channels, L], a view
    x: Tensor  # [B, L, H, P]
    b: Tensor
    c: Tensor
    raw_step: Tensor  # before softplus, [B, L, H]
    step: Tensor
    log_decay: Tensor
    z: Tensor  # [B, L, D], float32


def _mamba2_parts(
    zxbcdt: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, dt_bias: Tensor, a: Tensor, mask: Tensor | None,
    window: Tensor | None, rest: dict[str, Any],
) -> _Mamba2:  # fmt: skip
    heads, groups, states = rest["heads"], rest["groups"], rest["states"]
    batch, length = zxbcdt.shape[:2]
    channels, wide = conv_weight.shape[1], wide_dtype(zxbcdt)
    width = channels - 2 * groups * states
    z, conv_input, dt = zxbcdt.split([width, channels, heads], dim=2)
    conv_input = conv_input.transpose(1, 2)
    mixed = conv_forward(conv_input, conv_weight, conv_bias, window, None, True).transpose(1, 2).contiguous()
    if mask is not None:
        mixed.mul_(mask.unsqueeze(-1))
    x, b, c = mixed.split([width, groups * states, groups * states], dim=2)
    step, log_decay = steps_of(dt, a, dt_bias, True, (rest["low"], rest["high"]))
    if mask is not None:
        step, log_decay = (t * mask.unsqueeze(-1) for t in (step, log_decay))
    step, log_decay = step.contiguous(), log_decay.contiguous()
    shape = (batch, length, groups, states)
    return _Mamba2(
        conv_input, x.unflatten(2, (heads, -1)), b.to(wide).contiguous().view(shape),
        c.to(wide).contiguous().view(shape), dt.to(wide) + dt_bias, step, log_decay, z.to(wide),
    )  # fmt: skip


def _gated_norm(y: Tensor, z: Tensor, rest: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """y silu(z) normalised per group but not yet weighted, and the norms' factors; [.., groups, D / groups]."""
    v = (y.to(z.dtype) * F.silu(z)).unflatten(-1, (rest["norm_groups"], -1))
    rho = torch.rsqrt(v.square().mean(-1, keepdim=True) + rest["norm_eps"])
    return v.mul_(rho), rho


def _mamba2_impl(
    zxbcdt: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, dt_bias: Tensor, a: Tensor, d: Tensor,
    norm_weight: Tensor, mask: Tensor | None, window: Tensor | None, first: Tensor | None, tensors: list[Tensor],
    seeds: Tensor, settings: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (out_proj,), rest = _decode(settings)
    m = _mamba2_parts(zxbcdt, conv_weight, conv_bias, dt_bias, a, mask, window, rest)
    y, last = ssd_forward(m.x, m.step, m.log_decay, m.b, m.c, d, first)
    v, _ = _gated_norm(y.flatten(2), m.z, rest)
    normed = v.flatten(-2).mul_(norm_weight).to(zxbcdt.dtype)
    return _unflat(_apply(_flat(normed), out_proj, tensors, seeds), zxbcdt), last


def _mamba2_fake(zxbcdt: Tensor, conv_weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    norm_weight, tensors, settings = args[4], args[8], args[10]
    (out_proj,), rest = _decode(settings)
    outputs = tensors[out_proj.at].shape[0] if out_proj.packed is None else out_proj.packed[1]
    head_dim = norm_weight.shape[0] // rest["heads"]
    last = norm_weight.new_empty((zxbcdt.shape[0], rest["heads"], head_dim, rest["states"]))
    return zxbcdt.new_empty((*zxbcdt.shape[:2], outputs)), last


def _mamba2_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *head, tensors, seeds, settings = inputs
    ctx.save_for_backward(*head, seeds, *tensors)
    ctx.settings = settings


def _mamba2_formula(ctx: Any, grad: Tensor, grad_last: Tensor) -> tuple:
    saved = ctx.saved_tensors  # read once, as above
    *head, seeds = saved[:11]
    tensors = list(saved[11:])
    need = ctx.needs_input_grad
    trained = [bool(n) for n in need[10]]
    grad_input, grad_window, grad_first, grads = _mamba2_inner_grad(
        grad, grad_last, *head, tensors, seeds, ctx.settings, any(trained)
    )
    return (
        grad_input, *[None] * 7, grad_window if need[8] else None, grad_first if need[9] else None,
        [g if wanted else None for g, wanted in zip(grads, trained, strict=True)], None, None,
    )  # fmt: skip


def _mamba2_grad_impl(
    grad: Tensor, grad_last: Tensor, zxbcdt: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, dt_bias: Tensor,
    a: Tensor, d: Tensor, norm_weight: Tensor, mask: Tensor | None, window: Tensor | None, first: Tensor | None,
    tensors: list[Tensor], seeds: Tensor, settings: str, train: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    (out_proj,), rest = _decode(settings)
    grads = [t.new_empty(0) for t in tensors]
    m = _mamba2_parts(zxbcdt, conv_weight, conv_bias, dt_bias, a, mask, window, rest)
    y, _ = ssd_forward(m.x, m.step, m.log_decay, m.b, m.c, d, first)
    y = y.flatten(2)
    v, rho = _gated_norm(y, m.z, rest)
    grad = _flat(grad)
    if train and out_proj.pairs:
        normed = (v.flatten(-2) * norm_weight).to(zxbcdt.dtype)
        _pair_gradients(_flat(normed), grad, out_proj, tensors, seeds, grads)
    into = _pull_back(grad, out_proj, tensors, seeds).view(y.shape).to(m.z.dtype).mul_(norm_weight)
    into = into.unflatten(-1, (rest["norm_groups"], -1))
    into = (into - v * (into * v).mean(-1, keepdim=True)).mul_(rho).flatten(-2)  # of y silu(z)
    sigmoid = torch.sigmoid(m.z)
    grad_input = torch.empty(zxbcdt.shape, dtype=zxbcdt.dtype, device=zxbcdt.device)
    grad_z, grad_conv, grad_dt = grad_input.split([y.shape[2], conv_weight.shape[1], rest["heads"]], dim=2)
    grad_z.copy_(into * y * sigmoid * (1 + m.z * (1 - sigmoid)))
    grad_y = (into * m.z * sigmoid).to(zxbcdt.dtype).view(m.x.shape)
    grad_x, grad_step, grad_decay, grad_b, grad_c, _, grad_first = ssd_backward(
        grad_y, grad_last, m.x, m.step, m.log_decay, m.b, m.c, d, first, False
    )
    grad_mixed = torch.cat([t.flatten(2).to(zxbcdt.dtype) for t in (grad_x, grad_b, grad_c)], dim=2)
    grad_step = grad_step + grad_decay * a
    if (rest["low"], rest["high"]) != (0.0, float("inf")):
        soft = F.softplus(m.raw_step)
        grad_step = grad_step * ((soft >= rest["low"]) & (soft <= rest["high"]))
    slope = torch.where(m.raw_step > 20, 1.0, torch.sigmoid(m.raw_step))
    if mask is not None:
        grad_mixed *= mask.unsqueeze(-1)
        slope = slope * mask.unsqueeze(-1)
    grad_dt.copy_(grad_step * slope)
    _, _, _, grad_window = conv_backward(
        grad_mixed.transpose(1, 2), m.conv_input, conv_weight, conv_bias, window, None, True,
        [True, False, False, True], grad_conv.transpose(1, 2),
    )  # fmt: skip
    return grad_input, grad_window, grad_first, grads


def _mamba2_grad_fake(grad: Tensor, grad_last: Tensor, zxbcdt: Tensor, *args: Any) -> tuple:
    window, tensors, settings, train = args[7], args[9], args[11], args[12]
    return (
        zxbcdt.new_empty(zxbcdt.shape), zxbcdt.new_empty(0 if window is None else window.shape),
        grad_last.new_empty(grad_last.shape), _grad_fake(tensors, settings, train),
    )  # fmt: skip


_CONV = "Tensor conv_weight, Tensor? conv_bias"
_CARRIED = "Tensor? mask, Tensor? window, Tensor? first"
_LAYERS = "Tensor[] tensors, Tensor seeds, str settings"
_MAMBA = f"Tensor xz, {_CONV}, Tensor a, Tensor d, Tensor? delta_bias, {_CARRIED}"
_MAMBA2 = f"Tensor zxbcdt, {_CONV}, Tensor dt_bias, Tensor a, Tensor d, Tensor norm_weight, {_CARRIED}"
_RESULTS = "(Tensor, Tensor, Tensor, Tensor[])"
_mamba_inner_grad = define(
    f"mamba_inner_grad(Tensor grad, Tensor grad_last, {_MAMBA}, Tensor projected, Tensor chunks, {_LAYERS}, "
    f"bool train) -> {_RESULTS}",
    _mamba_grad_impl,
    _mamba_grad_fake,
)
_mamba_inner = define(
    f"mamba_inner({_MAMBA}, {_LAYERS}, bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
    _mamba_impl,
    _mamba_fake,
    setup_context=_mamba_setup,
    backward=_mamba_formula,
)
_mamba2_inner_grad = define(
    f"mamba2_inner_grad(Tensor grad, Tensor grad_last, {_MAMBA2}, {_LAYERS}, bool train) -> {_RESULTS}",
    _mamba2_grad_impl,
    _mamba2_grad_fake,
)
_mamba2_inner = define(
    f"mamba2_inner({_MAMBA2}, {_LAYERS}) -> (Tensor, Tensor)",
    _mamba2_impl,
    _mamba2_fake,
    setup_context=_mamba2_setup,
    backward=_mamba2_formula,
)
