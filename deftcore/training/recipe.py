"""Recipes: one YAML file says what is trained, on what, and how. Mistakes are reported all at once."""

import dataclasses
from collections.abc import Sequence
from dataclasses import field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BeforeValidator, TypeAdapter, ValidationError, ValidationInfo, field_validator
from pydantic.dataclasses import dataclass

from deftcore.ops.density import SURROGATES
from deftcore.ops.quantized import BLOCK_SIZES, QUANT_TYPES
from deftcore.training.fields import (
    OPTIONS,
    Count,
    Integer,
    Length,
    Mistakes,
    Needed,
    NonNegative,
    Positive,
    Seed,
    Share,
    Text,
    Whole,
    one_of,
    problems,
)
from deftcore.training.options import checked_options
from deftcore.training.registry import all_methods, find

_TRACKERS = ("tensorboard", "wandb")  # packages and Accelerate's names for them


def _method(name: str) -> str:
    names = [method.name for method in all_methods()]
    if name not in names:
        raise ValueError(f"one of {', '.join(names)}")
    return name


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
    save_every: Whole = 0  # steps; 0: no checkpoints to resume from
    log_every: Count = 10
    logger: Loggers = field(default_factory=lambda: ["jsonl"])  # a name or a list; log.jsonl is always written


@dataclass(frozen=True, config=OPTIONS)
class DataConfig:
    """Files of records; see `deftcore.training.data`."""

    train: Needed
    validation: Text = ""
    max_length: Length = 512
    chat: bool = False  # prompt and completion are messages for the tokenizer's chat template


@dataclass(frozen=True, config=OPTIONS)
class DeftConfig:
    """The density objective; fields as in `deftcore.methods.deft.objective.DensityLoss`."""

    enabled: bool = False
    alpha: NonNegative = 1.0
    surrogate: Annotated[Text, one_of(*SURROGATES)] = "l0"
    eps: Positive = 1e-7
    beta: Positive = 20.0
    mask_policy: Annotated[Text, one_of("exclude_padding", "count_padding")] = "exclude_padding"
    ramp: NonNegative = 0.0
    adaptive: Annotated[Text, one_of("", "gate")] = ""
    gamma: NonNegative = 0.0


@dataclass(frozen=True, config=OPTIONS)
class QuantizeConfig:
    """The frozen base of methods that keep it in 4 bits; fields as in `deftcore.quantize`."""

    quant_type: Annotated[Text, one_of(*QUANT_TYPES)] = "nf4"
    block_size: Annotated[Integer, one_of(*BLOCK_SIZES)] = 64
    double_quant: bool = True
    skip: list[str] = field(default_factory=lambda: ["lm_head"])


@dataclass(frozen=True, kw_only=True, config=OPTIONS)
class Recipe:
    """One training run."""

    model: Needed  # a local Transformers folder or a hub id
    output: Needed  # the run's folder
    data: DataConfig
    device: Text = "auto"  # the machine's accelerator where there is one; or "cpu", "cuda" ...
    method: Annotated[Text, AfterValidator(_method)] = "lora"
    adapter: dict[str, Any] = field(default_factory=dict)  # fields of the method's config
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)  # methods over 4-bit bases only
    deft: DeftConfig = field(default_factory=DeftConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    @field_validator("deft", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"enabled": value} if isinstance(value, bool) else value

    @field_validator("adapter")
    @classmethod
    def _of_the_method(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        return checked_options(find(info.data["method"]), value) if "method" in info.data else value

    @field_validator("quantize")
    @classmethod
    def _where_it_is_used(cls, value: QuantizeConfig, info: ValidationInfo) -> QuantizeConfig:
        method = info.data.get("method")
        if method and not find(method).quantized and value != QuantizeConfig():
            names = [each.name for each in all_methods() if each.quantized]
            raise Mistakes([f": goes with method {' or '.join(names)}, got {method!r}"])
        return value

    @field_validator("training")
    @classmethod
    def _with_the_method(cls, value: TrainingConfig, info: ValidationInfo) -> TrainingConfig:
        if method := info.data.get("method"):
            on = [name for name in find(method).must_be_off if getattr(value, name)]
            if on:
                reasons = find(method).must_be_off
                raise Mistakes([f".{name}: must be false with method {method}, {reasons[name]}" for name in on])
        return value

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
        raise FileNotFoundError(f"recipe: {'is a folder' if path.is_dir() else 'no such file'}: {path}")
    try:
        raw = _read_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"recipe: {path}: {error}") from error
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise ValueError(f"recipe: {path}: must be a mapping, got {type(raw).__name__}")
    found = [problem for override in overrides if (problem := _apply(raw, override))]
    raw.setdefault("data", {})
    try:
        recipe = TypeAdapter(Recipe).validate_python({str(key): value for key, value in raw.items()})
    except ValidationError as error:
        found += problems(error, Recipe)
    if found:
        lines = f" {found[0]}" if len(found) == 1 else "".join(f"\n  {problem}" for problem in found)
        raise ValueError(f"recipe: {path}:{lines}")
    return recipe


def _read_yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark, what = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"is not YAML: {where}{what or str(error).splitlines()[0]}") from error


def _apply(raw: dict[str, Any], override: str) -> str:
    """Sets one `key=value`; returns what is wrong with it, if anything."""
    key, equals, value = override.partition("=")
    *parents, last = key.split(".")
    if not equals or not all((*parents, last)):
        return f"override: must be key=value, got {override!r}"
    node: Any = raw
    for parent in parents:
        node = node.setdefault(parent, {})
        if isinstance(node, bool) and parent == "deft":  # its short form
            node = raw[parent] = {"enabled": node}
        if not isinstance(node, dict):
            return f"{key}: {parent} holds no fields, got {node!r}"
    try:
        node[last] = _read_yaml(value) if value else ""
    except ValueError as error:
        return f"{key}: {value!r} {error}"
    return ""
