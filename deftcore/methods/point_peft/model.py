"""A model whose backbone is under Point-PEFT."""

from copy import deepcopy
from typing import Any

from torch import nn

from deftcore.methods.point_peft.bank import MemoryBank, identity
from deftcore.methods.point_peft.blocks import BlockStack
from deftcore.methods.point_peft.config import PointPeftConfig
from deftcore.methods.point_peft.layer import PointPeftLayer
from deftcore.nn.fingerprints import check_base
from deftcore.training.tuners import PlacedTuner

_CONTRACT = ("group", "embed", "class_token", "class_position", "norm")


class PointPeftModel(PlacedTuner):
    """Puts a `PointPeftLayer` in the place of a model's backbone; made by `peft.get_peft_model`."""

    prefix: str = "point_peft_"
    tuner_layer_cls = PointPeftLayer

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

    def places(self, config: PointPeftConfig, model: nn.Module) -> dict[str, tuple]:
        """The backbone."""
        place, _ = find_backbone(model)
        return {place: ()}


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
