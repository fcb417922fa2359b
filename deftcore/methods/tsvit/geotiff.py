"""GeoTIFFs by rasterio (`deftcore[maps]`): a folder of frames as a scene, and maps.

A folder holds a file per date, which its name says (`2020-05-17`, `20200517`, or a month, `2020-05`), with all bands
and on one grid; where there are, `labels.tif` (codes), and in `cloud/` a file per date (not 0: not to be used).
"""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deftcore._files import replacing_file
from deftcore.methods.tsvit.scene import UNLABELLED, Grid, Scene, day_of
from deftcore.training.pictures import class_colours

_DATE = re.compile(r"(?<!\d)(\d{4})-?(\d{2})(?:-?(\d{2}))?(?!\d)")
_LABELS, _CLOUD = "labels", "cloud"
_ENDINGS = (".tif", ".tiff")  # however they are spelt


def _rasterio() -> Any:
    try:
        import rasterio
    except ImportError as error:
        raise ImportError("GeoTIFFs need rasterio: pip install 'deftcore[maps]'") from error
    return rasterio


@contextmanager
def opened(path: Path, *mode: str, **options: Any) -> Iterator[Any]:
    """A raster of rasterio's; one without a place on Earth is as welcome as any.

    Raises:
        ValueError: naming a file that cannot be read.
    """
    rasterio = _rasterio()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        try:
            raster = rasterio.open(path, *mode, **options)
        except rasterio.errors.RasterioIOError as error:
            raise ValueError(f"data: {path} is no raster that can be opened: {error}") from error
        with raster:
            yield raster


def read_folder(path: Path) -> Scene:
    """The scene of a folder, frames in the order of their dates; values are read where they are asked for.

    Raises:
        ValueError: naming the file: frames without dates, of one date, of other bands or on another grid; no frames.
    """
    frames = _dated(path)
    if not frames:
        raise ValueError(f"data: {path} has no GeoTIFF with a date in its name, as 2020-05-17.tif")
    facts = {file: _facts(file) for file in frames.values()}
    first = next(iter(facts))
    for file, each in facts.items():
        for name, of_first, value in (
            ("bands", facts[first].bands, each.bands), ("nodata", str(facts[first].nodata), str(each.nodata)),
        ):  # fmt: skip
            if of_first != value:
                raise ValueError(f"{name}: {file} has {value}, {first} has {of_first}")
        _same_grid(facts[first], first, each, file)
    clouds = _dated(path / _CLOUD)
    if clouds and clouds.keys() != frames.keys():
        odd = sorted(clouds.keys() ^ frames.keys())
        raise ValueError(f"cloud: {path / _CLOUD} must have a file for each date of the frames, differs in {odd[:5]}")
    labels = next((file for file in sorted(path.glob(f"{_LABELS}.*")) if file.suffix.lower() in _ENDINGS), None)
    for file in (*clouds.values(), *([labels] if labels else [])):
        _same_grid(facts[first], first, _facts(file), file)
    known = facts[first]
    pixels = _Files(tuple(frames.values()), tuple(clouds.values()), labels)
    days = tuple(day_of(date) for date in frames)
    return Scene(
        str(path), pixels, known.height, known.width, days, known.bands, known.nodata, known.grid,
        labelled=labels is not None,
    )  # fmt: skip


def _dated(folder: Path) -> dict[str, Path]:
    """The rasters of a folder by date, in the order of dates."""
    found: dict[str, Path] = {}
    for file in sorted(file for file in folder.glob("*") if file.suffix.lower() in _ENDINGS):
        if file.stem == _LABELS:
            continue
        match = _DATE.search(file.stem)
        if match is None:
            raise ValueError(f"data: {file} has no date in its name, as 2020-05-17.tif")
        date = "-".join(part for part in match.groups() if part)
        try:
            day_of(date)
        except ValueError as error:
            raise ValueError(f"data: {file}: the date in its name {error}") from error
        if date in found:
            raise ValueError(f"data: {found[date]} and {file} are of one date; a file holds all bands of its date")
        found[date] = file
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class _Facts:
    height: int
    width: int
    bands: tuple[str, ...]
    nodata: float | None
    grid: Grid | None


def _facts(file: Path) -> _Facts:
    with opened(file) as raster:
        names = tuple(name or str(i + 1) for i, name in enumerate(raster.descriptions))
        placed = raster.crs is not None
        grid = Grid(raster.crs.to_wkt(), tuple(raster.transform)[:6]) if placed else None
        return _Facts(raster.height, raster.width, names, raster.nodata, grid)


def _same_grid(a: _Facts, first: Path, b: _Facts, file: Path) -> None:
    if (a.height, a.width, a.grid) != (b.height, b.width, b.grid):
        raise ValueError(
            f"data: {file} ({b.height} x {b.width}) lies on another grid than {first} ({a.height} x {a.width}); "
            "bring all onto one"
        )


@dataclass(frozen=True)
class _Files:
    """Pixels in files, a few rows of which are read at a time."""

    frames: tuple[Path, ...]
    clouds: tuple[Path, ...]
    codes: Path | None

    def images(self, rows: slice, columns: slice) -> np.ndarray:
        return np.stack([_read(file, rows, columns) for file in self.frames])

    def cloud(self, rows: slice, columns: slice) -> np.ndarray | None:
        return np.stack([_read(file, rows, columns)[0] != 0 for file in self.clouds]) if self.clouds else None

    def labels(self, rows: slice, columns: slice) -> np.ndarray | None:
        if self.codes is None:
            return None
        with opened(self.codes) as raster:
            if raster.count != 1 or np.dtype(raster.dtypes[0]).kind not in "ui":
                raise ValueError(
                    f"labels: {self.codes} must be one band of whole numbers, got {raster.count} of {raster.dtypes[0]}"
                )
            codes = _part(raster, rows, columns)[0].astype(np.int64)
            return codes if raster.nodata is None else np.where(codes == raster.nodata, UNLABELLED, codes)


def _ends(part: slice) -> tuple[int, int]:
    return part.start, part.stop


def _read(file: Path, rows: slice, columns: slice) -> np.ndarray:
    with opened(file) as raster:
        return _part(raster, rows, columns)


def _part(raster: Any, rows: slice, columns: slice) -> np.ndarray:
    try:
        return raster.read(window=(_ends(rows), _ends(columns)))
    except _rasterio().errors.RasterioIOError as error:
        raise ValueError(f"data: {raster.name} is damaged: {error}") from error


@contextmanager
def writing_map(
    target: Path, height: int, width: int, grid: Grid | None, classes: Mapping[int, str]
) -> Iterator[Callable[[int, np.ndarray], None]]:
    """A GeoTIFF of class numbers, one band, that rows are written into by `write(top, rows)`, rows [n, width]; it
    appears under its name when it is whole. Where nothing was seen it has `no_class`, its nodata value.

    Args:
        classes: names, which become tags `CLASS_<number>` of the band; colours are those of pictures.
    """
    nodata = no_class(len(classes))
    options: dict[str, Any] = {
        "driver": "GTiff", "height": height, "width": width, "count": 1, "nodata": nodata, "compress": "deflate",
        "dtype": "uint8" if nodata == 255 else "uint16",
    }  # fmt: skip
    rasterio = _rasterio()
    if grid is not None:
        try:
            crs = rasterio.crs.CRS.from_user_input(grid.crs)
        except (rasterio.errors.CRSError, ValueError) as error:
            raise ValueError(f"crs: {grid.crs!r} is no coordinate system: {error}") from error
        options |= {"crs": crs, "transform": rasterio.Affine(*grid.transform)}
    with replacing_file(target) as partial, opened(partial, "w", **options) as raster:
        raster.set_band_description(1, "class")
        raster.update_tags(1, **{f"CLASS_{number}": name for number, name in classes.items()})
        if nodata == 255:
            colours = (255 * class_colours(len(classes))).round().astype(int)
            raster.write_colormap(1, {number: tuple(colours[number]) for number in classes})

        def write(top: int, rows: np.ndarray) -> None:
            raster.write(rows.astype(options["dtype"]), 1, window=((top, top + len(rows)), (0, width)))

        yield write


def no_class(classes: int) -> int:
    """What a map has where nothing was seen.

    >>> no_class(19), no_class(300)
    (255, 65535)
    """
    return 255 if classes <= 255 else 65535
