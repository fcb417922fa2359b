"""The down projection of an MLP whose activations are mostly zero: weight rows of inactive neurons are not read."""

from typing import Any

import torch
from torch import Tensor

from deftcore.ops import paths
from deftcore.ops._library import define, flatten_tokens
from deftcore.ops.checks import check_bias, check_choice, check_float, check_like, check_number
from deftcore.ops.density import keep_active
from deftcore.ops.kernels import DTYPE_CODES, address, backend, give_workspace, native, stream
from deftcore.ops.paths import AUTO, MAX_TOKENS, PATHS, SPARSE
from deftcore.ops.products import product
from deftcore.ops.quantized import QuantizedTensor
from deftcore.ops.sparse_mlp4 import IDENTITY, check_weights, mlp_4bit


def sparse_down(
    a: Tensor,
    w_down_t: Tensor | QuantizedTensor,
    bias: Tensor | None = None,
    *,
    tau: float = 0.0,
    path: str = "auto",
    deterministic: bool = False,
) -> Tensor:
    """y = a W_down^T + bias, reading only the rows of w_down_t whose neuron is active in some token.

    For models whose activations training has made mostly zero (DEFT, Runwal et al., arXiv 2402.01911).
    Neuron i is active in a token when |a_i| > tau or a_i is NaN. At tau = 0 the result is the dense product up to
    summation order, with one difference: infinities and NaN in the weights of inactive neurons are not seen.

    Args:
        a: [..., F] activations; float32, bfloat16 or float16 (float64 on the reference).
        w_down_t: [F, D] neuron-major down projection, that is `down_proj.weight.t()`; a row stride above D is fine. Or
            4-bit: `quantize_4bit(down_proj.weight.t())`, or `.t()` of a quantised down projection, which is exact.
        bias: [D] or None.
        tau: threshold, at least 0; see `default_tau` for the error bound of smooth activations.
        path: "auto" measures once per machine and shape and takes the faster; "sparse" and "dense" force one. On a GPU
            nobody waits for the number of active neurons: "auto" is "sparse" where that loses at no density.
            More than 64 tokens go to "dense" under "auto", in pieces of 64 under "sparse".
        deterministic: ask for bit-equal repeats. The kernels sum in a fixed order anyway, on both devices.

    Returns:
        [..., D] in a's dtype, accumulated in float32.

    Raises:
        TypeError, ValueError: naming the argument.

    >>> sparse_down(torch.tensor([[0.0, 2.0]]), torch.tensor([[9.0, 9.0], [1.0, 3.0]])).tolist()
    [[2.0, 6.0]]
    """
    check_float("a", a)
    if a.dim() == 0:
        raise ValueError("a: must have at least one dimension, got a scalar")
    if isinstance(w_down_t, QuantizedTensor):
        check_weights(a, {"w_down_t": w_down_t}, None)
    else:
        check_rows("w_down_t", w_down_t, "a", a)
    if w_down_t.shape[0] != a.shape[-1]:
        raise ValueError(f"w_down_t: first dimension must be {a.shape[-1]} (neurons of a), got {w_down_t.shape[0]}")
    check_bias("bias", bias, w_down_t.shape[1], "a", a)
    tau = check_number("tau", tau, minimum=0.0)
    check_choice("path", path, PATHS)
    if not isinstance(deterministic, bool):
        raise TypeError(f"deterministic: must be a bool, got {type(deterministic).__name__}")
    if isinstance(w_down_t, QuantizedTensor):
        y = mlp_4bit(flatten_tokens(a), [w_down_t], None, bias, IDENTITY, tau, PATHS[path])
    else:
        y = _sparse_down(flatten_tokens(a), w_down_t, bias, tau, PATHS[path])
    return y if a.dim() == 2 else y.reshape(*a.shape[:-1], w_down_t.shape[1])


def check_rows(name: str, w: Any, like_name: str, like: Tensor) -> None:
    """Raises unless w is a matrix [F, D] of like's dtype on like's device."""
    check_like(name, w, like_name, like)
    if w.dim() != 2:
        raise ValueError(f"{name}: must be a matrix [F, D], got shape {tuple(w.shape)}")


def row_major(w: Tensor) -> Tensor:
    """w with unit column stride and non-overlapping rows; a copy only where needed."""
    return w if w.stride(1) == 1 and w.stride(0) >= w.shape[1] else w.contiguous()


def break_even_density(like: Tensor, tokens: int, neurons: int, width: int) -> float:
    """Union density below which the sparse path of `sparse_down` is the faster; measured on first use, then kept."""
    return paths.break_even_density(like, tokens, neurons, width, _down_native, down_dense)


def capacity_of(like: Tensor, tokens: int, neurons: int, width: int, path: int) -> int:
    """Most active neurons for which the sparse path is taken."""
    if path != AUTO:
        return neurons if path == SPARSE else -1
    density = break_even_density(like, min(tokens, MAX_TOKENS), neurons, width)
    if tokens > MAX_TOKENS and density < 1:
        return -1
    return paths.most_active(like, neurons, density)


# ---------------------------------------------------------------------------- sparse_down


def down_dense(a: Tensor, w_down_t: Tensor) -> Tensor:
    """a [T, F] w_down_t [F, D] by the fastest product."""
    return product(a, w_down_t)


def _down_native(a: Tensor, w_down_t: Tensor) -> Tensor:
    y = _down_rows(a, w_down_t, None, 0.0, w_down_t.shape[0])
    assert y is not None  # no capacity limit was given
    return y


def _down_rows(a: Tensor, w_down_t: Tensor, bias: Tensor | None, tau: float, capacity: int) -> Tensor | None:
    """The native product of at most 64 tokens; None when more than `capacity` neurons are active."""
    kernels = backend("sparse_down", a)
    assert kernels is not None
    (tokens, neurons), width = a.shape, w_down_t.shape[1]
    y = torch.empty((tokens, width), dtype=a.dtype, device=a.device)
    args = native.SparseDown(
        a=address(a), w_down_t=w_down_t.data_ptr(), bias=address(bias), y=address(y), workspace=0, rows_read=0,
        tokens=tokens, neurons=neurons, width=width, w_stride=w_down_t.stride(0), capacity=capacity,
        dtype=DTYPE_CODES[a.dtype], tau=tau,
    )  # fmt: skip
    workspace = give_workspace(args, kernels.sparse_down_workspace(args), a)
    kernels.sparse_down(args, stream(a))
    return None if capacity < neurons and workspace[-1].item() > capacity else y


def _sparse_down_impl(a: Tensor, w_down_t: Tensor, bias: Tensor | None, tau: float, path: int) -> Tensor:
    (tokens, neurons), width = a.shape, w_down_t.shape[1]
    if backend("sparse_down", a) is None or neurons == 0:
        return sparse_down_ref(a, w_down_t, bias, tau)
    if tokens == 0 or width == 0:
        return a.new_empty((tokens, width))
    capacity = capacity_of(a, tokens, neurons, width, path)
    if capacity >= 0:
        a, w_down_t = a.contiguous(), row_major(w_down_t)
        bias = None if bias is None else bias.contiguous()
        if tokens > MAX_TOKENS:
            return torch.cat([_sparse_down_impl(piece, w_down_t, bias, tau, path) for piece in a.split(MAX_TOKENS)])
        y = _down_rows(a, w_down_t, bias, tau, capacity)
        if y is not None:
            return y
    return sparse_down_ref(a, w_down_t, bias, tau)


def _sparse_down_fake(a: Tensor, w_down_t: Tensor, bias: Tensor | None, tau: float, path: int) -> Tensor:
    return a.new_empty((a.shape[0], w_down_t.shape[1]))


def _sparse_down_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    a, w_down_t, bias, tau, _ = inputs
    ctx.save_for_backward(a, w_down_t)
    ctx.tau, ctx.has_bias = tau, bias is not None


def _sparse_down_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
    a, w_down_t = ctx.saved_tensors
    grad_a = grad_w = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_a = keep_active(a, product(grad, w_down_t.t()), ctx.tau)
    if ctx.needs_input_grad[1]:
        grad_w = product(keep_active(a, a, ctx.tau).t(), grad)
    if ctx.has_bias and ctx.needs_input_grad[2]:
        grad_bias = grad.sum(0)
    return grad_a, grad_w, grad_bias, None, None


def sparse_down_ref(a: Tensor, w_down_t: Tensor, bias: Tensor | None, tau: float) -> Tensor:
    """The definition, in plain PyTorch; any floating dtype."""
    y = down_dense(keep_active(a, a, tau), w_down_t)
    return y if bias is None else y + bias


_sparse_down = define(
    "sparse_down(Tensor a, Tensor w_down_t, Tensor? bias, float tau, int path) -> Tensor",
    _sparse_down_impl,
    _sparse_down_fake,
    setup_context=_sparse_down_setup,
    backward=_sparse_down_backward,
)
