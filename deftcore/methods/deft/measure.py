"""`deftcore density`: the loss and the densities of a model over a file of records."""

from contextlib import nullcontext
from typing import Any

import torch

from deftcore._progress import tracked
from deftcore.methods.deft.objective import DensityLoss
from deftcore.models.blocks import find_mlp_blocks
from deftcore.models.checkpoints import load_model, load_tokenizer, own_adapter
from deftcore.models.classifiers import empty_classifier, load_classifier
from deftcore.models.preflight import empty_model
from deftcore.models.thresholds import Thresholded, Thresholds
from deftcore.training.adapters import load_adapter
from deftcore.training.classification import ClassData, Classes, ClassificationTask, is_classifier
from deftcore.training.device import choose_device
from deftcore.training.fields import AdapterFolder, Count, DataFile, Length, Needed, Text, checked
from deftcore.training.task import Batches, Task
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

    Under thresholds that lie beside the adapter or the model the model runs with them, and neurons count that are above
    theirs; `tau` is their mean then. Of a run over classes of texts the loss is a mean over texts, longer ones are cut
    as the run cut them (or to `max_length`, where that is less), and its metrics stand beside.

    Raises:
        FileNotFoundError, ValueError: naming the argument.
    """
    where = choose_device(device)
    thresholds = Thresholds.load(adapter or model)
    read = _classifier if is_classifier(adapter or model) else _language_model
    loaded, task, examples = read(model, data, adapter, max_length, quantize)
    loaded.to(where).eval()
    objective = DensityLoss(loaded, alpha=0.0)
    under = None if thresholds is None else Thresholded(loaded, thresholds)
    batches = Batches(examples, batch_size, task.collate, shuffle=False, device=where)
    total, count, counts = 0.0, 0, torch.zeros(())
    with torch.no_grad(), under or nullcontext():
        for batch in tracked(batches.epoch(0), "density", len(batches)):
            predicted, output = task.predictions(batch), task.output(loaded, batch)
            total += float(output.loss) * predicted
            count += predicted
            if task.metric_names:
                counts = counts + task.counts(batch, output).cpu()
    report = objective.report() | {"loss": total / max(count, 1), "dtype": str(next(loaded.parameters()).dtype)[6:]}
    if under is not None and thresholds is not None:
        report |= _above(thresholds, under.densities(), loaded)
    return report | (task.metrics(counts) if task.metric_names else {})


def _above(thresholds: Thresholds, blocks: dict[str, float], model: Any) -> dict[str, Any]:
    """What of a report thresholds decide."""
    sides: dict[str, list[float]] = {}
    for block in find_mlp_blocks(model):
        sides.setdefault(block.side, []).append(blocks[block.name])
    means = [float(torch.as_tensor(level).double().mean()) for level in thresholds.levels.values()]
    return {
        "density": sum(blocks.values()) / len(blocks),
        **{side: sum(found) / len(found) for side, found in sides.items() if side != "model"},
        "blocks": blocks, "tau": sum(means) / len(means), "criterion": thresholds.criterion,
    }  # fmt: skip


def _language_model(
    model: str, data: str, adapter: str, max_length: int, quantize: dict[str, Any] | None
) -> tuple[Any, Task, list[Any]]:
    """The model, its task, the examples."""
    empty = empty_model(model)
    task = TextTask.of_model(model, empty)
    examples = task.read(data, TextData(train=data, max_length=max_length))
    task.check(empty, examples)
    loaded: Any = load_model(model, quantize=quantize)
    adapter = adapter or own_adapter(model)
    return load_adapter(loaded, adapter) if adapter else loaded, task, examples


def _classifier(
    model: str, data: str, adapter: str, max_length: int, quantize: dict[str, Any] | None
) -> tuple[Any, Task, list[Any]]:
    """The same of what a run over classes of texts left."""
    known = Classes.of(adapter or model)
    task = ClassificationTask(load_tokenizer(adapter or model), known.labels)
    options = ClassData(train=data, max_length=min(max_length, known.max_length))
    empty = task.prepare(empty_classifier(model), options)
    examples = task.read(data, options)
    task.check(empty, examples)
    loaded = task.prepare(load_classifier(model, quantize=quantize), options)
    return load_adapter(loaded, adapter) if adapter else loaded, task, examples
