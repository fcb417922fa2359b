"""What TSViT reads: days of the year, masks, and the authors' form in which the day is one more band."""

import torch
from torch import Tensor

DATE_ROWS = 366  # of the date table: row 0 is padding's, day 366 has the row of 365
# Of Sentinel-2's B2 to B8, B8A, B11 and B12 as PASTIS stores them (digital numbers), over its fold 1: its file
# NORM_S2_patch.json (Garnot and Landrieu, arXiv 2107.07933). The wheat of the Beqaa was normalised with them too.
PASTIS_MEAN = (
    1165.93982, 1375.65344, 1429.21912, 1764.79883,
    2719.27319, 3063.61182, 3205.90186, 3319.10962, 2422.90430, 1639.37036,
)  # fmt: skip
PASTIS_STD = (
    1942.61560, 1881.92346, 1959.37988, 1867.22400,
    1754.58508, 1769.40466, 1784.86060, 1767.71008, 1458.96362, 1299.28333,
)  # fmt: skip
_DAY_UNIT = 365.0001  # the authors' packed form holds days over this


def unpack(packed: Tensor, *, legacy_dates: bool = False) -> tuple[Tensor, Tensor]:
    """The pictures x [B, T, C, H, W] and days [B, T] in the authors' form [B, T, H, W, C + 1].

    Its last channel is the day of the year over 365.0001, everywhere in a frame the same; 0 where a frame is padding.

    Args:
        legacy_dates: cuts to whole days, as the authors' code does, which for 18 days of the year is one too few in
            float32; weights that were trained so may want it. False rounds.

    Raises:
        TypeError: packed is no tensor.
        ValueError: it is of another form, in bfloat16, which does not tell days apart, or a frame has several dates.

    >>> x, doy = unpack(torch.full((1, 1, 2, 2, 11), 13 / 365.0001))
    >>> tuple(x.shape), doy.item()
    ((1, 1, 10, 2, 2), 13)
    """
    if not isinstance(packed, Tensor):
        raise TypeError(f"packed: must be a Tensor, got {type(packed).__name__}")
    if packed.ndim != 5 or packed.shape[-1] < 2 or not packed.is_floating_point():
        raise ValueError(
            f"packed: must be a float [B, T, H, W, C + 1] with the date as last channel, "
            f"got {packed.dtype} {list(packed.shape)}"
        )
    if torch.finfo(packed.dtype).eps > 1e-3:  # a date is at most 1, half a day 1.4e-3
        raise ValueError(f"packed: {packed.dtype} does not tell days apart; cast x after unpacking")
    dates = packed[..., -1]
    if not bool((dates == dates[..., :1, :1]).all()):
        raise ValueError("packed: the last channel must hold one date per frame")
    days = dates[..., 0, 0] * _DAY_UNIT
    return packed[..., :-1].permute(0, 1, 4, 2, 3), (days if legacy_dates else days.round()).long()


def check_series(x: Tensor, doy: Tensor, mask: Tensor | None) -> None:
    """What a series is: one day of the year per frame, 0 where it is padding.

    Args:
        x: [B, T, C, H, W].
        doy: integer [B, T], 1 to 366, and 0 for padding: frames of zeros, or masked ones.
        mask: bool, [B, T] or [B, T, n^2]; True is usable.

    Raises:
        TypeError: one is no tensor; x is neither floating nor integer, doy not integer, mask not bool.
        ValueError: a shape, a device or a day is none of these.
    """
    for name, given in (("x", x), ("doy", doy), ("mask", mask)):
        if not isinstance(given, Tensor) and (name != "mask" or given is not None):
            raise TypeError(f"{name}: must be a Tensor, got {type(given).__name__}")
    if x.ndim != 5 or x.shape[1] < 1:
        raise ValueError(f"x: must be [B, T, C, H, W] with at least one frame, got {list(x.shape)}")
    if x.dtype == torch.bool or x.is_complex():
        raise TypeError(f"x: must be numbers, got {x.dtype}")
    if doy.is_floating_point() or doy.is_complex() or doy.dtype == torch.bool:
        raise TypeError(f"doy: must be integer days of the year, got {doy.dtype}")
    if doy.shape != x.shape[:2]:
        raise ValueError(f"doy: must be {list(x.shape[:2])} (B, T of x), got {list(doy.shape)}")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask: must be bool, True where a frame is usable, got {mask.dtype}")
    for name, other in (("doy", doy), ("mask", mask)):
        if other is not None and other.device != x.device:
            raise ValueError(f"{name}: must be on {x.device} as x is, got {other.device}")
    if not torch.compiler.is_compiling():  # the values; a compiled graph does not stop to look at them
        _check_days(x, doy.long(), mask)


def _check_days(x: Tensor, doy: Tensor, mask: Tensor | None) -> None:
    outside = doy[(doy < 0) | (doy > DATE_ROWS)]
    if outside.numel():
        raise ValueError(f"doy: must be 1 to 366, or 0 for padding, got {outside[0].item()}")
    padding = doy == 0
    if not bool(padding.any()):
        return
    if mask is not None and bool(mask[padding].any()):
        raise ValueError("doy: is 0, which is padding, at frames that mask says are usable")
    if mask is None and bool(x[padding].any()):
        raise ValueError("doy: is 0, which is padding, at frames that are not zeros; a day is 1 to 366")
