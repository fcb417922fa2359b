"""Another activation in a pre-trained model's MLPs, and how that is kept beside an adapter."""

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from deftcore._files import write_json
from deftcore.models.blocks import base_of, find_mlp_blocks
from deftcore.nn.activations import activation_of
from deftcore.nn.observed import is_aside
from deftcore.ops.checks import check_choice
from deftcore.ops.density import default_tau

SWAP_FILE = "density_swap.json"
SWAPS = ("relu",)
_FIELDS = ("hidden_act", "hidden_activation", "activation_function")  # of configs, where the activation's name stands


def smooth_activations(model: Any, skip: Collection[str] = ()) -> list[str]:
    """Names of the activations in a model's MLP blocks that are hardly ever exactly 0, as SiLU and GELU.

    Args:
        model: a Transformers model or its PEFT model.
        skip: names of blocks that do not count.

    Raises:
        ValueError: the model has no MLP block of a known family, or an activation without a kernel.
    """
    found = {activation_of(block.activation.get()) for block in find_mlp_blocks(model) if block.name not in skip}
    return sorted(name for name in found if default_tau(name) > 0)


class Swapped(nn.Module):
    """ReLU in the place of an activation, which forwards that are `aside` still see: those of the original model."""

    deftcore_activation = "relu"

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original

    def forward(self, z: Tensor) -> Tensor:
        """max(z, 0) of [..., F]."""
        return self.original(z) if is_aside() else F.relu(z)

    def extra_repr(self) -> str:
        return "relu"


def swap_activations(model: Any, activation: str = "relu") -> None:
    """Puts another activation into every MLP block, and its name into the model's configuration, which is written
    with the model (ReLU Strikes Back, Mirzadeh et al., arXiv 2310.04564).

    Args:
        model: a Transformers model or its PEFT model.
        activation: "relu".

    Raises:
        ValueError: naming the argument; or a model whose configuration does not name an activation.
    """
    check_choice("activation", activation, SWAPS)
    base: Any = base_of(model)
    fields = [name for name in _FIELDS if getattr(base.config, name, None)]
    if not fields:
        raise ValueError(f"model: the configuration of {type(base).__name__} names no activation to swap")
    for block in find_mlp_blocks(model):
        module = block.activation.get()
        activation_of(module)  # or ValueError
        if not isinstance(module, Swapped):
            block.activation.set(Swapped(module))
    for name in fields:
        setattr(base.config, name, activation)


def save_swap(folder: str | os.PathLike, activation: str) -> None:
    """Writes which activation the model beside which an adapter lies was given."""
    write_json(Path(folder) / SWAP_FILE, {"activation": activation})


def load_swap(model: Any, folder: str | os.PathLike) -> None:
    """Swaps as `save_swap` has noted; nothing where it has not.

    Raises:
        ValueError: naming the file, when it is damaged.
    """
    path = Path(folder) / SWAP_FILE
    if not path.is_file():
        return
    try:
        activation = json.loads(path.read_text())["activation"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"adapter: {path} is damaged: {error}") from error
    swap_activations(model, activation)
