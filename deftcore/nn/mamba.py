"""Mamba's mixer on the native ops. Names and shapes of parameters are Transformers' and mamba_ssm's."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deftcore.nn.mixer import Mixer, MixerBlock, MixerState, check_size, initial_steps, masked
from deftcore.ops.autocast import autocast_dtype
from deftcore.ops.ssm.conv1d import causal_conv1d
from deftcore.ops.ssm.fused_mamba import mamba_inner
from deftcore.ops.ssm.projection import Projection, project
from deftcore.ops.ssm.scan import MASKED_STEP, selective_scan
from deftcore.ops.ssm.update import causal_conv1d_update, selective_state_update


class MambaBlock(MixerBlock):
    """Mamba's computation over a mixer's attributes."""

    x_proj: nn.Module
    dt_proj: nn.Module
    ssm_state_size: int
    rms_eps: float | None = None

    def mix(self, hidden: Tensor, state: MixerState | None, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [B, L, d] through the block: out, the convolution's input [B, D, L], the last state [B, D, N]."""
        xz = masked(self.in_proj(masked(hidden, mask)), mask)
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
        u = masked(u.transpose(1, 2), mask)  # type: ignore[union-attr]
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
            dtype = autocast_dtype(low)
            if dtype is not None and isinstance(dt_proj.weight, Tensor):
                low = low.to(dtype)
            delta, bias = project(low, dt_proj._replace(bias=None)), dt_proj.bias
        return (*(t.to(u.dtype) for t in (delta, b, c)), bias)

    def steps(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """The scan's steps for hidden [B, L, d]: [B, D, L] float32, after softplus."""
        x = masked(self.in_proj(masked(hidden, mask)), mask).chunk(2, dim=2)[0]
        u = causal_conv1d(x.transpose(1, 2), *self.taps(), activation="silu")
        u = masked(u.transpose(1, 2), mask)  # type: ignore[union-attr]
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


class MambaMixer(MambaBlock, Mixer):
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
            check_size(name, value)
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
            self.dt_proj.bias.copy_(initial_steps(width, time_step_min, time_step_max, time_step_floor))

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, state_size={self.ssm_state_size}, rms_eps={self.rms_eps}"
