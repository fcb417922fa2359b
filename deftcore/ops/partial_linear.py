"""Linear layers of which only a slice is trained (S2FT, arXiv 2412.06289): partial back-propagation."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deftcore.ops._library import autocast_dtype, define, flatten_tokens
from deftcore.ops.checks import check_float, check_like, check_shape
from deftcore.ops.density import ACTIVATIONS, activate, activation_grad, activation_name
from deftcore.ops.kernels import DTYPE_CODES, address, backend, native, stream

_NAMES = {code: name for name, code in ACTIVATIONS.items()}


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
    check_float("x", x)
    check_float("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight: must be a matrix [M, K], got shape {tuple(weight.shape)}")
    if dim not in (0, 1) or isinstance(dim, bool):
        raise ValueError(f"dim: must be 0 (output channels) or 1 (input channels), got {dim!r}")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x: last dimension must be {weight.shape[1]} (weight.shape[1]), got {tuple(x.shape)}")
    slices, starts = _check_slices(weight, trained, dim, start, synced)
    x, bias = _autocast(x, weight, bias)
    return _partial_linear(x, weight, slices, starts, dim, synced, bias)


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

    The backward keeps gate and up only, two tensors of the MLP's width where PyTorch keeps four, and computes the
    slice of the activation that the gradient of `trained` needs again. The activation and both its slopes are one pass
    each.

    Args:
        gate, up: [..., K].
        weight: [M, K], any strides; no gradient.
        trained, start, synced: slices of input channels, as in `partial_linear` with dim=1; none by default.
        activation: "relu", "relu2", "gelu" (erf), "gelu_tanh", "silu", or Transformers' names for them.
        bias: [M] or None.

    Returns:
        [..., M].

    Raises:
        TypeError, ValueError: naming the argument.

    >>> gated_linear(torch.ones(1, 2), torch.ones(1, 2), torch.eye(2), activation="relu").tolist()
    [[1.0, 1.0]]
    """
    check_float("gate", gate)
    check_like("up", up, "gate", gate)
    check_shape("up", up, tuple(gate.shape), "as gate")
    check_float("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight: must be a matrix [M, K], got shape {tuple(weight.shape)}")
    if gate.dim() == 0 or gate.shape[-1] != weight.shape[1]:
        raise ValueError(f"gate: last dimension must be {weight.shape[1]} (weight.shape[1]), got {tuple(gate.shape)}")
    code = ACTIVATIONS[activation_name(activation)]
    slices, starts = _check_slices(weight, trained, 1, start, synced)
    gate, bias = _autocast(gate, weight, bias)
    return _gated_linear(gate, up.to(gate.dtype), weight, slices, starts, synced, bias, code)


def _check_slices(
    weight: Tensor, trained: Tensor | Sequence[Tensor], dim: int, start: int | Sequence[int], synced: bool
) -> tuple[list[Tensor], list[int]]:
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


def _autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x and bias in the dtype to compute in; the op brings the weight to it."""
    dtype = autocast_dtype(x)
    if dtype is not None and x.dtype != torch.float64:
        return x.to(dtype), None if bias is None else bias.to(dtype)
    check_like("weight", weight, "x", x)
    if bias is not None:
        check_like("bias", bias, "x", x)
        check_shape("bias", bias, (weight.shape[0],), "one per output")
    return x, bias


# ---------------------------------------------------------------------------- products over pieces of a weight


def _pieces(
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


def _sum_of_products(x: Tensor, pieces: list[tuple[int, int, Tensor]], bias: Tensor | None = None) -> Tensor:
    """bias + sum of x[:, begin:end] @ matrix."""
    (begin, end, first), *rest = pieces
    y = x[:, begin:end] @ first if bias is None else torch.addmm(bias, x[:, begin:end], first)
    for begin, end, matrix in rest:
        y.addmm_(x[:, begin:end], matrix)
    return y


def _joined_products(x: Tensor, pieces: list[tuple[int, int, Tensor]], bias: Tensor | None = None) -> Tensor:
    """The products x @ matrix + bias[begin:end], side by side."""
    parts = [x @ m if bias is None else torch.addmm(bias[begin:end], x, m) for begin, end, m in pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _transposed(pieces: list[tuple[int, int, Tensor]]) -> list[tuple[int, int, Tensor]]:
    return [(begin, end, matrix.t()) for begin, end, matrix in pieces]


def _slice_grad(grad: Tensor, inputs: Tensor, like: Tensor) -> Tensor:
    """grad^T inputs, in the strides and dtype of `like`."""
    if like.stride(0) < like.stride(1):
        return (inputs.t() @ grad).to(like.dtype).t()
    return (grad.t() @ inputs).to(like.dtype)


def _no_grads(starts: list[int]) -> list | None:
    """What PyTorch wants back in the place of a list of numbers: an empty one counts as a list of tensors."""
    return None if starts else []


# ---------------------------------------------------------------------------- partial_linear


def _partial_linear_impl(
    x: Tensor, weight: Tensor, trained: list[Tensor], starts: list[int], dim: int, synced: bool, bias: Tensor | None
) -> Tensor:
    flat = flatten_tokens(x)
    pieces = _transposed(_pieces(weight, trained, starts, dim, synced, x.dtype))
    y = _sum_of_products(flat, pieces, bias) if dim == 1 else _joined_products(flat, pieces, bias)
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
            grads.append(_slice_grad(flat.narrow(1, begin, part.shape[0]), inputs, part))  # type: ignore[arg-type]
        else:
            grads.append(_slice_grad(flat, next(kept), part))
    grad_bias = flat.sum(0) if ctx.needs_input_grad[6] else None
    return grad_x, None, grads, _no_grads(starts), None, None, grad_bias


def _partial_linear_grad_impl(
    grad: Tensor, weight: Tensor, trained: list[Tensor], starts: list[int], dim: int, synced: bool
) -> Tensor:
    """dX = E W of flat gradients."""
    pieces = _pieces(weight, trained, starts, dim, synced, grad.dtype)
    return _joined_products(grad, pieces) if dim == 1 else _sum_of_products(grad, pieces)


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


# ---------------------------------------------------------------------------- gated_act


def _rows_of(x: Tensor) -> Tensor:
    """x [..., F] as rows whose elements lie side by side; strided rows stay where they are."""
    flat = flatten_tokens(x)
    return flat if flat.stride(1) == 1 or flat.shape[1] <= 1 else flat.contiguous()


def _gated_act_impl(gate: Tensor, up: Tensor, activation: int) -> Tensor:
    kernels = backend("gated_act", gate)
    if kernels is None:
        return gated_act_ref(gate, up, _NAMES[activation])
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
        return gated_act_backward_ref(gate, up, grad, _NAMES[activation])
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
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    trained: list[Tensor],
    starts: list[int],
    synced: bool,
    bias: Tensor | None,
    activation: int,
) -> Tensor:
    a = flatten_tokens(_gated_act_impl(gate, up, activation))
    y = _sum_of_products(a, _transposed(_pieces(weight, trained, starts, 1, synced, gate.dtype)), bias)
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
        grads.append(_slice_grad(flat, a, part))
    grad_bias = flat.sum(0) if ctx.needs_input_grad[6] else None
    return grad_gate, grad_up, None, grads, _no_grads(starts), None, grad_bias, None


def _gated_linear_grad_impl(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    trained: list[Tensor],
    starts: list[int],
    synced: bool,
    activation: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, [tokens, K], of flat gradients; two tensors of that size live, no third."""
    grad_a = _joined_products(grad, _pieces(weight, trained, starts, 1, synced, grad.dtype))
    return _slopes(flatten_tokens(gate), flatten_tokens(up), grad_a.to(gate.dtype).contiguous(), activation)


def _gated_linear_grad_fake(grad: Tensor, gate: Tensor, up: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    shape = (grad.shape[0], gate.shape[-1])
    return grad.new_empty(shape), grad.new_empty(shape)


def gated_linear_ref(
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    trained: list[Tensor],
    starts: list[int],
    activation: str,
    bias: Tensor | None,
) -> Tensor:
    """The definition, in plain PyTorch; any floating dtype."""
    return partial_linear_ref(activate(gate, activation) * up, weight, trained, starts, 1, bias)


_SLICES = "Tensor weight, Tensor[] trained, int[] starts"
_partial_linear_grad = define(
    f"partial_linear_grad(Tensor grad, {_SLICES}, int dim, bool synced) -> Tensor",
    _partial_linear_grad_impl,
    _partial_linear_grad_fake,
)
_partial_linear = define(
    f"partial_linear(Tensor x, {_SLICES}, int dim, bool synced, Tensor? bias) -> Tensor",
    _partial_linear_impl,
    _partial_linear_fake,
    setup_context=_partial_linear_setup,
    backward=_partial_linear_backward,
)
_gated_act = define("gated_act(Tensor gate, Tensor up, int activation) -> Tensor", _gated_act_impl, _gated_act_fake)
_gated_linear_grad = define(
    f"gated_linear_grad(Tensor grad, Tensor gate, Tensor up, {_SLICES}, bool synced, int activation) "
    "-> (Tensor, Tensor)",
    _gated_linear_grad_impl,
    _gated_linear_grad_fake,
)
_gated_linear = define(
    f"gated_linear(Tensor gate, Tensor up, {_SLICES}, bool synced, Tensor? bias, int activation) -> Tensor",
    _gated_linear_impl,
    _gated_linear_fake,
    setup_context=_gated_linear_setup,
    backward=_gated_linear_backward,
)
