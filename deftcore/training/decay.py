"""What trains without weight decay: what is no matrix of a map, and has no reason to shrink to zero."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.RMSNorm)  # that have any name


def without_decay(model: Any) -> list[nn.Parameter]:
    """The biases of a model, and all that its norms have, adapters' of either among them: what Transformers' Trainer
    spares, which knows LayerNorm by its class and others by their names, and the other norms."""
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    norms = {id(p) for module in model.modules() if isinstance(module, _NORMS) for p in module.parameters()}
    return [p for name, p in model.named_parameters() if name not in decayed or id(p) in norms]


def spare_from_decay(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Moves parameters of an optimizer's groups into groups without weight decay, the other options unchanged."""
    spared = {id(p) for p in parameters}
    for group in list(optimizer.param_groups) if spared else ():
        moved = [p for p in group["params"] if id(p) in spared]
        if moved and group.get("weight_decay"):
            group["params"] = [p for p in group["params"] if id(p) not in spared]
            optimizer.add_param_group({**group, "params": moved, "weight_decay": 0.0})
