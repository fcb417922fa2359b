"""DEFT under `transformers.Trainer`."""

from typing import Any

import torch
from torch import Tensor, nn

from deftcore.methods.deft.objective import DensityLoss


class DensityTrainerMixin:
    """Adds a density loss to any Trainer: `class DeftTrainer(DensityTrainerMixin, Trainer)`.

    Give `density=DensityLoss(model, ...)` beside the Trainer's own arguments. The density loss of a step is the ratio
    of sums over its whole global batch, however that is split over processes and accumulation steps. The density of
    each logging interval is logged as `density`, that of each evaluation as `eval_density`. Gates, where there are
    any, are optimised, saved with each checkpoint and resumed too.
    """

    def __init__(self, *args: Any, density: DensityLoss, **kwargs: Any) -> None:
        self.density = density
        self._window: dict[str, Any] = {"tokens": None, "parts": 1}  # of the step under way, for `DensityLoss.loss`
        self._report: dict[str, Any] | None = None  # what the next log shows
        super().__init__(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The Trainer's, and the tokens that the density loss counts in the window, summed over processes."""
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        self.density.zero_grad()  # the Trainer clears the model's gradients alone
        tokens = self.density.window_tokens(samples, device=device)
        self._window = {"tokens": tokens, "parts": max(len(samples), 1)}
        return samples, items

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The task loss plus, in training, this micro-batch's share of the density loss: a scalar.

        Raises:
            RuntimeError: as `DensityLoss.loss`, when the model's forward did not run or ran without a graph.
        """
        self.density.expect(inputs)  # the labels may be taken out before the model sees them
        result = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)  # type: ignore[misc]
        if not model.training:
            return result
        state = self.state  # type: ignore[attr-defined]
        self.density.set_progress(state.global_step / max(state.max_steps, 1))
        share = self.density.loss(**self._window)
        if not self._loss_is_a_share(kwargs.get("num_items_in_batch")):
            share = share * self._window["parts"]  # the Trainer will divide by it
        loss = result[0] if return_outputs else result
        loss = loss + share.to(loss.device)
        return (loss, result[1]) if return_outputs else loss

    def _loss_is_a_share(self, items: Any) -> bool:
        """Whether the Trainer takes a micro-batch's loss as a share of the window's, and so leaves it undivided."""
        told = getattr(self, "loss_is_scaled_for_ga", None)
        if told is not None:
            return bool(told)
        own = self.compute_loss_func is not None  # type: ignore[attr-defined]
        return own or (self.model_accepts_loss_kwargs and items is not None)  # type: ignore[attr-defined]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's; behind a window's last backward the gates' gradient becomes the mean over processes."""
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if self.density.gates is not None and self.accelerator.sync_gradients:  # type: ignore[attr-defined]
            self.density.gates.reduce_gradient()
        return loss

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict=state_dict)  # type: ignore[misc]
        if self.density.gates is not None:
            self.density.gates.save(output_dir or self.args.output_dir)  # type: ignore[attr-defined]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        if self.density.gates is not None:
            self.density.gates.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()  # type: ignore[misc]
        if self.density.gates is not None:
            self.density.gates.load(self.state.best_model_checkpoint)  # type: ignore[attr-defined]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's, with the gates as a group of their own, without weight decay."""
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        gates = list(self.density.parameters())
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if gates and id(gates[0]) not in known:
            optimizer.add_param_group({"params": gates, "weight_decay": 0.0})
        return optimizer

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The Trainer's, with `eval_density` among what is logged."""
        self.density.reset()
        return super().evaluate(*args, **kwargs)  # type: ignore[misc]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; the density is gathered while every process is here."""
        output = super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
        self._report = self._gathered()
        return output

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_log:  # type: ignore[attr-defined]
            self._report = self._gathered()
        super()._maybe_log_save_evaluate(*args, **kwargs)  # type: ignore[misc]

    def _gathered(self) -> dict[str, Any]:
        """The density of all processes; every one of them must ask."""
        accelerator = self.accelerator  # type: ignore[attr-defined]
        return self.density.report(reduce=lambda x: accelerator.reduce(x.to(accelerator.device), "sum"))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's, with `density` or `eval_density`, the share of active neurons since the last log."""
        if self._report is None and self.accelerator.num_processes == 1:  # type: ignore[attr-defined]
            self._report = self.density.report()
        report, self._report = self._report, None
        if report is not None and report["tokens"]:
            evaluated = any(key.startswith("eval_") for key in logs)
            logs["eval_density" if evaluated else "density"] = round(report["density"], 6)
            self.density.reset()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]
