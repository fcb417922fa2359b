"""Mamba and Mamba-2 mixers on the native ops. Names and shapes of parameters are Transformers' and mamba_ssm's.

`MambaBlock` and `Mamba2Block` hold the computation for any module with these attributes; the integration with
Transformers runs its mixers through them too.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deftcore.nn.linear import Linear4bit
from deftcore.ops.conv1d import causal_conv1d, causal_conv1d_update, next_window
from deftcore.ops.mamba import MASKED_STEP, Projection, mamba2_inner, mamba_inner, project
from deftcore.ops.ssd import mamba_chunk_scan, steps_of
from deftcore.ops.ssm import selective_scan, selective_state_update


class MixerState(NamedTuple):
    """What a sequence leaves behind: the convolution's last inputs, [B, C, W - 1], and the scan's state, float32."""

    conv: Tensor
    ssm: Tensor


def plain_projection(module: nn.Module) -> Projection | None:
    """A linear layer as the fused ops take it; None where it is something else, or has hooks to run."""
    if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"):
        return None
    if type(module) is nn.Linear:
        return Projection(module.weight, module.bias)
    if type(module) is Linear4bit:
        return Projection(module.quantized, module.bias)
    return None


class _Block:
    """What both mixers share."""

    in_proj: nn.Module
    conv1d: nn.Conv1d
    A_log: nn.Parameter
    D: nn.Parameter
    out_proj: nn.Module

    def projection(self, module: nn.Module) -> Projection | None:
        """`module` for the fused op, its adapters included; None sends it through its own forward."""
        return plain_projection(module)

    def decay(self) -> Tensor:
        """A, float32; never formed in half precision, where large entries of A_log would overflow."""
        return -torch.exp(self.A_log.float())

    def taps(self) -> tuple[Tensor, Tensor | None]:
        return self.conv1d.weight.squeeze(1), self.conv1d.bias

    def mix(
        self, hidden: Tensor, state: MixerState | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:  # pragma: no cover - overridden
        raise NotImplementedError

    def trains(self, *tensors: Any) -> bool:
        """Whether a base weight asks for a gradient: the fused ops give none."""
        return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)

    def run(
        self, hidden: Tensor, state: MixerState | None, mask: Tensor | None, return_state: bool
    ) -> Tensor | tuple[Tensor, MixerState]:
        if state is not None and hidden.shape[1] == 1 and mask is None and not torch.is_grad_enabled():
            held = MixerState(state.conv.clone(), state.ssm.clone())
            out = self.step(hidden, held)
            return (out, held) if return_state else out
        out, conv_input, last = self.mix(hidden, state, mask)
        if not return_state:
            return out
        reach = self.conv1d.weight.shape[2] - 1
        return out, MixerState(next_window(conv_input, None if state is None else state.conv, reach), last)

    def step(self, hidden: Tensor, state: MixerState) -> Tensor:  # pragma: no cover - overridden
        raise NotImplementedError


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask.to(torch.bool).unsqueeze(-1)


class MambaBlock(_Block):
    """Mamba's computation over a mixer's attributes."""

    x_proj: nn.Module
    dt_proj: nn.Module
    ssm_state_size: int
    rms_eps: float | None = None

    def mix(self, hidden: Tensor, state: MixerState | None, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [B, L, d] through the block: out, the convolution's input [B, D, L], the last state [B, D, N]."""
        xz = _masked(self.in_proj(_masked(hidden, mask)), mask)
        conv_input = xz[..., : xz.shape[2] // 2].transpose(1, 2)
        weight, bias = self.taps()
        layers = [self.projection(m) for m in (self.x_proj, self.dt_proj, self.out_proj)]
        x_proj, dt_proj, out_proj = layers
        base = [t for layer in layers if layer is not None for t in (layer.weight, layer.bias)]
        if x_proj is None or dt_proj is None or out_proj is None or self.trains(
            self.A_log, self.D, weight, bias, *base
        ):  # fmt: skip
            out, last = self._unfused(xz, conv_input, dt_proj, state, mask)
        else:
            out, last = mamba_inner(
                xz, weight, bias, x_proj, dt_proj, out_proj, self.decay(), self.D, mask=mask,
                conv_state=None if state is None else state.conv, initial_state=None if state is None else state.ssm,
                norm_eps=self.rms_eps,
            )  # fmt: skip
        return out, conv_input, last

    def _unfused(
        self, xz: Tensor, conv_input: Tensor, dt_proj: Projection | None, state: MixerState | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Op by op: trained base weights, and adapters that the fused op does not know."""
        weight, bias = self.taps()
        before = None if state is None else state.conv.to(xz.dtype)
        u = causal_conv1d(conv_input, weight, bias, before, activation="silu")
        u = _masked(u.transpose(1, 2), mask)  # type: ignore[union-attr]
        delta, b, c, delta_bias = self._coefficients(u, dt_proj)
        if mask is not None:
            delta = delta.masked_fill(~mask.to(torch.bool).unsqueeze(-1), MASKED_STEP)
        y, last = selective_scan(
            u.transpose(1, 2), delta.transpose(1, 2), self.decay(), b.transpose(1, 2), c.transpose(1, 2),
            self.D.float(), xz[..., u.shape[2] :].to(u.dtype).transpose(1, 2), delta_bias, True, True,
            initial_state=None if state is None else state.ssm,
        )  # fmt: skip
        return self.out_proj(y.transpose(1, 2)), last

    def _coefficients(self, u: Tensor, dt_proj: Projection | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """delta, B, C of u [..., D], all in u's dtype, and the bias that the scan adds to delta in float32."""
        states = self.ssm_state_size
        projected = self.x_proj(u)
        low, b, c = projected.split([projected.shape[-1] - 2 * states, states, states], dim=-1)
        if self.rms_eps is not None:
            low, b, c = (
                F.rms_norm(t.float(), t.shape[-1:], eps=self.rms_eps).to(t.dtype) for t in (low, b, c)
            )  # fmt: skip
        if dt_proj is None:
            delta, bias = self.dt_proj(low), None
        else:
            if torch.is_autocast_enabled(low.device.type) and isinstance(dt_proj.weight, Tensor):
                low = low.to(torch.get_autocast_dtype(low.device.type))
            delta, bias = project(low, dt_proj._replace(bias=None)), dt_proj.bias
        return (*(t.to(u.dtype) for t in (delta, b, c)), bias)

    def steps(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """The scan's steps for hidden [B, L, d]: [B, D, L] float32, after softplus."""
        x = _masked(self.in_proj(_masked(hidden, mask)), mask).chunk(2, dim=2)[0]
        u = causal_conv1d(x.transpose(1, 2), *self.taps(), activation="silu")
        u = _masked(u.transpose(1, 2), mask)  # type: ignore[union-attr]
        delta, _, _, bias = self._coefficients(u, self.projection(self.dt_proj))
        return F.softplus(delta.float() if bias is None else delta.float() + bias.float()).transpose(1, 2)

    def step(self, hidden: Tensor, state: MixerState) -> Tensor:
        """One token [B, 1, d]; `state` (a convolution window of W - 1 or more steps) moves on in place."""
        x, z = self.in_proj(hidden)[:, 0].chunk(2, dim=-1)
        weight, bias = self.taps()
        u = causal_conv1d_update(x, state.conv, weight, bias, "silu")
        delta, b, c, delta_bias = self._coefficients(u, self.projection(self.dt_proj))
        y = selective_state_update(
            state.ssm, u, delta, self.decay(), b, c, self.D, z, None if delta_bias is None else delta_bias.float(), True
        )
        return self.out_proj(y).unsqueeze(1)


class MambaMixer(MambaBlock, nn.Module):
    """Mamba's mixer (arXiv 2312.00752): in_proj, causal convolution, selective scan, gate, out_proj.

    Args:
        hidden_size: d; intermediate_size: D, None is 2 d.
        state_size: N; conv_kernel: W; time_step_rank: R, None is ceil(d / 16).
        bias: of in_proj and out_proj; conv_bias: of the convolution.
        rms_eps: FalconMamba's norms on dt, B and C; None leaves them out.
        time_step_min, time_step_max, time_step_floor: range of the initial steps.

    Checkpoints of Transformers' and mamba_ssm's mixers load unchanged. With frozen base weights forward and backward
    are one fused op; linear layers may be `Linear4bit`.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int | None = None,
        *,
        state_size: int = 16,
        conv_kernel: int = 4,
        time_step_rank: int | None = None,
        bias: bool = False,
        conv_bias: bool = True,
        rms_eps: float | None = None,
        time_step_min: float = 1e-3,
        time_step_max: float = 0.1,
        time_step_floor: float = 1e-4,
    ) -> None:
        super().__init__()
        width = 2 * hidden_size if intermediate_size is None else intermediate_size
        rank = math.ceil(hidden_size / 16) if time_step_rank is None else time_step_rank
        for name, value in (
            ("hidden_size", hidden_size), ("intermediate_size", width), ("state_size", state_size),
            ("conv_kernel", conv_kernel), ("time_step_rank", rank),
        ):  # fmt: skip
            _check_size(name, value)
        self.hidden_size, self.intermediate_size, self.ssm_state_size = hidden_size, width, state_size
        self.time_step_rank, self.conv_kernel_size, self.rms_eps = rank, conv_kernel, rms_eps
        self.in_proj = nn.Linear(hidden_size, 2 * width, bias=bias)
        self.conv1d = nn.Conv1d(width, width, conv_kernel, groups=width, padding=conv_kernel - 1, bias=conv_bias)
        self.x_proj = nn.Linear(width, rank + 2 * state_size, bias=False)
        self.dt_proj = nn.Linear(rank, width)
        states = torch.arange(1, state_size + 1, dtype=torch.float32)
        self.A_log = nn.Parameter(torch.log(states).repeat(width, 1))
        self.D = nn.Parameter(torch.ones(width))
        self.out_proj = nn.Linear(width, hidden_size, bias=bias)
        with torch.no_grad():
            nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
            self.dt_proj.bias.copy_(_initial_steps(width, time_step_min, time_step_max, time_step_floor))

    def forward(
        self,
        hidden_states: Tensor,
        state: MixerState | None = None,
        attention_mask: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, MixerState]:
        """hidden_states [B, L, d]; `state` of what came before; attention_mask [B, L], 0 at padding on either side.

        Returns [B, L, d], with `return_state` also the state after the last step.
        """
        return self.run(hidden_states, state, attention_mask, return_state)

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, state_size={self.ssm_state_size}, rms_eps={self.rms_eps}"


class GatedRMSNorm(nn.Module):
    """weight * v / rms(v) with v = y silu(gate), mean squares over groups of `group_size` channels, in float32."""

    def __init__(self, hidden_size: int, group_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.group_size, self.variance_epsilon = group_size, eps

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        v = (y.float() * F.silu(gate.float())).unflatten(-1, (-1, self.group_size))
        v = F.rms_norm(v, (self.group_size,), eps=self.variance_epsilon)
        return (self.weight.float() * v.flatten(-2)).to(y.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, group_size={self.group_size}, eps={self.variance_epsilon}"


class Mamba2Block(_Block):
    """Mamba-2's computation over a mixer's attributes."""

    dt_bias: nn.Parameter
    norm: Any
    ssm_state_size: int
    num_heads: int
    head_dim: int
    n_groups: int
    chunk_size: int
    time_step_limit: tuple[float, float]

    def mix(
        self, hidden: Tensor, state: MixerState | None, mask: Tensor | None, seq_idx: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [B, L, d] through the block: out, the convolution's input, the last state [B, H, P, N]."""
        mixed = _masked(self.in_proj(_masked(hidden, mask)), mask)
        width = self.num_heads * self.head_dim
        conv_input = mixed[..., width : mixed.shape[2] - self.num_heads].transpose(1, 2)
        weight, bias = self.taps()
        out_proj = self.projection(self.out_proj)
        if out_proj is None or seq_idx is not None or self.trains(
            self.A_log, self.D, self.dt_bias, self.norm.weight, weight, bias, out_proj.weight, out_proj.bias
        ):  # fmt: skip
            out, last = self._unfused(mixed, conv_input, state, mask, seq_idx)
        else:
            out, last = mamba2_inner(
                mixed, weight, bias, self.dt_bias, self.decay(), self.D, self.norm.weight, out_proj,
                head_dim=self.head_dim, groups=self.n_groups, norm_groups=width // self.norm.group_size,
                norm_eps=self.norm.variance_epsilon, dt_limit=self.limit(), mask=mask,
                conv_state=None if state is None else state.conv, initial_state=None if state is None else state.ssm,
            )  # fmt: skip
        return out, conv_input, last

    def limit(self) -> tuple[float, float]:
        return (float(self.time_step_limit[0]), float(self.time_step_limit[1]))

    def _unfused(
        self, mixed: Tensor, conv_input: Tensor, state: MixerState | None, mask: Tensor | None, seq_idx: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        weight, bias = self.taps()
        width, states = self.num_heads * self.head_dim, self.n_groups * self.ssm_state_size
        before = None if state is None else state.conv.to(mixed.dtype)
        xbc = causal_conv1d(conv_input, weight, bias, before, activation="silu", seq_idx=seq_idx)
        xbc = _masked(xbc.transpose(1, 2), mask)  # type: ignore[union-attr]
        x, b, c = xbc.split([width, states, states], dim=2)
        decay = self.decay()
        step, _ = steps_of(mixed[..., mixed.shape[2] - self.num_heads :], decay, self.dt_bias, True, self.limit())
        b, c = (t.unflatten(2, (self.n_groups, -1)) for t in (b, c))
        y, last = mamba_chunk_scan(
            x.unflatten(2, (self.num_heads, -1)), _masked(step, mask), decay, b, c, self.chunk_size, self.D,
            initial_states=None if state is None else state.ssm, seq_idx=seq_idx, return_final_states=True,
        )  # fmt: skip
        return self.out_proj(self.norm(y.flatten(2), mixed[..., :width])), last

    def steps(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """The scan's steps for hidden [B, L, d]: [B, H, L] float32, after softplus and clamp."""
        dt = self.in_proj(_masked(hidden, mask))[..., -self.num_heads :]
        return steps_of(dt, self.decay(), self.dt_bias, True, self.limit())[0].transpose(1, 2)

    def step(self, hidden: Tensor, state: MixerState) -> Tensor:
        """One token [B, 1, d]; `state` (a convolution window of W - 1 or more steps) moves on in place."""
        mixed = self.in_proj(hidden)[:, 0]
        width, states = self.num_heads * self.head_dim, self.n_groups * self.ssm_state_size
        z, conv_input, dt = mixed.split([width, width + 2 * states, self.num_heads], dim=-1)
        weight, bias = self.taps()
        x, b, c = causal_conv1d_update(conv_input, state.conv, weight, bias, "silu").split(
            [width, states, states], dim=-1
        )
        shape = (self.num_heads, self.head_dim)
        step = F.softplus(dt.float() + self.dt_bias.float()).clamp(*self.limit()).to(dt.dtype)
        if self.limit() == (0.0, float("inf")):
            step, dt_bias = dt, self.dt_bias.float()[:, None].expand(shape)
        else:
            dt_bias = None
        b, c = (t.unflatten(-1, (self.n_groups, -1)) for t in (b, c))
        y = selective_state_update(
            state.ssm, x.unflatten(-1, shape), step.unsqueeze(-1).expand(-1, *shape),
            self.decay()[:, None, None].expand(*shape, self.ssm_state_size), b, c,
            self.D.float()[:, None].expand(shape), None, dt_bias, dt_bias is not None,
        )  # fmt: skip
        return self.out_proj(self.norm(y.flatten(1), z)).unsqueeze(1)


class Mamba2Mixer(Mamba2Block, nn.Module):
    """Mamba-2's mixer (arXiv 2405.21060): in_proj, causal convolution, scalar-decay scan, gated norm, out_proj.

    Args:
        hidden_size: d; expand: D / d; head_dim: P, a divisor of D; n_groups: G, of B and C, a divisor of the heads.
        state_size: N; conv_kernel: W; chunk_size: kept for checkpoints' configurations, results do not depend on it.
        bias: of in_proj and out_proj; conv_bias: of the convolution.
        norm_groups: groups of the gated norm; None is n_groups.
        time_step_limit: bounds of the steps.

    Checkpoints of Transformers' and mamba_ssm's mixers load unchanged. With frozen base weights forward and backward
    are one fused op; linear layers may be `Linear4bit`.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        expand: int = 2,
        head_dim: int = 64,
        n_groups: int = 1,
        state_size: int = 128,
        conv_kernel: int = 4,
        chunk_size: int = 256,
        bias: bool = False,
        conv_bias: bool = True,
        norm_groups: int | None = None,
        norm_eps: float = 1e-5,
        time_step_limit: tuple[float, float] = (0.0, float("inf")),
        time_step_min: float = 1e-3,
        time_step_max: float = 0.1,
        time_step_floor: float = 1e-4,
    ) -> None:
        super().__init__()
        width = expand * hidden_size
        norm_groups = n_groups if norm_groups is None else norm_groups
        for name, value in (
            ("hidden_size", hidden_size), ("expand", expand), ("head_dim", head_dim), ("n_groups", n_groups),
            ("state_size", state_size), ("conv_kernel", conv_kernel), ("norm_groups", norm_groups),
        ):  # fmt: skip
            _check_size(name, value)
        if width % head_dim or (width // head_dim) % n_groups or width % norm_groups:
            raise ValueError(
                f"head_dim, n_groups, norm_groups: head_dim must divide {width}, n_groups the heads and norm_groups "
                f"{width}, got {head_dim}, {n_groups}, {norm_groups}"
            )
        self.hidden_size, self.intermediate_size, self.ssm_state_size = hidden_size, width, state_size
        self.num_heads, self.head_dim, self.n_groups = width // head_dim, head_dim, n_groups
        self.conv_kernel_size, self.chunk_size, self.time_step_limit = conv_kernel, chunk_size, time_step_limit
        channels = width + 2 * n_groups * state_size
        self.in_proj = nn.Linear(hidden_size, width + channels + self.num_heads, bias=bias)
        self.conv1d = nn.Conv1d(
            channels, channels, conv_kernel, groups=channels, padding=conv_kernel - 1, bias=conv_bias
        )
        steps = _initial_steps(self.num_heads, time_step_min, time_step_max, time_step_floor)
        self.dt_bias = nn.Parameter(steps)
        self.A_log = nn.Parameter(torch.log(torch.arange(1, self.num_heads + 1, dtype=torch.float32)))
        self.D = nn.Parameter(torch.ones(self.num_heads))
        self.norm = GatedRMSNorm(width, width // norm_groups, norm_eps)
        self.out_proj = nn.Linear(width, hidden_size, bias=bias)

    def forward(
        self,
        hidden_states: Tensor,
        state: MixerState | None = None,
        attention_mask: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, MixerState]:
        """As `MambaMixer.forward`."""
        return self.run(hidden_states, state, attention_mask, return_state)

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, heads={self.num_heads}, state_size={self.ssm_state_size}"


def _check_size(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: must be a positive integer, got {value!r}")


def _initial_steps(count: int, low: float, high: float, floor: float) -> Tensor:
    """softplus^-1 of steps drawn log-uniformly from [low, high] (Mamba, section 3.6)."""
    if not 0 < low <= high:
        raise ValueError(f"time_step_min, time_step_max: must be 0 < min <= max, got {low}, {high}")
    steps = torch.exp(torch.rand(count) * (math.log(high) - math.log(low)) + math.log(low)).clamp(min=floor)
    return steps + torch.log(-torch.expm1(-steps))
