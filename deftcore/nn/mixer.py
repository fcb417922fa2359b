"""What Mamba's and Mamba-2's mixers share: the state they carry, padding, and the way through `mix` or `step`.

`MambaBlock` and `Mamba2Block` hold the computation for any module with these attributes; the integration with
Transformers runs its mixers through them too.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deftcore.nn.linear import Linear4bit, called_plainly
from deftcore.nn.linear16 import LINEARS
from deftcore.ops.ssm.conv1d import next_window
from deftcore.ops.ssm.projection import Projection


class MixerState(NamedTuple):
    """What a sequence leaves behind: the convolution's last inputs, [B, C, W - 1], and the scan's state, float32."""

    conv: Tensor
    ssm: Tensor


def plain_projection(module: nn.Module) -> Projection | None:
    """A linear layer as the fused ops take it; None where it is something else, or has hooks to run."""
    if not called_plainly(module):
        return None
    if isinstance(module, nn.Linear) and type(module) in LINEARS:
        return Projection(module.weight, module.bias)
    if type(module) is Linear4bit:
        return Projection(module.quantized, module.bias)
    return None


class MixerBlock:
    """What both mixers share."""

    in_proj: nn.Module
    conv1d: nn.Conv1d
    A_log: nn.Parameter
    D: nn.Parameter
    out_proj: nn.Module
    mix: Any  # (hidden, state, mask, ...): out, the convolution's input, the last state

    def projection(self, module: nn.Module) -> Projection | None:
        """`module` for the fused op, its adapters included; None sends it through its own forward."""
        return plain_projection(module)

    def decay(self) -> Tensor:
        """A, float32; never formed in half precision, where large entries of A_log would overflow."""
        return -torch.exp(self.A_log.float())

    def taps(self) -> tuple[Tensor, Tensor | None]:
        """The convolution's weight [C, W] and bias."""
        return self.conv1d.weight.squeeze(1), self.conv1d.bias

    def advance(
        self,
        hidden: Tensor,
        before: Tensor | None,
        ssm: Tensor | None,
        mask: Tensor | None,
        width: int,
        **packed: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`mix` from a state (None: none yet) on: out, the last `width` inputs of the convolution, the last state.

        `before` [B, C, width or more] are the inputs that came before. A masked step is no step: the window holds what
        stands before it, and after a state the steps of a row follow on it wherever its padding is.
        """
        state = None
        if before is not None and ssm is not None:
            reach = self.conv1d.weight.shape[2] - 1
            state = MixerState(before[..., before.shape[2] - reach :], ssm)
        if mask is None:
            out, conv_input, last = self.mix(hidden, state, None, **packed)
            return out, next_window(conv_input, before, width), last
        if mask.shape != hidden.shape[:2]:
            raise ValueError(f"attention_mask: must be [B, L] = {tuple(hidden.shape[:2])}, got {tuple(mask.shape)}")
        padding = mask == 0
        order = padding.int().argsort(dim=1, stable=True)  # what counts first
        if state is None:
            out, conv_input, last = self.mix(hidden, None, mask, **packed)
            return out, _last_steps(conv_input, order, padding, before, width), last
        packed = {name: t.gather(1, order) for name, t in packed.items()}
        padding = padding.gather(1, order)
        out, conv_input, last = self.mix(_reordered(hidden, order), state, ~padding, **packed)
        window = _last_steps(conv_input, torch.arange(mask.shape[1], device=mask.device), padding, before, width)
        return _reordered(out, order.argsort(dim=1)), window, last

    def trains(self, *tensors: Any) -> bool:
        """Whether a base weight asks for a gradient: the fused ops give none."""
        return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)

    def step(self, hidden: Tensor, state: MixerState) -> Tensor:  # pragma: no cover - overridden
        """One token [B, 1, d]; `state` moves on in place."""
        raise NotImplementedError


class Mixer(MixerBlock, nn.Module):
    """A mixer as a module of its own; Mamba's and Mamba-2's differ in their block."""

    def forward(
        self,
        hidden_states: Tensor,
        state: MixerState | None = None,
        attention_mask: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, MixerState]:
        """The block over a sequence, or over its next steps.

        Args:
            hidden_states: [B, L, d] in the dtype of the weights, or any under autocast.
            state: what an earlier part of the sequences left; None begins them.
            attention_mask: [B, L], 0 at padding, on either side.
            return_state: also return the state after each row's last step that is no padding.

        Returns:
            [B, L, d], with `return_state` also the new `MixerState`; `state` is left as it is.

        Raises:
            TypeError, ValueError: naming the argument; attention_mask of another shape.
        """
        if state is not None and hidden_states.shape[1] == 1 and attention_mask is None and not torch.is_grad_enabled():
            held = MixerState(state.conv.clone(), state.ssm.clone())
            out = self.step(hidden_states, held)
            return (out, held) if return_state else out
        conv, ssm = (None, None) if state is None else state
        reach = self.conv1d.weight.shape[2] - 1
        out, window, last = self.advance(hidden_states, conv, ssm, attention_mask, reach)
        return (out, MixerState(window, last)) if return_state else out


def _reordered(x: Tensor, order: Tensor) -> Tensor:
    """x [B, L, d] with its steps in the order [B, L]."""
    return x.gather(1, order.unsqueeze(-1).expand_as(x))


def _last_steps(x: Tensor, order: Tensor, padding: Tensor, before: Tensor | None, width: int) -> Tensor:
    """The last `width` steps of x [B, C, L] that are no padding [B, L], and of what came `before` (None: zeros).

    `order` [B, L] or [L] lists each row's steps, padding last.
    """
    if before is None:
        before = x.new_zeros((*x.shape[:2], width))
    joined = torch.cat((before[..., before.shape[2] - width :], x), -1)
    places = torch.arange(-width, 0, device=x.device).expand(x.shape[0], width)
    places = torch.cat((places, order.expand_as(padding)), 1) + width
    end = (~padding).sum(1, keepdim=True)
    places = places.gather(1, end + torch.arange(width, device=x.device))
    return joined.gather(2, places.unsqueeze(1).expand(-1, x.shape[1], -1))


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """x [B, L, K] with 0 where mask [B, L] has it."""
    return x if mask is None else x * mask.to(torch.bool).unsqueeze(-1)


def check_size(name: str, value: Any) -> None:
    """Raises ValueError unless value is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: must be a positive integer, got {value!r}")


def initial_steps(count: int, low: float, high: float, floor: float) -> Tensor:
    """softplus^-1 of steps drawn log-uniformly from [low, high] (Mamba, section 3.6)."""
    if not 0 < low <= high:
        raise ValueError(f"time_step_min, time_step_max: must be 0 < min <= max, got {low}, {high}")
    steps = torch.exp(torch.rand(count) * (math.log(high) - math.log(low)) + math.log(low)).clamp(min=floor)
    return steps + torch.log(-torch.expm1(-steps))
