"""Methods under comparison: deftcore's by name, and peers as records of the same kind."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.optim import Optimizer

from deftcore.methods.natural_galore.groups import galore_param_groups
from deftcore.training import TrainingConfig
from deftcore.training.objective import Objective
from deftcore.training.options import make_config
from deftcore.training.registry import Method, Setup, find, wrap_by_peft


@dataclass(frozen=True)
class Side:
    """A method with its options.

    Args:
        name: in results and on the page.
        method: deftcore's, by name, or a peer's record.
        rates: learning rates to try, in rising order; as many for each side; () where they are another's.
        options: of the method's config; those of adapters get the base's targets.
        color: in pictures.
    """

    name: str
    method: str | Method
    rates: tuple[float, ...]
    options: dict[str, Any] = field(default_factory=dict)
    color: str = "#777777"

    @property
    def record(self) -> Method:
        """The method's."""
        return find(self.method) if isinstance(self.method, str) else self.method

    def make(self, model: Any, targets: tuple[str, ...], task_type: str) -> "Ready":
        """The model that trains, with its objective and its optimizer."""
        method, options = self.record, dict(self.options)
        if method.config is not None and issubclass(method.config, peft.PeftConfig):
            options |= {"target_modules": list(targets), "task_type": task_type}
        config = make_config(method, model, options)
        wrapped = method.wrap(model, config, Setup())
        made: list[Optimizer] = []

        def optimizer(trained: Any, training: TrainingConfig) -> Optimizer:
            made.append((method.optimizer or _adamw)(trained, config, training))
            return made[-1]

        return Ready(wrapped, method.objective(wrapped, config), optimizer, made)


@dataclass(frozen=True)
class Ready:
    """What a run trains, and the optimizers that it made."""

    model: Any
    objective: Objective | None
    optimizer: Callable[[Any, TrainingConfig], Optimizer]
    made: list[Optimizer]

    def trained(self) -> int:
        """How many numbers train."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def state_bytes(self) -> int:
        """What the optimizer holds after a step."""
        return held_bytes(list(self.made[-1].state.values()))


def _adamw(model: Any, config: Any, training: TrainingConfig) -> Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=training.learning_rate, weight_decay=training.weight_decay)


def held_bytes(value: Any) -> int:
    """Bytes of all tensors in a value of lists, dictionaries and plain objects; vectors of one number are left out."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size() if value.numel() > 1 else 0
    if isinstance(value, dict):
        return sum(map(held_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(held_bytes, value))
    return held_bytes(vars(value)) if hasattr(value, "__dict__") else 0


# ---------------------------------------------------------------------------- peers


def galore_torch(rank: int, scale: float) -> Method:
    """GaLore by its authors' package."""

    def optimizer(model: Any, config: Any, training: TrainingConfig) -> Optimizer:
        from galore_torch import GaLoreAdamW

        projected, *rest = galore_param_groups(model, rank=rank, update_proj_gap=200, scale=scale)
        groups = [{name: projected[name] for name in ("params", "rank", "update_proj_gap", "scale")}, *rest]
        groups[0]["proj_type"] = "std"
        return GaLoreAdamW(groups, lr=training.learning_rate, no_deprecation_warning=True)

    return Method(name="galore-torch", summary="GaLore by galore-torch.", wrap=_as_it_is, optimizer=optimizer)


def _as_it_is(model: Any, config: Any, setup: Setup) -> Any:
    return model


_TRUNCATED: dict[str, Any] = {}


def forget_truncated() -> None:
    """Lets go of what is kept of PEFT's KaSA, where memory counts."""
    _TRUNCATED.clear()


def _wrap_peft_kasa(model: Any, config: Any, setup: Setup) -> Any:
    """PEFT decomposes all weights in every run; what it makes of them is the same for all, and is kept."""
    key = f"{type(model).__name__} {config.r}"
    if key not in _TRUNCATED:
        with torch.random.fork_rng():  # what a run draws does not depend on whether it is the first
            _TRUNCATED[key] = wrap_by_peft(model, config, setup)
    found = copy.deepcopy(_TRUNCATED[key])
    for layer in found.modules():
        if isinstance(layer, LoraLayer):
            layer.reset_lora_parameters("default", True)
            torch.nn.init.normal_(layer.lora_diag["default"])
    return found


class PeftKasaPenalty(Objective):
    """The penalties of PEFT's own KaSA, which its user has to add."""

    name, measure = "peft_kasa", "peft_kasa"

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model, self._parts = (model,), 1

    def begin(self, window: Any, step: int, steps: int, device: torch.device | None = None) -> None:
        """Counts micro-batches."""
        self._parts = max(len(window), 1)

    def share(self, batch: Any, output: Any) -> Tensor:
        """PEFT's sum over layers."""
        return self._model[0].base_model._get_kasa_loss() / self._parts


PEFT_KASA = Method(
    name="peft-kasa",
    summary="KaSA by PEFT.",
    config=peft.LoraConfig,
    wrap=_wrap_peft_kasa,
    objective=lambda model, config: PeftKasaPenalty(model),
)
