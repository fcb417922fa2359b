"""The folder of a run: what the run depends on, its checkpoints, log and result, each file written whole or not at all.

A folder holds one run. Its `run.json` says what that run depends on; a run that depends on anything else neither
continues it nor writes beside it. Phases, runs that a method trains before, have folders in that of their run.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deftcore import __version__
from deftcore._files import write_json, write_text
from deftcore._versions import installed
from deftcore.nn.sharding import sharded_as
from deftcore.training.fields import mistakes
from deftcore.training.result import TrainResult

_log = logging.getLogger(__name__)
_KEEP_CHECKPOINTS = 2
_RUN, _RESULT, _LOG, _CHECKPOINTS = "run.json", "result.json", "log.jsonl", "checkpoints"
_LATER = ("run_format", "task", "training.best_by")  # which the first run folders did not have
_MODELS = ("best", "final", "trained")
_TRACKED, EVALUATION = "tensorboard", "evaluation"
_PHASE = "phase"  # what makes a phase another run than the one it is a phase of
_PARAMETERS = "trainable.safetensors"
_WAYS = "train anew with --restart (in Python resume=False), or choose another output"
_RECIPES = {"steps": "training.max_steps, or epochs"}  # what a recipe calls it, where that is another name
_PACKAGES = ("torch", "transformers", "peft", "accelerate")


@dataclass
class _Run:
    """What is in run.json."""

    depends_on: dict[str, Any]
    versions: dict[str, str]


@dataclass
class _Entry:
    """What every line of the log has."""

    step: int


class RunFolder:
    """One run's files.

    Args:
        path: the folder; it need not exist.
        depends_on: names and plain values. Two runs are the same run when all of these are the same.
    """

    def __init__(self, path: Path, depends_on: Mapping[str, Any]) -> None:
        self.path = path
        self.depends_on: dict[str, Any] = json.loads(json.dumps(depends_on, default=_plain))

    def phase(self, name: str) -> "RunFolder":
        """That of a phase of this run, by the phase's name: a folder inside this one.

        Raises:
            ValueError: the name is not one for a folder, or that of something else in a run's folder.
        """
        taken = (_RUN, _RESULT, _LOG, _CHECKPOINTS, _TRACKED, EVALUATION, *_MODELS)
        if Path(name).name != name or name[:1] in ("", ".") or name in taken:
            raise ValueError(f"name: must be one for a folder beside {', '.join(_MODELS)} ..., got {name!r}")
        return RunFolder(self.path / name, {**self.depends_on, _PHASE: name})

    def check(self, *, whole: bool = True) -> None:
        """Whether what is in the folder may be continued.

        Args:
            whole: whether all that the run depends on is known; otherwise what is known is compared.

        Raises:
            ValueError: the folder holds another run, or one of which nothing is known; a file of it is damaged.
        """
        known = (self.path / _RUN).exists()
        models = any((self.path / name).exists() for name in _MODELS)  # `begin` would remove them
        if not (self.checkpoints() or self.result() or (models and not known)):
            return
        if not known:
            raise ValueError(f"output: {self.path} holds a run without {_RUN}, whose recipe is not known; {_WAYS}")
        found = _read(self.path / _RUN, _Run)
        old, new = found["depends_on"], self.depends_on
        if self.result():  # nothing goes on: what older versions did not write makes no difference
            new = {name: value for name, value in new.items() if name in old or name not in _LATER}
        lines = [
            f"  {name}: {_shown(old, name)} -> {_shown(new, name)}"
            + (f" ({_RECIPES[name]})" if name in _RECIPES else "")
            for name in [*new, *(name for name in old if whole and name not in new)]
            if (name in old) != (name in new) or not _same(old.get(name), new.get(name))
        ]
        if {"method"} <= old.keys() & new.keys() and old["method"] != new["method"]:  # then all else differs too
            methods = f"method: {_shown(old, 'method')} -> {_shown(new, 'method')}"
            raise ValueError(f"output: {self.path} holds another run, {methods}; {_WAYS}")
        if lines:
            raise ValueError(
                "\n".join([f"output: {self.path} holds another run, which differs in", *lines])
                + f"\nContinue it with its own values, {_WAYS}"
            )
        here = _versions()
        changed = [f"{k} {v} -> {here[k]}" for k, v in found["versions"].items() if here.get(k, v) != v]
        if changed and whole and not self.result():
            _log.warning(
                "%s continues under other versions (%s): the last bits may differ", self.path, ", ".join(changed)
            )

    def begin(self, files: Mapping[str, str]) -> None:
        """Says what the run depends on; `files` are texts to put beside that, by name."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.checkpoints():
            self.clear()
            write_json(self.path / _RUN, {"depends_on": self.depends_on, "versions": _versions()})
        for name, text in files.items():
            write_text(self.path / name, text)

    def clear(self) -> None:
        """Forgets the run: its checkpoints, results and log would otherwise be taken for the next one's."""
        for name in (_RUN, _RESULT, _LOG):
            (self.path / name).unlink(missing_ok=True)
        for name in (_CHECKPOINTS, *_MODELS, _TRACKED, EVALUATION):
            shutil.rmtree(self.path / name, ignore_errors=True)

    def clear_all(self) -> None:
        """As `clear`, and forgets the run's phases; what others put into their folders stays."""
        self.clear()
        for file in self.path.glob(f"*/{_RUN}"):
            with suppress(ValueError):  # of somebody else
                if _PHASE in _read(file, _Run)["depends_on"]:
                    RunFolder(file.parent, {}).clear()
            with suppress(OSError):
                file.parent.rmdir()

    def finish(self, result: TrainResult) -> None:
        write_json(self.path / _RESULT, result.to_dict())

    def result(self) -> TrainResult | None:
        """What the run came to; None before its end.

        Raises:
            ValueError: the file that says it is damaged.
        """
        file = self.path / _RESULT
        return TrainResult.from_dict(_read(file, TrainResult)) if file.exists() else None

    # ------------------------------------------------------------------ checkpoints and log

    def checkpoints(self) -> list[Path]:
        """Oldest first."""
        return sorted((self.path / _CHECKPOINTS).glob("step-*"))

    def last_step(self) -> int:
        """That of the newest checkpoint; 0 where there is none."""
        found = self.checkpoints()
        return int(found[-1].name.removeprefix("step-")) if found else 0

    def partial_checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a step is written, by every process, before `keep_checkpoint`."""
        return self.path / _CHECKPOINTS / f".step-{step:08d}.partial"

    def keep_checkpoint(self, step: int) -> None:
        partial = self.partial_checkpoint(step)
        target = partial.with_name(partial.name.strip(".").removesuffix(".partial"))
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
        for old in self.checkpoints()[:-_KEEP_CHECKPOINTS]:
            shutil.rmtree(old, ignore_errors=True)

    def trim_log(self, step: int) -> None:
        """Forgets lines written after the checkpoint that the run continues from."""
        file = self.path / _LOG
        if file.exists():
            whole = file.read_text().split("\n")[:-1]  # a killed run may have left half a line
            lines = [line for line in whole if _parse(line, file, _Entry)["step"] <= step]
            write_text(file, "".join(f"{line}\n" for line in lines))

    def append_log(self, entry: Mapping[str, Any]) -> None:
        with (self.path / _LOG).open("a") as file:
            file.write(json.dumps(entry) + "\n")


def _read(file: Path, kind: Any) -> dict[str, Any]:
    return _parse(file.read_text(errors="replace"), file, kind)


def _parse(text: str, file: Path, kind: Any) -> dict[str, Any]:
    """The JSON object in a text of a file.

    Raises:
        ValueError: it is none, or its fields are not those of `kind`.
    """
    try:
        found = json.loads(text)
        wrong = mistakes("", kind, found)
    except ValueError as error:
        wrong = [str(error)]
    if wrong:
        raise ValueError(f"output: {file} is damaged, {'; '.join(wrong).lstrip(': ')}; {_WAYS}")
    return found


def _same(a: Any, b: Any) -> bool:
    return a == b or (a != a and b != b)  # NaN stands for itself


def _shown(values: Mapping[str, Any], name: str) -> str:
    text = json.dumps(values[name]) if name in values else "not set"
    return text if len(text) <= 80 else f"{text[:60]}... ({hashlib.sha256(text.encode()).hexdigest()[:8]})"


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    return value.value if isinstance(value, Enum) else str(value)


def _versions() -> dict[str, str]:
    return {"deftcore": __version__, **{name: installed(name) for name in _PACKAGES}}


def save_parameters(parameters: Mapping[str, Tensor], folder: Path) -> None:
    """What is trained and nothing else, no shards; the base is where the recipe says."""
    save_file({name: p.detach().contiguous().cpu() for name, p in parameters.items()}, folder / _PARAMETERS)


@torch.no_grad()
def load_parameters(parameters: Mapping[str, Tensor], folder: Path) -> None:
    """Copies what `save_parameters` wrote into the parameters of the same names, or their shards."""
    state = load_file(folder / _PARAMETERS)
    for name, parameter in parameters.items():
        parameter.copy_(sharded_as(parameter, state[name]))
