"""Rows of neighbours: gathered, or summed with weights, and the exact way back."""

from typing import Any

import torch
from torch import Tensor

from deftcore.ops._library import define
from deftcore.ops.checks import check_float, check_shape
from deftcore.ops.kernels import DTYPE_CODES, address, backend, give_workspace, native, stream


def gather_points(features: Tensor, indices: Tensor, weights: Tensor | None = None) -> Tensor:
    """Features of points by their numbers, features[b, indices[b]], or their weighted sums over the last dimension.

    The way back adds up, for each point, what its uses bring, in the order of the indices: repeats are bit-equal. Its
    own way back is exact too: gradients of gradients are there.

    Args:
        features: [B, N, C], float32, bfloat16, float16, float64.
        indices: [B, ...], int64 in 0..N-1; with weights [B, ..., k].
        weights: as indices, float32, or float64 with float64 features: sum_j weights[..., j] features[indices[..., j]].

    Returns:
        [B, ..., C] in the features' dtype; without weights bit by bit, with them summed in float32.

    Raises:
        TypeError, ValueError: naming the argument. On a GPU an index out of range is not looked for.

    >>> gather_points(torch.tensor([[[1.0], [2.0], [5.0]]]), torch.tensor([[2, 0]])).tolist()
    [[[5.0], [1.0]]]
    """
    check_float("features", features)
    if features.dim() != 3:
        raise ValueError(f"features: must be [B, N, C], got shape {tuple(features.shape)}")
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.layout != torch.strided:
        raise TypeError(f"indices: must be an int64 Tensor, got {getattr(indices, 'dtype', type(indices).__name__)}")
    if indices.dim() < (1 if weights is None else 2) or indices.shape[0] != features.shape[0]:
        raise ValueError(f"indices: must be [{features.shape[0]}, ...] as features, got {tuple(indices.shape)}")
    if indices.device != features.device:
        raise ValueError(f"indices: must be on {features.device} as features, got {indices.device}")
    if weights is None:
        return _gather_points(features, _lists(indices.unsqueeze(-1)), None).reshape(*indices.shape, features.shape[2])
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    if not isinstance(weights, Tensor) or weights.dtype != wide:
        raise TypeError(f"weights: must be a {wide} Tensor, got {getattr(weights, 'dtype', type(weights).__name__)}")
    check_shape("weights", weights, tuple(indices.shape), "as indices")
    if weights.device != features.device:
        raise ValueError(f"weights: must be on {features.device} as features, got {weights.device}")
    sums = _gather_points(features, _lists(indices), _lists(weights))
    return sums.reshape(*indices.shape[:-1], features.shape[2])


def _lists(x: Tensor) -> Tensor:
    """x [B, ..., k] as [B, R, k]; unlike reshape(B, -1, k) also where it is empty."""
    return x.reshape(x.shape[0], x.shape[1:-1].numel(), x.shape[-1])


# ---------------------------------------------------------------------------- gather_points


def _gather_points_impl(features: Tensor, indices: Tensor, weights: Tensor | None) -> Tensor:
    if indices.device.type == "cpu" and indices.numel():
        low, high = (int(n) for n in indices.aminmax())
        if low < 0 or high >= features.shape[1]:
            raise ValueError(f"indices: must be in 0..{features.shape[1] - 1}, got {low if low < 0 else high}")
    kernels = backend("gather_points", features)
    if kernels is None:
        return gather_points_ref(features, indices, weights)
    features, indices = features.contiguous(), indices.contiguous()
    weights = None if weights is None else weights.contiguous()
    out = _gather_points_fake(features, indices, weights)
    args = native.GatherPoints(
        features=address(features), indices=address(indices), weights=address(weights), out=address(out),
        clouds=features.shape[0], size=features.shape[1], rows=indices.shape[1], k=indices.shape[2],
        width=features.shape[2], dtype=DTYPE_CODES[features.dtype],
    )  # fmt: skip
    kernels.gather_points(args, stream(features))
    return out


def _gather_points_fake(features: Tensor, indices: Tensor, weights: Tensor | None) -> Tensor:
    return features.new_empty(indices.shape[0], indices.shape[1], features.shape[2])


def _gather_points_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    features, indices, weights = inputs
    ctx.save_for_backward(indices, weights, features if ctx.needs_input_grad[2] else None)
    ctx.shape, ctx.dtype = features.shape, features.dtype


def _gather_points_backward(ctx: Any, grad: Tensor) -> tuple:
    indices, weights, features = ctx.saved_tensors
    grad_features, grad_weights = gather_points_grad(grad.to(ctx.dtype), indices, weights, features, ctx.shape[1])
    return grad_features, None, grad_weights if features is not None else None


def gather_points_ref(features: Tensor, indices: Tensor, weights: Tensor | None = None) -> Tensor:
    """`gather_points` of lists of indices [B, R, k] in PyTorch operations; any floating dtype."""
    batch, rows, k = indices.shape
    numbers = indices.reshape(batch, rows * k, 1).expand(-1, -1, features.shape[2])
    found = features.gather(1, numbers)
    if weights is None:
        return found.contiguous()
    found = found.reshape(batch, rows, k, features.shape[2])
    return (found.to(weights.dtype) * weights.unsqueeze(-1)).sum(2).to(features.dtype)


# ---------------------------------------------------------------------------- gather_points_grad


def _gather_points_grad_impl(
    grad: Tensor, indices: Tensor, weights: Tensor | None, features: Tensor | None, points: int
) -> tuple[Tensor, Tensor]:
    kernels = backend("gather_points", grad)
    if kernels is None:
        return gather_points_grad_ref(grad, indices, weights, features, points)
    grad, indices = grad.contiguous(), indices.contiguous()
    weights, features = (None if x is None else x.contiguous() for x in (weights, features))
    grad_features, grad_weights = _gather_points_grad_fake(grad, indices, weights, features, points)
    weighted = weights is not None and features is not None
    args = native.GatherPointsBackward(
        grad=address(grad), features=address(features) if weighted else 0, indices=address(indices),
        weights=address(weights), grad_features=address(grad_features),
        grad_weights=address(grad_weights) if weighted else 0, workspace=0, clouds=grad.shape[0], size=points,
        rows=indices.shape[1], k=indices.shape[2], width=grad.shape[2], dtype=DTYPE_CODES[grad.dtype],
    )  # fmt: skip
    _held = give_workspace(args, kernels.gather_points_backward_workspace(args), grad)
    kernels.gather_points_backward(args, stream(grad))
    return grad_features, grad_weights


def _gather_points_grad_fake(
    grad: Tensor, indices: Tensor, weights: Tensor | None, features: Tensor | None, points: int
) -> tuple[Tensor, Tensor]:
    grad_features = grad.new_empty(grad.shape[0], points, grad.shape[2])
    if weights is None or features is None:
        return grad_features, grad.new_empty(0)
    return grad_features, weights.new_empty(weights.shape)


def gather_points_grad_ref(
    grad: Tensor, indices: Tensor, weights: Tensor | None, features: Tensor | None, points: int
) -> tuple[Tensor, Tensor]:
    """Gradients of features [B, points, C] and, where features are given, of weights; empty where they are not."""
    batch, rows, k = indices.shape
    width = grad.shape[2]
    wide = grad if grad.dtype == torch.float64 else grad.float()
    shares = wide.unsqueeze(2).expand(-1, -1, k, -1)
    if weights is not None:
        shares = shares * weights.unsqueeze(-1)
    first = torch.arange(batch, device=grad.device)[:, None, None] * points
    sums = wide.new_zeros(batch * points, width)
    sums.index_add_(0, (indices + first).reshape(-1), shares.reshape(batch * rows * k, width))
    grad_features = sums.reshape(batch, points, width).to(grad.dtype)
    if weights is None or features is None:
        return grad_features, grad.new_empty(0)
    numbers = indices.reshape(batch, rows * k, 1).expand(-1, -1, width)
    found = features.gather(1, numbers).reshape(batch, rows, k, width)
    return grad_features, (found.to(wide.dtype) * wide.unsqueeze(2)).sum(-1).to(weights.dtype)


def _gather_points_grad_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    grad, indices, weights, features, ctx.points = inputs
    ctx.save_for_backward(grad, indices, weights, features)
    ctx.set_materialize_grads(False)


def _gather_points_grad_backward(ctx: Any, of_features: Tensor | None, of_weights: Tensor | None) -> tuple:
    """Both outputs are linear in every input, so that the way back is the two ops once more."""
    grad, indices, weights, features = ctx.saved_tensors
    needs_grad, _, needs_weights, needs_features, _ = ctx.needs_input_grad
    parts, to_weights, to_features = [], None, None
    if of_features is not None:
        if needs_grad:
            parts.append(_gather_points(of_features, indices, weights))
        if needs_weights:
            _, to_weights = gather_points_grad(grad, indices, weights, of_features, ctx.points)
    if of_weights is not None and features is not None:
        if needs_grad:
            parts.append(_gather_points(features, indices, of_weights))
        if needs_features:
            to_features, _ = gather_points_grad(grad, indices, of_weights, None, ctx.points)
    return sum(parts[1:], parts[0]) if parts else None, None, to_weights, to_features, None


gather_points_grad = define(
    "gather_points_grad(Tensor grad, Tensor indices, Tensor? weights, Tensor? features, int points)"
    " -> (Tensor, Tensor)",
    _gather_points_grad_impl,
    _gather_points_grad_fake,
    setup_context=_gather_points_grad_setup,
    backward=_gather_points_grad_backward,
)
_gather_points = define(
    "gather_points(Tensor features, Tensor indices, Tensor? weights) -> Tensor",
    _gather_points_impl,
    _gather_points_fake,
    setup_context=_gather_points_setup,
    backward=_gather_points_backward,
)
