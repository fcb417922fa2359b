"""Between TSViT and its classes: class tokens, pixels in and out of patches, other classes than it was trained on."""

import torch
from torch import Tensor, nn


class ClassTokens(nn.Module):
    """K learned rows, weight [K, d], that stand in front of every sequence. They start standard normal."""

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, dim))

    def forward(self, x: Tensor) -> Tensor:
        """[N, K + L, d] for x [N, L, d]."""
        return torch.cat([self.weight.expand(x.shape[0], -1, -1), x], 1)

    def extra_repr(self) -> str:
        return "{}, {}".format(*self.weight.shape)


class PixelHead(nn.Module):
    """pixels(norm(z)): of each patch the logits of its p^2 pixels."""

    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.pixels = nn.Linear(dim, patch_size**2)

    def forward(self, z: Tensor) -> Tensor:
        """[..., p^2] for z [..., d]."""
        return self.pixels(self.norm(z))


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """Patches [B, T, n^2, p^2 C] of pictures x [B, T, C, H, W]; in a patch row by row, bands last."""
    rows, columns = x.shape[-2] // patch_size, x.shape[-1] // patch_size
    x = x.unflatten(4, (columns, patch_size)).unflatten(3, (rows, patch_size))  # [B, T, C, n, p, n, p]
    return x.permute(0, 1, 3, 5, 4, 6, 2).flatten(4).flatten(2, 3)


def unpatchify(patches: Tensor, rows: int) -> Tensor:
    """Pictures [B, K, H, W] of patches [B, K, n^2, p^2], `rows` rows of them: inner pixel (u, v) of (i, j) is at
    (i p + u, j p + v)."""
    p = round(patches.shape[-1] ** 0.5)
    x = patches.unflatten(3, (p, p)).unflatten(2, (rows, -1))  # [B, K, n, n, p, p]
    return x.transpose(3, 4).flatten(4, 5).flatten(2, 3)


def unpatchify_legacy(patches: Tensor, rows: int) -> Tensor:
    """The same numbers as `unpatchify`'s in the order that the authors' code had until June 2026: read off one after
    another, patch for patch, whatever place they belong to."""
    height = rows * round(patches.shape[-1] ** 0.5)
    return patches.flatten(2).unflatten(2, (height, -1))
