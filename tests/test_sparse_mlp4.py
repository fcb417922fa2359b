"""Sparse MLPs over 4-bit weights: against float64 on the decoded weights, and what may not be read is not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deftcore import ops
from deftcore.ops import paths
from deftcore.ops.density import ACTIVATIONS
from deftcore.ops.sparse_mlp4 import LowRank4, mlp_4bit

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Relative Frobenius error: the last product's own (test_quant4.LIMITS), twice for the two products before it.
LIMITS = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
LAYOUTS = ["rows", "columns"]


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def quantised(rows, cols, block_size=32, **options):
    return ops.quantize_4bit(torch.randn(rows, cols) / cols**0.5, block_size=block_size, **options)


def down(layout, neurons, width, block_size=32, **options):
    """W_down neuron-major: quantised so, or the transpose of a quantised down projection."""
    if layout == "rows":
        return quantised(neurons, width, block_size, **options)
    return quantised(width, neurons, block_size, **options).t()


def gated64(x, gate, up, w_down, activation, tau):
    f = {"relu": torch.relu, "silu": torch.nn.functional.silu}[activation]
    x, gate, up, w_down = x.double(), *(w.dequantize(torch.float64) for w in (gate, up, w_down))
    act = f(x @ gate.t())
    return (act * (act.abs() > tau) * (x @ up.t())) @ w_down


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("neurons", "width", "block"), [(64, 64, 64), (160, 96, 32), (192, 320, 64), (256, 128, 128)])
def test_gated(dtype, neurons, width, block, layout):
    gate, up = (quantised(neurons, width, block) for _ in range(2))
    w_down = down(layout, neurons, width, min(block, 64))
    for tokens in (1, 2, 3, 7, 16, 33, 64):
        x = torch.randn(tokens, width).to(dtype)
        y = ops.sparse_gated_mlp(x, gate, up, w_down, activation="relu", path="sparse")
        assert y.dtype == dtype
        assert relative(y, gated64(x, gate, up, w_down, "relu", 0.0)) <= LIMITS[dtype]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_wide_rows(dtype, layout):
    """More columns than a block takes at once, of W_up as of W_down."""
    gate, up, w_down = quantised(32, 2112), quantised(32, 2112), down(layout, 32, 2112)
    for tokens in (2, 5):
        x = torch.randn(tokens, 2112).to(dtype)
        y = ops.sparse_gated_mlp(x, gate, up, w_down, activation="relu", path="sparse")
        assert relative(y, gated64(x, gate, up, w_down, "relu", 0.0)) <= LIMITS[dtype]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
def test_down_and_plain(dtype, layout, double_quant):
    neurons, width = 192, 160
    w_down = down(layout, neurons, width, double_quant=double_quant)
    up = quantised(neurons, width, quant_type="fp4", double_quant=double_quant)
    b_up, b_down = torch.randn(neurons).to(dtype), torch.randn(width).to(dtype)
    w64, up64 = w_down.dequantize(torch.float64), up.dequantize(torch.float64)
    for tokens in (1, 5, 40):
        a = torch.relu(torch.randn(tokens, neurons) - 1).to(dtype)
        y = ops.sparse_down(a, w_down, b_down, path="sparse")
        assert relative(y, a.double() @ w64 + b_down.double()) <= LIMITS[dtype]
        x = torch.randn(tokens, width).to(dtype)
        y = ops.sparse_mlp(x, up, w_down, b_up, b_down, activation="relu", path="sparse")
        expected = torch.relu(x.double() @ up64.t() + b_up.double()) @ w64 + b_down.double()
        assert relative(y, expected) <= LIMITS[dtype]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 6])
def test_sparse_equals_dense_rows(layout, tokens):
    """Any active set, empty and full, gives what the dense product of those rows gives."""
    neurons, width = 128, 64
    w_down = down(layout, neurons, width)
    w64 = w_down.dequantize(torch.float64)
    for active in ([], [0], [127], [5, 6, 7, 70], list(range(0, 128, 3)), list(range(128))):
        a = torch.zeros(tokens, neurons)
        a[:, active] = torch.randn(tokens, len(active))
        y = ops.sparse_down(a, w_down, path="sparse")
        torch.testing.assert_close(y.double(), a.double() @ w64, rtol=1e-5, atol=1e-5)
        assert torch.equal(y, ops.sparse_down(a, w_down, path="sparse"))  # bit-equal repeats


@pytest.mark.parametrize("tokens", [1, 4])
def test_inactive_nibbles_are_not_read(tokens):
    """Scales of inactive neurons may be NaN; a single read of them would show."""
    neurons, width = 64, 64
    gate, up, w_down = (quantised(neurons, width, double_quant=False) for _ in range(3))
    bias = torch.full((neurons,), -100.0)
    bias[[3, 40]] = 100.0
    x = torch.randn(tokens, width)

    def run():
        return mlp_4bit(x, [gate, up, w_down], bias, None, ACTIVATIONS["relu"], 0.0, 1)

    expected = run()
    for w in (up, w_down):
        scales = w.absmax.view(neurons, -1)
        scales[torch.ones(neurons, dtype=torch.bool).index_fill_(0, torch.tensor([3, 40]), False)] = float("nan")
    assert expected.isfinite().all()
    assert torch.equal(run(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", ["sparse", "dense"])
def test_views_at_odd_addresses(dtype, path):
    """Activations and packed bytes that are views into the middle of a buffer."""
    gate, up, w_down = (quantised(96, 128) for _ in range(3))
    x = torch.randn(3 * 128 + 1).to(dtype)[1:].view(3, 128)
    a, expected = torch.randn(2, 97).to(dtype)[:, 1:].relu(), gated64(x, gate, up, w_down, "relu", 0.0)
    for moved in ((), (gate, up), (w_down,)):
        for w in moved:
            w.packed = torch.cat((w.packed[:1], w.packed))[1:]
            assert w.packed.data_ptr() % 2 == 1
        y = ops.sparse_gated_mlp(x, gate, up, w_down, activation="relu", path=path)
        assert relative(y, expected) <= LIMITS[dtype]
        y = ops.sparse_down(a, w_down, path=path)
        assert relative(y, a.double() @ w_down.dequantize(torch.float64)) <= LIMITS[dtype]


@pytest.mark.parametrize("path", ["auto", "sparse", "dense"])
@pytest.mark.parametrize(
    ("neurons", "width", "tokens"), [(96, 64, 100), (50, 33, 3), (64, 96, 0), (64, 48, 2), (7, 5, 1)]
)
def test_any_shape(neurons, width, tokens, path):
    """More than 64 tokens, ragged rows and empty batches go to the dense products, with the same result."""
    gate, up, w_down = (quantised(neurons, width) for _ in range(3))
    x = torch.randn(2, tokens, width).transpose(0, 1) if tokens else torch.randn(0, width)
    y = ops.sparse_gated_mlp(x, gate, up, w_down, activation="silu", tau=0.01, path=path)
    assert y.shape == x.shape
    torch.testing.assert_close(y.double(), gated64(x, gate, up, w_down, "silu", 0.01), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 3, 20, 80])
@pytest.mark.parametrize("gated", [True, False])
def test_unmerged_lora(tokens, gated, layout):
    neurons, width, rank = 96, 64, 5
    weights = [quantised(neurons, width) for _ in range(1 + gated)] + [down(layout, neurons, width)]
    low = LowRank4(
        torch.randn(rank, width) / 8 if gated else None, torch.randn(neurons, rank) if gated else None,
        torch.randn(rank, width) / 8, torch.randn(neurons, rank), torch.randn(neurons, 3) / 8, torch.randn(width, 3),
    )  # fmt: skip
    x = torch.randn(tokens, width)
    *firsts, w_down = (w.dequantize(torch.float64) for w in weights)
    deltas = [b.double() @ a.double() for a, b in ((low.gate_a, low.gate_b), (low.up_a, low.up_b)) if a is not None]
    firsts = [x.double() @ (w + delta).t() for w, delta in zip(firsts, deltas, strict=True)]
    h = torch.relu(firsts[0]) * (firsts[1] if gated else 1)
    expected = h @ (w_down + low.down_a_t.double() @ low.down_b.double().t())
    for path in (0, 1, 2):
        y = mlp_4bit(x, weights, None, None, ACTIVATIONS["relu"], 0.0, path, low)
        assert relative(y, expected) <= LIMITS[torch.float32]


@pytest.mark.parametrize("gated", [True, False])
def test_gradients(gated):
    """Of x and the biases, against autograd on the decoded weights."""
    neurons, width = 64, 32
    weights = [quantised(neurons, width) for _ in range(2 + gated)]
    w64 = [w.dequantize(torch.float64) for w in weights]
    x, g = torch.randn(5, width, requires_grad=True), torch.randn(5, width)
    b_up, b_down = (torch.randn(n, requires_grad=True) for n in (neurons, width))
    if gated:
        y = ops.sparse_gated_mlp(x, *weights, activation="silu", tau=0.0)
        inputs = [x]
    else:
        y = ops.sparse_mlp(x, *weights, b_up, b_down, activation="silu", tau=0.0)
        inputs = [x, b_up, b_down]
    found = torch.autograd.grad(y, inputs, g)
    x64, u64, d64 = (t.detach().double().requires_grad_() for t in (x, b_up, b_down))
    z = x64 @ w64[0].t() + (0 if gated else u64)
    h = torch.nn.functional.silu(z) * (x64 @ w64[1].t() if gated else 1)
    expected = torch.autograd.grad(h @ w64[-1] + (0 if gated else d64), [x64, u64, d64][: len(inputs)], g.double())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)
    a = torch.relu(torch.randn(3, neurons)).requires_grad_()
    (found,) = torch.autograd.grad(ops.sparse_down(a, weights[-1]), a, g[:3])
    torch.testing.assert_close(found.double(), g[:3].double() @ w64[-1].t(), rtol=1e-4, atol=1e-4)


def test_registration():
    weights = [quantised(64, 32) for _ in range(3)]
    tensors = [t for w in weights for t in (w.packed, w.absmax, w.code, w.nested_absmax, w.nested_code)]
    sizes = [64, 32, 32, 0] * 3
    for grad in (False, True):
        x = torch.randn(3, 32, requires_grad=grad)
        args = (x, tensors, [w.nested_offset for w in weights], sizes, [None] * 6, None, None, 0, 0.0, 1)
        torch.library.opcheck(torch.ops.deftcore.sparse_mlp_4bit.default, args)


def test_compiles():
    weights = [quantised(64, 32) for _ in range(3)]
    run = torch.compile(lambda x: ops.sparse_gated_mlp(x, *weights, activation="relu"), fullgraph=True, backend="eager")
    for tokens in (2, 5):
        x = torch.randn(tokens, 32)
        assert torch.equal(run(x), ops.sparse_gated_mlp(x, *weights, activation="relu"))


def test_auto_falls_back_when_dense(monkeypatch):
    """Above the measured break-even the dense 4-bit products serve; both sides of it agree with the definition."""
    neurons, width = 128, 64
    gate, up, w_down = (quantised(neurons, width) for _ in range(3))
    monkeypatch.setattr(paths, "break_even_density", lambda *_: 0.3)
    for shift in (-2.0, 2.0):
        bias = torch.randn(neurons) + shift
        x = torch.randn(4, width)
        y = mlp_4bit(x, [gate, up, w_down], bias, None, ACTIVATIONS["relu"], 0.0, 0)
        x64, g64, u64, d64 = x.double(), *(w.dequantize(torch.float64) for w in (gate, up, w_down))
        expected = (torch.relu(x64 @ g64.t() + bias) * (x64 @ u64.t())) @ d64
        torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


def test_transpose():
    for shape in ((96, 64), (7, 64), (64, 128)):
        for double_quant in (False, True):
            q = quantised(*shape, double_quant=double_quant)
            turned = q.t()
            assert turned.column_blocks
            assert turned.shape == (shape[1], shape[0])
            assert torch.equal(turned.dequantize(), q.dequantize().t())
            assert torch.equal(turned.scales(), q.scales().view(shape[0], -1).t().flatten())
            back = turned.t()
            assert torch.equal(back.packed, q.packed)
            assert torch.equal(back.absmax, q.scales())
            x = torch.randn(5, shape[0])  # the dense products read this form too
            torch.testing.assert_close(ops.linear_4bit(x, turned), x @ turned.dequantize().t(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="column_blocks: files hold"):
        turned.state_dict()
    with pytest.raises(ValueError, match="t: needs a matrix whose rows are whole blocks of 32, got shape"):
        quantised(64, 40).t()


def test_errors():
    q, dense = quantised(64, 32), torch.randn(64, 32)
    x = torch.randn(2, 32)
    with pytest.raises(TypeError, match="w_up: must be a QuantizedTensor as the other weights are, got Tensor"):
        ops.sparse_gated_mlp(x, q, dense, q)
    with pytest.raises(ValueError, match=r"w_down_t: shape must be \[F, D\] with D = 32"):
        ops.sparse_mlp(x, q, quantised(32, 64))
    with pytest.raises(ValueError, match="w_down_t: first dimension must be 32"):
        ops.sparse_down(x, q)
    with pytest.raises(ValueError, match=r"x: last dimension must be 32 \(w_up.shape\[1\]\)"):
        ops.sparse_mlp(torch.randn(2, 31), q, q)
    with pytest.raises(ValueError, match="path"):
        ops.sparse_mlp(x, q, q, path="fast")


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 70), st.integers(0, 70)), tokens=st.integers(0, 70), width=st.integers(0, 70),
    block=st.sampled_from([32, 64]), layout=st.sampled_from(LAYOUTS), path=st.sampled_from(["auto", "sparse", "x"]),
)  # fmt: skip
def test_fuzz(shape, tokens, width, block, layout, path):
    """Any sizes: a right result or a clear error."""
    try:
        w_down = down(layout, *shape, block)
        x = torch.randn(tokens, width)
        y = ops.sparse_mlp(x, quantised(*shape, block), w_down, activation="relu", path=path)
    except (TypeError, ValueError) as error:
        assert ":" in str(error)
        return
    assert y.shape == (tokens, width)
    assert y.isfinite().all()
