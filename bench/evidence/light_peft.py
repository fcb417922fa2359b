"""Light-PEFT beside plain LoRA and simpler ways to prune: `python -m bench.evidence.light_peft --data FOLDER`.

FOLDER holds a folder per data set, as `bench.evidence.sets` reads them. Every run is a line of
results/light_peft.jsonl, so that a second call goes on where the first one stopped; `--minutes` stops it in time.
`--cost` measures step, inference and peak memory instead, on an idle machine, into results/light_peft_cost.json.
`--table` prints what there is.
"""

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import transformers
from accelerate.utils import set_seed
from torch import nn

from bench.evidence import cost
from bench.evidence.measures import generation, score
from bench.evidence.runs import Entry, Results, about, begin, settings
from bench.evidence.sets import SPECS, Data
from bench.evidence.sides import Side
from bench.harness import alternate
from bench.markdown import table
from deftcore._files import write_json
from deftcore.methods.light_peft.adapters import add_adapters
from deftcore.methods.light_peft.baselines import random_scores
from deftcore.methods.light_peft.config import LightPeftConfig
from deftcore.methods.light_peft.selection import select
from deftcore.methods.light_peft.slimming import slim
from deftcore.models.blocks import base_of
from deftcore.models.coupled import find_coupled
from deftcore.training import train
from deftcore.training.registry import Method, Setup, find

_log = logging.getLogger(__name__)
RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
SETS = ("mr_sentiment", "banking77", "qnli", "e2e_nlg")
RATES = {True: 3e-3, False: 5e-3}  # of classes, of texts, for every side; of texts LoRA's best in `spectral`
ESTIMATED = 0.5  # the first phase's steps, as a share of the second's
INFERENCE = (1, 32)
MEASURES = {"accuracy": "{:.1%}", "loss": "{:.3f}", "bleu": "{:.1f}"}


def _unpruned(model: Any, config: Any, setup: Setup) -> Any:
    return add_adapters(model, config)


def _cut_by_chance(model: Any, config: Any, setup: Setup) -> Any:
    """The sizes that a side trains in its second phase, without the first: costs do not depend on what is cut."""
    adapted = add_adapters(model, config)
    structures = find_coupled(base_of(adapted))
    slim(adapted, select(structures, random_scores(adapted, structures, config), config))
    return adapted


def _peer(name: str, wrap: Any) -> Method:
    return Method(name=name, summary="For comparison.", config=LightPeftConfig, wrap=wrap)


@dataclass(frozen=True)
class Pruning:
    """A side of the comparison.

    Args:
        name: in results.
        options: of LightPeftConfig; None: nothing is pruned, and there is one phase.
    """

    name: str
    options: dict[str, Any] | None = None

    def fields(self, data: Data, seed: int) -> dict[str, Any]:
        """Of LightPeftConfig, for a set: classes have a head that trains."""
        found = {"seed": seed, "estimate_steps": round(ESTIMATED * data.spec.steps), **(self.options or {})}
        return found | ({"modules_to_save": ["classifier"]} if data.spec.classes else {})

    def as_side(self, data: Data) -> Side:
        """What `cost` measures."""
        method = _peer("unpruned", _unpruned) if self.options is None else _peer("cut", _cut_by_chance)
        return Side(self.name, method, (RATES[bool(data.spec.classes)],) * 3, self.fields(data, 0))


def ratios(share: float, **more: Any) -> dict[str, Any]:
    """Options by which a share of heads and of channels goes."""
    return {"head_ratio": share, "ffn_ratio": share, **more}


PRUNINGS = (
    Pruning("LoRA"),
    Pruning("Light-PEFT, 1/3", ratios(1 / 3)),
    Pruning("Light-PEFT, 1/2", ratios(1 / 2)),
    Pruning("random, 1/3", ratios(1 / 3, importance="random")),
    Pruning("magnitude, 1/3", ratios(1 / 3, importance="magnitude")),
)
COSTED, COSTED_ON = PRUNINGS[:3], ("mr_sentiment", "e2e_nlg")  # chance and magnitude leave models of the same size


def run(side: Pruning, data: Data, seed: int) -> Entry:
    """Trains, both phases, and measures."""
    spec, rate = data.spec, RATES[bool(data.spec.classes)]
    training = settings(data, rate, seed, spec.steps)
    config = LightPeftConfig(**side.fields(data, seed))
    method = _peer("unpruned", _unpruned) if side.options is None else find("light-peft")
    set_seed(seed)
    model = data.model()
    whole = weights(model)
    with tempfile.TemporaryDirectory() as folder:

        def phase(model: Any, name: str, changes: dict[str, Any], **more: Any) -> None:
            train(model, data.train, replace(training, **changes), Path(folder) / name, task=data.task, resume=False,
                  label=f"{spec.name} {side.name}, {name}", **more)  # fmt: skip

        start = time.perf_counter()
        model = method.wrap(model, config, Setup(phase=phase))
        before = time.perf_counter() - start
        train(model, data.train, training, Path(folder) / "main", task=data.task, resume=False,
              label=f"{spec.name} {side.name}")  # fmt: skip
        total = time.perf_counter() - start
    found: Entry = {
        "kind": "run", "set": spec.name, "side": side.name, "seed": seed, "rate": rate, "steps": spec.steps,
        "estimate_steps": config.estimate_steps if side.options is not None else 0, "first_phase_s": before,
        "train_s": total, "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "base": weights(base_of(model)), "base_whole": whole,
    }  # fmt: skip
    found |= score(model, data, data.test)
    return found | (generation(model, data) if data.references else {})


def weights(model: nn.Module) -> int:
    """Numbers of a model that are no adapter's."""
    return sum(
        p.numel() for name, p in model.named_parameters() if ".lora_" not in name and "modules_to_save" not in name
    )


def jobs() -> Iterator[tuple[str, Pruning, int]]:
    """All runs; a set's first seed is there for every side before the next."""
    yield from ((name, side, seed) for seed in SEEDS for name in SETS for side in PRUNINGS)


# ---------------------------------------------------------------------------- costs


def measure(folder: Path, path: Path) -> None:
    """Step time and peak memory by `cost`, and inference of held-out examples; see `cost.measure`."""
    sides = {name: [side.as_side(Data(SPECS[name], folder)) for side in COSTED] for name in COSTED_ON}
    cost.measure("bench.evidence.light_peft", sides, folder, path)
    found = json.loads(path.read_text())
    found["inference"] = {name: inference(sides[name], Data(SPECS[name], folder)) for name in COSTED_ON}
    write_json(path, found)


@torch.no_grad()
def inference(sides: list[Side], data: Data) -> dict[str, dict[str, float]]:
    """Seconds of a forward over held-out examples, adapters merged, by their number and by side."""
    models = {side.name: begin(side, data, 0).model for side in sides}
    for model in models.values():
        model.eval().merge_adapter()
    found = {}
    for count in INFERENCE:
        batch = data.task.collate((data.test * INFERENCE[-1])[:count])
        calls = {name: partial(data.task.output, model, batch) for name, model in models.items()}
        found[str(count)] = {name: each["seconds"] for name, each in alternate(calls, 9).items()}
    return found


def print_table(results: Results) -> None:
    """Prints a table per set: mean over seeds, and in brackets lowest and highest."""
    for name in SETS:
        rows = []
        for side in PRUNINGS:
            own = results.find(kind="run", set=name, side=side.name)
            if own:
                cells = [_cell(form, [each[key] for each in own if key in each]) for key, form in MEASURES.items()]
                first = own[0]
                rows.append([side.name, *cells, f"{first['trained'] / 1e6:.2f} M", f"{first['base'] / 1e6:.1f} M",
                             _cell("{:.0f} s", [each["train_s"] for each in own])])  # fmt: skip
        if rows:
            print(f"\n{name}, {SPECS[name].base.name}\n")
            print(table(["", *MEASURES, "trained", "base", "training, both phases"], rows))


def print_costs(path: Path) -> None:
    """Prints a table per set of what `measure` found."""
    found = json.loads(path.read_text())
    for name, steps in found["step"].items():
        inference = found["inference"][name]
        rows = [
            [side, f"{1e3 * step['seconds']:.0f} ms", *(f"{1e3 * each[side]:.1f} ms" for each in inference.values()),
             f"{found['peak_mb'][name][side]:.0f} MB"]
            for side, step in steps.items()
        ]  # fmt: skip
        print(f"\n{name}, {found['threads']} threads\n")
        print(table(["", "step", *(f"inference of {count}" for count in inference), "peak of the process"], rows))


def _cell(form: str, values: list[float]) -> str:
    if len(values) < 2:
        return "".join(map(form.format, values))
    return f"{form.format(mean(values))} ({form.format(min(values))} to {form.format(max(values))})"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.evidence.light_peft", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder of data sets")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of results")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    parser.add_argument("--only", nargs="+", choices=SETS, default=SETS, help="of these sets")
    parser.add_argument("--cost", action="store_true", help="measure times and peak memory; needs an idle machine")
    parser.add_argument("--peak-of", help="internal: one side's peak memory, as set/side, in this process")
    parser.add_argument("--table", action="store_true", help="print what the results say, and do nothing else")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    results = Results(args.results / "light_peft.jsonl")
    if args.peak_of:
        name, _, wanted = args.peak_of.partition("/")
        data = Data(SPECS[name], args.data)
        cost.print_peak(next(side for side in PRUNINGS if side.name == wanted).as_side(data), data)
    elif args.cost:
        measure(args.data, args.results / "light_peft_cost.json")
    elif args.table:
        print_table(results)
        if (path := args.results / "light_peft_cost.json").exists():
            print_costs(path)
    else:
        run_all(results, args.data, args.only, args.minutes)


def run_all(results: Results, folder: Path, only: Sequence[str], minutes: float) -> None:
    """Adds the runs that are missing."""
    torch.set_num_threads(1)
    start, data = time.monotonic(), {name: Data(SPECS[name], folder) for name in SETS}
    if not results.find(kind="about"):
        results.add({"kind": "about", **about()})
    for name, side, seed in jobs():
        if name not in only or results.find(kind="run", set=name, side=side.name, seed=seed):
            continue
        if time.monotonic() - start > 60 * minutes:
            break
        try:
            results.add(run(side, data[name], seed))
        except Exception:  # the others are worth having
            _log.exception("%s, %s, seed %d", name, side.name, seed)


if __name__ == "__main__":
    main()
