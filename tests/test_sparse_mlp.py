"""sparse_down, sparse_mlp, sparse_gated_mlp: spec deft.md section 10, I1-I10."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close_to_ref
from hypothesis import given, settings
from hypothesis import strategies as st

from deftcore import ops
from deftcore._files import cache_folder
from deftcore.ops import paths
from deftcore.ops.density import ACTIVATIONS
from deftcore.ops.sparse_down import _down_rows
from deftcore.ops.sparse_mlp import sparse_mlp_ref

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def activations(tokens, neurons, density, dtype=torch.float32):
    """Activations whose union over tokens has the given density."""
    a = torch.randn(tokens, neurons)
    active = torch.zeros(neurons, dtype=torch.bool)
    active[torch.randperm(neurons)[: round(density * neurons)]] = True
    return torch.where(active, a, 0.0).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 5, 6, 7, 16, 33, 64])
def test_equals_dense(tokens, dtype):
    """I1 over densities, odd sizes and both sides of every tile."""
    for neurons, width in ((1, 1), (67, 17), (128, 64), (259, 333)):
        w = torch.randn(neurons, width).to(dtype)
        bias = torch.randn(width).to(dtype)
        for density in (0, 1 / neurons, 0.01, 0.1, 0.5, 1):
            a = activations(tokens, neurons, density, dtype)
            y = ops.sparse_down(a, w, bias, path="sparse")
            ref = a.double() @ w.double() + bias.double()
            work = a.double().abs() @ w.double().abs() + bias.double().abs()
            assert_close_to_ref(y, a @ w + bias, ref, work)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["relu", "relu2", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("tokens", [1, 3, 13])
def test_mlps_equal_dense(activation, dtype, tokens):
    for neurons, width in ((70, 33), (131, 64)):
        x = torch.randn(tokens, width).to(dtype)
        gate, up, down = ((torch.randn(neurons, width) / math.sqrt(width)).to(dtype) for _ in range(3))
        b_up, b_down = torch.randn(neurons).to(dtype), torch.randn(width).to(dtype)
        tight = {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}[dtype]
        for w_gate in (None, gate):
            biases = (b_up, b_down) if w_gate is None else (None, None)
            wide = [None if t is None else t.double() for t in (x, w_gate, up, down, *biases)]
            ref = sparse_mlp_ref(*wide, activation, 0.0)
            if w_gate is None:
                y = ops.sparse_mlp(x, up, down, *biases, activation=activation, tau=0.0, path="sparse")
            else:
                y = ops.sparse_gated_mlp(x, w_gate, up, down, activation=activation, tau=0.0, path="sparse")
            plain = sparse_mlp_ref(x, w_gate, up, down, *biases, activation, 0.0).double()
            allowed = 2 * (plain - ref).abs().max() + tight * ref.abs().max()
            assert (y.double() - ref).abs().max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_more_than_a_turn(tokens, dtype):
    """More shares of neurons than a sum takes at once, and more columns than a block."""
    for neurons, width in ((8500, 8), (300, 1032), (70, 2064)):
        w, a = torch.randn(neurons, width).to(dtype), activations(tokens, neurons, 0.3, dtype)
        y, ref = ops.sparse_down(a, w, path="sparse"), a.double() @ w.double()
        assert_close_to_ref(y, (a.float() @ w.float()).to(dtype), ref, a.double().abs() @ w.double().abs())
    for neurons, width in ((1200, 64), (300, 1032)):
        x = torch.randn(tokens, width).to(dtype)
        gate, up, down = ((torch.randn(neurons, width) / width**0.5).to(dtype) for _ in range(3))
        for w_gate in (None, gate):
            args = [None if t is None else t.double() for t in (x, w_gate, up, down, None, None)]
            ref = sparse_mlp_ref(*args, "relu", 0.0)
            if w_gate is None:
                y = ops.sparse_mlp(x, up, down, path="sparse")
            else:
                y = ops.sparse_gated_mlp(x, gate, up, down, activation="relu", path="sparse")
            limit = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
            assert (y.double() - ref).abs().max() <= limit * ref.abs().max()


@pytest.mark.parametrize("tokens", [1, 4, 64])
def test_none_and_one_active(tokens):
    """I2."""
    w, bias = torch.randn(40, 19), torch.randn(19)
    zero = torch.zeros(tokens, 40)
    assert torch.equal(ops.sparse_down(zero, w, bias, path="sparse"), bias.expand(tokens, 19))
    assert torch.equal(ops.sparse_down(zero, w, path="sparse"), torch.zeros(tokens, 19))
    zero[0, 7] = 2.5
    torch.testing.assert_close(ops.sparse_down(zero, w, bias, path="sparse")[0], 2.5 * w[7] + bias)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(tokens, dtype):
    """I3 and I4: -0.0 is inactive, NaN and infinity are active, rows of inactive neurons are never read."""
    w = torch.ones(8, 20, dtype=dtype)
    w[3], w[5] = math.nan, math.inf
    a = torch.zeros(tokens, 8, dtype=dtype)
    a[:, 3], a[:, 0] = -0.0, 1.0
    assert torch.equal(ops.sparse_down(a, w, path="sparse"), torch.ones(tokens, 20, dtype=dtype))
    a[0, 1] = math.nan
    assert ops.sparse_down(a, w, path="sparse")[0].isnan().all()
    a[0, 1] = math.inf
    assert (ops.sparse_down(a, w, path="sparse")[0] == math.inf).all()
    a[0, 1], a[0, 5] = 0.0, 2.0
    assert (ops.sparse_down(a, w, path="sparse")[0] == math.inf).all()


def test_gated_reads_no_inactive_row():
    """I4 for the gated block: poisoned up and down rows of inactive neurons leave no trace."""
    gate, up, down = torch.randn(64, 16), torch.randn(64, 16), torch.randn(64, 16)
    for tokens in (1, 7):
        x = torch.randn(tokens, 16)
        idle = (x @ gate.t() <= 0).all(0)
        assert idle.any()
        clean = ops.sparse_gated_mlp(x, gate, up, down, activation="relu", path="sparse")
        up2, down2 = up.clone(), down.clone()
        up2[idle], down2[idle] = math.nan, math.nan
        assert torch.equal(clean, ops.sparse_gated_mlp(x, gate, up2, down2, activation="relu", path="sparse"))


@pytest.mark.parametrize("activation", ["gelu", "silu", "gelu_tanh"])
def test_threshold_bound(activation):
    """I5: ||dY|| <= sum over skipped |a_i| ||W2_i|| (gated: |g_i u_i|), per token."""
    x, gate, up, down = torch.randn(5, 24), torch.randn(90, 24), torch.randn(90, 24), torch.randn(90, 24)
    for tau in (1e-3, 1e-1):
        for w_gate in (None, gate):
            wide = [None if t is None else t.double() for t in (x, w_gate, up, down, None, None)]
            exact = sparse_mlp_ref(*wide, activation, 0.0)
            z = x.double() @ (up if w_gate is None else gate).double().t()
            a = ops.act_density(z, activation)[0]
            h = a if w_gate is None else a * (x.double() @ up.double().t())
            bound = torch.where(a.abs() <= tau, h.abs(), 0.0) @ down.double().norm(dim=1)
            if w_gate is None:
                y = ops.sparse_mlp(x, up, down, activation=activation, tau=tau, path="sparse")
            else:
                y = ops.sparse_gated_mlp(x, gate, up, down, activation=activation, tau=tau, path="sparse")
            assert ((y.double() - exact).norm(dim=1) <= bound + 1e-4).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tau", [0.0, 0.4])
def test_union_equals_per_token(dtype, tau):
    """I6: a neuron active in another token only stays silent here."""
    w = torch.randn(100, 48).to(dtype)
    a = torch.randn(13, 100).to(dtype)
    together = ops.sparse_down(a, w, tau=tau, path="sparse")
    alone = torch.cat([ops.sparse_down(row[None], w, tau=tau, path="sparse") for row in a])
    torch.testing.assert_close(together, alone, rtol=2e-2 if dtype != torch.float32 else 1e-5, atol=1e-2)


def test_neuron_permutation():
    """I8."""
    x, gate, up, down = torch.randn(3, 24), torch.randn(90, 24), torch.randn(90, 24), torch.randn(90, 24)
    order = torch.randperm(90)
    y = ops.sparse_gated_mlp(x, gate, up, down, activation="relu", path="sparse")
    other = ops.sparse_gated_mlp(x, gate[order], up[order], down[order], activation="relu", path="sparse")
    torch.testing.assert_close(y, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("tokens", [1, 9])
def test_repeats_are_bit_equal(tokens):
    """I9: 100 runs."""
    a, w = activations(tokens, 500, 0.3), torch.randn(500, 300)
    first = ops.sparse_down(a, w, path="sparse", deterministic=True)
    for run in range(100):
        assert torch.equal(first, ops.sparse_down(a, w, path="sparse", deterministic=True)), f"run {run} differs"


def test_overflow_falls_back_to_dense(monkeypatch):
    """I10: more active neurons than the sparse path is worth gives the dense result, nothing dropped."""
    a, w = torch.randn(4, 50), torch.randn(50, 20)
    assert _down_rows(a, w, None, 0.0, 49) is None
    assert _down_rows(a, w, None, 0.0, 50) is not None
    monkeypatch.setattr(paths, "break_even_density", lambda *_: 0.5)
    for density in (0.2, 0.5, 0.8, 1.0):
        a = activations(4, 50, density)
        torch.testing.assert_close(ops.sparse_down(a, w), a @ w, rtol=1e-5, atol=1e-5)
        x, gate, up = torch.randn(4, 20), torch.randn(50, 20), torch.randn(50, 20)
        y = ops.sparse_gated_mlp(x, gate, up, w, activation="silu", tau=0.0)
        torch.testing.assert_close(y, (F.silu(x @ gate.t()) * (x @ up.t())) @ w, rtol=1e-4, atol=1e-3)


def test_auto_measures_once_per_machine(monkeypatch):
    calls = []
    measure = paths._measure
    monkeypatch.setattr(paths, "_measure", lambda *args: calls.append(args[1:3]) or measure(*args))
    monkeypatch.setattr(paths, "_known", {})
    a, w = activations(3, 96, 0.1), torch.randn(96, 32)
    for _ in range(3):
        torch.testing.assert_close(ops.sparse_down(a, w), a @ w, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(paths, "_known", {})  # a new process reads the file
    ops.sparse_down(a, w)
    assert calls == [(4, 96)]
    (cache_folder() / "cost_model.json").write_text("{damaged")
    monkeypatch.setattr(paths, "_known", {})
    ops.sparse_down(a, w)
    assert len(calls) == 2


@pytest.mark.parametrize("path", ["auto", "sparse", "dense"])
def test_more_than_64_tokens(path):
    a, w = activations(150, 80, 0.2), torch.randn(80, 24)
    torch.testing.assert_close(ops.sparse_down(a, w, path=path), a @ w, rtol=1e-5, atol=1e-5)
    x, up = torch.randn(150, 24), torch.randn(80, 24)
    y = ops.sparse_mlp(x, up, w, activation="relu", path=path)
    torch.testing.assert_close(y, torch.relu(x @ up.t()) @ w, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("path", ["sparse", "dense"])
def test_layouts(path):
    """Leading dimensions, bundled rows, transposed and sliced weights, empty tensors."""
    gate, up, down = torch.randn(30, 12), torch.randn(30, 12), torch.randn(30, 12)
    x = torch.randn(2, 3, 12)
    y = ops.sparse_gated_mlp(x, gate, up, down, activation="relu", path=path)
    assert y.shape == x.shape
    bundled = ops.bundle_rows(up, down)
    assert bundled[0].stride() == (24, 1)
    torch.testing.assert_close(y, ops.sparse_gated_mlp(x, gate, *bundled, activation="relu", path=path))
    shifted = torch.cat((gate[:, :1], gate), 1)[:, 1:]  # at odd addresses, as its rows
    torch.testing.assert_close(y, ops.sparse_gated_mlp(x, shifted, *bundled, activation="relu", path=path))
    columns = down.t().contiguous().t()  # column-major
    torch.testing.assert_close(y, ops.sparse_gated_mlp(x, gate, up, columns, activation="relu", path=path))
    assert ops.sparse_down(torch.empty(0, 30), down, path=path).shape == (0, 12)
    assert ops.sparse_down(torch.empty(2, 0), torch.empty(0, 12), path=path).tolist() == [[0.0] * 12] * 2
    assert ops.sparse_down(torch.ones(2, 30), torch.empty(30, 0), path=path).shape == (2, 0)
    assert ops.sparse_mlp(torch.empty(0, 12), up, down, path=path).shape == (0, 12)
    assert ops.sparse_mlp(torch.empty(2, 0), up[:, :0], down[:, :0], path=path).shape == (2, 0)
    strided = torch.randn(5, 60)[:, ::2]
    torch.testing.assert_close(ops.sparse_down(strided, down, path=path), strided @ down, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tau", [0.0, 0.3])
def test_gradcheck(tau):
    a = torch.randn(3, 7, dtype=torch.float64)
    a = torch.where((a.abs() - tau).abs() < 0.05, a * 1.5, a).requires_grad_()
    w = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: ops.sparse_down(*t, tau=tau), (a, w, b))
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(7, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *t: ops.sparse_gated_mlp(*t, activation="silu", tau=0.0), (x, *weights))
    b_up = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *t: ops.sparse_mlp(*t, activation="gelu", tau=0.0), (x, *weights[:2], b_up, b)
    )


def test_native_gradients_match_dense():
    a = activations(3, 40, 0.3).requires_grad_()
    w = torch.randn(40, 16, requires_grad=True)
    grads = torch.autograd.grad(ops.sparse_down(a, w, path="sparse").square().sum(), (a, w))
    dense = torch.autograd.grad((a @ w).square().sum(), (a, w))
    for ours, theirs in zip(grads, dense, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    a = torch.randn(3, 9).to(dtype).requires_grad_()
    w = torch.randn(9, 5).to(dtype).requires_grad_()
    torch.library.opcheck(torch.ops.deftcore.sparse_down.default, (a, w, None, 0.0, 1))
    x = torch.randn(3, 5).to(dtype).requires_grad_()
    arguments = (x, w, w, w, None, None, 0, 0.0, 1)
    torch.library.opcheck(torch.ops.deftcore.sparse_mlp.default, arguments)


def test_autocast_keeps_the_ops_dtype():
    x, w = torch.randn(3, 5), torch.randn(9, 5)
    plain = ops.sparse_mlp(x, w, w, path="sparse")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain, ops.sparse_mlp(x, w, w, path="sparse"))


BAD = [
    ({"a": 1}, TypeError, "a:"),
    ({"a": torch.ones(2, 6, dtype=torch.int32)}, TypeError, "a: dtype"),
    ({"w_down_t": torch.ones(5, 4)}, ValueError, "w_down_t: first dimension"),
    ({"w_down_t": torch.ones(6)}, ValueError, "w_down_t: must be a matrix"),
    ({"w_down_t": torch.ones(6, 4, dtype=torch.float16)}, TypeError, "w_down_t: dtype"),
    ({"w_down_t": torch.ones(6, 4, device="meta")}, ValueError, "w_down_t: must be on cpu"),
    ({"bias": torch.ones(5)}, ValueError, "bias: shape"),
    ({"tau": -1.0}, ValueError, "tau:"),
    ({"path": "fast"}, ValueError, "path:"),
    ({"deterministic": 1}, TypeError, "deterministic:"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change, error, message):
    arguments = {"a": torch.ones(2, 6), "w_down_t": torch.ones(6, 4)} | change
    with pytest.raises(error, match=message):
        ops.sparse_down(**arguments)


@settings(max_examples=60, deadline=None)
@given(
    x=st.lists(st.integers(0, 5), max_size=3),
    up=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    down=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    gate=st.none() | st.lists(st.integers(0, 5), min_size=1, max_size=3),
    dtype=st.sampled_from([*DTYPES, torch.float64, torch.int64]),
    activation=st.sampled_from([*ACTIVATIONS, "nope"]),
    path=st.sampled_from(["sparse", "dense", "nope"]),
    tau=st.none() | st.floats(),
)
def test_fuzz(x, up, down, gate, dtype, activation, path, tau):
    """Any shapes give a result or an error that names an argument; never a crash."""
    x, up, down = (torch.ones(s, dtype=dtype) for s in (x, up, down))
    try:
        if gate is None:
            y = ops.sparse_mlp(x, up, down, activation=activation, path=path, tau=tau)
        else:
            y = ops.sparse_gated_mlp(
                x, torch.ones(gate, dtype=dtype), up, down, activation=activation, path=path, tau=tau
            )
    except (ValueError, TypeError) as error:
        assert ":" in str(error)
    else:
        assert y.shape == x.shape


@pytest.mark.parametrize("packed", [False, True])
def test_strided_biases(packed):
    """A bias may be a slice of something wider; so may the weights."""
    down, up = torch.randn(64, 64), torch.randn(64, 64)
    down, up = (ops.quantize_4bit(w) if packed else w for w in (down, up))
    wide = torch.randn(2, 64, 3)
    x = torch.randn(3, 64)
    b_up, b_down = wide[0, :, 1], wide[1, :, 2]
    for path in ("sparse", "dense"):
        mine, plain = (ops.sparse_down(x, down, b, path=path) for b in (b_down, b_down.contiguous()))
        assert torch.equal(mine, plain)
        for tokens in (1, 3):
            pairs = ((b_up, b_down), (b_up.contiguous(), b_down.contiguous()))
            mine, plain = (ops.sparse_mlp(x[:tokens], up, down, *pair, path=path) for pair in pairs)
            assert torch.equal(mine, plain)
