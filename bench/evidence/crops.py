"""TSViT on other fields than it was trained on: `python -m bench.evidence.crops --data FOLDER`.

FOLDER holds `worldcereal_patches` and `france_crop_series`. A small TSViT is trained from nothing on all places or
years but one, and then adapted to that one in each way, from few labels and from all. Every run is a line of
results/crops.jsonl, so that a second call goes on where the first one stopped; `--minutes` stops it in time. `--table`
prints what there is.
"""

import argparse
import copy
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed

from bench.evidence.runs import Entry, Results, about
from bench.markdown import table
from deftcore.methods.tsvit.model import TSViT
from deftcore.methods.tsvit.predicting import with_classes, with_statistics
from deftcore.methods.tsvit.reading import Reading, statistics, windows
from deftcore.methods.tsvit.scene import UNLABELLED, Scene
from deftcore.methods.tsvit.series import scene_of
from deftcore.methods.tsvit.task import CropTask
from deftcore.methods.tsvit.tiling import tiles
from deftcore.training import TrainingConfig, train
from deftcore.training.task import Batches
from deftcore.training.wrapping import add_adapter

_log = logging.getLogger(__name__)
RESULTS = Path(__file__).parent / "results" / "crops.jsonl"
SEEDS = (0, 1, 2)
WIDTH: dict[str, Any] = {"dim": 48, "heads": 4, "dim_head": 12, "temporal_depth": 2, "spatial_depth": 2}
STEPS = {"pre": 400, "adapt": 150}
RATES = {"full": 1e-3, "adapter": 3e-3}
FEW = 30  # labelled pixels, or series, of a class
Example = dict[str, torch.Tensor]


# ---------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Place:
    """Examples of one place or year.

    Args:
        scenes: what the bands' statistics are of.
        learn, test: halves of it, that share no window or series.
    """

    reading: Reading
    scenes: Sequence[Scene]
    learn: list[Example]
    test: list[Example]


CROPS = {"winter cereals": (1110, 1500, 1510, 1910), "maize": (1200,), "grass": (9120,),
         "others": (2130, 5100, 7900, 8100)}  # fmt: skip
_PATCHES = ("patch0_10m", "patch1_10m", "patch2_20m")
_COMMON = ["B05", "B06", "B07", "B8A", "B11", "B12"]  # that all three patches have


def belgian(folder: Path, number: int, window: int = 16) -> Place:
    """A patch: monthly means of what no cloud hides, on the grid of 10 m; windows in turn to learn from and to test."""
    stored = np.load(folder / "worldcereal_patches" / f"{_PATCHES[number]}.npz")
    labels = stored["ct_10m" if "ct_10m" in stored else "ct"]
    bands = [stored["bands"].tolist().index(name) for name in _COMMON]
    images, cloud = stored["images"][:, bands], stored["cloud"]
    times = len(labels) // images.shape[-1]
    images = images.repeat(times, 2).repeat(times, 3)
    cloud = cloud.repeat(len(labels) // cloud.shape[-1], 1).repeat(len(labels) // cloud.shape[-1], 2)
    images, cloud, months = monthly(images, cloud | (images == 0).any(1), stored["dates"])
    scene = scene_of({"images": images, "cloud": cloud, "dates": months, "labels": labels.astype(np.int64)})
    reading = Reading(scale=1e-4, classes=tuple(CROPS), codes=tuple(CROPS.values()))
    squares = tiles(scene.height, scene.width, window)
    found = windows(scene, reading, window)
    even = [(top // window + left // window) % 2 == 0 for top, left in squares]
    return Place(
        reading, [scene], [w for w, e in zip(found, even, strict=True) if e],
        [w for w, e in zip(found, even, strict=True) if not e],
    )  # fmt: skip


def monthly(images: np.ndarray, cloud: np.ndarray, dates: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means of each month over frames without cloud, where none is left a cloud, and the months.

    Args:
        images: [T, C, H, W].
        cloud: bool [T, H, W].
        dates: [T], as 2020-05-17.
    """
    months = np.array([date[:7] for date in dates.tolist()])
    names = np.unique(months)
    composed = np.zeros((len(names), *images.shape[1:]), np.float32)
    hidden = np.ones((len(names), *cloud.shape[1:]), bool)
    for i, name in enumerate(names):
        own = months == name
        clear = ~cloud[own]
        count = clear.sum(0)
        sums = (images[own].astype(np.float64) * clear[:, None]).sum(0)
        composed[i], hidden[i] = sums / np.maximum(count, 1), count == 0
    return composed, hidden, names


def french(folder: Path, name: str, seed: int) -> Place:
    """A year's series of single pixels; half of them, drawn by the seed, to learn from."""
    stored = np.load(folder / "france_crop_series" / f"{name}.npz")
    classes = stored["classes"].tolist()
    reading = Reading(scale=1e-4, nodata=65535, classes=tuple(classes))
    scene = scene_of({
        "images": stored["series"].transpose(1, 2, 0)[:, :, None], "doy": stored["doy"].astype(np.int64),
        "labels": stored["label"][None].astype(np.int64),
    })  # fmt: skip
    found = windows(scene, reading, 1)
    order = np.random.default_rng(seed).permutation(len(found)).tolist()
    half = len(found) // 2
    return Place(reading, [scene], [found[i] for i in order[:half]], [found[i] for i in order[half:]])


def few_labels(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """The same examples with at most so many labelled pixels of each class, drawn by the seed."""
    labels = torch.stack([each["labels"] for each in examples])
    kept = torch.full_like(labels, UNLABELLED)
    generator = torch.Generator().manual_seed(seed)
    for number in labels.unique().tolist():
        if number == UNLABELLED:
            continue
        places = (labels.view(-1) == number).nonzero().flatten()
        chosen = places[torch.randperm(len(places), generator=generator)[:count]]
        kept.view(-1)[chosen] = number
    found = [dict(each, labels=own) for each, own in zip(examples, kept, strict=True)]
    return [each for each in found if (each["labels"] != UNLABELLED).any()]


# ---------------------------------------------------------------------------- sides


def _adapter(method: str, *also: str, **options: Any) -> Callable[[TSViT], Any]:
    return lambda model: add_adapter(model, method, options | {"modules_to_save": ["mixer", *also]})


def _head(model: TSViT) -> TSViT:
    model.requires_grad_(False)
    assert model.mixer is not None
    for part in (model.mixer, model.head.pixels):
        part.requires_grad_(True)
    return model


# The name, whether it starts from the trained model, and what of it trains.
SIDES: dict[str, tuple[bool, Callable[[TSViT], Any]]] = {
    "scratch": (False, lambda model: model),
    "full": (True, lambda model: model),
    "head": (True, _head),
    "BitFit": (True, _adapter("bitfit", new_biases=["qkv"])),
    "LoRA, r = 4": (True, _adapter("lora", r=4, lora_alpha=4, target_modules="all-linear", exclude_modules=["mixer"])),
    "AdaptFormer, 8": (
        True, _adapter("bottleneck", "class_tokens", "head", r=8, parallel=True, target_modules=["mlp"])
    ),
}  # fmt: skip
SETS = ("belgium, patch 1", "belgium, patch 2", "france, 2022")
LABELS = ("few", "all")


def places(name: str, folder: Path, seed: int) -> tuple[list[Place], Place]:
    """What a set is trained on before, and what is adapted to."""
    if name.startswith("belgium"):
        target = int(name[-1])
        return [belgian(folder, i) for i in range(3) if i != target], belgian(folder, target)
    return [french(folder, "dekad_2023", seed)], french(folder, "month_2022", seed)


def fresh(place: Place, seed: int) -> TSViT:
    """A model without training for a place's windows and classes."""
    set_seed(seed)
    size = place.learn[0]["images"].shape[-1]
    return TSViT(len(place.reading.classes), size, min(size, 2), place.learn[0]["images"].shape[1], **WIDTH)


def fit(model: Any, task: CropTask, examples: list[Example], rate: float, steps: int, seed: int, label: str) -> float:
    """Trains in place; seconds."""
    task.flips = True
    config = TrainingConfig(
        max_steps=steps, batch_size=min(16, len(examples)), learning_rate=rate, schedule="cosine", warmup_ratio=0.1,
        seed=seed, log_every=100,
    )  # fmt: skip
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as output:
        train(model, examples, config, output, task=task, resume=False, label=label)
    return time.perf_counter() - start


@torch.no_grad()
def score(model: Any, task: CropTask, examples: list[Example]) -> Entry:
    """Metrics over a place's test half, from pooled counts."""
    model.eval()
    counts = torch.zeros(len(task.reading.classes), len(task.reading.classes), dtype=torch.int64)
    for batch in Batches(examples, 16, task.collate, shuffle=False).epoch(0):
        counts += task.counts(batch, task.output(model, batch))
    return {**task.metrics(counts), "counts": counts.tolist()}


def pretrained(name: str, folder: Path, seed: int) -> tuple[TSViT, Entry]:
    """The model of all other places, both halves, and how it did where it was trained."""
    before, _ = places(name, folder, seed)
    model = fresh(before[0], seed)
    reading = before[0].reading
    average, deviation = statistics([scene for place in before for scene in place.scenes], reading)
    model = with_statistics(model, replace(reading, mean=tuple(average), std=tuple(deviation)))
    examples = [each for place in before for each in (*place.learn, *place.test)]
    examples = [each for each in examples if (each["labels"] != UNLABELLED).any()]
    task = CropTask(model, reading)
    seconds = fit(model, task, examples, RATES["full"], STEPS["pre"], seed, f"{name}, before")
    seen = score(model, task, examples)
    return model, {"kind": "before", "set": name, "seed": seed, "train_s": seconds, "accuracy": seen["accuracy"]}


def run(name: str, side: str, labels: str, base: TSViT, folder: Path, seed: int) -> Entry:
    """Adapts a copy of the base, or begins anew, and measures."""
    _, place = places(name, folder, seed)
    goes_on, wrap = SIDES[side]
    reading = replace(place.reading, head="head" if goes_on else "")
    set_seed(seed)
    if goes_on:
        model = with_classes(copy.deepcopy(base), reading)
    else:
        average, deviation = statistics(place.scenes, place.reading)
        model = with_statistics(fresh(place, seed), replace(reading, mean=tuple(average), std=tuple(deviation)))
    task = CropTask(model, reading)
    adapted = wrap(model)
    known = [each for each in place.learn if (each["labels"] != UNLABELLED).any()]
    examples = few_labels(known, FEW, seed) if labels == "few" else known
    rate = RATES["full" if side in ("scratch", "full") else "adapter"]
    seconds = fit(adapted, task, examples, rate, STEPS["adapt"], seed, f"{name}, {side}, {labels}")
    return {
        "kind": "run", "set": name, "side": side, "labels": labels, "seed": seed, "rate": rate,
        "trained": sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        "whole": sum(p.numel() for p in base.parameters()), "train_s": seconds, **score(adapted, task, place.test),
    }  # fmt: skip


# ---------------------------------------------------------------------------- the command


def jobs() -> Iterator[tuple[str, int]]:
    """Trained models, whose runs go together."""
    yield from ((name, seed) for seed in SEEDS for name in SETS)


def run_all(results: Results, folder: Path, only: Sequence[str], minutes: float) -> None:
    """Adds the runs that are missing."""
    torch.set_num_threads(1)
    start = time.monotonic()
    if not results.find(kind="about"):
        results.add({"kind": "about", **about()})
    for name, seed in jobs():
        missing = [
            (side, labels) for labels in LABELS for side in SIDES
            if not results.find(kind="run", set=name, side=side, labels=labels, seed=seed)
        ]  # fmt: skip
        if name not in only or not missing or time.monotonic() - start > 60 * minutes:
            continue
        base, entry = pretrained(name, folder, seed)
        if not results.find(kind="before", set=name, seed=seed):
            results.add(entry)
        for side, labels in missing:
            if time.monotonic() - start > 60 * minutes:
                break
            results.add(run(name, side, labels, base, folder, seed))


def print_table(results: Results) -> None:
    """Prints a table per set: mean over seeds, and in brackets lowest and highest."""
    for name in SETS:
        rows = []
        for side in SIDES:
            cells = []
            for labels in LABELS:
                own = results.find(kind="run", set=name, side=side, labels=labels)
                cells += [_cell(own, "accuracy"), _cell(own, "macro_f1")]
            own = results.find(kind="run", set=name, side=side)
            if own:
                share = own[0]["trained"] / own[0]["whole"]
                rows.append([side, f"{own[0]['trained']:,}", f"{share:.1%}", *cells])
        if rows:
            print(f"\n{name}\n")
            print(table(["", "trained", "share", "few: accuracy", "macro F1", "all: accuracy", "macro F1"], rows))


def _cell(entries: Sequence[Entry], key: str) -> str:
    values = [each[key] for each in entries if np.isfinite(each[key])]
    if len(values) < 2:
        return "".join(f"{value:.1%}" for value in values)
    return f"{mean(values):.1%} ({min(values):.1%} to {max(values):.1%})"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.evidence.crops", description=__doc__)
    parser.add_argument("--data", type=Path, help="the folder of data sets")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file of results")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    parser.add_argument("--only", nargs="+", choices=SETS, default=SETS, help="of these sets")
    parser.add_argument("--table", action="store_true", help="print what the results say, and do nothing else")
    args = parser.parse_args()
    if args.table:
        print_table(Results(args.results))
    elif args.data is None:
        parser.error("--data: is needed")
    else:
        run_all(Results(args.results), args.data, args.only, args.minutes)


if __name__ == "__main__":
    main()
