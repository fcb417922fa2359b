"""The folder of a run: what the run depends on, its checkpoints, log and result, each file written whole or not at all.

A folder holds one run. Its `run.json` says what that run depends on; a run that depends on anything else neither
continues it nor writes beside it.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
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

_log = logging.getLogger(__name__)
_KEEP_CHECKPOINTS = 2
_RUN, _RESULT, _LOG, _CHECKPOINTS = "run.json", "result.json", "log.jsonl", "checkpoints"
_LATER = ("run_format", "task")  # which the first run folders did not have
_MODELS = ("best", "final", "trained")
_PARAMETERS = "trainable.safetensors"
_PACKAGES = ("torch", "transformers", "peft", "accelerate")


class RunFolder:
    """One run's files.

    Args:
        path: the folder; it need not exist.
        depends_on: names and plain values. Two runs are the same run when all of these are the same.
    """

    def __init__(self, path: Path, depends_on: Mapping[str, Any]) -> None:
        self.path = path
        self.depends_on: dict[str, Any] = json.loads(json.dumps(depends_on, default=_plain))

    def check(self) -> None:
        """Whether what is in the folder may be continued.

        Raises:
            ValueError: the folder holds another run, or one of which nothing is known.
        """
        known = (self.path / _RUN).exists()
        models = any((self.path / name).exists() for name in _MODELS)  # `begin` would remove them
        if not (self.checkpoints() or self.result() or (models and not known)):
            return
        ways = "train anew with --restart (resume=False), or choose another output"
        try:
            found = json.loads((self.path / _RUN).read_text())
        except FileNotFoundError:
            raise ValueError(
                f"output: {self.path} holds a run without {_RUN}, whose recipe is not known; {ways}"
            ) from None
        old, new = found["depends_on"], self.depends_on
        if self.result():  # nothing goes on: what older versions did not write makes no difference
            new = {name: value for name, value in new.items() if name in old or name not in _LATER}
        lines = [
            f"  {name}: {_shown(old, name)} -> {_shown(new, name)}"
            for name in [*new, *(name for name in old if name not in new)]
            if (name in old, old.get(name)) != (name in new, new.get(name))
        ]
        if {"method"} <= old.keys() & new.keys() and old["method"] != new["method"]:  # then all else differs too
            methods = f"method: {_shown(old, 'method')} -> {_shown(new, 'method')}"
            raise ValueError(f"output: {self.path} holds another run, {methods}; {ways}")
        if lines:
            raise ValueError(
                "\n".join([f"output: {self.path} holds another run, which differs in", *lines])
                + f"\nContinue it with its own values, {ways}"
            )
        here = _versions()
        changed = [f"{k} {v} -> {here[k]}" for k, v in found["versions"].items() if here.get(k, v) != v]
        if changed and not self.result():
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
        for name in (_CHECKPOINTS, *_MODELS, "tensorboard"):
            shutil.rmtree(self.path / name, ignore_errors=True)

    def finish(self, result: Mapping[str, Any]) -> None:
        write_json(self.path / _RESULT, result)

    def result(self) -> dict[str, Any] | None:
        """What the run came to; None before its end."""
        file = self.path / _RESULT
        return json.loads(file.read_text()) if file.exists() else None

    # ------------------------------------------------------------------ checkpoints and log

    def checkpoints(self) -> list[Path]:
        """Oldest first."""
        return sorted((self.path / _CHECKPOINTS).glob("step-*"))

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
            lines = [line for line in whole if json.loads(line)["step"] <= step]
            write_text(file, "".join(f"{line}\n" for line in lines))

    def append_log(self, entry: Mapping[str, Any]) -> None:
        with (self.path / _LOG).open("a") as file:
            file.write(json.dumps(entry) + "\n")


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
