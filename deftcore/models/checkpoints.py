"""Models on disk: dense, 4-bit and GGUF, and where an export keeps its parts."""

import os
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

from deftcore.models.folders import checked_folder, is_4bit, model_kind, read_config
from deftcore.models.gates import load_gates
from deftcore.models.gguf_files import gguf_tokenizer, is_gguf, load_gguf
from deftcore.models.quantized_files import load_quantized

SPARSE_FILE = "deftcore_sparse.json"
ADAPTER_FOLDER = "adapter"


def load_model(path: str | os.PathLike, *, quantize: dict[str, Any] | None = None, **kwargs: Any) -> PreTrainedModel:
    """A causal or sequence-to-sequence language model from a local Transformers folder, a GGUF file or a hub id, with
    the adaptive gates that it was trained with, where the folder holds any. A GGUF file's weights become dense, float32
    where `dtype` does not say otherwise.

    Args:
        quantize: options of `load_quantized`, to load into 4 bits. A checkpoint that is 4-bit already stays so.

    Raises:
        FileNotFoundError: when there is no such model.
        ImportError: for a GGUF file without the package `gguf`.
        ValueError: when its files lack weights, or a GGUF file is damaged.
    """
    from deftcore._progress import working

    config = read_config(path)
    if quantize is not None or is_4bit(config):
        model = load_quantized(path, **(quantize or {}), **kwargs)  # which has a bar of its own
    elif is_gguf(path):
        with working("reading weights"):
            model = load_gguf(path, model_kind(config), **kwargs)
    else:
        with working("reading weights"):
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
    """The tokenizer of a local Transformers folder, a GGUF file or a hub id.

    Raises:
        FileNotFoundError: naming the path.
        ImportError, ValueError: a GGUF file without the package `gguf`, or damaged.
    """
    if is_gguf(path):
        return gguf_tokenizer(path)
    place = path if Path(path).is_dir() else checked_folder(path)
    try:
        return AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"model: {path} has no tokenizer that Transformers can read: {reason}") from error
