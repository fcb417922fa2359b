"""A cloud cut into patches: centres far from one another, and the points nearest to each."""

from typing import NamedTuple

import torch
from torch import Tensor


class Patches(NamedTuple):
    """G patches of S points each.

    Args:
        points: [B, N, 3], the clouds.
        centres: [B, G, 3], points of theirs.
        members: [B, G, S] int64, the points of each patch, nearest to its centre first.
        neighbourhoods: [B, G, S, 3], their coordinates less the centre's.
    """

    points: Tensor
    centres: Tensor
    members: Tensor
    neighbourhoods: Tensor

    def chosen(self, numbers: Tensor) -> "Patches":
        """Some of each cloud's patches, by their numbers [B, K] int64."""
        clouds = torch.arange(numbers.shape[0], device=numbers.device).unsqueeze(1)
        return Patches(self.points, *(each[clouds, numbers] for each in self[1:]))


def cut_patches(points: Tensor, patches: int, size: int, *, skip_near_origin: bool = False) -> Patches:
    """Centres by farthest point sampling from point 0, patches by nearest neighbours; coordinates in float32 at least.

    Args:
        points: [B, N, 3], finite, N at least `patches` and `size`.
        skip_near_origin: as of `deftcore.ops.farthest_point_sample`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(points, Tensor) or not points.is_floating_point():
        raise TypeError(f"points: must be a floating Tensor, got {getattr(points, 'dtype', type(points).__name__)}")
    if points.dim() != 3 or points.shape[-1] != 3:
        raise ValueError(f"points: must be [B, N, 3], got shape {tuple(points.shape)}")
    if points.shape[1] < max(patches, size):
        raise ValueError(f"points: {patches} patches of {size} points need as many in a cloud, got {points.shape[1]}")
    points = points if points.dtype == torch.float64 else points.float()
    centres = _rows(points, _farthest(points, patches))
    members = (centres.unsqueeze(2) - points.unsqueeze(1)).square().sum(-1).topk(size, largest=False).indices
    neighbourhoods = _rows(points, members.flatten(1)).unflatten(1, (patches, size)) - centres.unsqueeze(2)
    return Patches(points, centres, members, neighbourhoods)


def _rows(points: Tensor, indices: Tensor) -> Tensor:
    return points.gather(1, indices.unsqueeze(-1).expand(-1, -1, 3))


def _farthest(points: Tensor, picks: int) -> Tensor:
    found = torch.zeros(points.shape[0], picks, dtype=torch.int64, device=points.device)
    nearest = torch.full(points.shape[:2], torch.inf, dtype=points.dtype, device=points.device)
    for i in range(1, picks):
        last = points.gather(1, found[:, i - 1].view(-1, 1, 1).expand(-1, 1, 3))
        nearest = torch.minimum(nearest, (points - last).square().sum(-1))
        found[:, i] = nearest.argmax(1)
    return found
