"""PEFT's LoRA layers and bitsandbytes' 4-bit layers on deftcore's ops, in place and back; merging over 4-bit bases."""

import logging
import sys
import warnings
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from deftcore.adapters.mamba_lora import factors
from deftcore.adapters.s2ft import S2ftLayer
from deftcore.nn.gates import gates_of
from deftcore.nn.linear import Linear4bit, MergeReport, dense_layer, merged_4bit, merged_16bit
from deftcore.ops.lora import lora_linear
from deftcore.ops.quantized import QuantizedTensor

logger = logging.getLogger("deftcore")


def fused_lora(
    layer: Any, weight: Tensor | QuantizedTensor, x: Tensor, args: tuple, kwargs: dict[str, Any]
) -> Tensor | None:
    """A LoRA layer's forward as one op, or None where the op does not cover it and PEFT's own has to serve."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    plain = not (args or kwargs or layer.disable_adapters or layer.merged or len(active) != 1)
    if not plain or active[0] in layer.lora_variant:
        return None
    name, bias = active[0], layer.base_layer.bias
    a, b, dropout = layer.lora_A[name].weight, layer.lora_B[name], layer.lora_dropout[name]
    if b.bias is not None:
        return None
    b = b.weight
    if isinstance(weight, QuantizedTensor):  # float32 master factors are cast per call, their gradients come back
        if x.dtype == torch.float16 and layer.base_layer.compute_dtype not in (None, torch.float16):
            return None
        a, b, bias = a.to(x.dtype), b.to(x.dtype), None if bias is None else bias.to(x.dtype)
    elif weight.requires_grad or not (x.dtype == weight.dtype == a.dtype):
        return None  # PEFT casts between the base's and the adapter's dtype
    dropped = dropout(x) if layer.training and not isinstance(dropout, nn.Identity) else None
    return lora_linear(x, weight, a, b, scaling=layer.scaling[name], bias=bias, dropped_x=dropped)


class FusedLoraLinear(LoraLinear):
    """PEFT's LoRA layer with its plain forward fused; parameters, names and checkpoints are PEFT's.

    `patch` changes a layer's class to this one and `unpatch` changes it back, so nothing else can differ. Over a
    `Linear4bit` base, merging requantises and unmerging restores the saved bytes.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base: Any = self.base_layer
        weight = base.quantized if isinstance(base, Linear4bit) else base.weight
        y = fused_lora(self, weight, x, args, kwargs)
        return super().forward(x, *args, **kwargs) if y is None else y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        base = self.get_base_layer()
        if not isinstance(base, Linear4bit):
            return super().merge(safe_merge, adapter_names)
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            if name in self.lora_variant or self.lora_bias[name]:
                raise ValueError(f"{name}: only plain LoRA without a bias can be merged into 4 bits")
            merged, report = merged_4bit(base.quantized, self.get_delta_weight(name))
            if safe_merge and not bool(torch.isfinite(merged.scales()).all()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            if not self.merged_adapters:
                self._unmerged = base.quantized
            base.set_quantized(merged)
            self.merged_adapters.append(name)
            warnings.warn(f"merged into 4 bits: {report}", stacklevel=2)
        return None

    def unmerge(self) -> None:
        base = self.get_base_layer()
        if not isinstance(base, Linear4bit) or not self.merged:
            return super().unmerge()
        base.set_quantized(self._unmerged)
        del self._unmerged
        self.merged_adapters.clear()
        return None


def patch(model: nn.Module) -> nn.Module:
    """Runs PEFT's LoRA layers, bitsandbytes' 4-bit layers and Mamba mixers on native ops, in place; returns the model.

    Bases may be `torch.nn.Linear`, deftcore's `Linear4bit` or bitsandbytes'. Layers it leaves alone are logged with the
    reason: other bases, DoRA and other variants, weights that bitsandbytes has repacked. Calls that the op does not
    cover (several active adapters, mixed batches, mixed dtypes over dense bases) go to PEFT's own forward. Mixers of
    Transformers' Mamba, Mamba-2 and FalconMamba become one fused op each, LoRA on any of their projections inside.

    Raises:
        ValueError: when the model has no such layer at all.
    """
    patched: list[str] = []
    left: list[str] = []
    for name, module in model.named_modules():
        kind = type(module)
        if kind is FusedLoraLinear:
            patched.append(name)
        elif isinstance(module, LoraLinear):
            base = type(module.get_base_layer())
            if kind is not LoraLinear:
                left.append(f"{name} ({kind.__name__})")
            elif base not in (nn.Linear, Linear4bit):
                left.append(f"{name} (base {base.__name__})")
            elif module.lora_variant:
                left.append(f"{name} (variant {', '.join(module.lora_variant)})")
            else:
                module.__class__ = FusedLoraLinear
                patched.append(name)
        else:
            for patch_module in _module_patches("patch_module"):
                done, reason = patch_module(module)
                if done:
                    patched.append(name)
                elif reason:
                    left.append(f"{name} ({reason})")
    if not patched and not left:
        if any(isinstance(module, Linear4bit) for module in model.modules()):
            return model  # native already
        raise ValueError(
            f"model: {type(model).__name__} has no PEFT LoRA, no bitsandbytes 4-bit layer and no Mamba mixer; call "
            "get_peft_model first"
        )
    logger.info("patch: %d layers on native ops", len(patched))
    if left:
        logger.warning("patch: left alone: %s", "; ".join(left))
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Gives the layers their own classes back, in place; returns the model."""
    for module in model.modules():
        if type(module) is FusedLoraLinear:
            module.__class__ = LoraLinear  # type: ignore[assignment]
        else:
            for unpatch_module in _module_patches("unpatch_module"):
                unpatch_module(module)
    return model


def _module_patches(name: str) -> list[Any]:
    """The functions `name` of the integrations whose libraries are in use."""
    found = []
    if "bitsandbytes" in sys.modules:
        from deftcore.integrations import bitsandbytes

        found.append(getattr(bitsandbytes, name))
    if any(
        f"transformers.models.{kind}.modeling_{kind}" in sys.modules for kind in ("mamba", "mamba2", "falcon_mamba")
    ):
        from deftcore.integrations import mamba

        found.append(getattr(mamba, name))
    return found


def merge(model: Any, *, to: str = "16bit", dtype: torch.dtype | None = None) -> Any:
    """Merges the active LoRA or S2FT adapters of a model over 4-bit bases, and unloads PEFT; adaptive gates too.

    Weights of a quantised model sit on code points, so that a small update is rounded away by a merge into 4 bits; the
    report says how much of it is left. The update was trained on the decoded weights: merging it into the original
    16-bit ones adds an error it has never seen.

    Args:
        model: a PEFT model over `Linear4bit` or (patched) bitsandbytes layers.
        to: "16bit" decodes every 4-bit layer and adds the update with one rounding; "4bit" requantises.
        dtype: of the 16-bit weights; None is the dtype that was quantised.

    Returns:
        The base model, with `deftcore_merge`: a `MergeReport` per merged layer, by name.

    Raises:
        ValueError: naming the argument, or the layer that cannot be merged.
    """
    if to not in ("16bit", "4bit"):
        raise ValueError(f"to: must be '16bit' or '4bit', got {to!r}")
    if not hasattr(model, "merge_and_unload"):
        raise ValueError(f"model: must be a PEFT model, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, (LoraLayer, S2ftLayer)) and hasattr(module.get_base_layer(), "quantized"):
            _check_delta(name, module)
    gates = gates_of(model)
    if gates is not None:  # the merged weights are what gets saved
        gates.fold()
    reports: dict[str, MergeReport] = {}
    replaced: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        tuned = module if isinstance(module, (LoraLayer, S2ftLayer)) else None
        base = module.get_base_layer() if tuned is not None else module
        q = getattr(base, "quantized", None)
        if not isinstance(q, QuantizedTensor) or any(name.startswith(f"{done}.") for done in replaced):
            continue
        delta = None if tuned is None else _delta(tuned, q)
        if to == "4bit":
            if delta is None:
                continue
            merged, reports[name] = merged_4bit(q, delta)
            bias = None if base.bias is None else base.bias.detach()
            source: Any = getattr(base, "source_cls", nn.Linear)
            replaced[name] = Linear4bit(merged, bias, compute_dtype=base.compute_dtype, source_cls=source)
            continue
        weight, report = merged_16bit(q, delta, dtype or q.dtype)
        if report is not None:
            reports[name] = report
        replaced[name] = dense_layer(base, weight)
    for name, new in replaced.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, new)
    result = model.merge_and_unload()  # what is left: adapters over dense bases, modules_to_save
    if to == "16bit" and hasattr(getattr(result, "config", None), "quantization_config"):
        del result.config.quantization_config
        for attribute in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_quantized"):
            if hasattr(result, attribute):
                delattr(result, attribute)
    result.deftcore_merge = {name.removeprefix("base_model.model."): report for name, report in reports.items()}
    if reports:
        worst = max(reports.values(), key=lambda r: r.error)
        logger.warning("merge: %d layers into %s; worst: %s", len(reports), to, worst)
    return result


def _check_delta(name: str, layer: Any) -> None:
    """Raises ValueError, naming the layer, where `_delta` does not cover it."""
    if layer.merged:
        raise ValueError(f"{name}: is merged already; unmerge first")
    if isinstance(layer, LoraLayer) and not layer.disable_adapters:
        active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
        if any(adapter in layer.lora_variant or layer.lora_bias[adapter] for adapter in active):
            raise ValueError(f"{name}: only plain LoRA without a bias can be merged")


def _delta(layer: Any, q: QuantizedTensor) -> Tensor | None:
    """The update of a layer's active adapters, float32 [M, K]; None where there is none."""
    if layer.disable_adapters:
        return None
    if isinstance(layer, S2ftLayer):
        return layer.get_delta_weight()
    active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    if not active:
        return None
    total = torch.zeros(q.shape, device=q.device)
    for adapter in active:
        for a, b, rows in factors(layer, adapter):
            part = total if rows is None else total[slice(*rows)]
            part += layer.scaling[adapter] * (b.detach().float() @ a.detach().float())
    return total
