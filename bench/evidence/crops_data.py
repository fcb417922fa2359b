"""What `bench.evidence.crops` reads: places and years, each in a half to learn from and a half to test."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from deftcore.methods.tsvit.reading import Reading, windows
from deftcore.methods.tsvit.scene import UNLABELLED, Scene
from deftcore.methods.tsvit.series import scene_of
from deftcore.methods.tsvit.tiling import tiles

Example = dict[str, torch.Tensor]


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


SETS = ("belgium, patch 1", "belgium, patch 2", "france, 2022")
CROPS = {"winter cereals": (1110, 1500, 1510, 1910), "maize": (1200,), "grass": (9120,),
         "others": (2130, 5100, 7900, 8100)}  # fmt: skip
PATCHES = ("patch0_10m", "patch1_10m", "patch2_20m")
COMMON = ["B05", "B06", "B07", "B8A", "B11", "B12"]  # that all three patches have


def belgian(folder: Path, number: int, window: int = 16) -> Place:
    """A patch: monthly means of what no cloud hides, on the grid of 10 m; windows in turn to learn from and to test."""
    stored = np.load(folder / "worldcereal_patches" / f"{PATCHES[number]}.npz")
    labels = stored["ct_10m" if "ct_10m" in stored else "ct"]
    bands = [stored["bands"].tolist().index(name) for name in COMMON]
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


def french(folder: Path, name: str) -> Place:
    """A year's series of single pixels; half of them, drawn by chance, to learn from."""
    stored = np.load(folder / "france_crop_series" / f"{name}.npz")
    classes = stored["classes"].tolist()
    reading = Reading(scale=1e-4, nodata=65535, classes=tuple(classes))
    scene = scene_of({
        "images": stored["series"].transpose(1, 2, 0)[:, :, None], "doy": stored["doy"].astype(np.int64),
        "labels": stored["label"][None].astype(np.int64),
    })  # fmt: skip
    found = windows(scene, reading, 1)
    order = np.random.default_rng(0).permutation(len(found)).tolist()
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


def places(name: str, folder: Path) -> tuple[list[Place], Place]:
    """What a model of `SETS` is trained on before, and what is adapted to."""
    if name.startswith("belgium"):
        target = int(name[-1])
        return [belgian(folder, i) for i in range(len(PATCHES)) if i != target], belgian(folder, target)
    return [french(folder, "dekad_2023")], french(folder, "month_2022")
