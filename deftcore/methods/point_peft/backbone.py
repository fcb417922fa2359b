"""The backbone of Point-MAE and Point-BERT: patches of a cloud as tokens, a transformer over them."""

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from deftcore.methods.point_peft.blocks import BlockStack
from deftcore.methods.point_peft.patches import Patches, cut_patches
from deftcore.models.own import OwnConfig, OwnModel
from deftcore.nn.buffers import ExactBuffers
from deftcore.ops.checks import check_count

_POSITION_WIDTH = 128
_STD = 0.02  # of the start of weights and tokens


@dataclass
class PointConfig(OwnConfig):
    """Sizes of a backbone; the defaults are those of the published checkpoints, at 1024 points a cloud.

    Args:
        width, depth, heads: C, blocks, attention heads.
        patches: G a cloud; it is no size of a weight (128 for clouds of 2048 points).
        patch_points: S a patch.
        mlp_ratio: hidden width of the blocks' MLPs over C.
        drop_path: stochastic depth's rate in the last block, rising linearly from 0 in the first.
        encoder_width: of the patch encoder's tokens, which a layer then brings to C (Point-BERT: 256); None: C at once.
        skip_near_origin: points with a squared norm of at most 1e-3 are no centres, as where published checkpoints were
            trained.

    Raises ValueError, naming the field, on a value out of range.
    """

    model_type = "point_transformer"
    published = "deftcore.methods.point_peft.checkpoints.load_backbone"
    width: int = 384
    depth: int = 12
    heads: int = 6
    patches: int = 64
    patch_points: int = 32
    mlp_ratio: float = 4.0
    drop_path: float = 0.1
    encoder_width: int | None = None
    skip_near_origin: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "width", "depth", "heads", "patches", "patch_points")
        if self.encoder_width is not None:
            check_counts(self, "encoder_width")
        check_rates(self, "drop_path")
        if self.width % self.heads:
            raise ValueError(f"heads: must divide the width {self.width}, got {self.heads}")
        if not 0 < self.mlp_ratio < math.inf or self.hidden < 1:
            raise ValueError(f"mlp_ratio: must be a number above 0, got {self.mlp_ratio!r}")

    @property
    def hidden(self) -> int:
        """Width of the blocks' MLPs."""
        return int(self.width * self.mlp_ratio)

    @property
    def backbone(self) -> "PointConfig":
        """These fields alone, of a config that has more."""
        return PointConfig(**{each.name: getattr(self, each.name) for each in fields(PointConfig)})


def check_counts(config: Any, *names: str) -> None:
    """Raises ValueError where a field is no integer of at least 1."""
    for name in names:
        check_count(name, getattr(config, name))


def check_rates(config: Any, *names: str) -> None:
    """Raises ValueError where a field is no number in [0, 1)."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise ValueError(f"{name}: must be in [0, 1), got {value!r}")


class BatchNorm(ExactBuffers, nn.BatchNorm1d):
    """BatchNorm over rows [..., C], as ever where its weight trains. Frozen it is frozen whole: it applies its running
    statistics and leaves them as they are, whatever the mode of the model around it. In 16 bits they stay float32.

    Raises:
        ValueError: in training one row alone, which has no spread.
    """

    exact = ("running_mean", "running_var")
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        trains = self.training and self.weight.requires_grad
        if trains:
            if rows.shape[0] == 1:
                raise ValueError("points: BatchNorm trains on the spread of a batch, and this one has a single cloud")
            self.num_batches_tracked += 1
        mean, var = self.running_mean, self.running_var
        weight, bias = self.weight.to(mean.dtype), self.bias.to(mean.dtype)  # PyTorch takes them in one dtype
        return batch_norm(rows, mean, var, weight, bias, trains, self.momentum, self.eps).view_as(x)


class PatchEncoder(nn.Module):
    """A token of each patch, a small PointNet: [B, G, S, 3] -> [B, G, C].

    Each point to 256 features, its patch's largest beside them, both to 512 and to C, and the largest of these. The
    layer over [largest ; own] is two: what the largest bring is the same for all points of a patch, computed once.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.point = nn.Sequential(nn.Linear(3, 128), BatchNorm(128), nn.ReLU(), nn.Linear(128, 256))
        self.patch = nn.Linear(256, 512)
        self.own = nn.Linear(256, 512, bias=False)
        self.token = nn.Sequential(BatchNorm(512), nn.ReLU(), nn.Linear(512, width))

    def forward(self, neighbourhoods: Tensor) -> Tensor:
        own = self.point(neighbourhoods)
        largest = own.max(-2, keepdim=True).values
        return self.token(self.own(own) + self.patch(largest)).max(-2).values


class PointTransformer(OwnModel):
    """Clouds [B, N, 3] to tokens [B, 1 + G, C]: the class token, then one for each patch.

    What adapts it counts on these names: `group` and `embed`, `class_token` and `class_position` [1, 1, C], `blocks` (a
    `BlockStack`; each block with `norm1`, `attention` of `qkv` and `projection`, `norm2`, `mlp` of `fc1` and `fc2`, and
    `drop_path`), `norm`.

    >>> backbone = PointTransformer(PointConfig(width=24, depth=2, heads=2, patches=8, patch_points=4))
    >>> backbone(torch.randn(2, 32, 3)).shape
    torch.Size([2, 9, 24])
    """

    config_class = PointConfig

    def __init__(self, config: PointConfig) -> None:
        super().__init__(config)
        self.encoder = PatchEncoder(config.encoder_width or config.width)
        self.reduce = nn.Linear(config.encoder_width, config.width) if config.encoder_width else nn.Identity()
        self.position = position_mlp(config.width)
        self.class_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.class_position = nn.Parameter(torch.empty(1, 1, config.width))
        self.blocks = BlockStack(config.depth, config.width, config.heads, config.hidden, config.drop_path)
        self.norm = nn.LayerNorm(config.width)
        start_small(*self.children(), self.class_token, self.class_position)

    def group(self, points: Tensor) -> Patches:
        """The patches of clouds [B, N, 3].

        Raises:
            TypeError, ValueError: naming the argument, also for coordinates that are not finite.
        """
        config = self.config
        return cut_patches(points, config.patches, config.patch_points, skip_near_origin=config.skip_near_origin)

    def embed(self, patches: Patches) -> tuple[Tensor, Tensor]:
        """Tokens and positions of the patches alone, each [B, G, C]."""
        dtype = self.class_token.dtype  # coordinates stay float32 up to here
        x = self.reduce(self.encoder(patches.neighbourhoods.to(dtype)))
        return x, self.position(patches.centres.to(dtype))

    def forward(self, points: Tensor, index: Tensor | None = None) -> Tensor:
        """Normalised tokens [B, 1 + G, C] of clouds [B, N, 3].

        Args:
            index: [B] int64, the clouds' numbers in a training set; what adapts a backbone may ask for them.
        """
        patches = self.group(points)
        x, position = self.embed(patches)
        x, position = (
            torch.cat([first.expand(x.shape[0], -1, -1), rest], 1)
            for first, rest in ((self.class_token, x), (self.class_position, position))
        )
        return self.norm(self.blocks(x, position))

    def features(self, points: Tensor) -> Tensor:
        """[B, C] of clouds [B, N, 3]: the largest over the normalised patch tokens, no class token among them. What a
        memory bank stores, and looks up."""
        return self.norm(self.blocks(*self.embed(self.group(points)))).max(1).values


def position_mlp(width: int) -> nn.Sequential:
    """Centres [..., 3] to positions [..., C]."""
    return nn.Sequential(nn.Linear(3, _POSITION_WIDTH), nn.GELU(), nn.Linear(_POSITION_WIDTH, width))


def start_small(*parts: nn.Module | nn.Parameter) -> None:
    """Tokens, and the weights of linear layers, from a truncated normal of spread 0.02; the layers' biases zero."""
    for part in parts:
        if isinstance(part, nn.Parameter):
            nn.init.trunc_normal_(part, std=_STD)
            continue
        for layer in part.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=_STD)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
