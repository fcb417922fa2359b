"""Transformers' models with an output per class of a text: read from a folder, and given the classes of some data."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from deftcore.models.folders import StoredWeights, checked_folder, is_4bit, local_folder, read_config
from deftcore.models.gguf_files import is_gguf
from deftcore.nn.quantization import quantize as quantize_model


def empty_classifier(path: str | os.PathLike) -> Any:
    """The classifier of a Transformers folder or hub id without its weights, on the meta device.

    Raises:
        FileNotFoundError, ValueError: there is no such model, or none of texts' classes.
    """
    config = _config(path)
    with init_empty_weights():
        return AutoModelForSequenceClassification.from_config(config)


def load_classifier(path: str | os.PathLike, *, quantize: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """The classifier of a Transformers folder or hub id, on the CPU. What its files lack, the layers over the classes
    for one, starts from random values.

    Args:
        quantize: options of `deftcore.quantize`; the layers that the files lack stay dense.

    Raises:
        FileNotFoundError, ValueError: as `empty_classifier`.
    """
    _config(path)
    model = AutoModelForSequenceClassification.from_pretrained(checked_folder(path), **kwargs)
    if quantize is None:
        return model
    options = dict(quantize)
    skip = [*options.pop("skip", ()), *dict.fromkeys(key.partition(".")[0] for key in class_weights(model))]
    return quantize_model(model, skip=skip, **options)


def lacking(path: str | os.PathLike, model: Any) -> list[str]:
    """Names of a model's weights that the files of its folder do not hold."""
    stored = StoredWeights(local_folder(path))
    stored.name_as(model)
    return sorted({name for name, _ in model.named_parameters()} - stored.names())


def class_weights(model: Any) -> list[str]:
    """Names of the weights whose size is the number of classes."""
    other = _empty_of(model, model.config.num_labels + 1)
    shapes = {name: p.shape for name, p in other.named_parameters()}
    return [name for name, p in model.named_parameters() if name in shapes and p.shape != shapes[name]]


def class_names(model: Any) -> list[str]:
    """The names that a model's configuration gives its classes; none where they are Transformers' own."""
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    return [] if names == [f"LABEL_{i}" for i in range(len(names))] else names


@torch.no_grad()
def with_classes(model: Any, names: Sequence[str]) -> Any:
    """The model, told the names of its classes; the layer over them is a new one where it was over others."""
    if class_names(model) == list(names):
        return model
    known, config = class_names(model), model.config
    new = bool(known) or config.num_labels != len(names)
    for layer in dict.fromkeys(name.rpartition(".")[0] for name in class_weights(model)) if new else ():
        old = model.get_submodule(layer)
        if type(old) is not nn.Linear:
            raise ValueError(f"model: {layer} of {type(model).__name__} is no linear layer that new classes could have")
        made = nn.Linear(old.in_features, len(names), old.bias is not None, old.weight.device, old.weight.dtype)
        if not old.weight.is_meta:
            made.weight.normal_(std=getattr(config, "initializer_range", 0.02))
            if made.bias is not None:
                made.bias.zero_()
        model.set_submodule(layer, made.train(old.training))
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
    config.problem_type = "single_label_classification"
    model.num_labels = len(names)
    return model


def _config(path: str | os.PathLike) -> Any:
    if is_gguf(path):
        raise ValueError(f"model: a classifier is read from a Transformers folder, {path} is a GGUF file")
    config = read_config(path)
    if is_4bit(config):
        raise ValueError(
            f"model: {path} is in 4 bits; a classifier is read from dense weights (method=qlora packs them)"
        )
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise ValueError(f"model: Transformers has no classifier of texts for {config.model_type}, the type of {path}")
    return config


def _empty_of(model: Any, classes: int) -> Any:
    config = AutoConfig.for_model(**(model.config.to_dict() | {"id2label": {i: str(i) for i in range(classes)}}))
    with init_empty_weights():
        return AutoModelForSequenceClassification.from_config(config)
