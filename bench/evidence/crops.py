"""TSViT on other fields than it was trained on: `python -m bench.evidence.crops --data FOLDER`.

FOLDER holds `worldcereal_patches` and `france_crop_series`. A small TSViT is trained from nothing on all places or
years but one, and then adapted to that one in each way, from few labels and from all. Each side tries as many learning
rates, on a fourth of the windows to learn from, which its tries do not learn from. Every run is a line of
results/crops.jsonl, so that a second call goes on where the first one stopped; `--minutes` stops it in time. `--cost`
measures steps and peak memory instead, on an idle machine, into results/crops_cost.json.
"""

import copy
import itertools
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed

from bench.evidence import cost
from bench.evidence.command import parser_of
from bench.evidence.crops_data import SETS, Example, Place, few_labels, places
from bench.evidence.runs import Entry, Results, about
from bench.evidence.sides import Side
from bench.harness import alternate
from deftcore._files import write_json
from deftcore.methods.tsvit.model import TSViT
from deftcore.methods.tsvit.predicting import with_classes, with_statistics
from deftcore.methods.tsvit.reading import statistics
from deftcore.methods.tsvit.scene import UNLABELLED
from deftcore.methods.tsvit.task import CropTask
from deftcore.training import TrainingConfig, train
from deftcore.training.loop import Diverged
from deftcore.training.task import Batches
from deftcore.training.wrapping import add_adapter

_log = logging.getLogger(__name__)
SEEDS = (0, 1, 2)
WIDTH: dict[str, Any] = {"dim": 48, "heads": 4, "dim_head": 12, "temporal_depth": 2, "spatial_depth": 2}
STEPS = {"pre": 400, "adapt": 150}
BATCH = 16
PRETRAINING_RATE = 1e-3
FEW = 10  # labelled pixels, or series, of a class
LABELS = ("few", "all")
HELD_BACK = 4  # of so many windows to learn from one chooses rates

_WHOLE, _PARTS = (1e-3, 3e-3), (3e-3, 1e-2)
_ALL_LINEAR = {"target_modules": "all-linear", "exclude_modules": ["mixer"]}
_BESIDE_MLP = {"r": 8, "parallel": True, "target_modules": ["mlp"]}


def _kept(*names: str) -> dict[str, Any]:
    return {"modules_to_save": ["mixer", *names]}


SCRATCH = Side("scratch", "full", _WHOLE, color="#9aa5b1")
PROBE = Side("head", "full", _PARTS, color="#b58b5a")
SIDES = (
    SCRATCH,
    Side("full", "full", _WHOLE, color="#777777"),
    PROBE,
    Side("tokens", "tsvit-tokens", _PARTS, _kept(), "#8e6bbf"),
    Side("prompts, 2", "tsvit-prompts", _PARTS, _kept("head"), "#d6618f"),
    Side("BitFit", "bitfit", _PARTS, {"new_biases": ["qkv"], **_kept()}, "#f2a541"),
    Side("LoRA, r = 4", "lora", _PARTS, {"r": 4, "lora_alpha": 4, **_ALL_LINEAR, **_kept()}, "#4c78a8"),
    Side("AdaptFormer, 8", "bottleneck", _PARTS, {**_BESIDE_MLP, **_kept("class_tokens", "head")}, "#2e8b57"),
    Side("AdaptFormer, 8, drawn", "bottleneck", _PARTS,
         {"stochastic": True, **_BESIDE_MLP, **_kept("class_tokens", "head")}, "#7fbf7b"),
)  # fmt: skip


# ---------------------------------------------------------------------------- a run


def untrained(found: Sequence[Place], seed: int) -> tuple[TSViT, CropTask]:
    """A model for places' windows, classes and bands, and the task."""
    set_seed(seed)
    images, reading = found[0].learn[0]["images"], found[0].reading
    size = images.shape[-1]
    average, deviation = statistics([scene for place in found for scene in place.scenes], reading)
    reading = replace(reading, mean=tuple(average), std=tuple(deviation))
    model = TSViT(len(reading.classes), size, min(size, 2), images.shape[1], **WIDTH)
    return with_statistics(model, reading), CropTask(model, reading)


def labelled(examples: Sequence[Example]) -> list[Example]:
    """Those that have a label."""
    return [each for each in examples if (each["labels"] != UNLABELLED).any()]


def pretrained(name: str, folder: Path, seed: int) -> tuple[TSViT, Entry]:
    """The model of all other places, both halves, and how it did where it was trained."""
    before, _ = places(name, folder)
    model, task = untrained(before, seed)
    examples = labelled([each for place in before for each in (*place.learn, *place.test)])
    seconds = fit(model, task, examples, PRETRAINING_RATE, STEPS["pre"], seed, f"{name}, before")
    seen = score(model, task, examples)
    return model, {"kind": "before", "set": name, "seed": seed, "train_s": seconds, "accuracy": seen["accuracy"]}


def begin(side: Side, base: TSViT, place: Place, seed: int) -> tuple[Any, CropTask]:
    """What a side trains: a copy of the base with a new layer over its classes, or a model that begins anew."""
    if side is SCRATCH:
        model, task = untrained([place], seed)
    else:
        set_seed(seed)
        reading = replace(place.reading, head="head")
        model = with_classes(copy.deepcopy(base), reading)
        task = CropTask(model, reading)
    if side is PROBE:
        model.requires_grad_(False)
        assert model.mixer is not None
        for part in (model.mixer, model.head.pixels):
            part.requires_grad_(True)
    return add_adapter(model, side.record, dict(side.options)), task


def settings(examples: Sequence[Example], rate: float, steps: int, seed: int) -> TrainingConfig:
    """How all trains."""
    return TrainingConfig(
        max_steps=steps, batch_size=min(BATCH, len(examples)), learning_rate=rate, schedule="cosine", warmup_ratio=0.1,
        seed=seed, log_every=100,
    )  # fmt: skip


def fit(
    model: Any, task: CropTask, examples: Sequence[Example], rate: float, steps: int, seed: int, label: str
) -> float:
    """Trains in place; seconds."""
    task.flips = True
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as output:
        train(model, examples, settings(examples, rate, steps, seed), output, task=task, resume=False, label=label)
    return time.perf_counter() - start


@torch.no_grad()
def score(model: Any, task: CropTask, examples: Sequence[Example]) -> Entry:
    """Loss, and metrics from pooled counts, over all labelled pixels."""
    model.eval()
    counts = torch.zeros(len(task.reading.classes), len(task.reading.classes), dtype=torch.int64)
    loss = 0.0
    for batch in Batches(examples, BATCH, task.collate, shuffle=False).epoch(0):
        output = task.output(model, batch)
        loss += float(output.loss) * task.predictions(batch)
        counts += task.counts(batch, output)
    return {"loss": loss / int(counts.sum()), **task.metrics(counts), "counts": counts.tolist()}


def run(side: Side, name: str, labels: str, base: TSViT, folder: Path, seed: int, rate: float, *, whole: bool) -> Entry:
    """Trains and measures.

    Args:
        whole: from all windows to learn from, measured on the test half; else from three in four of them, measured on
            the fourth.
    """
    _, place = places(name, folder)
    learn, tuning = labelled(place.learn), []
    if not whole:
        tuning = learn[HELD_BACK - 1 :: HELD_BACK]
        learn = [each for i, each in enumerate(learn, 1) if i % HELD_BACK]
    examples = few_labels(learn, FEW, seed) if labels == "few" else learn
    model, task = begin(side, base, place, seed)
    found: Entry = {
        "kind": "run" if whole else "try", "set": title(name, labels), "side": side.name, "seed": seed, "rate": rate,
        "steps": STEPS["adapt"], "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "whole": sum(p.numel() for p in base.parameters()),
    }  # fmt: skip
    try:
        found["train_s"] = fit(model, task, examples, rate, STEPS["adapt"], seed, f"{found['set']}, {side.name}")
    except Diverged as error:
        return found | {"diverged": error.step}
    if whole:
        return found | score(model, task, place.test)
    seen = score(model, task, tuning)
    return found | {"tuning_loss": seen["loss"], "tuning_accuracy": seen["accuracy"]}


def title(name: str, labels: str) -> str:
    """What runs of a set are under."""
    return f"{name}, {labels} labels"


# ---------------------------------------------------------------------------- costs


def measure(folder: Path, path: Path) -> None:
    """Seconds of a step, sides in turn in one process, and peak memory, each side in a process of its own."""
    found: dict[str, Any] = {"about": about(), "threads": torch.get_num_threads(), "step": {}}
    for name in SETS:
        found["step"][name] = alternate({side.name: stepper(side, name, folder) for side in SIDES}, 9)
    found["peak_mb"] = cost.peaks(
        "bench.evidence.crops", [(name, side.name) for name in SETS for side in SIDES], folder
    )
    write_json(path, found)


def _to_measure(side: Side, name: str, folder: Path) -> tuple[Any, CropTask, list[Example]]:
    """What a side trains, from a base without training: what a step costs does not depend on what was learnt."""
    before, place = places(name, folder)
    base, _ = untrained(before, 0)
    return *begin(side, base, place, 0), labelled(place.learn)


def stepper(side: Side, name: str, folder: Path) -> Callable[[], None]:
    """A function that takes a training step from all labels: a batch drawn by chance, the update, what is between."""
    model, task, examples = _to_measure(side, name, folder)
    task.flips = True
    training = settings(examples, side.rates[0], 100, 0)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=training.learning_rate)
    batches = itertools.cycle(Batches(examples, training.batch_size, task.collate, draw=task.draw).epoch(0))
    model.train()

    def step() -> None:
        task.output(model, next(batches)).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peak(side: Side, name: str, folder: Path) -> float:
    """The most memory that this process holds in two steps, in MB."""
    model, task, examples = _to_measure(side, name, folder)
    return cost.most_held(lambda: fit(model, task, examples, side.rates[0], 2, 0, side.name))


# ---------------------------------------------------------------------------- the command


def jobs(seed: int) -> Iterator[tuple[Side, str, float | None]]:
    """Of a set: with the first seed all tries; all runs, whose rate is the best one's."""
    if seed == SEEDS[0]:
        yield from ((side, labels, rate) for side in SIDES for labels in LABELS for rate in side.rates)
    yield from ((side, labels, None) for side in SIDES for labels in LABELS)


def run_all(results: Results, folder: Path, only: Sequence[str], minutes: float) -> None:
    """Adds what is missing; a seed is there for every set before the next."""
    start = time.monotonic()
    if not results.find(kind="about"):
        results.add({"kind": "about", **about()})
    for seed, name in itertools.product(SEEDS, only):
        base = None  # one for all runs of a set and seed, made for the first that is missing
        for side, labels, tried in jobs(seed):
            key = {"kind": "run" if tried is None else "try", "set": title(name, labels), "side": side.name}
            if results.find(**key, seed=seed, **({} if tried is None else {"rate": tried})):
                continue
            if time.monotonic() - start > 60 * minutes:
                return
            if base is None:
                base, entry = pretrained(name, folder, seed)
                if not results.find(kind="before", set=name, seed=seed):
                    results.add(entry)
            rate = results.best_rate(side, title(name, labels)) if tried is None else tried
            try:
                results.add(run(side, name, labels, base, folder, seed, rate, whole=tried is None))
            except Exception:  # the others are worth having
                _log.exception("%s, %s, seed %d, rate %g", title(name, labels), side.name, seed, rate)


def main() -> None:
    """The command."""
    args = parser_of("crops", __doc__, SETS).parse_args()
    torch.set_num_threads(1)
    if args.peak_of:
        name, wanted = args.peak_of.split("/")
        print(peak(next(side for side in SIDES if side.name == wanted), name, args.data))
    elif args.cost:
        measure(args.data, args.results / "crops_cost.json")
    else:
        run_all(Results(args.results / "crops.jsonl"), args.data, args.only, args.minutes)


if __name__ == "__main__":
    main()
