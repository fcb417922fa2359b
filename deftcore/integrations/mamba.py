"""Transformers' Mamba, Mamba-2 and FalconMamba mixers on the fused ops, in place and back, LoRA inside included."""

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer as HfFalconMambaMixer
from transformers.models.mamba.modeling_mamba import MambaMixer as HfMambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as HfMamba2Mixer

from deftcore.adapters.mamba_lora import SplitLoraLinear
from deftcore.nn.mamba import Mamba2Block, MambaBlock, MixerState, plain_projection
from deftcore.ops.mamba import LoraPair, Projection


def lora_projection(module: Any) -> Projection | None:
    """A linear layer with PEFT's LoRA as the fused ops take it; None for what they do not know."""
    if not isinstance(module, LoraLinear):
        return plain_projection(module)
    if module._forward_hooks or module._forward_pre_hooks:  # mixed batches of adapters come as hooks
        return None
    base = plain_projection(module.get_base_layer())
    if base is None or module.merged or module.disable_adapters:
        return base
    pairs = []
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        dropout = module.lora_dropout[name]
        plain = isinstance(dropout, nn.Identity) or type(dropout) is nn.Dropout
        if name in module.lora_variant or module.lora_bias[name] or not plain:
            return None
        p = dropout.p if module.training and isinstance(dropout, nn.Dropout) else 0.0
        a: Any = module.lora_A[name].weight
        b: Any = module.lora_B[name].weight
        scaling = float(module.scaling[name])
        if isinstance(module, SplitLoraLinear):
            blocks = module.blocks(name)
            pairs += [LoraPair(a[i:j], b[start:stop, i:j], scaling, (start, stop), p) for start, stop, i, j in blocks]
        else:
            pairs.append(LoraPair(a, b, scaling, None, p))
    return base._replace(lora=tuple(pairs))


class _Cached:
    """A mixer's forward with Transformers' arguments and cache."""

    def projection(self, module: nn.Module) -> Projection | None:
        return lora_projection(module)

    def forward(
        self: Any, hidden_states: Tensor, cache_params: Any = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """[B, L, d] to [B, L, d]. Several tokens after a filled cache continue from its state."""
        layer, length = self.layer_idx, hidden_states.shape[1]
        conv: Any = None
        ssm: Any = None
        if cache_params is not None:
            conv, ssm = (cache_params.get_conv_state(layer), cache_params.get_recurrent_state(layer))
        single = conv is not None and length == 1 and attention_mask is None and not torch.is_grad_enabled()
        if single and not cache_params.is_recording_past(layer):
            return self.step(hidden_states, MixerState(conv, ssm))
        reach, state = self.conv1d.weight.shape[2] - 1, None
        if conv is not None:
            window = conv[..., max(conv.shape[2] - reach, 0) :].clone()
            state = MixerState(F.pad(window, (reach - window.shape[2], 0)), ssm.clone())
        out, conv_input, last = self.mix(hidden_states, state, attention_mask, **self.extra(kwargs))
        if cache_params is not None:
            cache_params.update_conv_state(conv_input.detach(), layer, conv_kernel_size=self.conv_kernel_size)
            cache_params.update_recurrent_state(last.detach(), layer)
        return out

    def extra(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keywords that `mix` takes."""
        if kwargs.get("seq_idx") is not None or kwargs.get("cu_seqlens") is not None:
            raise ValueError("seq_idx, cu_seqlens: packed sequences are not supported by the patched Mamba mixers")
        return {}


class FusedMambaMixer(_Cached, MambaBlock, HfMambaMixer):  # type: ignore[misc]
    """Transformers' MambaMixer with its computation replaced; parameters, names and checkpoints are Transformers'."""


class FusedFalconMambaMixer(_Cached, MambaBlock, HfFalconMambaMixer):  # type: ignore[misc]
    """Transformers' FalconMambaMixer, likewise; the order of its norms is that of Transformers' inference."""


class FusedMamba2Mixer(_Cached, Mamba2Block, HfMamba2Mixer):  # type: ignore[misc]
    """Transformers' Mamba2Mixer, likewise."""

    def extra(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        if kwargs.get("cu_seqlens") is not None and kwargs.get("seq_idx") is None:
            raise ValueError("cu_seqlens: pass seq_idx as well; the patched Mamba2 mixer cuts sequences by it")
        return {"seq_idx": kwargs.get("seq_idx")}


_FUSED: dict[type, type] = {
    HfMambaMixer: FusedMambaMixer,
    HfFalconMambaMixer: FusedFalconMambaMixer,
    HfMamba2Mixer: FusedMamba2Mixer,
}


def patch_module(module: Any) -> tuple[bool, str]:
    """Whether `module` is a mixer that now runs on the fused ops; if not, why (empty: it is no mixer)."""
    kind = type(module)
    if kind in _FUSED.values():
        return True, ""
    if kind not in _FUSED:
        return False, ""
    if module.activation not in ("silu", "swish"):
        return False, f"activation {module.activation}"
    module.__class__ = _FUSED[kind]
    return True, ""


def unpatch_module(module: Any) -> None:
    for plain, fused in _FUSED.items():
        if type(module) is fused:
            module.__class__ = plain
