"""Transformers' Mamba, Mamba-2 and FalconMamba mixers on the fused ops, in place and back, LoRA inside included."""

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer as HfFalconMambaMixer
from transformers.models.mamba.modeling_mamba import MambaMixer as HfMambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as HfMamba2Mixer

from deftcore.adapters.mamba_lora import factors
from deftcore.nn.mamba import MambaBlock
from deftcore.nn.mamba2 import Mamba2Block
from deftcore.nn.mixer import MixerState, plain_projection
from deftcore.ops.mamba import LoraPair, Projection


def lora_projection(module: Any) -> Projection | None:
    """A linear layer with PEFT's LoRA as the fused ops take it; None for what they do not know."""
    if not isinstance(module, LoraLinear):
        return plain_projection(module)
    if module._forward_hooks or module._forward_pre_hooks:  # mixed batches of adapters come as hooks
        return None
    base = plain_projection(module.get_base_layer())
    if module.merged and module.disable_adapters:
        return None  # PEFT's forward takes the update out of the weight first
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
        pairs += [LoraPair(a, b, float(module.scaling[name]), rows, p) for a, b, rows in factors(module, name)]
    return base._replace(lora=tuple(pairs))


class _Cached:
    """A mixer's forward with Transformers' arguments and cache."""

    def projection(self, module: nn.Module) -> Projection | None:
        return lora_projection(module)

    def forward(
        self,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        *,
        cache_params: Any = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """[B, L, d] to [B, L, d]. Several tokens after a filled cache continue from its state.

        Every argument stands here by name: a keyword that a later Transformers adds raises a TypeError. `cache_params`
        is the name of `cache` before Transformers 5.23. Of an `attention_mask` longer than L the last L columns count.

        Raises:
            ValueError: cache and cache_params both given; packed sequences that the mixer cannot cut.
        """
        if cache_params is not None:
            if cache is not None:
                raise ValueError("cache, cache_params: are two names of one argument; pass one of them")
            cache = cache_params
        return self.mixed(hidden_states, cache, attention_mask, **self.packed(seq_idx, cu_seqlens))

    def mixed(self: Any, hidden: Tensor, cache: Any, mask: Tensor | None, **packed: Tensor) -> Tensor:
        layer, length, width = self.layer_idx, hidden.shape[1], self.conv1d.weight.shape[2]
        conv: Any = None
        ssm: Any = None
        if cache is not None:
            conv, ssm = _held(cache, layer)
        recording = hasattr(cache, "is_recording_past") and cache.is_recording_past(layer)
        if mask is not None:
            mask = mask[:, mask.shape[1] - length :]
        if conv is not None and length == 1 and mask is None and not (recording or torch.is_grad_enabled()):
            return self.step(hidden, MixerState(conv, ssm))
        kept = length if recording else width
        if conv is not None:  # copies: the cache moves on in place
            conv = F.pad(conv, (max(width, kept) - conv.shape[2], 0)).clone()
            ssm = ssm.clone()
        out, window, last = self.advance(hidden, conv, ssm, mask, kept, **packed)
        if cache is not None:
            cache.update_conv_state(window.detach(), layer, conv_kernel_size=width)
            cache.update_recurrent_state(last.detach(), layer)
        return out

    def packed(self, seq_idx: Tensor | None, cu_seqlens: Tensor | None) -> dict[str, Tensor]:
        """What `mix` takes for packed sequences."""
        if seq_idx is not None or cu_seqlens is not None:
            raise ValueError("seq_idx, cu_seqlens: packed sequences are not supported by the patched Mamba mixers")
        return {}


def _held(cache: Any, layer: int) -> tuple[Any, Any]:
    """The convolution's inputs and the scan's state that a cache holds for a layer; None before the first tokens."""
    if hasattr(cache, "get_conv_state"):
        return cache.get_conv_state(layer), cache.get_recurrent_state(layer)
    held = cache.layers[layer]  # Transformers before 5.22
    return (held.conv_states, held.recurrent_states) if held.has_previous_state else (None, None)


class FusedMambaMixer(_Cached, MambaBlock, HfMambaMixer):  # type: ignore[misc]
    """Transformers' MambaMixer with its computation replaced; parameters, names and checkpoints are Transformers'."""


class FusedFalconMambaMixer(_Cached, MambaBlock, HfFalconMambaMixer):  # type: ignore[misc]
    """Transformers' FalconMambaMixer, likewise; the order of its norms is that of Transformers' inference."""


class FusedMamba2Mixer(_Cached, Mamba2Block, HfMamba2Mixer):  # type: ignore[misc]
    """Transformers' Mamba2Mixer, likewise."""

    def packed(self, seq_idx: Tensor | None, cu_seqlens: Tensor | None) -> dict[str, Tensor]:
        if cu_seqlens is not None and seq_idx is None:
            raise ValueError("cu_seqlens: pass seq_idx as well; the patched Mamba2 mixer cuts sequences by it")
        return {} if seq_idx is None else {"seq_idx": seq_idx}


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
