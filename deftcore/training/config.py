"""The sections of a recipe that every method has: how the loop runs, files of data, the base in 4 bits."""

from dataclasses import field
from importlib.util import find_spec
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator
from pydantic.dataclasses import dataclass

from deftcore.ops.quantized import BLOCK_SIZES, QUANT_TYPES
from deftcore.training.fields import (
    OPTIONS,
    Count,
    Integer,
    Mistakes,
    Needed,
    NonNegative,
    Positive,
    Seed,
    Share,
    Text,
    Whole,
    one_of,
)

_TRACKERS = ("tensorboard", "wandb")  # packages and Accelerate's names for them


def _installed(name: str) -> str:
    if name in _TRACKERS and find_spec(name) is None:
        raise Mistakes([f": {name} is not installed: pip install {name}"])
    return name


Loggers = Annotated[
    list[Annotated[Text, one_of("jsonl", *_TRACKERS), AfterValidator(_installed)]],
    BeforeValidator(lambda value: value if isinstance(value, list) else [value]),
]


@dataclass(frozen=True, config=OPTIONS)
class TrainingConfig:
    """How the loop runs. Sizes are per process; a step is one optimizer update."""

    max_steps: Whole = 0  # 0: epochs decide
    epochs: Positive = 1.0
    batch_size: Count = 8
    gradient_accumulation_steps: Count = 1
    learning_rate: Positive = 3e-4
    weight_decay: NonNegative = 0.0
    warmup_ratio: Share = 0.06
    schedule: Annotated[Text, one_of("linear", "cosine", "constant", "inverse_sqrt")] = "linear"  # after the warm-up
    max_grad_norm: NonNegative = 1.0  # 0: no clipping
    mixed_precision: Annotated[Text, one_of("no", "bf16", "fp16")] = "no"
    gradient_checkpointing: bool = False
    seed: Seed = 0
    eval_every: Whole = 0  # steps; 0: at the end only
    best_by: Text = ""  # the task's metric whose highest value is best; "": the lowest loss
    save_every: Whole = 0  # steps; 0: no checkpoints to resume from
    log_every: Count = 10
    logger: Loggers = field(default_factory=lambda: ["jsonl"])  # a name or a list; log.jsonl is always written


@dataclass(frozen=True, config=OPTIONS)
class DataConfig:
    """Files of examples; a task may add fields."""

    train: Needed
    validation: Text = ""


@dataclass(frozen=True, config=OPTIONS)
class QuantizeConfig:
    """The frozen base of methods that keep it in 4 bits; fields as in `deftcore.quantize`."""

    quant_type: Annotated[Text, one_of(*QUANT_TYPES)] = "nf4"
    block_size: Annotated[Integer, one_of(*BLOCK_SIZES)] = 64
    double_quant: bool = True
    skip: list[str] = field(default_factory=lambda: ["lm_head"])
