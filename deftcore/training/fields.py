"""Types of configuration fields, and what is wrong with a value: one line a field, all fields at once."""

import contextlib
import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, validate_call

from deftcore._names import final_instead, near

F = TypeVar("F", bound=Callable[..., Any])
Record = TypeVar("Record")
OPTIONS = ConfigDict(extra="forbid", coerce_numbers_to_str=True)


class Mistakes(ValueError):
    """What is wrong inside a field, for validators: lines to stand right behind its name."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("; ".join(lines))
        self.lines = lines


def option(default: Any, help: str) -> Any:
    """A dataclass field that a recipe can set, with what `deftcore train --help` or a page says of it."""
    return dataclasses.field(default=default, metadata={"help": help})


def one_of(*choices: Any) -> AfterValidator:
    """A validator: the value must be one of the choices."""

    def check(value: Any) -> Any:
        if value not in choices:
            raise ValueError(f"one of {', '.join(str(choice) or 'nothing' for choice in choices)}")
        return value

    return AfterValidator(check)


def _no_flag(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number")
    return value


def _text(value: Any) -> Any:
    """Paths as text; text again where YAML 1.1 has read a plain `no` as false, or nothing as null."""
    if value is None or value is False:
        return "" if value is None else "no"
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _existing_file(path: str) -> str:
    if path and not Path(path).is_file():
        raise Mistakes([f": must be a file, {path} is a folder" if Path(path).is_dir() else f": no such file: {path}"])
    return path


def _existing(path: str) -> str:
    if not Path(path).exists():
        raise Mistakes([f": no such file or folder: {path}"])
    return path


def _adapter_folder(path: str) -> str:
    name = "adapter_config.json"
    if path and not Path(path).exists():
        raise Mistakes([f": no such folder: {path}"])
    if path and not (Path(path) / name).is_file():
        hint = final_instead(path, name)
        raise Mistakes([f": must be the folder of an adapter, {path} has no {name}{hint}"])
    return path


def _empty(path: str) -> str:
    if any(Path(path).glob("*")):
        raise Mistakes([f": must be a new folder, {path} exists and is not empty"])
    return path


def _writable(path: str) -> str:
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise Mistakes([f": must be a folder to write to, {place} is a file"])
    if not os.access(place, os.W_OK | os.X_OK):
        raise Mistakes([f": must be a folder to write to, {place} is not writable"])
    return path


Text = Annotated[str, BeforeValidator(_text)]
Needed = Annotated[Text, Field(min_length=1)]
DataFile = Annotated[Needed, AfterValidator(_existing_file)]
DataPlace = Annotated[Needed, AfterValidator(_existing)]  # a file or a folder
AdapterFolder = Annotated[Text, AfterValidator(_adapter_folder)]  # or nothing
OutputFolder = Annotated[Needed, AfterValidator(_writable)]  # it, or its nearest existing parent, is one
NewFolder = Annotated[OutputFolder, AfterValidator(_empty)]
Real = Annotated[float, BeforeValidator(_no_flag)]  # NaN and infinity among them
Number = Annotated[Real, Field(allow_inf_nan=False)]
NonNegative = Annotated[Number, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]
Share = Annotated[NonNegative, Field(le=1)]
Integer = Annotated[int, BeforeValidator(_no_flag)]
Whole = Annotated[Integer, Field(ge=0)]
Count = Annotated[Integer, Field(ge=1)]
Length = Annotated[Integer, Field(ge=2)]  # tokens: a single one predicts nothing
Seed = Annotated[Whole, Field(lt=2**32)]  # NumPy's generators take no more

_TAKES = {
    "int_type": "a whole number", "int_parsing": "a whole number", "int_from_float": "a whole number",
    "int_parsing_size": "a smaller number", "float_type": "a number", "float_parsing": "a number",
    "finite_number": "a finite number", "bool_type": "true or false", "bool_parsing": "true or false",
    "string_type": "text", "list_type": "a list", "set_type": "a list", "tuple_type": "a list",
    "dict_type": "a mapping", "dataclass_type": "a mapping", "none_required": "empty",
    "greater_than_equal": "at least {ge}", "greater_than": "above {gt}", "less_than_equal": "at most {le}",
    "less_than": "below {lt}", "literal_error": "{expected}", "value_error": "{error}",
    "string_pattern_mismatch": "text like {pattern}",
}  # fmt: skip
_MISSING = ("missing", "missing_argument", "too_short", "string_too_short")
_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")


def problems(error: ValidationError, kind: Any) -> list[str]:
    """One line for each field of `kind` (a dataclass, a pydantic model or a function) that has a mistake: its name,
    what it takes and what it got; near names for unknown ones."""
    lines: list[str] = []
    found: dict[str, list[str]] = {}
    got: dict[str, Any] = {}
    for each in error.errors(include_url=False):
        fields, path = _fields(kind), []
        for part in each["loc"]:
            path.append(str(part))
            if not dataclasses.is_dataclass(fields.get(part)):
                break  # what follows are places in lists, or the alternatives of a union
            fields = _fields(fields[part])
        name, what = ".".join(path), each["type"]
        inner = each.get("ctx", {}).get("error")
        if isinstance(inner, Mistakes):
            lines += [f"{name}{line}" for line in inner.lines]
        elif what in _UNKNOWN:
            lines.append(f"{name}: unknown{near(path[-1], fields)}")
        elif what in _MISSING:
            lines.append(f"{name}: is needed")
        else:
            takes = _TAKES.get(what, each["msg"]).format(**each.get("ctx", {}))
            found[name] = list(dict.fromkeys([*found.get(name, []), takes]))
            got[name] = each["input"]
    # Sorted: typing keeps one object for unions of the same members, in the order of whoever asked first.
    return lines + [
        f"{name}: must be {' or '.join(sorted(takes))}, got {_short(got[name])}" for name, takes in found.items()
    ]


def _fields(kind: Any) -> dict[Any, Any]:
    return {name: hint for name, hint in get_type_hints(kind).items() if name != "return"}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def mistakes(name: str, kind: Any, value: Any) -> list[str]:
    """What is wrong with one value of a type, under its name."""
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        return [name + line for line in problems(error, type(None))]
    return []


@contextlib.contextmanager
def renamed(old: str, new: str) -> Iterator[None]:
    """Errors of an argument that the code inside calls by one name, by the name under which it was given."""
    try:
        yield
    except (ValueError, FileNotFoundError, ImportError) as error:
        text = str(error)
        if type(error) not in (ValueError, FileNotFoundError, ImportError) or not text.startswith(f"{old}: "):
            raise
        raise type(error)(new + text.removeprefix(old)) from error


def record_of(kind: type[Record], values: dict[str, Any]) -> Record:
    """A pydantic dataclass made of a file's values: ValueError, naming each mistake."""
    try:
        return kind(**values)
    except ValidationError as error:
        raise ValueError("; ".join(problems(error, kind))) from error


def checked(function: F) -> F:
    """The function, its arguments validated by their annotations before it runs: ValueError, naming each mistake."""
    validated = validate_call(config=ConfigDict(arbitrary_types_allowed=True))(function)
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return validated(**signature.bind(*args, **kwargs).arguments)
        except ValidationError as error:
            raise ValueError("; ".join(problems(error, function))) from error

    return call  # type: ignore[return-value]
