"""Whole MLPs whose activations are mostly zero: weight rows of inactive neurons are not read."""

from typing import Any

import torch
from torch import Tensor

from deftcore.ops import paths, quant4
from deftcore.ops._library import define, flatten_tokens
from deftcore.ops.checks import check_bias, check_choice, check_float, check_like, check_number, check_shape
from deftcore.ops.density import ACTIVATIONS, activate, activation_name, default_tau, keep_active
from deftcore.ops.kernels import DTYPE_CODES, address, backend, give_workspace, native, stream
from deftcore.ops.paths import AUTO, DENSE, MAX_TOKENS, PATHS
from deftcore.ops.products import linear
from deftcore.ops.quantized import QuantizedTensor
from deftcore.ops.sparse_down import (
    capacity_of,
    check_rows,
    down_dense,
    row_major,
)
from deftcore.ops.sparse_mlp4 import check_weights, mlp_4bit
from deftcore.ops.timing import bucket_of


def sparse_mlp(
    x: Tensor,
    w_up: Tensor | QuantizedTensor,
    w_down_t: Tensor | QuantizedTensor,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    *,
    activation: str = "relu",
    tau: float | None = None,
    path: str = "auto",
    activations: str = "exact",
) -> Tensor:
    """y = f(x W_up^T + b_up) W_down^T + b_down, reading only active rows of w_down_t: at best 2 / (1 + density).

    For models whose activations training has made mostly zero (DEFT, Runwal et al., arXiv 2402.01911).

    Args:
        x: [..., D], float32, bfloat16 or float16 (float64 on the reference).
        w_up: [F, D]; w_down_t: [F, D] neuron-major; both 4-bit or neither. b_up: [F] or None; b_down: [D] or None.
        activation: as in `act_density`.
        tau: None is 0 for ReLU types and sqrt(1e-7) for smooth activations, where the result is then approximate:
            ||dY|| <= sum over skipped neurons of |a_i| ||w_down_t[i]||.
        path: as in `sparse_down`.
        activations: "exact" or, over 4-bit weights, "int8": x is rounded where it meets w_up, as in `linear_4bit`, and
            has no gradient. The product with w_down_t stays exact. With AVX-512 several tokens are faster, one is not.

    Returns:
        [..., D] in x's dtype.

    Raises:
        TypeError, ValueError: naming the argument.

    >>> sparse_mlp(torch.ones(1, 2), torch.tensor([[1.0, 1.0], [-1.0, 0.0]]), torch.eye(2)).tolist()
    [[2.0, 0.0]]
    """
    return _mlp(x, None, w_up, w_down_t, b_up, b_down, activation, tau, path, activations)


def sparse_gated_mlp(
    x: Tensor,
    w_gate: Tensor | QuantizedTensor,
    w_up: Tensor | QuantizedTensor,
    w_down_t: Tensor | QuantizedTensor,
    *,
    activation: str = "silu",
    tau: float | None = None,
    path: str = "auto",
    activations: str = "exact",
) -> Tensor:
    """y = (f(x W_gate^T) * (x W_up^T)) W_down^T; only rows of w_up and w_down_t with |f| > tau are read.

    For models whose activations training has made mostly zero (DEFT, Runwal et al., arXiv 2402.01911).
    At best 3 / (1 + 2 density) over the dense block. `bundle_rows` lays w_up and w_down_t side by side, so that a
    neuron is one contiguous read; the views it returns go in here and into dense products alike.

    Args:
        x: [..., D], float32, bfloat16 or float16 (float64 on the reference).
        w_gate, w_up, w_down_t: [F, D] each, rows are neurons; row strides are free. All 4-bit or none; a 4-bit block
            with more than 64 tokens, or whose rows are not whole blocks, goes to the dense 4-bit products.
        activation, tau, path: as in `sparse_mlp`.
        activations: as in `sparse_mlp`; x is rounded where it meets w_gate and w_up.

    Returns:
        [..., D] in x's dtype.

    Raises:
        TypeError, ValueError: naming the argument.

    >>> eye = torch.eye(2)
    >>> sparse_gated_mlp(torch.tensor([[3.0, -1.0]]), eye, eye, eye, activation="relu").tolist()
    [[9.0, 0.0]]
    """
    return _mlp(x, w_gate, w_up, w_down_t, None, None, activation, tau, path, activations)


def bundle_rows(w_up: Tensor, w_down_t: Tensor) -> tuple[Tensor, Tensor]:
    """Lays the rows of two matrices side by side, so that `sparse_gated_mlp` reads a neuron in one piece.

    Args:
        w_up, w_down_t: [F, D], of one floating dtype on one device.

    Returns:
        Copies of the two, views of one buffer [F, 2, D], row stride 2 D.

    Raises:
        TypeError, ValueError: naming the argument.

    >>> up, down_t = bundle_rows(torch.zeros(3, 2), torch.ones(3, 2))
    >>> up.stride(), down_t.tolist()
    ((4, 1), [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    """
    check_like("w_down_t", w_down_t, "w_up", w_up)
    check_shape("w_down_t", w_down_t, tuple(w_up.shape), "as w_up")
    bundle = torch.stack((w_up, w_down_t), dim=1)
    return bundle[:, 0], bundle[:, 1]


def _mlp(
    x: Tensor, w_gate: Tensor | QuantizedTensor | None, w_up: Tensor | QuantizedTensor, w_down_t: Tensor |
    QuantizedTensor, b_up: Tensor | None, b_down: Tensor | None, activation: str, tau: float | None, path: str,
    activations: str,
) -> Tensor:  # fmt: skip
    check_float("x", x)
    if x.dim() == 0:
        raise ValueError("x: must have at least one dimension, got a scalar")
    f = activation_name(activation)
    tau = default_tau(f) if tau is None else check_number("tau", tau, minimum=0.0)
    check_choice("path", path, PATHS)
    check_choice("activations", activations, quant4.ACTIVATIONS)
    int8 = activations == "int8"
    named = {"w_gate": w_gate, "w_up": w_up, "w_down_t": w_down_t}
    weights: dict[str, Any] = {name: w for name, w in named.items() if w is not None or name != "w_gate"}
    packed = any(isinstance(w, QuantizedTensor) for w in weights.values())
    if packed:
        check_weights(x, weights, x.shape[-1])
    else:
        for name, w in weights.items():
            check_rows(name, w, "x", x)
        if w_up.shape[1] != x.shape[-1]:
            raise ValueError(f"w_up: last dimension must be {x.shape[-1]} (width of x), got {w_up.shape[1]}")
        for name, w in weights.items():
            check_shape(name, w, tuple(w_up.shape), "neuron-major, as w_up")
    check_bias("b_up", b_up, w_up.shape[0], "x", x)
    check_bias("b_down", b_down, x.shape[-1], "x", x)
    if int8 and not packed:
        raise ValueError("activations: 'int8' is for weights in 4 bits, these are dense")
    if int8 and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, b_up, b_down)):
        raise ValueError("activations: 'int8' has no gradient; take 'exact', or call it under torch.no_grad()")
    flat, code = flatten_tokens(x), PATHS[path]
    if packed:
        y = mlp_4bit(flat, list(weights.values()), b_up, b_down, ACTIVATIONS[f], tau, code, int8=int8)
    else:
        y = sparse_mlp_op(flat, w_gate, w_up, w_down_t, b_up, b_down, ACTIVATIONS[f], tau, code)
    return y if x.dim() == 2 else y.reshape(x.shape)


def _mlp_capacity(x: Tensor, tokens: int, neurons: int, width: int, gated: bool, path: int) -> int:
    """`_capacity` of a whole MLP, which on a GPU is measured itself: its few launches count as much as its bytes."""
    if path != AUTO or x.device.type != "cuda":
        return capacity_of(x, tokens, neurons, width, path)
    tokens = bucket_of(min(tokens, MAX_TOKENS))
    ones = x.new_ones(tokens, width)

    def run(case: str, weights: Tensor, path: str) -> Tensor:
        gate, up, down = weights if gated else (None, *weights)
        return _sparse_mlp_impl(ones, gate, up, down, None, None, ACTIVATIONS[case], 0.0, PATHS[path])

    def make_weight() -> Tensor:
        weights = x.new_full((3 if gated else 2, neurons, width), 0.01)
        weights[0, torch.arange(neurons, device=x.device) % 4 != 0] *= -1  # ReLU keeps a quarter, SiLU all
        return weights

    density = paths.break_even_density(
        x, tokens, neurons, width, lambda case, w: run(case, w, "sparse"), lambda case, w: run(case, w, "dense"),
        "gated" if gated else "mlp", make_weight, ("silu", "relu"),
    )  # fmt: skip
    return paths.most_active(x, neurons, density)


# ---------------------------------------------------------------------------- sparse_mlp and sparse_gated_mlp


def _sparse_mlp_impl(
    x: Tensor, w_gate: Tensor | None, w_up: Tensor, w_down_t: Tensor, b_up: Tensor | None, b_down: Tensor | None,
    activation: int, tau: float, path: int,
) -> Tensor:  # fmt: skip
    (tokens, width), neurons = x.shape, w_up.shape[0]
    kernels = backend("sparse_mlp", x)
    if kernels is None or neurons == 0 or tokens == 0 or width == 0:
        return sparse_mlp_ref(x, w_gate, w_up, w_down_t, b_up, b_down, list(ACTIVATIONS)[activation], tau)
    capacity = _mlp_capacity(x, tokens, neurons, width, w_gate is not None, path)
    if capacity < 0 or tokens > MAX_TOKENS:
        if capacity < 0 or path == DENSE:
            return sparse_mlp_ref(x, w_gate, w_up, w_down_t, b_up, b_down, list(ACTIVATIONS)[activation], tau)
        pieces = [
            _sparse_mlp_impl(piece, w_gate, w_up, w_down_t, b_up, b_down, activation, tau, path)
            for piece in x.split(MAX_TOKENS)
        ]
        return torch.cat(pieces)
    x = x.contiguous()
    w_gate = None if w_gate is None else row_major(w_gate)
    w_up, w_down_t = row_major(w_up), row_major(w_down_t)
    b_up, b_down = (None if b is None else b.contiguous() for b in (b_up, b_down))
    # One token is bound by the traffic of the dense matrix and stays in one kernel; several go to the library first.
    # Where dense may still win (a limited capacity), the library's pre-activation serves both ways.
    z = None
    if tokens > 1 or capacity < neurons:
        z = linear(x, w_up if w_gate is None else w_gate, b_up)
    y = torch.empty_like(x)
    args = native.SparseMlp(
        x=address(x), z=address(z), w_gate=0 if w_gate is None else w_gate.data_ptr(), w_up=w_up.data_ptr(),
        w_down_t=w_down_t.data_ptr(), b_up=address(b_up), b_down=address(b_down), y=address(y), workspace=0,
        rows_read=0, tokens=tokens, neurons=neurons, width=width,
        gate_stride=0 if w_gate is None else w_gate.stride(0), up_stride=w_up.stride(0),
        down_stride=w_down_t.stride(0), capacity=capacity, dtype=DTYPE_CODES[x.dtype], activation=activation, tau=tau,
    )  # fmt: skip
    workspace = give_workspace(args, kernels.sparse_mlp_workspace(args), x)
    kernels.sparse_mlp(args, stream(x))
    if capacity < neurons and workspace[-1].item() > capacity:
        assert z is not None
        a = activate(z, list(ACTIVATIONS)[activation])
        return _mlp_rest(x, a, w_gate, w_up, w_down_t, b_down, tau)
    return y


def _sparse_mlp_fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _sparse_mlp_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, w_gate, w_up, w_down_t, b_up, b_down, activation, tau, _ = inputs
    ctx.save_for_backward(x, w_gate, w_up, w_down_t, b_up, b_down)
    ctx.activation, ctx.tau = list(ACTIVATIONS)[activation], tau


def _sparse_mlp_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # Inference op: the backward recomputes the block in plain PyTorch instead of keeping its intermediates.
    inputs: list[Any] = [None if t is None else t.detach().requires_grad_(need) for t, need in
              zip(ctx.saved_tensors, ctx.needs_input_grad[:6], strict=True)]  # fmt: skip
    with torch.enable_grad():
        x, w_gate, w_up, w_down_t, b_up, b_down = inputs
        y = sparse_mlp_ref(x, w_gate, w_up, w_down_t, b_up, b_down, ctx.activation, ctx.tau)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, grad, allow_unused=True))
    grads = [next(found) if t is not None and t.requires_grad else None for t in inputs]
    return (*grads, None, None, None)


def sparse_mlp_ref(
    x: Tensor, w_gate: Tensor | None, w_up: Tensor, w_down_t: Tensor, b_up: Tensor | None, b_down: Tensor | None,
    activation: str, tau: float,
) -> Tensor:  # fmt: skip
    """The definition, in plain PyTorch; any floating dtype."""
    z = linear(x, w_up if w_gate is None else w_gate, b_up)
    return _mlp_rest(x, activate(z, activation), w_gate, w_up, w_down_t, b_down, tau)


def _mlp_rest(
    x: Tensor, a: Tensor, w_gate: Tensor | None, w_up: Tensor, w_down_t: Tensor, b_down: Tensor | None, tau: float
) -> Tensor:
    h = keep_active(a, a, tau)
    if w_gate is not None:
        h = h * linear(x, w_up)
    y = down_dense(h, w_down_t)
    return y if b_down is None else y + b_down


sparse_mlp_op = define(
    "sparse_mlp(Tensor x, Tensor? w_gate, Tensor w_up, Tensor w_down_t, Tensor? b_up, Tensor? b_down, int activation, "
    "float tau, int path) -> Tensor",
    _sparse_mlp_impl,
    _sparse_mlp_fake,
    setup_context=_sparse_mlp_setup,
    backward=_sparse_mlp_backward,
)
