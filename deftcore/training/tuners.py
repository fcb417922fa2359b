"""What tuners that PEFT lacks share: whole files of adapters, layers in the places of modules, layers that never merge
or have one adapter active at a time."""

from collections.abc import Mapping
from typing import Any, ClassVar, cast

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from deftcore.nn.sharding import whole


class NeverMerged(BaseTunerLayer):
    """A layer whose adapters are no update of a weight."""

    no_merge: ClassVar[str]  # why: the message of ValueError

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises ValueError: there is nothing to merge into a weight."""
        raise ValueError(f"merge: {self.no_merge}; use unload()")

    def unmerge(self) -> None:
        """Raises ValueError: nothing is ever merged."""
        raise ValueError(f"unmerge: {self.no_merge}; nothing is merged")


class OneActive(BaseTunerLayer):
    """A layer of which one adapter is active at a time."""

    one_of: ClassVar[str]  # what there is one of, and the verb: "one prompt is"

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's.

        Raises:
            ValueError: several of them at once.
        """
        if not isinstance(adapter_names, str) and len(adapter_names) > 1:
            raise ValueError(f"adapter_names: {self.one_of} active at a time, got {adapter_names}")
        super().set_adapter(adapter_names, inference_mode)


class GathersShards(BaseTuner):
    """A tuner whose adapters are written whole, where FSDP2 shards them; every process must call `save_pretrained`.
    Layers that never merge say so before anything is."""

    @classmethod
    def _get_adapter_state_dict(
        cls, model: Any, config: Any, adapter_name: str, state_dict: Any, *args: Any, **kwargs: Any
    ) -> Any:
        for key, value in state_dict.items():
            if "modules_to_save" in key or "trainable_tokens" in key:  # PEFT takes these from the same dictionary
                state_dict[key] = whole(value)
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, *args, **kwargs)
        return {key: whole(value) for key, value in found.items()}

    def _check_merge_allowed(self) -> None:
        kind: Any = self.tuner_layer_cls
        if issubclass(kind, NeverMerged):
            raise ValueError(f"merge: {kind.no_merge}; use unload()")
        super()._check_merge_allowed()


class PlacedTuner(GathersShards):
    """Puts `tuner_layer_cls(module, adapter_name, config, *more)` in the place of each module that `places` names."""

    target_module_mapping = {}  # noqa: RUF012

    def places(self, config: Any, model: Any) -> Mapping[str, Any]:
        """By name of a module what its layer is told beyond the config, a tuple; what else stands there is PEFT's mark
        of a module that the config leaves out.

        Raises:
            ValueError: naming the config's field that does not go with the model.
        """
        raise NotImplementedError

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        self._places = self.places(peft_config, model)

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        found = self._places.get(key, False)
        return isinstance(found, tuple) or found

    def _create_and_replace(  # type: ignore[override]
        self, peft_config: Any, adapter_name: str, target: Any, target_name: str, parent: nn.Module, current_key: str,
        **_: Any,
    ) -> None:  # fmt: skip
        more, kind = self._places[current_key], cast(Any, self.tuner_layer_cls)
        if isinstance(target, kind):
            target.update_layer(adapter_name, peft_config, *more)
            return
        layer = kind(target, adapter_name, peft_config, *more).train(target.training)
        if adapter_name != self.active_adapter:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # PEFT's own looks for weights, which not all modules have
