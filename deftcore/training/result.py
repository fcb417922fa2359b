"""What a run has come to: so far, and at its end."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass
class TrainResult:
    """What a run came to. Losses are nats per predicted token, or what the task's loss is in.

    What the run's objectives measured, in the last evaluation or, where there was none, in the last step, are
    attributes too: with DEFT `density`, and `density_blocks` by block. So are the task's metrics in the last
    evaluation, as `accuracy`.
    """

    steps: int
    train_loss: float
    eval_loss: float | None
    best_eval_loss: float | None  # of the model in best/
    seconds: float
    best_step: int | None = None  # whose model is in best/
    best_metric: float | None = None  # of that model, where `training.best_by` names one
    measured: dict[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        measured = self.__dict__.get("measured", {})
        if name not in measured:
            raise AttributeError(f"TrainResult has no {name!r}; measured were {', '.join(measured) or 'losses alone'}")
        return measured[name]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, those measured among the others."""
        found = asdict(self)
        return found | found.pop("measured")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainResult":
        """Of what `to_dict` gave."""
        own = {each.name for each in fields(cls)}
        rest = {name: value for name, value in values.items() if name not in own}
        return cls(**{name: value for name, value in values.items() if name in own}, measured=rest)


@dataclass
class State:
    """Where a run stands; saved with each checkpoint."""

    step: int = 0
    best: float = math.inf  # the loss at the best step
    best_metric: float = -math.inf
    best_step: int = 0
    train_loss: float = math.nan

    def state_dict(self) -> dict[str, float]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.best_step = int(state["step"]), int(state["best_step"])
        self.best, self.train_loss = float(state["best"]), float(state["train_loss"])
        self.best_metric = float(state["best_metric"])
