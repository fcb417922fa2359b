"""Natural GaLore, KaSA and BA-LoRA beside their peers: `python -m bench.evidence.spectral --data FOLDER`.

FOLDER holds a folder per data set, as `bench.evidence.sets` reads them. Every run is a line of results/spectral.jsonl,
so that a second call goes on where the first one stopped; `--minutes` stops it in time. `--cost` measures step time and
peak memory instead, on an idle machine, into results/spectral_cost.json. Then `python -m bench.evidence.report`.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import transformers

from bench.evidence import cost
from bench.evidence.command import parser_of
from bench.evidence.runs import Results, about, run, untrained
from bench.evidence.sets import SPECS, Data
from bench.evidence.sides import PEFT_KASA, Side, galore_torch

_log = logging.getLogger(__name__)
SEEDS = (0, 1, 2)
TUNED_ON = {"gsm8k": "e2e_nlg"}  # whose learning rates a set takes, where it has no tries of its own

LORA = {"r": 8, "lora_alpha": 16}
# The window of Natural GaLore takes what its lower rank saves: the state is LoRA's in size.
NATURAL = {"rank": 4, "natural_history": 6, "history_dtype": "bfloat16", "scale": 1.0}
FULL = Side("full", "full", (2e-5, 6e-5, 2e-4, 6e-4), color="#9aa5b1")
LORA_SIDE = Side("LoRA", "lora", (5e-4, 1.5e-3, 5e-3, 1.5e-2), LORA, color="#4c78a8")
KASA = Side("KaSA", "kasa", (1.5e-3, 5e-3, 1.5e-2, 5e-2), LORA, color="#2e8b57")
BA_LORA = Side("BA-LoRA", "ba-lora", (6e-5, 2e-4, 6e-4, 2e-3), {"r": 8, "lora_alpha": 8, "svd_niter": 4},
               color="#8e5ea2")  # fmt: skip
GENERATIVE = (
    FULL,
    Side("GaLore (galore-torch)", galore_torch(8, 1.0), (1.5e-4, 5e-4, 1.5e-3, 5e-3), color="#c9a227"),
    Side("Natural GaLore", "natural-galore", (1.5e-4, 5e-4, 1.5e-3, 5e-3), NATURAL, color="#e4572e"),
    LORA_SIDE,
    replace(BA_LORA, name="PiSSA", method="lora", color="#7db8da",
            options={"r": 8, "lora_alpha": 8, "init_lora_weights": "pissa_niter_4"}),
    replace(KASA, name="KaSA (PEFT)", method=PEFT_KASA, color="#8cc07a",
            options=LORA | {"kasa_config": {"beta": 1e-4, "gamma": 1e-3}}),
    KASA,
    BA_LORA,
)  # fmt: skip


def classifying(full: float, adapters: float, ba_lora: float) -> tuple[Side, ...]:
    """The sides that classify, by their lowest rates."""
    lowest = ((FULL, full), (LORA_SIDE, adapters), (KASA, adapters), (BA_LORA, ba_lora))
    return tuple(
        replace(side, rates=tuple(float(f"{rate * by:.1g}") for by in (1, 3, 10, 30))) for side, rate in lowest
    )


SIDES = {
    "e2e_nlg": GENERATIVE,
    "gsm8k": GENERATIVE,
    "mr_sentiment": classifying(2e-5, 3e-4, 2e-4),
    "banking77": classifying(2e-4, 1e-3, 6e-4),
    "qnli": classifying(2e-5, 3e-4, 2e-4),
}

# Of one seed and one rate: Natural GaLore's damping, and what KaSA's cut does. Each is a side in its own right.
EXTRAS = tuple(
    Side(name, method, (1.5e-3,), options)
    for name, method, options in (
        ("Natural GaLore, absolute 1e-3", "natural-galore", NATURAL),  # the default
        ("Natural GaLore, relative 0.1", "natural-galore", NATURAL | {"damping": 0.1, "damping_mode": "relative"}),
        ("Natural GaLore, relative 1", "natural-galore", NATURAL | {"damping": 1.0, "damping_mode": "relative"}),
        ("Natural GaLore, absolute 1e-5", "natural-galore", NATURAL | {"damping": 1e-5}),
        ("GaLore (galore-torch) of rank 8", galore_torch(8, 1.0), {}),
        ("GaLore of rank 4", "galore", {"rank": 4, "scale": 1.0}),
        ("KaSA, nothing cut", "kasa", LORA | {"truncate_rank": 0}),
        ("KaSA, one value cut", "kasa", LORA | {"truncate_rank": 1}),
    )
)


@dataclass(frozen=True)
class Job:
    """One line of the results that is to be there."""

    kind: str
    set: str
    side: Side | None = None
    seed: int = 0
    rate: float | None = None  # None: the best of those tried

    def belongs(self, part: int, parts: int) -> bool:
        """Whether it is one of a part's, which has a side's tries and runs together."""
        if self.side is None:
            return part == 0
        sides = [side.name for side in (EXTRAS if self.kind == "extra" else SIDES[self.set])]
        return sides.index(self.side.name) % parts == part

    def done(self, results: Results) -> bool:
        """Whether it is there."""
        wanted = {"kind": self.kind, "set": self.set}
        if self.side is not None:
            wanted |= {"side": self.side.name, "seed": self.seed}
        if self.rate is not None:
            wanted |= {"rate": self.rate}
        return bool(results.find(**wanted))

    def do(self, results: Results, data: Data) -> None:
        """Adds it."""
        if self.side is None:
            results.add(untrained(data))
            return
        rate = self.rate or results.best_rate(self.side, TUNED_ON.get(self.set, self.set))
        whole = self.kind != "try"
        steps = data.spec.steps if whole else data.spec.tries
        results.add(run(self.side, data, self.seed, rate, steps=steps, whole=whole) | {"kind": self.kind})


def jobs() -> Iterator[Job]:
    """All jobs, a set's after another's: what is done first is complete in itself."""
    yield from (Job("untrained", name) for name in SPECS)
    for name in SPECS:
        if name not in TUNED_ON:
            yield from (Job("try", name, side, rate=rate) for side in SIDES[name] for rate in side.rates)
        yield from (Job("run", name, side, seed) for seed in SEEDS for side in SIDES[name])
    yield from (Job("extra", "e2e_nlg", side, rate=side.rates[0]) for side in EXTRAS)


def main() -> None:
    """The command."""
    parser = parser_of("spectral", __doc__, list(SPECS))
    parser.add_argument(
        "--part", nargs=2, type=int, default=(0, 1), metavar=("I", "N"), help="I of N processes, from 0"
    )
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    if args.peak_of:
        name, side = args.peak_of.split("/", 1)
        cost.print_peak(next(each for each in SIDES[name] if each.name == side), Data(SPECS[name], args.data))
        return
    if args.cost:
        sets = {name: SIDES[name] for name in ("e2e_nlg", "mr_sentiment")}
        cost.measure("bench.evidence.spectral", sets, args.data, args.results / "spectral_cost.json")
        return
    torch.set_num_threads(1)
    results, start = Results(args.results / "spectral.jsonl"), time.monotonic()
    data = {name: Data(spec, args.data) for name, spec in SPECS.items()}
    if not results.find(kind="about"):
        results.add({"kind": "about", **about()})
    for job in jobs():
        if job.set not in args.only or not job.belongs(*args.part) or job.done(results):
            continue
        if time.monotonic() - start > 60 * args.minutes:
            break
        try:
            job.do(results, data[job.set])
        except Exception:  # the others are worth having
            _log.exception("%s", job)


if __name__ == "__main__":
    main()
