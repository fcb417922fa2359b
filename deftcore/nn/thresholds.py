"""Thresholds of an MLP's neurons: which of its values count, and what a gradient makes of those that do not."""

from typing import Any

import torch
from torch import Tensor

from deftcore.ops.checks import check_choice

CRITERIA = ("product", "gate")
BACKWARDS = ("straight", "mask")
Level = float | Tensor


def keep_above(values: Tensor, level: Level, backward: str = "mask") -> Tensor:
    """Values [..., F] where |value| > level (or it is NaN), 0 elsewhere (TEAL, Liu et al., arXiv 2408.14690).

    Args:
        values: [..., F], any floating dtype.
        level: a number, or [F].
        backward: "mask": the gradient of what is 0 is 0, as that of a step function is; "straight": the gradient goes
            through as if nothing had been cut, so that what is below a threshold can rise above it again (Bengio et
            al., arXiv 1308.3432).

    Returns:
        [..., F] in values' dtype.

    Raises:
        ValueError: naming the argument.

    >>> keep_above(torch.tensor([-2.0, 0.5, 1.0]), 0.5).tolist()
    [-2.0, 0.0, 1.0]
    """
    check_choice("backward", backward, BACKWARDS)
    if isinstance(level, Tensor):
        level = level.to(values.device)
    return _KeepAbove.apply(values, values.detach().abs() <= level, backward == "straight")


class _KeepAbove(torch.autograd.Function):
    """Not `torch.where`, whose backward would keep the values too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, cut: Tensor, straight: bool) -> Tensor:
        ctx.save_for_backward(None if straight else cut)
        return values.masked_fill(cut, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (cut,) = ctx.saved_tensors
        return grad if cut is None else grad.masked_fill(cut, 0.0), None, None


class Quantiles:
    """Magnitudes counted in bins of equal relative width, 2^-12, so that shares above a level are exact and the same
    in any order of the values; 2.6 MB, however many there are.
    """

    _SHIFT, _LOWEST, _OCTAVES = 11, -40, 80

    def __init__(self) -> None:
        self.total = 0
        self._first = (127 + self._LOWEST) << (23 - self._SHIFT)
        self.counts = torch.zeros(self._OCTAVES << (23 - self._SHIFT), dtype=torch.int64)

    def add(self, values: Tensor) -> None:
        """Counts magnitudes; values of any shape."""
        bins = (values.detach().float().abs().reshape(-1).view(torch.int32) >> self._SHIFT) - self._first
        bins = bins.clamp(0, self.counts.numel() - 1)
        self.counts += torch.bincount(bins, minlength=self.counts.numel()).cpu()
        self.total += bins.numel()

    def level(self, density: float) -> tuple[float, float]:
        """The lowest level, an end of a bin, that at most this share of all is above; and the share that is.

        Raises:
            ValueError: nothing was counted.
        """
        if self.total == 0:
            raise ValueError("data: no token was seen")
        above = self.total - self.counts.cumsum(0)
        index = int((above > density * self.total).sum())
        if index >= self.counts.numel() - 1:  # the last bin has no end
            index = self.counts.numel() - 1
        share = int(above[index]) / self.total
        if index == 0:
            return 0.0, share
        end = torch.tensor(((index + self._first + 1) << self._SHIFT) - 1, dtype=torch.int32)
        return float(end.view(torch.float32)), share
