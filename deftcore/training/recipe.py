"""Recipes: one YAML file says what is trained, on what, and how. Mistakes are reported all at once."""

import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
)
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
    Number,
    Positive,
    Seed,
    Share,
    Text,
    Whole,
    one_of,
    problems,
)

METHODS = ("lora", "qlora", "s2ft", "qs2ft", "mamba-lora", "bottleneck", "prompt", "prefix", "full")
QUANTIZED_METHODS = ("qlora", "qs2ft")
_TRACKERS = ("tensorboard", "wandb")  # packages and Accelerate's names for them
_IN_RANGE = {"r": Count, "num_virtual_tokens": Count, "lora_dropout": Share}  # PEFT checks them on wrapping or later


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
    """The frozen base of `method: qlora` and `qs2ft`; fields as in `deftcore.quantize`."""

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
    method: Annotated[Text, one_of(*METHODS)] = "lora"
    adapter: dict[str, Any] = field(default_factory=dict)  # fields of the method's PEFT config
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)  # qlora and qs2ft only
    deft: DeftConfig = field(default_factory=DeftConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    @field_validator("deft", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"enabled": value} if isinstance(value, bool) else value

    @field_validator("adapter")
    @classmethod
    def _of_the_method(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        return adapter_options(info.data["method"], value) if "method" in info.data else value

    @field_validator("quantize")
    @classmethod
    def _where_it_is_used(cls, value: QuantizeConfig, info: ValidationInfo) -> QuantizeConfig:
        method = info.data.get("method", "qlora")
        if method not in QUANTIZED_METHODS and value != QuantizeConfig():
            raise Mistakes([f": goes with method {' or '.join(QUANTIZED_METHODS)}, got {method!r}"])
        return value

    @field_validator("training")
    @classmethod
    def _with_the_method(cls, value: TrainingConfig, info: ValidationInfo) -> TrainingConfig:
        if value.gradient_checkpointing and info.data.get("method") == "prefix":
            raise Mistakes(
                [".gradient_checkpointing: must be false with method prefix, whose keys it would not recompute"]
            )
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


# ---------------------------------------------------------------------------- adapters


def adapter_kinds() -> dict[str, Any]:
    """The PEFT config class of each method that has one."""
    import peft

    from deftcore.methods.lora.bottleneck import BottleneckConfig
    from deftcore.methods.mamba.lora import MambaLoraConfig
    from deftcore.methods.s2ft.model import S2ftConfig

    return {
        "lora": peft.LoraConfig, "qlora": peft.LoraConfig, "s2ft": S2ftConfig, "qs2ft": S2ftConfig,
        "mamba-lora": MambaLoraConfig, "bottleneck": BottleneckConfig, "prompt": peft.PromptTuningConfig,
        "prefix": peft.PrefixTuningConfig,
    }  # fmt: skip


def adapter_options(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a method's PEFT config, in its fields' types.

    Raises:
        Mistakes: (a ValueError) naming every field that is unknown or whose value does not fit.
    """
    if method == "full":
        if options:
            raise Mistakes([f": method full has no adapter, got {', '.join(options)}"])
        return options
    import peft

    kind = adapter_kinds()[method]
    common = {each.name for each in dataclasses.fields(peft.PeftConfig)}  # set on wrapping
    numbers = {int: Integer, float: Number}
    hints: dict[str, Any] = {name: numbers.get(hint, hint) for name, hint in typing.get_type_hints(kind).items()}
    hints |= {name: limits for name, limits in _IN_RANGE.items() if name in hints}
    initial = "init_lora_weights"
    if initial in hints:  # PEFT's own hint holds a placeholder for these
        hints[initial] = typing.Union[hints[initial], Annotated[str, Field(pattern=r"^pissa_niter_\d+$")]]  # noqa: UP007
    own = [each.name for each in dataclasses.fields(kind) if each.init and each.name not in common]
    fields: dict[str, Any] = {name: (hints[name], None) for name in own}
    model = create_model("adapter", __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=True), **fields)
    try:
        given = model.model_validate({str(name): value for name, value in options.items()})
        values = {name: getattr(given, name) for name in given.model_fields_set}
        kind(**values)
    except ValidationError as error:
        raise Mistakes([f".{line}" for line in problems(error, model)]) from error
    except (ValueError, TypeError) as error:
        raise Mistakes([f": {error}"]) from error
    return values
