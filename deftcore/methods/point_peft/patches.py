"""A cloud cut into patches: centres far from one another, and the points nearest to each."""

from typing import NamedTuple

import torch
from torch import Tensor

from deftcore.ops import farthest_point_sample, gather_points, knn


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

    def of_points(self) -> Tensor:
        """The patch that each point is of, [B, N] int64: of several that with the nearest centre, -1 for none."""
        squared = self.neighbourhoods.square().sum(-1)
        far = squared.new_full((*self.centres.shape[:2], self.points.shape[1]), torch.inf)
        least, number = far.scatter_(2, self.members, squared).min(1)
        return number.masked_fill_(least.isinf(), -1)


def cut_patches(points: Tensor, patches: int, size: int, *, skip_near_origin: bool = False) -> Patches:
    """Centres by farthest point sampling from point 0, patches by nearest neighbours; coordinates in float32 at least.

    Args:
        points: [B, N, 3], finite, N at least `patches` and `size`.
        skip_near_origin: as of `deftcore.ops.farthest_point_sample`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(points, Tensor) or not points.is_floating_point():
        kind = points.dtype if isinstance(points, Tensor) else type(points).__name__
        raise TypeError(f"points: must be a floating Tensor, got {kind}")
    if points.dim() != 3 or points.shape[-1] != 3:
        raise ValueError(f"points: must be [B, N, 3], got shape {tuple(points.shape)}")
    if points.shape[1] < max(patches, size):
        raise ValueError(f"points: {patches} patches of {size} points need as many in a cloud, got {points.shape[1]}")
    points = points if points.dtype == torch.float64 else points.float()
    picks = farthest_point_sample(points, patches, skip_near_origin=skip_near_origin)
    centres = gather_points(points, picks)
    members, _ = knn(points, centres, size)
    return Patches(points, centres, members, gather_points(points, members) - centres.unsqueeze(2))
