"""The selective scan of Mamba (Gu and Dao, arXiv 2312.00752), in mamba_ssm's signature."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deftcore.ops._library import define
from deftcore.ops.checks import check_float, check_like, check_shape
from deftcore.ops.kernels import DTYPE_CODES, address, backend, give_workspace, native, stream
from deftcore.ops.ssm._layout import empty_like, strided, wide_dtype

MAX_STATES = 256
MASKED_STEP = -1e4  # softplus of it is 0: a masked step leaves the state as it is


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, return_last_state: bool = False,
    *, initial_state: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """out_t = (C_t . h_t + D u_t) silu(z_t) with h_t = exp(step_t A) h_{t-1} + step_t B_t u_t.

    Mamba's scan (Gu and Dao, arXiv 2312.00752, algorithm 2).

    step = delta + delta_bias, through softplus where `delta_softplus` is set. The state is float32. Time is linear in
    L; for the backward a state is kept every 32 steps, the rest is computed again. The last state and the initial one
    are differentiable too.

    Args:
        u, delta, z: [B, D, L] of one floating dtype, any strides ([B, L, D] transposed needs no copy).
        A: [D, N], real; N up to 256.
        B, C: [B, N, L] or [B, G, N, L], G groups of channels; or [D, N], fixed in time.
        D, delta_bias: [D] or None.
        return_last_state: also return h_L.
        initial_state: [B, D, N]; None is 0.

    Returns:
        out [B, D, L] in u's dtype; with `return_last_state` also the last state [B, D, N], float32 (float64 for
        float64).

    Raises:
        TypeError, ValueError: naming the argument.

    >>> one = torch.ones(1, 1, 3)
    >>> selective_scan(one, one, torch.zeros(1, 1), one, one).tolist()
    [[[1.0, 2.0, 3.0]]]
    """
    check_float("u", u)
    if u.dim() != 3:
        raise ValueError(f"u: must be [B, D, L], got shape {tuple(u.shape)}")
    batch, channels, _ = u.shape
    for name, x in (("delta", delta), ("z", z)):
        if x is not None or name == "delta":
            check_like(name, x, "u", u)
            check_shape(name, x, tuple(u.shape), "as u")
    wide = wide_dtype(u)
    if isinstance(A, Tensor) and A.is_complex():
        raise TypeError(f"A: must be real, got {A.dtype}")
    check_float("A", A)
    if A.dim() != 2 or A.shape[0] != channels or not 1 <= A.shape[1] <= MAX_STATES:
        raise ValueError(f"A: shape must be ({channels}, N) with N in 1..{MAX_STATES}, got {tuple(A.shape)}")
    states = A.shape[1]
    b, groups = _coefficients("B", B, u, states)
    c, groups_c = _coefficients("C", C, u, states)
    if groups and groups_c and groups != groups_c:
        raise ValueError(f"C: must have B's {groups} groups, got {groups_c}")
    for name, x in (("D", D), ("delta_bias", delta_bias)):
        if x is not None:
            check_float(name, x)
            check_shape(name, x, (channels,), "one per channel")
    first = None
    if initial_state is not None:
        check_float("initial_state", initial_state)
        check_shape("initial_state", initial_state, (batch, channels, states), "[B, D, N]")
        first = initial_state.to(wide).transpose(1, 2).contiguous()
    for name, x in (("A", A), ("D", D), ("delta_bias", delta_bias), ("initial_state", initial_state)):
        if x is not None and x.device != u.device:
            raise ValueError(f"{name}: must be on {u.device} as u, got {x.device}")
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    out, last, _ = _selective_scan(
        u, delta, A.to(wide).t().contiguous(), b, c, None if D is None else D.to(wide).contiguous(), z,
        None if delta_bias is None else delta_bias.to(wide).contiguous(), first, bool(delta_softplus), keep,
    )  # fmt: skip
    return (out, last.transpose(1, 2)) if return_last_state else out


def _coefficients(name: str, x: Tensor, u: Tensor, states: int) -> tuple[Tensor, int]:
    """B or C as the op takes it, [B, L, G, N] or [N, D] where fixed, in the state's dtype; and G, 0 where fixed."""
    check_float(name, x)
    if x.device != u.device:
        raise ValueError(f"{name}: must be on {u.device} as u, got {x.device}")
    batch, channels, length = u.shape
    wide = wide_dtype(u)
    if x.dim() == 2:
        check_shape(name, x, (channels, states), "[D, N]")
        return x.to(wide).t().contiguous(), 0
    grouped = x.unsqueeze(1) if x.dim() == 3 else x
    if grouped.dim() != 4 or (grouped.shape[0], *grouped.shape[2:]) != (batch, states, length):
        raise ValueError(
            f"{name}: shape must be ({batch}, {states}, {length}), ({batch}, G, {states}, {length}) or "
            f"({channels}, {states}), got {tuple(x.shape)}"
        )
    groups = grouped.shape[1]
    if groups == 0 or channels % groups:
        raise ValueError(f"{name}: the number of groups must divide D = {channels}, got {groups}")
    return grouped.permute(0, 3, 1, 2).to(wide).contiguous(), groups


# ---------------------------------------------------------------------------- ops


def scan_forward(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, first: Tensor | None, softplus: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """out [B, D, L], the last state [B, N, D], and with `keep` states for the backward, every `scan_chunk` steps."""
    kernels, out = backend("selective_scan", u), empty_like(u)
    batch, channels, length = u.shape
    states = a.shape[0]
    if kernels is None:
        found, last, h, _ = _scan_ref(u, delta, a, b, c, d, z, delta_bias, first, softplus)
        chunks = h[:, : length : native.scan_chunk].contiguous() if keep else a.new_empty(0)
        return out.copy_(found), last, chunks
    last = a.new_empty((batch, states, channels))
    chunks = a.new_empty((batch, -(-length // native.scan_chunk), states, channels) if keep else (0,))
    args = _native_args(u, delta, a, b, c, d, z, delta_bias, first, softplus, out, last, chunks)
    kernels.selective_scan(args, stream(u))
    return out, last, chunks


def _native_args(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, first: Tensor | None, softplus: bool, out: Tensor, last: Tensor | None, chunks: Tensor,
) -> Any:  # fmt: skip
    groups = b.shape[2] if b.dim() == 4 else c.shape[2] if c.dim() == 4 else 1
    return native.SelectiveScan(
        u=strided(u), delta=strided(delta), z=strided(z), out=strided(out), a=address(a), b=address(b), c=address(c),
        d=address(d), delta_bias=address(delta_bias), first=address(first), last=address(last),
        chunks=address(chunks) if chunks.numel() else 0, batch=u.shape[0], length=u.shape[2], channels=u.shape[1],
        states=a.shape[0], groups=groups, dtype=DTYPE_CODES[u.dtype], softplus=softplus, fixed_b=b.dim() == 2,
        fixed_c=c.dim() == 2,
    )  # fmt: skip


def _scan_fake(u: Tensor, delta: Tensor, a: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, length = u.shape
    chunks = (batch, -(-length // native.scan_chunk), a.shape[0], channels) if rest[-1] else (0,)
    return empty_like(u), a.new_empty((batch, a.shape[0], channels)), a.new_empty(chunks)


def _scan_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, softplus, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.softplus = softplus
    ctx.mark_non_differentiable(output[2])


def _scan_backward(ctx: Any, grad_out: Tensor, grad_last: Tensor, _: Tensor) -> tuple:
    u, delta, a, b, c, d, z, delta_bias, first, chunks = ctx.saved_tensors
    wanted = [bool(need) for need in ctx.needs_input_grad[:9]]
    found = _selective_scan_grad(
        grad_out, grad_last, u, delta, a, b, c, d, z, delta_bias, first, chunks, ctx.softplus, wanted
    )
    return (*(g if need else None for g, need in zip(found, wanted, strict=True)), None, None)


def scan_backward(
    grad_out: Tensor, grad_last: Tensor, u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None,
    z: Tensor | None, delta_bias: Tensor | None, first: Tensor | None, chunks: Tensor, softplus: bool,
    wanted: list[bool], into: tuple[Tensor, Tensor, Tensor | None] | None = None, again: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients in the order of the inputs.

    Those of u, delta and z are written to `into` where that is given (grad_out and delta may be among them); `again`
    receives the forward's out.
    """
    kernels = backend("selective_scan", u)
    grad_u, grad_delta, grad_z = (empty_like(u), empty_like(delta), None) if into is None else into
    if z is not None and grad_z is None:
        grad_z = empty_like(z)
    if kernels is None:
        found = _scan_backward_ref(grad_out, grad_last, u, delta, a, b, c, d, z, delta_bias, first, softplus, again)
        for to, place in ((grad_u, 0), (grad_delta, 1), (grad_z, 6)):
            if to is not None:
                to.copy_(found[place])
        of_z = u.new_empty(0) if grad_z is None else grad_z
        needed = [
            g if need else a.new_empty(0)
            for g, need in zip((*found[2:6], found[7]), (*wanted[2:6], wanted[7]), strict=True)
        ]
        return grad_u, grad_delta, *needed[:4], of_z, needed[4], found[8]
    sums = [
        torch.zeros_like(x) if x is not None and need else None
        for x, need in zip((a, b, c, d, delta_bias), (*wanted[2:6], wanted[7]), strict=True)
    ]
    into_a, into_b, into_c, into_d, into_bias = map(address, sums)
    grad_first = grad_last.to(torch.float32).clone(memory_format=torch.contiguous_format)
    args = native.SelectiveScanBackward(
        forward=_native_args(u, delta, a, b, c, d, z, delta_bias, first, softplus, grad_out, None, chunks),
        grad_u=strided(grad_u), grad_delta=strided(grad_delta), grad_z=strided(grad_z), out_again=strided(again),
        grad_a=into_a, grad_b=into_b, grad_c=into_c, grad_d=into_d, grad_delta_bias=into_bias,
        grad_first=address(grad_first), workspace=0,
    )  # fmt: skip
    _held = give_workspace(args, kernels.selective_scan_backward_workspace(args), u)
    kernels.selective_scan_backward(args, stream(u))
    empty = a.new_empty(0)
    grad_a, grad_b, grad_c, grad_d, grad_bias = (empty.clone() if x is None else x for x in sums)
    grad_z = u.new_empty(0) if grad_z is None else grad_z
    return grad_u, grad_delta, grad_a, grad_b, grad_c, grad_d, grad_z, grad_bias, grad_first


def _scan_grad_fake(
    grad_out: Tensor, grad_last: Tensor, u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None,
    z: Tensor | None, delta_bias: Tensor | None, first: Tensor | None, chunks: Tensor, softplus: bool,
    wanted: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    def like(x: Tensor | None, need: bool) -> Tensor:
        return a.new_empty(x.shape if x is not None and need else 0)

    wide = [like(x, need) for x, need in zip((a, b, c, d), wanted[2:6], strict=True)]
    grad_z = u.new_empty(0) if z is None else empty_like(z)
    shape = (u.shape[0], a.shape[0], u.shape[1])
    return empty_like(u), empty_like(delta), *wide, grad_z, like(delta_bias, wanted[7]), a.new_empty(shape)


# ---------------------------------------------------------------------------- references


def selective_scan_ref(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition, step by step, in plain differentiable PyTorch, in u's dtype: out and the last state [B, D, N]."""
    batch, channels, length = u.shape
    step = delta if delta_bias is None else delta + delta_bias[:, None]
    step = F.softplus(step) if delta_softplus else step

    def at(x: Tensor, t: int) -> Tensor:
        """Coefficients of one step, broadcastable to [B, D, N]."""
        if x.dim() == 2:
            return x
        grouped = x.unsqueeze(1) if x.dim() == 3 else x
        return grouped[..., t].repeat_interleave(channels // grouped.shape[1], dim=1)

    h = u.new_zeros(batch, channels, A.shape[1]) if initial_state is None else initial_state
    outs = []
    for t in range(length):
        s = step[:, :, t, None]
        h = torch.exp(s * A) * h + s * at(B, t) * u[:, :, t, None]
        outs.append((at(C, t) * h).sum(-1))
    y = torch.stack(outs, dim=2) if outs else u.new_zeros(u.shape)
    y = y if D is None else y + D[:, None] * u
    return (y if z is None else y * F.silu(z)), h


def _scan_ref(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, first: Tensor | None, softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The op on any device: out, last state [B, N, D], states before and after each step [B, L + 1, N, D], steps."""
    step = delta.to(a.dtype) if delta_bias is None else delta.to(a.dtype) + delta_bias[:, None]
    step = (F.softplus(step) if softplus else step).transpose(1, 2)  # [B, L, D]
    wide = u.to(a.dtype).transpose(1, 2)
    batch, length, channels = wide.shape
    h = a.new_zeros((batch, length + 1, a.shape[0], channels))
    if first is not None:
        h[:, 0] = first
    bt, ct = _spread(b, channels), _spread(c, channels)
    for t in range(length):
        s = step[:, t, None]
        h[:, t + 1] = torch.exp(s * a) * h[:, t] + s * wide[:, t, None] * (bt if bt.dim() == 2 else bt[:, t])
    y = (ct * h[:, 1:]).sum(2)
    y = y if d is None else y + d * wide
    y = y if z is None else y * F.silu(z.to(a.dtype).transpose(1, 2))
    return y.transpose(1, 2).to(u.dtype).contiguous(), h[:, -1].clone(), h, step


def _spread(x: Tensor, channels: int) -> Tensor:
    """[B, L, G, N] as [B, L, N, D]; fixed coefficients [N, D] as they are."""
    return x if x.dim() == 2 else x.repeat_interleave(channels // x.shape[2], dim=2).transpose(2, 3)


def _gather(x: Tensor, like: Tensor) -> Tensor:
    """The adjoint of `_spread`: [B, L, N, D] summed over the channels of each group, or over batch and time."""
    if like.dim() == 2:
        return x.sum((0, 1))
    batch, length, states, channels = x.shape
    return (
        x.reshape(batch, length, states, like.shape[2], channels // like.shape[2]).sum(-1).transpose(2, 3).contiguous()
    )


def _scan_backward_ref(
    grad_out: Tensor, grad_last: Tensor, u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None,
    z: Tensor | None, delta_bias: Tensor | None, first: Tensor | None, softplus: bool, again: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The adjoint recursion, step by step: g_t = c_t dy_t + exp(step_{t+1} a) g_{t+1}."""
    _, _, h, step = _scan_ref(u, delta, a, b, c, d, z, delta_bias, first, softplus)
    wide, dy = u.to(a.dtype).transpose(1, 2), grad_out.to(a.dtype).transpose(1, 2)
    batch, length, channels = wide.shape
    bt, ct = (_spread(x, channels).expand(batch, length, a.shape[0], channels) for x in (b, c))
    grad_z = u.new_empty(0)
    if z is not None:
        zt = z.to(a.dtype).transpose(1, 2)
        y = (ct * h[:, 1:]).sum(2) + (0 if d is None else d * wide)
        sigmoid = torch.sigmoid(zt)
        grad_z = (dy * y * sigmoid * (1 + zt * (1 - sigmoid))).transpose(1, 2).to(z.dtype).contiguous()
        dy = dy * zt * sigmoid
        if again is not None:
            again.copy_((y * zt * sigmoid).transpose(1, 2))
    g = torch.zeros_like(h[:, 1:])
    carry = grad_last.to(a.dtype)
    decay = torch.exp(step.unsqueeze(2) * a)
    for t in range(length - 1, -1, -1):
        g[:, t] = ct[:, t] * dy[:, t, None] + carry
        carry = decay[:, t] * g[:, t]
    decayed = decay * h[:, :-1]
    grad_u = step * (g * bt).sum(2) + (0 if d is None else d * dy)
    grad_step = (g * (bt * wide.unsqueeze(2) + a * decayed)).sum(2)
    raw = delta.to(a.dtype).transpose(1, 2) + (0 if delta_bias is None else delta_bias)
    if softplus:
        grad_step = grad_step * torch.where(raw > 20, 1.0, torch.sigmoid(raw))
    empty = a.new_empty(0)
    return (
        grad_u.transpose(1, 2).to(u.dtype).contiguous(), grad_step.transpose(1, 2).to(u.dtype).contiguous(),
        (step.unsqueeze(2) * g * decayed).sum((0, 1)), _gather(g * (step * wide).unsqueeze(2), b),
        _gather(dy.unsqueeze(2) * h[:, 1:], c), empty if d is None else (dy * wide).sum((0, 1)), grad_z,
        empty.clone() if delta_bias is None else grad_step.sum((0, 1)), carry.contiguous(),
    )  # fmt: skip


_TENSORS = (
    "Tensor u, Tensor delta, Tensor a, Tensor b, Tensor c, Tensor? d, Tensor? z, Tensor? delta_bias, Tensor? first"
)
_selective_scan_grad = define(
    f"selective_scan_grad(Tensor grad_out, Tensor grad_last, {_TENSORS}, Tensor chunks, bool softplus, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    scan_backward,
    _scan_grad_fake,
)
_selective_scan = define(
    f"selective_scan({_TENSORS}, bool softplus, bool keep) -> (Tensor, Tensor, Tensor)",
    scan_forward,
    _scan_fake,
    setup_context=_scan_setup,
    backward=_scan_backward,
)
