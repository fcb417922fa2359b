"""TSViT: a Transformer over a pixel patch's dates, then one over the picture's patches, for each class on its own."""

import dataclasses
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deftcore.methods.tsvit.encoder import Encoder
from deftcore.methods.tsvit.heads import ClassTokens, PixelHead, patchify, unpatchify, unpatchify_legacy
from deftcore.methods.tsvit.inputs import DATE_ROWS, check_series
from deftcore.models.own import OwnConfig, OwnModel
from deftcore.nn.buffers import ExactBuffers
from deftcore.ops.checks import check_count


@dataclasses.dataclass
class TSViTConfig(OwnConfig):
    """What a TSViT is built from; see there."""

    model_type = "tsvit"
    published = "deftcore.methods.tsvit.checkpoints.load_published"
    num_classes: int
    image_size: int
    patch_size: int
    channels: int
    dim: int = 128
    heads: int = 4
    dim_head: int = 32
    temporal_depth: int = 4
    spatial_depth: int = 4
    mlp_ratio: int = 4
    mixed_classes: int | None = None
    legacy_layout: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_classes", "image_size", "patch_size", "channels", "dim", "heads", "dim_head",
                     "temporal_depth", "spatial_depth", "mlp_ratio", "mixed_classes"):  # fmt: skip
            if name != "mixed_classes" or self.mixed_classes is not None:
                check_count(name, getattr(self, name))
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size: must be a multiple of patch_size {self.patch_size}, got {self.image_size}")


class TSViT(ExactBuffers, OwnModel):
    """Logits of each pixel's class from a series of pictures (Tarasiou, Chavez, Zafeiriou, arXiv 2301.04944).

    Args:
        num_classes: K, one learned token each.
        image_size, patch_size: H = W of the pictures, and the side of a patch, of which it is a multiple.
        channels: C, bands.
        dim, heads, dim_head: d, and how attention cuts it.
        temporal_depth, spatial_depth: layers over dates, and over patches.
        mlp_ratio: hidden width of the MLPs over d.
        mixed_classes: Q where a linear layer over the classes makes Q of the K (`adapt_head`).
        legacy_layout: the pixels in the order of weights that the authors' code trained until June 2026.
        band_mean, band_std: C numbers each, of which x is relieved; none: x comes normalised.
    """

    config_class = TSViTConfig
    exact = ("band_mean", "band_std")
    config: TSViTConfig
    band_mean: Tensor
    band_std: Tensor

    def __init__(
        self,
        num_classes: int,
        image_size: int,
        patch_size: int,
        channels: int,
        dim: int = 128,
        heads: int = 4,
        dim_head: int = 32,
        temporal_depth: int = 4,
        spatial_depth: int = 4,
        *,
        mlp_ratio: int = 4,
        mixed_classes: int | None = None,
        legacy_layout: bool = False,
        band_mean: Sequence[float] | None = None,
        band_std: Sequence[float] | None = None,
    ) -> None:
        config = TSViTConfig(
            num_classes, image_size, patch_size, channels, dim, heads, dim_head, temporal_depth, spatial_depth,
            mlp_ratio, mixed_classes, legacy_layout,
        )  # fmt: skip
        super().__init__(config)
        sizes = (dim, heads, dim_head, mlp_ratio * dim)
        self.patch = nn.Linear(patch_size**2 * channels, dim)
        self.dates = nn.Linear(DATE_ROWS, dim)  # of one-hot days: a table, and a layer that any adapter takes
        self.class_tokens = ClassTokens(num_classes, dim)
        self.temporal = Encoder(temporal_depth, *sizes)
        self.positions = nn.Parameter(torch.randn((image_size // patch_size) ** 2, dim))
        self.spatial = Encoder(spatial_depth, *sizes)
        self.head = PixelHead(dim, patch_size)
        self.mixer = nn.Linear(num_classes, mixed_classes) if mixed_classes else None
        self.register_buffer("band_mean", _per_band("band_mean", band_mean, 0.0, channels))
        self.register_buffer("band_std", _per_band("band_std", band_std, 1.0, channels))

    @classmethod
    def from_config(cls, config: TSViTConfig) -> "TSViT":
        """A model with random weights, and bands that come normalised."""
        return cls(**dataclasses.asdict(config))

    def forward(self, x: Tensor, doy: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits [B, K, H, W], or [B, Q, H, W] with a mixer.

        Args:
            x: [B, T, C, H, W], any number of frames.
            doy: integer [B, T], days of the year; 0 is padding.
            mask: bool [B, T], or by patches [B, T, n^2]: True is usable. None: all frames are read, padding too, as
                the authors' weights were trained.

        Raises:
            TypeError, ValueError: naming the argument, as `check_series`, or for sizes that are not the model's.
        """
        z = self.encode_space(self.encode_time(x, doy, mask))
        patches = self.head(z)
        rows = self.config.image_size // self.config.patch_size
        logits = (unpatchify_legacy if self.config.legacy_layout else unpatchify)(patches, rows)
        return logits if self.mixer is None else self.mixer(logits.movedim(1, -1)).movedim(-1, 1)

    def encode_time(self, x: Tensor, doy: Tensor, mask: Tensor | None = None) -> Tensor:
        """The classes' outputs of the time encoder, [B, n^2, K, d]; arguments as in `forward`."""
        check_series(x, doy, mask)
        self._check_sizes(x, mask)
        frames = patchify((x - self.band_mean[:, None, None]) / self.band_std[:, None, None], self.config.patch_size)
        unread = (doy == 0)[:, :, None, None]  # of padding what was zero stays zero, whatever the bands' mean
        if mask is not None:
            mask = mask if mask.ndim == 3 else mask[:, :, None].expand(frames.shape[:3])
            unread = unread | ~mask.unsqueeze(-1)  # a cloud may be NaN, and 0 * NaN would pass through
        frames = frames.masked_fill(unread, 0.0).to(self.positions.dtype)
        days = F.one_hot(doy.long().clamp(max=DATE_ROWS - 1), DATE_ROWS).to(self.positions.dtype)
        z = self.patch(frames) + self.dates(days).unsqueeze(2)  # [B, T, n^2, d]
        batch, length, patches = z.shape[:3]
        z = self.class_tokens(z.transpose(1, 2).flatten(0, 1))
        tokens = z.shape[1] - length
        if mask is not None:
            mask = F.pad(mask.transpose(1, 2).flatten(0, 1), (tokens, 0), value=True)
        return self.temporal(z, mask, keep=tokens).unflatten(0, (batch, patches))

    def encode_space(self, z: Tensor) -> Tensor:
        """The space encoder's outputs [B, K, n^2, d], each class by itself, for the time encoder's [B, n^2, K, d]."""
        z = z.transpose(1, 2) + self.positions
        return self.spatial(z.flatten(0, 1)).view(z.shape)

    def resize_positions(self, image_size: int) -> "TSViT":
        """Makes the model one for pictures of another size, in place: its space positions, resized bicubically.

        Raises:
            ValueError: image_size is no multiple of the patch's side.
        """
        config = dataclasses.replace(self.config, image_size=image_size)
        old, new = (each.image_size // each.patch_size for each in (self.config, config))
        grid = self.positions.detach().t().unflatten(1, (old, old)).unsqueeze(0)
        grid = grid.to(torch.promote_types(grid.dtype, torch.float32))  # there is no bicubic resize of all halves
        grid = F.interpolate(grid, size=(new, new), mode="bicubic").squeeze(0).flatten(1).t()
        self.positions = nn.Parameter(grid.to(self.positions.dtype).contiguous(), self.positions.requires_grad)
        self.config = config
        return self

    def _check_sizes(self, x: Tensor, mask: Tensor | None) -> None:
        config, (batch, length, channels, height, width) = self.config, x.shape
        if channels != config.channels:
            raise ValueError(f"x: must have {config.channels} bands, got {channels} in {list(x.shape)}")
        if height % config.patch_size or width % config.patch_size:
            raise ValueError(
                f"x: height and width must be multiples of patch_size {config.patch_size}, got {height} and {width}"
            )
        if (height, width) != (config.image_size,) * 2:
            raise ValueError(
                f"x: must be {config.image_size} x {config.image_size} pixels, got {height} x {width}; "
                "cut it into tiles, or give the model other positions with resize_positions"
            )
        shapes = [[batch, length], [batch, length, len(self.positions)]]
        if mask is not None and list(mask.shape) not in shapes:
            raise ValueError(f"mask: must be {shapes[0]} or, by patches, {shapes[1]}, got {list(mask.shape)}")


def _per_band(name: str, values: Sequence[float] | None, default: float, channels: int) -> Tensor:
    positive = name == "band_std"  # looked at as they are given: a tensor on "meta" has no values
    try:
        found = [default] * channels if values is None else [float(value) for value in values]
    except (TypeError, ValueError):
        found = []
    if len(found) != channels or not all(map(math.isfinite, found)) or (positive and min(found) <= 0):
        kind = "positive numbers" if positive else "numbers"
        raise ValueError(f"{name}: must be {channels} {kind}, one a channel, got {values}")
    return torch.tensor(found, dtype=torch.float32)
