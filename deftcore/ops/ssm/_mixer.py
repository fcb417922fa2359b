"""What the two fused mixers share: checks of what stands around the scan, and what is kept for the backward."""

from itertools import islice
from typing import Any

import torch
from torch import Tensor

from deftcore.ops.checks import check_float, check_shape
from deftcore.ops.ssm.conv1d import conv_taps
from deftcore.ops.ssm.projection import empty_gradients


def frozen_taps(weight: Tensor, bias: Tensor | None, channels: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The convolution's weight as [W, channels] and its bias, in the state's dtype, without gradients."""
    taps, offset = conv_taps(weight, bias, channels, x, "conv_")
    return taps.detach(), None if offset is None else offset.detach()


def masked(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x [B, L, K] with padding set to 0, and the mask [B, L] as booleans; None where nothing is masked."""
    if mask is None:
        return x, None
    check_shape("mask", mask, tuple(x.shape[:2]), "[B, L]")
    if mask.device != x.device:
        raise ValueError(f"mask: must be on {x.device} as the input, got {mask.device}")
    mask = mask.to(torch.bool)
    return x * mask.unsqueeze(-1), mask


def carried(name: str, state: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """A state of that shape, from an earlier part of the sequences, in the dtype."""
    if state is None:
        return None
    check_float(name, state)
    check_shape(name, state, shape, "the state's")
    return state.to(dtype)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a gradient will be asked for any of them."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


# ---------------------------------------------------------------------------- an op's inputs, a named tuple


def save(ctx: Any, inputs: Any, *others: Tensor) -> None:
    """Keeps the inputs, tensors and lists `frozen` and `factors` of tensors among them, and other tensors."""
    ctx.save_for_backward(
        *others, *(value if isinstance(value, Tensor) else None for value in inputs), *inputs.frozen, *inputs.factors
    )
    numbers = type(inputs)(*(None if isinstance(value, Tensor) else value for value in inputs))
    ctx.numbers = numbers._replace(frozen=len(inputs.frozen), factors=None)
    ctx.others = len(others)


def saved(ctx: Any) -> tuple[Any, list[Tensor]]:
    """The inputs that `save` kept, and the other tensors."""
    numbers = ctx.numbers
    tensors = iter(ctx.saved_tensors)  # read once: under activation checkpointing they are recomputed
    others = list(islice(tensors, ctx.others))
    values = [number if tensor is None else tensor for number, tensor in zip(numbers, tensors, strict=False)]
    frozen = list(islice(tensors, numbers.frozen))
    return type(numbers)(*values)._replace(frozen=frozen, factors=list(tensors)), others


def gradients(inputs: Any, needed: Any, factors: list[Tensor], **found: Tensor) -> Any:
    """Gradients in the order of the inputs: those found, where `needed`, a tuple of the inputs' kind, wants them."""
    trained = zip(factors, needed.factors, strict=True)
    return type(inputs)(*[None] * len(inputs))._replace(
        frozen=[None] * len(inputs.frozen),
        factors=[grad if wanted else None for grad, wanted in trained],
        **{name: grad for name, grad in found.items() if getattr(needed, name)},
    )


def gradient_shapes(
    x: Tensor, inputs: Any, grad_last: Tensor, train: bool
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """What a backward op gives: gradients of the input x, the carried window and state, and the factors."""
    window = inputs.window
    return (
        x.new_empty(x.shape), x.new_empty(0 if window is None else window.shape), grad_last.new_empty(grad_last.shape),
        empty_gradients(inputs.factors, train),
    )  # fmt: skip
