"""The pre-trained model as a teacher of itself: the same weights with adapters turned off, no second copy."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deftcore.nn.observed import aside
from deftcore.training.objective import Batch


@torch.no_grad()
def original_logits(model: Any, batch: Batch, *, cached: bool = False) -> Tensor:
    """A PEFT model's logits for a batch without its adapters, thresholds and swapped activations.

    Args:
        cached: leave a language model's cache on, where its configuration says so.
    """
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "num_items_in_batch")}
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" not in inputs:
        base = model.get_base_model()
        inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    if getattr(config, "use_cache", False) and not cached:
        inputs.setdefault("use_cache", False)
    with evaluating(model), aside(), without_adapters(model):
        return model(**inputs).logits


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module of a model in evaluation, and afterwards as it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """A PEFT model with its adapters off; what was frozen of them, which PEFT sets to train again, stays so."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    try:
        with model.disable_adapter():
            yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
