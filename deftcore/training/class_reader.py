"""A trained classifier of texts, ready to tell what texts are."""

import os
from collections.abc import Sequence
from typing import Any

import torch

from deftcore.models.checkpoints import load_tokenizer
from deftcore.training.adapters import load_adapter
from deftcore.training.classification import Classes, ClassificationTask


class ClassReader:
    """A trained classifier of texts.

        reader = ClassReader.open("all-MiniLM-L6-v2", "runs/intents/best")
        reader(["my card has not arrived"])  # the probability of each class, by name

    Args:
        model, tokenizer: of one folder.
        classes: what it tells.
    """

    def __init__(self, model: Any, tokenizer: Any, classes: Classes) -> None:
        self.model, self.tokenizer, self.classes = model, tokenizer, classes

    @classmethod
    def open(cls, path: str | os.PathLike, trained: str | os.PathLike = "") -> "ClassReader":
        """Of what a run left.

        Args:
            path: the run's final/ or best/; or what `model` of its recipe was, where that folder holds an adapter.
            trained: that folder in the latter case.

        Raises:
            FileNotFoundError, ValueError: there is no model, or one that does not say what its classes are.
        """
        known = Classes.of(trained or path)
        task = ClassificationTask
        model = load_adapter(task.base_of(path, trained), trained) if trained else task.load_model(path)
        return cls(model.eval(), load_tokenizer(trained or path), known)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str | tuple[str, str]]) -> list[dict[str, float]]:
        """The probability of each class, by name, for each text or pair of texts.

        Raises:
            ValueError: single texts and pairs among each other.
        """
        if not texts:
            return []
        pairs = [(text,) if isinstance(text, str) else tuple(text) for text in texts]
        if len({len(pair) for pair in pairs}) > 1:
            raise ValueError("texts: must be all single, or all pairs")
        options = {"truncation": True, "max_length": self.classes.max_length, "padding": True, "padding_side": "right"}
        inputs = self.tokenizer(*map(list, zip(*pairs, strict=True)), return_tensors="pt", **options)
        device = next(self.model.parameters()).device
        found = self.model(**{name: value.to(device) for name, value in inputs.items()}).logits.float().softmax(-1)
        return [dict(zip(self.classes.labels, row, strict=True)) for row in found.tolist()]
