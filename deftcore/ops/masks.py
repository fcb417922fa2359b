"""Soft masks on heads and channels (Light-PEFT, arXiv 2406.03792): one factor per unit of `width` features."""

from typing import Any

import torch
from torch import Tensor

from deftcore.ops._library import define
from deftcore.ops.checks import check_count, check_float, check_like, check_shape
from deftcore.ops.density import ACTIVATIONS, activate, activation_grad, activation_name
from deftcore.ops.kernels import DTYPE_CODES, address, backend, give_workspace, native, stream

_NAMES = {code: name for name, code in ACTIVATIONS.items()}


def mask_units(
    x: Tensor, mask: Tensor, width: int = 1, *, z: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """x with every unit's features times the unit's mask: y = x * mask.

    The mask's gradient is the sum over tokens and the unit's features of x times the output's gradient, in float32, in
    the same pass that gives x its own. The graph keeps x. Where x is an activation's output, name its input z and the
    activation: the graph then keeps z, which the activation would have kept, and the gradient goes straight to z.

    Args:
        x: [..., units * width], float32, bfloat16, float16, float64; unit u has features u * width to (u + 1) * width.
        mask: [units], float32, or float64 with float64 x.
        width: features of a unit, at least 1.
        z: as x, which must be `activation` of it, by whatever code; x itself then gets no gradient. None: x is kept.
        activation: "relu", "relu2", "gelu" (erf), "gelu_tanh", "silu", or Transformers' names for them; with z only.

    Returns:
        [..., units * width] in x's dtype; where the mask is 1, x bit by bit.

    Raises:
        TypeError, ValueError: naming the argument.

    >>> mask_units(torch.ones(1, 4), torch.tensor([1.0, 0.5]), 2).tolist()
    [[1.0, 1.0, 0.5, 0.5]]
    """
    check_float("x", x)
    wide = (torch.float32, torch.float64) if x.dtype == torch.float64 else (torch.float32,)
    if not isinstance(mask, Tensor) or mask.layout != torch.strided or mask.dtype not in wide:
        got = getattr(mask, "dtype", type(mask).__name__)
        raise TypeError(f"mask: must be a float32 Tensor (or float64 with float64 x), got {got}")
    check_count("width", width)
    if mask.dim() != 1 or x.dim() == 0 or x.shape[-1] != mask.shape[0] * width:
        raise ValueError(f"mask: must have a unit per {width} of x's {tuple(x.shape)[-1:]}, got {tuple(mask.shape)}")
    if mask.device != x.device:
        raise ValueError(f"mask: must be on {x.device} as x, got {mask.device}")
    if (z is None) != (activation is None):
        raise ValueError("activation: must be given with z, and only then")
    if z is None or activation is None:
        return _mask_units(x, None, mask, width, 0)
    check_like("z", z, "x", x)
    check_shape("z", z, tuple(x.shape), "as x")
    return _mask_units(x.detach(), z, mask, width, ACTIVATIONS[activation_name(activation)])


# ---------------------------------------------------------------------------- mask_units


def _mask_units_impl(x: Tensor, z: Tensor | None, mask: Tensor, width: int, activation: int) -> Tensor:
    kernels = backend("mask_units", x)
    if kernels is None:
        return mask_units_ref(x, mask, width).contiguous()
    x, mask = x.contiguous(), mask.contiguous()
    y = torch.empty_like(x)
    args = native.MaskUnits(
        x=address(x), mask=address(mask), y=address(y), rows=x.shape[:-1].numel(), units=mask.shape[0], width=width,
        dtype=DTYPE_CODES[x.dtype],
    )  # fmt: skip
    kernels.mask_units(args, stream(x))
    return y


def _mask_units_fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _mask_units_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, z, mask, width, activation = inputs
    ctx.save_for_backward(x if z is None else z, mask)
    ctx.options = (width, None if z is None else activation)


def _mask_units_backward(ctx: Any, grad: Tensor) -> tuple:
    kept, mask = ctx.saved_tensors
    width, activation = ctx.options
    grad_x, grad_mask = _mask_units_grad(kept, grad, mask, width, activation)
    return (grad_x, None, grad_mask, None, None) if activation is None else (None, grad_x, grad_mask, None, None)


def mask_units_ref(x: Tensor, mask: Tensor, width: int = 1) -> Tensor:
    """`mask_units` in PyTorch operations; any floating dtype."""
    return (x.unflatten(-1, (mask.shape[0], width)) * mask.unsqueeze(-1)).flatten(-2).to(x.dtype)


# ---------------------------------------------------------------------------- mask_units_grad


def _mask_units_grad_impl(
    x: Tensor, grad: Tensor, mask: Tensor, width: int, activation: int | None
) -> tuple[Tensor, Tensor]:
    kernels = backend("mask_units", x)
    if kernels is None:
        name = None if activation is None else _NAMES[activation]
        grad_x, grad_mask = mask_units_grad_ref(x, grad, mask, width, name)
        return grad_x.contiguous(), grad_mask
    x, grad, mask = x.contiguous(), grad.to(x.dtype).contiguous(), mask.contiguous()
    grad_x, grad_mask = torch.empty_like(x), torch.empty_like(mask)
    args = native.MaskUnitsBackward(
        x=address(x), grad=address(grad), mask=address(mask), grad_x=address(grad_x), grad_mask=address(grad_mask),
        workspace=0, rows=x.shape[:-1].numel(), units=mask.shape[0], width=width, dtype=DTYPE_CODES[x.dtype],
        activated=activation is not None, activation=activation or 0,
    )  # fmt: skip
    _held = give_workspace(args, kernels.mask_units_backward_workspace(args), x)
    kernels.mask_units_backward(args, stream(x))
    return grad_x, grad_mask


def _mask_units_grad_fake(x: Tensor, grad: Tensor, mask: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), mask.new_empty(mask.shape)


def mask_units_grad_ref(
    x: Tensor, grad: Tensor, mask: Tensor, width: int, activation: str | None
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the mask of m f(x); f is the identity for None."""
    wide = x if x.dtype == torch.float64 else x.float()
    grad = grad.to(wide.dtype)
    grad_x, value = grad * mask.repeat_interleave(width), wide
    if activation is not None:
        grad_x, value = grad_x * activation_grad(wide, activation), activate(wide, activation)
    sums = (grad * value).reshape(x.shape[:-1].numel(), mask.shape[0], width).sum((0, 2))
    return grad_x.to(x.dtype), sums.to(mask.dtype)


_mask_units_grad = define(
    "mask_units_grad(Tensor x, Tensor grad, Tensor mask, int width, int? activation) -> (Tensor, Tensor)",
    _mask_units_grad_impl,
    _mask_units_grad_fake,
)
_mask_units = define(
    "mask_units(Tensor x, Tensor? z, Tensor mask, int width, int activation) -> Tensor",
    _mask_units_impl,
    _mask_units_fake,
    setup_context=_mask_units_setup,
    backward=_mask_units_backward,
)
