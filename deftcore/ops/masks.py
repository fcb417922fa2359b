"""Soft masks on heads and channels (Light-PEFT, arXiv 2406.03792): one factor per unit of `width` features."""

import torch
from torch import Tensor

from deftcore.ops.checks import check_float


def mask_units(x: Tensor, mask: Tensor, width: int = 1) -> Tensor:
    """x with every unit's features times the unit's mask.

    The mask's gradient is a sum over tokens and the unit's features of x times the output's gradient, in float32.

    Args:
        x: [..., units * width], float32, bfloat16, float16, float64; unit u has features u * width to (u + 1) * width.
        mask: [units], float32, or float64 with float64 x.

    Returns:
        [..., units * width] in x's dtype; where the mask is 1, x bit by bit.

    Raises:
        TypeError, ValueError: naming the argument.

    >>> mask_units(torch.ones(1, 4), torch.tensor([1.0, 0.5]), 2).tolist()
    [[1.0, 1.0, 0.5, 0.5]]
    """
    check_float("x", x)
    if mask.dtype not in ((torch.float32, torch.float64) if x.dtype == torch.float64 else (torch.float32,)):
        raise TypeError(f"mask: must be float32 (or float64 with float64 x), got {mask.dtype}")
    if mask.dim() != 1 or x.dim() == 0 or x.shape[-1] != mask.shape[0] * width:
        raise ValueError(f"mask: must have a unit per {width} of x's {tuple(x.shape)[-1:]}, got {tuple(mask.shape)}")
    return mask_units_ref(x, mask, width)


def mask_units_ref(x: Tensor, mask: Tensor, width: int = 1) -> Tensor:
    """`mask_units` in PyTorch operations."""
    return (x.unflatten(-1, (mask.shape[0], width)) * mask.unsqueeze(-1)).flatten(-2).to(x.dtype)
