"""Objectives under `transformers.Trainer`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deftcore.training.decay import spare_from_decay
from deftcore.training.objective import Objective, listed, numbers


class ObjectiveTrainerMixin:
    """Adds objectives to any Trainer: `class DeftTrainer(ObjectiveTrainerMixin, Trainer)`.

    Give `objective=DensityLoss(model, ...)`, or another, or a list of several, beside the Trainer's own arguments. The
    share of a step is that of the whole global batch, however that is split over processes and accumulation steps.
    What is measured in each logging interval is logged by name (`density`), and in each evaluation (`eval_density`).
    Parameters of an objective's own, as gates, are optimised, saved with each checkpoint and resumed too.

    Raises:
        ValueError: two objectives of one name or measure.
    """

    def __init__(self, *args: Any, objective: Objective | Sequence[Objective], **kwargs: Any) -> None:
        self.objectives = listed(objective)
        self._parts = 1  # micro-batches of the step under way
        self._measured: dict[str, float] | None = None  # what the next log shows
        super().__init__(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The Trainer's, of which the objectives are told, before the window's first forward."""
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        state = self.state  # type: ignore[attr-defined]
        for objective in self.objectives:
            objective.zero_grad()  # the Trainer clears the model's gradients alone
            objective.begin(samples, state.global_step, state.max_steps, device)
        self._parts = max(len(samples), 1)
        return samples, items

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The task loss plus, in training, this micro-batch's share of the objectives': a scalar.

        An objective that reads outputs gets those of the Trainer's own forward, or, where that has no logits in the
        graph (TRL's computes the loss from the hidden states), those of one forward more.

        Raises:
            RuntimeError: as `Objective.share`; a density loss when the forward ran without a graph.
        """
        batch = dict(inputs)  # the labels may be taken out before the model sees them
        self._expect(batch)
        with _outputs_of(model) as seen:
            result = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)  # type: ignore[misc]
        loss, returned = result if return_outputs else (result, None)
        if not model.training:
            for objective in self.objectives if return_outputs else ():
                objective.observe(inputs, returned)
            return result
        output = None
        if any(objective.needs_output for objective in self.objectives):
            output = next((each for each in seen if _logits(each) is not None), None)
            if output is None:
                self._expect(batch)
                output = model(**batch)
        share = sum((each.share(batch, output).to(loss.device) for each in self.objectives), torch.zeros_like(loss))
        if not self._loss_is_a_share(kwargs.get("num_items_in_batch")):
            share = share * self._parts  # the Trainer will divide by it
        loss = loss + share
        return (loss, returned) if return_outputs else loss

    def _expect(self, batch: dict) -> None:
        for objective in self.objectives:
            objective.expect(batch)

    def _loss_is_a_share(self, items: Any) -> bool:
        """Whether the Trainer takes a micro-batch's loss as a share of the window's, and so leaves it undivided."""
        told = getattr(self, "loss_is_scaled_for_ga", None)
        if told is not None:
            return bool(told)
        own = self.compute_loss_func is not None  # type: ignore[attr-defined]
        return own or (self.model_accepts_loss_kwargs and items is not None)  # type: ignore[attr-defined]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's; behind a window's last backward the objectives are told."""
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        scaler = self.accelerator.scaler  # type: ignore[attr-defined]
        for objective in self.objectives if self.accelerator.sync_gradients else ():  # type: ignore[attr-defined]
            objective.end(1.0 if scaler is None else scaler.get_scale())
        return loss

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict=state_dict)  # type: ignore[misc]
        for objective in self.objectives:
            objective.save(output_dir or self.args.output_dir)  # type: ignore[attr-defined]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        for objective in self.objectives:
            objective.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()  # type: ignore[misc]
        for objective in self.objectives:
            objective.load(self.state.best_model_checkpoint)  # type: ignore[attr-defined]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's, with the objectives' parameters as groups of their own, without weight decay; nor have those
        of the model's that an objective penalises."""
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        spare_from_decay(optimizer, [p for objective in self.objectives for p in objective.undecayed()])
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        rate = self.args.learning_rate  # type: ignore[attr-defined]
        for group in [group for objective in self.objectives for group in objective.groups(rate)]:
            if id(group["params"][0]) not in known:
                optimizer.add_param_group(group)
        return optimizer

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The Trainer's, with what the objectives measure among what is logged."""
        self._reset()
        return super().evaluate(*args, **kwargs)  # type: ignore[misc]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; reports are gathered while every process is here."""
        output = super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
        self._measured = self._gathered()
        return output

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_log:  # type: ignore[attr-defined]
            self._measured = self._gathered()
        super()._maybe_log_save_evaluate(*args, **kwargs)  # type: ignore[misc]

    def _gathered(self) -> dict[str, float]:
        """What was measured in all processes; every one of them must ask."""
        accelerator = self.accelerator  # type: ignore[attr-defined]
        found: dict[str, float] = {}
        for objective in self.objectives:
            report = objective.report(reduce=lambda x: accelerator.reduce(x.to(accelerator.device), "sum"))
            found |= numbers(objective.summary(report))
        return found

    def _reset(self) -> None:
        for objective in self.objectives:
            objective.reset()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's, with what the objectives measured since the last log."""
        if self._measured is None and self.accelerator.num_processes == 1:  # type: ignore[attr-defined]
            self._measured = self._gathered()
        measured, self._measured = self._measured, None
        if measured:
            prefix = "eval_" if any(key.startswith("eval_") for key in logs) else ""
            logs |= {f"{prefix}{name}": round(value, 6) for name, value in measured.items()}
            self._reset()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


@contextmanager
def _outputs_of(model: nn.Module) -> Iterator[list[Any]]:
    """What a model's forwards in a graph return while it lasts."""
    found: list[Any] = []

    def keep(_: nn.Module, inputs: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            found.append(output)

    handle = model.register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def _logits(output: Any) -> Any:
    return output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
