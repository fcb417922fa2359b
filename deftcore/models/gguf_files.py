"""Models in GGUF files, llama.cpp's format, through Transformers' own reader: their numbers become dense weights."""

import copy
import functools
import logging
import os
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer

logger = logging.getLogger("deftcore")

_MARK = b"GGUF"
_HEADER = 32 << 20  # bytes; names of tensors stand in front of them
# What the reader raises over files that are cut, or hold what it does not expect.
_ERRORS = (
    ValueError, LookupError, TypeError, AttributeError, NotImplementedError, ArithmeticError, OSError, struct.error,
)  # fmt: skip


def is_gguf(path: str | os.PathLike) -> bool:
    """Whether there is a file of this name that begins as a GGUF file does, or that is called one."""
    if not Path(path).is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == _MARK or Path(path).suffix == ".gguf"


def gguf_config(path: str | os.PathLike) -> Any:
    """The configuration that a GGUF file's header describes. No weights are read.

    Raises:
        ImportError: the package `gguf` is not there.
        ValueError: naming the file, when it is damaged, or of an architecture that Transformers does not read.
    """
    file = Path(path).absolute()
    if not file.is_file():
        raise ValueError(f"model: {path} is no file")
    state = file.stat()
    return copy.deepcopy(_config(file, state.st_size, state.st_mtime_ns))


def load_gguf(path: str | os.PathLike, kind: Any, **options: Any) -> Any:
    """The model in a GGUF file as dense weights, in float32 unless `dtype` says otherwise.

    Args:
        kind: Transformers' class, which has `from_pretrained`.

    Raises:
        ImportError, ValueError: as `gguf_config`; the file lacks weights.
    """
    config = gguf_config(path)
    options = {"dtype": torch.float32, **options, "config": config, "output_loading_info": True}
    if packed := getattr(transformers, "GgufConfig", None):  # releases that may leave weights packed, for kernels
        options["quantization_config"] = packed(dequantize=True)
    model, info = _read(path, lambda **where: kind.from_pretrained(**where, **options))
    if info["missing_keys"]:
        hint = " (join a model's several files with llama.cpp's gguf-split)" if "-of-" in Path(path).name else ""
        raise ValueError(f"model: {path} lacks weights{hint}: {', '.join(sorted(info['missing_keys'])[:5])}")
    model.config._name_or_path = model.name_or_path = os.fspath(path)  # Transformers has the folder
    return model


def gguf_tokenizer(path: str | os.PathLike) -> Any:
    """The tokenizer in a GGUF file, with its chat template where it has one.

    Raises:
        ImportError, ValueError: as `gguf_config`.
    """
    return _read(path, lambda **where: AutoTokenizer.from_pretrained(**where))


@functools.lru_cache(maxsize=4)
def _config(path: Path, size: int, changed: int) -> Any:
    """Headers hold the whole vocabulary, and take a second to read."""
    config = _read(path, lambda **where: AutoConfig.from_pretrained(**where))
    with open(path, "rb") as file:
        if b"rope_freqs.weight" in file.read(_HEADER):
            logger.warning("model: %s scales its rotary positions, which Transformers' reader leaves out", path)
    return config


def _read(path: str | os.PathLike, reading: Any) -> Any:
    if find_spec("gguf") is None:
        raise ImportError(f"model: {path} is a GGUF file, and the package gguf is not installed: pip install gguf")
    file = Path(path)
    return _guarded(
        path, lambda: reading(pretrained_model_name_or_path=os.fspath(file.absolute().parent), gguf_file=file.name)
    )


def _guarded(path: str | os.PathLike, reading: Any) -> Any:
    with open(path, "rb") as file:
        if file.read(4) != _MARK:
            raise ValueError(f"model: {path} is no GGUF file: it does not begin with {_MARK.decode()}")
    try:
        return reading()
    except _ERRORS as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"model: {path} cannot be read as GGUF, it is damaged or of another kind: {reason}") from error
