"""The adapters that Light-PEFT starts from, plain LoRA or bottlenecks, and where they stand in a model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import peft
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from deftcore.methods.light_peft.config import LightPeftConfig
from deftcore.methods.lora.bottleneck import BottleneckLayer
from deftcore.methods.lora.patch import patch
from deftcore.models.blocks import base_of
from deftcore.models.coupled import find_coupled
from deftcore.models.families import FAMILIES, model_type
from deftcore.nn.linear import is_transposed
from deftcore.training.options import make_config
from deftcore.training.registry import find

_DROPOUT = {"lora": 0.05, "bottleneck": 0.1}
_INIT_STD = 0.02  # of bottlenecks


@dataclass(frozen=True)
class Site:
    """One adapter on one linear layer.

    Args:
        name: of the linear layer in the base model.
        layer: what stands in its place.
        adapter: which of the layer's adapters.
    """

    name: str
    layer: Any
    adapter: str

    @property
    def first(self) -> nn.Parameter:
        """LoRA's A [r, in], a bottleneck's down [r, width]."""
        parts: Any = self.layer.lora_A if isinstance(self.layer, LoraLayer) else self.layer.bottleneck_down
        return parts[self.adapter].weight

    @property
    def second(self) -> nn.Parameter:
        """LoRA's B [out, r], a bottleneck's up [width, r]."""
        parts: Any = self.layer.lora_B if isinstance(self.layer, LoraLayer) else self.layer.bottleneck_up
        return parts[self.adapter].weight


def peft_config(model: Any, config: LightPeftConfig) -> Any:
    """PEFT's config of the adapters.

    Raises:
        ValueError: the base model is not of a family of the table, or of one without heads and MLPs.
    """
    find_coupled(model)
    family = FAMILIES[model_type(model)]
    outputs = [form.o for form in (family.attention,) if form] + [form.down for form in family.mlps]
    options: dict[str, Any] = {"r": config.r, "modules_to_save": config.modules_to_save}
    dropout = _DROPOUT[config.adapter] if config.dropout is None else config.dropout
    if config.adapter == "lora":
        options |= {"target_modules": config.target_modules or family.lora_targets}
        options |= {"lora_alpha": config.lora_alpha, "lora_dropout": dropout}
        options |= {"fan_in_fan_out": any(map(is_transposed, model.modules()))}
    else:
        options |= {"target_modules": config.target_modules or outputs, "bottleneck_bias": False}
        options |= {"scaling": config.scaling, "dropout": dropout, "init_std": _INIT_STD}
        options |= {"non_linearity": config.non_linearity, "parallel": config.parallel}
    return make_config(find(config.adapter), model, options)


def add_adapters(model: Any, config: LightPeftConfig) -> Any:
    """The PEFT model of a base model; its LoRA layers fused."""
    adapted = peft.get_peft_model(model, peft_config(model, config))
    sites(adapted)
    return patch(adapted) if config.adapter == "lora" else adapted


def sites(model: Any) -> list[Site]:
    """The adapters of a PEFT model, in the model's order.

    Raises:
        ValueError: there are none; one is merged, is not alone on its layer, or is neither plain LoRA nor a bottleneck
            on a linear layer.
    """
    found = list(_sites(base_of(model)))
    if not found:
        raise ValueError(f"model: {type(model).__name__} has neither LoRA nor bottleneck adapters")
    return found


def _sites(base: nn.Module) -> Iterator[Site]:
    for name, layer in base.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        if layer.merged:
            raise ValueError(f"model: the adapter of {name} is merged; unmerge it first")
        active = _active(layer)
        if len(active) != 1 or layer.disable_adapters:
            raise ValueError(f"model: {name} must have one active adapter, got {len(active)}")
        beneath = layer.get_base_layer()
        plain = isinstance(beneath, nn.Linear) or is_transposed(beneath)
        if not (plain and (_is_plain_bottleneck(layer, active[0]) or _is_plain_lora(layer, active[0]))):
            raise ValueError(
                f"model: {name}: Light-PEFT prunes plain LoRA and bottlenecks on linear layers, no stochastic ones, "
                f"got {layer}"
            )
        yield Site(name, layer, active[0])


def _active(layer: Any) -> Sequence[str]:
    own = layer.lora_A if isinstance(layer, LoraLayer) else getattr(layer, "bottleneck_down", {})
    return [name for name in layer.active_adapters if name in own]


def _is_plain_bottleneck(layer: Any, adapter: str) -> bool:
    return isinstance(layer, BottleneckLayer) and not layer.configs[adapter].stochastic


def _is_plain_lora(layer: Any, adapter: str) -> bool:
    return isinstance(layer, LoraLayer) and not (layer.lora_variant or layer.lora_bias[adapter])
