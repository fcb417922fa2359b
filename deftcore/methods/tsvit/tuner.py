"""What the room's own adapters share: they go into a TSViT alone."""

from typing import Any

from torch import nn

from deftcore.methods.tsvit.model import TSViT
from deftcore.training.tuners import PlacedTuner


class TSViTTuner(PlacedTuner):
    """Puts layers in the places of modules of a TSViT."""

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        if not isinstance(model, TSViT):
            raise ValueError(f"model: must be a TSViT, got {type(model).__name__}")
        super()._prepare_model(peft_config, model)
