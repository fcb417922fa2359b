"""One step after the other: the decoding forms of the convolution and the scans, in mamba_ssm's and causal_conv1d's
signatures.

Both move a state on in place, [slots, ...], of which each row of the input owns one slot.
"""

from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deftcore.ops._library import define
from deftcore.ops.checks import check_float, check_integers, check_like, check_shape
from deftcore.ops.kernels import DTYPE_CODES, address, backend, native, stream
from deftcore.ops.ssm._layout import strided, wide_dtype
from deftcore.ops.ssm.conv1d import causal_conv1d_op, conv_parameters
from deftcore.ops.ssm.scan import MAX_STATES


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None,
    *, cache_seqlens: Tensor | None = None, conv_state_indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`causal_conv1d` for the next step or steps of a sequence; `conv_state` moves on in place.

    Where gradients are needed they go to everything but `conv_state`.

    Args:
        x: [B, C] or [B, C, T].
        conv_state: [B, C, S] in x's dtype, S at least W - 1, the newest step last.
        weight, bias, activation: as for `causal_conv1d`.
        cache_seqlens: [B], int32 or int64, the steps that row b has seen. Then `conv_state` is a ring: step t of a
            sequence stands at t mod S, whatever it is. None keeps the newest step last.
        conv_state_indices: [B], int32 or int64, the row of `conv_state` [slots, C, S] that belongs to each row of x; a
            negative one is padding: 0 comes out and no state is touched. None is 0..B - 1.

    Returns:
        As x.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_float("x", x)
    if x.dim() not in (2, 3):
        raise ValueError(f"x: must be [B, C] or [B, C, T], got shape {tuple(x.shape)}")
    steps = x if x.dim() == 3 else x.unsqueeze(-1)
    taps, offset, silu = conv_parameters(x, weight, bias, activation)
    check_like("conv_state", conv_state, "x", x)
    reach = weight.shape[1] - 1
    if conv_state.dim() != 3 or conv_state.shape[1] != x.shape[1] or conv_state.shape[2] < reach:
        raise ValueError(f"conv_state: must be [B, {x.shape[1]}, at least {reach}], got {tuple(conv_state.shape)}")
    if cache_seqlens is not None:
        check_integers("cache_seqlens", cache_seqlens, (x.shape[0],), "one per row of x", "x", x)
    slots = _check_slots("conv_state_indices", conv_state_indices, x, "conv_state", conv_state)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    if cache_seqlens is not None or needs_grad:
        out = _conv_through_window(steps, conv_state, taps, offset, cache_seqlens, slots, silu)
    else:
        out = _causal_conv1d_update(steps, conv_state, taps, offset, slots, silu)
    return out if x.dim() == 3 else out.squeeze(-1)


def selective_state_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None
    = None, dt_bias: Tensor | None = None, dt_softplus: bool = False,
    *, state_batch_indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One step of the scan: state = exp(step A) state + step B x, in place, and out = (C . state + D x) silu(z).

    Mamba's recurrence (Gu and Dao, arXiv 2312.00752, eq. 2), or Mamba-2's.

    Shapes are Mamba's, or Mamba-2's with a head dimension H (there dt, A, D and dt_bias may be expanded views). Every
    tensor has a floating dtype of its own; sums and exponents are float32, float64 where x, dt, z, B or C is. Where
    gradients are needed they go to everything but `state`.

    Args:
        state: [B, D, N] or [B, H, P, N]; float32 keeps long memories.
        x, dt, z: [B, D] or [B, H, P].
        A: [D, N] or [H, P, N], real; D, dt_bias: [D] or [H, P], or None.
        B, C: [B, N] or [B, G, N].
        state_batch_indices: [B], int32 or int64, the row of `state` that belongs to each row of x; a negative one is
            padding: 0 comes out and no state is touched. None is 0..B - 1.

    Returns:
        As x.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_float("x", x)
    check_float("state", state)
    if x.dim() not in (2, 3):
        raise ValueError(f"x: must be [B, D] or [B, H, P], got shape {tuple(x.shape)}")
    heads = (lambda t: t) if x.dim() == 3 else (lambda t: None if t is None else t.unsqueeze(t.dim() - 1))
    rest = tuple(x.shape[1:])
    if state.dim() != x.dim() + 1 or tuple(state.shape[1:-1]) != rest or not 1 <= state.shape[-1] <= MAX_STATES:
        raise ValueError(f"state: must be [slots, {', '.join(map(str, rest))}, N], got {tuple(state.shape)}")
    states = state.shape[-1]
    for name, t in (("dt", dt), ("z", z)):
        if t is not None or name == "dt":
            check_float(name, t)
            check_shape(name, t, tuple(x.shape), "as x")
    for name, t, shape in (("A", A, (*rest, states)), ("D", D, rest), ("dt_bias", dt_bias, rest)):
        if t is not None or name == "A":
            check_float(name, t)
            check_shape(name, t, shape, "one per channel")
    for name, t in (("B", B), ("C", C)):
        check_float(name, t)
        if t.dim() not in (2, 3) or (t.shape[0], t.shape[-1]) != (x.shape[0], states):
            raise ValueError(f"{name}: must be [{x.shape[0]}, {states}] or [{x.shape[0]}, G, {states}], got {t.shape}")
    B, C = (t if t.dim() == 3 else t.unsqueeze(1) for t in (B, C))
    groups = B.shape[1]
    if C.shape[1] != groups or groups == 0 or (x.shape[1] if x.dim() == 3 else 1) % groups:
        raise ValueError(f"B, C: must have one number of groups, a divisor of the heads, got {groups}, {C.shape[1]}")
    given = {"dt": dt, "z": z, "B": B, "C": C, "A": A, "D": D, "dt_bias": dt_bias, "state": state}
    for name, t in given.items():
        if t is not None and t.device != x.device:
            raise ValueError(f"{name}: must be on {x.device} as x, got {t.device}")
    slots = _check_slots("state_batch_indices", state_batch_indices, x, "state", state)
    dtype, others = x.dtype, [t.dtype for t in (dt, z, B, C) if t is not None]
    if any(other != dtype for other in others):
        # The kernel reads them in one dtype: the smallest that holds each exactly.
        common = reduce(torch.promote_types, others, dtype)
        x, dt, B, C = (t.to(common) for t in (x, dt, B, C))
        z = None if z is None else z.to(common)
    wide = wide_dtype(x)
    args: tuple[Any, ...] = (
        heads(x), heads(dt), A.to(wide) if x.dim() == 3 else A.to(wide).unsqueeze(0), B, C,
        None if D is None else heads(D.to(wide)), heads(z), None if dt_bias is None else heads(dt_bias.to(wide)),
        bool(dt_softplus), slots,
    )  # fmt: skip
    held = state if x.dim() == 3 else state.unsqueeze(1)
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args):
        out = _scan_step(held, *args)
    else:
        out = _selective_state_update(held, *args)
    return (out if x.dim() == 3 else out.squeeze(1)).to(dtype)


def _check_slots(name: str, slots: Any, x: Tensor, state_name: str, state: Tensor) -> Tensor | None:
    """Slot numbers as contiguous int64, each below the number of states and used once; None where row b has slot b."""
    if state.shape[0] != x.shape[0] and slots is None:
        raise ValueError(f"{state_name}: must have {x.shape[0]} rows as x, got {state.shape[0]}")
    if slots is None:
        return None
    check_integers(name, slots, (x.shape[0],), "one per row of x", "x", x)
    if slots.device.type == "cpu" and slots.numel() and not torch.compiler.is_compiling():
        used = slots[slots >= 0]
        if used.numel() and int(used.max()) >= state.shape[0]:
            raise ValueError(f"{name}: must be below {state.shape[0]} (rows of {state_name}), got {int(used.max())}")
        if used.unique().numel() != used.numel():
            raise ValueError(f"{name}: two rows cannot share a state")
    return slots.to(torch.int64).contiguous()


# ---------------------------------------------------------------------------- ops


def _conv_update_impl(
    x: Tensor, state: Tensor, taps: Tensor, bias: Tensor | None, slots: Tensor | None, silu: bool
) -> Tensor:
    kernels = backend("causal_conv1d", x)
    if kernels is None:
        return _conv_through_window(x, state, taps, bias, None, slots, silu).contiguous()
    out = x.new_empty(x.shape)
    held = state.contiguous()
    args = native.CausalConv1dUpdate(
        x=strided(x), out=strided(out), state=address(held), slots=address(slots), weight=address(taps),
        bias=address(bias), batch=x.shape[0], length=x.shape[2], channels=x.shape[1], width=taps.shape[0],
        window=state.shape[2], dtype=DTYPE_CODES[x.dtype], silu=silu,
    )  # fmt: skip
    kernels.causal_conv1d_update(args, stream(x))
    if held is not state:
        state.copy_(held)
    return out


def _scan_update_impl(
    state: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, z: Tensor | None,
    bias: Tensor | None, softplus: bool, slots: Tensor | None,
) -> Tensor:  # fmt: skip
    kernels = backend("selective_state_update", x)
    if kernels is None or state.dtype not in DTYPE_CODES:
        return _scan_step(state, x, dt, a, b, c, d, z, bias, softplus, slots).contiguous()
    batch, heads, head_dim = x.shape
    out, held = x.new_empty(x.shape), state.contiguous()
    a_step = 0 if a.shape[2] == 1 else a.stride(2)  # a dimension of 1 can have any stride
    if a_step not in (0, 1):
        a, a_step = a.contiguous(), 1
    b, c = b.contiguous(), c.contiguous()

    def by_head(t: Tensor | None, batched: bool = True) -> tuple[int, ...]:
        if t is None:
            return (0, 0, 0, 0)
        return (t.data_ptr(), *t.stride()[:3]) if batched else (t.data_ptr(), 0, *t.stride()[:2])

    args = native.StateUpdate(
        state=address(held), slots=address(slots), x=by_head(x), dt=by_head(dt), z=by_head(z), out=address(out),
        a=by_head(a, False), a_state=a_step, b=address(b), c=address(c), d=by_head(d, False),
        bias=by_head(bias, False), batch=batch, heads=heads, head_dim=head_dim, states=a.shape[2], groups=b.shape[1],
        dtype=DTYPE_CODES[x.dtype], state_dtype=DTYPE_CODES[state.dtype], softplus=softplus,
    )  # fmt: skip
    kernels.selective_state_update(args, stream(x))
    if held is not state:
        state.copy_(held)
    return out


# ---------------------------------------------------------------------------- plain PyTorch, differentiable


def _rows_of(slots: Tensor | None, *tensors: Tensor | None) -> tuple[Any, ...]:
    """The rows that own a slot (None: all), the index of their states, and the tensors' rows."""
    if slots is None:
        return (None, slice(None), *tensors)
    rows = (slots >= 0).nonzero().squeeze(1)
    return (rows, slots[rows], *(None if t is None else t[rows] for t in tensors))


def _spread_rows(out: Tensor, rows: Tensor | None, like: Tensor) -> Tensor:
    """out at `rows` of a tensor like `like` that is 0 elsewhere."""
    return out if rows is None else torch.zeros(like.shape, dtype=out.dtype, device=out.device).index_copy(0, rows, out)


def _conv_through_window(
    x: Tensor, state: Tensor, taps: Tensor, bias: Tensor | None, begins: Tensor | None, slots: Tensor | None, silu: bool
) -> Tensor:
    """The whole sequence's convolution behind the state's last steps; x [B, C, T], `begins` as `cache_seqlens`."""
    rows, own, mine, begins = _rows_of(slots, x, begins)
    held, added = state.detach()[own], mine.detach()
    reach, size, length = taps.shape[0] - 1, state.shape[2], x.shape[2]
    if begins is None:
        window = held[..., size - reach :].clone()  # the state is about to change
        moved = torch.cat((held, added), -1)[..., length:]
    else:

        def places(first: int, last: int) -> Tensor:
            ring = (begins.unsqueeze(1) + torch.arange(first, last, device=x.device)) % max(size, 1)
            return ring.unsqueeze(1).expand(-1, x.shape[1], -1)

        window = held.gather(2, places(-reach, 0))
        first = max(length - size, 0)  # what the ring still holds afterwards
        moved = held.scatter(2, places(first, length), added[..., first:])
    out = causal_conv1d_op(mine, taps, bias, window, None, silu)
    with torch.no_grad():
        state[own] = moved
    return _spread_rows(out, rows, x)


def _scan_step(
    state: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, z: Tensor | None,
    bias: Tensor | None, softplus: bool, slots: Tensor | None,
) -> Tensor:  # fmt: skip
    """out [B, H, P]; the sums are in a's dtype."""
    wide, per_group = a.dtype, x.shape[1] // b.shape[1]
    rows, own, mine, dt, z, b, c = _rows_of(slots, x, dt, z, b, c)
    step = dt.to(wide) if bias is None else dt.to(wide) + bias
    step = (F.softplus(step) if softplus else step).unsqueeze(-1)
    b, c = (t.to(wide).repeat_interleave(per_group, dim=1).unsqueeze(2) for t in (b, c))
    held = state.detach()[own].to(wide, copy=True)  # the state is about to change
    new = torch.exp(step * a) * held + step * b * mine.to(wide).unsqueeze(-1)
    y = (c * new).sum(-1)
    y = y if d is None else y + d * mine.to(wide)
    with torch.no_grad():
        state[own] = new.to(state.dtype)
    return _spread_rows((y if z is None else y * F.silu(z.to(wide))).to(x.dtype), rows, x)


_causal_conv1d_update = define(
    "causal_conv1d_update(Tensor x, Tensor(a!) state, Tensor taps, Tensor? bias, Tensor? slots, bool silu) -> Tensor",
    _conv_update_impl,
    lambda x, state, taps, bias, slots, silu: x.new_empty(x.shape),
)
_selective_state_update = define(
    "selective_state_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor? d, Tensor? z, "
    "Tensor? bias, bool softplus, Tensor? slots) -> Tensor",
    _scan_update_impl,
    lambda state, x, *rest: x.new_empty(x.shape),
)
