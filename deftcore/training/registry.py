"""`Method`, `Section` and tasks: the records through which a room of methods/ plugs into recipes, the loop, export and
the command. Nothing below the rooms knows a method by name.

A package adds a room of its own by an entry point of the group `deftcore.methods` that names a module; importing the
module registers its records. deftcore's own rooms are known without being installed.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, is_dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal

import peft
from torch import Tensor, nn
from torch.optim import Optimizer

from deftcore._names import near
from deftcore.models.families import USES, Part
from deftcore.training.classification import ClassificationTask
from deftcore.training.config import TrainingConfig
from deftcore.training.objective import Objective
from deftcore.training.task import Task
from deftcore.training.text import TextTask

_log = logging.getLogger(__name__)
GROUP = "deftcore.methods"
_OF_EVERY_RECIPE = ("adapter", "data", "device", "method", "model", "output", "quantize", "task", "to_dict", "training")


def _no_phase(*_: Any, **__: Any) -> Any:
    raise RuntimeError("phase: the method trains something before the main run; start it from a recipe")


@dataclass(frozen=True)
class Setup:
    """What a method may use when it wraps a model. Outside a recipe there are neither data nor earlier phases.

    Args:
        batches: (share, at_least) to batches of that share of the training examples, the first ones, and of at least
            so many where there are.
        phase: (model, name, changes, objective=..., optimizer=...) trains what requires a gradient, on the same data,
            before the main run. `name` is the phase's folder inside the run's, `changes` are fields of `training:`,
            the others as in `deftcore.training.train`. A phase that was interrupted goes on, one that is done only
            loads its parameters.
    """

    batches: Callable[[float, int], Iterable[Mapping[str, Tensor]]] = lambda share, at_least: ()
    phase: Callable[..., Any] = _no_phase


def wrap_by_peft(model: Any, config: Any, setup: Setup) -> Any:
    """The PEFT model of a config whose `peft_type` PEFT knows; see `deftcore.training.adapters`."""
    return peft.get_peft_model(model, config)


def check_by_peft(model: Any, config: Any) -> None:
    """Wraps a model without weights."""
    wrap_by_peft(model, config, Setup())


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to train a model: what `method:` of a recipe names. Every field but the first two has a default, that of
    a method whose config PEFT knows.

    Args:
        name: what the recipe says.
        summary: one line for `deftcore methods`.
        paper: where it is from; "" for none.
        needs: what it takes, in words: a kind of model, data for calibration ...
        part: the part that an architecture must have for it, "" for none in particular: the table of architectures then
            says which ones the method serves. None: it is not in that table.
        config: the dataclass whose fields a recipe gives under `adapter:`, most often PEFT's; None is no fields.
        limits: types of fields that the config's own hints leave too wide, by name; see `deftcore.training.fields`.
        wrap: (model, config, setup) to the model that trains: what requires a gradient then is trained and saved.
        check: (model, config), the model without weights: raises what `wrap` would raise, and may change both.
        quantized: whether the frozen base is in 4 bits, as the recipe's `quantize:` says.
        float32: whether weights are read in float32: those that train lose small steps in 16 bits.
        must_be_off: fields of `training:` that the method cannot go with, and why.
        task: the data and the loss that it trains on, and how models are read, where a recipe does not say `task:`.
        objective: (model, config) to a loss beside the task's, or None. The model is the wrapped one.
        optimizer: (model, config, training) to the optimizer of the wrapped model's trainable parameters, `training`
            the recipe's section; None is AdamW.
        export: what `deftcore export` does with a trained adapter. "merge": into the weights, but over a 4-bit base
            only when asked; "always": there too; "keep": nothing, it stays beside the model.
    """

    name: str
    summary: str
    paper: str = ""
    needs: str = ""
    part: Part | None = None
    config: type | None = None
    limits: Mapping[str, Any] = field(default_factory=dict)
    wrap: Callable[[Any, Any, Setup], Any] = wrap_by_peft
    check: Callable[[Any, Any], None] = check_by_peft
    quantized: bool = False
    float32: bool = False
    must_be_off: Mapping[str, str] = field(default_factory=dict)
    task: type[Task] = TextTask
    objective: Callable[[Any, Any], Objective | None] = lambda model, config: None
    optimizer: Callable[[Any, Any, TrainingConfig], Optimizer] | None = None
    export: Literal["merge", "always", "keep"] = "merge"


@dataclass(frozen=True, kw_only=True)
class Section:
    """A loss that a recipe adds to any method's by a section of its own, as `deft:`.

    Args:
        name: of the section.
        summary, paper, needs: as in `Method`.
        config: the dataclass of the section's fields. Its field `enabled` is what the short form `name: true` sets.
        make: (model, config) to the objective, or None where there is nothing to add or to report. Called for every
            run, whether the section is enabled or not, and once before on the model without weights.
    """

    name: str
    summary: str
    paper: str = ""
    needs: str = ""
    config: type
    make: Callable[[nn.Module, Any], Objective | None]


_METHODS: dict[str, Method] = {}
_SECTIONS: dict[str, Section] = {}
_TASKS: dict[str, type[Task]] = {TextTask.name: TextTask, ClassificationTask.name: ClassificationTask}


def register(record: Method | Section | type[Task]) -> None:
    """Makes a record, or a kind of data, known under its name.

    Raises:
        TypeError: it is none of these.
        ValueError: another one has that name, or, of a section, every recipe has a field of that name.
    """
    kind = "method" if isinstance(record, Method) else "section" if isinstance(record, Section) else "task"
    if kind == "task" and not (isinstance(record, type) and issubclass(record, Task)):
        raise TypeError(f"record: must be a Method, a Section or a subclass of Task, got {record!r}")
    if not (isinstance(record.name, str) and isinstance(record.summary, str)):
        raise TypeError(f"record: its name and summary must be text, got {record.name!r} and {record.summary!r}")
    config = getattr(record, "config", None)
    if config is not None and not (isinstance(config, type) and is_dataclass(config)):
        raise TypeError(f"config: must be a dataclass, got {config!r} from {kind} {record.name!r}")
    if kind == "section" and not record.name.isidentifier():
        raise ValueError(f"name: a section is a field of recipes, whose name {record.name!r} cannot be")
    if kind == "section" and record.name in _OF_EVERY_RECIPE:
        raise ValueError(f"name: every recipe has {record.name!r} already, a section needs another name")
    tables: dict[str, dict[str, Any]] = {"method": _METHODS, "section": _SECTIONS, "task": _TASKS}
    if tables[kind].setdefault(record.name, record) is not record:
        raise ValueError(f"name: there is a {kind} {record.name!r} already")


@cache
def load_rooms() -> None:
    """Imports the rooms, once: deftcore's, then those of other packages in the order of their entry points' names. One
    of these that cannot be used is warned of and left out.
    """
    # The group is named after the package that holds deftcore's own rooms. This line alone reaches up, by that name and
    # when first asked: a plug-in like the others, which needs no installation.
    import_module(GROUP)
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        try:
            entry.load()
        except Exception as error:
            _log.warning(
                "method package %s (%s) is left out: %s: %s", entry.name, entry.value, type(error).__name__, error
            )


def all_methods() -> list[Method]:
    """Every method, in the order of registration."""
    load_rooms()
    return list(_METHODS.values())


def all_sections() -> list[Section]:
    """Every section of a recipe that adds a loss."""
    load_rooms()
    return list(_SECTIONS.values())


def all_tasks() -> list[type[Task]]:
    """Every kind of data that a recipe can name."""
    load_rooms()
    return list(_TASKS.values())


def task_of(folder: str | os.PathLike) -> type[Task] | None:
    """The task whose own models the model in a folder is one of; None for one of Transformers', or none."""
    try:
        found = json.loads((Path(folder) / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None  # who loads the model says what is wrong
    return next((each for each in all_tasks() if found in each.model_types), None)


def uses() -> dict[str, Part]:
    """What the table of architectures is asked for: names, of methods too, and the part that each needs."""
    return USES | {method.name: method.part for method in all_methods() if method.part is not None}


def find(name: str) -> Method:
    """The method of a name.

    Raises:
        ValueError: there is none; with near names.
    """
    known = {method.name: method for method in all_methods()}
    if name not in known:
        raise ValueError(f"method: no method {name!r}{near(name, known)}")
    return known[name]


def method_of(config: Any) -> Method | None:
    """The method that makes adapters of a PEFT config's type, as one has been read from disk; None for those that PEFT
    alone knows."""
    return next((method for method in all_methods() if method.config is type(config)), None)
