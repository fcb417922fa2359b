"""Light-PEFT beside plain LoRA and simpler ways to prune: `python -m bench.evidence.light_peft --data FOLDER`.

FOLDER holds a folder per data set, as `bench.evidence.sets` reads them. Every run is a line of
results/light_peft.jsonl, so that a second call goes on where the first one stopped; `--minutes` stops it in time.
Learning rates are LoRA's best in results/spectral.jsonl, whose tries come first. `--cost` measures step, inference and
peak memory instead, on an idle machine, into results/light_peft_cost.json.
"""

import json
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import set_seed
from torch import nn

from bench.evidence import cost
from bench.evidence.command import parser_of
from bench.evidence.measures import generation, score
from bench.evidence.runs import Entry, Results, about, begin, settings, untrained
from bench.evidence.sets import SPECS, Data
from bench.evidence.sides import Side
from bench.evidence.spectral import SIDES as TRIED
from bench.harness import alternate
from deftcore._files import write_json
from deftcore.methods.light_peft.adapters import add_adapters
from deftcore.methods.light_peft.baselines import random_scores
from deftcore.methods.light_peft.config import LightPeftConfig
from deftcore.methods.light_peft.estimation import Estimation
from deftcore.methods.light_peft.selection import select
from deftcore.methods.light_peft.slimming import slim
from deftcore.models.blocks import base_of
from deftcore.models.coupled import find_coupled
from deftcore.training import train
from deftcore.training.registry import Method, Setup

_log = logging.getLogger(__name__)
SEEDS = (0, 1, 2)
SETS = ("mr_sentiment", "banking77", "qnli", "e2e_nlg")
ESTIMATED = 0.25  # the first phase's steps, as a share of the second's
INFERENCE = (1, 32)
ELSEWHERE = ("mr_sentiment", 3e-3)  # a set, and about three times the rate that LoRA's tries chose on it


def _unpruned(model: Any, config: Any, setup: Setup) -> Any:
    return add_adapters(model, config)


def _cut_by_chance(model: Any, config: Any, setup: Setup) -> Any:
    adapted = add_adapters(model, config)
    cut(adapted, config)
    return adapted


def cut(adapted: Any, config: LightPeftConfig) -> None:
    """Cuts by chance, which leaves what the second phase trains in size: costs do not depend on what goes."""
    structures = find_coupled(base_of(adapted))
    slim(adapted, select(structures, random_scores(adapted, structures, config), config))


def _peer(name: str, wrap: Any, **more: Any) -> Method:
    return Method(name=name, summary="For comparison.", config=LightPeftConfig, wrap=wrap, **more)


UNPRUNED, CUT = _peer("unpruned", _unpruned), _peer("cut", _cut_by_chance)
ESTIMATING = _peer("estimating", _unpruned, objective=Estimation)


def third(importance: str) -> dict[str, Any]:
    """Options by which a third of heads and of channels goes."""
    return {"head_ratio": 1 / 3, "ffn_ratio": 1 / 3, "importance": importance}


LORA = Side("LoRA", UNPRUNED, (), color="#4c78a8")
THIRD = Side("Light-PEFT, 1/3", "light-peft", (), third("estimated"), "#e4572e")
HALF = Side("Light-PEFT, 1/2", "light-peft", (), {"head_ratio": 0.5, "ffn_ratio": 0.5}, "#f2a541")
SIDES = (
    LORA,
    THIRD,
    HALF,
    Side("random, 1/3", "light-peft", (), third("random"), "#9aa5b1"),
    Side("magnitude, 1/3", "light-peft", (), third("magnitude"), "#2e8b57"),
)
# What costs are of; the other sides leave models of the size that THIRD does.
FIRST = Side("Light-PEFT, first phase", ESTIMATING, ())
COSTED, COSTED_ON = (LORA, FIRST, replace(THIRD, method=CUT), replace(HALF, method=CUT)), ("mr_sentiment", "e2e_nlg")


def estimated(data: Data) -> int:
    """Steps of the first phase."""
    return round(ESTIMATED * data.spec.steps)


def options(side: Side, data: Data, seed: int) -> dict[str, Any]:
    """Fields of LightPeftConfig on a set: classes have a head that trains."""
    found = {"seed": seed, "estimate_steps": estimated(data), **side.options}
    return found | ({"modules_to_save": ["classifier"]} if data.spec.classes else {})


def run(side: Side, data: Data, seed: int, rate: float) -> Entry:
    """Trains, both phases, and measures."""
    spec = data.spec
    training = settings(data, rate, seed, spec.steps)
    config = LightPeftConfig(**options(side, data, seed))
    set_seed(seed)
    model = data.model()
    whole = weights(model)
    with tempfile.TemporaryDirectory() as folder:

        def phase(model: Any, name: str, changes: dict[str, Any], **more: Any) -> None:
            train(model, data.train, replace(training, **changes), Path(folder) / name, task=data.task, resume=False,
                  label=f"{spec.name} {side.name}, {name}", **more)  # fmt: skip

        start = time.perf_counter()
        model = side.record.wrap(model, config, Setup(phase=phase))
        before = time.perf_counter() - start
        train(model, data.train, training, Path(folder) / "main", task=data.task, resume=False,
              label=f"{spec.name} {side.name}")  # fmt: skip
        total = time.perf_counter() - start
    found: Entry = {
        "kind": "run", "set": spec.name, "side": side.name, "seed": seed, "rate": rate, "steps": spec.steps,
        "estimate_steps": 0 if side is LORA else config.estimate_steps, "first_phase_s": before, "train_s": total,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad), "base": weights(base_of(model)),
        "base_whole": whole,
    }  # fmt: skip
    found |= score(model, data, data.test)
    return found | (generation(model, data) if data.references else {})


def weights(model: nn.Module) -> int:
    """Numbers of a model that are no adapter's."""
    return sum(
        p.numel() for name, p in model.named_parameters() if ".lora_" not in name and "modules_to_save" not in name
    )


def jobs() -> Iterator[tuple[str, str, Side, int, float | None]]:
    """All runs as kind, set, side, seed and rate, None for LoRA's best; a set's first seed is there for every side
    before the next. Last one set at another rate."""
    yield from (("run", name, side, seed, None) for seed in SEEDS for name in SETS for side in SIDES)
    yield from (("extra", ELSEWHERE[0], side, 0, ELSEWHERE[1]) for side in SIDES)


# ---------------------------------------------------------------------------- costs


def costed(data: Data) -> list[Side]:
    """The sides that costs are of, on a set."""
    return [replace(side, rates=(1e-3,) * 3, options=options(side, data, 0)) for side in COSTED]


def measure(folder: Path, path: Path) -> None:
    """Step time and peak memory by `cost.measure`, inference, and what both phases take."""
    sets = {name: Data(SPECS[name], folder) for name in COSTED_ON}
    cost.measure("bench.evidence.light_peft", {name: costed(data) for name, data in sets.items()}, folder, path)
    found = json.loads(path.read_text())
    found["inference"] = {name: inference(costed(data), data) for name, data in sets.items()}
    found["training"] = {name: both_phases(costed(data), data, found["step"][name]) for name, data in sets.items()}
    write_json(path, found)


@torch.no_grad()
def inference(sides: Sequence[Side], data: Data) -> dict[str, dict[str, float]]:
    """Seconds of a forward over held-out examples, adapters merged, by their number and by side."""
    models = {side.name: begin(side, data, 0).model for side in sides if side.method is not ESTIMATING}
    for model in models.values():
        model.eval().merge_adapter()
    found = {}
    for count in INFERENCE:
        batch = data.task.collate((data.test * INFERENCE[-1])[:count])
        calls = {name: partial(data.task.output, model, batch) for name, model in models.items()}
        found[str(count)] = {name: each["seconds"] for name, each in alternate(calls, 9).items()}
    return found


def both_phases(sides: Sequence[Side], data: Data, steps: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Seconds of a whole training by side, from those of a step: the first phase and the cut are part of it."""
    found = {}
    for side in sides:
        if side.method is ESTIMATING:
            continue
        found[side.name] = data.spec.steps * steps[side.name]["seconds"]
        if side.method is CUT:
            config = LightPeftConfig(**side.options)
            adapted = add_adapters(data.model(), config)
            start = time.perf_counter()
            cut(adapted, config)
            found[side.name] += time.perf_counter() - start + estimated(data) * steps[FIRST.name]["seconds"]
    return found


def main() -> None:
    """The command."""
    args = parser_of("light_peft", __doc__, SETS).parse_args()
    transformers.utils.logging.set_verbosity_error()
    if args.peak_of:
        name, _, wanted = args.peak_of.partition("/")
        data = Data(SPECS[name], args.data)
        cost.print_peak(next(side for side in costed(data) if side.name == wanted), data)
    elif args.cost:
        measure(args.data, args.results / "light_peft_cost.json")
    else:
        run_all(args.results, args.data, args.only, args.minutes)


def run_all(results_in: Path, folder: Path, only: Sequence[str], minutes: float) -> None:
    """Adds the runs that are missing to a folder of results, from a folder of data sets."""
    torch.set_num_threads(1)
    results, tried = Results(results_in / "light_peft.jsonl"), Results(results_in / "spectral.jsonl")
    start, data = time.monotonic(), {name: Data(SPECS[name], folder) for name in SETS}
    if not results.find(kind="about"):
        results.add({"kind": "about", **about()})
    for name in only:
        if not results.find(kind="untrained", set=name):
            results.add(untrained(data[name]))
    for kind, name, side, seed, rate in jobs():
        if name not in only or results.find(kind=kind, set=name, side=side.name, seed=seed):
            continue
        if time.monotonic() - start > 60 * minutes:
            break
        try:
            (lora,) = (each for each in TRIED[name] if each.name == "LoRA")
            found = run(side, data[name], seed, rate or tried.best_rate(lora, name))
            results.add(found | {"kind": kind})
        except Exception:  # the others are worth having
            _log.exception("%s, %s, seed %d", name, side.name, seed)


if __name__ == "__main__":
    main()
