"""A recipe's run, from its fields to the files in its output folder."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import set_seed
from torch import Tensor

from deftcore.models.preflight import check_quantize
from deftcore.training.device import choose_device
from deftcore.training.evaluation import check_best_by
from deftcore.training.fields import OutputFolder, mistakes, renamed
from deftcore.training.identity import digest_tensors, options_of, settings_and_data
from deftcore.training.loop import TrainResult, train
from deftcore.training.options import make_config
from deftcore.training.recipe import Recipe, complete
from deftcore.training.registry import Setup, all_sections, all_tasks, find
from deftcore.training.run_folder import RunFolder
from deftcore.training.task import Batches
from deftcore.training.wrapping import check_adapter


def train_recipe(recipe: Recipe, *, resume: bool = True) -> TrainResult:
    """Runs a recipe; its output folder gets final/, best/, log.jsonl, recipe.yaml and result.json.

    Raises:
        FileNotFoundError, ValueError: naming the recipe's field, as far as possible before weights are read; where the
            output folder holds another recipe's run, or the same over other data or another base model.
    """
    recipe = complete(recipe)
    device, training, data = choose_device(recipe.device), recipe.training, recipe.data
    method = find(recipe.method)
    kind = next((each for each in all_tasks() if each.name == recipe.task), method.task)
    found = mistakes("output", OutputFolder, recipe.output) + mistakes("data.train", kind.source, data.train)
    found += mistakes("data.validation", kind.source, data.validation) if data.validation else []
    if found:
        raise ValueError("; ".join(found))
    quantize = asdict(recipe.quantize) if method.quantized else None
    sections = {section: getattr(recipe, section.name) for section in all_sections()}

    empty = kind.empty_model(recipe.model)
    if quantize:
        check_quantize(empty, recipe.quantize.skip)
    task = kind.of_model(recipe.model, empty)
    with renamed("data", "data.train"):
        empty = task.prepare(empty, data)
    check_adapter(empty, method, recipe.adapter)
    for section, fields in sections.items():
        section.make(empty, fields)
    with renamed("data", "data.train"):
        examples = task.read(data.train, data)
    with renamed("data", "data.validation" if data.validation else "data.train"):
        validation = task.held_out(data)
    check_best_by(training, task, validation)
    task.check(empty, [*examples, *(validation or [])])

    set_seed(training.seed)  # adapters start from the recipe's seed
    options: dict[str, Any] = _dtype(recipe, method.float32, getattr(empty, "config", None))
    if quantize:
        options["quantize"] = quantize
    base = task.prepare(kind.load_model(recipe.model, **options), data)
    config = make_config(method, base, recipe.adapter)
    depends_on = {
        "method": recipe.method,
        "task": kind.name,
        **options_of(config),
        "model": digest_tensors([*base.named_parameters(), *base.named_buffers()]),  # where it lies does not matter
        **{f"quantize.{name}": value for name, value in (quantize or {}).items()},
        **{f"data.{name}": value for name, value in asdict(data).items() if name not in ("train", "validation")},
    }
    base.to(device)
    run = partial(train, examples=examples, task=task)

    def batches(share: float, at_least: int) -> Iterable[Mapping[str, Tensor]]:
        few = examples[: max(int(len(examples) * share), at_least)]
        return Batches(few, training.batch_size, task.collate, shuffle=False, draw=task.draw, device=device).epoch(0)

    def phase(model: Any, name: str, changes: Mapping[str, Any], **options: Any) -> TrainResult:
        nonlocal resume
        known = settings_and_data(training, task, examples, validation)
        main = RunFolder(Path(recipe.output), {**depends_on, **known})
        inner, settings = main.phase(name), replace(training, **changes)
        result = run(
            model, config=settings, output=inner.path, label=f"{recipe.method}, {name}", resume=resume,
            depends_on=inner.depends_on, phase_of=main, **options,
        )  # fmt: skip
        resume = True  # what was there is forgotten by now
        # What follows is the same after a phase that was done already.
        model.train()
        set_seed(training.seed)
        return result

    model = method.wrap(base, config, Setup(batches, phase))
    objectives = [section.make(model, fields) for section, fields in sections.items()]
    objectives.append(method.objective(model, config))
    make_optimizer = method.optimizer
    return run(
        model, config=training, output=recipe.output, validation=validation, label=recipe.method, resume=resume,
        depends_on=depends_on,
        objective=[each for each in objectives if each is not None],
        optimizer=None if make_optimizer is None else lambda trained: make_optimizer(trained, config, training),
        save_model=task.save, files={"recipe.yaml": yaml.safe_dump(recipe.to_dict(), sort_keys=False)},
    )  # fmt: skip


def _dtype(recipe: Recipe, float32: bool, config: Any) -> dict[str, torch.dtype]:
    """The dtype to read a checkpoint in, where it is not its own: float32 for weights that train, whose 16-bit steps
    would round to nothing or divide by an epsilon of 0, and for 16 bits that are not autocast's."""
    autocast = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[recipe.training.mixed_precision]
    other = autocast is not None and getattr(config, "dtype", None) != autocast
    return {"dtype": torch.float32} if float32 or other else {}
