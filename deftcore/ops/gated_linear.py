"""A gated MLP's down projection with its activation inside, of which slices may be trained (S2FT)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deftcore.ops import _slices
from deftcore.ops._library import define, flatten_tokens
from deftcore.ops.checks import check_like, check_shape
from deftcore.ops.density import ACTIVATIONS, activate, activation_grad, activation_name
from deftcore.ops.kernels import DTYPE_CODES, address, backend, native, stream
from deftcore.ops.partial_linear import partial_linear_ref

_NAMES = {code: name for name, code in ACTIVATIONS.items()}


def gated_linear(
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    trained: Tensor | Sequence[Tensor] = (),
    *,
    start: int | Sequence[int] = 0,
    activation: str = "silu",
    bias: Tensor | None = None,
    synced: bool = False,
) -> Tensor:
    """y = (f(gate) * up) W^T + bias: a gated MLP's down projection with its activation inside.

    The partial back-propagation of S2FT (Yang et al., arXiv 2412.06289, section 5) where `trained` are slices of W.

    The backward keeps gate and up only, two tensors of the MLP's width where PyTorch keeps four, and computes the
    slice of the activation that the gradient of `trained` needs again. The activation and both its slopes are one pass
    each.

    Args:
        gate, up: [..., K], float32, bfloat16, float16 or float64, of one dtype.
        weight: [M, K], any strides; no gradient.
        trained, start, synced: slices of input channels, as in `partial_linear` with dim=1; none by default.
        activation: "relu", "relu2", "gelu" (erf), "gelu_tanh", "silu", or Transformers' names for them.
        bias: [M] or None.

    Returns:
        [..., M] in gate's dtype; under autocast in autocast's, with gradients in the dtypes of the arguments.

    Raises:
        TypeError, ValueError: naming the argument.

    >>> gated_linear(torch.ones(1, 2), torch.ones(1, 2), torch.eye(2), activation="relu").tolist()
    [[1.0, 1.0]]
    """
    _slices.check_matrix("gate", gate, weight)
    check_like("up", up, "gate", gate)
    check_shape("up", up, tuple(gate.shape), "as gate")
    code = ACTIVATIONS[activation_name(activation)]
    slices, starts = _slices.check_slices(weight, trained, 1, start, synced)
    gate, bias = _slices.lower(gate, weight, bias)
    return _gated_linear(gate, up.to(gate.dtype), weight, slices, starts, synced, bias, code)


# ---------------------------------------------------------------------------- gated_act


def _rows_of(x: Tensor) -> Tensor:
    """x [..., F] as rows whose elements lie side by side; strided rows stay where they are."""
    flat = flatten_tokens(x)
    return flat if flat.stride(1) == 1 or flat.shape[1] <= 1 else flat.contiguous()


def _gated_act_impl(gate: Tensor, up: Tensor, activation: int) -> Tensor:
    kernels = backend("gated_act", gate)
    if kernels is None:
        return gated_act_ref(gate, up, _NAMES[activation]).contiguous()
    a = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    g, u = _rows_of(gate), _rows_of(up)
    args = native.GatedAct(
        gate=g.data_ptr(), up=u.data_ptr(), a=address(a), rows=g.shape[0], width=g.shape[1], gate_stride=g.stride(0),
        up_stride=u.stride(0), dtype=DTYPE_CODES[gate.dtype], activation=activation,
    )  # fmt: skip
    kernels.gated_act(args, stream(gate))
    return a


def _gated_act_fake(gate: Tensor, up: Tensor, activation: int) -> Tensor:
    return gate.new_empty(gate.shape)


def gated_act_ref(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """f(gate) * up, rounded once."""
    wide = gate if gate.dtype == torch.float64 else gate.float()
    return (activate(wide, activation) * up.to(wide.dtype)).to(gate.dtype)


def gated_act_backward_ref(gate: Tensor, up: Tensor, grad: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Slopes of `gated_act_ref`."""
    wide = gate if gate.dtype == torch.float64 else gate.float()
    grad = grad.to(wide.dtype)
    grad_gate = grad * up.to(wide.dtype) * activation_grad(wide, activation)
    return grad_gate.to(gate.dtype), (grad * activate(wide, activation)).to(gate.dtype)


def _slopes(gate: Tensor, up: Tensor, grad: Tensor, activation: int) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up; `grad` [tokens, F], contiguous, is overwritten."""
    kernels = backend("gated_act", gate)
    if kernels is None:
        grad_gate, grad_up = gated_act_backward_ref(gate, up, grad, _NAMES[activation])
        return grad_gate.contiguous(), grad_up.contiguous()
    grad_gate = torch.empty_like(grad)
    g, u = _rows_of(gate), _rows_of(up)
    args = native.GatedActBackward(
        gate=g.data_ptr(), up=u.data_ptr(), grad=address(grad), grad_gate=address(grad_gate), grad_up=address(grad),
        rows=g.shape[0], width=g.shape[1], gate_stride=g.stride(0), up_stride=u.stride(0),
        dtype=DTYPE_CODES[gate.dtype], activation=activation,
    )  # fmt: skip
    kernels.gated_act_backward(args, stream(gate))
    return grad_gate, grad


# ---------------------------------------------------------------------------- gated_linear


def _gated_linear_impl(
    gate: Tensor, up: Tensor, weight: Tensor, trained: list[Tensor], starts: list[int], synced: bool, bias: Tensor |
    None, activation: int,
) -> Tensor:  # fmt: skip
    a = flatten_tokens(_gated_act_impl(gate, up, activation))
    pieces = _slices.transposed(_slices.pieces_of(weight, trained, starts, 1, synced, gate.dtype))
    y = _slices.sum_of_products(a, pieces, bias)
    return y.reshape(*gate.shape[:-1], weight.shape[0])


def _gated_linear_fake(gate: Tensor, up: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return gate.new_empty((*gate.shape[:-1], weight.shape[0]))


def _gated_linear_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    gate, up, weight, trained, starts, synced, _, activation = inputs
    ctx.save_for_backward(gate, up, weight, *trained)
    ctx.options, ctx.needed = (starts, synced, activation), [part.requires_grad for part in trained]


def _gated_linear_backward(ctx: Any, grad: Tensor) -> tuple:
    gate, up, weight, *trained = ctx.saved_tensors
    starts, synced, activation = ctx.options
    flat = flatten_tokens(grad)
    grad_gate = grad_up = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        g, u = _gated_linear_grad(flat, gate, up, weight, trained, starts, synced, activation)
        grad_gate, grad_up = g.reshape(gate.shape), u.reshape(gate.shape)
    gate, up = flatten_tokens(gate), flatten_tokens(up)
    grads: list[Tensor | None] = []
    for part, begin, wanted in zip(trained, starts, ctx.needed, strict=True):
        if not wanted:
            grads.append(None)
            continue
        columns = part.shape[1]
        a = _gated_act(gate.narrow(1, begin, columns), up.narrow(1, begin, columns), activation)
        grads.append(_slices.slice_grad(flat, a, part))
    grad_bias = flat.sum(0) if ctx.needs_input_grad[6] else None
    return grad_gate, grad_up, None, grads, _slices.no_grads(starts), None, grad_bias, None


def _gated_linear_grad_impl(
    grad: Tensor, gate: Tensor, up: Tensor, weight: Tensor, trained: list[Tensor], starts: list[int], synced: bool,
    activation: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of gate and up, [tokens, K], of flat gradients; two tensors of that size live, no third."""
    grad_a = _slices.joined_products(grad, _slices.pieces_of(weight, trained, starts, 1, synced, grad.dtype))
    return _slopes(flatten_tokens(gate), flatten_tokens(up), grad_a.to(gate.dtype).contiguous(), activation)


def _gated_linear_grad_fake(grad: Tensor, gate: Tensor, up: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    shape = (grad.shape[0], gate.shape[-1])
    return grad.new_empty(shape), grad.new_empty(shape)


def gated_linear_ref(
    gate: Tensor, up: Tensor, weight: Tensor, trained: list[Tensor], starts: list[int], activation: str, bias:
    Tensor | None,
) -> Tensor:  # fmt: skip
    """The definition, in plain PyTorch; any floating dtype."""
    return partial_linear_ref(activate(gate, activation) * up, weight, trained, starts, 1, bias)


_gated_act = define("gated_act(Tensor gate, Tensor up, int activation) -> Tensor", _gated_act_impl, _gated_act_fake)
_gated_linear_grad = define(
    f"gated_linear_grad(Tensor grad, Tensor gate, Tensor up, {_slices.SCHEMA}, bool synced, int activation) "
    "-> (Tensor, Tensor)",
    _gated_linear_grad_impl,
    _gated_linear_grad_fake,
)
_gated_linear = define(
    f"gated_linear(Tensor gate, Tensor up, {_slices.SCHEMA}, bool synced, Tensor? bias, int activation) -> Tensor",
    _gated_linear_impl,
    _gated_linear_fake,
    setup_context=_gated_linear_setup,
    backward=_gated_linear_backward,
)
