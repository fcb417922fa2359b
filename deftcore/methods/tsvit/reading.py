"""How a model reads scenes: bands, units, codes of classes. It stands beside a saved model, as `series.json`."""

import dataclasses
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from deftcore._files import read_record, write_json
from deftcore.methods.tsvit.adapting import MODES
from deftcore.methods.tsvit.scene import UNLABELLED, Scene, Window
from deftcore.methods.tsvit.tiling import tiles
from deftcore.training.fields import OPTIONS, Integer, Number, Positive, Real, Text, one_of, record_of

READING_FILE = "series.json"


@dataclass(frozen=True, config=OPTIONS)
class Reading:
    """What of a scene becomes a model's input and labels.

    Args:
        bands: by name, or number from 1, in the model's order; none: all.
        scale: what stored values are multiplied with, 1e-4 for reflectances that are stored as whole numbers.
        nodata: the stored value that is none; None: the scene's own.
        classes: names.
        codes: of each class the codes in labels; empty: codes are the classes' numbers. Any other code is unlabelled.
        unlabelled: codes that are none, where `codes` is empty.
        masked: whether patches with a cloud or without data are left out; False reads everything, as the authors do.
        mean, std: of each band in the model's units; empty: the model's own.
        head: how the classes were made of a base model's, where an adapter stands beside it.

    Raises ValueError, naming the field, on a value out of range.
    """

    bands: tuple[Integer | Text, ...] = ()
    scale: Positive = 1.0
    nodata: Real | None = None
    classes: tuple[Text, ...] = ()
    codes: tuple[tuple[Integer, ...], ...] = ()
    unlabelled: tuple[Integer, ...] = ()
    masked: bool = True
    mean: tuple[Number, ...] = ()
    std: tuple[Positive, ...] = ()
    head: Annotated[Text, one_of("", *MODES)] = ""

    def __post_init__(self) -> None:
        if len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes: each must have a name of its own, got {self.classes}")
        if self.codes and len(self.codes) != len(self.classes):
            raise ValueError(f"codes: must be those of {len(self.classes)} classes, got {len(self.codes)}")
        if len(self.mean) != len(self.std):
            raise ValueError(f"std: must be as many as mean's {len(self.mean)}, got {len(self.std)}")

    def check(self, scene: Scene, channels: int) -> None:
        """Raises ValueError for a scene that has not the bands that the model takes."""
        picked = scene.picked(self.bands)
        if len(picked) != channels:
            names = ", ".join(scene.bands[i] for i in picked)
            raise ValueError(
                f"bands: {scene.where}: the model takes {channels}, got {len(picked)} ({names}); name those it takes"
            )

    def window(self, scene: Scene, rows: slice | None = None, columns: slice | None = None) -> Window:
        """A part of a scene, or the whole; raises as `Scene.read`."""
        return scene.read(rows, columns, bands=self.bands, nodata=self.nodata)

    def numbers(self, images: Tensor, usable: Tensor) -> Tensor:
        """float32 [..., C, h, w] of stored values; 0 where they are not usable and no finite number.

        Args:
            images: [..., C, h, w].
            usable: bool [..., h, w].
        """
        x = images.float() * self.scale
        return x.masked_fill(~usable.unsqueeze(-3) & ~x.isfinite(), 0.0)

    def targets(self, labels: np.ndarray, where: str = "labels") -> np.ndarray:
        """Numbers of classes, int64, UNLABELLED where there is none.

        Raises:
            ValueError: codes are the numbers themselves, and one is no class.
        """
        if self.codes:
            found = np.full(labels.shape, UNLABELLED, np.int64)
            for number, codes in enumerate(self.codes):
                found[np.isin(labels, codes)] = number
            return found
        found = np.where(np.isin(labels, [*self.unlabelled, UNLABELLED]), UNLABELLED, labels)
        wrong = np.unique(found[(found != UNLABELLED) & ((found < 0) | (found >= len(self.classes)))])
        if wrong.size:
            raise ValueError(
                f"labels: {where}: must be classes from 0 to {len(self.classes) - 1}, got {wrong[:5].tolist()}; "
                "say what codes mean in data.classes, or that they are no label in data.unlabelled"
            )
        return found

    def save(self, folder: str | os.PathLike) -> None:
        """Writes it beside a model."""
        write_json(Path(folder) / READING_FILE, dataclasses.asdict(self))

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Reading | None":
        """What `save` wrote; None where it wrote nothing.

        Raises:
            ValueError: the file is damaged.
        """
        return read_record(folder, READING_FILE, partial(record_of, cls))


def statistics(scenes: Sequence[Scene], reading: Reading) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each band over all usable pixels and frames, in float64.

    Raises:
        ValueError: no pixel is usable, or a band is the same everywhere.
    """
    count, mean, squares = 0, np.zeros(1), np.zeros(1)
    for scene in scenes:
        whole = reading.window(scene)
        for image, usable in zip(whole.images, whole.usable, strict=True):
            values = image[:, usable].astype(np.float64) * reading.scale  # [C, pixels]
            if not values.size:
                continue
            here, total = values.mean(1), count + values.shape[1]
            shift = here - mean
            squares = squares + ((values - here[:, None]) ** 2).sum(1) + shift**2 * (count * values.shape[1] / total)
            mean, count = mean + shift * (values.shape[1] / total), total
    if not count:
        raise ValueError("data: no pixel of the scenes is usable: all are clouds or without data")
    deviation = np.sqrt(squares / count)
    if not (deviation > 0).all():
        band = int(np.argmin(deviation)) + 1
        raise ValueError(f"data: band {band} is the same everywhere, nothing can be learnt from it; give mean and std")
    return mean.tolist(), deviation.tolist()


def windows(
    scene: Scene, reading: Reading, size: int, overlap: int = 0, *, once: bool = False
) -> list[dict[str, Tensor]]:
    """The square windows of a scene as examples: images [T, C, h, w] as stored, usable bool [T, h, w], doy [T],
    labels [h, w]. Images share the scene's memory. Every pixel is in one; those of the last row and column of windows
    may be in more, where the size does not divide the scene's.

    Args:
        once: whether a pixel has its label in the first of its windows alone, so that counts are those of the scene.

    Raises:
        ValueError: the scene has no labels, or is smaller than a window.
    """
    if not scene.labelled:
        raise ValueError(f"labels: {scene.where} has none")
    if size > min(scene.height, scene.width):
        raise ValueError(
            f"data: {scene.where} is {scene.height} x {scene.width} pixels, smaller than windows of {size}"
        )
    whole = reading.window(scene)
    assert whole.labels is not None  # `labelled` says so
    images, usable = torch.from_numpy(whole.images), torch.from_numpy(whole.usable)
    labels, doy = torch.from_numpy(reading.targets(whole.labels, scene.where)), torch.tensor(scene.doy)
    found, seen = [], torch.zeros_like(labels, dtype=torch.bool)
    for top, left in tiles(scene.height, scene.width, size, overlap):
        part = (..., slice(top, top + size), slice(left, left + size))
        known = labels[part].masked_fill(seen[part], UNLABELLED) if once else labels[part]
        seen[part] = True
        found.append({"images": images[part], "usable": usable[part], "doy": doy, "labels": known})
    return found


def usable_patches(usable: Tensor, patch_size: int) -> Tensor:
    """bool [..., n^2]: patches, row by row, all of whose pixels are usable.

    Args:
        usable: bool [..., H, W].
    """
    rows, columns = usable.shape[-2] // patch_size, usable.shape[-1] // patch_size
    parts = usable.unflatten(-1, (columns, patch_size)).unflatten(-3, (rows, patch_size))  # [..., n, p, n, p]
    return parts.all(-1).all(-2).flatten(-2)
