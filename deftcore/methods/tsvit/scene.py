"""A scene: one place over time, and how parts of it are read, wherever its values lie."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from deftcore._names import near

UNLABELLED = -100  # in labels, as PyTorch's losses have it
MIDDLE = 15  # the day that stands for a month


@dataclass(frozen=True)
class Grid:
    """Where a raster lies.

    Args:
        crs: its coordinate system, in WKT or as `EPSG:32631`.
        transform: from (column, row) to coordinates: a, b, c, d, e, f of x = a column + b row + c, y = d column + ...
    """

    crs: str
    transform: tuple[float, ...]


class Pixels(Protocol):
    """The values of a scene, read where they are asked for: rows and columns are slices with ends."""

    def images(self, rows: slice, columns: slice) -> np.ndarray:
        """[T, C, h, w], as stored."""

    def cloud(self, rows: slice, columns: slice) -> np.ndarray | None:
        """bool [T, h, w]; None: no clouds are known."""

    def labels(self, rows: slice, columns: slice) -> np.ndarray | None:
        """Codes, [h, w] integers, UNLABELLED where there is none; None: the scene has no labels."""


@dataclass(frozen=True)
class Window:
    """A part of a scene.

    Args:
        images: [T, C, h, w], as stored; anything where not usable.
        usable: bool [T, h, w]: neither cloud nor without data.
        labels: int64 [h, w], codes or UNLABELLED; None without labels.
    """

    images: np.ndarray
    usable: np.ndarray
    labels: np.ndarray | None


@dataclass(frozen=True)
class Scene:
    """One place over time.

    Args:
        where: its file or folder, for messages.
        pixels: its values.
        doy: the day of the year of each frame, 1 to 366.
        bands: names, or "1", "2" ... where it has none.
        nodata: the stored value that is none, in any band; NaN may be one.
    """

    where: str
    pixels: Pixels
    height: int
    width: int
    doy: tuple[int, ...]
    bands: tuple[str, ...]
    nodata: float | None = None
    grid: Grid | None = None
    labelled: bool = False  # whether it has labels
    area: str = ""
    year: int = 0

    def picked(self, bands: Sequence[str | int]) -> list[int]:
        """Places of bands, by name or by number from 1; all of them where none is named.

        Raises:
            ValueError: for a band that the scene does not have.
        """
        found = []
        for band in bands:
            if isinstance(band, int) and not isinstance(band, bool):
                if not 1 <= band <= len(self.bands):
                    raise ValueError(f"bands: {self.where} has bands 1 to {len(self.bands)}, got {band}")
                found.append(band - 1)
            elif band in self.bands:
                found.append(self.bands.index(band))
            else:
                raise ValueError(f"bands: {self.where} has no band {band!r}{near(str(band), self.bands)}")
        return found or list(range(len(self.bands)))

    def read(
        self, rows: slice | None = None, columns: slice | None = None, *, bands: Sequence[str | int] = (),
        nodata: float | None = None,
    ) -> Window:  # fmt: skip
        """A part of the scene, or the whole.

        Args:
            bands: as in `picked`.
            nodata: in place of the scene's own.

        Raises:
            ValueError: a band is unknown; a value is no finite number though nothing says that it is not to be used.
        """
        rows, columns = rows or slice(0, self.height), columns or slice(0, self.width)
        picked, images = self.picked(bands), self.pixels.images(rows, columns)
        if picked != list(range(len(self.bands))):  # which copies
            images = images[:, picked]
        cloud, empty = self.pixels.cloud(rows, columns), self.nodata if nodata is None else nodata
        usable = np.ones((len(images), *images.shape[2:]), bool) if cloud is None else ~cloud
        if empty is not None:
            usable &= ~(np.isnan(images) if np.isnan(empty) else images == empty).any(1)
        if images.dtype.kind == "f":
            wrong = usable & ~np.isfinite(images).all(1)
            if wrong.any():
                frame, row, column = (int(i[0]) for i in np.nonzero(wrong))
                raise ValueError(
                    f"images: {self.where} has NaN or infinity at {int(wrong.sum())} pixels that no mask leaves out, "
                    f"the first in frame {frame} at row {rows.start + row}, column {columns.start + column}; "
                    "give `cloud`, or nodata"
                )
        return Window(images, usable, self.pixels.labels(rows, columns))


def day_of(date: str) -> int:
    """The day of the year of a date; a month stands for its 15th.

    Raises:
        ValueError: there is no such day.

    >>> day_of("2020-05-17"), day_of("2021-05"), day_of("2020-12-31")
    (138, 135, 366)
    """
    text = str(date)
    try:
        return datetime.date.fromisoformat(f"{text}-{MIDDLE}" if len(text) == 7 else text).timetuple().tm_yday
    except ValueError as error:
        raise ValueError(f"must be a day as 2020-05-17 or a month as 2020-05, got {text!r}") from error
