"""Clouds of points from files: arrays, text, and meshes, whose surface is sampled."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from deftcore.training.arrays import as_text

ARRAYS = (".npz", ".h5", ".hdf5")  # many clouds, and what is known of them
TEXT = (".txt", ".xyz", ".pts")
MESHES = (".off", ".ply", ".obj", ".stl")
SURFACE = 4  # points to draw on a mesh, over those that a model sees
CLOUDS = (".npy", *TEXT, *MESHES)  # one cloud each
# Names that an array goes by, the first that is there; the files of ScanObjectNN and ModelNet say `data` and `label`.
_NAMES = {
    "points": ("points", "data"),
    "labels": ("labels", "label"),
    "classes": ("classes", "class_names"),
    "is_test": ("is_test",),
    "split": ("split",),
}


def read_cloud(path: str | os.PathLike, surface: int) -> np.ndarray:
    """The points of a file of one cloud, [N, 3].

    Args:
        path: .npy [N, 3]; .txt, .xyz or .pts, a point a line, coordinates first; .off, .ply, .obj or .stl.
        surface: how many points to draw on a mesh, always the same ones; a cloud's points are taken as they are.

    Raises:
        ValueError: naming the file, which is damaged, of another shape or without points.
        ImportError: it is a mesh, and trimesh is not installed.
    """
    path = Path(path)
    ending = path.suffix.lower()
    read: Callable[[], Any] = {
        ".npy": lambda: np.load(path, allow_pickle=False),
        **dict.fromkeys(TEXT, lambda: _text(path)),
        **dict.fromkeys(MESHES, lambda: _mesh(path, surface)),
    }.get(ending, lambda: _unknown(path))
    with _named(path):
        return checked_cloud(read(), str(path))


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a file of many clouds: `points` [M, N, 3] and, where the file has them, `labels` [M], `classes`
    [K], `is_test` [M] and `split` [M]; a .npy is `points` alone.

    Raises:
        ValueError: naming the file and the array that is missing.
        ImportError: it is HDF5, and h5py is not installed.
    """
    path = Path(path)
    with _named(path):
        if path.suffix.lower() == ".npy":
            return _known({"points": np.load(path, allow_pickle=False)}, path)
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return _known(file, path)
        h5py = _needed("h5py")
        with h5py.File(path, "r") as file:
            return _known(file, path)


def checked_cloud(points: Any, place: str) -> np.ndarray:
    """A cloud's points as they are, once they are some.

    Raises:
        ValueError: naming the place.
    """
    array = np.asarray(points)
    if array.ndim != 2 or array.shape[1] != 3 or array.dtype.kind not in "fiu":
        raise ValueError(f"data: {place}: points must be numbers [N, 3], got {array.dtype} {list(array.shape)}")
    if not len(array):
        raise ValueError(f"data: {place} has no points")
    wrong = ~np.isfinite(array).all(1)
    if wrong.any():
        raise ValueError(f"data: {place}: point {int(wrong.argmax())} is not finite: {array[wrong.argmax()].tolist()}")
    return array


def _known(file: Mapping[str, Any], path: Path) -> dict[str, np.ndarray]:
    found = {}
    for name, others in _NAMES.items():
        stored = next((each for each in others if each in file), None)
        if stored is not None:
            found[name] = as_text(np.asarray(file[stored]))
    if "points" not in found:
        raise ValueError(f"data: {path} has no array `points`; it has {', '.join(file) or 'none'}")
    points = found["points"]
    if points.ndim != 3 or points.shape[2] != 3 or points.dtype.kind not in "fiu":
        raise ValueError(f"data: {path}: `points` must be numbers [M, N, 3], got {points.dtype} {list(points.shape)}")
    return found


def _text(path: Path) -> np.ndarray:
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith(("#", "//"))]
    if path.suffix.lower() == ".pts" and lines and len(lines[0].split()) == 1:  # how many there are
        lines = lines[1:]
    if not lines:
        return np.zeros((0, 3))
    return np.loadtxt(lines, delimiter="," if "," in lines[0] else None, usecols=(0, 1, 2), ndmin=2)


def _mesh(path: Path, surface: int) -> np.ndarray:
    trimesh = _needed("trimesh")
    found = trimesh.load(path, process=False)
    if isinstance(found, trimesh.Scene):
        found = found.to_mesh()
    if not len(getattr(found, "faces", ())):
        return np.asarray(found.vertices)
    if not found.area > 0:
        raise ValueError("the mesh has no surface")
    return np.asarray(trimesh.sample.sample_surface(found, surface, seed=0)[0])


def _unknown(path: Path) -> Any:
    raise ValueError(f"must end in {', '.join(CLOUDS)}")


def _needed(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"data: {name} is needed to read this file: pip install 'deftcore[points]'") from error


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Says of whatever goes wrong in a reader which file it was."""
    try:
        yield
    except (ImportError, FileNotFoundError):
        raise
    except Exception as error:  # readers of other packages raise anything
        if str(error).startswith("data: "):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"data: {path} cannot be read: {reason}") from error
