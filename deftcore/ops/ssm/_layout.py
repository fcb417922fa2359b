"""[batch, channel, time] tensors of any layout, as the state-space kernels take them."""

import torch
from torch import Tensor


def wide_dtype(x: Tensor) -> torch.dtype:
    """What states and sums over x are held in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def strided(x: Tensor | None) -> tuple[int, int, int, int]:
    """Address and strides over batch, time and channel."""
    return (0, 0, 0, 0) if x is None else (x.data_ptr(), x.stride(0), x.stride(2), x.stride(1))


def empty_like(x: Tensor) -> Tensor:
    """Of x's shape, with the time or the channels side by side as in x."""
    if x.stride(1) == 1 and x.shape[1] > 1:
        return torch.empty((x.shape[0], x.shape[2], x.shape[1]), dtype=x.dtype, device=x.device).transpose(1, 2)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def unflatten_tokens(x: Tensor, like: Tensor) -> Tensor:
    """x [B L, K] as [B, L, K], B and L from `like`."""
    return x.view(like.shape[0], like.shape[1], x.shape[1])
