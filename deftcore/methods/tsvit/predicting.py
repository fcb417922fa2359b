"""A TSViT as scenes of certain classes and bands need it, and what it says of them."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deftcore._files import read_record
from deftcore.methods.tsvit.adapting import MODES, adapt_classes
from deftcore.methods.tsvit.model import TSViT, TSViTConfig
from deftcore.methods.tsvit.reading import Reading, usable_patches
from deftcore.models.own import CONFIG_FILE
from deftcore.training.adapters import load_adapter

# What of a model is new after `adapt_classes`, by its mode.
NEW_PARTS: dict[str, tuple[str, ...]] = {"head": ("mixer",), "token": ("class_tokens",), "extend": ("class_tokens",)}
_ADAPTER, _FINAL = "adapter_config.json", "final"


def outputs_of(config: TSViTConfig) -> int:
    """How many logits a model gives a pixel."""
    return config.mixed_classes or config.num_classes


def with_classes(model: TSViT, reading: Reading) -> TSViT:
    """The model with an output for the classes of the data: one logit where they are two.

    Raises:
        ValueError: it has others, and nothing says how these are made.
    """
    classes = len(reading.classes)
    fewest = 1 if classes == 2 else classes
    if reading.head:
        return adapt_classes(model, classes if reading.head == "extend" else fewest, reading.head)
    if outputs_of(model.config) not in (classes, fewest):
        raise ValueError(
            f"data.classes: the model has {outputs_of(model.config)} outputs, the data {classes} classes; data.head "
            f"({', '.join(MODES)}) says how others are made"
        )
    return model


def is_normalized(model: TSViT) -> bool:
    """Whether a model has its bands' mean and deviation."""
    return bool((model.band_mean != 0).any()) or bool((model.band_std != 1).any())


def with_statistics(model: TSViT, reading: Reading) -> TSViT:
    """The model with the mean and deviation of the data's bands, where these say any."""
    if reading.mean:
        for own, given in ((model.band_mean, reading.mean), (model.band_std, reading.std)):
            own.copy_(torch.tensor(given))
    return model


def read_as(model: TSViT, reading: Reading) -> TSViT:
    """The model that an adapter of a run goes on, of the one that the run was given."""
    return with_statistics(with_classes(model, reading), reading)


def predict(model: Any, batch: Mapping[str, Tensor], reading: Reading, patch_size: int) -> Tensor:
    """Logits [B, K, H, W] of a batch as `CropTask.collate` makes it, the same beside longer series."""
    mask = None
    if reading.masked and not bool(batch["usable"].all()):
        mask = usable_patches(batch["usable"], patch_size)
    elif not reading.masked and bool((batch["doy"] == 0).any()):
        mask = batch["doy"] != 0  # what fills up a batch is no frame of the series
    return model(batch["x"], batch["doy"], mask)


def load_trained(path: str | os.PathLike) -> tuple[Any, TSViTConfig, Reading]:
    """What was trained, in evaluation mode, and how it reads: of the folder of a run (its final/), of an adapter, which
    knows its base, or of a whole model.

    Raises:
        FileNotFoundError, ValueError: the folder is none of these; the base is not where it was.
    """
    folder = Path(path)
    if not (folder / CONFIG_FILE).is_file() and not (folder / _ADAPTER).is_file() and (folder / _FINAL).is_dir():
        folder = folder / _FINAL
    reading = Reading.load(folder) or Reading()
    if not (folder / _ADAPTER).is_file():
        model: Any = TSViT.from_pretrained(folder)
    else:
        base = read_record(folder, _ADAPTER, lambda values: values.get("base_model_name_or_path")) or ""
        if not (Path(base) / CONFIG_FILE).is_file():
            raise FileNotFoundError(f"model: {folder} is an adapter on the model in {base!r}, which is not there")
        model = read_as(TSViT.from_pretrained(base), reading)
    config = model.config
    if not reading.classes:
        reading = dataclasses.replace(reading, classes=tuple(str(i) for i in range(max(outputs_of(config), 2))))
    if (folder / _ADAPTER).is_file():
        model = load_adapter(model, folder)
    return model.eval(), config, reading
