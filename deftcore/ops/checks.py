"""Checks of arguments that the ops, and the modules above them, share: one message for each kind of mistake."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# float64 runs on the references: it is there for gradcheck.
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_float(name: str, x: Any) -> None:
    """Raises TypeError unless x is a dense floating-point tensor of a supported dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: must be a Tensor, got {type(x).__name__}")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: dtype must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: must be a dense (strided) tensor, got layout {x.layout}")


def check_like(name: str, x: Any, like_name: str, like: Tensor) -> None:
    """Raises unless x is a tensor of like's dtype on like's device."""
    check_float(name, x)
    if x.dtype != like.dtype:
        raise TypeError(f"{name}: dtype must be {like.dtype} as {like_name}, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{name}: must be on {like.device} as {like_name}, got {x.device}")


def check_bias(name: str, bias: Any, size: int, like_name: str, like: Tensor) -> None:
    """Raises unless bias is None, or a tensor [size] of like's dtype on like's device."""
    if bias is not None:
        check_like(name, bias, like_name, like)
        check_shape(name, bias, (size,), "one per output")


def check_integers(name: str, x: Any, shape: tuple[int, ...], why: str, like_name: str, like: Tensor) -> None:
    """Raises unless x is an int32 or int64 tensor of this shape on like's device."""
    if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: must be an int32 or int64 tensor, got {getattr(x, 'dtype', type(x))}")
    check_shape(name, x, shape, why)
    if x.device != like.device:
        raise ValueError(f"{name}: must be on {like.device} as {like_name}, got {x.device}")


def check_shape(name: str, x: Any, shape: tuple[int, ...], why: str) -> None:
    """Raises unless x is a dense tensor of that shape."""
    if not isinstance(x, Tensor) or x.layout != torch.strided:
        raise TypeError(f"{name}: must be a dense Tensor, got {getattr(x, 'layout', type(x).__name__)}")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}: shape must be {shape} ({why}), got {tuple(x.shape)}")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raises ValueError unless value is one of the choices."""
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"{name}: must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_count(name: str, value: Any, *, minimum: int = 1) -> None:
    """Raises ValueError unless value is an integer, and not below `minimum`; true is none."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name}: must be an integer of at least {minimum}, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    """Raises ValueError unless value is true or false: as a text "false" would be true."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: must be true or false, got {value!r}")


def check_number(name: str, value: Any, *, minimum: float = -math.inf, strict: bool = False) -> float:
    """Returns value as a float; raises unless it is a finite number above (`strict`) or not below `minimum`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: must be a number, got {type(value).__name__}")
    above = value > minimum if strict else value >= minimum
    if not above or not -math.inf < value < math.inf:  # compared: under torch.compile it may be a symbol
        bound = "" if minimum == -math.inf else f" and {'above' if strict else 'at least'} {minimum}"
        raise ValueError(f"{name}: must be finite{bound}, got {value}")
    return float(value)
