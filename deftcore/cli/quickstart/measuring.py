"""A model's loss and densities on a held-out text."""

from collections.abc import Sequence
from typing import Any

import torch

from deftcore.methods.deft.objective import DensityLoss
from deftcore.training.data import Example
from deftcore.training.task import Batches
from deftcore.training.text import TextTask


@torch.no_grad()
def evaluate(model: Any, examples: Sequence[Example], batch_size: int) -> dict[str, Any]:
    """Loss (nats per token), density and density per block, in the model's own dtype."""
    objective = DensityLoss(model, alpha=0.0)
    model.eval()
    total, count = 0.0, 0
    task = TextTask()
    for batch in Batches(examples, batch_size, task.collate, shuffle=False).epoch(0):
        predicted = task.predictions(batch)
        total += float(model(**batch).loss) * predicted
        count += predicted
    report = objective.report()
    objective.detach()
    return {"loss": total / count, "density": report["density"], "density_blocks": list(report["blocks"].values())}
