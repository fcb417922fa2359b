"""Linear layers of which only a slice is trained (S2FT, arXiv 2412.06289): partial back-propagation."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deftcore.ops import _slices
from deftcore.ops._library import define, flatten_tokens


def partial_linear(
    x: Tensor,
    weight: Tensor,
    trained: Tensor | Sequence[Tensor],
    *,
    dim: int,
    start: int | Sequence[int] = 0,
    bias: Tensor | None = None,
    synced: bool = False,
) -> Tensor:
    """y = x W^T + bias, where only a slice of W gets a gradient (Yang et al., S2FT, arXiv 2412.06289, section 5).

    With `dim=1` the slice is W[:, start:start + s] and the backward keeps a copy of those s columns of x; with `dim=0`
    it is W[start:start + s] and the backward keeps x. The gradient has the strides of `trained`, so that fused
    optimisers, which ignore strides on the CPU, are right where `trained` is one dense block of memory: rows of a
    row-major W, columns of a W stored neuron-major (`w_t.t()`).

    Args:
        x: [..., K], float32, bfloat16, float16 or float64.
        weight: [M, K], any strides. It gets no gradient.
        trained: the slice, [M, s] or [s, K]; or several, in ascending order. Where it shares weight's memory, W is
            used whole, in one product. Where it does not, it replaces those columns or rows.
        dim: 1 for input channels, 0 for output channels.
        start: where the slice begins; one number per slice.
        bias: [M] or None.
        synced: weight holds the values of `trained` already, rounded to its dtype: `trained` is a master copy.

    Returns:
        [..., M], in x's dtype; under autocast in autocast's, with gradients in the dtype of `trained`.

    Raises:
        TypeError, ValueError: naming the argument.

    >>> w = torch.ones(2, 3)
    >>> part = torch.nn.Parameter(w[:, :1])
    >>> partial_linear(torch.ones(1, 3), w, part, dim=1).sum().backward()
    >>> part.grad.tolist()
    [[1.0], [1.0]]
    """
    _slices.check_matrix("x", x, weight)
    if dim not in (0, 1) or isinstance(dim, bool):
        raise ValueError(f"dim: must be 0 (output channels) or 1 (input channels), got {dim!r}")
    slices, starts = _slices.check_slices(weight, trained, dim, start, synced)
    x, bias = _slices.lower(x, weight, bias)
    return _partial_linear(x, weight, slices, starts, dim, synced, bias)


# ---------------------------------------------------------------------------- partial_linear


def _partial_linear_impl(
    x: Tensor, weight: Tensor, trained: list[Tensor], starts: list[int], dim: int, synced: bool, bias: Tensor | None
) -> Tensor:
    flat = flatten_tokens(x)
    pieces = _slices.transposed(_slices.pieces_of(weight, trained, starts, dim, synced, x.dtype))
    y = _slices.sum_of_products(flat, pieces, bias) if dim == 1 else _slices.joined_products(flat, pieces, bias)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _partial_linear_fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _partial_linear_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, trained, starts, dim, synced, _ = inputs
    needed = [part.requires_grad for part in trained]
    flat = flatten_tokens(x)
    kept: list[Tensor] = []
    if dim == 0:
        kept = [flat] if any(needed) else []
    else:  # copies: a view would keep the whole of x alive
        kept = [
            flat.narrow(1, a, part.shape[1]).clone(memory_format=torch.contiguous_format)
            for a, part, wanted in zip(starts, trained, needed, strict=True)
            if wanted
        ]
    # `trained` is kept so that a step between forward and backward raises, even where it is a master copy.
    ctx.save_for_backward(weight, *trained, *kept)
    ctx.options, ctx.needed, ctx.shape, ctx.dtype = (starts, dim, synced), needed, x.shape, x.dtype


def _partial_linear_backward(ctx: Any, grad: Tensor) -> tuple:
    weight, *rest = ctx.saved_tensors
    (starts, dim, synced), needed = ctx.options, ctx.needed
    trained, kept = rest[: len(starts)], iter(rest[len(starts) :])
    flat = flatten_tokens(grad)
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = _partial_linear_grad(flat, weight, trained, starts, dim, synced).reshape(ctx.shape)
    grads: list[Tensor | None] = []
    inputs = next(kept) if dim == 0 and any(needed) else None
    for part, begin, wanted in zip(trained, starts, needed, strict=True):
        if not wanted:
            grads.append(None)
        elif dim == 0:
            grads.append(_slices.slice_grad(flat.narrow(1, begin, part.shape[0]), inputs, part))  # type: ignore[arg-type]
        else:
            grads.append(_slices.slice_grad(flat, next(kept), part))
    grad_bias = flat.sum(0) if ctx.needs_input_grad[6] else None
    return grad_x, None, grads, _slices.no_grads(starts), None, None, grad_bias


def _partial_linear_grad_impl(
    grad: Tensor, weight: Tensor, trained: list[Tensor], starts: list[int], dim: int, synced: bool
) -> Tensor:
    """dX = E W of flat gradients."""
    pieces = _slices.pieces_of(weight, trained, starts, dim, synced, grad.dtype)
    return _slices.joined_products(grad, pieces) if dim == 1 else _slices.sum_of_products(grad, pieces)


def _partial_linear_grad_fake(grad: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return grad.new_empty((grad.shape[0], weight.shape[1]))


def partial_linear_ref(
    x: Tensor, weight: Tensor, trained: list[Tensor], starts: list[int], dim: int, bias: Tensor | None
) -> Tensor:
    """The definition, in plain PyTorch: W with its slices replaced, as one dense product; any floating dtype."""
    pieces, end = [], 0
    for part, begin in zip(trained, starts, strict=True):
        pieces += [weight.detach().narrow(dim, end, begin - end), part]
        end = begin + part.shape[dim]
    pieces.append(weight.detach().narrow(dim, end, weight.shape[dim] - end))
    return torch.nn.functional.linear(x, torch.cat(pieces, dim=dim), bias)


_partial_linear_grad = define(
    f"partial_linear_grad(Tensor grad, {_slices.SCHEMA}, int dim, bool synced) -> Tensor",
    _partial_linear_grad_impl,
    _partial_linear_grad_fake,
)
_partial_linear = define(
    f"partial_linear(Tensor x, {_slices.SCHEMA}, int dim, bool synced, Tensor? bias) -> Tensor",
    _partial_linear_impl,
    _partial_linear_fake,
    setup_context=_partial_linear_setup,
    backward=_partial_linear_backward,
)
