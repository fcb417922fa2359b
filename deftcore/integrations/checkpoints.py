"""Models on disk: dense, 4-bit, adapted and sparse."""

import json
import os
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
)

from deftcore.integrations.peft import patch
from deftcore.integrations.quantized_files import checked_folder, is_4bit, load_quantized, model_kind
from deftcore.nn.blocks import find_mlp_blocks
from deftcore.nn.gates import gates_of, load_gates
from deftcore.nn.mlp import sparsify

SPARSE_FILE = "deftcore_sparse.json"
ADAPTER_FOLDER = "adapter"


def load_model(path: str | os.PathLike, *, quantize: dict[str, Any] | None = None, **kwargs: Any) -> PreTrainedModel:
    """A causal or sequence-to-sequence language model from a local Transformers folder or a hub id, with the adaptive
    gates that it was trained with, where the folder holds any.

    Args:
        quantize: options of `load_quantized`, to load into 4 bits. A checkpoint that is 4-bit already stays so.

    Raises:
        FileNotFoundError: when there is no such model.
        ValueError: when its files lack weights.
    """
    path = checked_folder(path)
    config = AutoConfig.from_pretrained(path)
    if quantize is not None or is_4bit(config):
        model = load_quantized(path, **(quantize or {}), **kwargs)
    else:
        model, info = model_kind(config).from_pretrained(path, output_loading_info=True, **kwargs)
        if info["missing_keys"]:  # Transformers would go on with random ones
            skipped = " (an export without its skipped blocks: use load_sparse)" if _exported(path) else ""
            raise ValueError(f"model: {path} lacks weights{skipped}: {', '.join(sorted(info['missing_keys'])[:5])}")
    load_gates(model, path)
    return model


def _exported(path: str | os.PathLike) -> bool:
    return (Path(path) / SPARSE_FILE).is_file()


def own_adapter(path: str | os.PathLike) -> str:
    """The folder of the adapter that `deftcore export` left unmerged beside a model, or "" where there is none."""
    folder = Path(path) / ADAPTER_FOLDER
    return os.fspath(folder) if _exported(path) and folder.is_dir() else ""


def load_tokenizer(path: str | os.PathLike) -> Any:
    """The tokenizer of a local Transformers folder or a hub id.

    Raises:
        FileNotFoundError: naming the path.
    """
    place = path if Path(path).is_dir() else checked_folder(path)
    try:
        return AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"model: {path} has no tokenizer that Transformers can read: {reason}") from error


def load_adapter(model: PreTrainedModel, folder: str | os.PathLike) -> Any:
    """The PEFT model of a base and an adapter folder, with its adaptive gates where it has any; strict, where PEFT only
    warns: everything stored, embeddings of a resized vocabulary among it, stands in the model with its value, and
    nothing of the adapter is missing.

    Raises:
        FileNotFoundError: when the folder holds no adapter.
        ValueError: naming the file, when it is damaged or was made for another base.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    import deftcore.adapters  # noqa: F401  registers our methods, so that their adapters load

    file = Path(folder) / "adapter_model.safetensors"
    for needed in (Path(folder) / "adapter_config.json", file):
        if not needed.exists():
            raise FileNotFoundError(f"adapter: no such file: {needed}")
    try:
        stored = load_file(file)
        adapted = PeftModel.from_pretrained(model, folder)
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
    return adapted


def save_sparse(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    *,
    tau: dict[str, float] | None = None,
    skip: Collection[str] = (),
    adapter: str | os.PathLike | None = None,
    extra_files: Collection[Path] = (),
) -> Path:
    """Writes a merged, not yet sparsified model with its sparse settings, ready for `load_sparse`.

    The weights keep Transformers' names; those of skipped blocks are left out. The folder appears whole or not at all.
    A model that is sparsified, has adaptive gates or an adapter on it is refused.

    Args:
        tau: threshold per block name; a missing block uses its activation's default.
        skip: names of blocks to leave out.
        adapter: folder of an adapter to keep beside the model, unmerged: LoRA over 4 bits, bottlenecks, prompts.
        extra_files: files to copy beside the model, such as the tokenizer's.

    Raises:
        FileExistsError: the folder is not empty.
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
    names = [block.name for block in find_mlp_blocks(model)]
    unknown = sorted((set(skip) | set(tau or ())) - set(names))
    if unknown:
        raise ValueError(f"skip, tau: no MLP block named {', '.join(unknown)}; the model has {', '.join(names)}")
    dropped = tuple(f"{name}.{part}" for name in skip for part in _projections(model, name))
    state = {key: value for key, value in model.state_dict().items() if not key.startswith(dropped)}
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        model.save_pretrained(temporary, state_dict=state)
        if adapter is not None:
            shutil.copytree(adapter, temporary / ADAPTER_FOLDER)
        for file in extra_files:
            shutil.copy(file, temporary / file.name)
        settings = {"format": 1, "tau": tau or {}, "skip": sorted(skip)}
        (temporary / SPARSE_FILE).write_text(json.dumps(settings, indent=1))
        if folder.exists():
            folder.rmdir()
        temporary.chmod(0o755)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def load_sparse(folder: str | os.PathLike, *, path: str = "auto", **kwargs: Any) -> nn.Module:
    """The sparse-inference model that `save_sparse` or `deftcore export` wrote.

    Raises:
        FileNotFoundError, ValueError: when the folder or its settings are missing or damaged.
    """
    file = Path(folder) / SPARSE_FILE
    if not file.exists():
        raise FileNotFoundError(f"folder: {folder} has no {SPARSE_FILE}; write it with `deftcore export`")
    try:
        settings = json.loads(file.read_text())
        tau, skip = dict(settings["tau"]), list(settings["skip"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"folder: {file} is damaged: {error}") from error
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
        return sparsify(model, tau=tau, path=path, skip=skip)
    adapted = load_adapter(model, Path(folder) / ADAPTER_FOLDER)
    if adapted.active_peft_config.peft_type == "LORA":
        patch(adapted)
    return sparsify(adapted, tau=tau, path=path, skip=skip, merge=False)


def _projections(model: nn.Module, name: str) -> list[str]:
    block = next(b for b in find_mlp_blocks(model) if b.name == name)
    if block.container is not None:
        return ["gate_proj.", "up_proj.", "down_proj.", "wi.", "wi_0.", "wi_1.", "wo."]
    return ["fc1.", "fc2.", "intermediate.dense.", "output.dense."]
