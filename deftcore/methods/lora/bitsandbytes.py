"""bitsandbytes' 4-bit layers, plain or under PEFT's LoRA, on deftcore's ops: in place and back. See `patch`."""

from functools import partial
from typing import Any

import bitsandbytes as bnb
import torch
from peft.tuners.lora.bnb import Linear4bit as LoraBnbLinear
from torch import Tensor, nn

from deftcore.methods.lora.layer import fused_lora, obstacle
from deftcore.methods.lora.patch import Replacement
from deftcore.methods.lora.proof import lora_cases
from deftcore.nn.linear import linear_packed
from deftcore.nn.verify import Case, describe, run_linear, test_bed
from deftcore.ops.quantized import QuantizedTensor

_REPACKED = (
    "bitsandbytes has repacked its weights for inference; load the model again and patch it before its first use"
)


def quantized_of(module: Any) -> QuantizedTensor:
    """The layer's weight; shares its bytes, and is made anew when they moved."""
    weight = module.weight
    key = (weight.data_ptr(), weight.device)
    kept = module.__dict__.get("_deftcore_quantized")
    if kept is None or kept[0] != key:
        state = weight.quant_state
        nested = state.state2 if state.nested else None
        q = QuantizedTensor(
            packed=weight.data.contiguous().view(torch.uint8).reshape(-1),
            absmax=state.absmax.detach(),
            shape=torch.Size(state.shape),
            dtype=state.dtype,
            quant_type=state.quant_type,
            block_size=state.blocksize,
            nested_absmax=None if nested is None else nested.absmax,
            nested_offset=0.0 if nested is None else float(state.offset),
            code=state.code,
            nested_code=None if nested is None else nested.code,
            storage=weight.dtype,
        )
        kept = module.__dict__["_deftcore_quantized"] = (key, q)
    return kept[1]


class FusedBnbLinear(bnb.nn.Linear4bit):
    """bitsandbytes' layer with a native forward, which never repacks the weights."""

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight [M, K] as deftcore's ops take it; shares bitsandbytes' bytes."""
        return quantized_of(self)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] to x W^T + bias [..., M], in x's dtype; computed in `compute_dtype` where that is given."""
        return linear_packed(x, quantized_of(self), self.bias, self.compute_dtype)

    @torch.no_grad()
    def scale_output_(self, factor: float) -> None:
        """Multiplies what the layer returns by a number, through the scales and the bias."""
        weight: Any = self.weight
        state = weight.quant_state
        if state.nested:
            state.state2.absmax.mul_(factor)
            state.offset = state.offset * factor
        else:
            state.absmax.mul_(factor)
        if self.bias is not None:
            self.bias.mul_(factor)
        self.__dict__.pop("_deftcore_quantized", None)


class FusedBnbLora(LoraBnbLinear):
    """PEFT's LoRA layer over a 4-bit layer with its plain forward fused; unmerging restores the saved weight."""

    bases = (bnb.nn.Linear4bit, FusedBnbLinear)
    _unmerged: Any

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., K] to [..., M], in x's dtype, as one op, or PEFT's own forward where `waits` names a reason."""
        usable = not (args or kwargs or _unusable(self.get_base_layer()))
        y = fused_lora(self, quantized_of(self.get_base_layer()), x) if usable else None
        return super().forward(x, *args, **kwargs) if y is None else y

    def waits(self) -> str:
        """As `FusedLoraLinear.waits`."""
        q = quantized_of(self.get_base_layer())
        return obstacle(self, q, q.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's merge, with requantisation; the packed weight of before is kept for `unmerge`.

        Raises:
            ValueError: PEFT's; with `safe_merge` an update that is not finite.
        """
        before, merged = self.get_base_layer().weight, self.merged
        super().merge(safe_merge, adapter_names)
        if self.merged and not merged:
            self._unmerged = before

    def unmerge(self) -> None:
        """Puts the packed weight of before back, byte for byte; PEFT's own, which subtracts, where `lora_bias`
        trained."""
        if not self.merged or any(self.lora_bias.values()):
            return super().unmerge()
        self._unmerged.bnb_quantized = True  # merging cleared it
        self.get_base_layer().weight = self._unmerged
        del self._unmerged
        self.merged_adapters.clear()
        return None


def replacement(module: Any, parent: nn.Module | None) -> Replacement | str:
    """As `patch.Replacements`, for bitsandbytes' layers and LoRA over them."""
    kind = type(module)
    if kind in (LoraBnbLinear, FusedBnbLora):
        base = module.get_base_layer()
        if module.lora_variant:
            return f"variant {', '.join(module.lora_variant)}"
        if not isinstance(base, bnb.nn.Linear4bit):
            return f"base {type(base).__name__}"
        return _unusable(base) or (FusedBnbLora, lambda: lora_cases(module, quantized_of(base)))
    if kind in (bnb.nn.Linear4bit, FusedBnbLinear):
        return _unusable(module) or (FusedBnbLinear, lambda: [_case(module)])
    if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt, LoraBnbLinear)):
        return kind.__name__
    return ""


def _case(layer: Any) -> Case:
    q = quantized_of(layer)
    return Case(f"{type(layer).__name__} ({describe(q)})", layer, partial(test_bed, layer), q.dtype, run_linear)


def unpatch_module(module: nn.Module) -> None:
    """As `patch.Replacements`."""
    kinds: dict[type, type] = {FusedBnbLinear: bnb.nn.Linear4bit, FusedBnbLora: LoraBnbLinear}
    if type(module) in kinds:
        module.__class__ = kinds[type(module)]
        module.__dict__.pop("_deftcore_quantized", None)


def _unusable(module: Any) -> str:
    state = getattr(module.weight, "quant_state", None)
    if state is None:
        return "not quantised yet"
    return _REPACKED if getattr(state, "packing_format_for_cpu", False) else ""
