"""Mamba-2's mixer on the native ops. Names and shapes of parameters are Transformers' and mamba_ssm's."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deftcore.nn.mixer import Mixer, MixerBlock, MixerState, check_size, initial_steps, masked
from deftcore.ops.ssm.conv1d import causal_conv1d
from deftcore.ops.ssm.fused_mamba2 import mamba2_inner
from deftcore.ops.ssm.ssd import mamba_chunk_scan, steps_of
from deftcore.ops.ssm.update import causal_conv1d_update, selective_state_update


class GatedRMSNorm(nn.Module):
    """weight * v / rms(v) with v = y silu(gate), mean squares over groups of `group_size` channels, in float32."""

    def __init__(self, hidden_size: int, group_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.group_size, self.variance_epsilon = group_size, eps

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        """The norm of Mamba-2's block (Dao and Gu, arXiv 2405.21060, section 7).

        Args:
            y, gate: [..., hidden_size], any floating dtype.

        Returns:
            [..., hidden_size] in y's dtype.

        Raises:
            RuntimeError: by PyTorch, for sizes that do not fit.
        """
        v = (y.float() * F.silu(gate.float())).unflatten(-1, (-1, self.group_size))
        v = F.rms_norm(v, (self.group_size,), eps=self.variance_epsilon)
        return (self.weight.float() * v.flatten(-2)).to(y.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, group_size={self.group_size}, eps={self.variance_epsilon}"


class Mamba2Block(MixerBlock):
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
        mixed = masked(self.in_proj(masked(hidden, mask)), mask)
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
                head_dim=self.head_dim, groups=self.n_groups, norm_groups=self.norm_groups(),
                norm_eps=self.norm.variance_epsilon, dt_limit=self.limit(), mask=mask,
                conv_state=None if state is None else state.conv, initial_state=None if state is None else state.ssm,
            )  # fmt: skip
        return out, conv_input, last

    def norm_groups(self) -> int:
        """Groups of the gated norm."""
        return self.num_heads * self.head_dim // self.norm.group_size

    def limit(self) -> tuple[float, float]:
        """Bounds of the steps."""
        return (float(self.time_step_limit[0]), float(self.time_step_limit[1]))

    def _unfused(
        self, mixed: Tensor, conv_input: Tensor, state: MixerState | None, mask: Tensor | None, seq_idx: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        weight, bias = self.taps()
        width, states = self.num_heads * self.head_dim, self.n_groups * self.ssm_state_size
        before = None if state is None else state.conv.to(mixed.dtype)
        xbc = causal_conv1d(conv_input, weight, bias, before, activation="silu", seq_idx=seq_idx)
        xbc = masked(xbc.transpose(1, 2), mask)  # type: ignore[union-attr]
        x, b, c = xbc.split([width, states, states], dim=2)
        decay = self.decay()
        step, _ = steps_of(mixed[..., mixed.shape[2] - self.num_heads :], decay, self.dt_bias, True, self.limit())
        b, c = (t.unflatten(2, (self.n_groups, -1)) for t in (b, c))
        y, last = mamba_chunk_scan(
            x.unflatten(2, (self.num_heads, -1)), masked(step, mask), decay, b, c, self.chunk_size, self.D,
            initial_states=None if state is None else state.ssm, seq_idx=seq_idx, return_final_states=True,
        )  # fmt: skip
        return self.out_proj(self.norm(y.flatten(2), mixed[..., :width])), last

    def steps(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """The scan's steps for hidden [B, L, d]: [B, H, L] float32, after softplus and clamp."""
        dt = self.in_proj(masked(hidden, mask))[..., -self.num_heads :]
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
        dt_bias = None
        if self.limit() == (0.0, float("inf")):
            dt_bias = self.dt_bias.float()[:, None].expand(shape)
        else:  # which the op does not know
            dt = F.softplus(dt.float() + self.dt_bias.float()).clamp(*self.limit()).to(dt.dtype)
        b, c = (t.unflatten(-1, (self.n_groups, -1)) for t in (b, c))
        y = selective_state_update(
            state.ssm, x.unflatten(-1, shape), dt.unsqueeze(-1).expand(-1, *shape),
            self.decay()[:, None, None].expand(*shape, self.ssm_state_size), b, c,
            self.D.float()[:, None].expand(shape), None, dt_bias, dt_bias is not None,
        )  # fmt: skip
        return self.out_proj(self.norm(y.flatten(1), z)).unsqueeze(1)


class Mamba2Mixer(Mamba2Block, Mixer):
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
        self, hidden_size: int, *, expand: int = 2, head_dim: int = 64, n_groups: int = 1, state_size: int = 128,
        conv_kernel: int = 4, chunk_size: int = 256, bias: bool = False, conv_bias: bool = True,
        norm_groups: int | None = None, norm_eps: float = 1e-5,
        time_step_limit: tuple[float, float] = (0.0, float("inf")), time_step_min: float = 1e-3,
        time_step_max: float = 0.1, time_step_floor: float = 1e-4,
    ) -> None:  # fmt: skip
        super().__init__()
        width = expand * hidden_size
        norm_groups = n_groups if norm_groups is None else norm_groups
        for name, value in (
            ("hidden_size", hidden_size), ("expand", expand), ("head_dim", head_dim), ("n_groups", n_groups),
            ("state_size", state_size), ("conv_kernel", conv_kernel), ("norm_groups", norm_groups),
        ):  # fmt: skip
            check_size(name, value)
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
        steps = initial_steps(self.num_heads, time_step_min, time_step_max, time_step_floor)
        self.dt_bias = nn.Parameter(steps)
        self.A_log = nn.Parameter(torch.log(torch.arange(1, self.num_heads + 1, dtype=torch.float32)))
        self.D = nn.Parameter(torch.ones(self.num_heads))
        self.norm = GatedRMSNorm(width, width // norm_groups, norm_eps)
        self.out_proj = nn.Linear(width, hidden_size, bias=bias)

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, heads={self.num_heads}, state_size={self.ssm_state_size}"
