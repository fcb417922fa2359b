"""ReLU in a pre-trained model's MLPs, and what draws the model back to what it was."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deftcore.models.activations import SWAPS, save_swap, swap_activations
from deftcore.models.blocks import base_of
from deftcore.ops.checks import check_choice, check_number
from deftcore.ops.logits import logit_penalties
from deftcore.training.objective import Batch, Objective
from deftcore.training.teacher import original_logits

_IGNORED = -100


class SwapLoss(Objective):
    """Swaps the activations of every MLP block for ReLU, whose zeros are exact, and adds weight * T^2
    KL(original / T | model / T), mean over the tokens that predict a label (after ProSparse, Song et al., arXiv
    2402.13516, with the original model's logits as what is to be kept).

    The original is the same model with adapters off and its own activation: one more forward, no second copy. Make it
    before a `DensityLoss`, which then watches the ReLU.

        swap = SwapLoss(model, distill=1.0)
        output = model(**batch)
        loss = output.loss + swap.loss(batch, output.logits)

    Args:
        model: a PEFT model over frozen weights; with `distill` 0 any that `swap_activations` takes.
        activation: "relu".
        distill: the weight; 0 asks no teacher.
        temperature: T, above 0.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    name, measure, needs_output = "swap", "distill", True

    def __init__(
        self, model: Any, *, activation: str = "relu", distill: float = 1.0, temperature: float = 1.0
    ) -> None:  # fmt: skip
        super().__init__()
        check_choice("activation", activation, SWAPS)
        self.activation = activation
        self.distill = check_number("distill", distill, minimum=0.0)
        self.temperature = check_number("temperature", temperature, minimum=0.0, strict=True)
        if self.distill and not hasattr(model, "disable_adapter"):
            raise ValueError("distill: the original model is the trained one without its adapter; needs one, or 0")
        swap_activations(model, activation)
        self._model = (model,)  # a tuple: it is no part of the objective
        self._parts = 1

    def settings(self) -> dict[str, Any]:
        """Its arguments."""
        return {"activation": self.activation, "distill": self.distill, "temperature": self.temperature}

    def begin(self, window: Sequence[Batch], step: int, steps: int, device: torch.device | None = None) -> None:
        """A step begins."""
        self._parts = max(len(window), 1)

    def share(self, batch: Batch, output: Any) -> Tensor:
        """The mean over a step's micro-batches of `loss`."""
        return self.loss(batch, output["logits"] if isinstance(output, dict) else output.logits) / self._parts

    def loss(self, batch: Batch, logits: Tensor) -> Tensor:
        """The weighted divergence for a batch and the logits [B, K, V] that the model gave for it, a scalar.

        Raises:
            ValueError: a batch without labels.
        """
        if not self.distill:
            return logits.new_zeros((), dtype=torch.float32)
        labels = batch.get("labels")
        if labels is None:
            raise ValueError("batch: labels say which tokens count, got none")
        mask = labels != _IGNORED
        if not getattr(getattr(base_of(self._model[0]), "config", None), "is_encoder_decoder", False):
            mask = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)  # a place predicts the next one
        teacher = original_logits(self._model[0], batch)
        return logit_penalties(
            logits, teacher, mask=mask, consistency=self.distill, temperature=self.temperature
        ).total  # fmt: skip

    def save(self, folder: str | os.PathLike) -> None:
        """Notes the activation beside an adapter, which holds no configuration of its base."""
        save_swap(folder, self.activation)
