"""Plug and play: a task is a folder with what stays of its base, slim adapters and its head; bases are shared."""

import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from deftcore._files import replacing_folder
from deftcore.methods.light_peft.slimming import adapted_layers
from deftcore.models.blocks import base_of
from deftcore.models.coupled import find_coupled
from deftcore.models.slim_files import RECORD_FILE, SlimRecord, record_of
from deftcore.models.slimming import own_configs, plan
from deftcore.nn.shadow import shadow
from deftcore.training.adapters import load_adapter
from deftcore.training.saving import save_trained

_CONFIGS = ("adapter_config.json", "config.json")  # of a task, of a model
_FIRST = ("lora_A", "bottleneck_down")  # [rank, in]; the others are [out, rank]
_SIDES = {"lora_A": 1, "lora_B": 0}  # of the layer's weight, with which they are cut


def save_slim(model: Any, folder: str | os.PathLike) -> Path:
    """Writes a slim model. With adapters on it, the task: they, the head, what stays of the base and its fingerprint,
    for `load_slim`. Without, a model that stands alone, for `deftcore.load_model`.

    Args:
        folder: a new folder, or that of an earlier task or model, which is replaced whole or not at all.

    Raises:
        ValueError: a PEFT model that `slim` has not seen, or whose adapters are not one named "default".
        FileExistsError: the folder holds something else.
    """
    if isinstance(model, PeftModel) and record_of(model) is None:
        raise ValueError("model: has adapters and has not been slimmed; write it with save_pretrained")
    if isinstance(model, PeftModel) and set(model.peft_config) != {"default"}:
        found = ", ".join(map(repr, model.peft_config))
        raise ValueError(f"model: a task has one adapter, named 'default', got {found}")
    with replacing_folder(folder, only=_CONFIGS) as partial:
        save_trained(model, partial)
    return Path(folder)


def load_slim(base: Any, task: str | os.PathLike) -> Any:
    """The slim model of a task, a PEFT model, over a base that stays as it is, in memory too.

    What the task does not cut, embeddings for one, is shared with the base; what it cuts is the model's own. Several
    tasks may stand side by side.

    Args:
        base: the whole base model, without adapters.
        task: the folder.

    Raises:
        FileNotFoundError, ValueError: naming the file; for another base, or one with adapters.
    """
    _record(base, task)
    return load_adapter(_sharing(base), task)


@torch.no_grad()
def expand(base: Any, task: str | os.PathLike) -> Any:
    """A task's adapters in full shape over its whole base, a PEFT model: zero where rows, columns and ranks were cut.

    It computes something else than the slim model, for heads and channels of the base that were cut act again, and none
    that stayed is scaled.

    Args:
        base, task: as in `load_slim`. The base stays as it is.
    """
    record = _record(base, task)
    config = PeftConfig.from_pretrained(os.fspath(task))
    unknown = sorted(record.adapter.keys() - vars(config).keys())
    if unknown:
        raise ValueError(f"task: {Path(task) / RECORD_FILE} is damaged: no fields of the adapter's config: {unknown}")
    for name, value in record.adapter.items():
        setattr(config, name, value)
    whole = _sharing(base)
    cuts = {(each.layer, each.dim): each.lines for each in plan(whole, find_coupled(whole), record.kept)}
    full, slim = get_peft_model(whole, config), load_slim(base, task)
    stored, state = get_peft_model_state_dict(slim), get_peft_model_state_dict(full)
    layers = {f"base_model.model.{name}.": name for name in adapted_layers(base_of(full))}
    for key, value in state.items():
        prefix = next((each for each in layers if key.startswith(each)), None)
        if prefix is None:
            state[key] = stored[key]
            continue
        name, part = layers[prefix], key.removeprefix(prefix).split(".")[0]
        ranks = torch.tensor(record.kept.ranks[name]) if name in record.kept.ranks else None
        lines = cuts.get((name, _SIDES[part])) if part in _SIDES else None
        places = (ranks, lines) if part in _FIRST else (lines, ranks)
        state[key] = _embedded(stored.get(key), value, places)
    set_peft_model_state_dict(full, state)
    return full


def _embedded(part: Tensor | None, like: Tensor, places: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """A tensor of zeros, with a part of it at some rows and columns; None is all of them."""
    full = torch.zeros_like(like)
    if part is None:
        return full
    index = [torch.arange(size) if lines is None else lines for size, lines in zip(like.shape, places, strict=False)]
    full[torch.meshgrid(*index, indexing="ij")] = part.to(full)
    return full


def _record(base: Any, task: str | os.PathLike) -> SlimRecord:
    if hasattr(base, "peft_config"):
        raise ValueError("base: has adapters; give the model beneath them")
    if not isinstance(base, nn.Module):
        raise TypeError(f"base: must be a model, got {type(base).__name__}")
    record = SlimRecord.load(task)
    if record is None:
        raise FileNotFoundError(f"task: no such file: {Path(task) / RECORD_FILE}")
    return record


def _sharing(base: Any) -> Any:
    """A copy that shares the base's tensors; its modules and configs are its own."""
    model = shadow(base)
    own_configs(model)
    return model
