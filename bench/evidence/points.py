"""Point-PEFT beside other ways to adapt a point cloud model: `python -m bench.evidence.points --data FOLDER`.

FOLDER holds `ldraw_points`. A small Point-MAE is pre-trained once on the training clouds, without their classes; all
seeds of all sides but one start from it. Each side tries as many learning rates in short runs, on a fifth of the
training clouds that its tries do not learn from. Every run is a line of results/points.jsonl, so that a second call
goes on where the first one stopped; `--minutes` stops it in time. `--cost` measures steps and peak memory instead, on
an idle machine, into results/points_cost.json.
"""

import itertools
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed

from bench.evidence import cost
from bench.evidence.command import parser_of
from bench.evidence.runs import Entry, Results, about
from bench.evidence.sides import Side
from bench.harness import alternate
from deftcore._files import write_json
from deftcore.methods.point_peft.backbone import PointTransformer
from deftcore.methods.point_peft.pretraining import PointMae
from deftcore.methods.point_peft.pretraining_task import NEW, PointPretrainingTask
from deftcore.methods.point_peft.task import LabelledPointData, PointTask
from deftcore.models.own import load_own
from deftcore.training import TrainingConfig, train
from deftcore.training.loop import Diverged
from deftcore.training.options import make_config
from deftcore.training.registry import Setup
from deftcore.training.task import Batches

_log = logging.getLogger(__name__)
SET = "ldraw_points"
SEEDS = (0, 1, 2)
SIZES = NEW["point-mae-small"]  # width 96, 4 blocks, 32 patches of 16 points
STEPS = {"pre": 3000, "try": 240, "adapt": 720}
BATCH = 16
PRETRAINING_RATE = 1e-3
HELD_BACK = 5  # of so many training clouds of a class one chooses rates

_WHOLE, _PARTS = (3e-4, 1e-3, 3e-3, 1e-2), (1e-3, 3e-3, 1e-2)
_HEAD = {"modules_to_save": ["head"]}
SCRATCH = Side("scratch", "full", _WHOLE, color="#9aa5b1")
FULL = Side("full tuning", "full", _WHOLE, color="#777777")
PROBE = Side("head alone", "full", (*_PARTS, 3e-2), color="#b58b5a")
SIDES = (
    SCRATCH,
    FULL,
    PROBE,
    Side("Point-PEFT", "point-peft", _PARTS, color="#e4572e"),
    Side("LoRA, r = 8", "lora", _PARTS, {"r": 8, "lora_alpha": 8, "target_modules": ["qkv", "projection"], **_HEAD},
         "#4c78a8"),
    Side("BitFit", "bitfit", _PARTS, _HEAD, "#f2a541"),
    Side("AdaptFormer, 16", "bottleneck", _PARTS, {"r": 16, "parallel": True, "target_modules": ["mlp"], **_HEAD},
         "#2e8b57"),
)  # fmt: skip


class Data:
    """The set, as the task reads it.

    Args:
        folder: of data sets.
        kept: where its file is written again under the names that the task reads, and the pre-trained model.
    """

    def __init__(self, folder: Path, kept: Path) -> None:
        self.folder, clouds = kept / "pretrained", kept / "clouds.npz"
        stored = np.load(folder / SET / f"{SET}.npz")
        names = {"points": "points", "labels": "label", "classes": "classes", "is_test": "is_test"}
        np.savez(clouds, **{name: stored[own] for name, own in names.items()})
        self.config = LabelledPointData(train=str(clouds))
        task = PointTask()
        task.prepare(PointTransformer(SIZES.backbone), self.config)
        self.train, self.test = task.read(str(clouds), self.config), list(task.held_out(self.config) or ())
        seen: dict[int, int] = {}
        self.learn, self.tuning = [], []
        for each in self.train:
            number = seen[each["labels"]] = seen.get(each["labels"], 0) + 1
            (self.learn if number % HELD_BACK else self.tuning).append(each)

    @cached_property
    def pretrained(self) -> Path:
        """The folder of the pre-trained model, which is made on first use; another time it comes out the same."""
        if self.folder.exists():
            return self.folder
        set_seed(0)
        model = PointMae(SIZES)
        task = PointPretrainingTask(SIZES)
        task.prepare(model, self.config)
        examples = [{"points": each["points"]} for each in self.train]
        fit(model, task, examples, PRETRAINING_RATE, STEPS["pre"], 0, "pre-training")
        model.save_pretrained(self.folder)
        return self.folder

    def begin(self, side: Side, seed: int, examples: Sequence[Any]) -> tuple[Any, PointTask, Any]:
        """The model that a side trains, the task, and what makes its optimizer."""
        before = None if side is SCRATCH else load_own(self.pretrained, (PointMae,)).backbone
        set_seed(seed)
        base = PointTransformer(SIZES.backbone) if before is None else before
        task = PointTask()
        model = task.prepare(base, self.config)
        if side is PROBE:
            model.backbone.requires_grad_(False)
        clouds = partial(Batches(examples, BATCH, task.collate, shuffle=False).epoch, 0)
        config = make_config(side.record, model, dict(side.options))
        model = side.record.wrap(model, config, Setup(lambda share, at_least: clouds()))
        task.check(getattr(model, "base_model", model), examples)
        make = side.record.optimizer
        return model, task, make and (lambda trained, training: make(trained, config, training))


def settings(rate: float, steps: int, seed: int) -> TrainingConfig:
    """How all trains."""
    return TrainingConfig(
        max_steps=steps, batch_size=BATCH, learning_rate=rate, weight_decay=0.05, schedule="cosine", warmup_ratio=0.1,
        max_grad_norm=10, seed=seed, log_every=100,
    )  # fmt: skip


def fit(
    model: Any, task: Any, examples: Sequence[Any], rate: float, steps: int, seed: int, label: str, make: Any = None
) -> float:
    """Trains in place; seconds."""
    training, start = settings(rate, steps, seed), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        train(model, examples, training, folder, task=task, resume=False, label=label,
              optimizer=make and partial(make, training=training))  # fmt: skip
    return time.perf_counter() - start


@torch.no_grad()
def score(model: Any, task: PointTask, examples: Sequence[Any]) -> Entry:
    """Loss, and metrics from pooled counts, of clouds as they are."""
    model.eval()
    counts = torch.zeros(len(task.classes), len(task.classes), dtype=torch.int64)
    loss = 0.0
    for batch in Batches(examples, 64, task.collate, shuffle=False).epoch(0):
        output = task.output(model, batch)
        loss += float(output.loss) * len(batch["labels"]) / len(examples)
        counts += task.counts(batch, output)
    return {"loss": loss, **task.metrics(counts), "counts": counts.tolist()}


def run(side: Side, data: Data, seed: int, rate: float, *, whole: bool) -> Entry:
    """Trains and measures.

    Args:
        whole: on all training clouds, measured on the test clouds; else on four fifths and for fewer steps, measured on
            the last fifth.
    """
    examples, steps = (data.train, STEPS["adapt"]) if whole else (data.learn, STEPS["try"])
    start = time.perf_counter()
    model, task, optimizer = data.begin(side, seed, examples)
    found: Entry = {
        "kind": "run" if whole else "try", "set": SET, "side": side.name, "seed": seed, "rate": rate,
        "steps": steps, "setup_s": time.perf_counter() - start,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "head": sum(p.numel() for name, p in model.named_parameters() if "head." in name and p.requires_grad),
    }  # fmt: skip
    try:
        found["train_s"] = fit(model, task, examples, rate, steps, seed, side.name, optimizer)
    except Diverged as error:
        return found | {"diverged": error.step}
    if whole:
        return found | score(model, task, data.test)
    seen = score(model, task, data.tuning)
    return found | {"tuning_loss": seen["loss"], "tuning_accuracy": seen["accuracy"]}


# ---------------------------------------------------------------------------- costs


def measure(data: Data, folder: Path, path: Path) -> None:
    """Seconds of a step, sides in turn in one process, and peak memory, each side in a process of its own."""
    calls = {side.name: stepper(side, data) for side in SIDES}
    found = {"about": about(), "threads": torch.get_num_threads(), "step": {SET: alternate(calls, 9)}}
    found["peak_mb"] = cost.peaks("bench.evidence.points", [(SET, side.name) for side in SIDES], folder)
    write_json(path, found)


def stepper(side: Side, data: Data) -> Callable[[], None]:
    """A function that takes a training step: a batch drawn by chance, the update, and what is between."""
    training = settings(side.rates[1], 100, 0)
    model, task, make = data.begin(side, 0, data.train)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make(model, training) if make else torch.optim.AdamW(trained, lr=training.learning_rate)
    batches = itertools.cycle(Batches(data.train, BATCH, task.collate, draw=task.draw).epoch(0))
    model.train()

    def step() -> None:
        task.output(model, next(batches)).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peak(side: Side, data: Data) -> float:
    """The most memory that this process holds in two steps, in MB."""
    model, task, make = data.begin(side, 0, data.train)
    return cost.most_held(lambda: fit(model, task, data.train, side.rates[1], 2, 0, side.name, make))


# ---------------------------------------------------------------------------- the command


def jobs() -> Iterator[tuple[Side, int, float | None]]:
    """All tries, then all runs, whose rate is the best one's; a seed is there for every side before the next."""
    yield from ((side, 0, rate) for side in SIDES for rate in side.rates)
    yield from ((side, seed, None) for seed in SEEDS for side in SIDES)


def run_all(results: Results, data: Data, minutes: float) -> None:
    """Adds what is missing."""
    start = time.monotonic()
    if not results.find(kind="about"):
        results.add({"kind": "about", **about()})
    for side, seed, tried in jobs():
        key = {"kind": "run" if tried is None else "try", "set": SET, "side": side.name, "seed": seed}
        if results.find(**key, **({} if tried is None else {"rate": tried})):
            continue
        if time.monotonic() - start > 60 * minutes:
            break
        rate = results.best_rate(side, SET) if tried is None else tried
        try:
            results.add(run(side, data, seed, rate, whole=tried is None))
        except Exception:  # the others are worth having
            _log.exception("%s, seed %d, rate %g", side.name, seed, rate)


def main() -> None:
    """The command."""
    args = parser_of("points", __doc__).parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as kept:
        data = Data(args.data, Path(kept))
        if args.peak_of or args.cost:
            PointMae(SIZES).save_pretrained(data.folder)  # what a step costs does not depend on what was learnt
        if args.peak_of:
            print(peak(next(side for side in SIDES if args.peak_of == f"{SET}/{side.name}"), data))
        elif args.cost:
            measure(data, args.data, args.results / "points_cost.json")
        else:
            run_all(Results(args.results / "points.jsonl"), data, args.minutes)


if __name__ == "__main__":
    main()
