"""Merging adapters over 4-bit bases."""

import logging
from typing import Any, Protocol, runtime_checkable

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from deftcore.methods.lora.layer import factors
from deftcore.models.blocks import base_of
from deftcore.models.gates import gates_of
from deftcore.models.tied import merge_and_unload, tuned_ties
from deftcore.nn.linear import Linear4bit, dense_layer
from deftcore.nn.merging import MergeReport, merged_4bit, merged_16bit
from deftcore.ops.checks import FLOAT_DTYPES
from deftcore.ops.quantized import QuantizedTensor

logger = logging.getLogger("deftcore")


@runtime_checkable
class Updating(Protocol):
    """A room's layer that `merge` takes over a 4-bit base, beside PEFT's LoRA layers: it says its update itself."""

    merged: bool

    def get_base_layer(self) -> nn.Module:
        """The layer beneath the adapter."""

    def dense_update(self) -> Tensor:
        """What the active adapters add to the weight, float32 [M, K]."""


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
    if dtype is not None and (to == "4bit" or dtype not in FLOAT_DTYPES):
        raise ValueError(f"dtype: must be a floating type, and is for to='16bit' alone, got {dtype} with to={to!r}")
    if not hasattr(model, "merge_and_unload"):
        raise ValueError(f"model: must be a PEFT model, got {type(model).__name__}")
    if hasattr(base_of(model), "deftcore_blocks"):
        raise ValueError("model: is in its sparse form already; merge it before sparsify")
    for name, module in model.named_modules():
        if isinstance(module, (LoraLayer, Updating)) and hasattr(module.get_base_layer(), "quantized"):
            _check_update(name, module)
    tuned_ties(model)
    gates = gates_of(model)
    if gates is not None:  # the merged weights are what gets saved
        gates.fold()
    reports: dict[str, MergeReport] = {}
    replaced: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        tuned = module if isinstance(module, (LoraLayer, Updating)) else None
        base = module.get_base_layer() if tuned is not None else module
        q = getattr(base, "quantized", None)
        if not isinstance(q, QuantizedTensor) or any(name.startswith(f"{done}.") for done in replaced):
            continue
        update = None if tuned is None else _update(tuned, q)
        if to == "4bit":
            if update is None:
                continue
            merged, reports[name] = merged_4bit(q, update)
            bias = None if base.bias is None else base.bias.detach()
            source: Any = getattr(base, "source_cls", nn.Linear)
            replaced[name] = Linear4bit(merged, bias, compute_dtype=base.compute_dtype, source_cls=source)
            continue
        weight, report = merged_16bit(q, update, dtype or q.dtype)
        if report is not None:
            reports[name] = report
        replaced[name] = dense_layer(base, weight)
    for name, new in replaced.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, new)
    result = merge_and_unload(model)  # what is left: adapters over dense bases, modules_to_save
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


def _check_update(name: str, layer: Any) -> None:
    """Raises ValueError, naming the layer, where `_update` does not cover it."""
    if layer.merged:
        raise ValueError(f"{name}: is merged already; unmerge first")
    if not isinstance(layer, Updating):
        active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
        if any(adapter in layer.lora_variant or layer.lora_bias[adapter] for adapter in active):
            raise ValueError(f"{name}: only plain LoRA without a bias can be merged")


def _update(layer: Any, q: QuantizedTensor) -> Tensor | None:
    """The update of a layer's active adapters, float32 [M, K]; None where there is none. As in PEFT, an adapter that is
    turned off counts too: what is merged does not depend on the base's type.
    """
    if isinstance(layer, LoraLayer) and not any(name in layer.lora_A for name in layer.active_adapters):
        return None
    if isinstance(layer, Updating):
        return layer.dense_update()
    active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    total = torch.zeros(q.shape, device=q.device)
    for adapter in active:
        for a, b, rows in factors(layer, adapter):
            part = total if rows is None else total[slice(*rows)]
            part += layer.scaling[adapter] * (b.detach().float() @ a.detach().float())
    return total
