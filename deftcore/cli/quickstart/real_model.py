"""A real model in the quickstart's story, from a folder or a GGUF file."""

import logging
from typing import Any

from rich.console import Console
from torch import nn

from deftcore.cli.quickstart.base_model import Base
from deftcore.models.activations import smooth_activations
from deftcore.models.blocks import find_mlp_blocks
from deftcore.models.checkpoints import load_model, load_tokenizer
from deftcore.models.folders import is_4bit, read_config
from deftcore.models.preflight import empty_model
from deftcore.nn.activations import activation_of
from deftcore.training.classification import refuse_classifier

logger = logging.getLogger("deftcore")

_ACTIVATION_FIELDS = ("hidden_act", "hidden_activation", "activation_function")  # of Transformers' configs


def check_real_model(path: str, activation: str) -> None:
    """Raises for what cannot be fine-tuned and made sparse, before weights are read.

    Raises:
        FileNotFoundError, ImportError, ValueError: naming the argument.
    """
    refuse_classifier(path)
    config = read_config(path)
    if config.is_encoder_decoder:
        raise ValueError(f"model: must be one that continues text, {path} ({config.model_type}) has an encoder")
    if is_4bit(config):
        raise ValueError(f"model: {path} is in 4 bits already; give the dense model, and --quantize")
    empty = empty_model(path)
    blocks = find_mlp_blocks(empty)
    for block in blocks:
        activation_of(block.activation.get())
    if activation and not any(hasattr(config, name) for name in _ACTIVATION_FIELDS):
        raise ValueError(f"activation: {config.model_type} names none in its configuration, so that it cannot be kept")


def real_model(path: str, activation: str, console: Console) -> Base:
    """The model and its tokenizer, with another activation in its MLPs where one is asked for."""
    console.print(f"[bold]Reading {path}[/bold]")
    model: Any = load_model(path)
    if activation == "relu":
        for block in find_mlp_blocks(model):
            block.activation.set(nn.ReLU())
        for name in _ACTIVATION_FIELDS:
            if hasattr(model.config, name):
                setattr(model.config, name, "relu")
    return Base(model, load_tokenizer(path))


def remark(model: Any) -> str:
    """Why density stays where it is, where it does."""
    smooth = smooth_activations(model)
    if not smooth:
        return ""
    return (
        f"Its MLPs use {', '.join(smooth)}, which is hardly ever exactly 0: nearly every neuron counts as active, and "
        "there is little to skip. With --activation relu the same story runs on ReLU, which the model then has to "
        "learn: compare the losses."
    )
