"""Whole scenes through a model that takes windows: overlapping tiles, and their logits put together again."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def starts(length: int, size: int, overlap: int = 0) -> list[int]:
    """Where tiles of a size begin so that they cover a length: every `size - overlap`, and the last ends at its end.

    Raises:
        ValueError: the tiles are longer than the length, or overlap in all.

    >>> starts(10, 4), starts(10, 4, 2), starts(4, 4)
    ([0, 4, 6], [0, 2, 4, 6], [0])
    """
    if not 1 <= size <= length:
        raise ValueError(f"size: tiles must have from 1 to {length} pixels, as many as the scene, got {size}")
    if not 0 <= overlap < size:
        raise ValueError(f"overlap: must be at least 0 and below the tiles' {size} pixels, got {overlap}")
    return [*range(0, length - size, size - overlap), length - size]


def tiles(height: int, width: int, size: int, overlap: int = 0) -> list[tuple[int, int]]:
    """(top, left) of the tiles of a scene, row by row; raises as `starts`."""
    return [(top, left) for top in starts(height, size, overlap) for left in starts(width, size, overlap)]


def mosaic(
    predict: Callable[[int, list[int]], Tensor], height: int, width: int, size: int, overlap: int = 0
) -> Iterator[tuple[int, Tensor]]:
    """The logits of a scene, the mean of all tiles where they overlap: (top, rows [K, n, width]) from above to below,
    each row once. No more than `size` rows are held.

    Args:
        predict: (top, lefts) to the logits [len(lefts), K, size, size] of the tiles of one row of tiles, in that order.

    Raises:
        ValueError: as `starts`.
    """
    tops, lefts = starts(height, size, overlap), starts(width, size, overlap)
    sums: Tensor | None = None
    for i, top in enumerate(tops):
        logits = predict(top, lefts).float()
        if sums is None:
            sums = logits.new_zeros(logits.shape[1], size, width)
            counts = logits.new_zeros(size, width)
        for left, tile in zip(lefts, logits, strict=True):
            sums[:, :, left : left + size] += tile
            counts[:, left : left + size] += 1
        done = (tops[i + 1] if i + 1 < len(tops) else height) - top  # rows that no further tile reaches
        yield top, sums[:, :done] / counts[:done]
        sums = torch.cat([sums[:, done:], torch.zeros_like(sums[:, :done])], 1)
        counts = torch.cat([counts[done:], torch.zeros_like(counts[:done])])
