"""What Point-PEFT gives to recipes."""

from copy import copy
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from deftcore.methods.point_peft.bank import MemoryBank
from deftcore.methods.point_peft.config import PointPeftConfig
from deftcore.methods.point_peft.model import find_backbone
from deftcore.methods.point_peft.task import PointTask
from deftcore.training.config import TrainingConfig
from deftcore.training.registry import Method, Setup, check_by_peft, register, wrap_by_peft


def _wrap(model: Any, config: PointPeftConfig, setup: Setup) -> Any:
    """The PEFT model, with a bank of the clouds to train on, as they are; one that was given must be of these."""
    if config.uses_bank and config.bank_rows is None:
        _, backbone = find_backbone(model)
        config = copy(config)
        if config.bank is None:
            config.bank = MemoryBank.build(backbone, setup.batches(1.0, 1))
        else:
            config.bank = MemoryBank.load(config.bank)
            config.bank.check_data(setup.batches(1.0, 1))
    return wrap_by_peft(model, config, setup)


def _check(model: Any, config: PointPeftConfig) -> None:
    if config.bank is not None:
        MemoryBank.load(config.bank)
    config.bank, config.bank_rows = None, config.bank_rows or config.retrieved  # a bank would look at weights and data
    check_by_peft(model, config)


def _optimizer(model: Any, config: PointPeftConfig, training: TrainingConfig) -> Optimizer:
    """AdamW, whose decay is for the weights of linear layers alone: not for tokens, norms, gates and biases."""
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) in linear], "weight_decay": training.weight_decay},
        {"params": [p for p in trained if id(p) not in linear], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=training.learning_rate)


register(
    Method(
        name="point-peft",
        summary="Point clouds: prompts from a memory bank, geometry, small networks, biases.",
        paper="arXiv 2310.03059",
        needs="a classifier of point clouds, or a backbone; looks at the data once, for the bank",
        config=PointPeftConfig,
        limits={"bank": str | None},
        wrap=_wrap,
        check=_check,
        task=PointTask,
        optimizer=_optimizer,
        export="keep",
    )
)
