"""Satellite image time series as they lie on disk: arrays in an .npz, a folder of GeoTIFFs, a list of either.

An .npz holds `images` [T, C, H, W] and one of `dates` (text or datetime64, `2020-05-17`, or a month, `2020-05`), `doy`
(days of the year) and `months` (1 to 12), each [T]; where there are, `cloud` [T, H, W] or [T] (true: not to be used),
`labels` [H, W] (codes), `labelled` [H, W] (false: no label), `bands` [C] (names), `nodata`, `crs` and `transform` (six
numbers). A folder holds a GeoTIFF per date, see `geotiff.py`. A list, .jsonl, has a line per scene with its `series`, a
path from the list's own folder, and what splits go by: `area` and `year`.
"""

import os
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from deftcore._names import near
from deftcore.methods.tsvit.geotiff import read_folder
from deftcore.methods.tsvit.scene import UNLABELLED, Grid, Scene, day_of
from deftcore.training.arrays import as_text
from deftcore.training.records import read_records

_ARRAYS = ("images", "dates", "doy", "months", "cloud", "labels", "labelled", "bands", "nodata", "crs", "transform")
_FIELDS = ("series", "area", "year")


def read_scenes(path: str | os.PathLike) -> list[Scene]:
    """The scenes of a path: of an .npz or a folder one, of a list all.

    Raises:
        FileNotFoundError, ValueError: naming the file, its line or array, and what it takes.
    """
    path = Path(path)
    if path.suffix.lower() != ".jsonl":
        return [read_scene(path)]
    found = []
    for record in read_records(path):
        for name in record:
            if name not in _FIELDS:
                raise ValueError(f"data: {record.where}: no field {name!r}{near(name, _FIELDS)}")
        series, area, year = record.get("series"), record.get("area", ""), record.get("year", 0)
        if not isinstance(series, str) or not isinstance(area, str) or type(year) is not int:
            raise ValueError(
                f"data: {record.where}: must be a path `series`, where there are a text `area` and a whole number "
                f"`year`, got {dict(record)}"
            )
        found.append(replace(read_scene(path.parent / series), area=area, year=year))
    return found


def read_scene(path: str | os.PathLike) -> Scene:
    """The scene of an .npz or a folder; raises as `read_scenes`."""
    path = Path(path)
    if path.is_dir():
        return read_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"data: no such file or folder: {path}")
    if path.suffix.lower() != ".npz":
        raise ValueError(f"data: {path} must be an .npz or a folder of GeoTIFFs, or to train on a list of such, .jsonl")
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"data: {path} is no .npz of plain arrays: {error}") from error
    return scene_of(arrays, str(path))


def scene_of(arrays: dict[str, Any], where: str = "series") -> Scene:
    """The scene of arrays as an .npz has them.

    Raises:
        ValueError: naming the array.
    """
    for name in arrays:
        if name not in _ARRAYS:
            raise ValueError(f"data: {where}: no array {name!r} is known{near(name, _ARRAYS)}")
    arrays = {name: _native(as_text(np.asarray(value))) for name, value in arrays.items()}
    if "images" not in arrays or arrays["images"].ndim != 4 or arrays["images"].dtype.kind not in "uif":
        got = f"{arrays['images'].dtype} {arrays['images'].shape}" if "images" in arrays else "none"
        raise ValueError(f"images: {where}: must be numbers [T, C, H, W], got {got}")
    frames, channels, height, width = arrays["images"].shape
    if not arrays["images"].size:
        raise ValueError(f"images: {where}: must not be empty, got {arrays['images'].shape}")
    pixels = _Arrays(arrays["images"], _cloud(arrays, where), _labels(arrays, where))
    bands = tuple(map(str, arrays["bands"].flat)) if "bands" in arrays else tuple(str(i + 1) for i in range(channels))
    if len(bands) != channels or len(set(bands)) < channels:
        raise ValueError(f"bands: {where}: must be {channels} names, each band its own, got {list(bands)}")
    nodata = _nodata(arrays, where)
    grid = None
    if "crs" in arrays or "transform" in arrays:
        transform = arrays.get("transform", np.empty(0))
        numbers = transform.shape == (6,) and transform.dtype.kind in "iuf" and bool(np.isfinite(transform).all())
        if not numbers or arrays.get("crs", transform).ndim:
            raise ValueError(f"transform: {where}: must be six numbers, beside one crs, all finite")
        grid = Grid(str(arrays["crs"]), tuple(map(float, arrays["transform"])))
    doy = _days(arrays, frames, where)
    return Scene(where, pixels, height, width, doy, bands, nodata, grid, labelled="labels" in arrays)


def _native(array: np.ndarray) -> np.ndarray:
    """In this machine's order of bytes, which PyTorch takes alone; NetCDF and FITS have the other."""
    return array.astype(array.dtype.newbyteorder("="), copy=False)


@dataclass(frozen=True)
class _Arrays:
    """Pixels in memory."""

    stored: np.ndarray
    clouds: np.ndarray | None
    codes: np.ndarray | None

    def images(self, rows: slice, columns: slice) -> np.ndarray:
        return self.stored[:, :, rows, columns]

    def cloud(self, rows: slice, columns: slice) -> np.ndarray | None:
        return None if self.clouds is None else self.clouds[:, rows, columns]

    def labels(self, rows: slice, columns: slice) -> np.ndarray | None:
        return None if self.codes is None else self.codes[rows, columns]


def _nodata(arrays: dict[str, np.ndarray], where: str) -> float | None:
    if "nodata" not in arrays:
        return None
    nodata = arrays["nodata"]
    if nodata.size != 1 or nodata.dtype.kind not in "iuf":
        raise ValueError(f"nodata: {where}: must be one number, got {nodata.dtype} {nodata.shape}")
    return float(nodata.item())


def _cloud(arrays: dict[str, np.ndarray], where: str) -> np.ndarray | None:
    if "cloud" not in arrays:
        return None
    cloud, (frames, _, height, width) = arrays["cloud"], arrays["images"].shape
    if cloud.dtype != bool or cloud.shape not in ((frames,), (frames, height, width)):
        raise ValueError(
            f"cloud: {where}: must be true or false, [{frames}, {height}, {width}] or [{frames}], "
            f"got {cloud.dtype} {cloud.shape}"
        )
    return np.broadcast_to(cloud.reshape(frames, *cloud.shape[1:] or (1, 1)), (frames, height, width))


def _labels(arrays: dict[str, np.ndarray], where: str) -> np.ndarray | None:
    if "labels" not in arrays:
        if "labelled" in arrays:
            raise ValueError(f"labelled: {where}: is for labels, and there are none")
        return None
    size = arrays["images"].shape[2:]
    for name, kinds, takes in (("labels", "ui", "whole numbers"), ("labelled", "b", "true or false")):
        array = arrays.get(name)
        if array is not None and (array.dtype.kind not in kinds or array.shape != size):
            raise ValueError(f"{name}: {where}: must be {takes} {size}, got {array.dtype} {array.shape}")
    codes = arrays["labels"].astype(np.int64)
    return codes if "labelled" not in arrays else np.where(arrays["labelled"], codes, UNLABELLED)


def _days(arrays: dict[str, np.ndarray], frames: int, where: str) -> tuple[int, ...]:
    given = [name for name in ("dates", "doy", "months") if name in arrays]
    if len(given) != 1 or arrays[given[0]].shape != (frames,):
        got = ", ".join(f"{name} {arrays[name].shape}" for name in given) or "none"
        raise ValueError(f"dates: {where}: must be one of dates, doy and months, [{frames}], got {got}")
    (name,) = given
    values = arrays[name]
    if values.dtype.kind == "M":  # of xarray in nanoseconds; months stay such
        whole = np.datetime_data(values.dtype)[0] in "YM"
        values = np.datetime_as_string(values if whole else values.astype("datetime64[D]"))
    if name != "dates" and values.dtype.kind not in "ui":
        raise ValueError(f"{name}: {where}: must be whole numbers, got {values.dtype}")
    readers: dict[str, Callable[[Any], int]] = {"dates": day_of, "doy": _checked_day, "months": _middle}
    try:
        return tuple(map(readers[name], values.tolist()))
    except ValueError as error:
        raise ValueError(f"{name}: {where}: {error}") from error


def _checked_day(day: int) -> int:
    if not 1 <= day <= 366:
        raise ValueError(f"days of the year are 1 to 366, got {day}")
    return day


def _middle(month: int) -> int:
    if not 1 <= month <= 12:
        raise ValueError(f"months are 1 to 12, got {month}")
    return day_of(f"2001-{month:02}")  # or any other year that is no leap year
