"""A model with a `PairedLora` in place of its linear layers."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from peft import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils.other import get_pattern_key
from torch import nn

from deftcore._progress import tracked
from deftcore.methods.lora.base_weights import dense_weight, weight_of
from deftcore.methods.lora.paired import PairedLora
from deftcore.nn.fingerprints import check_base, combined, fingerprints
from deftcore.nn.linear import is_transposed, shape_of
from deftcore.training.tuners import GathersShards

_SLOW = 512  # the shorter side of a weight that takes a noticeable time to decompose


class PairedModel(GathersShards, LoraModel):
    """PEFT's LoraModel with layers that begin from their weights. These are decomposed on wrapping, with a progress bar
    where they are large, but where they are on the meta device: then before the first use. An adapter that comes from
    a file needs no decomposition, and is refused on other weights than it was made for."""

    layer: type[PairedLora]
    several_change_weights = False  # whether more than one adapter may change the weights

    @classmethod
    def check_shape(cls, config: Any, rank: int, rows: int, columns: int) -> None:
        """Raises ValueError where an adapter of a rank cannot go on a weight [rows, columns]."""
        raise NotImplementedError

    @classmethod
    def awaits_file(cls, config: Any) -> bool:
        """Whether an adapter that has been saved before takes from its file what a new one takes from the weights."""
        return True

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        modes = {each.base_mode for each in self.peft_config.values()}  # type: ignore[attr-defined]
        if len(modes) > 1 or (modes != {"factored"} and not self.several_change_weights and len(self.peft_config) > 1):
            raise ValueError(
                "base_mode: only factored adapters stand beside others, which do not change the weights under them; "
                f"got {', '.join(sorted(modes))}"
            )

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Refuses what the adapter cannot go on, and another base than it was made for, before anything changes."""
        super()._prepare_model(peft_config, model)
        _maybe_include_all_linear_layers(peft_config, model)
        here: dict[str, dict[str, str]] = {}
        for name, module in self._targets(peft_config, model):
            base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            weight_of(base)
            rows, columns = shape_of(base)
            key = get_pattern_key(peft_config.rank_pattern.keys(), name)
            self.check_shape(peft_config, peft_config.rank_pattern.get(key, peft_config.r), rows, columns)
            if peft_config.base_hash is not None and base.weight.device.type != "meta":
                known = isinstance(module, PairedLora)
                here[name] = module.fingerprint() if known else fingerprints({"weight": dense_weight(base)})
        if here and peft_config.base_hash is not None:
            check_base("model", peft_config.base_hash, combined(here))

    def _targets(self, config: Any, model: nn.Module) -> Iterator[tuple[str, Any]]:
        """The modules that the adapter will go on, as names say."""
        wrapped = tuple(f"{name}." for name, each in model.named_modules() if isinstance(each, BaseTunerLayer))
        for name, module in model.named_modules():
            if name and not name.startswith(wrapped) and self._check_target_module_exists(config, name):
                yield name, module

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; then what a new adapter has from the weights is computed. A config that knows no base stays
        so, for other bases too: the model holds a copy."""
        config: Any = self.peft_config[adapter_name]
        if config.base_hash is None:
            config = self.peft_config[adapter_name] = deepcopy(config)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        layers = {name: each for name, each in paired_layers(model, adapter_name) if each.has_weights}
        if config.base_hash is not None and self.awaits_file(config):
            return
        slow = any(min(shape_of(each.get_base_layer())) >= _SLOW for each in layers.values())
        for layer in tracked(list(layers.values()), "weights decomposed", quick=not slow):
            layer.settle(adapter_name)
        _remember_base(config, layers)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: Any, config: Any, adapter_name: str, state_dict: Any, *args: Any, **kwargs: Any
    ) -> Any:
        for name, layer in model.named_modules():
            if isinstance(layer, PairedLora) and adapter_name in layer.pending and layer.has_weights:
                layer.settle(adapter_name)  # no file came: the config is one that was used before
                prefix = f"{name}." if name else ""
                state_dict.update({k: v for k, v in layer.state_dict(prefix=prefix).items() if k in state_dict})
        _remember_base(config, {name: each for name, each in paired_layers(model, adapter_name) if each.has_weights})
        return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, *args, **kwargs)

    def _create_new_module(self, config: Any, adapter_name: str, target: Any, **kwargs: Any) -> nn.Module:  # type: ignore[override]
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        weight_of(base)
        for name in ("device_map", "target_name", "parameter_name", "tied_adapter"):
            kwargs.pop(name, None)
        layer = self.layer(target, adapter_name, config, **kwargs)
        layer.fan_in_fan_out = is_transposed(base)
        return layer

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raises ValueError: factors of a pair cannot be mixed; several active adapters add up."""
        raise ValueError("add_weighted_adapter: is for plain LoRA; export the adapters as such first")

    def subtract_mutated_init(self, *args: Any, **kwargs: Any) -> Any:
        """Raises ValueError: `export_lora` writes a plain LoRA on the original weights."""
        raise ValueError("path_initial_model_for_weight_conversion: use deftcore.methods.lora.exporting.export_lora")


def paired_layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, PairedLora]]:
    """The layers of a model, bare or PEFT's, that have an adapter, with their names in the bare model."""
    for name, module in model.named_modules():
        if isinstance(module, PairedLora) and adapter in module.lora_A:
            yield name.removeprefix("base_model.model."), module


def _remember_base(config: Any, layers: dict[str, PairedLora]) -> None:
    if config.base_hash is None and layers:
        config.base_hash = combined({name: layer.fingerprint() for name, layer in layers.items()})
