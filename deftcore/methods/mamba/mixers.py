"""Transformers' Mamba, Mamba-2 and FalconMamba mixers on the fused ops, in place and back, LoRA inside included."""

import hashlib
import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer as HfFalconMambaMixer
from transformers.models.mamba.modeling_mamba import MambaMixer as HfMambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as HfMamba2Mixer

from deftcore.methods.lora.layer import factors
from deftcore.methods.lora.patch import Replacement
from deftcore.methods.lora.proof import lora_ready
from deftcore.models.mamba_cache import held_states
from deftcore.nn.linear import called_plainly
from deftcore.nn.mamba import MambaBlock
from deftcore.nn.mamba2 import Mamba2Block
from deftcore.nn.mixer import MixerBlock, MixerState, plain_projection
from deftcore.nn.shadow import decoded
from deftcore.nn.verify import Case, random_like, test_bed, with_gradients
from deftcore.ops.ssm.projection import LoraPair, Projection


def lora_projection(module: Any) -> Projection | None:
    """A linear layer with PEFT's LoRA as the fused ops take it; None for what they do not know."""
    if not isinstance(module, LoraLinear):
        return plain_projection(module)
    if not called_plainly(module):  # mixed batches of adapters come as hooks
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
        plain = plain and all(map(called_plainly, (module.lora_A[name], module.lora_B[name], dropout)))
        if name in module.lora_variant or module.lora_bias[name] or not plain:
            return None
        p = dropout.p if module.training and isinstance(dropout, nn.Dropout) else 0.0
        pairs += [LoraPair(a, b, float(module.scaling[name]), rows, p) for a, b, rows in factors(module, name)]
    return base._replace(lora=tuple(pairs))


class _Cached:
    """A mixer's forward with Transformers' arguments and cache."""

    def projection(self, module: nn.Module) -> Projection | None:
        """As `lora_projection`; the blocks ask for each of their linear layers."""
        return lora_projection(module)

    def forward(
        self: Any,
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
        is the name of `cache` before Transformers 5.24. Of an `attention_mask` longer than L the last L columns count.

        Raises:
            ValueError: cache and cache_params both given; packed sequences that the mixer cannot cut.
        """
        if cache_params is not None:
            if cache is not None:
                raise ValueError("cache, cache_params: are two names of one argument; pass one of them")
            cache = cache_params
        packed = self.packed(seq_idx, cu_seqlens)
        # A bias makes padding an input of the convolution in Transformers' mixers; here it is none.
        mask = attention_mask if self.use_bias else None
        padded = mask is not None and bool((mask[:, mask.shape[1] - hidden_states.shape[1] :] == 0).any())
        if padded or not all(map(called_plainly, self.read_directly())):
            return super(MixerBlock, self).forward(hidden_states, cache, attention_mask, **packed)  # type: ignore[misc]
        return self.mixed(hidden_states, cache, attention_mask, **packed)

    def read_directly(self: Any) -> list[nn.Module]:
        """Modules whose weights are used without a call; with hooks on them (offloading) Transformers' forward runs."""
        return [self.conv1d]

    def mixed(self: Any, hidden: Tensor, cache: Any, mask: Tensor | None, **packed: Tensor) -> Tensor:
        """[B, L, d] to [B, L, d]: one step in place where the cache is filled, else a scan that continues its state."""
        layer, length, width = self.layer_idx, hidden.shape[1], self.conv1d.weight.shape[2]
        conv: Any = None
        ssm: Any = None
        if cache is not None:
            conv, ssm = held_states(cache, layer)
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
        """What `mix` takes for packed sequences; Mamba-1 has no such form.

        Raises:
            ValueError: either is given.
        """
        if seq_idx is not None or cu_seqlens is not None:
            raise ValueError("seq_idx, cu_seqlens: packed sequences are not supported by the patched Mamba mixers")
        return {}


class FusedMambaMixer(_Cached, MambaBlock, HfMambaMixer):  # type: ignore[misc]
    """Transformers' MambaMixer with its computation replaced; parameters, names and checkpoints are Transformers'."""


class FusedFalconMambaMixer(_Cached, MambaBlock, HfFalconMambaMixer):  # type: ignore[misc]
    """Transformers' FalconMambaMixer, likewise; the order of its norms is that of Transformers' inference."""


class FusedMamba2Mixer(_Cached, Mamba2Block, HfMamba2Mixer):  # type: ignore[misc]
    """Transformers' Mamba2Mixer, likewise."""

    def read_directly(self) -> list[nn.Module]:
        """As `_Cached`, with the gated norm."""
        return [self.conv1d, self.norm]

    def norm_groups(self) -> int:
        """Channels / group size of the gated norm, as the installed Transformers has it."""
        width = self.num_heads * self.head_dim
        return width // getattr(self.norm, "group_size", width)  # one over all channels before Transformers 5.23

    def packed(self, seq_idx: Tensor | None, cu_seqlens: Tensor | None) -> dict[str, Tensor]:
        """`seq_idx` [B, L] as the scan takes it.

        Raises:
            ValueError: cu_seqlens without it.
        """
        if cu_seqlens is not None and seq_idx is None:
            raise ValueError("cu_seqlens: pass seq_idx as well; the patched Mamba2 mixer cuts sequences by it")
        return {} if seq_idx is None else {"seq_idx": seq_idx}


_FUSED: dict[type, type] = {
    HfMambaMixer: FusedMambaMixer,
    HfFalconMambaMixer: FusedFalconMambaMixer,
    HfMamba2Mixer: FusedMamba2Mixer,
}


def replacement(module: Any, parent: nn.Module | None) -> Replacement | str:
    """As `lora.patch.Replacements`, for mixers."""
    kind = type(module)
    if kind in _FUSED.values():
        return kind, list
    if kind not in _FUSED:
        return ""
    if module.activation not in ("silu", "swish"):
        return f"activation {module.activation}"
    return _FUSED[kind], lambda: [_case(module, parent)]


def unpatch_module(module: Any) -> None:
    """As `lora.patch.Replacements`."""
    for plain, fused in _FUSED.items():
        if type(module) is fused:
            module.__class__ = plain


# ---------------------------------------------------------------------------- proof


def _case(mixer: Any, parent: nn.Module | None) -> Case:
    """The mixer inside its own block, where it has one: the block knows the names of its arguments."""
    called = parent is not None and type(parent).__module__ == type(mixer).__module__
    at = next((name for name, child in parent.named_children() if child is mixer), "") if called and parent else ""
    holder: Any = parent if at and parent else mixer
    dtype = mixer.conv1d.weight.dtype
    sizes = [tuple(p.shape) for p in mixer.parameters()]
    layers = [str(p) for p in (mixer.in_proj, mixer.out_proj)]
    config = holder.config  # Mamba2Mixer itself has none
    digest = hashlib.sha256(f"{sizes}{layers}{config.to_dict() | {'_name_or_path': ''}}".encode()).hexdigest()
    label = f"{type(mixer).__name__} {mixer.hidden_size} x {mixer.ssm_state_size}, {str(dtype)[6:]}, {digest[:8]}"
    return Case(label, holder, lambda: lora_ready(test_bed(holder)), dtype, partial(_run, at=at), at)


def _run(unit: Any, dtype: torch.dtype, at: str) -> Iterator[tuple[str, Tensor]]:
    """Forward and backward, then a left-padded prefill and two cached steps."""
    mixer = unit.get_submodule(at)
    if not isinstance(mixer, _Cached) and hasattr(mixer, "dt_proj"):
        if isinstance(mixer.dt_proj, LoraLinear):
            mixer.dt_proj.__class__ = _VisibleLora
        mixer.dt_proj = decoded(mixer.dt_proj, dtype) or mixer.dt_proj
    name = next(n for n in ("cache", "cache_params") if n in inspect.signature(type(unit).forward).parameters)
    x = random_like(unit, (2, 7, mixer.hidden_size), dtype)
    mask = torch.ones((2, 5), dtype=torch.int64, device=x.device)
    mask[1, :2] = 0
    whole = x[:, :5].detach().requires_grad_()
    yield from with_gradients(unit, unit(whole, attention_mask=None if mixer.use_bias else mask), whole)
    cache = DynamicCache(config=unit.config)
    with torch.no_grad():
        for i, (start, stop, padding) in enumerate(((0, 5, mask), (5, 6, None), (6, 7, None))):
            part = x[:, start:stop]
            yield f"cached call {i + 1}", unit(part, attention_mask=padding, **{name: cache})


class _VisibleLora(LoraLinear):
    """Transformers' mixers read `dt_proj.weight`: here with the adapters in it."""

    @property
    def weight(self) -> Tensor:
        """W + s B A [M, K] in W's dtype."""
        found: Any = lora_projection(self)
        dense = found.weight if isinstance(found.weight, Tensor) else found.weight.dequantize()
        return sum((pair.scaling * (pair.b @ pair.a).to(dense.dtype) for pair in found.lora), dense)
