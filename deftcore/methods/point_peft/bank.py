"""The memory bank: features of the training clouds under the frozen backbone, and the look-up in them."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from deftcore._files import replacing_file
from deftcore._progress import tracked
from deftcore.nn.fingerprints import check_base, fingerprints
from deftcore.ops.autocast import autocast_to

_FORMAT = "deftcore-memory-bank-1"


@dataclass(frozen=True)
class MemoryBank:
    """Features of clouds under one backbone.

    Args:
        rows: [M, C] of unit length, in the order of the clouds.
        base: fingerprint of the backbone, by dtype.
        data: hash of the clouds.
    """

    rows: Tensor
    base: Mapping[str, str]
    data: str

    @classmethod
    def build(cls, backbone: Any, clouds: Iterable[Any], *, total: int | None = None) -> "MemoryBank":
        """A row of every cloud, by the backbone as it is, in evaluation mode and without gradients.

        Args:
            backbone: with `features`: clouds [B, N, 3] to [B, C].
            clouds: batches, each [B, N, 3], or with an entry `points` of that.
            total: how many batches there are, for the progress bar.

        Raises:
            ValueError: there are no clouds, or a feature is not finite.
        """
        device = next(backbone.parameters()).device
        rows, digest, trains = [], hashlib.sha256(), backbone.training
        backbone.eval()
        try:
            with torch.no_grad():
                for batch in tracked(clouds, "memory bank", total):
                    points = batch["points"] if isinstance(batch, Mapping) else batch
                    digest.update(_bytes(points))
                    rows.append(normalize(backbone.features(points.to(device)).float(), dim=-1).cpu())
        finally:
            backbone.train(trains)
        if not rows:
            raise ValueError("clouds: must hold at least one batch, got none")
        found = torch.cat(rows)
        if not bool(found.isfinite().all()):
            raise ValueError("clouds: a feature is not finite; the backbone, or a cloud, is broken")
        return cls(found, identity(backbone), digest.hexdigest())

    def save(self, path: str | os.PathLike) -> None:
        """Writes the bank as a safetensors file."""
        about = {"format": _FORMAT, "base": json.dumps(dict(self.base)), "data": self.data}
        with replacing_file(path) as partial:
            save_file({"rows": self.rows.contiguous()}, partial, about)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "MemoryBank":
        """The bank in a file.

        Raises:
            FileNotFoundError: there is none.
            ValueError: naming the file, where it is damaged or no bank.
        """
        if not os.path.isfile(path):
            raise FileNotFoundError(f"bank: no such file: {path}")
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                if about.get("format") != _FORMAT:
                    raise ValueError(f"its format must be {_FORMAT}, got {about.get('format')}")
                return cls(file.get_tensor("rows"), json.loads(about["base"]), about["data"])
        except (SafetensorError, ValueError, KeyError) as error:
            raise ValueError(f"bank: {path} is no memory bank, or damaged: {error}") from error

    def check(self, backbone: nn.Module) -> None:
        """Raises ValueError where the bank is of another backbone."""
        check_base("bank", self.base, identity(backbone))

    def check_data(self, clouds: Iterable[Any]) -> None:
        """Raises ValueError where the bank is of other clouds than these batches, in this order."""
        digest = hashlib.sha256()
        for batch in clouds:
            digest.update(_bytes(batch["points"] if isinstance(batch, Mapping) else batch))
        if digest.hexdigest() != self.data:
            raise ValueError("bank: it was built from other clouds, or from these in another order")


def identity(backbone: nn.Module) -> dict[str, str]:
    """The fingerprint of a backbone's weights and, rounded as they are, of its statistics, by dtype."""
    dtype = next(each.dtype for each in backbone.parameters())
    return fingerprints({n: each.to(dtype) for n, each in backbone.state_dict().items() if each.is_floating_point()})


def _bytes(points: Tensor) -> bytes:
    """Of clouds [B, N, 3], however they are batched."""
    return points.detach().cpu().float().contiguous().numpy().tobytes()


@torch.no_grad()
def look_up(
    query: Tensor, rows: Tensor, k: int, *, normalize_query: bool = False, exclude: Tensor | None = None
) -> Tensor:
    """R = [q; w F; F], F the k rows of highest cosine to each query and w the softmax of these; of equal ones the lower
    rows. Nothing here has a gradient.

    Args:
        query: [B, C], as the backbone gave it.
        rows: [M, C] of unit length, M at least k.
        normalize_query: the first row of R is of unit length too.
        exclude: [B] int64, a row that each query does not see.

    Returns:
        [B, 2 + k, C] in the query's dtype.

    Raises:
        ValueError: naming the argument.
    """
    if query.dim() != 2 or rows.dim() != 2 or query.shape[1] != rows.shape[1]:
        raise ValueError(f"query: must be [B, {rows.shape[-1]}], got shape {tuple(query.shape)}")
    seen = len(rows) - (exclude is not None)
    if seen < k:
        raise ValueError(f"bank: must have at least {k} rows that a cloud sees, got {seen}")
    if exclude is not None:
        _check_exclude(exclude, len(query), len(rows))
    unit = normalize(query.to(rows.dtype), dim=-1)
    with autocast_to(query.device.type, None):
        scores = unit @ rows.t()
        if exclude is not None:
            scores = scores.scatter(1, exclude.unsqueeze(1), -torch.inf)
        best, found = scores.sort(dim=-1, descending=True, stable=True)
        features = rows[found[:, :k]]
        mean = (best[:, :k].softmax(-1).unsqueeze(-1) * features).sum(1, keepdim=True)
    first = unit if normalize_query else query.to(rows.dtype)
    return torch.cat([first.unsqueeze(1), mean, features], 1).to(query.dtype)


def _check_exclude(exclude: Tensor, queries: int, rows: int) -> None:
    if exclude.dtype != torch.int64 or exclude.shape != (queries,):
        raise ValueError(f"exclude: must be [{queries}] int64, got {list(exclude.shape)} {exclude.dtype}")
    if queries and not torch.compiler.is_compiling() and not 0 <= int(exclude.min()) <= int(exclude.max()) < rows:
        raise ValueError(
            f"exclude: must be rows of the bank, 0..{rows - 1}, got {int(exclude.min())}..{int(exclude.max())}"
        )
