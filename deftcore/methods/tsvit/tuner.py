"""What the room's own adapters share: a layer in the place of one module or several, beneath it what was there."""

from typing import Any

from torch import nn

from deftcore.methods.tsvit.model import TSViT
from deftcore.training.adapters import GathersShards


class TSViTTuner(GathersShards):
    """Puts `tuner_layer_cls(module, adapter_name, config, count)` in the place of each module that `places` names."""

    target_module_mapping = {}  # noqa: RUF012

    def places(self, config: Any, model: TSViT) -> dict[str, int]:
        """Names of the modules that get an adapter, and how many rows of it.

        Raises:
            ValueError: naming the config's field that does not go with the model.
        """
        raise NotImplementedError

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        if not isinstance(model, TSViT):
            raise ValueError(f"model: must be a TSViT, got {type(model).__name__}")
        self._places = self.places(peft_config, model)

    def _check_target_module_exists(self, peft_config: Any, key: str) -> bool:  # type: ignore[override]
        return key in self._places

    def _create_and_replace(  # type: ignore[override]
        self, peft_config: Any, adapter_name: str, target: Any, target_name: str, parent: nn.Module, current_key: str,
        **_: Any,
    ) -> None:  # fmt: skip
        count = self._places[current_key]
        kind: Any = self.tuner_layer_cls
        if isinstance(target, kind):
            target.update_layer(adapter_name, peft_config, count)
            return
        layer = kind(target, adapter_name, peft_config, count).train(target.training)
        if adapter_name != self.active_adapter:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # PEFT's own looks for weights, which attention has not
