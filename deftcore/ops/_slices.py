"""A weight of which only slices are trained: checks, and products over its pieces."""

from collections.abc import Sequence

import torch
from torch import Tensor

from deftcore.ops.autocast import autocast_dtype
from deftcore.ops.checks import check_bias, check_float, check_like
from deftcore.ops.products import add_product_, linear, product

SCHEMA = "Tensor weight, Tensor[] trained, int[] starts"


def check_matrix(name: str, x: Tensor, weight: Tensor) -> None:
    """Raises unless x is [..., K] and weight [M, K]."""
    check_float(name, x)
    check_float("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight: must be a matrix [M, K], got shape {tuple(weight.shape)}")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"{name}: last dimension must be {weight.shape[1]} (weight.shape[1]), got {tuple(x.shape)}")


def check_slices(
    weight: Tensor, trained: Tensor | Sequence[Tensor], dim: int, start: int | Sequence[int], synced: bool
) -> tuple[list[Tensor], list[int]]:
    """The slices and where they begin, as lists."""
    slices = [trained] if isinstance(trained, Tensor) else list(trained)
    starts = [start][: len(slices)] if isinstance(start, int) else list(start)
    if len(slices) != len(starts):
        raise ValueError(f"start: must be one number per slice ({len(slices)}), got {len(starts)}")
    end = 0
    for part, begin in zip(slices, starts, strict=True):
        check_float("trained", part)
        if part.device != weight.device:
            raise ValueError(f"trained: must be on {weight.device} as weight, got {part.device}")
        if part.dtype != weight.dtype and not synced:
            raise TypeError(f"trained: dtype must be {weight.dtype} as weight, got {part.dtype}")
        if part.dim() != 2 or part.shape[1 - dim] != weight.shape[1 - dim]:
            wanted = f"({weight.shape[0]}, s)" if dim == 1 else f"(s, {weight.shape[1]})"
            raise ValueError(f"trained: shape must be {wanted}, got {tuple(part.shape)}")
        if begin < end or begin + part.shape[dim] > weight.shape[dim]:
            raise ValueError(
                f"start: slices must be ascending, apart and within 0..{weight.shape[dim]}, got {begin} "
                f"for {part.shape[dim]} after {end}"
            )
        end = begin + part.shape[dim]
    return slices, starts


def lower(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x and bias in the dtype to compute in; the op brings the weight to it."""
    dtype = autocast_dtype(x)
    if dtype is not None and x.dtype != torch.float64:
        return x.to(dtype), None if bias is None else bias.to(dtype)
    check_like("weight", weight, "x", x)
    check_bias("bias", bias, weight.shape[0], "x", x)
    return x, bias


# ---------------------------------------------------------------------------- products over pieces of a weight


def pieces_of(
    weight: Tensor, trained: list[Tensor], starts: list[int], dim: int, synced: bool, dtype: torch.dtype
) -> list[tuple[int, int, Tensor]]:
    """W as (begin, end, matrix) along dim: whole where every slice shares its memory, cut at the slices otherwise."""
    views = [weight.narrow(dim, a, t.shape[dim]) for a, t in zip(starts, trained, strict=True)]
    if synced or all(
        t.data_ptr() == v.data_ptr() and (t.stride() == v.stride() or t.numel() == 0)
        for t, v in zip(trained, views, strict=True)
    ):
        return [(0, weight.shape[dim], weight.to(dtype))]
    pieces, end = [], 0
    for part, begin in zip(trained, starts, strict=True):
        if begin > end:
            pieces.append((end, begin, weight.narrow(dim, end, begin - end).to(dtype)))
        end = begin + part.shape[dim]
        pieces.append((begin, end, part.to(dtype)))
    if end < weight.shape[dim]:
        pieces.append((end, weight.shape[dim], weight.narrow(dim, end, weight.shape[dim] - end).to(dtype)))
    return pieces


def sum_of_products(x: Tensor, pieces: list[tuple[int, int, Tensor]], bias: Tensor | None = None) -> Tensor:
    """bias + sum of x[:, begin:end] @ matrix."""
    (begin, end, first), *rest = pieces
    y = linear(x[:, begin:end], first.t(), bias)
    for begin, end, matrix in rest:
        add_product_(y, x[:, begin:end], matrix, beta=1.0, alpha=1.0)
    return y


def joined_products(x: Tensor, pieces: list[tuple[int, int, Tensor]], bias: Tensor | None = None) -> Tensor:
    """The products x @ matrix + bias[begin:end], side by side."""
    parts = [linear(x, m.t(), None if bias is None else bias[begin:end]) for begin, end, m in pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def transposed(pieces: list[tuple[int, int, Tensor]]) -> list[tuple[int, int, Tensor]]:
    """The pieces of W^T."""
    return [(begin, end, matrix.t()) for begin, end, matrix in pieces]


def slice_grad(grad: Tensor, inputs: Tensor, like: Tensor) -> Tensor:
    """grad^T inputs, in the strides and dtype of `like`."""
    if like.stride(0) < like.stride(1):
        return product(inputs.t(), grad).to(like.dtype).t()
    return product(grad.t(), inputs).to(like.dtype)


def no_grads(starts: list[int]) -> list | None:
    """What PyTorch wants back in the place of a list of numbers: an empty one counts as a list of tensors."""
    return None if starts else []
