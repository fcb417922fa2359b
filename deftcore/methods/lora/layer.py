"""PEFT's LoRA layer with its forward as one op, and what other rooms need of LoRA layers."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from deftcore.methods.lora.patch import Replacement
from deftcore.methods.lora.proof import lora_cases
from deftcore.nn.linear import Linear4bit, called_plainly
from deftcore.nn.linear16 import LINEARS
from deftcore.nn.merging import merged_4bit
from deftcore.ops.autocast import autocast_dtype
from deftcore.ops.lora import lora_linear
from deftcore.ops.quantized import QuantizedTensor
from deftcore.training.tuners import check_finite

Pair = tuple[Tensor, Tensor, tuple[int, int] | None]  # A [r, K], B [rows, r] and the rows start:stop; None is all


def factors(layer: Any, adapter: str) -> Sequence[Pair]:
    """The pairs of factors whose products B A, one below the other, are an adapter's update without its scaling.

    Args:
        layer: PEFT's LoRA layer. One whose adapters are several pairs, each of some rows of the output, says them
            itself by a method `factors(adapter)`.
        adapter: a key of `layer.lora_A`.
    """
    if hasattr(type(layer), "factors"):
        return layer.factors(adapter)
    return [(layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, None)]


def obstacle(layer: Any, weight: Tensor | QuantizedTensor, dtype: torch.dtype) -> str:
    """Why the fused op does not cover a LoRA layer as it is now, on an input of `dtype`; empty where it does."""
    base = layer.base_layer
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged:
        return "adapters are merged or disabled"
    if len(active) != 1:
        return f"{len(active)} active adapters"
    name = active[0]
    if type(layer.lora_variant.get(name, None)) not in (type(None), *getattr(layer, "fused_variants", ())):
        return "a variant of LoRA"
    a, b = layer.lora_A[name], layer.lora_B[name]
    if b.bias is not None:
        return "lora_bias"
    if type(base) not in layer.bases or type(a) not in LINEARS or type(b) not in LINEARS:
        return f"{type(a).__name__} and {type(b).__name__} over {type(base).__name__}"
    if not all(map(called_plainly, (base, a, b, layer.lora_dropout[name]))):
        return "hooks on its parts"
    if isinstance(weight, QuantizedTensor):
        computed = base.compute_dtype if dtype == torch.float16 else None
        return "" if computed in (None, dtype) else f"compute_dtype {computed}"
    if weight.requires_grad:
        return "the base weight trains"
    if any(type(t) is not nn.Parameter for t in (weight, a.weight, b.weight)):
        return f"weights are {type(weight).__name__}, {type(a.weight).__name__}"
    if autocast_dtype(weight) is not None:  # which leaves float64 alone
        return "float64 under autocast" if torch.float64 in (dtype, weight.dtype, a.weight.dtype) else ""
    masters = (
        dtype.itemsize == 2 and a.weight.dtype == torch.float32 and getattr(layer, "cast_input_dtype_enabled", True)
    )
    if dtype != weight.dtype or a.weight.dtype != b.weight.dtype or not (a.weight.dtype == dtype or masters):
        return f"{a.weight.dtype} factors over {weight.dtype}"
    return ""


def fused_lora(layer: Any, weight: Tensor | QuantizedTensor, x: Tensor) -> Tensor | None:
    """A LoRA layer's forward as one op, or None where the op does not cover it and PEFT's own has to serve."""
    if obstacle(layer, weight, x.dtype):
        return None
    name = next(name for name in layer.active_adapters if name in layer.lora_A)
    a, b, dropout = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.lora_dropout[name]
    return fused_product(layer, weight, x, a, b, layer.scaling[name], None, None, dropout)


def fused_product(
    layer: Any, weight: Tensor | QuantizedTensor, x: Tensor, a: Tensor, b: Tensor, scaling: float,
    sigma: Tensor | None, minus: tuple[Tensor, Tensor] | None, dropout: nn.Module,
) -> Tensor:  # fmt: skip
    """x W^T + bias + scaling ((drop(x) A^T) * sigma) B^T - (x A0^T) B0^T [..., M], as one op under PEFT's rules for
    dtypes; where `obstacle` names no reason.

    Args:
        a, b, sigma, minus: A [R, K], B [M, R], sigma [R] or None, (A0 [R0, K], B0 [M, R0]) or None, for the layer's
            input x [..., K].
    """
    bias, drops = layer.base_layer.bias, layer.training and not isinstance(dropout, nn.Identity)
    dropped = dropout(x.to(a.dtype)) if drops else None  # in the factors' dtype, as in PEFT
    if isinstance(weight, QuantizedTensor):  # float32 master factors are cast per call, their gradients come back
        a, b, bias = a.to(x.dtype), b.to(x.dtype), None if bias is None else bias.to(x.dtype)
        dropped = None if dropped is None else dropped.to(x.dtype)
    sigma = None if sigma is None else sigma.to(a.dtype)
    minus = None if minus is None else (minus[0].to(a.dtype), minus[1].to(a.dtype))
    return lora_linear(x, weight, a, b, scaling=scaling, sigma=sigma, minus=minus, bias=bias, dropped_x=dropped)


class FusedLoraLinear(LoraLinear):
    """PEFT's LoRA layer with its plain forward fused; parameters, names and checkpoints are PEFT's.

    `patch` changes a layer's class to this one and `unpatch` changes it back, so nothing else can differ. Over a
    `Linear4bit` base, merging requantises and unmerging restores the saved bytes.
    """

    bases = (*LINEARS, Linear4bit)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., K] to x W^T + bias + s (drop(x) A^T) B^T [..., M], in x's dtype (LoRA, arXiv 2106.09685, eq. 3).

        One op, `deftcore.ops.lora_linear`; PEFT's own forward with further arguments, or where `waits` names a reason.
        """
        y = None if args or kwargs else fused_lora(self, base_weight(self), x)
        return super().forward(x, *args, **kwargs) if y is None else y

    def waits(self) -> str:
        """Why PEFT's own forward runs for now; empty where the op does."""
        weight = base_weight(self)
        return obstacle(self, weight, weight.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the update to the weight: PEFT's merge over a dense base; over 4 bits the sum is requantised.

        Raises:
            ValueError: over 4 bits an adapter that is a variant or has a bias, or with `safe_merge` is not finite.
        """
        base = self.get_base_layer()
        if not isinstance(base, Linear4bit):
            return super().merge(safe_merge, adapter_names)
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            if name in self.lora_variant or self.lora_bias[name]:
                raise ValueError(f"{name}: only plain LoRA without a bias can be merged into 4 bits")
            merged, report = merged_4bit(base.quantized, self.get_delta_weight(name))
            if safe_merge:
                check_finite(merged.scales(), name)
            if not self.merged_adapters:
                self._unmerged = base.quantized
            base.set_quantized(merged)
            self.merged_adapters.append(name)
            warnings.warn(f"merged into 4 bits: {report}", stacklevel=2)
        return None

    def unmerge(self) -> None:
        """PEFT's over a dense base; over 4 bits the bytes of before the first merge."""
        base = self.get_base_layer()
        if not isinstance(base, Linear4bit) or not self.merged:
            return super().unmerge()
        base.set_quantized(self._unmerged)
        del self._unmerged
        self.merged_adapters.clear()
        return None


def base_weight(layer: Any) -> Tensor | QuantizedTensor:
    """The weight [M, K] beneath a LoRA layer over `nn.Linear` or `Linear4bit`, dense or packed."""
    base = layer.base_layer
    return base.quantized if isinstance(base, Linear4bit) else base.weight


def replacement(module: nn.Module, parent: nn.Module | None) -> Replacement | str:
    """As `patch.Replacements`, for PEFT's LoRA over dense layers and `Linear4bit`."""
    if not isinstance(module, LoraLinear):
        return ""
    base = type(module.get_base_layer())
    if getattr(module, "fused_variants", ()):  # a room's own layer, native as it is made
        return type(module), list
    if type(module) not in (LoraLinear, FusedLoraLinear):
        return type(module).__name__
    if base not in FusedLoraLinear.bases:
        return f"base {base.__name__}"
    if module.lora_variant:
        return f"variant {', '.join(module.lora_variant)}"
    return FusedLoraLinear, lambda: lora_cases(module, getattr(module.get_base_layer(), "quantized", None))


def unpatch_module(module: nn.Module) -> None:
    """As `patch.Replacements`."""
    if type(module) is FusedLoraLinear:
        module.__class__ = LoraLinear  # type: ignore[assignment]
