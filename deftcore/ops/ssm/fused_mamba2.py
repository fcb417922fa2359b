"""A whole Mamba-2 block after its input projection, as one op; as `fused_mamba`."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deftcore.ops._library import define, flatten_tokens
from deftcore.ops.checks import check_float, check_number, check_shape
from deftcore.ops.ssm import projection
from deftcore.ops.ssm._layout import unflatten_tokens, wide_dtype
from deftcore.ops.ssm._mixer import carried, frozen_taps, gradient_shapes, gradients, masked, save, saved
from deftcore.ops.ssm.conv1d import conv_backward, conv_forward
from deftcore.ops.ssm.projection import Layer, Projection
from deftcore.ops.ssm.ssd import check_limit, ssd_backward, ssd_forward, steps_of


def mamba2_inner(
    zxbcdt: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, dt_bias: Tensor, A: Tensor, D: Tensor,
    norm_weight: Tensor, out_proj: Projection,
    *, head_dim: int, groups: int = 1, norm_groups: int | None = None, norm_eps: float = 1e-5, dt_limit:
    tuple[float, float] = (0.0, float("inf")), mask: Tensor | None = None, conv_state: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mamba-2's block after `in_proj`: convolution, silu, scan, gated RMS norm, out_proj.

    The block of Dao and Gu, arXiv 2405.21060, section 7.

    Kept for the backward: zxbcdt. Exponents, states, norms and sums are float32.

    Args:
        zxbcdt: [B, L, 2 D + 2 G N + H], gate z, x, B, C and dt in this order; D = H P. float32, bfloat16,
            float16 or float64.
        conv_weight: [D + 2 G N, W]; conv_bias: as many or None.
        dt_bias, A, D: [H], A negative.
        norm_weight: [D], of the norm over y silu(z), whose mean squares are over D / norm_groups channels; None is
            `groups`.
        out_proj: [M, D].
        mask, conv_state [B, D + 2 G N, W - 1], initial_state [B, H, P, N]: as in `mamba_inner`.

    Returns:
        out [B, L, M] and the last state, as `mamba_inner`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_float("zxbcdt", zxbcdt)
    if zxbcdt.dim() != 3:
        raise ValueError(f"zxbcdt: must be [B, L, 2 D + 2 G N + H], got shape {tuple(zxbcdt.shape)}")
    batch, _, total = zxbcdt.shape
    zxbcdt, (out_proj,) = projection.lower(zxbcdt, (out_proj,))
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
    norm_eps = check_number("norm_eps", norm_eps, minimum=0.0)
    projection.check_projection("out_proj", out_proj, (projection.shape_of(out_proj)[0], width), zxbcdt)
    channels = width + 2 * groups * states
    conv_weight, conv_bias = frozen_taps(conv_weight, conv_bias, channels, zxbcdt)
    zxbcdt, mask = masked(zxbcdt, mask)
    first = carried("initial_state", initial_state, (batch, heads, head_dim, states), wide)
    window = carried("conv_state", conv_state, (batch, channels, conv_weight.shape[0] - 1), zxbcdt.dtype)
    return _mamba2_inner(
        zxbcdt, conv_weight, conv_bias, dt_bias.detach().to(wide), A.detach().to(wide),
        D.detach().to(wide).repeat_interleave(head_dim), norm_weight.detach().to(wide), mask, window,
        None if first is None else first.contiguous(), *projection.flatten([out_proj]), groups, norm_groups,
        norm_eps, *check_limit(dt_limit),
    )  # fmt: skip


# ---------------------------------------------------------------------------- op


class _Inputs(NamedTuple):
    """What forward and backward are both given; `_SCHEMA` names them. The projection is out_proj."""

    zxbcdt: Tensor
    conv_weight: Tensor  # [W, D + 2 G N]
    conv_bias: Tensor | None
    dt_bias: Tensor
    a: Tensor  # [H]
    d: Tensor  # [D]
    norm_weight: Tensor  # [D]
    mask: Tensor | None
    window: Tensor | None
    first: Tensor | None  # [B, H, P, N]
    frozen: list[Tensor]
    factors: list[Tensor]
    whole: list[int]
    real: list[float]
    seeds: Tensor
    groups: int
    norm_groups: int
    norm_eps: float
    low: float  # bounds of the steps
    high: float

    @property
    def width(self) -> int:
        return self.norm_weight.shape[0]

    @property
    def heads(self) -> int:
        return self.a.shape[0]

    @property
    def states(self) -> int:
        return (self.conv_weight.shape[1] - self.width) // (2 * self.groups)

    def out_proj(self) -> Layer:
        (layer,) = projection.layers(self.frozen, self.factors, self.whole, self.real, self.seeds)
        return layer


_SCHEMA = (
    "Tensor zxbcdt, Tensor conv_weight, Tensor? conv_bias, Tensor dt_bias, Tensor a, Tensor d, Tensor norm_weight, "
    f"Tensor? mask, Tensor? window, Tensor? first, {projection.SCHEMA}, int groups, int norm_groups, "
    "float norm_eps, float low, float high"
)


class _Scan(NamedTuple):
    """What forward and backward both compute."""

    conv_input: Tensor  # [B, conv channels, L], a view
    x: Tensor  # [B, L, H, P]
    b: Tensor
    c: Tensor
    raw_step: Tensor  # before softplus, [B, L, H]
    step: Tensor
    log_decay: Tensor
    z: Tensor  # [B, L, D], float32


def _before_scan(m: _Inputs) -> _Scan:
    groups, states = m.groups, m.states
    batch, length = m.zxbcdt.shape[:2]
    wide = wide_dtype(m.zxbcdt)
    z, conv_input, dt = m.zxbcdt.split([m.width, m.conv_weight.shape[1], m.heads], dim=2)
    conv_input = conv_input.transpose(1, 2)
    mixed = conv_forward(conv_input, m.conv_weight, m.conv_bias, m.window, None, True).transpose(1, 2).contiguous()
    if m.mask is not None:
        mixed.mul_(m.mask.unsqueeze(-1))
    x, b, c = mixed.split([m.width, groups * states, groups * states], dim=2)
    step, log_decay = steps_of(dt, m.a, m.dt_bias, True, (m.low, m.high))
    if m.mask is not None:
        step, log_decay = (t * m.mask.unsqueeze(-1) for t in (step, log_decay))
    step, log_decay = step.contiguous(), log_decay.contiguous()
    shape = (batch, length, groups, states)
    return _Scan(
        conv_input, x.unflatten(2, (m.heads, -1)), b.to(wide).contiguous().view(shape),
        c.to(wide).contiguous().view(shape), dt.to(wide) + m.dt_bias, step, log_decay, z.to(wide),
    )  # fmt: skip


def _gated_norm(y: Tensor, z: Tensor, m: _Inputs) -> tuple[Tensor, Tensor]:
    """y silu(z) normalised per group but not yet weighted, and the norms' factors; [.., groups, D / groups]."""
    v = (y.to(z.dtype) * F.silu(z)).unflatten(-1, (m.norm_groups, -1))
    rho = torch.rsqrt(v.square().mean(-1, keepdim=True) + m.norm_eps)
    return v.mul_(rho), rho


def _mamba2_impl(*args: Any) -> tuple[Tensor, Tensor]:
    """Out and the last state."""
    m = _Inputs(*args)
    s = _before_scan(m)
    y, last = ssd_forward(s.x, s.step, s.log_decay, s.b, s.c, m.d, m.first)
    v, _ = _gated_norm(y.flatten(2), s.z, m)
    normed = v.flatten(-2).mul_(m.norm_weight).to(m.zxbcdt.dtype)
    return unflatten_tokens(projection.apply(flatten_tokens(normed), m.out_proj()), m.zxbcdt), last


def _mamba2_fake(*args: Any) -> tuple[Tensor, Tensor]:
    m = _Inputs(*args)
    batch, length = m.zxbcdt.shape[:2]
    last = m.norm_weight.new_empty((batch, m.heads, m.width // m.heads, m.states))
    return m.zxbcdt.new_empty((batch, length, m.out_proj().outputs)), last


def _mamba2_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    save(ctx, _Inputs(*inputs))


def _mamba2_formula(ctx: Any, grad: Tensor, grad_last: Tensor) -> tuple:
    m, _ = saved(ctx)
    needed = _Inputs(*ctx.needs_input_grad)
    grad_input, grad_window, grad_first, factors = _mamba2_inner_grad(grad, grad_last, any(needed.factors), *m)
    return gradients(m, needed, factors, zxbcdt=grad_input, window=grad_window, first=grad_first)


def _mamba2_grad_impl(
    grad: Tensor, grad_last: Tensor, train: bool, *args: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of zxbcdt, window, first and, with `train`, the factors."""
    m = _Inputs(*args)
    s, out_proj = _before_scan(m), m.out_proj()
    y, _ = ssd_forward(s.x, s.step, s.log_decay, s.b, s.c, m.d, m.first)
    y = y.flatten(2)
    v, rho = _gated_norm(y, s.z, m)
    grad = flatten_tokens(grad)
    factors = projection.empty_gradients(m.factors, train)
    if train and out_proj.pairs:
        normed = (v.flatten(-2) * m.norm_weight).to(m.zxbcdt.dtype)
        factors = projection.factor_gradients(flatten_tokens(normed), grad, out_proj)
    into = projection.pull_back(grad, out_proj).view(y.shape).to(s.z.dtype).mul_(m.norm_weight)
    into = into.unflatten(-1, (m.norm_groups, -1))
    into = (into - v * (into * v).mean(-1, keepdim=True)).mul_(rho).flatten(-2)  # of y silu(z)
    sigmoid = torch.sigmoid(s.z)
    grad_input = torch.empty(m.zxbcdt.shape, dtype=m.zxbcdt.dtype, device=m.zxbcdt.device)
    grad_z, grad_conv, grad_dt = grad_input.split([y.shape[2], m.conv_weight.shape[1], m.heads], dim=2)
    grad_z.copy_(into * y * sigmoid * (1 + s.z * (1 - sigmoid)))
    grad_y = (into * s.z * sigmoid).to(m.zxbcdt.dtype).view(s.x.shape)
    grad_x, grad_step, grad_decay, grad_b, grad_c, _, grad_first = ssd_backward(
        grad_y, grad_last, s.x, s.step, s.log_decay, s.b, s.c, m.d, m.first, False
    )
    grad_mixed = torch.cat([t.flatten(2).to(m.zxbcdt.dtype) for t in (grad_x, grad_b, grad_c)], dim=2)
    grad_step = grad_step + grad_decay * m.a
    if (m.low, m.high) != (0.0, float("inf")):
        soft = F.softplus(s.raw_step)
        grad_step = grad_step * ((soft >= m.low) & (soft <= m.high))
    slope = torch.where(s.raw_step > 20, 1.0, torch.sigmoid(s.raw_step))
    if m.mask is not None:
        grad_mixed *= m.mask.unsqueeze(-1)
        slope = slope * m.mask.unsqueeze(-1)
    grad_dt.copy_(grad_step * slope)
    _, _, _, grad_window = conv_backward(
        grad_mixed.transpose(1, 2), s.conv_input, m.conv_weight, m.conv_bias, m.window, None, True,
        [True, False, False, True], grad_conv.transpose(1, 2),
    )  # fmt: skip
    return grad_input, grad_window, grad_first, factors


def _mamba2_grad_fake(
    grad: Tensor, grad_last: Tensor, train: bool, *args: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    m = _Inputs(*args)
    return gradient_shapes(m.zxbcdt, m, grad_last, train)


_mamba2_inner_grad = define(
    f"mamba2_inner_grad(Tensor grad, Tensor grad_last, bool train, {_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor[])",
    _mamba2_grad_impl,
    _mamba2_grad_fake,
)
_mamba2_inner = define(
    f"mamba2_inner({_SCHEMA}) -> (Tensor, Tensor)",
    _mamba2_impl,
    _mamba2_fake,
    setup_context=_mamba2_setup,
    backward=_mamba2_formula,
)
