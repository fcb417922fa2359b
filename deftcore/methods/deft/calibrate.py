"""`deftcore sparsify`: thresholds chosen on a text, and what they cost on another."""

import os
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field

from deftcore._progress import tracked
from deftcore.methods.deft import export
from deftcore.models.checkpoints import own_adapter
from deftcore.models.preflight import empty_model
from deftcore.models.sparsify import check_sparsify
from deftcore.models.thresholds import Thresholded, Thresholds, calibrate_thresholds
from deftcore.nn.thresholds import CRITERIA
from deftcore.training.classification import refuse_classifier
from deftcore.training.device import choose_device
from deftcore.training.fields import (
    AdapterFolder,
    Count,
    DataFile,
    Length,
    Needed,
    NewFolder,
    Positive,
    Text,
    checked,
    mistakes,
    one_of,
    renamed,
)
from deftcore.training.task import Batches
from deftcore.training.text import TextData, TextTask

_HELD_OUT = 10  # one of so many examples is measured on, where no other file is


@checked
def sparsify(
    model: Needed,
    data: DataFile,
    output: NewFolder,
    *,
    density: Annotated[Positive, Field(le=1)] = 0.5,
    criterion: Annotated[Text, one_of(*CRITERIA)] = "product",
    scaled: bool = False,
    validation: Text = "",
    adapter: AdapterFolder = "",
    quantize: dict[str, Any] | None = None,
    max_length: Length = 512,
    batch_size: Count = 4,
    device: Text = "auto",
) -> dict[str, Any]:
    """Chooses thresholds that leave a share of each MLP block's neurons on `data`, and writes a folder for
    `load_sparse` with them; see `calibrate_thresholds`.

    An adapter is merged or kept beside, as `deftcore export` does. Losses and densities are those of held-out text:
    `validation`, or where there is none every tenth example of `data`, which then does not choose.

    Returns:
        output, criterion, scaled, target, loss (dense) and loss_sparse (nats a token), their ratio less one as
        loss_change, density (mean of the blocks), blocks (name to tau, the mean where each neuron has its own, density,
        and calibration_density), tokens of both texts, weights.

    Raises:
        FileNotFoundError, ValueError: naming the argument.
    """
    if found := mistakes("validation", DataFile, validation) if validation else []:
        raise ValueError("; ".join(found))
    where = choose_device(device)
    refuse_classifier(model, adapter)
    empty = empty_model(model)
    task = TextTask.of_model(model, empty)
    if not (adapter or own_adapter(model)):
        check_sparsify(empty)  # before data and weights are read
    options = TextData(train=data, max_length=max_length)
    examples = task.read(data, options)
    with renamed("data", "validation"):
        held_out = task.read(validation, options) if validation else examples[_HELD_OUT - 1 :: _HELD_OUT]
    if not held_out:
        raise ValueError(
            f"data: {data} has {len(examples)} examples of at most {max_length} tokens, fewer than the {_HELD_OUT} of "
            "which one can be held out; give another file as validation, or a shorter max_length"
        )
    chosen_on = examples if validation else [e for i, e in enumerate(examples) if i % _HELD_OUT != _HELD_OUT - 1]
    task.check(empty, [*chosen_on, *held_out])
    result: dict[str, Any] = {}

    def batches(of: Sequence[Any], label: str) -> Any:
        found = Batches(of, batch_size, task.collate, shuffle=False, device=where)
        return tracked(found.epoch(0), label, len(found))

    def choose(ready: Any) -> Thresholds:
        found = calibrate_thresholds(
            ready, batches(chosen_on, "thresholds"), density=density, criterion=criterion, scaled=scaled
        )  # fmt: skip
        result["loss"] = _loss(ready, task, batches(held_out, "dense"))
        with Thresholded(ready, found) as measured:
            result["loss_sparse"] = _loss(ready, task, batches(held_out, "sparse"))
        densities = measured.densities()
        result["loss_change"] = result["loss_sparse"] / result["loss"] - 1
        result["density"] = sum(densities.values()) / len(densities)
        result["blocks"] = {
            name: {"tau": float(torch.as_tensor(level).mean()), "density": densities[name],
                   "calibration_density": found.densities[name]}
            for name, level in found.levels.items()
        }  # fmt: skip
        result["tokens"] = {"calibration": found.tokens, "held_out": sum(len(e["input_ids"]) for e in held_out)}
        return found

    written = export.write(
        model, os.fspath(output), adapter=adapter, quantize=quantize, device=device, calibrate=choose
    )  # fmt: skip
    return {
        "output": output, "criterion": criterion, "scaled": scaled, "target": density, **result,
        "weights": written["weights"],
    }  # fmt: skip


@torch.no_grad()
def _loss(model: Any, task: TextTask, batches: Any) -> float:
    """The mean loss over what is predicted, nats a token."""
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        predicted = task.predictions(batch)
        total += float(task.output(model, batch).loss) * predicted
        count += predicted
    return total / max(count, 1)
