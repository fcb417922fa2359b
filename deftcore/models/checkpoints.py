"""Models on disk: dense, 4-bit, adapted and sparse."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
)

from deftcore.models.gates import load_gates
from deftcore.models.quantized_files import checked_folder, is_4bit, load_quantized, model_kind

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

    import deftcore.methods  # noqa: F401  registers our methods, so that their adapters load

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
