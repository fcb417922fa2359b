"""The options of a method: the fields of its config, as a recipe gives them under `adapter:`."""

import copy
import dataclasses
import types
import typing
from typing import Any

from peft import PeftConfig
from pydantic import ConfigDict, ValidationError, create_model

from deftcore.training.fields import Integer, Mistakes, Number, problems
from deftcore.training.registry import Method, all_methods


def checked_options(method: Method, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a method's config, in its fields' types.

    Raises:
        Mistakes: (a ValueError) naming every field that is unknown or whose value does not fit.
    """
    kind: Any = method.config
    if kind is None:
        if options:
            raise Mistakes([f": method {method.name} has no adapter, got {', '.join(options)}"])
        return options
    hints: dict[str, Any] = {name: _without_flags(hint) for name, hint in typing.get_type_hints(kind).items()}
    hints |= method.limits
    own = _fields(kind)
    others = {name for each in all_methods() if each.config for name in _fields(each.config)}.difference(own)
    found = []
    if strange := [name for name in options if name in others]:  # of a recipe that was another method's
        names = ", ".join(strange)
        found = [f": method {method.name} does not take {names}, which other methods do; adapter={{...}} replaces all"]
        options = {name: value for name, value in options.items() if name not in others}
    fields: dict[str, Any] = {name: (hints[name], None) for name in own}
    model = create_model("adapter", __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=True), **fields)
    try:
        given = model.model_validate({str(name): value for name, value in options.items()})
        values = {name: getattr(given, name) for name in given.model_fields_set}
        kind(**values)
    except ValidationError as error:
        raise Mistakes([*found, *(f".{line}" for line in problems(error, model))]) from error
    except (ValueError, TypeError) as error:
        raise Mistakes([*found, f": {error}"]) from error
    if found:
        raise Mistakes(found)
    return values


def _without_flags(hint: Any) -> Any:
    """A type whose numbers, inside unions and collections too, are neither true nor false."""
    if hint in (int, float):
        return Integer if hint is int else Number
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return typing.Union[tuple(map(_without_flags, inner))]  # noqa: UP007  of a tuple
    return origin[tuple(map(_without_flags, inner))] if origin in (dict, list, tuple, set) else hint


def _fields(kind: Any) -> list[str]:
    """Names of the fields of a config; those that PEFT's have in common are set on wrapping."""
    common = {each.name for each in dataclasses.fields(PeftConfig)} if issubclass(kind, PeftConfig) else set()
    return [each.name for each in dataclasses.fields(kind) if each.init and each.name not in common]


def make_config(method: Method, model: Any, options: dict[str, Any]) -> Any:
    """The config of a method for a model; None where the method has none.

    Raises:
        ValueError: naming options that the method's config does not have.
    """
    kind = method.config
    if kind is None:
        return None
    options = copy.deepcopy(options)
    pair = getattr(getattr(model, "config", None), "is_encoder_decoder", None)
    if issubclass(kind, PeftConfig) and hasattr(model, "prepare_inputs_for_generation"):  # a language model
        options.setdefault("task_type", "SEQ_2_SEQ_LM" if pair else "CAUSAL_LM")
    elif issubclass(kind, PeftConfig) and type(model).__name__.endswith("ForSequenceClassification"):
        options.setdefault("task_type", "SEQ_CLS")  # PEFT trains the layers over the classes too
    try:
        return kind(**options)
    except TypeError as error:
        raise ValueError(f"adapter: {error}") from error
