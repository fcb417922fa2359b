"""mamba_chunk_scan and selective_state_update."""

from itertools import pairwise

import pytest
import torch
from conftest import assert_close_to_ref
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deftcore import ops
from deftcore.ops.ssm import ssd
from deftcore.ops.ssm.chunked import ssd_chunked, ssd_chunked_backward
from deftcore.ops.ssm.ssd import mamba_chunk_scan_ref

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")


def inputs(
    batch=2, length=37, heads=4, head_dim=5, states=6, groups=2, dtype=torch.float32, packed=False, wide_d=False
):
    shape = (batch, length, heads, head_dim)
    d = torch.randn(heads, head_dim) if wide_d else torch.randn(heads)
    tensors = [
        torch.randn(shape).to(dtype), torch.randn(batch, length, heads).to(dtype), -torch.exp(torch.randn(heads)),
        torch.randn(batch, length, groups, states).to(dtype), torch.randn(batch, length, groups, states).to(dtype), d,
        torch.randn(shape).to(dtype), torch.randn(heads) - 1, torch.randn(batch, heads, head_dim, states),
    ]  # fmt: skip
    return tensors, (torch.randint(3, (batch, length)) == 0).long().cumsum(1) if packed else None


def run(call, tensors, seq_idx=None, limit=(0.0, float("inf")), softplus=True):
    x, dt, a, b, c, d, z, bias, first = tensors
    if call is mamba_chunk_scan_ref:
        return call(x, dt, a, b, c, d, z, bias, first, seq_idx, softplus, limit)
    return call(x, dt, a, b, c, 64, d, z, bias, first, seq_idx, softplus, limit, True)


def compare(tensors, seq_idx=None, **options):
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    out, last = run(ops.mamba_chunk_scan, leaves, seq_idx, **options)
    assert out.dtype == tensors[0].dtype
    assert last.dtype == torch.float32
    weights = [torch.randn(out.shape).to(out.dtype), torch.randn(last.shape)]
    results = []
    for dtype in (torch.float64, torch.float32):
        other = [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]
        ref = run(mamba_chunk_scan_ref, other, seq_idx, **options)
        grads = torch.autograd.grad(ref, [t for t in other if t is not None], [w.to(dtype) for w in weights])
        results.append([*(r.detach() for r in ref), *grads])
    mine = [out, last, *torch.autograd.grad((out, last), [t for t in leaves if t is not None], weights)]
    for ours, wanted, plain in zip(mine, *results, strict=True):
        if wanted.numel():
            slack = torch.full_like(wanted, 8 * wanted.abs().max().item())
            assert_close_to_ref(ours, plain.to(ours.dtype), wanted, slack)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [
        {}, {"length": 1}, {"length": 32}, {"length": 65}, {"groups": 1}, {"groups": 4}, {"head_dim": 16, "states": 16},
        {"head_dim": 33, "states": 17, "length": 40}, {"heads": 1, "groups": 1, "states": 1, "head_dim": 1},
        {"heads": 6, "groups": 2}, {"packed": True}, {"wide_d": True}, {"states": 128, "length": 9},
        {"head_dim": 80, "states": 20, "length": 34},
    ],
)  # fmt: skip
def test_matches_float64(dtype, sizes):
    tensors, seq_idx = inputs(dtype=dtype, **sizes)
    if dtype != torch.float32:
        tensors[6] = None  # the gate is a product of its own, rounded in between: test_half_precision_gate
    compare(tensors, seq_idx)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_half_precision_gate(dtype):
    tensors, _ = inputs(dtype=dtype)
    leaves = [t.detach().requires_grad_() for t in tensors]
    wide = [t.detach().double().requires_grad_() for t in tensors]
    out, ref = run(ops.mamba_chunk_scan, leaves)[0], run(mamba_chunk_scan_ref, wide)[0]
    weight = torch.randn(out.shape).to(dtype)
    mine = (out, *torch.autograd.grad(out, leaves[:8], weight))
    wanted = (ref, *torch.autograd.grad(ref, wide[:8], weight.double()))
    for ours, exact in zip(mine, wanted, strict=True):
        worst = (ours.double() - exact).abs().max() / exact.abs().max()
        assert worst < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("missing", [[5], [6], [7], [8], [5, 6, 7, 8]])
def test_optional_arguments(missing):
    tensors, _ = inputs()
    for i in missing:
        tensors[i] = None
    compare(tensors)


def test_limits():
    tensors, _ = inputs()
    compare(tensors, limit=(0.2, 0.9))
    tensors[1], tensors[7] = tensors[1].abs(), None
    compare(tensors, softplus=False)


def test_extreme_steps():
    """Zero and huge steps and a carried state."""
    tensors, _ = inputs(length=6)
    tensors[7] = None
    tensors[1] = torch.tensor([0.0, -100.0, 100.0, 1e-6, 20.5, 3.0])[None, :, None].expand(2, 6, 4).clone()
    compare(tensors)
    x, dt, a, b, c = tensors[:5]
    _, last = ops.mamba_chunk_scan(
        x, torch.zeros_like(dt), a, b, c, 64, initial_states=tensors[8], return_final_states=True
    )
    assert torch.equal(last, tensors[8])


def test_packed_sequences_are_separate():
    tensors, _ = inputs(batch=1, length=40)
    tensors[8] = None
    seq_idx = torch.tensor([0] * 7 + [1] * 20 + [2] * 13)[None]
    whole, last = run(ops.mamba_chunk_scan, tensors, seq_idx)
    for start, stop in ((0, 7), (7, 27), (27, 40)):
        piece = [t[:, start:stop] if i in (0, 1, 3, 4, 6) else t for i, t in enumerate(tensors)]
        out, end = run(ops.mamba_chunk_scan, piece)
        torch.testing.assert_close(out, whole[:, start:stop])
    torch.testing.assert_close(end, last)


def test_pieces_continue_and_chunk_size_is_nothing():
    tensors, _ = inputs()
    whole, last = run(ops.mamba_chunk_scan, tensors)
    parts = [
        [t[:, s] if i in (0, 1, 3, 4, 6) else t for i, t in enumerate(tensors)] for s in (slice(11), slice(11, 37))
    ]
    first, state = run(ops.mamba_chunk_scan, parts[0])
    parts[1][8] = state
    second, end = run(ops.mamba_chunk_scan, parts[1])
    torch.testing.assert_close(torch.cat((first, second), 1), whole)
    torch.testing.assert_close(end, last)
    x, dt, a, b, c = tensors[:5]
    other = ops.mamba_chunk_scan(x, dt, a, b, c, 1, dt_softplus=True)
    assert torch.equal(other, ops.mamba_chunk_scan(x, dt, a, b, c, 256, dt_softplus=True))


def test_views_and_what_is_kept():
    """Views of a projection's output as they come; nothing but inputs is kept for the backward."""
    mixed = torch.randn(2, 50, 4 * 8 + 2 * 2 * 6, requires_grad=True)
    x, b, c = mixed.split([32, 12, 12], dim=2)
    dt, a = torch.randn(2, 50, 4), -torch.rand(4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = ops.mamba_chunk_scan(
            x.unflatten(2, (4, 8)), dt, a, b.unflatten(2, (2, 6)), c.unflatten(2, (2, 6)), 64, dt_softplus=True
        )
    assert max(t.numel() for t in kept) <= 2 * 50 * 32
    ref, _ = mamba_chunk_scan_ref(
        x.unflatten(2, (4, 8)), dt, a, b.unflatten(2, (2, 6)), c.unflatten(2, (2, 6)), dt_softplus=True
    )
    torch.testing.assert_close(out, ref, rtol=1e-4, atol=1e-4)
    weight = torch.randn(out.shape)
    mine, theirs = (torch.autograd.grad((y * weight).sum(), mixed, retain_graph=True)[0] for y in (out, ref))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "empty", [{"batch": 0}, {"length": 0}, {"length": 0, "head_dim": 64, "states": 128}, {"head_dim": 0}]
)
def test_empty(empty):
    tensors, _ = inputs(**empty)
    leaves = [t.detach().requires_grad_() for t in tensors]
    out, last = run(ops.mamba_chunk_scan, leaves)
    assert out.shape == tensors[0].shape
    torch.testing.assert_close(last, tensors[8])
    (out.sum() + last.sum()).backward()
    assert torch.equal(leaves[8].grad, torch.ones_like(leaves[8]))
    assert not any(leaf.grad.any() for leaf in leaves[:8])


def test_many_sequences():
    """More than a grid of CUDA blocks has along its second dimension."""
    tensors, _ = inputs(batch=65_537, length=2, heads=1, groups=1, head_dim=1, states=1)
    for ours, wanted in zip(run(ops.mamba_chunk_scan, tensors), run(mamba_chunk_scan_ref, tensors), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


def test_gradcheck_opcheck_compile():
    tensors, seq_idx = inputs(batch=1, length=5, heads=2, head_dim=2, states=3, packed=True)
    leaves = [t.double().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: run(ops.mamba_chunk_scan, t, seq_idx, limit=(0.05, 5.0)), tuple(leaves))
    leaves = [t.detach().requires_grad_() for t in tensors]
    compiled = torch.compile(lambda *t: run(ops.mamba_chunk_scan, t, seq_idx), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), run(ops.mamba_chunk_scan, leaves, seq_idx))
    x, dt, _, b, c, d, _, _, first = leaves
    step = dt.detach().abs().requires_grad_()
    log_decay = (-dt.detach().abs()).requires_grad_()
    torch.library.opcheck(
        torch.ops.deftcore.ssd.default, (x, step, log_decay, b, c, d.repeat_interleave(2), first)
    )  # fmt: skip


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_threads(groups):
    tensors, _ = inputs(heads=6, groups=groups, head_dim=16, states=16, length=70)
    results = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        leaves = [t.detach().requires_grad_() for t in tensors]
        out, _ = run(ops.mamba_chunk_scan, leaves)
        results.append([out, *torch.autograd.grad(out.sum(), leaves)])
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-4)


# ---------------------------------------------------------------------------- one step


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("states", [1, 16, 23])
def test_update_is_a_step_of_the_scan(dtype, state_dtype, states):
    x, dt, z = (torch.randn(3, 20).to(dtype) for _ in range(3))
    b, c = (torch.randn(3, states).to(dtype) for _ in range(2))
    a, d, bias = -torch.exp(torch.randn(20, states)), torch.randn(20), torch.randn(20)
    state = torch.randn(3, 20, states).to(state_dtype)
    wide = [t.unsqueeze(-1).double() for t in (x, dt, b, c, z)]
    ref, last = ops.selective_scan(
        wide[0], wide[1], a.double(), wide[2], wide[3], d.double(), wide[4], bias.double(), True, True,
        initial_state=state.double(),
    )  # fmt: skip
    out = ops.selective_state_update(state, x, dt, a, b, c, d, z, bias, True)
    assert out.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
    torch.testing.assert_close(out.double(), ref.squeeze(-1), rtol=tolerance[dtype], atol=10 * tolerance[dtype])
    torch.testing.assert_close(state.double(), last, rtol=tolerance[state_dtype], atol=tolerance[state_dtype])


@pytest.mark.parametrize("expanded", [True, False])
def test_update_with_heads(expanded):
    tensors, _ = inputs(batch=3, length=1, heads=6, groups=2, head_dim=19)
    x, dt, a, b, c, d, z, bias, state = tensors
    ref, last = run(mamba_chunk_scan_ref, [t.double() for t in tensors])
    shape = (6, 19)
    views = (
        dt[:, 0].unsqueeze(-1).expand(3, *shape), a[:, None, None].expand(*shape, 6), d[:, None].expand(shape),
        bias[:, None].expand(shape),
    )  # fmt: skip
    step, wide_a, wide_d, wide_bias = views if expanded else (t.contiguous() for t in views)
    out = ops.selective_state_update(state, x[:, 0], step, wide_a, b[:, 0], c[:, 0], wide_d, z[:, 0], wide_bias, True)
    torch.testing.assert_close(out.double(), ref[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.double(), last, rtol=1e-5, atol=1e-5)


def test_update_slots_views_gradients():
    x, dt = torch.randn(3, 20), torch.randn(3, 20)
    a, b, c = -torch.rand(20, 5), torch.randn(3, 5), torch.randn(3, 5)
    state = torch.randn(6, 5, 20).transpose(1, 2)
    before = state.clone()
    out = ops.selective_state_update(
        state, x, dt, a, b, c, dt_softplus=True, state_batch_indices=torch.tensor([5, -1, 2])
    )
    assert not out[1].any()
    assert torch.equal(state[[0, 1, 3, 4]], before[[0, 1, 3, 4]])
    alone = before[[5, 0, 2]].clone()
    torch.testing.assert_close(ops.selective_state_update(alone, x, dt, a, b, c, dt_softplus=True)[[0, 2]], out[[0, 2]])
    assert torch.equal(alone[0], state[5])
    leaf, held = x.clone().requires_grad_(), before[:3].clone()
    ops.selective_state_update(held, leaf, dt, a, b, c, dt_softplus=True).sum().backward()
    assert leaf.grad.abs().sum() > 0
    plain = before[:3].clone()
    ops.selective_state_update(plain, x, dt, a, b, c, dt_softplus=True)
    torch.testing.assert_close(held, plain)
    torch.library.opcheck(
        torch.ops.deftcore.selective_state_update.default,
        (
            torch.randn(3, 1, 20, 5),
            x[:, None],
            dt[:, None],
            a[None],
            b[:, None],
            c[:, None],
            None,
            None,
            None,
            True,
            None,
        ),
    )


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(2, 37, 4), r"x: must be \[B, L, H, P\]"),
        (1, torch.zeros(2, 37, 3), "dt: shape must be"),
        (2, torch.zeros(3), "A: shape must be"),
        (3, torch.zeros(2, 37, 3, 6), "B: "),
        (4, torch.zeros(2, 36, 2, 6), "C: must be"),
        (4, torch.zeros(2, 37, 2, 5), "C: shape must be"),
        (5, torch.zeros(5), "D: shape must be"),
        (6, torch.zeros(2, 37, 4, 4), "z: shape must be"),
        (7, torch.zeros(5), "dt_bias: shape must be"),
        (8, torch.zeros(2, 4, 6, 5), "initial_states: shape must be"),
    ],
)
def test_bad_input(index, value, message):
    tensors, _ = inputs()
    tensors[index] = value
    with pytest.raises((ValueError, TypeError), match=message):
        run(ops.mamba_chunk_scan, tensors)


def test_bad_options():
    tensors, _ = inputs()
    x, dt, a, b, c = tensors[:5]
    for options, message in (({"chunk_size": 0}, "chunk_size"), ({"dt_limit": (1.0, 0.0)}, "dt_limit")):
        with pytest.raises(ValueError, match=message):
            ops.mamba_chunk_scan(x, dt, a, b, c, **{"chunk_size": 64, **options})
    state = torch.zeros(2, 4, 5, 6)
    good = (x[:, 0], x[:, 0], torch.zeros(4, 5, 6), b[:, 0], c[:, 0])
    for i, bad, message in ((0, x[0, 0, 0], "x: must be"), (1, x[:1, 0], "dt: shape"), (2, a, "A: shape"),
                            (3, b[0], "B: must be"), (4, c[:, 0, :1], "B, C: must have")):  # fmt: skip
        arguments = [*good]
        arguments[i] = bad
        with pytest.raises(ValueError, match=message):
            ops.selective_state_update(state, *arguments)
    with pytest.raises(ValueError, match="state: must be"):
        ops.selective_state_update(state[0], *good)
    with pytest.raises(ValueError, match="state_batch_indices: must be below"):
        ops.selective_state_update(state, *good, state_batch_indices=torch.tensor([0, 2]))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2), st.integers(0, 70), st.integers(1, 3), st.integers(1, 3), st.integers(1, 20), st.integers(1, 20)
)  # fmt: skip
def test_fuzz(batch, length, groups, per_group, head_dim, states):
    tensors, seq_idx = inputs(batch, length, groups * per_group, head_dim, states, groups, packed=length > 0)
    out, last = run(ops.mamba_chunk_scan, tensors, seq_idx)
    ref, ref_last = run(mamba_chunk_scan_ref, [t.double() for t in tensors], seq_idx)
    torch.testing.assert_close(out.double(), ref, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last.double(), ref_last, rtol=1e-4, atol=1e-4)


def test_reference_backward_of_nothing():
    """Length 0: the adjoint of the carried state alone, in float64 (the reference)."""
    tensors, _ = inputs(dtype=torch.float64, length=0)
    x, dt, a, b, c, d, _, bias, first = (t.double() for t in tensors)
    leaves = [t.detach().requires_grad_() for t in (x, b, c, first)]
    x, b, c, first = leaves
    y, last = ops.mamba_chunk_scan(x, dt, a, b, c, 64, d, None, bias, first, None, True, return_final_states=True)
    weight = torch.randn_like(last)
    found = torch.autograd.grad(y.sum() + (last * weight).sum(), leaves)
    assert torch.equal(found[3], weight)
    assert [g.shape for g in found] == [leaf.shape for leaf in leaves]


@pytest.mark.parametrize("shape", [(2, 9, 4, 1), (2, 9, 1, 5), (1, 9, 1, 1), (2, 1, 4, 1)])
def test_strides_of_dimensions_of_one(shape):
    """A dimension of 1 may have any stride, of x and, through the gate, of the output's gradient."""
    batch, length, heads, _ = shape
    x, z = (torch.randn(shape[::-1]).permute(3, 2, 1, 0) for _ in range(2))
    x = x.as_strided(shape, [7777 if n == 1 else s for n, s in zip(shape, x.stride(), strict=True)])
    leaves = [t.requires_grad_() for t in (x, torch.randn(batch, length, heads), z)]
    a, b, c = -torch.ones(heads), torch.randn(batch, length, 1, 3), torch.randn(batch, length, 1, 3)
    out = ops.mamba_chunk_scan(leaves[0], leaves[1], a, b, c, 8, z=leaves[2], dt_softplus=True)
    ref, _ = mamba_chunk_scan_ref(leaves[0], leaves[1], a, b, c, z=leaves[2], dt_softplus=True)
    torch.testing.assert_close(out, ref, rtol=1e-4, atol=1e-5)
    weight = torch.randn(shape)
    mine, theirs = (torch.autograd.grad((y * weight).sum(), leaves) for y in (out, ref))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_update_with_one_state_in_any_layout():
    x, a, b = torch.randn(2, 3, 4), -torch.rand(1, 3, 4).permute(1, 2, 0), torch.randn(2, 1, 1)
    a = a.as_strided(a.shape, (4, 1, 12))
    results = []
    for rates in (a, a.clone(memory_format=torch.contiguous_format)):
        state = torch.ones(2, 3, 4, 1)
        results.append((ops.selective_state_update(state, x, x, rates, b, b, dt_softplus=True), state))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("batch", "length", "groups", "optional", "cut"),
    [(2, 37, 2, True, True), (1, 1, 1, False, False), (2, 130, 4, True, True), (1, 64, 1, False, True),
     (1, 65, 2, True, False), (2, 0, 2, True, False), (0, 5, 1, False, False)],
)  # fmt: skip
def test_chunked_products_are_the_definition(batch, length, groups, optional, cut):
    """Both directions in float64, to rounding, where sequences begin in the middle too."""
    heads, head_dim, states = 4, 3, 5

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64)

    x, step, log_decay = (
        draw(batch, length, heads, head_dim),
        draw(batch, length, heads),
        -draw(batch, length, heads).abs(),
    )
    b, c = draw(batch, length, groups, states), draw(batch, length, groups, states)
    if cut:
        log_decay = log_decay.masked_fill(torch.rand(batch, length, 1) < 0.1, -torch.inf)
    d, first = (draw(heads * head_dim), draw(batch, heads, head_dim, states)) if optional else (None, None)
    inputs = (x, step, log_decay, b, c, d, first)
    out, held = ssd._ssd_ref(*inputs)
    for ours, wanted in zip(ssd_chunked(*inputs), (out, held[:, -1]), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
    grads = draw(*out.shape), draw(batch, heads, head_dim, states)
    found = ssd_chunked_backward(*grads, *inputs, True)
    for ours, wanted in zip(found, ssd._ssd_backward_ref(*grads, *inputs), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
    assert ssd_chunked_backward(*grads, *inputs, False)[5].numel() == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["x", "step", "log_decay", "b", "c", "first", "grad_out", "grad_last"])
def test_what_is_not_finite_stays_in_its_head_and_sequence(name, value):
    """It reaches what it does by the definition of each sequence alone: no earlier step, gradients no later one."""
    length, heads, begins = 150, 4, (0, 20, 70, 150)

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64)

    given = {
        "x": draw(1, length, heads, 3), "step": draw(1, length, heads), "log_decay": -draw(1, length, heads).abs(),
        "b": draw(1, length, 2, 5), "c": draw(1, length, 2, 5), "first": draw(1, heads, 3, 5),
        "grad_out": draw(1, length, heads, 3), "grad_last": draw(1, heads, 3, 5),
    }  # fmt: skip
    place = (0, 1) if name in ("first", "grad_last") else (0, 40, 1)
    given[name][place].view(-1)[-1] = abs(value) if name == "log_decay" else value  # -inf there begins a sequence
    given["log_decay"][:, list(begins[1:-1])] = -torch.inf
    *tensors, first, grad_out, grad_last = given.values()
    found = ssd_chunked(*tensors, None, first)
    found += ssd_chunked_backward(grad_out, grad_last, *tensors, None, first, False)
    parts = []
    for start, stop in pairwise(begins):
        own = [t[:, start:stop] for t in tensors]
        own_first = first if start == 0 else torch.zeros_like(first)
        own_last = grad_last if stop == length else torch.zeros_like(first)
        out, held = ssd._ssd_ref(*own, None, own_first)
        parts.append(
            (out, held[:, -1], *ssd._ssd_backward_ref(grad_out[:, start:stop], own_last, *own, None, own_first))
        )
    wanted = [torch.cat(ts, 1) if ts[0].dim() and len(ts[0]) else ts[0] for ts in zip(*parts, strict=True)]
    wanted[1], wanted[8] = parts[-1][1], parts[0][8]
    reached = 0
    for i, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        if i == 4:  # the gradient of a decay of 0 is 0
            theirs[:, list(begins[1:-1])] = 0
        flaws = ~theirs.isfinite()
        if theirs.dim() == 4:  # of one head or group the same
            flaws = flaws.flatten(2).any(2) if i in (1, 8) else flaws.any(3)
            flaws = flaws.view(*flaws.shape, *[1] * (4 - flaws.dim())).expand_as(theirs)
        assert torch.equal(ours.isnan(), flaws), i
        torch.testing.assert_close(ours[~flaws], theirs[~flaws], rtol=1e-11, atol=1e-11)
        reached += int(flaws.sum())
    assert reached


def test_chunked_products_carry_the_state_over_many_chunks():
    """Longer than a block of chunks, with decays so slow that the first block is felt behind it."""
    batch, length, heads = 1, 2 * 64 * 64 + 70, 2

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64)

    inputs = (
        draw(batch, length, heads, 1), draw(batch, length, heads) / 64, -draw(batch, length, heads).abs() / 4096,
        draw(batch, length, 1, 2), draw(batch, length, 1, 2), None, draw(batch, heads, 1, 2),
    )  # fmt: skip
    out, held = ssd._ssd_ref(*inputs)
    assert held[:, -1].sub(ssd._ssd_ref(*inputs[:-1], None)[1][:, -1]).abs().max() > 1e-3
    grads = draw(*out.shape), draw(batch, heads, 1, 2)
    found = (*ssd_chunked(*inputs), *ssd_chunked_backward(*grads, *inputs, False))
    wanted = (out, held[:, -1], *ssd._ssd_backward_ref(*grads, *inputs))
    for ours, theirs in zip(found, wanted, strict=True):
        scale = theirs.abs().max().item() if theirs.numel() else 1.0
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12 * scale)


def test_chunked_products_take_memory_linear_in_the_length():
    class Made(TorchDispatchMode):
        """Elements of all tensors that operations make."""

        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            self.elements += sum(t.numel() for t in tree_leaves(made) if isinstance(t, torch.Tensor))
            return made

    def elements(length):
        def make(*shape):
            return torch.empty(shape, device="meta")

        inputs = (
            make(1, length, 2, 1), make(1, length, 2), make(1, length, 2), make(1, length, 1, 2),
            make(1, length, 1, 2), None, make(1, 2, 1, 2),
        )  # fmt: skip
        with Made() as made:
            ssd_chunked(*inputs)
            ssd_chunked_backward(make(1, length, 2, 1), make(1, 2, 1, 2), *inputs, False)
        return made.elements

    assert elements(2**21) <= 16.1 * elements(2**17)
