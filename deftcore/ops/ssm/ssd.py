"""The scan of Mamba-2 (Dao and Gu, arXiv 2405.21060): one step and one decay per head, in mamba_ssm's signature."""

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deftcore.ops._library import define
from deftcore.ops.checks import check_float, check_shape
from deftcore.ops.kernels import DTYPE_CODES, address, backend, give_workspace, native, stream
from deftcore.ops.ssm._layout import wide_dtype
from deftcore.ops.ssm.chunked import ssd_chunked, ssd_chunked_backward
from deftcore.ops.ssm.conv1d import check_sequence
from deftcore.ops.ssm.scan import MAX_STATES
from deftcore.ops.timing import bucket_of, native_pays


def mamba_chunk_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = None, z: Tensor |
    None = None, dt_bias: Tensor | None = None, initial_states: Tensor | None = None, seq_idx: Tensor | None = None,
    dt_softplus: bool = False, dt_limit: tuple[float, float] = (0.0, float("inf")), return_final_states: bool =
    False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """y_t = h_t C_t + D x_t with h_t = exp(step_t A) h_{t-1} + step_t x_t B_t^T, per head (Mamba-2, eq. 1 and 2).

    step = clamp(softplus(dt + dt_bias), dt_limit), softplus where `dt_softplus` is set. The state is float32. Time is
    linear in L, and nothing but the inputs is kept for the backward. Every tensor but `seq_idx` is differentiable
    and has a floating dtype of its own.

    Args:
        x, z: [B, L, H, P]; B, C: [B, L, G, N], G a divisor of H, N up to 256.
        dt: [B, L, H].
        A: [H], negative, real; D: [H], [H, P] or None; dt_bias: [H] or None.
        chunk_size: as mamba_ssm takes it; the result does not depend on it.
        z: gate, out = y silu(z).
        initial_states: [B, H, P, N] or None for 0.
        seq_idx: [B, L] integers; the state starts from 0 where the number changes. The first sequence continues
            `initial_states`, the last one's state is returned.
        return_final_states: also return h_L.

    Returns:
        out [B, L, H, P] in x's dtype; with `return_final_states` also the last state [B, H, P, N], float32 (float64
        for float64).

    Raises:
        TypeError, ValueError: naming the argument.

    >>> one = torch.ones(1, 3, 1, 1)
    >>> mamba_chunk_scan(one, one[..., 0], torch.zeros(1), one, one, 64).flatten().tolist()
    [1.0, 2.0, 3.0]
    """
    check_float("x", x)
    if x.dim() != 4:
        raise ValueError(f"x: must be [B, L, H, P], got shape {tuple(x.shape)}")
    batch, length, heads, head_dim = x.shape
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size: must be a positive integer, got {chunk_size!r}")
    wide = wide_dtype(x)
    check_float("dt", dt)
    check_shape("dt", dt, (batch, length, heads), "[B, L, H]")
    for name, t in (("B", B), ("C", C)):
        check_float(name, t)
        if t.dim() != 4 or tuple(t.shape[:2]) != (batch, length) or not 1 <= t.shape[3] <= MAX_STATES:
            raise ValueError(f"{name}: must be [{batch}, {length}, G, N], N in 1..{MAX_STATES}, got {tuple(t.shape)}")
    groups, states = B.shape[2:]
    if groups == 0 or heads % groups:
        raise ValueError(f"B: the number of groups must divide H = {heads}, got {groups}")
    check_shape("C", C, tuple(B.shape), "as B")
    if D is not None:
        check_float("D", D)
        if tuple(D.shape) not in ((heads,), (heads, head_dim)):
            raise ValueError(f"D: shape must be ({heads},) or ({heads}, {head_dim}), got {tuple(D.shape)}")
        D = (D.unsqueeze(-1) if D.dim() == 1 else D).to(wide).expand(heads, head_dim).reshape(-1).contiguous()
    per_head: tuple[tuple[str, Tensor | None], ...] = (("A", A), ("dt_bias", dt_bias))
    for name, each in per_head:
        if each is not None or name == "A":
            check_float(name, each)
            check_shape(name, each, (heads,), "one per head")
    if z is not None:
        check_float("z", z)
        check_shape("z", z, tuple(x.shape), "as x")
    if initial_states is not None:
        check_float("initial_states", initial_states)
        check_shape("initial_states", initial_states, (batch, heads, head_dim, states), "[B, H, P, N]")
        initial_states = initial_states.to(wide).contiguous()
    others = (("dt", dt), ("B", B), ("C", C), ("D", D), ("z", z), ("initial_states", initial_states))
    for name, each in (*per_head, *others):
        if each is not None and each.device != x.device:
            raise ValueError(f"{name}: must be on {x.device} as x, got {each.device}")
    step, log_decay = steps_of(dt.to(wide), A, dt_bias, dt_softplus, dt_limit)
    if seq_idx is not None:
        seq_idx = check_sequence(seq_idx, batch, length, x)
        begins = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
        log_decay = log_decay.masked_fill(begins.unsqueeze(-1), -torch.inf)
    b, c = (t.to(wide).contiguous() for t in (B, C))
    out, last = _ssd(collapsible(x), step.contiguous(), log_decay.contiguous(), b, c, D, initial_states)
    out = out if z is None else (out * F.silu(z)).to(x.dtype)
    return (out, last) if return_final_states else out


def steps_of(
    dt: Tensor, A: Tensor, dt_bias: Tensor | None, softplus: bool, limit: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """The steps and the logarithms of the decays, [B, L, H] in the state's dtype; plain differentiable PyTorch."""
    wide = wide_dtype(dt)
    low, high = check_limit(limit)
    step = dt.to(wide) if dt_bias is None else dt.to(wide) + dt_bias.to(wide)
    step = F.softplus(step) if softplus else step
    if not softplus or (low, high) != (0.0, float("inf")):
        step = step.clamp(low, high)
    return step, step * A.to(wide)


def check_limit(limit: Any) -> tuple[float, float]:
    """Bounds of the steps, checked."""
    if not isinstance(limit, (tuple, list)) or len(limit) != 2 or not 0 <= limit[0] <= limit[1]:
        raise ValueError(f"dt_limit: must be (low, high) with 0 <= low <= high, got {limit!r}")
    return float(limit[0]), float(limit[1])


def collapsible(x: Tensor) -> Tensor:
    """x [B, L, H, P] with one stride over all channels."""
    return x if 1 in x.shape[2:] or x.stride(2) == x.shape[3] * x.stride(3) else x.contiguous()


# ---------------------------------------------------------------------------- op


def ssd_forward(
    x: Tensor, step: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, d: Tensor | None, first: Tensor | None
) -> tuple[Tensor, Tensor]:
    """out [B, L, H, P] and the last state [B, H, P, N]."""
    kernels = backend("mamba_chunk_scan", x)
    if x.dtype == torch.float64:
        out, states = _ssd_ref(x, step, log_decay, b, c, d, first)
        return out.contiguous(), states[:, -1].clone()

    def library() -> tuple[Tensor, Tensor]:
        return ssd_chunked(x, step, log_decay, b, c, d, first)

    if kernels is None:
        return library()

    def run() -> tuple[Tensor, Tensor]:
        out = x.new_empty(x.shape)
        last = b.new_empty((x.shape[0], *x.shape[2:], b.shape[3]))
        kernels.ssd(_native_args(x, step, log_decay, b, c, d, first, out, last), stream(x))
        return out, last

    return run() if native_pays("mamba_chunk_scan", x, _sizes(x, b), run, library) else library()


def _sizes(x: Tensor, b: Tensor) -> tuple[int, ...]:
    """What the times depend on."""
    return (bucket_of(x.shape[0]), bucket_of(x.shape[1]), *x.shape[2:], *b.shape[2:])


def ssd_backward(
    grad_out: Tensor, grad_last: Tensor, x: Tensor, step: Tensor, log_decay: Tensor, b: Tensor, c: Tensor,
    d: Tensor | None, first: Tensor | None, want_d: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients in the order of the inputs."""
    kernels = backend("mamba_chunk_scan", x)
    if x.dtype == torch.float64:
        *found, grad_d, grad_first = _ssd_backward_ref(grad_out, grad_last, x, step, log_decay, b, c, d, first)
        return *found, grad_d if want_d else grad_d.new_empty(0), grad_first

    def library() -> tuple[Tensor, ...]:
        return ssd_chunked_backward(grad_out, grad_last, x, step, log_decay, b, c, d, first, want_d)

    if kernels is None:
        return library()

    def run() -> tuple[Tensor, ...]:
        return _native_backward(kernels, grad_out, grad_last, x, step, log_decay, b, c, d, first, want_d)

    return run() if native_pays("mamba_chunk_scan_backward", x, _sizes(x, b), run, library) else library()


def _native_backward(
    kernels: ModuleType, grad_out: Tensor, grad_last: Tensor, x: Tensor, step: Tensor, log_decay: Tensor, b: Tensor,
    c: Tensor, d: Tensor | None, first: Tensor | None, want_d: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    grad_out = collapsible(grad_out)
    grad_x, grad_step, grad_decay = x.new_empty(x.shape), torch.empty_like(step), torch.empty_like(step)
    grad_b, grad_c = torch.zeros_like(b), torch.zeros_like(c)
    grad_d = torch.zeros_like(d) if d is not None and want_d else b.new_empty(0)
    grad_first = grad_last.to(torch.float32).clone(memory_format=torch.contiguous_format)
    args = native.SsdBackward(
        forward=_native_args(x, step, log_decay, b, c, d, first, grad_out, None), grad_x=_strided(grad_x),
        grad_step=address(grad_step), grad_log_decay=address(grad_decay), grad_b=address(grad_b),
        grad_c=address(grad_c), grad_d=address(grad_d) if grad_d.numel() else 0, grad_first=address(grad_first),
        workspace=0,
    )  # fmt: skip
    _held = give_workspace(args, kernels.ssd_backward_workspace(args), x)
    kernels.ssd_backward(args, stream(x))
    return grad_x, grad_step, grad_decay, grad_b, grad_c, grad_d, grad_first


def _strided(x: Tensor) -> tuple[int, int, int, int]:
    """[B, L, H, P] as [B, H * P, L]. The stride of a dimension of 1 can be anything, also in a contiguous tensor."""
    return (x.data_ptr(), x.stride(0), x.stride(1), x.stride(2 if x.shape[3] == 1 else 3))


def _native_args(
    x: Tensor, step: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, d: Tensor | None, first: Tensor | None,
    out: Tensor, last: Tensor | None,
) -> Any:  # fmt: skip
    batch, length, heads, head_dim = x.shape
    return native.Ssd(
        x=_strided(x), out=_strided(out), step=address(step), log_decay=address(log_decay), b=address(b), c=address(c),
        d=address(d), first=address(first), last=address(last), batch=batch, length=length, heads=heads,
        head_dim=head_dim, states=b.shape[3], groups=b.shape[2], dtype=DTYPE_CODES[x.dtype],
    )  # fmt: skip


def _ssd_fake(x: Tensor, step: Tensor, log_decay: Tensor, b: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), b.new_empty((x.shape[0], *x.shape[2:], b.shape[3]))


def _ssd_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs)


def _ssd_formula(ctx: Any, grad_out: Tensor, grad_last: Tensor) -> tuple:
    need = ctx.needs_input_grad
    found = _ssd_grad(grad_out, grad_last, *ctx.saved_tensors, bool(need[5]))
    return tuple(g if wanted else None for g, wanted in zip(found, need, strict=True))


def _ssd_grad_fake(
    grad_out: Tensor, grad_last: Tensor, x: Tensor, step: Tensor, log_decay: Tensor, b: Tensor, c: Tensor,
    d: Tensor | None, first: Tensor | None, want_d: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    grad_d = b.new_empty(d.shape if d is not None and want_d else 0)
    return (
        x.new_empty(x.shape), torch.empty_like(step), torch.empty_like(step), torch.empty_like(b), torch.empty_like(c),
        grad_d, b.new_empty((x.shape[0], *x.shape[2:], b.shape[3])),
    )  # fmt: skip


# ---------------------------------------------------------------------------- references


def mamba_chunk_scan_ref(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    dt_bias: Tensor | None = None, initial_states: Tensor | None = None, seq_idx: Tensor | None = None,
    dt_softplus: bool = False, dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition, step by step, in plain differentiable PyTorch, in x's dtype: out and the last state."""
    step = dt if dt_bias is None else dt + dt_bias
    step = (F.softplus(step) if dt_softplus else step).clamp(*dt_limit)
    per_group = x.shape[2] // B.shape[2]
    b, c = (t.repeat_interleave(per_group, dim=2) for t in (B, C))
    h = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[3]) if initial_states is None else initial_states
    outs = []
    for t in range(x.shape[1]):
        decay = torch.exp(step[:, t] * A)
        if seq_idx is not None and t:
            decay = decay * (seq_idx[:, t] == seq_idx[:, t - 1]).unsqueeze(-1)
        into = (step[:, t, :, None] * x[:, t]).unsqueeze(-1) * b[:, t, :, None]
        h = decay[:, :, None, None] * h + into
        outs.append((h * c[:, t, :, None]).sum(-1))
    y = torch.stack(outs, dim=1) if outs else torch.zeros_like(x)
    if D is not None:
        y = y + (D.unsqueeze(-1) if D.dim() == 1 else D) * x
    return (y if z is None else y * F.silu(z)), h


def _ssd_ref(
    x: Tensor, step: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, d: Tensor | None, first: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The op on any device: out, and the states before and after each step [B, L + 1, H, P, N]."""
    batch, length, heads, head_dim = x.shape
    wide, per_group = x.to(b.dtype), heads // b.shape[2]
    bt, ct = (t.repeat_interleave(per_group, dim=2) for t in (b, c))
    h = b.new_zeros((batch, length + 1, heads, head_dim, b.shape[3]))
    if first is not None:
        h[:, 0] = first
    decay, into = torch.exp(log_decay), step.unsqueeze(-1) * wide
    for t in range(length):
        h[:, t + 1] = decay[:, t, :, None, None] * h[:, t] + into[:, t].unsqueeze(-1) * bt[:, t].unsqueeze(2)
    y = (h[:, 1:] * ct.unsqueeze(3)).sum(-1)
    y = y if d is None else y + d.view(heads, head_dim) * wide
    return y.to(x.dtype), h


def _ssd_backward_ref(
    grad_out: Tensor, grad_last: Tensor, x: Tensor, step: Tensor, log_decay: Tensor, b: Tensor, c: Tensor,
    d: Tensor | None, first: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The adjoint recursion, step by step: g_t = dy_t c_t^T + exp(log_decay_{t+1}) g_{t+1}."""
    _, h = _ssd_ref(x, step, log_decay, b, c, d, first)
    _, length, heads, head_dim = x.shape
    groups, per_group = b.shape[2], heads // b.shape[2]
    bt, ct = (t.repeat_interleave(per_group, dim=2).unsqueeze(3) for t in (b, c))  # [B, L, H, 1, N]
    wide, dy, decay = x.to(b.dtype), grad_out.to(b.dtype), torch.exp(log_decay)
    g, carry = torch.zeros_like(h[:, 1:]), grad_last.to(b.dtype)
    for t in range(length - 1, -1, -1):
        g[:, t] = dy[:, t].unsqueeze(-1) * ct[:, t] + carry
        carry = decay[:, t, :, None, None] * g[:, t]

    def by_group(t: Tensor) -> Tensor:
        return t.unflatten(2, (groups, per_group)).sum(3)

    into = (g * bt).sum(-1)
    skip = 0 if d is None else d.view(heads, head_dim) * dy
    return (
        (step.unsqueeze(-1) * into + skip).to(x.dtype).contiguous(), (into * wide).sum(-1).contiguous(),
        (decay * (g * h[:, :-1]).sum((-1, -2))).contiguous(),
        by_group((g * (step.unsqueeze(-1) * wide).unsqueeze(-1)).sum(3)),
        by_group((h[:, 1:] * dy.unsqueeze(-1)).sum(3)),
        b.new_empty(0) if d is None else (dy * wide).sum((0, 1)).reshape(-1), carry.contiguous(),
    )  # fmt: skip


_TENSORS = "Tensor x, Tensor step, Tensor log_decay, Tensor b, Tensor c, Tensor? d, Tensor? first"
_ssd_grad = define(
    f"ssd_grad(Tensor grad_out, Tensor grad_last, {_TENSORS}, bool want_d) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    ssd_backward,
    _ssd_grad_fake,
)
_ssd = define(
    f"ssd({_TENSORS}) -> (Tensor, Tensor)", ssd_forward, _ssd_fake, setup_context=_ssd_setup, backward=_ssd_formula
)
