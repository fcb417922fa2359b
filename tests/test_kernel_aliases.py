"""mamba_ssm's and causal_conv1d's functions over deftcore's ops, on the grids on which those projects test them.

Every reference is float64 and written here or step by step in `deftcore.ops`.
"""

import importlib
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close_to_ref

import deftcore
from deftcore import ops
from deftcore.methods.mamba import kernel_aliases
from deftcore.methods.mamba.kernel_aliases import (
    causal_conv1d_fn,
    causal_conv1d_update,
    mamba_chunk_scan_combined,
    selective_scan_fn,
    selective_state_update,
)
from deftcore.ops.ssm.scan import selective_scan_ref
from deftcore.ops.ssm.ssd import mamba_chunk_scan_ref

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def close(ours, wanted, slack=2e-6):
    """Off by the rounding of the result, and by float32 sums of the result's size."""
    assert ours.shape == wanted.shape
    eps = torch.finfo(ours.dtype).eps if ours.dtype != torch.float32 else 0.0
    scale = wanted.abs().max().item() if wanted.numel() else 0.0
    torch.testing.assert_close(ours.double(), wanted, rtol=0.51 * eps, atol=slack * max(scale, 1.0))


def wide(tensors, grad=False):
    return [None if t is None else t.detach().double().requires_grad_(grad) for t in tensors]


# ---------------------------------------------------------------------------- selective_scan


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [128, 372])
@pytest.mark.parametrize("groups", [1, 2])
def test_selective_scan(dtype, length, groups):
    shape = (2, 8, length) if groups == 1 else (2, groups, 8, length)
    u, z = torch.randn(2, 4, length).to(dtype), torch.randn(2, 4, length).to(dtype)
    tensors = [
        u, (0.5 * torch.rand(2, 4, length)).to(dtype), -0.5 * torch.rand(4, 8), torch.randn(shape).to(dtype),
        torch.randn(shape).to(dtype), torch.randn(4), z, 0.5 * torch.rand(4),
    ]  # fmt: skip
    leaves = [t.requires_grad_() for t in tensors]
    out, last = selective_scan_fn(*leaves, delta_softplus=True, return_last_state=True)
    weight, results = torch.randn_like(out), []
    for kind in (torch.float64, torch.float32):
        given = [t.detach().to(kind).requires_grad_() for t in tensors]
        ref, ref_last = selective_scan_ref(*given, delta_softplus=True)
        grads = torch.autograd.grad((ref, ref_last.sum(-1)), given, (weight.to(kind), weight[..., -1].to(kind)))
        results.append([ref.detach(), ref_last.detach(), *grads])
    kept = out.detach().clone()
    out[..., -1] += last.sum(-1).to(dtype)
    mine = [kept, last, *torch.autograd.grad(out, leaves, weight)]
    for ours, wanted, plain in zip(mine, *results, strict=True):
        assert_close_to_ref(ours, plain.to(ours.dtype), wanted, torch.full_like(wanted, 4 * wanted.abs().max().item()))


# ---------------------------------------------------------------------------- selective_state_update


def state_step(state, x, dt, a, b, c, d, z, bias):
    """[B, H, P] and [B, H, P, N]; A, D and bias with all their dimensions."""
    step = F.softplus(dt + bias).unsqueeze(-1)
    b, c = (t.repeat_interleave(x.shape[1] // t.shape[1], 1).unsqueeze(2) for t in (b, c))
    new = torch.exp(step * a) * state + step * b * x.unsqueeze(-1)
    y = (new * c).sum(-1) + d * x
    return (y if z is None else y * F.silu(z)), new


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("coefficients", ["float32", "same"])
@pytest.mark.parametrize("heads", ["none", "untied", "tied"])
def test_selective_state_update(dtype, coefficients, heads):
    """States and streams of one dtype, the rest float32, as the originals' tests; every group count and slot."""
    batch, entries, head_dim = 4, 40, 18
    other = torch.float32 if coefficients == "float32" else dtype
    for states, groups, with_z, with_slots in product((16, 64), (1, 2, 4), (False, True), (False, True)):
        count = 1 if heads == "none" else 4
        if groups > count:
            continue
        full = (count, head_dim)
        if heads == "tied":
            dt = torch.randn(batch, count, 1).to(dtype).expand(batch, *full)
            bias, a = (torch.rand(count, 1) - 4).expand(full), (-torch.rand(count, 1, 1) - 1).expand(*full, states)
            d = torch.randn(count, 1).expand(full)
        else:
            dt, bias, d = torch.randn(batch, *full).to(dtype), torch.rand(full) - 4, torch.randn(full)
            a = -torch.rand(*full, states) - 1
        x = torch.randn(batch, *full).to(dtype)
        z = torch.randn(batch, *full).to(dtype) if with_z else None
        b, c = (torch.randn(batch, groups, states).to(other) for _ in range(2))
        a, d, bias = (t.to(other) for t in (a, d, bias))
        slots = torch.randperm(entries)[:batch].int() if with_slots else torch.arange(batch).int()
        if with_slots:
            slots[1] = -1
        state = torch.randn(entries if with_slots else batch, *full, states).to(dtype)
        live = slots >= 0
        before = state.clone()
        arguments = [x, dt, a, b, c, d, z, bias]
        wanted, new = state_step(*wide([state[slots.long()], *arguments]))
        if heads == "none":
            arguments = [None if t is None else t.squeeze(int(t.shape[0] == batch)) for t in arguments]
            arguments[2], arguments[5], arguments[7] = a[0], d[0], bias[0]
            x, dt, a, b, c, d, z, bias = arguments
        held = state.squeeze(1) if heads == "none" else state
        out = selective_state_update(
            held, x, dt, a, b, c, D=d, z=z, dt_bias=bias, dt_softplus=True,
            state_batch_indices=slots if with_slots else None,
        )  # fmt: skip
        assert out.dtype == dtype
        assert out.shape == x.shape
        close(out.view(batch, *full)[live], wanted[live])
        assert not out[~live].any()
        close(state[slots[live].long()], new[live])
        untouched = [i for i in range(len(state)) if i not in slots[live].tolist()]
        assert torch.equal(state[untouched], before[untouched])


def test_selective_state_update_of_any_dtypes():
    """Half-precision x, whatever the dtypes beside it: nothing is rounded but the result."""
    state, x, dt = torch.randn(2, 5, 4), torch.randn(2, 5).half(), torch.randn(2, 5).bfloat16()
    a, b, c = -torch.rand(5, 4), torch.randn(2, 4), torch.randn(2, 4).bfloat16()
    d, z, bias = torch.randn(5).half(), torch.randn(2, 5), torch.randn(5).double()
    exact = wide([state, x, dt, a, b, c, d, z, bias])
    exact = [t.unsqueeze(1) if t.shape[0] == 2 else t.unsqueeze(0) for t in exact]
    wanted, new = state_step(*exact)
    out = selective_state_update(state, x, dt, a, b, c, d, z, bias, True)
    assert out.dtype == torch.float16
    close(out, wanted[:, 0])
    close(state, new[:, 0])
    with pytest.raises(TypeError, match=r"A: dtype must be float32.*complex64"):
        selective_state_update(state, x, dt, a.to(torch.complex64), b, c)
    with pytest.raises(TypeError, match="A: must be real"):
        selective_scan_fn(x[..., None], x[..., None], a.to(torch.complex64), b[..., None], c[..., None])


# ---------------------------------------------------------------------------- mamba_chunk_scan


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunk_scan_of_mixed_dtypes(dtype):
    """Steps and coefficients in float32 beside half-precision x; half-precision ones beside float32."""
    for other in (torch.float32, dtype):
        x, z = torch.randn(2, 9, 4, 3).to(dtype), torch.randn(2, 9, 4, 3).to(other)
        dt = torch.randn(2, 9, 4).to(other)
        b, c = torch.randn(2, 9, 2, 5).to(other), torch.randn(2, 9, 2, 5).to(dtype)
        tensors = [x, dt, -torch.rand(4), b, c, torch.randn(4), None, torch.randn(4), torch.randn(2, 4, 3, 5)]
        x, dt, a, b, c, d, _, bias, first = tensors
        ref, last = mamba_chunk_scan_ref(*wide(tensors), dt_softplus=True)
        out, state = mamba_chunk_scan_combined(
            x, dt, a, b, c, 256, d, None, bias, first, dt_softplus=True, return_final_states=True
        )
        assert out.dtype == dtype
        close(out, ref)
        close(state, last)
        gated = mamba_chunk_scan_combined(x, dt, a, b, c, 256, d, z, bias, first, dt_softplus=True)
        assert gated.dtype == dtype
        exact = ref * F.silu(z.double())
        assert (gated.double() - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()


def test_chunk_scan_states_of_sequences():
    """Packed sequences beside `cu_seqlens`: each one's last state, as if it stood alone."""
    lengths = (3, 5, 0, 4)
    total = sum(lengths) + 2  # two steps belong to none
    x, dt = torch.randn(1, total, 4, 3), torch.randn(1, total, 4)
    a, b, c = -torch.rand(4), torch.randn(1, total, 2, 5), torch.randn(1, total, 2, 5)
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    numbers = torch.tensor([i for i, n in enumerate((*lengths, 2)) for _ in range(n)], dtype=torch.int32)[None]
    first = torch.randn(1, 4, 3, 5)
    out, last, states = mamba_chunk_scan_combined(
        x, dt, a, b, c, 64, initial_states=first, seq_idx=numbers, cu_seqlens=ends, dt_softplus=True,
        return_final_states=True, return_varlen_states=True,
    )  # fmt: skip
    for i, (start, length) in enumerate(zip(ends.tolist(), lengths, strict=False)):
        piece = [t[:, start : start + length].double() for t in (x, dt, b, c)]
        before = first.double() if i == 0 else None
        ref, end = mamba_chunk_scan_ref(
            piece[0], piece[1], a.double(), *piece[2:], initial_states=before, dt_softplus=True
        )
        close(out[:, start : start + length], ref)
        close(states[i : i + 1], end)
    alone = mamba_chunk_scan_combined(
        x, dt, a, b, c, 64, initial_states=first, seq_idx=numbers, cu_seqlens=ends, dt_softplus=True,
        return_varlen_states=True,
    )  # fmt: skip
    assert torch.equal(alone[1], states)
    plain = mamba_chunk_scan_combined(
        x, dt, a, b, c, 64, initial_states=first, seq_idx=numbers, cu_seqlens=ends, dt_softplus=True
    )
    assert torch.equal(plain, out)
    assert last.shape == (1, 4, 3, 5)
    for options, message in (
        ({"cu_seqlens": ends}, "cu_seqlens: does not keep sequences apart"),
        ({"return_varlen_states": True, "seq_idx": numbers}, "return_varlen_states: needs cu_seqlens"),
        ({"cu_seqlens": ends + 1, "seq_idx": numbers}, "cu_seqlens: must rise from 0"),
        ({"cu_seqlens": ends.flip(0), "seq_idx": numbers}, "cu_seqlens: must rise from 0"),
        ({"cu_seqlens": ends.clamp(max=1), "seq_idx": numbers}, "a sequence begins at 1, where seq_idx"),
    ):
        options = {"return_varlen_states": len(options) == 2, **options}
        with pytest.raises(ValueError, match=message):
            mamba_chunk_scan_combined(x, dt, a, b, c, 64, **options)


# ---------------------------------------------------------------------------- causal_conv1d


def conv(x, weight, bias, first, silu):
    """PyTorch's grouped convolution."""
    before = x.new_zeros(*x.shape[:2], weight.shape[1] - 1) if first is None else first
    out = F.conv1d(torch.cat((before, x), -1), weight.unsqueeze(1), bias, groups=x.shape[1])
    return F.silu(out) if silu else out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("layout", ["channel last", "time last"])
def test_causal_conv1d(dtype, width, layout):
    """A slice of a wider buffer; float32 weights; the output changed in place before the backward."""
    for length, carried, final, activation in product(
        (1, 2, 8, 129), (False, True), (False, True), (None, "silu", "swish")
    ):
        x = torch.randn(2, length, 30).to(dtype)[..., 7:27].transpose(1, 2)
        x = (x if layout == "channel last" else x.contiguous()).requires_grad_()
        weight = torch.randn(20, width, requires_grad=True)
        bias = torch.randn(20, requires_grad=True) if activation else None
        first = torch.randn(2, width - 1, 20).to(dtype).transpose(1, 2).requires_grad_() if carried else None
        leaves = [x, weight, bias, first]
        exact = wide(leaves, grad=True)
        out = causal_conv1d_fn(x, weight, bias, None, first, final, activation=activation)
        ref = conv(*exact, activation is not None)
        if final:
            out, states = out
            before = exact[0].new_zeros(2, 20, width - 1) if first is None else exact[3]
            last = torch.cat((before, exact[0]), -1)[..., length:]
            assert torch.equal(states.double(), last)
            buffer = torch.empty_like(states)
            again = causal_conv1d_fn(x, weight, bias, None, first, True, buffer, activation)
            assert torch.equal(buffer, states)
            assert not buffer.requires_grad
            assert torch.equal(again[1], states)
        close(out, ref)
        if final:
            out += torch.sigmoid(states).sum(-1, keepdim=True)
            ref = ref + torch.sigmoid(last).sum(-1, keepdim=True)
        weights = torch.randn_like(out)
        mine = torch.autograd.grad(out, [t for t in leaves if t is not None], weights)
        wanted = torch.autograd.grad(ref, [t for t in exact if t is not None], weights.double())
        for ours, grad in zip(mine, wanted, strict=True):
            half = dtype != torch.float32  # the two parts of x's gradient are rounded, then added
            close(ours, grad, torch.finfo(dtype).eps if half else 2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("carried", [False, True])
def test_packed_and_padded_sequences(dtype, carried):
    """Numbers that come as they like, -1 for padding: 0 comes out there and no gradient goes in."""
    for width, silu in product((2, 3, 4), (False, True)):
        lengths = ((3, 1, 20, 6), (2, 21, 7))
        numbers = torch.tensor([[7] * 3 + [3] + [4] * 20 + [-1] * 6, [0] * 2 + [5] * 21 + [-1] * 7]).int()
        x = torch.randn(2, 30, 20).to(dtype).transpose(1, 2).requires_grad_()
        weight, bias = torch.randn(20, width, requires_grad=True), torch.randn(20, requires_grad=True)
        first = torch.randn(2, 20, width - 1).to(dtype).requires_grad_() if carried else None
        leaves = [x, weight, bias, first]
        exact = wide(leaves, grad=True)
        out = causal_conv1d_fn(x, weight, bias, numbers, first, activation="silu" if silu else None)
        rows = []
        for row in range(2):
            pieces = exact[0][row : row + 1].split(list(lengths[row]), -1)
            before = None if first is None else exact[3][row : row + 1]
            outs = [conv(p, exact[1], exact[2], before if i == 0 else None, silu) for i, p in enumerate(pieces)]
            rows.append(torch.cat(outs, -1) * (numbers[row] >= 0))
        ref = torch.cat(rows)
        close(out, ref)
        assert not out[0, :, 24:].any()
        assert not out[1, :, 23:].any()
        weights = torch.randn_like(out)
        mine = torch.autograd.grad(out, [t for t in leaves if t is not None], weights)
        wanted = torch.autograd.grad(ref, [t for t in exact if t is not None], weights.double())
        for ours, grad in zip(mine, wanted, strict=True):
            close(ours, grad)


def ring_step(x, state, weight, bias, begin, silu):
    """One row, [C, T] and [C, S]: window and state element by element; `begin` None keeps the newest step last."""
    size, reach = state.shape[1], weight.shape[1] - 1
    seen = state if begin is None else torch.stack([state[:, (begin - size + k) % size] for k in range(size)], 1)
    history = torch.cat((seen, x), 1)
    outs = [(history[:, size + t - reach : size + t + 1] * weight).sum(1) + bias for t in range(x.shape[1])]
    out = torch.stack(outs, 1)
    state = state.clone()
    for t in range(x.shape[1]):
        if begin is None:
            state = torch.cat((state[:, 1:], x[:, t : t + 1]), 1)
        else:
            state[:, (begin + t) % size] = x[:, t]
    return (F.silu(out) if silu else out), state


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_causal_conv1d_update(dtype, width, needs_grad):
    """Steps, rings, slots, padding, weights that require gradients, and each with each."""
    for length, ring, slotted, extra, silu in product(
        (0, 1, 4, 5), (False, True), (False, True), (0, 1, 8), (False, True)
    ):
        size, batch = width - 1 + extra, 4
        x = torch.randn(batch, max(length, 1), 12).to(dtype).transpose(1, 2)
        state = torch.randn(9 if slotted else batch, size, 12).to(dtype).transpose(1, 2)
        weight, bias = torch.randn(12, width, requires_grad=needs_grad), torch.randn(12, requires_grad=needs_grad)
        begins = torch.randint(0, 1024, (batch,)).int() if ring else None
        slots = torch.randperm(9)[:batch].int() if slotted else None
        if slotted:
            slots[2] = -1
        given = (x if length else x[..., 0]).requires_grad_(needs_grad)  # length 0 stands for one step as [B, C]
        before = state.clone()
        out = causal_conv1d_update(given, state, weight, bias, "silu" if silu else None, begins, slots)
        assert out.shape == given.shape
        exact = wide([x, weight, bias], grad=True)
        expected, outs = before.clone(), []
        for row in range(batch):
            slot = row if slots is None else int(slots[row])
            if slot < 0:
                outs.append(torch.zeros_like(exact[0][row]))
                continue
            result, moved = ring_step(
                exact[0][row], before[slot].double(), *exact[1:], None if begins is None else int(begins[row]), silu
            )
            outs.append(result)
            expected[slot] = moved.to(dtype)
        ref = torch.stack(outs)
        close(out.view(ref.shape), ref)
        assert torch.equal(state, expected)
        if needs_grad:
            weights = torch.randn_like(out)
            mine = torch.autograd.grad(out, (given, weight, bias), weights)
            wanted = torch.autograd.grad(ref, exact, weights.view(ref.shape).double())
            for ours, grad in zip(mine, wanted, strict=True):
                close(ours.view(grad.shape), grad)


@pytest.mark.parametrize("needs_grad", [False, True])
def test_updates_compile(needs_grad):
    """In one graph: rings, and coefficients of another dtype."""
    x, weight = torch.randn(2, 5, 3), torch.randn(5, 4, requires_grad=needs_grad)
    b, begins = torch.randn(2, 4).bfloat16(), torch.tensor([3, 8])

    def conv(state):
        return causal_conv1d_update(x, state, weight, None, "silu", begins)

    def scan(state):
        return selective_state_update(state, x[..., 0], x[..., 1], weight, b, b, dt_softplus=True)

    for step, state in ((conv, torch.randn(2, 5, 6)), (scan, torch.randn(2, 5, 4))):
        moved = state.clone()
        out = torch.compile(step, fullgraph=True, backend="aot_eager")(moved)
        torch.testing.assert_close(out, step(state))
        assert torch.equal(moved, state)


@pytest.mark.parametrize("dtype", DTYPES)
def test_states_of_sequences(dtype):
    lengths = torch.tensor([1, 7, 0, 31, 3])
    x = torch.randn(int(lengths.sum()) + 2, 6).to(dtype).requires_grad_()
    for kind in (torch.int32, torch.int64):
        ends = F.pad(lengths.cumsum(0), (1, 0)).to(kind)
        states = ops.causal_conv1d_varlen_states(x, ends, 4)
        for i, piece in enumerate(x[:-2].split(lengths.tolist())):
            assert torch.equal(states[i], F.pad(piece, (0, 0, 4, 0))[-4:].t())
    grad = torch.autograd.grad(states.sum(), x)[0]
    assert grad.sum() == 6 * (1 + 4 + 4 + 3)
    assert ops.causal_conv1d_varlen_states(x[:0], torch.tensor([0, 0]), 3).shape == (1, 6, 3)
    for bad, message in (
        (torch.tensor([0, 50]), "cu_seqlens: must rise from 0 to at most 44, got"),
        (torch.tensor([0.0, 5.0]), "cu_seqlens: must be an int32 or int64"),
        (torch.tensor([[0, 1]]), r"cu_seqlens: must be a tensor \[sequences \+ 1\]"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            ops.causal_conv1d_varlen_states(x, bad, 4)
    for bad, message in (((x[0], ends, 4), r"x: must be \[T, C\]"), ((x, ends, -1), "state_len: must be")):
        with pytest.raises(ValueError, match=message):
            ops.causal_conv1d_varlen_states(*bad)


def test_bad_arguments():
    x, weight, state = torch.randn(2, 5, 4), torch.randn(5, 3), torch.randn(2, 5, 4)
    for call, message in (
        (lambda: causal_conv1d_update(x, state, weight, cache_seqlens=torch.zeros(2)), "cache_seqlens: must be an int"),
        (lambda: causal_conv1d_update(x, state, weight, cache_seqlens=torch.zeros(3).int()), "cache_seqlens: shape"),
        (lambda: causal_conv1d_fn(x, weight, None, None, None, True, torch.zeros(1, 5, 2)), "final_states_out: shape"),
        (lambda: selective_scan_fn(x, x, weight, x[:, :3], x[:, :3], seq_idx=x), "seq_idx: selective_scan does not"),
        (lambda: selective_scan_fn(x, x, weight, x[:, :3], x[:, :3], cu_seqlens=x), "cu_seqlens: selective_scan does"),
    ):
        before = state.clone()
        with pytest.raises((ValueError, TypeError), match=message):
            call()
        assert torch.equal(state, before)


# ---------------------------------------------------------------------------- names


@pytest.fixture
def aliases(monkeypatch):
    monkeypatch.setattr(kernel_aliases, "with_part", lambda part: [])  # other tests have imported models
    kernel_aliases.install_kernel_aliases()
    yield
    kernel_aliases.remove_kernel_aliases()


def test_names(aliases):
    for module, name in (
        ("mamba_ssm", "selective_scan_fn"), ("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn"),
        ("mamba_ssm.ops.triton.selective_state_update", "selective_state_update"),
        ("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined"), ("causal_conv1d", "causal_conv1d_fn"),
        ("causal_conv1d", "causal_conv1d_update"), ("causal_conv1d.causal_conv1d_interface", "causal_conv1d_fn"),
        ("causal_conv1d.causal_conv1d_varlen", "causal_conv1d_varlen_states"),
    ):  # fmt: skip
        assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn", "no mamba_inner_fn: .*deftcore.patch"),
        ("from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined", "would bypass adapters"),
        ("from mamba_ssm.ops.selective_scan_interface import selective_scan_ref", "use deftcore.ops.ssm.sel"),
        ("from mamba_ssm import Mamba2", "deftcore.nn.Mamba2Mixer"),
        ("import mamba_ssm.modules.mamba_simple", "have no modules: .*offers mamba_chunk_scan_combined"),
        ("from mamba_ssm.ops.triton.layernorm_gated import RMSNorm", "have no layernorm_gated"),
        ("from causal_conv1d import cpp_functions", "have no cpp_functions: .*causal_conv1d_varlen_states"),
        ("from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref", "have no causal_conv1d_ref"),
    ],
)  # fmt: skip
def test_absent_names_say_what_to_use(aliases, statement, message):
    with pytest.raises(ImportError, match=message):
        exec(statement, {})


def test_who_only_looks_finds_nothing(aliases):
    import causal_conv1d
    import mamba_ssm

    assert getattr(mamba_ssm.ops.selective_scan_interface, "mamba_inner_fn", None) is None
    assert not hasattr(causal_conv1d, "causal_conv1d_cuda")
    for module in (mamba_ssm, causal_conv1d):
        release, _, maker = module.__version__.partition("+")
        assert maker == f"deftcore.{deftcore.__version__}"
        assert tuple(map(int, release.split("."))) >= (1, 7, 0)


def test_taken_out_again(aliases):
    kernel_aliases.remove_kernel_aliases()
    with pytest.raises(ModuleNotFoundError, match="No module named 'mamba_ssm'"):
        importlib.import_module("mamba_ssm.ops")
