"""`deftcore density`: the loss and the densities of a model over a file of records."""

from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from deftcore.methods.deft.objective import DensityLoss
from deftcore.models.checkpoints import load_model, own_adapter
from deftcore.models.preflight import empty_model
from deftcore.training.adapters import load_adapter
from deftcore.training.device import choose_device
from deftcore.training.fields import AdapterFolder, Count, DataFile, Length, Needed, Text, checked
from deftcore.training.task import Batches
from deftcore.training.text import TextData, TextTask


@checked
def measure_density(
    model: Needed,
    data: DataFile,
    *,
    adapter: AdapterFolder = "",
    max_length: Length = 512,
    batch_size: Count = 4,
    quantize: dict[str, Any] | None = None,
    device: Text = "auto",
) -> dict:
    """Density per block, and loss, of a model (with an adapter, or exported) over a file of records.

    Raises:
        FileNotFoundError, ValueError: naming the argument.
    """
    where = choose_device(device)
    empty = empty_model(model)
    adapter = adapter or own_adapter(model)
    task = TextTask.of_model(model, empty)
    examples = task.read(data, TextData(train=data, max_length=max_length))
    task.check(empty, examples)
    loaded: Any = load_model(model, quantize=quantize)
    loaded = (load_adapter(loaded, adapter) if adapter else loaded).to(where)
    objective = DensityLoss(loaded, alpha=0.0)
    batches = Batches(examples, batch_size, task.collate, shuffle=False, device=where)
    loaded.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in track(
            batches.epoch(0), "density", total=len(batches), console=Console(stderr=True), transient=True
        ):
            predicted = task.predictions(batch)
            total += float(task.output(loaded, batch).loss) * predicted
            count += predicted
    return objective.report() | {"loss": total / max(count, 1), "dtype": str(next(loaded.parameters()).dtype)[6:]}
