"""Checkpoints as authors publish them: what `torch.save` wrote, read without running what it holds."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

Source = str | os.PathLike | Mapping[str, Tensor]

_WEIGHTS = ("base_model", "model", "state_dict")  # where files have them, that have other things beside
_WRAPPED = "module."  # what torch.nn.DataParallel puts before every name
_NUMBERS: list[Any] = [  # of NumPy's, which metrics beside the weights are
    *((np.float64(0).__reduce__()[0], f"{home}.multiarray.scalar") for home in ("numpy.core", "numpy._core")),
    *(np.dtype, type(np.dtype(np.float64)), type(np.dtype(np.float32))),
]


def published_tensors(source: Source) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name.

    Args:
        source: a file that `torch.save` wrote, or the names and tensors themselves, which are copied.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds other things than tensors and numbers, or no tensors.
    """
    stored = source if isinstance(source, Mapping) else _read(source)
    for part in _WEIGHTS:
        if isinstance(stored, Mapping) and isinstance(stored.get(part), Mapping):
            stored = stored[part]
    if not isinstance(stored, Mapping) or not stored or not all(isinstance(each, Tensor) for each in stored.values()):
        raise ValueError(f"source: {told(source)} holds no tensors by name")
    if isinstance(source, Mapping):
        stored = {name: tensor.detach().clone() for name, tensor in stored.items()}
    return {name.removeprefix(_WRAPPED): tensor for name, tensor in stored.items()}


def told(source: Source) -> str:
    """How messages name a checkpoint."""
    return "the mapping" if isinstance(source, Mapping) else os.fspath(source)


def _read(file: str | os.PathLike) -> object:
    try:
        with torch.serialization.safe_globals(_NUMBERS):
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of any kind, where bytes are read that are no pickle
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"source: {file} is no checkpoint that PyTorch reads safely: {reason}") from error
