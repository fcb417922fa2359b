"""Masked pre-training of a backbone: most patches are hidden, and their points told from the others (Point-MAE, Pang et
al., *Masked Autoencoders for Point Cloud Self-supervised Learning*, arXiv 2203.06604)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from deftcore.methods.point_peft.backbone import (
    PointConfig,
    PointTransformer,
    check_counts,
    check_rates,
    position_mlp,
    start_small,
)
from deftcore.methods.point_peft.blocks import BlockStack
from deftcore.models.own import OwnModel


@dataclass
class PointMaeConfig(PointConfig):
    """Sizes of a backbone and of the decoder that it is pre-trained with.

    Args:
        mask_ratio: share of the patches that is hidden, rounded down to whole ones.
        decoder_depth, decoder_heads: blocks of the decoder, as wide as the backbone's, and their attention heads.
    """

    model_type = "point_mae"
    published = ""  # of the authors' files backbones are read, no decoders
    mask_ratio: float = 0.6
    decoder_depth: int = 4
    decoder_heads: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "decoder_depth", "decoder_heads")
        if self.width % self.decoder_heads:
            raise ValueError(f"decoder_heads: must divide the width {self.width}, got {self.decoder_heads}")
        check_rates(self, "mask_ratio")
        if not 0 < self.masked < self.patches:
            raise ValueError(f"mask_ratio: must hide some of {self.patches} patches, not all, got {self.mask_ratio!r}")

    @property
    def masked(self) -> int:
        """M, the hidden patches of a cloud."""
        return int(self.mask_ratio * self.patches)


@dataclass
class PointMaeOutput(ModelOutput):
    """loss; points of the hidden patches as they were told and as they are, [B, M, S, 3], less centres [B, M, 3]."""

    loss: Tensor | None = None
    predicted: Tensor | None = None
    target: Tensor | None = None
    centres: Tensor | None = None


class PointMae(OwnModel):
    """A backbone in pre-training: it sees the patches that are not hidden, without a class token; a small decoder tells
    from its tokens, and from where the hidden patches lie, their points. What is kept afterwards is `backbone`.

    >>> config = PointMaeConfig(width=24, depth=2, heads=2, patches=8, patch_points=4, decoder_depth=1, decoder_heads=2)
    >>> PointMae(config)(torch.randn(2, 32, 3)).predicted.shape
    torch.Size([2, 4, 4, 3])
    """

    config_class = PointMaeConfig

    def __init__(self, config: PointMaeConfig) -> None:
        super().__init__(config)
        self.backbone = PointTransformer(config.backbone)
        for unused in (self.backbone.class_token, self.backbone.class_position):  # by the loss: no gradient comes
            unused.requires_grad_(False)
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.decoder_position = position_mlp(config.width)
        self.decoder = BlockStack(
            config.decoder_depth, config.width, config.decoder_heads, config.hidden, config.drop_path
        )
        self.decoder_norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, 3 * config.patch_points)
        start_small(self.decoder_position, self.decoder, self.head, self.mask_token)

    def forward(self, points: Tensor, masked: Tensor | None = None) -> PointMaeOutput:
        """The loss: the mean Chamfer distance of told and true points over the hidden patches.

        Args:
            points: [B, N, 3].
            masked: [B, M] int64, the patches to hide, each once; None: drawn anew.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        patches = self.backbone.group(points)
        hidden, seen = self._split(patches.centres, masked)
        visible, target = patches.chosen(seen), patches.chosen(hidden)
        x = self.backbone.norm(self.backbone.blocks(*self.backbone.embed(visible)))
        x = torch.cat([x, self.mask_token.expand(x.shape[0], hidden.shape[1], -1).to(x.dtype)], 1)
        centres = torch.cat([visible.centres, target.centres], 1)
        x = self.decoder(x, self.decoder_position(centres.to(self.mask_token.dtype)))
        told = self.head(self.decoder_norm(x[:, seen.shape[1] :])).unflatten(-1, (-1, 3))
        true = target.neighbourhoods
        loss = chamfer(told.flatten(0, 1).to(true.dtype), true.flatten(0, 1))
        return PointMaeOutput(loss=loss, predicted=told, target=true, centres=target.centres)

    def _split(self, centres: Tensor, masked: Tensor | None) -> tuple[Tensor, Tensor]:
        """The numbers of the hidden patches [B, M], and of the others."""
        count, (clouds, patches, _) = self.config.masked, centres.shape
        if masked is None:
            order = torch.rand(clouds, patches, device=centres.device).argsort(1)
            return order[:, :count], order[:, count:]
        if masked.shape != (clouds, count) or masked.dtype != torch.int64:
            raise ValueError(f"masked: must be int64 [{clouds}, {count}], got {masked.dtype} {list(masked.shape)}")
        low, high = (int(number) for number in masked.aminmax())
        if low < 0 or high >= patches:
            raise ValueError(f"masked: must be in 0..{patches - 1}, got {low if low < 0 else high}")
        is_hidden = torch.zeros(clouds, patches, dtype=torch.bool, device=centres.device).scatter_(1, masked, True)
        if int(is_hidden.sum()) != masked.numel():
            raise ValueError("masked: names a patch twice")
        return masked, is_hidden.logical_not().nonzero()[:, 1].view(clouds, -1)


def chamfer(a: Tensor, b: Tensor) -> Tensor:
    """The mean squared distance from points of a to the nearest of b, and that from points of b to the nearest of a,
    added: Chamfer distance "l2" of Point-MAE.

    Args:
        a, b: [R, N, 3] and [R, M, 3].

    >>> chamfer(torch.zeros(1, 2, 3), torch.tensor([[[1.0, 0, 0], [0, 2, 0]]])).item()  # 1 and (1 + 4) / 2
    3.5
    """
    squared = (a.unsqueeze(2) - b.unsqueeze(1)).square().sum(-1)
    return squared.amin(2).mean() + squared.amin(1).mean()
