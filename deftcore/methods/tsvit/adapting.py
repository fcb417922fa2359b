"""A TSViT for other classes than those that it was trained on: `head`, `token` and `extend`."""

import dataclasses

import torch
from torch import nn

from deftcore._names import near
from deftcore.methods.tsvit.heads import ClassTokens
from deftcore.methods.tsvit.model import TSViT

MODES = ("head", "token", "extend")


def adapt_classes(model: TSViT, classes: int, mode: str = "head") -> TSViT:
    """Gives a model Q = `classes` outputs, in place, and returns it. All else of it stays as it was.

    Args:
        mode: "head": its K tokens stay, and a new linear layer over the classes, `mixer`, makes Q logits of their K.
            "token": Q new tokens, standard normal, take the place of the K. "extend": Q - K new ones stand behind the
            K, which stay bit for bit. The latter two end without a mixer.

    Raises:
        TypeError: model is no TSViT: wrap it with adapters afterwards.
        ValueError: classes is no positive integer, or for "extend" not above K; an unknown mode.
    """
    if not isinstance(model, TSViT):
        raise TypeError(f"model: must be a TSViT, not yet wrapped, got {type(model).__name__}")
    if mode not in MODES:
        raise ValueError(f"mode: unknown: {mode!r}{near(str(mode), MODES)}")
    if mode == "head":
        config = dataclasses.replace(model.config, mixed_classes=classes)
    else:
        config = dataclasses.replace(model.config, num_classes=classes, mixed_classes=None)
    old, kept = model.class_tokens.weight, model.config.num_classes
    if mode == "extend" and classes <= kept:
        raise ValueError(f"classes: must be above the {kept} that the model has, got {classes}")
    model.config = config
    if mode == "head":
        model.mixer = nn.Linear(kept, classes).to(old)
        return model
    model.class_tokens, model.mixer = ClassTokens(classes, config.dim).to(old), None
    if mode == "extend":
        with torch.no_grad():
            model.class_tokens.weight[:kept] = old
    return model
