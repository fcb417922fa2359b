"""Sparse models on disk."""

import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from deftcore._files import replacing_folder, write_json
from deftcore.methods.lora.patch import patch
from deftcore.models.blocks import find_mlp_blocks
from deftcore.models.checkpoints import ADAPTER_FOLDER, SPARSE_FILE
from deftcore.models.folders import is_4bit, model_kind
from deftcore.models.gates import gates_of
from deftcore.models.quantized_files import load_quantized
from deftcore.models.sparsify import sparsify
from deftcore.models.thresholds import THRESHOLDS_FILE, Thresholds
from deftcore.training.adapters import load_adapter


def save_sparse(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    *,
    tau: dict[str, float] | None = None,
    thresholds: Thresholds | None = None,
    skip: Collection[str] = (),
    adapter: str | os.PathLike | None = None,
    extra_files: Collection[Path] = (),
) -> Path:
    """Writes a merged, not yet sparsified model with its sparse settings, ready for `load_sparse`.

    The weights keep Transformers' names; those of skipped blocks are left out. The folder appears whole or not at all.
    A model that is sparsified, has adaptive gates or an adapter on it is refused.

    Args:
        tau: threshold per block name; a missing block uses its activation's default.
        thresholds: of `calibrate_thresholds`, in place of tau; those that the folder of `adapter` holds are left out.
        skip: names of blocks to leave out.
        adapter: folder of an adapter to keep beside the model, unmerged: LoRA over 4 bits, bottlenecks, prompts.
        extra_files: files and folders to copy beside the model, such as the tokenizer's.

    Raises:
        FileExistsError: the folder is not empty.
        OSError: it was filled meanwhile.
        ValueError: naming the blocks that the model lacks, or why it cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"folder: {folder} exists and is not empty")
    if hasattr(model, "deftcore_blocks"):
        raise ValueError("model: is in its sparse form already; write it before sparsify")
    if gates_of(model) is not None:
        raise ValueError("model: has adaptive gates, which its files do not hold; fold them first (fold_gates)")
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("model: has an adapter, whose weights load_sparse would not find; merge it first (merge)")
    if thresholds is not None:
        if tau:
            raise ValueError("tau: is for a model without thresholds; give tau or thresholds, not both")
        thresholds.check(model, skip)
    names = [block.name for block in find_mlp_blocks(model)]
    unknown = sorted((set(skip) | set(tau or ())) - set(names))
    if unknown:
        raise ValueError(f"skip, tau: no MLP block named {', '.join(unknown)}; the model has {', '.join(names)}")
    dropped = tuple(f"{name}.{part}" for name in skip for part in _projections(model, name))
    state = {key: value for key, value in model.state_dict().items() if not key.startswith(dropped)}
    with replacing_folder(folder, discard=False) as partial:
        model.save_pretrained(partial, state_dict=state)
        if adapter is not None:
            shutil.copytree(adapter, partial / ADAPTER_FOLDER)
        for file in extra_files:
            (shutil.copytree if file.is_dir() else shutil.copy)(file, partial / file.name)
        settings = {"format": 1, "tau": tau or {}, "skip": sorted(skip)}
        if thresholds is not None:  # who knows of no thresholds shall not read tau instead
            thresholds.save(partial)
            settings = {"format": 2, "thresholds": THRESHOLDS_FILE, "skip": sorted(skip)}
        write_json(partial / SPARSE_FILE, settings)
    return folder


def load_sparse(folder: str | os.PathLike, *, path: str = "auto", **kwargs: Any) -> nn.Module:
    """The sparse-inference model that `save_sparse` or `deftcore export` wrote.

    Raises:
        FileNotFoundError, ValueError: when the folder or its settings are missing or damaged.
    """
    file = Path(folder) / SPARSE_FILE
    kept: dict[str, Any]
    if not file.exists():
        raise FileNotFoundError(f"folder: {folder} has no {SPARSE_FILE}; write it with `deftcore export`")
    try:
        settings = json.loads(file.read_text())
        skip = list(settings["skip"])
        kept = {"tau": dict(settings["tau"])} if settings["format"] == 1 else {"thresholds": Thresholds.load(folder)}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"folder: {file} is damaged: {error}") from error
    if kept.get("thresholds", ()) is None:
        raise FileNotFoundError(f"folder: {folder} has no {THRESHOLDS_FILE}, which {SPARSE_FILE} names")
    config = AutoConfig.from_pretrained(folder)
    with init_empty_weights():
        shape: Any = model_kind(config).from_config(config)
    dropped = tuple(f"{name}.{part}" for name in skip for part in _projections(shape, name))
    if is_4bit(config):
        model: Any = load_quantized(folder, missing_ok=dropped, **kwargs)
        for key, missing in [item for item in model.named_parameters() if item[1].is_meta]:
            # Left out by `skip`: zeros that take no memory, so that an adapter over the block finds a device.
            holder, _, attribute = key.rpartition(".")
            zeros = torch.zeros((), dtype=missing.dtype).expand(missing.shape)
            setattr(model.get_submodule(holder), attribute, nn.Parameter(zeros, requires_grad=False))
    else:
        model, info = model_kind(config).from_pretrained(folder, output_loading_info=True, **kwargs)
        missing = [key for key in info["missing_keys"] if not key.startswith(dropped)]
        if missing or info["unexpected_keys"]:
            raise ValueError(f"folder: missing weights {missing}, unexpected {sorted(info['unexpected_keys'])}")
    if not (Path(folder) / ADAPTER_FOLDER).is_dir():
        return sparsify(model, **kept, path=path, skip=skip)
    adapted = load_adapter(model, Path(folder) / ADAPTER_FOLDER)
    if adapted.active_peft_config.peft_type == "LORA":
        patch(adapted)
    return sparsify(adapted, **kept, path=path, skip=skip, merge=False)


def _projections(model: nn.Module, name: str) -> list[str]:
    block = next(b for b in find_mlp_blocks(model) if b.name == name)
    return [f"{projection}." for projection in block.form.projections]
