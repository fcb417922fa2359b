"""Recipes: one YAML file says what is trained, on what, and how. Mistakes are reported all at once."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import AfterValidator, BeforeValidator, TypeAdapter, ValidationError, ValidationInfo, field_validator
from pydantic.dataclasses import dataclass

from deftcore._names import near
from deftcore.recipes import find_recipe, read_recipe, read_yaml
from deftcore.training.config import DataConfig, QuantizeConfig, TrainingConfig
from deftcore.training.fields import OPTIONS, Mistakes, Needed, Text, problems
from deftcore.training.options import checked_options
from deftcore.training.registry import all_methods, all_sections, all_tasks, find
from deftcore.training.task import Task
from deftcore.training.text import TextTask


def _registered(records: Callable[[], Sequence[Any]]) -> AfterValidator:
    """As `one_of`, of names that are known once the rooms are loaded; or None, where the type has it."""

    def check(name: str | None, info: ValidationInfo) -> str | None:
        names = [record.name for record in records()]
        if name is not None and name not in names:
            raise Mistakes([f": no {info.field_name} {name!r}{near(name, names)}"])
        return name

    return AfterValidator(check)


@dataclass(frozen=True, kw_only=True, config=OPTIONS)
class Recipe:
    """One training run. `load_recipe` and `complete` add the sections that rooms register, and the fields that the task
    has in `data`."""

    model: Needed  # a local Transformers folder or a hub id, or what another task loads
    output: Needed  # the run's folder
    data: DataConfig
    device: Text = "auto"  # the machine's accelerator where there is one; or "cpu", "cuda", "cuda:1" ...
    method: Annotated[Text, _registered(all_methods)] = "lora"
    task: Annotated[str | None, _registered(all_tasks)] = None  # kind of data; None is the method's own
    adapter: dict[str, Any] = field(default_factory=dict)  # fields of the method's config
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)  # methods over 4-bit bases only
    training: TrainingConfig = field(default_factory=TrainingConfig)

    @field_validator("adapter")
    @classmethod
    def _of_the_method(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        return checked_options(find(info.data["method"]), value) if "method" in info.data else value

    @field_validator("quantize")
    @classmethod
    def _where_it_is_used(cls, value: QuantizeConfig, info: ValidationInfo) -> QuantizeConfig:
        method = info.data.get("method")
        if method and not find(method).quantized and value != QuantizeConfig():
            *others, last = [each.name for each in all_methods() if each.quantized]
            raise Mistakes([f": goes with method {', '.join(others)} or {last}, got {method!r}"])
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


def _recipe_of(task: type[Task]) -> type[Recipe]:
    """The type of recipes over a task's data."""

    def short_form(value: Any) -> Any:
        return {"enabled": value} if isinstance(value, bool) else value

    sections = all_sections()
    hints: dict[str, Any] = {each.name: Annotated[each.config, BeforeValidator(short_form)] for each in sections}
    defaults = {each.name: field(default_factory=each.config) for each in sections}
    kind = type("Recipe", (Recipe,), {"__annotations__": {"data": task.config, **hints}, **defaults})
    return cast("type[Recipe]", dataclass(frozen=True, kw_only=True, config=OPTIONS)(kind))


def _task_of(raw: dict[str, Any]) -> type[Task]:
    """The task of a recipe, as far as its names are known."""
    method, task = raw.get("method", Recipe.method), raw.get("task")
    own = next((each.task for each in all_methods() if each.name == method), TextTask)
    return next((each for each in all_tasks() if each.name == task), own)


def complete(recipe: Recipe) -> Recipe:
    """A recipe that was made by hand, with the registered sections and the task's fields of `data` at their defaults;
    one that `load_recipe` gave is complete.

    Raises:
        ValueError: naming fields of `data` that its task does not have.
    """
    if type(recipe) is not Recipe:
        return recipe
    values = recipe.to_dict()
    kind = _recipe_of(_task_of(values))
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise ValueError("recipe: " + "; ".join(problems(error, kind))) from error


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and applies `key=value` overrides (`training.max_steps=100`, values in YAML).

    Args:
        path: of its file, or the name of one that comes with deftcore (`deft-lora`).

    Raises:
        FileNotFoundError: it is neither; with near names.
        ValueError: listing every mistake found.
    """
    path = find_recipe(path)
    raw = read_recipe(path)
    found = [problem for override in overrides if (problem := _apply(raw, override))]
    raw.setdefault("data", {})
    kind = _recipe_of(_task_of(raw))
    try:
        recipe = TypeAdapter(kind).validate_python({str(key): value for key, value in raw.items()})
    except ValidationError as error:
        found += problems(error, kind)
    if found:
        lines = f" {found[0]}" if len(found) == 1 else "".join(f"\n  {problem}" for problem in found)
        raise ValueError(f"recipe: {path}:{lines}")
    return recipe


def _apply(raw: dict[str, Any], override: str) -> str:
    """Sets one `key=value`; returns what is wrong with it, if anything."""
    key, equals, value = override.partition("=")
    *parents, last = key.split(".")
    if not equals or not all((*parents, last)):
        return f"override: must be key=value, got {override!r}"
    node: Any = raw
    for parent in parents:
        node = node.setdefault(parent, {})
        if isinstance(node, bool) and any(parent == each.name for each in all_sections()):  # the short form
            node = raw[parent] = {"enabled": node}
        if not isinstance(node, dict):
            return f"{key}: {parent} holds no fields, got {node!r}"
    try:
        node[last] = read_yaml(value) if value else ""
    except ValueError as error:
        return f"{key}: {value!r} {error}"
    return ""
