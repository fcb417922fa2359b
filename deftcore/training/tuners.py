"""What tuners that PEFT lacks share: whole files of adapters, layers in the places of modules, layers that never merge
or have one adapter active at a time, and what merging layers do first."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from deftcore.nn.sharding import whole
from deftcore.training.fields import option


@dataclass
class PlacesConfig(PeftConfig):
    """The fields that narrow a config's `target_modules`, as PEFT reads them."""

    exclude_modules: list[str] | str | None = option(None, "Modules to leave out.")
    modules_to_save: list[str] | None = option(None, "Modules trained and saved whole.")
    layers_to_transform: list[int] | int | None = option(None, "Layer numbers; None is all.")
    layers_pattern: list[str] | str | None = option(None, "Name of the list of layers.")


class WrapperLayer(nn.Module, BaseTunerLayer):
    """A layer over the module in whose place it stands."""

    shown_as: ClassVar[str]  # before the class's name, where a model is printed

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        self.merged_adapters: list[str] = []

    def __repr__(self) -> str:
        return f"{self.shown_as}.{super().__repr__()}"


class RestoringLayer(WrapperLayer):
    """A layer whose merge keeps what it overwrites in `_before`."""

    _before: Any = None

    def restore(self) -> None:
        """Puts `_before` back into the module."""
        raise NotImplementedError

    @torch.no_grad()
    def unmerge(self) -> None:
        """Gives the module what it had before the first merge, bit for bit."""
        if nothing_merged(self):
            return
        self.restore()
        self._before = None
        self.merged_adapters.clear()


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


def nothing_merged(layer: BaseTunerLayer) -> bool:
    """Whether a layer has nothing to unmerge, of which it warns as PEFT's layers do."""
    if not layer.merged:
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=3)
    return not layer.merged


def check_finite(values: Tensor, adapter_name: str) -> None:
    """Raises ValueError, in PEFT's words, where what is to be merged holds an infinity or a NaN."""
    if not bool(values.isfinite().all()):
        raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken")


def merge_or_unmerge(layer: Any, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> None:
    """Brings a layer into the state in which it is to be unloaded."""
    if merge:
        layer.merge(safe_merge, adapter_names)
    elif layer.merged:
        layer.unmerge()
