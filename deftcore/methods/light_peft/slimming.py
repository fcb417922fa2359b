"""Base and adapters slimmed together, and adapters written back to full shape (arXiv 2406.03792, section 3.3)."""

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from deftcore.methods.lora.bottleneck import BottleneckLayer
from deftcore.methods.lora.layer import FusedLoraLinear
from deftcore.models.blocks import base_of
from deftcore.models.coupled import find_coupled
from deftcore.models.kept import Kept
from deftcore.models.slim_files import SlimRecord, base_fingerprints, keep_record, record_of
from deftcore.models.slimming import Cut, SlimReport, cut, plan

# Of an adapter's config: what changes with it, and what says where it is.
_FIELDS = (
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
)


@torch.no_grad()
def slim(model: Any, kept: Kept, *, requantize: bool = False) -> SlimReport:
    """Cuts a model and the adapters on it down to what `kept` names, in place, for real.

    The base loses rows and columns of its linear layers, plain LoRA those of B and A that belong to them, LoRA and
    bottlenecks their other ranks. A LoRA keeps its scaling, alpha over the rank that it had, so what is left computes
    what it computed; PEFT saves the result, and loads it over a base that is as slim. An adapter without ranks is
    taken out, and one on a sub-layer of which nothing is left. Optimizers hold parameters that are gone then: make
    new ones.

    Args:
        model: a Transformers model of a family of the table, dense or in 4 bits, or its PEFT model.
        kept: places in the model as it is now.
        requantize: round weights in 4 bits again where a cut goes through their blocks; otherwise it is refused.

    Returns:
        Numbers of weights before and after, and the errors of rounding again.

    Raises:
        ValueError: naming what the model lacks or the layer that cannot be cut: another kind of adapter, one that is
            merged. The model is as it was then.
    """
    base: Any = base_of(model)
    layers = adapted_layers(base)
    if layers and not isinstance(model, PeftModel):
        raise ValueError("model: has adapters; give the PEFT model around it, whose config has to follow")
    structures = find_coupled(base)
    kept.check(structures, {name: _rank(layer) for name, layer in layers.items()})
    cuts = plan(base, structures, kept)
    _check(layers, cuts, kept)
    earlier = record_of(model)
    if earlier is None:
        record = SlimRecord(kept, base_fingerprints(base), _original_fields(model))
    else:  # a task is of the whole base
        record = replace(earlier, kept=earlier.kept.then(kept))
    report = cut(model, kept, requantize=requantize)
    gone = {name for name, layer in layers.items() if base.get_submodule(name) is not layer}
    for each in cuts:
        if each.layer in layers.keys() - gone:
            _cut_lines(layers[each.layer], each)
    for name, places in kept.ranks.items():
        if not places and name not in gone:
            _take_out(base, name)
            gone.add(name)
        elif name not in gone:
            _cut_ranks(layers[name], torch.tensor(places))
    if isinstance(model, PeftModel):
        _write_configs(model, {name: layer for name, layer in layers.items() if name not in gone}, bool(gone))
        keep_record(model, record)
    return report


def adapted_layers(base: nn.Module) -> dict[str, Any]:
    """The layers with an adapter in a model beneath PEFT's wrapper, by name.

    Raises:
        ValueError: naming one that is neither plain LoRA nor a bottleneck, or is merged.
    """
    found: dict[str, Any] = {}
    modules: list[tuple[str, Any]] = [each for each in base.named_modules() if isinstance(each[1], BaseTunerLayer)]
    for name, layer in modules:
        plain = type(layer) in (LoraLinear, FusedLoraLinear) and not layer.lora_variant
        if isinstance(layer, BottleneckLayer):
            plain = not any(config.stochastic for config in layer.configs.values())
        if not plain:
            raise ValueError(
                f"model: {name}: plain LoRA and bottlenecks, no stochastic ones, can be slimmed, got {layer}"
            )
        if layer.merged:
            raise ValueError(f"model: {name}: its adapter is merged; unmerge it first")
        found[name] = layer
    return found


def parts_of(layer: Any) -> tuple[Any, Any]:
    """LoRA's A [r, in] and B [out, r], or a bottleneck's down [r, width] and up [width, r], by adapter."""
    if isinstance(layer, BottleneckLayer):
        return layer.bottleneck_down, layer.bottleneck_up
    return layer.lora_A, layer.lora_B


def _rank(layer: Any) -> int:
    return min(each.weight.shape[0] for each in parts_of(layer)[0].values())


def _check(layers: Mapping[str, Any], cuts: list[Cut], kept: Kept) -> None:
    for each in cuts:
        if each.dim == 0 and isinstance(layers.get(each.layer), BottleneckLayer):
            raise ValueError(f"model: {each.layer}: a bottleneck reads all of its output, which would lose rows")
    for name in kept.ranks:
        first, _ = parts_of(layers[name])
        if len(first) != 1:
            raise ValueError(f"ranks: {name} has {len(first)} adapters ({', '.join(first)}), must have one")
    if kept.ranks and all(kept.ranks.get(name) == () for name in layers):
        raise ValueError("ranks: no adapter would be left")


# ---------------------------------------------------------------------------- on one layer


def _cut_lines(layer: Any, each: Cut) -> None:
    if isinstance(layer, BottleneckLayer):
        return
    for part in parts_of(layer)[1 - each.dim].values():  # columns of A, rows of B
        _keep(part, each.dim, each.lines)
        if each.factors is not None:
            wide = part.weight.detach().double() * each.factors.to(part.weight.device)
            part.weight.copy_(wide.to(part.weight.dtype))


def _cut_ranks(layer: Any, places: Tensor) -> None:
    first, second = parts_of(layer)
    for name in first:
        _keep(first[name], 0, places)
        _keep(second[name], 1, places)
        if not isinstance(layer, BottleneckLayer):
            layer.r[name] = places.numel()
            root = math.sqrt(places.numel()) if layer.use_rslora[name] else places.numel()
            layer.lora_alpha[name] = layer.scaling[name] * root


def _keep(linear: Any, dim: int, lines: Tensor) -> None:
    """Only these rows or columns of a linear layer."""
    lines = lines.to(linear.weight.device)
    for name in ("weight", "bias") if dim == 0 and linear.bias is not None else ("weight",):
        old = getattr(linear, name)
        new = old.detach().index_select(dim, lines)
        setattr(linear, name, nn.Parameter(new, requires_grad=old.requires_grad))
    setattr(linear, ("out_features", "in_features")[dim], lines.numel())


def _take_out(base: nn.Module, name: str) -> None:
    layer: Any = base.get_submodule(name)
    if isinstance(layer, BottleneckLayer):
        layer.untap()
    base.set_submodule(name, layer.get_base_layer())


# ---------------------------------------------------------------------------- in PEFT's config


def _original_fields(model: Any) -> dict[str, Any]:
    """Of the active adapter's config what slimming changes, as JSON holds it."""
    if not isinstance(model, PeftModel):
        return {}
    config = model.peft_config[model.active_adapter]
    fields = {name: getattr(config, name) for name in _FIELDS if hasattr(config, name)}
    return {name: sorted(each) if isinstance(each, set) else copy.copy(each) for name, each in fields.items()}


def _write_configs(model: Any, layers: Mapping[str, Any], some_gone: bool) -> None:
    """The configs from which PEFT makes these layers again; the ones that the model was made with stay as they are."""
    for adapter, given in list(model.peft_config.items()):
        config = model.peft_config[adapter] = copy.copy(given)
        own = {name: layer for name, layer in layers.items() if adapter in parts_of(layer)[0]}
        widths = {name: parts_of(layer)[0][adapter].weight.shape[0] for name, layer in own.items()}
        config.rank_pattern = {name: width for name, width in widths.items() if width != config.r}
        if hasattr(config, "alpha_pattern"):
            alphas = {name: layer.lora_alpha[adapter] for name, layer in own.items()}
            config.alpha_pattern = {name: alpha for name, alpha in alphas.items() if alpha != config.lora_alpha}
        if some_gone:
            config.target_modules = sorted(own)
            config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    tuner = model.base_model
    if hasattr(tuner, "targeted_module_names"):
        tuner.targeted_module_names = [name for name in tuner.targeted_module_names if name in layers]
