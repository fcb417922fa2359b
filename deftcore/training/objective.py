"""`Objective`: a loss beside the task's, as the loop and the Trainer mixin know it."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Batch = Mapping[str, Any]


class Objective(nn.Module):
    """A loss that is added to the task's, and what it measures. Its parameters train with the model's, without weight
    decay; gradients of theirs that processes have to share are its own business, in `end`. What else a run that goes on
    has to know are its buffers, equal on all processes.

    Of each step: `begin`, then `share` after every micro-batch's forward, then `end` after the last backward. All have
    a default but `share`.
    """

    name = "objective"  # of its settings in run.json: its section of a recipe, where it has one
    measure = "objective"  # what it is a loss of; the log shows it as <measure>_loss
    needs_output = False  # whether `share` reads the output, which not every Trainer can give

    def settings(self) -> dict[str, Any]:
        """What it was made with, as plain values: equal settings, equal loss."""
        return {}

    def expect(self, batch: Batch) -> None:
        """Told before a forward whose call may not show all of the batch (the Trainer takes labels out)."""

    def begin(self, window: Sequence[Batch], step: int, steps: int, device: torch.device | None = None) -> None:
        """A step begins.

        Args:
            window: its micro-batches, in this process.
            step: how many of the run's steps are done.
            steps: how many there are.
            device: where a process group sums.
        """

    def share(self, batch: Batch, output: Any) -> Tensor:
        """This micro-batch's share of the step's loss, a scalar: the step's loss is the sum over its micro-batches, and
        the mean over processes.

        Args:
            output: what `Task.output` returned for the batch, in the graph; under a Trainer None unless `needs_output`.
        """
        raise NotImplementedError

    def end(self, scale: float = 1.0) -> None:
        """The last backward of a step is done; clipping and the optimizer's step follow. Gradients are those of the
        whole step.

        Args:
            scale: the factor that they still hold, the scaler's under `mixed_precision: fp16`.
        """

    def observe(self, batch: Batch, output: Any) -> None:
        """A forward of an evaluation is done; for objectives that measure on outputs."""

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """Its parameters, as groups for the optimizer.

        Args:
            rate: the run's learning rate.
        """
        own = list(self.parameters())
        return [{"params": own, "weight_decay": 0.0}] if own else []

    def undecayed(self) -> Sequence[nn.Parameter]:
        """Parameters of the model that are to train without weight decay, those that it penalises itself."""
        return ()

    def reset(self) -> None:
        """Starts what `report` measures anew: before a step, and before an evaluation."""

    def report(self, reduce: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, Any]:
        """What was measured since the last `reset`.

        Args:
            reduce: sums a tensor over processes, where there are several.
        """
        return {}

    def summary(self, report: Mapping[str, Any]) -> dict[str, Any]:
        """What of a report stands in the run's result, by name. The log shows those that are numbers."""
        return {}

    def save(self, folder: str | os.PathLike) -> None:
        """Writes parameters beside a saved adapter or model."""

    def load(self, folder: str | os.PathLike) -> None:
        """Reads what `save` wrote."""


def listed(objective: Objective | Sequence[Objective] | None) -> list[Objective]:
    """One objective, or several, as a list.

    Raises:
        ValueError: two of one name or measure.
    """
    found = [objective] if isinstance(objective, Objective) else list(objective or ())
    for what in ("name", "measure"):
        names = [getattr(each, what) for each in found]
        if len(set(names)) < len(names):  # one would stand in the other's place in the log or run.json
            raise ValueError(f"objective: each must have a {what} of its own, got {', '.join(names)}")
    return found


def numbers(summary: Mapping[str, Any]) -> dict[str, float]:
    """What of a summary a log can show."""
    return {name: value for name, value in summary.items() if isinstance(value, float)}
