"""The penalties of BA-LoRA on a model's logits, as an objective."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deftcore.methods.ba_lora.config import BaLoraConfig
from deftcore.methods.ba_lora.schedules import adaptive_factor, consistency_factor, rising_factor
from deftcore.ops.class_logits import class_penalties
from deftcore.ops.logits import LogitPenalties, logit_penalties, mean_entropy
from deftcore.training.objective import Batch, Objective
from deftcore.training.teacher import original_logits

_IGNORED = -100
_TERMS = ("consistency", "diversity", "spectral")


class BaLoraPenalty(Objective):
    """l1 consistency + l2 diversity + l3 spectral term of a model's logits (arXiv 2408.04556), with the weights'
    schedules. The pre-trained model is the same one with its adapters turned off: one more forward, no second copy.

        penalty = BaLoraPenalty(model)
        output = model(**batch)
        loss = output.loss + penalty.loss(batch, output.logits)

    Of a step of several micro-batches it is their mean: covariances and singular values are those of a micro-batch.
    Under data parallelism each process has its own.

    Args:
        model: a PEFT model whose adapters `disable_adapter` turns off: BA-LoRA's, or any.
        config: None is that of the model's active adapter.

    Raises:
        ValueError: a model without `disable_adapter`, or an adapter of another type and no config.
    """

    name, measure, needs_output = "ba_lora", "ba_lora", True

    def __init__(self, model: Any, config: BaLoraConfig | None = None) -> None:
        super().__init__()
        if not hasattr(model, "disable_adapter"):
            raise ValueError(f"model: must be a PEFT model, got {type(model).__name__}")
        config = model.peft_config[model.active_adapter] if config is None else config
        if not isinstance(config, BaLoraConfig):
            raise ValueError(f"config: must be a BaLoraConfig, the model's adapter has a {type(config).__name__}")
        self._model = (model,)  # a tuple: it is no part of the objective
        self.config = config
        self._step, self._steps, self._parts = 0, 0, 1
        self._sums: dict[str, Any] = {}  # of the terms, on the device until they are asked for
        self._count = 0
        self._warned: set[str] = set()

    def settings(self) -> dict[str, Any]:
        config = self.config
        names = ("variant", "temperature", "top_k", "consistency_schedule", "schedule", "warmup_ratio", "ramp_ratio",
                 "shift")  # fmt: skip
        weights = dict(zip(_TERMS, config.weights(), strict=True))
        return {**weights, "k": config.largest(), "of_classes": config.of_classes} | {
            name: getattr(config, name) for name in names
        }

    # ------------------------------------------------------------------ steps

    def begin(self, window: Sequence[Batch], step: int, steps: int, device: torch.device | None = None) -> None:
        self._step, self._steps, self._parts = step, steps, max(len(window), 1)

    def share(self, batch: Batch, output: Any) -> Tensor:
        logits = output["logits"] if isinstance(output, Mapping) else output.logits
        return self.loss(batch, logits) / self._parts

    def factors(self) -> tuple[float, float, float]:
        """The weights at the step under way; an adaptive consistency's before the teacher is asked."""
        config = self.config
        first, second, third = config.weights()
        if not self._steps:  # outside a run
            return first, second, third
        rise = rising_factor(config.schedule, self._step, self._steps, config.warmup_ratio, config.ramp_ratio)
        fall = consistency_factor(config.consistency_schedule, self._step, self._steps)
        return first * fall, second * rise, third * rise

    def loss(self, batch: Batch, logits: Tensor) -> Tensor:
        """The weighted sum for a batch and the logits that the model gave for it, a scalar in the graph.

        Args:
            batch: what the model is called with; `labels`, of language models, say which tokens count.
            logits: [N, D] of a classifier, else [B, K, V].

        Raises:
            ValueError: logits of another shape; a language model's batch without labels.
        """
        weights = self.factors()
        if not any(weights):
            return logits.new_zeros((), dtype=torch.float32)
        teacher = self.teacher(batch) if weights[0] else None
        found = self._of_classes(logits, teacher, weights) if self.config.of_classes else self._of_tokens(
            batch, logits, teacher, weights
        )  # fmt: skip
        self._count += 1
        for name, value in zip(_TERMS, found[1:], strict=True):
            self._sums[name] = self._sums.get(name, 0.0) + value
        if weights[2]:  # the term is below 0 unless it has been left out
            self._sums["skipped"] = self._sums.get("skipped", 0.0) + (found.spectral == 0).float()
        return found.total

    def _of_classes(self, logits: Tensor, teacher: Tensor | None, weights: tuple[float, ...]) -> LogitPenalties:
        if logits.dim() != 2:
            raise ValueError(
                f"logits: must be [N, D] of a classifier, got {tuple(logits.shape)}; form 'nlg' takes tokens"
            )
        count, classes = logits.shape
        k = self.config.largest()
        if classes == 1:
            self._warn("the model has one output: consistency, diversity and spectral term are all inert")
        elif k >= min(count, classes):
            self._warn(f"spectral: k = {k} is at least min(N, D) = {min(count, classes)}: the term is -1 and inert")
        if count == 1:
            self._warn("diversity: one example has no covariance: the term is 0")
        return class_penalties(
            logits, teacher, **dict(zip(_TERMS, weights, strict=True)), temperature=self.config.temperature, k=k,
            normalized=self.config.variant == "v5",
        )  # fmt: skip

    def _of_tokens(
        self, batch: Batch, logits: Tensor, teacher: Tensor | None, weights: tuple[float, ...]
    ) -> LogitPenalties:
        config, vocabulary = self.config, self._vocabulary(logits)
        if logits.dim() != 3:
            raise ValueError(f"logits: must be [B, K, V] of a language model, got {tuple(logits.shape)}")
        mask = self.tokens(batch).to(logits.device)
        old = config.variant == "v5"
        first, second, third = weights
        temperature = 1.0 if old else config.temperature
        if first and config.consistency_schedule == "adaptive" and bool(mask.any()):
            assert teacher is not None
            entropy = mean_entropy(teacher, mask=mask, temperature=temperature, vocabulary=vocabulary)
            first *= adaptive_factor(float(entropy), vocabulary or logits.shape[-1])
        options: dict[str, Any] = {"temperature": temperature, "vocabulary": vocabulary, "k": config.largest()}
        found = logit_penalties(
            logits, teacher, mask=mask, consistency=first, diversity=second, spectral=0.0 if old else third,
            top_k=0 if old else config.top_k, **options,
        )  # fmt: skip
        if not (old and third):
            return found
        kept = logits[..., :vocabulary].masked_fill(~mask.unsqueeze(-1), 0.0).flatten(1)
        whole = logit_penalties(kept, spectral=third, norm="nuclear", k=config.largest())
        return found._replace(total=found.total + whole.total, spectral=whole.spectral)

    def tokens(self, batch: Batch) -> Tensor:
        """Which positions count, [B, K] bool: those that predict a label, or with `shift=False` those that have one."""
        labels = batch.get("labels")
        if labels is None:
            raise ValueError("batch: labels say which tokens count, got none")
        valid = labels != _IGNORED
        if not self.config.shift or self._is_pair():
            return valid
        return torch.cat([valid[:, 1:], torch.zeros_like(valid[:, :1])], 1)

    def _vocabulary(self, logits: Tensor) -> int | None:
        """The words that the model knows, where its logits are padded."""
        known = getattr(getattr(self._model[0], "config", None), "vocab_size", None)
        return known if isinstance(known, int) and 0 < known < logits.shape[-1] else None

    def _is_pair(self) -> bool:
        return bool(getattr(getattr(self._model[0], "config", None), "is_encoder_decoder", False))

    # ------------------------------------------------------------------ the pre-trained model

    @torch.no_grad()
    def teacher(self, batch: Batch) -> Tensor:
        """The pre-trained model's logits for a batch."""
        return original_logits(self._model[0], batch, cached=self.config.of_classes)

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(f"BA-LoRA: {message}", stacklevel=4)

    # ------------------------------------------------------------------ what is logged

    def reset(self) -> None:
        self._sums, self._count = {}, 0

    def report(self, reduce: Any = lambda x: x) -> dict[str, Any]:
        """The terms before weighting, mean over the batches since the last reset, and in how many of these there was
        no spectrum: no tokens, or values that are not finite."""
        device = next(self._model[0].parameters()).device
        terms = [float(self._sums.get(name, 0.0)) for name in (*_TERMS, "skipped")]
        sums = torch.tensor([*terms, float(self._count)], device=device)
        *values, skipped, count = reduce(sums).tolist()
        found = {f"ba_lora_{name}": value / count for name, value in zip(_TERMS, values, strict=True)} if count else {}
        return found | ({"ba_lora_skipped": skipped} if skipped else {})

    def summary(self, report: Mapping[str, Any]) -> dict[str, Any]:
        return dict(report)
