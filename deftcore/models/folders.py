"""A Transformers folder, GGUF file or hub id: where it is, what it says of itself, and the tensors in it."""

import json
import os
from collections.abc import KeysView
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.utils import CONFIG_NAME

from deftcore._names import final_instead
from deftcore.models.coupled import stored_sizes
from deftcore.models.families import family_of
from deftcore.models.gguf_files import gguf_config, is_gguf
from deftcore.models.slim_files import slim_class


def model_kind(config: Any) -> Any:
    """The class of Transformers that builds a language model of this configuration; a slim one's in its own sizes."""
    if stored_sizes(config):
        return slim_class(config)
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def is_4bit(config: Any) -> bool:
    """Whether a model's configuration says that its files are bitsandbytes' 4-bit ones."""
    stored = getattr(config, "quantization_config", None) or {}
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    return bool(stored.get("load_in_4bit")) and stored.get("quant_method") == "bitsandbytes"


def read_config(path: str | os.PathLike) -> Any:
    """The configuration of a model in a Transformers folder, a GGUF file or under a hub id; no weights are read.

    Raises:
        FileNotFoundError: naming the path.
        ImportError, ValueError: a GGUF file without the package `gguf`, or damaged.
    """
    return gguf_config(path) if is_gguf(path) else AutoConfig.from_pretrained(checked_folder(path))


def checked_folder(path: str | os.PathLike) -> str:
    """The path of a Transformers folder, or the hub id of a model that the cache or the hub has.

    Raises:
        FileNotFoundError: naming the path.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    path = os.fspath(path)
    if Path(path).is_dir():
        if not (Path(path) / CONFIG_NAME).is_file():
            hint = final_instead(path, CONFIG_NAME)
            raise FileNotFoundError(f"model: {path} is no Transformers folder, it has no {CONFIG_NAME}{hint}")
        return path
    if Path(path).exists():
        raise FileNotFoundError(f"model: must be a folder or a GGUF file, {path} is neither")
    if path.count("/") > 1 or path.startswith((".", "/", "~")) or path.endswith("/"):
        raise FileNotFoundError(f"model: no such folder: {path}")
    try:
        if not isinstance(try_to_load_from_cache(path, CONFIG_NAME), str):
            HfApi().model_info(path, timeout=10)  # one request; a download would try for half a minute
    except Exception as error:  # no such id, no possible id, or whatever the client raises where there is no network
        raise FileNotFoundError(
            f"model: no such folder: {path}; nor has the Hugging Face cache or hub, if within reach, such a model"
        ) from error
    return path


def local_folder(path: str | os.PathLike) -> Path:
    """The folder itself, or the downloaded copy of a hub id's configuration and weights.

    Raises:
        FileNotFoundError: as `checked_folder`.
    """
    path = checked_folder(path)
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors"]))


class StoredWeights:
    """The tensors of a folder's safetensors files, by name; read one at a time.

    Raises:
        FileNotFoundError, ValueError: naming the file that is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._files = _weight_files(folder)  # the open file of each tensor, and its name there

    def names(self) -> KeysView[str]:
        """Of all tensors."""
        return self._files.keys()

    def name_as(self, model: Any) -> None:
        """Names the tensors as the model does: files may have other names, those of the bare model lack the prefix."""
        family = family_of(model)
        for here, stored in family.stored_as if family else ():
            self._files = {
                here + key.removeprefix(stored) if key.startswith(stored) else key: at
                for key, at in self._files.items()
            }
        prefix, expected = f"{model.base_model_prefix}.", model.state_dict().keys()
        if any(key.startswith(prefix) for key in expected) and not any(key.startswith(prefix) for key in self._files):
            self._files = {key if key in expected else f"{prefix}{key}": at for key, at in self._files.items()}

    def mapped(self, name: str) -> Tensor:
        """A tensor on the file's own pages, to be used at once: who kept it would crash when the file is rewritten."""
        file, stored_name = self._files[name]
        return file.get_tensor(stored_name)

    def read(self, name: str) -> Tensor:
        """A tensor of its own."""
        return self.mapped(name).clone()

    def dtype(self) -> torch.dtype:
        """The type of the first floating tensor; Transformers takes it where the configuration is silent."""
        types = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        stored = (file.get_slice(name).get_dtype() for file, name in self._files.values())
        return next((types[kind] for kind in stored if kind in types), torch.float32)


def _weight_files(folder: Path) -> dict[str, tuple[Any, str]]:
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"path: {index} is damaged: {error}") from error
    found = {}
    for name in names:
        if not (folder / name).exists():
            raise FileNotFoundError(f"path: no such file: {folder / name}")
        try:
            file = safe_open(folder / name, "pt")
        except SafetensorError as error:
            raise ValueError(f"path: {folder / name} is damaged: {error}") from error
        found.update({key: (file, key) for key in file.keys()})  # noqa: SIM118  a handle, not a dictionary
    return found
