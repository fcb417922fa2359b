"""Step time and peak memory, which mean something on an idle machine alone.

Steps of all sides alternate in one process. A side's peak is of a process of its own, over two steps of deftcore's
loop, counted from when the model stands, without what reading and decomposing it took.
"""

import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bench.evidence.runs import about, begin, settings
from bench.evidence.sets import SPECS, Data
from bench.evidence.sides import Side, forget_truncated
from bench.harness import alternate
from deftcore._files import write_json
from deftcore.training import train
from deftcore.training.task import Batches

REPEATS = 5


def measure(module: str, sides: Mapping[str, Sequence[Side]], folder: Path, path: Path) -> None:
    """Measures sides by set, and writes the figures.

    Args:
        module: of the experiment, whose command knows `--peak-of set/side`.
        folder: of data sets.
        path: of the figures.
    """
    found: dict[str, Any] = {"about": about(), "threads": torch.get_num_threads(), "step": {}}
    for name in sides:
        found["step"][name] = steps(sides[name], Data(SPECS[name], folder))
        gc.collect()
    found["peak_mb"] = peaks(module, [(name, side.name) for name in sides for side in sides[name]], folder)
    write_json(path, found)


def peaks(module: str, pairs: Sequence[tuple[str, str]], folder: Path) -> dict[str, dict[str, float]]:
    """MB by set and side, each of a process of its own: the module's command with `--peak-of set/side`."""
    found: dict[str, dict[str, float]] = {}

    def peak(pair: tuple[str, str]) -> float:
        command = [sys.executable, "-m", module, "--data", str(folder), "--peak-of", "/".join(pair)]
        alone = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=alone)
        return float(done.stdout.splitlines()[-1])

    with ThreadPoolExecutor(2) as pool:  # memory does not mind a neighbour
        for (name, side), megabytes in zip(pairs, pool.map(peak, pairs), strict=True):
            found.setdefault(name, {})[side] = megabytes
    return found


def steps(sides: Sequence[Side], data: Data, repeats: int = REPEATS) -> dict[str, dict[str, float]]:
    """Seconds of a training step by side, over the same batches; the first step, where subspaces are found, apart."""
    calls, first = {}, {}
    for side in sides:
        call = stepper(side, data)
        start = time.perf_counter()
        call()
        calls[side.name], first[side.name] = call, time.perf_counter() - start
    found = alternate(calls, repeats)
    return {name: {**values, "first": first[name]} for name, values in found.items()}


def stepper(side: Side, data: Data) -> Callable[[], None]:
    """A function that takes a step."""
    ready = begin(side, data, 0)
    training = settings(data, side.rates[1], 0, 100)
    optimizer, enabled = ready.optimizer(ready.model, training), training.mixed_precision == "bf16"
    batches = enumerate(itertools.cycle(Batches(data.train, training.batch_size, data.task.collate).epoch(0)))
    ready.model.train()

    def step() -> None:
        number, batch = next(batches)
        if ready.objective is not None:
            ready.objective.begin([batch], number, 100)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = data.task.output(ready.model, batch)
        loss = output.loss if ready.objective is None else output.loss + ready.objective.share(batch, output)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in ready.model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def print_peak(side: Side, data: Data) -> None:
    """Prints the most memory that this process held while it trained, in MB."""
    examples, task = data.train[:64], data.task
    ready, training = begin(side, data, 0), settings(data, side.rates[1], 0, 2)
    data.spec.base.load.cache_clear()  # the copy that trains is enough
    forget_truncated()
    gc.collect()

    def two_steps() -> None:
        with tempfile.TemporaryDirectory() as folder:
            train(
                ready.model, examples, training, folder, task=task, objective=ready.objective, resume=False,
                optimizer=lambda model: ready.optimizer(model, training),
            )  # fmt: skip

    print(json.dumps(most_held(two_steps)))


def most_held(work: Callable[[], None]) -> float:
    """The most memory that this process holds while it works, in MB."""
    done = threading.Event()
    seen = [_resident()]

    def watch() -> None:
        while not done.wait(0.005):
            seen.append(max(seen.pop(), _resident()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return seen[0] / 1e6


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
