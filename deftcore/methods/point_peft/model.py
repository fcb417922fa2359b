"""A model whose backbone is under Point-PEFT."""

from copy import deepcopy
from typing import Any

from torch import nn

from deftcore.methods.point_peft.bank import MemoryBank, identity
from deftcore.methods.point_peft.blocks import BlockStack
from deftcore.methods.point_peft.config import PointPeftConfig
from deftcore.methods.point_peft.layer import NO_MERGE, PointPeftLayer
from deftcore.nn.fingerprints import check_base
from deftcore.training.adapters import GathersShards

_CONTRACT = ("group", "embed", "class_token", "class_position", "norm")


class PointPeftModel(GathersShards):
    """Puts a `PointPeftLayer` in the place of a model's backbone; made by `peft.get_peft_model`."""

    prefix: str = "point_peft_"
    tuner_layer_cls = PointPeftLayer
    target_module_mapping = {}  # noqa: RUF012

    def _prepare_adapter_config(self, peft_config: PointPeftConfig, model_config: dict) -> Any:  # type: ignore
        return peft_config

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's. Of a config that knows no base the model holds a copy, which learns it."""
        config: Any = self.peft_config[adapter_name]
        _, backbone = find_backbone(model)
        config.blocks_with_prompts(len(backbone.blocks))
        bank = config.bank
        if config.uses_bank and config.bank_rows is None:
            if bank is None:
                raise ValueError(
                    "bank: is needed, a MemoryBank or its file; MemoryBank.build makes one, memory=False goes without"
                )
            if not isinstance(bank, MemoryBank):
                bank = MemoryBank.load(bank)
            bank.check(backbone)
            config = deepcopy(config)
            config.bank, config.bank_rows, config.base_hash = None, len(bank.rows), dict(bank.base)
        elif config.uses_bank and config.base_hash is not None and not _is_empty(backbone):
            check_base("model", config.base_hash, identity(backbone))
        if config.modules_to_save is None and isinstance(getattr(model, "head", None), nn.Module):
            config = deepcopy(config)
            config.modules_to_save = ["head"]
        self.peft_config[adapter_name] = config
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if isinstance(bank, MemoryBank) and config.uses_bank:
            layer: Any = find_layer(model)
            layer.point_peft_parts[adapter_name].rows.copy_(bank.rows)

    def _prepare_model(self, peft_config: PointPeftConfig, model: nn.Module) -> None:  # type: ignore[override]
        self._place, _ = find_backbone(model)

    def _check_target_module_exists(self, peft_config: PointPeftConfig, key: str) -> bool:  # type: ignore[override]
        return key == self._place

    def _create_and_replace(  # type: ignore[override]
        self, peft_config: PointPeftConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        **_: Any,
    ) -> None:  # fmt: skip
        if isinstance(target, PointPeftLayer):
            target.update_layer(adapter_name, peft_config)
            return
        layer = PointPeftLayer(target, adapter_name, peft_config).train(target.training)
        if adapter_name != self.active_adapter:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        raise ValueError(NO_MERGE)

    @staticmethod
    def _create_new_module(peft_config: PointPeftConfig, adapter_name: str, target: nn.Module) -> nn.Module:
        return PointPeftLayer(target, adapter_name, peft_config)


def find_backbone(model: nn.Module) -> tuple[str, Any]:
    """Where a model has its one backbone, and it, beneath an adapter: a module with what Point-PEFT counts on.

    Raises:
        ValueError: there is none, there are several, or the model is one itself.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, PointPeftLayer):
            return name, module.base_layer
        stack = isinstance(getattr(module, "blocks", None), BlockStack)
        if stack and all(hasattr(module, each) for each in _CONTRACT):
            found[name] = module
    if len(found) != 1 or "" in found:
        kind = type(model).__name__
        raise ValueError(
            f"model: must be a module around one backbone as PointTransformer is, such as PointClassifier, got {kind}"
        )
    return next(iter(found.items()))


def find_layer(model: nn.Module) -> PointPeftLayer:
    """The backbone's adapter."""
    return next(module for module in model.modules() if isinstance(module, PointPeftLayer))


def _is_empty(module: nn.Module) -> bool:
    return any(each.device.type == "meta" for each in module.parameters())
