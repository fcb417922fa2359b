"""The loss and the metrics of a model over the validation examples, together with the other processes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from deftcore.training.config import TrainingConfig
from deftcore.training.objective import Objective, numbers
from deftcore.training.task import Batches, Task


@dataclass(frozen=True)
class Evaluated:
    """What one evaluation found.

    Args:
        loss: the task's, a mean over all predictions.
        measured: by the objectives.
        metrics: of the task, those that are defined.
        counts: what the metrics are made of; None where the task has no metrics.
    """

    loss: float
    measured: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    counts: Tensor | None = None

    def shown(self) -> dict[str, Any]:
        """What stands in a run's result, by name."""
        return {**self.measured, **self.metrics}

    def logged(self) -> dict[str, float]:
        """Numbers for the log, under their names."""
        return {f"eval_{name}": value for name, value in {"loss": self.loss, **numbers(self.shown())}.items()}


def check_best_by(config: TrainingConfig, task: Task, validation: Sequence[Any] | None) -> None:
    """Raises ValueError where `best_by` names a metric that the task does not have, or there is nothing to evaluate."""
    if not config.best_by:
        return
    if config.best_by not in task.metric_names:
        has = ", ".join(task.metric_names) or "none"
        raise ValueError(f"training.best_by: must be a metric of the task, which has {has}, got {config.best_by!r}")
    if not validation:
        raise ValueError(f"training.best_by: needs validation examples, got {config.best_by!r} without any")


@torch.no_grad()
def evaluate(
    model: Any, batches: Batches, task: Task, objectives: Sequence[Objective], accelerator: Accelerator
) -> Evaluated:
    """Evaluates a prepared model; every process must ask. It is in training mode again afterwards."""
    model.eval()
    for objective in objectives:
        objective.reset()
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    parts: list[Tensor] = []
    for batch in batches.epoch(0):
        with accelerator.autocast():
            output = task.output(model, batch)
        for objective in objectives:
            objective.observe(batch, output)
        if task.metric_names:
            parts = [sum(parts, task.counts(batch, output))]
        count = task.predictions(batch)
        total += torch.tensor(
            [float(output.loss) * count if count else 0.0, count], dtype=torch.float64, device=total.device
        )
    model.train()
    loss_sum, count = accelerator.reduce(total, "sum").tolist()
    counts = accelerator.reduce(parts[0].to(accelerator.device), "sum") if parts else None
    metrics = {} if counts is None else task.metrics(counts)
    return Evaluated(
        loss=loss_sum / max(count, 1),
        measured=measure(objectives, accelerator),
        metrics={name: metrics[name] for name in task.metric_names if math.isfinite(metrics[name])},
        counts=counts,
    )


def measure(objectives: Sequence[Objective], accelerator: Accelerator) -> dict[str, Any]:
    """What the objectives measured since their last reset, over all processes; every one of them must ask."""
    found: dict[str, Any] = {}
    for objective in objectives:
        report = objective.report(reduce=lambda x: accelerator.reduce(x.to(accelerator.device), "sum"))
        found |= objective.summary(report)
    return found
