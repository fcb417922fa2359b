"""A whole Mamba block after its input projection, as one op, with frozen weights and LoRA inside.

Convolution, projections, scan and gate run forward keeping what the input projection gave and a few small tensors; the
backward computes the rest again and gives gradients to the input, the carried states and the LoRA factors only. Weights
are never merged. For trained base weights call the ops one by one.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from deftcore.ops._library import define, flatten_tokens
from deftcore.ops.checks import check_float, check_number, check_shape
from deftcore.ops.kernels import native
from deftcore.ops.ssm import projection
from deftcore.ops.ssm._layout import unflatten_tokens, wide_dtype
from deftcore.ops.ssm._mixer import (
    carried,
    frozen_taps,
    gradient_shapes,
    gradients,
    masked,
    needs_gradient,
    save,
    saved,
)
from deftcore.ops.ssm.conv1d import conv_backward, conv_forward
from deftcore.ops.ssm.projection import Layer, Projection
from deftcore.ops.ssm.scan import MASKED_STEP, scan_backward, scan_forward


def mamba_inner(
    xz: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, x_proj: Projection, dt_proj: Projection, out_proj:
    Projection, A: Tensor, D: Tensor,
    *, mask: Tensor | None = None, conv_state: Tensor | None = None, initial_state: Tensor | None = None, norm_eps:
    float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mamba's block after `in_proj`: convolution, silu, x_proj, dt_proj, selective scan, gate, out_proj.

    The block of Gu and Dao, arXiv 2312.00752, section 3.4, its scan by algorithm 2.

    Kept for the backward: xz, x_proj's output, and a state every 32 steps. Exponents, states and sums are float32.

    Args:
        xz: [B, L, 2 D], the scan's input first, its gate second; float32, bfloat16, float16 or float64.
        conv_weight: [D, W]; conv_bias: [D] or None.
        x_proj: [R + 2 N, D], rows in the order dt, B, C; dt_proj: [D, R], its bias enters the scan in float32;
            out_proj: [M, D]. Dense weights in xz's dtype.
        A: [D, N], negative; D: [D].
        mask: [B, L], 0 or False at padding: the state passes through it unchanged, 0 comes out, no gradient enters.
        conv_state: [B, D, W - 1] and initial_state: [B, D, N], what an earlier part of the sequences left; None is 0.
        norm_eps: FalconMamba's weightless RMS norms on dt, B and C, with this epsilon; None leaves them out.

    Returns:
        out [B, L, M] in xz's dtype (under autocast in its), and the last state (float32), the next `initial_state`;
        the next `conv_state` is the last W - 1 steps of the convolution's input.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_float("xz", xz)
    if xz.dim() != 3 or xz.shape[2] % 2:
        raise ValueError(f"xz: must be [B, L, 2 D], got shape {tuple(xz.shape)}")
    batch, width = xz.shape[0], xz.shape[2] // 2
    xz, (x_proj, dt_proj, out_proj) = projection.lower(xz, (x_proj, dt_proj, out_proj))
    wide = wide_dtype(xz)
    norm_eps = None if norm_eps is None else check_number("norm_eps", norm_eps, minimum=0.0)
    check_float("A", A)
    check_float("D", D)
    if A.dim() != 2 or A.shape[0] != width:
        raise ValueError(f"A: shape must be ({width}, N), got {tuple(A.shape)}")
    check_shape("D", D, (width,), "one per channel")
    states = A.shape[1]
    rank = projection.shape_of(dt_proj)[1]
    for name, layer, shape in (
        ("x_proj", x_proj, (rank + 2 * states, width)), ("dt_proj", dt_proj, (width, rank)),
        ("out_proj", out_proj, (projection.shape_of(out_proj)[0], width)),
    ):  # fmt: skip
        projection.check_projection(name, layer, shape, xz)
    conv_weight, conv_bias = frozen_taps(conv_weight, conv_bias, width, xz)
    xz, mask = masked(xz, mask)
    first = carried("initial_state", initial_state, (batch, width, states), wide)
    window = carried("conv_state", conv_state, (batch, width, conv_weight.shape[0] - 1), xz.dtype)
    flat = projection.flatten([x_proj, dt_proj._replace(bias=None), out_proj])
    out, last, _, _ = _mamba_inner(
        xz, conv_weight, conv_bias, A.detach().to(wide).t().contiguous(), D.detach().to(wide).contiguous(),
        None if dt_proj.bias is None else dt_proj.bias.detach().to(wide).contiguous(), mask, window,
        None if first is None else first.transpose(1, 2).contiguous(), *flat, norm_eps,
        needs_gradient(xz, window, first, *flat.factors),
    )  # fmt: skip
    return out, last.transpose(1, 2)


# ---------------------------------------------------------------------------- op


class _Inputs(NamedTuple):
    """What forward and backward are both given; `_SCHEMA` names them. The projections are x_proj, dt_proj, out_proj."""

    xz: Tensor
    conv_weight: Tensor  # [W, D]
    conv_bias: Tensor | None
    a: Tensor  # [N, D]
    d: Tensor
    delta_bias: Tensor | None
    mask: Tensor | None
    window: Tensor | None
    first: Tensor | None  # [B, N, D]
    frozen: list[Tensor]
    factors: list[Tensor]
    whole: list[int]
    real: list[float]
    seeds: Tensor
    norm_eps: float | None

    @property
    def states(self) -> int:
        return self.a.shape[0]

    def projections(self) -> list[Layer]:
        return projection.layers(self.frozen, self.factors, self.whole, self.real, self.seeds)


_SCHEMA = (
    "Tensor xz, Tensor conv_weight, Tensor? conv_bias, Tensor a, Tensor d, Tensor? delta_bias, Tensor? mask, "
    f"Tensor? window, Tensor? first, {projection.SCHEMA}, float? norm_eps"
)


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


def _coefficients(projected: Tensor, m: _Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """x_proj's output [B, L, R + 2 N] as dt's input [T, R] and B, C [B, L, 1, N] in the state's dtype."""
    rank = projected.shape[2] - 2 * m.states
    low, b, c = (_normed(t, m.norm_eps) for t in projected.split([rank, m.states, m.states], dim=2))
    wide = wide_dtype(projected)
    return flatten_tokens(low), b.to(wide).unsqueeze(2).contiguous(), c.to(wide).unsqueeze(2).contiguous()


def _scan_input(m: _Inputs) -> Tensor:
    """u [B, L, D]."""
    x = m.xz[..., : m.xz.shape[2] // 2].transpose(1, 2)
    u = conv_forward(x, m.conv_weight, m.conv_bias, m.window, None, True).transpose(1, 2).contiguous()
    return u if m.mask is None else u.mul_(m.mask.unsqueeze(-1))


def _steps(low: Tensor, dt_proj: Layer, shape: torch.Size, mask: Tensor | None) -> Tensor:
    delta = projection.apply(low, dt_proj).view(shape)
    return delta if mask is None else delta.masked_fill_(~mask.unsqueeze(-1), MASKED_STEP)


def _mamba_impl(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Out, the last state [B, N, D], and for the backward (with `keep`) x_proj's output and states of the scan."""
    m, keep = _Inputs(*args[:-1]), args[-1]
    x_proj, dt_proj, out_proj = m.projections()
    u = _scan_input(m)
    projected = unflatten_tokens(projection.apply(flatten_tokens(u), x_proj), u)
    low, b, c = _coefficients(projected, m)
    delta = _steps(low, dt_proj, u.shape, m.mask)
    gate = m.xz[..., u.shape[2] :].transpose(1, 2)
    out, last, chunks = scan_forward(
        u.transpose(1, 2), delta.transpose(1, 2), m.a, b, c, m.d, gate, m.delta_bias, m.first, True, keep
    )
    y = projection.apply(flatten_tokens(out.transpose(1, 2)), out_proj)
    return unflatten_tokens(y, u), last, projected if keep else m.xz.new_empty(0), chunks


def _mamba_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m, keep = _Inputs(*args[:-1]), args[-1]
    x_proj, _, out_proj = m.projections()
    batch, length = m.xz.shape[:2]
    chunks = (batch, -(-length // native.scan_chunk), *m.a.shape) if keep else (0,)
    return (
        m.xz.new_empty((batch, length, out_proj.outputs)), m.a.new_empty((batch, *m.a.shape)),
        m.xz.new_empty((batch, length, x_proj.outputs) if keep else (0,)),
        m.a.new_empty(chunks),
    )  # fmt: skip


def _mamba_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, _, projected, chunks = output
    save(ctx, _Inputs(*inputs[:-1]), projected, chunks)
    ctx.mark_non_differentiable(projected, chunks)


def _mamba_formula(ctx: Any, grad: Tensor, grad_last: Tensor, *_: Any) -> tuple:
    m, (projected, chunks) = saved(ctx)
    needed = _Inputs(*ctx.needs_input_grad[:-1])
    grad_xz, grad_window, grad_first, factors = _mamba_inner_grad(
        grad, grad_last, projected, chunks, any(needed.factors), *m
    )
    return (*gradients(m, needed, factors, xz=grad_xz, window=grad_window, first=grad_first), None)


def _mamba_grad_impl(
    grad: Tensor, grad_last: Tensor, projected: Tensor, chunks: Tensor, train: bool, *args: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of xz, window, first and, with `train`, the factors."""
    m = _Inputs(*args)
    x_proj, dt_proj, out_proj = m.projections()
    u = _scan_input(m)
    shape, width = u.shape, u.shape[2]
    low, b, c = _coefficients(projected, m)
    delta = _steps(low, dt_proj, shape, m.mask)
    grad = flatten_tokens(grad)
    grad_out = projection.pull_back(grad, out_proj).view(shape).transpose(1, 2)
    grad_xz = torch.empty(m.xz.shape, dtype=m.xz.dtype, device=m.xz.device)
    gated = torch.empty(shape, dtype=m.xz.dtype, device=m.xz.device) if train and out_proj.pairs else None
    delta = delta.transpose(1, 2)
    wanted = [True, True, False, True, True, False, True, False, True]
    found = scan_backward(
        grad_out, grad_last, u.transpose(1, 2), delta, m.a, b, c, m.d, m.xz[..., width:].transpose(1, 2),
        m.delta_bias, m.first, chunks, True, wanted, (grad_out, delta, grad_xz[..., width:].transpose(1, 2)),
        None if gated is None else gated.transpose(1, 2),
    )  # fmt: skip
    grad_b, grad_c, grad_first = found[3], found[4], found[8]
    of_out: list[Tensor] = []
    if gated is not None:
        of_out = projection.factor_gradients(flatten_tokens(gated), grad, out_proj)
        del gated
    grad_delta = flatten_tokens(delta.transpose(1, 2))
    of_dt = projection.factor_gradients(low, grad_delta, dt_proj) if train else []
    into_low = unflatten_tokens(projection.pull_back(grad_delta, dt_proj), u)
    raw = projected.split([into_low.shape[2], m.states, m.states], dim=2)
    grad_projected = torch.cat(
        [_normed_backward(x, g, m.norm_eps).to(m.xz.dtype)
         for x, g in zip(raw, (into_low, grad_b.squeeze(2), grad_c.squeeze(2)), strict=True)], dim=2,
    )  # fmt: skip
    grad_projected = flatten_tokens(grad_projected)
    of_x = projection.factor_gradients(flatten_tokens(u), grad_projected, x_proj) if train else []
    grad_u = grad_out.transpose(1, 2)
    grad_u += projection.pull_back(grad_projected, x_proj).view(shape)
    if m.mask is not None:
        grad_u *= m.mask.unsqueeze(-1)
    _, _, _, grad_window = conv_backward(
        grad_u.transpose(1, 2), m.xz[..., :width].transpose(1, 2), m.conv_weight, m.conv_bias, m.window, None, True,
        [True, False, False, True], grad_xz[..., :width].transpose(1, 2),
    )  # fmt: skip
    factors = [*of_x, *of_dt, *of_out] if train else projection.empty_gradients(m.factors, train)
    return grad_xz, grad_window, grad_first, factors


def _mamba_grad_fake(
    grad: Tensor, grad_last: Tensor, projected: Tensor, chunks: Tensor, train: bool, *args: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    m = _Inputs(*args)
    return gradient_shapes(m.xz, m, grad_last, train)


_mamba_inner_grad = define(
    "mamba_inner_grad(Tensor grad, Tensor grad_last, Tensor projected, Tensor chunks, bool train, "
    f"{_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor[])",
    _mamba_grad_impl,
    _mamba_grad_fake,
)
_mamba_inner = define(
    f"mamba_inner({_SCHEMA}, bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
    _mamba_impl,
    _mamba_fake,
    setup_context=_mamba_setup,
    backward=_mamba_formula,
)
