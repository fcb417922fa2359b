"""What KaSA takes out of a weight: its smallest singular components, computed once for each weight and kept."""

import contextlib
import logging
import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from deftcore._files import cache_folder, replacing_file
from deftcore.ops.subspace import minor_subspace

_log = logging.getLogger("deftcore")
_WORTH_KEEPING = 256  # the shorter side of a weight from which a file is read faster than the weight is decomposed
KEPT_BYTES = 2 << 30  # of all files together; a model of 7 billion weights at rank 16 takes about 150 MB


def dropped_factors(weight: Tensor, rank: int, digest: str, device: str | None = None) -> tuple[Tensor, Tensor]:
    """F^T [rank, N] and E [M, rank] with E F^T the part of weight [M, N] in its `rank` smallest singular components,
    float32 and on the weight's device; from the cache folder where they have been computed for this digest before.

    The folder, `minor_subspaces`, holds at most `KEPT_BYTES`: what has not been used for longest goes first. It can be
    deleted at any time.

    Args:
        digest: of the weight's content.
        device: where to compute; None is where the weight is.

    Raises:
        ValueError: a weight that is not finite, a rank above the shorter side.
    """
    path = cache_folder() / "minor_subspaces" / f"{digest}.safetensors"
    keeps = min(weight.shape) >= _WORTH_KEEPING and rank > 0
    kept = _read(path) if keeps else None
    if kept is None or kept["values"].shape[0] < rank:
        u, s, v = minor_subspace(weight.to(device) if device else weight, rank)
        kept = {"left": u.float().cpu(), "values": s.float().cpu(), "right": v.float().cpu()}
        if keeps:
            _keep(path, kept)
    first = kept["values"].shape[0] - rank  # the smallest come last
    left = kept["left"][:, first:] * kept["values"][first:]
    return kept["right"][:, first:].t().to(weight.device), left.to(weight.device)


def _read(path: Path) -> dict[str, Tensor] | None:
    try:
        found = load_file(path)
    except (OSError, SafetensorError):
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # it was used
    return found if {"left", "values", "right"} <= found.keys() else None


def _keep(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(path) as partial:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
        _forget_oldest(path.parent)
    except OSError as error:
        _log.info("%s: not kept, %s", path.name, error)


def _forget_oldest(folder: Path) -> None:
    """Deletes what is beyond `KEPT_BYTES`, which other processes may be doing too."""
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append((path.stat().st_mtime_ns, path.stat().st_size, path))
    total = 0
    for _, size, path in sorted(found, reverse=True):
        total += size
        if total > KEPT_BYTES:
            path.unlink(missing_ok=True)
