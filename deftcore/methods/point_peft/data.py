"""Sets of clouds, with or without classes, as they lie on disk: in one file of arrays, or a file for each cloud."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deftcore import ops
from deftcore._progress import tracked
from deftcore.methods.point_peft.formats import ARRAYS, CLOUDS, checked_cloud, read_arrays, read_cloud

_PARTS = {"train": "train", "test": "test", "val": "test", "validation": "test"}  # folders, and `split` of arrays
_POOL = 75 / 64  # points to choose from, over those that a model sees
_TOGETHER = 64  # clouds that are sampled at a time
_LARGEST = 1e18  # a coordinate's size, to the operators on neighbours
_SLOW = 200  # clouds whose reading shows its progress


@dataclass(frozen=True)
class CloudSet:
    """Clouds that belong together.

    Args:
        points: [N, 3] of each, as stored.
        labels: of each, below the number of classes; None: nothing is known of them.
        classes: names.
        places: where each is from, for messages.
    """

    points: Sequence[np.ndarray]
    labels: Sequence[int] | None
    classes: Sequence[str]
    places: Sequence[str]


def class_names(path: str | os.PathLike) -> list[str]:
    """The classes of a set, without its points; none where the set has no labels.

    Raises:
        ValueError, FileNotFoundError: as `read_clouds`.
    """
    path = _existing(path)
    if path.is_dir():
        return _classes_of([_placed(path, file)[1] for file in _files(path)], path)
    return _of_arrays(path)[1] if path.suffix.lower() in ARRAYS else []


def has_test(path: str | os.PathLike) -> bool:
    """Whether a set is divided into a part to train on and one to test on; raises as `read_clouds`."""
    path = _existing(path)
    if path.is_dir():
        return any(_placed(path, file)[0] == "test" for file in _files(path))
    return path.suffix.lower() in ARRAYS and _is_test(read_arrays(path), path) is not None


def read_clouds(path: str | os.PathLike, part: str = "train", *, surface: int = 4096) -> CloudSet:
    """A set of clouds:

    - a folder of files (.npy, .txt, .xyz, .pts, .off, .ply, .obj, .stl), a cloud each, in folders of their classes;
      folders `train` and `test` above or below those divide the set, as ModelNet40's;
    - .npz or .h5 with `points` [M, N, 3], and `labels` [M], names of `classes`, and `is_test` [M] or `split` [M], the
      words train and test, where there are such;
    - .npy [M, N, 3], clouds without classes.

    Args:
        part: "train" or "test", of a set that is divided; one that is not is read whole.
        surface: points on a mesh.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: naming file and array, or the cloud: other shapes, no points, points that are not finite, labels
            outside the classes, nothing in that part.
    """
    path = _existing(path)
    found = _read_folder(path, part, surface) if path.is_dir() else _read_file(path, part)
    if not found.points:
        raise ValueError(f"data: {path} has no clouds to {part} on")
    return found


def _existing(path: str | os.PathLike) -> Path:
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"data: no such file: {path}")
    if not path.is_dir() and path.suffix.lower() not in (*ARRAYS, ".npy"):
        raise ValueError(f"data: {path} must be a folder, or end in {', '.join((*ARRAYS, '.npy'))}")
    return path


# ---------------------------------------------------------------------------- folders


def _files(folder: Path) -> list[Path]:
    found = sorted(file for file in folder.rglob("*") if file.suffix.lower() in CLOUDS and file.is_file())
    if not found:
        raise ValueError(f"data: {folder} holds no file that ends in {', '.join(CLOUDS)}")
    return found


def _placed(folder: Path, file: Path) -> tuple[str, str]:
    """The part of a set that a file is in and its class, "" for none."""
    above = [name for name in file.relative_to(folder).parts[:-1]]
    parts = [_PARTS[name.lower()] for name in above if name.lower() in _PARTS]
    classes = [name for name in above if name.lower() not in _PARTS]
    return (parts[0] if parts else ""), (classes[0] if classes else "")


def _classes_of(names: list[str], folder: Path) -> list[str]:
    found = sorted(set(names))
    if "" in found and len(found) > 1:
        raise ValueError(
            f"data: {folder} holds clouds in folders of their classes ({found[1]}, ...), and others in none"
        )
    return [] if found == [""] else found


def _read_folder(folder: Path, part: str, surface: int) -> CloudSet:
    files = _files(folder)
    placed = [_placed(folder, file) for file in files]
    divided = any(where for where, _ in placed)
    if divided and not all(where for where, _ in placed):
        stray = next(file for file, (where, _) in zip(files, placed, strict=True) if not where)
        raise ValueError(f"data: {folder} is divided into train and test, but {stray} is in neither")
    classes = _classes_of([name for _, name in placed], folder)
    chosen = [(f, name) for f, (where, name) in zip(files, placed, strict=True) if not divided or where == part]
    points = [read_cloud(file, surface) for file, _ in _shown(chosen, f"reading {folder}")]
    labels = [classes.index(name) for _, name in chosen] if classes else None
    return CloudSet(points, labels, classes, [str(file) for file, _ in chosen])


# ---------------------------------------------------------------------------- arrays


def _read_file(path: Path, part: str) -> CloudSet:
    arrays, classes = _of_arrays(path)
    points, labels = arrays["points"], arrays.get("labels")
    test = _is_test(arrays, path)
    rows = range(len(points)) if test is None else np.flatnonzero(test == (part == "test")).tolist()
    places = [f"{path}, cloud {row}" for row in rows]
    clouds = [checked_cloud(points[row], place) for row, place in zip(rows, places, strict=True)]
    return CloudSet(clouds, None if labels is None else labels.reshape(-1)[list(rows)].tolist(), classes, places)


def _of_arrays(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """A file's arrays, and the names of its classes; its labels are sound."""
    arrays = read_arrays(path)
    if "labels" not in arrays:
        return arrays, []
    labels = _one_each(arrays, "labels", path)
    if labels.dtype.kind not in "iu":
        raise ValueError(f"data: {path}: `labels` must be whole numbers, got {labels.dtype}")
    names = [str(name) for name in arrays["classes"].flat] if "classes" in arrays else None
    if names is not None and len(set(names)) < len(names):
        raise ValueError(f"data: {path}: `classes` must be names, each class its own, got {names}")
    count = len(names) if names is not None else int(labels.max(initial=-1)) + 1
    wrong = (labels < 0) | (labels >= count)
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(f"data: {path}: `labels` must be from 0 to {count - 1}, got {labels[row]} for cloud {row}")
    return arrays, [str(i) for i in range(count)] if names is None else names


def _is_test(arrays: dict[str, np.ndarray], path: Path) -> np.ndarray | None:
    if "is_test" in arrays:
        is_test = _one_each(arrays, "is_test", path)
        if is_test.dtype.kind not in "biuf" or not np.isin(is_test, (0, 1)).all():
            raise ValueError(
                f"data: {path}: `is_test` must be true or false, got {is_test.dtype} {is_test[:5].tolist()}"
            )
        return is_test.astype(bool)
    if "split" not in arrays:
        return None
    words = [str(word).lower() for word in _one_each(arrays, "split", path)]
    strange = sorted(set(words) - _PARTS.keys())
    if strange:
        raise ValueError(f"data: {path}: `split` must be train or test, got {strange[0]!r}")
    return np.array([_PARTS[word] == "test" for word in words])


def _one_each(arrays: dict[str, np.ndarray], name: str, path: Path) -> np.ndarray:
    values, clouds = arrays[name], len(arrays["points"])
    if values.size != clouds:
        raise ValueError(f"data: {path}: `{name}` must be [{clouds}], one of each cloud, got {list(values.shape)}")
    return values.reshape(-1)


# ---------------------------------------------------------------------------- made ready


def unit_ball(points: np.ndarray) -> np.ndarray:
    """A cloud about its mean, its farthest point at distance 1, float32; one whose points are all equal stays there."""
    wide = points.astype(np.float64)
    _, exponent = np.frexp(np.abs(wide).max())
    wide = np.ldexp(wide, -exponent)  # sums and squares of very large or small coordinates are none
    centred = wide - wide.mean(0)
    radius = np.sqrt(np.square(centred).sum(1).max())
    return (centred / radius if radius > 0 else centred).astype(np.float32)


def as_stored(points: np.ndarray, place: str) -> np.ndarray:
    """A cloud where it is and as large, float32.

    Raises:
        ValueError: naming the place, for coordinates whose squared distances float32 does not hold.
    """
    most = np.abs(points.astype(np.float64)).max()
    if most > _LARGEST:
        raise ValueError(
            f"data: {place}: coordinates must be of size at most {_LARGEST:g}, got {most:g}; data.normalize=true takes "
            "any"
        )
    return points.astype(np.float32)


def farthest_first(clouds: Sequence[np.ndarray], count: int) -> list[Tensor]:
    """Clouds [N, 3] thinned for a model that sees `count` points: a pool of 75/64 as many to choose from (1200 for
    1024), in the order of farthest point sampling, so that the first n are those that sampling n would pick. Clouds of
    at most `count` points, all of which are seen, stay as they are."""
    found = [torch.as_tensor(cloud, dtype=torch.float32) for cloud in clouds]
    large = [i for i, cloud in enumerate(found) if len(cloud) > count]
    for start in _shown(range(0, len(large), _TOGETHER), "sampling points", len(large)):
        chosen = large[start : start + _TOGETHER]
        lengths = torch.tensor([len(found[i]) for i in chosen])
        padded = torch.nn.utils.rnn.pad_sequence([found[i] for i in chosen], batch_first=True)
        pool = min(round(_POOL * count), padded.shape[1])
        picks = ops.farthest_point_sample(padded, pool, lengths=lengths, repeat=True)
        for i, each in zip(chosen, picks, strict=True):
            found[i] = found[i][each[: len(found[i])]]
    return found


def _shown(items: Sequence[Any], what: str, clouds: int | None = None) -> Any:
    """The items, with progress where there are many clouds."""
    return tracked(items, what, quick=(len(items) if clouds is None else clouds) < _SLOW)
