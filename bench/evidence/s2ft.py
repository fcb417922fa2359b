"""S2FT beside LoRA, DoRA and full fine-tuning: `python -m bench.evidence.s2ft --data FOLDER`.

FOLDER holds a folder per data set, as `bench.evidence.sets` reads them. SmolLM2-135M on gsm8k and e2e_nlg; the adapters
of both are then fused, and served to one batch of both tasks. Every run is a line of results/s2ft.jsonl, so that a
second call goes on where the first one stopped; `--minutes` stops it in time, `--seeds` does some alone. LoRA's and
full training's rates are those that `bench.evidence.spectral` found. `--cost` measures step time of one example
instead, on an idle machine, and in a second call peak memory at 1 and 8, into results/s2ft_batches.json.
"""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.evidence import cost
from bench.evidence.command import parser_of
from bench.evidence.fused import Adapter, forms, taken_out
from bench.evidence.measures import forgetting, generation, other_domain, score
from bench.evidence.runs import Entry, Results, about, before, fit, untrained
from bench.evidence.runs import run as run_plainly
from bench.evidence.sets import SPECS, Data, sentences
from bench.evidence.sides import Side
from bench.evidence.spectral import FULL, LORA, LORA_SIDE
from deftcore import S2ftConfig, select_channels
from deftcore._files import write_json

_log = logging.getLogger(__name__)
SEEDS = (0, 1, 2)
SETS = ("gsm8k", "e2e_nlg")  # the second one's S2FT leaves out what the first one's selected
TRIED_ON = "e2e_nlg"
BATCHES = (1, 8)  # the first one is timed too
SHARE = 0.092  # of the down projections: as many numbers as LoRA's

S2FT = Side("S2FT", "s2ft", (3e-4, 1e-3, 3e-3), {"channel_ratio": SHARE}, color="#e4572e")
SAME = replace(S2FT, name="S2FT, same channels", color="#f2a541")
DORA = Side("DoRA", "lora", LORA_SIDE.rates, LORA | {"use_dora": True}, color="#2e8b57")
SIDES = (S2FT, SAME, LORA_SIDE, DORA, FULL)
RATES_OF = {DORA.name: LORA_SIDE, SAME.name: S2FT}  # whose rates a side takes
FUSED = (S2FT, SAME, LORA_SIDE)
COSTED = (S2FT, LORA_SIDE, DORA, FULL)


def with_channels(side: Side, data: Data, seed: int) -> Side:
    """A side of a set and seed: S2FT draws its channels anew, for the second set others than for the first."""
    if side.method != "s2ft":
        return side
    options = side.options | {"seed": seed}
    if data.spec.name != SETS[0] and side is not SAME:
        options["exclude"] = select_channels(data.model(), S2ftConfig(**options)).indices
    return replace(side, options=options)


@dataclass(frozen=True)
class Job:
    """One line of the results that is to be there."""

    kind: str
    set: str
    side: Side
    seed: int
    rate: float | None = None  # of tries

    def done(self, results: Results) -> bool:
        """Whether it is there."""
        wanted: Entry = {"kind": self.kind, "set": self.set, "side": self.side.name, "seed": self.seed}
        return bool(results.find(**wanted, **({} if self.rate is None else {"rate": self.rate})))


def jobs() -> Iterator[Job]:
    """All jobs, in an order that makes the first ones worth having alone."""
    yield from (Job("try", TRIED_ON, S2FT, 0, rate) for rate in S2FT.rates)
    for seed in SEEDS:
        for side in (S2FT, LORA_SIDE) if seed == 0 else (S2FT,):
            yield from (Job("run", name, side, seed) for name in SETS)
            yield Job("fused", "both", side, seed)
    for side in (LORA_SIDE, FULL, DORA):
        for seed in SEEDS:
            yield from (Job("run", name, side, seed) for name in SETS)
            if side in FUSED:
                yield Job("fused", "both", side, seed)
    for seed in SEEDS:
        yield Job("run", SETS[1], SAME, seed)
        yield Job("fused", "both", SAME, seed)


@dataclass(frozen=True)
class Grid:
    """Runs over sets, and the adapters that they left, for fusing.

    Args:
        results: of this experiment.
        tried: of `bench.evidence.spectral`, whose tries chose rates.
        data: by set.
        adapters: by side, set and seed.
    """

    results: Results
    tried: Results
    data: dict[str, Data]
    adapters: dict[tuple[str, str, int], Adapter]

    def rate(self, side: Side) -> float:
        """A side's."""
        side = RATES_OF.get(side.name, side)
        return (self.results if side.name == S2FT.name else self.tried).best_rate(side, TRIED_ON)

    def do(self, job: Job) -> Entry:
        """The line of a job."""
        if job.kind == "fused":
            return self.fuse(job)
        data = self.data[job.set]
        side = with_channels(job.side, data, job.seed)
        if job.rate is not None:
            return run_plainly(side, data, job.seed, job.rate, steps=data.spec.tries, whole=False)
        return self.run(side, data, job.seed)

    def run(self, side: Side, data: Data, seed: int) -> Entry:
        """Trains, measures, and keeps the adapter."""
        start = time.perf_counter()
        ready, found = fit(side, data, seed, self.rate(side), data.spec.steps)
        found = {"kind": "run", **found}
        if "diverged" in found:
            return found
        model = ready.model
        if side.name in {each.name for each in FUSED}:
            self.adapters[side.name, data.spec.name, seed] = taken_out(model)
        found |= score(model, data, data.test) | forgetting(before(data), other_domain(model, data))
        after, stood = self.stands(model, data), self.stood(data)
        found |= {f"forgot_{name}": after[name] - stood[name] for name in after}
        if seed == 0 or data.spec.every_seed:
            found |= generation(model, data)
        return found | {"seconds": time.perf_counter() - start}

    def stands(self, model: Any, data: Data) -> dict[str, float]:
        """A model's loss on reviews of films and on the other task."""
        (other,) = (each for name, each in self.data.items() if name != data.spec.name)
        reviews = sentences(data.folder / "mr_sentiment" / "validation.jsonl", "sentence", 24)
        return {"reviews": float(other_domain(model, data, reviews)),
                "task": score(model, other, other.test[:12])["loss"]}  # fmt: skip

    def stood(self, data: Data) -> dict[str, float]:
        """The same of the pre-trained model."""
        (found,) = self.results.find(kind="untrained", set=data.spec.name)
        return found["stands"]

    def untrained(self, name: str) -> Entry:
        """The pre-trained model's own figures."""
        data = self.data[name]
        return untrained(data) | {"stands": self.stands(data.model(), data)}

    def fuse(self, job: Job) -> Entry:
        """Both tasks' adapters of a side and seed: alone, as one, and in a batch of both tasks."""
        start = time.perf_counter()
        adapters = {}
        for name, data in self.data.items():
            # On the first set both selections of S2FT are the same.
            side = S2FT if job.side is SAME and name == SETS[0] else job.side
            if (side.name, name, job.seed) not in self.adapters:  # of an earlier call
                made = with_channels(side, data, job.seed)
                ready, _ = fit(made, data, job.seed, self.rate(side), data.spec.steps)
                self.adapters[side.name, name, job.seed] = taken_out(ready.model)
            adapters[name] = self.adapters[side.name, name, job.seed]
        found: Entry = {"kind": "fused", "set": "both", "side": job.side.name, "seed": job.seed}
        found |= forms(adapters, self.data, generate=job.seed == 0)
        return found | {"seconds": time.perf_counter() - start}


def run_all(results_in: Path, folder: Path, only: Sequence[str], seeds: Sequence[int], minutes: float) -> None:
    """Adds the runs that are missing to a folder of results, from a folder of data sets."""
    torch.set_num_threads(1)
    start, results = time.monotonic(), Results(results_in / "s2ft.jsonl")
    data = {name: Data(SPECS[name], folder) for name in SETS}
    grid = Grid(results, Results(results_in / "spectral.jsonl"), data, {})
    if not results.find(kind="about"):
        results.add({"kind": "about", **about()})
    for name in SETS:
        if not results.find(kind="untrained", set=name):
            results.add(grid.untrained(name))
    for job in jobs():
        if job.set not in (*only, "both") or job.seed not in seeds or job.done(results):
            continue
        if time.monotonic() - start > 60 * minutes:
            break
        try:
            results.add(grid.do(job))
        except Exception:  # the others are worth having
            _log.exception("%s", job)


# ---------------------------------------------------------------------------- costs


def costed(folder: Path, batch: int) -> tuple[Data, list[Side]]:
    """What is measured at a batch size."""
    data = Data(replace(SPECS[TRIED_ON], batch_size=batch), folder)
    return data, [replace(side, rates=(1e-4,) * 3) for side in COSTED]


def measure(folder: Path, path: Path) -> None:
    """Adds steps where they are missing, else peaks."""
    found: Entry = json.loads(path.read_text()) if path.exists() else {"step": {}, "peak_mb": {}}
    if not found["step"]:
        data, sides = costed(folder, BATCHES[0])
        found |= {"about": about(), "threads": torch.get_num_threads()}
        found["step"][str(BATCHES[0])] = cost.steps(sides, data, 3)
    else:
        pairs = [(str(batch), side.name) for batch in BATCHES for side in COSTED]
        found["peak_mb"] = cost.peaks("bench.evidence.s2ft", pairs, folder)
    write_json(path, found)


def main() -> None:
    """The command."""
    parser = parser_of("s2ft", __doc__, SETS, SEEDS)
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    if args.peak_of:
        batch, _, wanted = args.peak_of.partition("/")
        data, sides = costed(args.data, int(batch))
        cost.print_peak(next(side for side in sides if side.name == wanted), data)
    elif args.cost:
        measure(args.data, args.results / "s2ft_batches.json")
    else:
        run_all(args.results, args.data, args.only, args.seeds, args.minutes)


if __name__ == "__main__":
    main()
