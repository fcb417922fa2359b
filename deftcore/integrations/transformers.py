"""DEFT under `transformers.Trainer`, and plain greedy decoding."""

from typing import Any

import torch
from torch import Tensor, nn

from deftcore.objectives import DensityLoss


class DensityTrainerMixin:
    """Adds a density loss to any Trainer: `class DeftTrainer(DensityTrainerMixin, Trainer)`.

    Give `density=DensityLoss(model, ...)` beside the Trainer's own arguments. The density of each logging interval is
    logged as `density`, that of each evaluation as `eval_density`. Gates, where there are any, are optimised too.
    """

    def __init__(self, *args: Any, density: DensityLoss, **kwargs: Any) -> None:
        self.density = density
        super().__init__(*args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **kwargs: Any) -> Any:
        result = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)  # type: ignore[misc]
        if not model.training:
            return result
        state, args = self.state, self.args  # type: ignore[attr-defined]
        self.density.set_progress(state.global_step / max(state.max_steps, 1))
        share = self.density.loss()
        if kwargs.get("num_items_in_batch") is not None:
            # The task loss is this micro-batch's share of the whole batch: the Trainer will not divide again.
            share = share / args.gradient_accumulation_steps
        loss = result[0] if return_outputs else result
        loss = loss + share.to(loss.device)
        return (loss, result[1]) if return_outputs else loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        gates = list(self.density.parameters())
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if gates and id(gates[0]) not in known:
            optimizer.add_param_group({"params": gates, "weight_decay": 0.0})
        return optimizer

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.density.reset()
        return super().evaluate(*args, **kwargs)  # type: ignore[misc]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        report = self.density.report()
        if report["tokens"]:
            evaluated = any(key.startswith("eval_") for key in logs)
            logs["eval_density" if evaluated else "density"] = round(report["density"], 6)
            self.density.reset()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


@torch.no_grad()
def greedy_decode(model: nn.Module, input_ids: Tensor, new_tokens: int) -> tuple[Tensor, Tensor]:
    """Greedy continuation with a key-value cache: tokens [B, new_tokens] and the logits they were taken from.

    A plain loop rather than `generate`, so that what is timed is the model.
    """
    output = model(input_ids=input_ids, use_cache=True)
    tokens, logits = [], []
    for step in range(new_tokens):
        last = output.logits[:, -1]
        logits.append(last)
        tokens.append(last.argmax(-1, keepdim=True))
        if step + 1 < new_tokens:
            output = model(input_ids=tokens[-1], past_key_values=output.past_key_values, use_cache=True)
    return torch.cat(tokens, 1), torch.stack(logits, 1)
