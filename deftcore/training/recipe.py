"""Recipes: one YAML file says what is trained, on what, and how. Mistakes are reported all at once."""

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from deftcore.ops.quantized import BLOCK_SIZES, QUANT_TYPES

METHODS = ("lora", "qlora", "s2ft", "qs2ft", "mamba-lora", "bottleneck", "prompt", "prefix", "full")
QUANTIZED_METHODS = ("qlora", "qs2ft")


@dataclass
class TrainingConfig:
    """How the loop runs. Sizes are per process; a step is one optimizer update."""

    max_steps: int = 0  # 0: epochs decide
    epochs: float = 1.0
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float = 3e-4
    weight_decay: float = 0.0
    warmup_ratio: float = 0.06
    schedule: str = "linear"  # or "cosine", "constant"
    max_grad_norm: float = 1.0
    mixed_precision: str = "no"  # or "bf16", "fp16"
    gradient_checkpointing: bool = False
    seed: int = 0
    eval_every: int = 0  # steps; 0: at the end only
    save_every: int = 0  # steps; 0: no checkpoints to resume from
    log_every: int = 10
    logger: str = "jsonl"  # or "tensorboard", beside it

    def problems(self) -> list[str]:
        found = []
        for name in ("batch_size", "gradient_accumulation_steps", "log_every"):
            if getattr(self, name) < 1:
                found.append(f"training.{name}: must be at least 1, got {getattr(self, name)}")
        for name in ("max_steps", "weight_decay", "warmup_ratio", "eval_every", "save_every", "max_grad_norm"):
            if getattr(self, name) < 0:
                found.append(f"training.{name}: must not be negative, got {getattr(self, name)}")
        for name in ("epochs", "learning_rate"):
            if getattr(self, name) <= 0:
                found.append(f"training.{name}: must be above 0, got {getattr(self, name)}")
        for name, choices in (
            ("schedule", ("linear", "cosine", "constant")),
            ("mixed_precision", ("no", "bf16", "fp16")),
            ("logger", ("jsonl", "tensorboard")),
        ):
            if getattr(self, name) not in choices:
                found.append(f"training.{name}: must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        return found


@dataclass
class DataConfig:
    """Files of records; see `deftcore.training.data`."""

    train: str = ""
    validation: str = ""
    max_length: int = 512
    chat: bool = False  # prompt and completion are messages for the tokenizer's chat template

    def problems(self) -> list[str]:
        found = [] if self.train else ["data.train: a .jsonl, .csv or .txt file is needed"]
        return found + ([] if self.max_length > 1 else [f"data.max_length: must be above 1, got {self.max_length}"])


@dataclass
class DeftConfig:
    """The density objective; fields as in `deftcore.objectives.DensityLoss`."""

    enabled: bool = False
    alpha: float = 1.0
    surrogate: str = "l0"
    eps: float = 1e-7
    beta: float = 20.0
    mask_policy: str = "exclude_padding"
    ramp: float = 0.0
    adaptive: str = ""
    gamma: float = 0.0

    def problems(self) -> list[str]:
        found = []
        for name, choices in (
            ("surrogate", ("l0", "tanh", "l1")),
            ("mask_policy", ("exclude_padding", "count_padding")),
            ("adaptive", ("", "gate")),
        ):
            if getattr(self, name) not in choices:
                found.append(
                    f"deft.{name}: must be one of {', '.join(map(repr, choices))}, got {getattr(self, name)!r}"
                )
        for name in ("alpha", "ramp", "gamma"):
            if getattr(self, name) < 0:
                found.append(f"deft.{name}: must not be negative, got {getattr(self, name)}")
        for name in ("eps", "beta"):
            if getattr(self, name) <= 0:
                found.append(f"deft.{name}: must be above 0, got {getattr(self, name)}")
        return found


@dataclass
class QuantizeConfig:
    """The frozen base of `method: qlora` and `qs2ft`; fields as in `deftcore.quantize`."""

    quant_type: str = "nf4"
    block_size: int = 64
    double_quant: bool = True
    skip: list[str] = field(default_factory=lambda: ["lm_head"])

    def problems(self) -> list[str]:
        found = []
        if self.quant_type not in QUANT_TYPES:
            found.append(f"quantize.quant_type: must be one of {', '.join(QUANT_TYPES)}, got {self.quant_type!r}")
        if self.block_size not in BLOCK_SIZES:
            found.append(
                f"quantize.block_size: must be one of {', '.join(map(str, BLOCK_SIZES))}, got {self.block_size}"
            )
        return found


@dataclass
class Recipe:
    """One training run."""

    model: str = ""  # a local Transformers folder or a hub id
    output: str = ""  # the run's folder
    method: str = "lora"
    adapter: dict[str, Any] = field(default_factory=dict)  # fields of the method's PEFT config
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)  # qlora and qs2ft only
    data: DataConfig = field(default_factory=DataConfig)
    deft: DeftConfig = field(default_factory=DeftConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def problems(self) -> list[str]:
        found = [f"{name}: is needed" for name in ("model", "output") if not getattr(self, name)]
        if self.method not in METHODS:
            found.append(f"method: must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.method not in QUANTIZED_METHODS and self.quantize != QuantizeConfig():
            found.append(f"quantize: goes with method {' or '.join(QUANTIZED_METHODS)}, got {self.method!r}")
        return found + self.quantize.problems() + self.data.problems() + self.deft.problems() + self.training.problems()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and applies `key=value` overrides (`training.max_steps=100`, values in YAML).

    Raises:
        FileNotFoundError: naming the file.
        ValueError: listing every mistake found.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"recipe: no such file: {path}")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"recipe: {path} is not YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"recipe: {path} must be a mapping, got {type(raw).__name__}")
    problems: list[str] = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            problems.append(f"override: must be key=value, got {override!r}")
            continue
        node = raw
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                problems.append(f"override: {parent} in {key!r} holds no fields")
                node = {}
        node[last] = yaml.safe_load(value) if value else ""
    recipe = _build(Recipe, raw, "", problems)
    problems += recipe.problems() if not problems else []
    if problems:
        raise ValueError(f"recipe: {path}:\n" + "\n".join(f"  {problem}" for problem in problems))
    return recipe


def _build(kind: type, raw: dict[str, Any], prefix: str, problems: list[str]) -> Any:
    """A dataclass from a mapping; wrong names and types are added to `problems`."""
    hints, values = get_type_hints(kind), {}
    for key, value in raw.items():
        where = f"{prefix}{key}"
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, 1)
            problems.append(f"{where}: unknown" + (f"; did you mean {prefix}{near[0]}?" if near else ""))
            continue
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            if isinstance(value, bool) and key == "deft":  # `deft: true` is short for its defaults
                value = {"enabled": value}
            if not isinstance(value, dict):
                problems.append(f"{where}: must be a mapping, got {value!r}")
                continue
            values[key] = _build(hint, value, f"{where}.", problems)  # type: ignore[arg-type]
            continue
        try:
            values[key] = _cast(value, hint)
        except (TypeError, ValueError):
            problems.append(f"{where}: must be {getattr(hint, '__name__', hint)}, got {value!r}")
    return kind(**values)


def _cast(value: Any, hint: Any) -> Any:
    if get_origin(hint) is list:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise TypeError
        return value
    if get_origin(hint) is dict or get_args(hint):
        if not isinstance(value, dict):
            raise TypeError
        return value
    if hint is str and value is False:
        return "no"  # what YAML 1.1 reads a plain no as
    if hint is bool or isinstance(value, bool):
        if hint is bool and isinstance(value, bool):
            return value
        raise TypeError
    if hint is int:
        if int(value) != float(value):
            raise ValueError
        return int(value)
    if hint is str and value is None:
        return ""
    return hint(value)  # YAML reads 3e-4 as a string; float() mends that
