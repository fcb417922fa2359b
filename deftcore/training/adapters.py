"""Adapters of methods that PEFT lacks: made known to PEFT, written whole, and loaded strictly."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from safetensors import SafetensorError
from safetensors.torch import load_file

from deftcore.models.activations import load_swap
from deftcore.models.gates import load_gates
from deftcore.models.slim_files import SlimRecord, keep_record
from deftcore.models.slimming import cut
from deftcore.training.registry import load_rooms


class MethodName(str):
    """A `peft_type` beside PEFT's enum, that reads as its members do."""

    __slots__ = ()

    @property
    def value(self) -> str:
        """The name, as of an enum's member."""
        return str(self)


def register_with_peft(name: str, config: type[PeftConfig], model: type[BaseTuner]) -> None:
    """Makes `config` and `model` known to PEFT under the string `name`.

    PEFT's own `register_peft_method` refuses names outside its enum: its tables are filled here.

    Raises:
        ValueError: PEFT has another method of this name.
    """
    tables: tuple[tuple[dict, object], ...] = (
        (PEFT_TYPE_TO_CONFIG_MAPPING, config),
        (PEFT_TYPE_TO_TUNER_MAPPING, model),
        (PEFT_TYPE_TO_PREFIX_MAPPING, model.prefix),
    )
    for table, value in tables:
        if table.setdefault(name, value) != value:
            raise ValueError(f"name: PEFT has a method {name!r} already")


def load_adapter(model: Any, folder: str | os.PathLike) -> Any:
    """The PEFT model of a base and an adapter folder, with its adaptive gates where it has any; strict, where PEFT only
    warns: everything stored, embeddings of a resized vocabulary among it, stands in the model with its value, and
    nothing of the adapter is missing. Of an adapter of a slim model the base is slimmed first, in place.

    Raises:
        FileNotFoundError: when the folder holds no adapter.
        ValueError: naming the file, when it is damaged or was made for another base.
    """
    load_rooms()  # which make their adapters known to PEFT
    file = Path(folder) / "adapter_model.safetensors"
    for needed in (Path(folder) / "adapter_config.json", file):
        if not needed.exists():
            raise FileNotFoundError(f"adapter: no such file: {needed}")
    record = SlimRecord.load(folder)
    try:
        stored = load_file(file)
        if record is not None:
            record.check(model)
            cut(model, record.kept, requantize=True)  # as it was when the adapter was slimmed
        adapted = PeftModel.from_pretrained(model, folder)
        if record is not None:
            keep_record(adapted, record)
    except (SafetensorError, RuntimeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"adapter: {file} is damaged or of another model: {error}") from error
    needed_keys = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    loaded = get_peft_model_state_dict(adapted, save_embedding_layers=True)
    missing, unexpected = sorted(needed_keys - stored.keys()), sorted(stored.keys() - loaded.keys())
    if missing or unexpected:
        raise ValueError(f"adapter: {file} is of another model: missing {missing[:5]}, unexpected {unexpected[:5]}")
    for key, value in stored.items():
        here = loaded[key].cpu()
        if here.shape != value.shape or not torch.allclose(here, value.to(here.dtype), rtol=0, atol=0, equal_nan=True):
            raise ValueError(f"adapter: {file}: {key} did not reach the model, which ties it to another weight")
    load_gates(adapted, folder)
    load_swap(adapted, folder)
    return adapted
