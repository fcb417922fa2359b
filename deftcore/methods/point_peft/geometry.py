"""Geometry: patches are mixed with their neighbours in space, and hear what became of them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from deftcore.methods.point_peft.backbone import BatchNorm
from deftcore.methods.point_peft.config import PointPeftConfig
from deftcore.methods.point_peft.patches import Patches
from deftcore.ops import farthest_point_sample, gather_points, knn
from deftcore.ops.neighbours import check_values

_NEAR = 1e-8  # added to squared distances


class LocalGroups(NamedTuple):
    """G' groups of S' patches; places are among the G patches of the same cloud.

    Args:
        centres: [B, G'] int64.
        members: [B, G', S'] int64, nearest first, so that a group's centre is its first.
        weights: [B, G, G'] float, how much each patch hears from each group; a patch's sum is 1.
    """

    centres: Tensor
    members: Tensor
    weights: Tensor


@torch.no_grad()
def local_groups(patches: Patches, config: PointPeftConfig) -> LocalGroups:
    """The groups of a batch, which all blocks share.

    Raises:
        ValueError: centres that are not finite; naming a field of the config that asks for more than the G patches.
    """
    centres = patches.centres
    if not torch.compiler.is_compiling():
        check_values(None, centres=centres)
    count, size = centres.shape[1], patches.members.shape[2]
    groups, members = (
        config.local_centres or max(count // 2, 1),
        config.local_neighbours or min(max(size // 2, 1), count),
    )
    for name, value in (("local_centres", groups), ("local_neighbours", members)):
        if value > count:
            raise ValueError(f"{name}: must be at most the {count} patches, got {value}")
    picked = farthest_point_sample(centres, groups)
    heads = gather_points(centres, picked)
    near, _ = knn(centres, heads, members)
    squared = (centres.unsqueeze(2) - heads.unsqueeze(1)).square().sum(-1)
    weights = 1 / (squared + _NEAR)
    heard = config.propagation_neighbours
    if heard is not None and heard < groups:
        order = squared.sort(dim=-1, stable=True).indices[..., :heard]
        weights = torch.zeros_like(weights).scatter(2, order, weights.gather(2, order))
    return LocalGroups(picked, near, weights / weights.sum(-1, keepdim=True))


class LocalMixing(nn.Module):
    """Z + drop_path(attention(norm(Z))) over the members of each local group, then the largest of them. One instance
    serves all blocks."""

    def __init__(self, config: PointPeftConfig, width: int) -> None:
        super().__init__()
        inner = config.local_width
        self.heads, self.mean = config.local_heads, config.pooling == "max+mean"
        self.scale = (inner if config.local_scale == "width" else inner // config.local_heads) ** -0.5
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * inner, bias=False)
        self.projection = nn.Linear(inner, width)

    def forward(self, x: Tensor, groups: LocalGroups, drop_path: Callable[[Tensor], Tensor]) -> Tensor:
        """Patch tokens [B, G, C] to one feature a group, [B, G', C]."""
        z = gather_points(x, groups.members).flatten(0, 1)  # [B G', S', C]
        normed = self.norm(z.to(self.norm.weight.dtype)).to(z.dtype)
        query, key, value = (
            self.qkv(normed.to(self.qkv.weight.dtype)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )
        attended = scaled_dot_product_attention(query, key, value, scale=self.scale)
        z = z + drop_path(self.projection(attended.transpose(1, 2).flatten(2))).to(z.dtype)
        pooled = z.max(1).values + z.mean(1) if self.mean else z.max(1).values
        return pooled.unflatten(0, groups.centres.shape)


class Propagation(nn.Module):
    """x_i + gamma_p sum_j u_ij (gelu(norm(z_j)) + gamma_c x_[centre j]): one block's part of the geometry."""

    def __init__(self, config: PointPeftConfig, width: int) -> None:
        super().__init__()
        self.norm = BatchNorm(width)
        self.gamma_c, self.gamma_p = config.gamma_c, config.gamma_p
        self.gate = nn.Parameter(torch.zeros(1)) if config.init == "identity" else None  # in gamma_p's place

    def forward(self, x: Tensor, pooled: Tensor, groups: LocalGroups) -> Tensor:
        """Patch tokens [B, G, C], with what the local groups [B, G', C] have become.

        Raises:
            ValueError: one cloud of one group in training, of which BatchNorm has no spread.
        """
        norm = self.norm
        mixed = gelu(norm(pooled.to(norm.weight.dtype))).to(x.dtype) + self.gamma_c * gather_points(x, groups.centres)
        heard = groups.weights.to(x.dtype) @ mixed
        return x + (self.gamma_p * heard if self.gate is None else self.gate.to(x.dtype) * heard)
