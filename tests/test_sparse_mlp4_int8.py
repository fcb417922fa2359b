"""Sparse MLPs over 4-bit weights with x rounded to int8: against that maths in float64."""

import pytest
import torch
from conftest import assert_same_on_threads

from deftcore import ops
from deftcore.ops import paths

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Relative Frobenius error; those of test_sparse_mlp4, whose products these replace.
LIMITS = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
FUNCTIONS = {"relu": torch.relu, "silu": torch.nn.functional.silu}


def quantised(rows, cols, block=32, **options):
    return ops.quantize_4bit(torch.randn(rows, cols) / cols**0.5, block_size=block, **options)


def down(layout, neurons, width, block):
    return quantised(neurons, width, block) if layout == "rows" else quantised(width, neurons, block).t()


def rounded64(x, q):
    """x W^T where blocks of x and the code book are whole 127ths of their largest magnitude; whole numbers by 32 bits,
    what they are worth and their sums in float64."""
    blocks = x.float().unflatten(1, (-1, q.block_size))
    largest = blocks.abs().amax(2, keepdim=True)
    x8 = (blocks / torch.where(largest > 0, largest, 1) * 127).round().double() * (largest.double() / 127)
    top = q.code.abs().max()
    code8 = (q.code / top * 127).round().double() * (top.double() / 127)
    nibbles = torch.stack((q.packed >> 4, q.packed & 15), 1).flatten()[: q.shape.numel()].long()
    w8 = code8[nibbles].view(-1, q.block_size) * q.scales().double()[:, None]
    return x8.flatten(1) @ w8.view(q.shape).t()


def mlp64(x, weights, activation="relu", tau=0.0, b_up=0, b_down=0):
    *firsts, w_down = weights
    z, *ups = (rounded64(x, w) for w in firsts)
    a = FUNCTIONS[activation](z + b_up)
    return (a * (a.abs() > tau) * (ups[0] if ups else 1)) @ w_down.dequantize(torch.float64) + b_down


def run(x, weights, *biases, **options):
    op = ops.sparse_gated_mlp if len(weights) == 3 else ops.sparse_mlp
    return op(x, *weights, *biases, **{"activation": "relu", "activations": "int8", "path": "sparse"} | options)


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-30))


@pytest.mark.parametrize("path", ["sparse", "dense"])
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("neurons", "width", "block"), [(64, 64, 64), (160, 96, 32), (192, 320, 64), (256, 128, 128)])
def test_definition(dtype, neurons, width, block, layout, path):
    gate, up = quantised(neurons, width, block), quantised(neurons, width, block, quant_type="fp4", double_quant=False)
    w_down = down(layout, neurons, width, min(block, 64))
    b_up, b_down = torch.randn(neurons).to(dtype), torch.randn(width).to(dtype)
    for tokens in (1, 2, 3, 7, 16):
        x = torch.randn(tokens, width).to(dtype)
        y = run(x, [gate, up, w_down], path=path)
        assert y.dtype == dtype
        assert relative(y, mlp64(x, [gate, up, w_down])) <= LIMITS[dtype]
        y = run(x, [up, w_down], b_up, b_down, path=path)
        assert relative(y, mlp64(x, [up, w_down], b_up=b_up.double(), b_down=b_down.double())) <= LIMITS[dtype]


def test_smooth_activations_and_leading_dimensions():
    weights = [quantised(96, 64) for _ in "123"]
    x = torch.randn(64, 2, 3).permute(2, 1, 0)
    y = run(x, weights, activation="silu", tau=0.02)
    assert y.shape == x.shape
    assert relative(y.flatten(0, 1), mlp64(x.reshape(-1, 64), weights, "silu", 0.02)) <= LIMITS[torch.float32]
    x = torch.randn(64)
    assert torch.equal(run(x, weights), run(x[None], weights)[0])


@pytest.mark.parametrize("gated", [True, False])
def test_int8_is_what_runs(gated):
    weights, x = [quantised(256, 256) for _ in range(2 + gated)], torch.randn(3, 256)
    for path in ("sparse", "dense"):
        exact = run(x, weights, activations="exact", path=path)
        assert 1e-3 < relative(run(x, weights, path=path), exact.double()) < 3e-2


@pytest.mark.parametrize("path", ["sparse", "dense"])
def test_exact_where_int8_does_not_pay(path):
    weights, bad = [quantised(96, 64) for _ in "123"], torch.randn(2, 64)
    bad[0, 3], bad[1, 5] = torch.nan, torch.inf
    for x in (torch.randn(17, 64), torch.randn(70, 64), torch.randn(2, 64, dtype=torch.float64), bad, bad[:0]):
        expected = run(x, weights, activations="exact", path=path)
        torch.testing.assert_close(run(x, weights, path=path), expected, rtol=0, atol=0, equal_nan=True)
    x, ragged = torch.randn(2, 50), [quantised(30, 50) for _ in "123"]
    assert torch.equal(run(x, ragged, path=path), run(x, ragged, activations="exact", path=path))
    # Blocks of gate are whole, those of up are not: the one rounds, the other does not.
    x, mixed = torch.randn(2, 96), [quantised(64, 96, 32), quantised(64, 96, 64), quantised(64, 96, 32)]
    expected = torch.relu(rounded64(x, mixed[0])) * (x.double() @ mixed[1].dequantize(torch.float64).t())
    assert relative(run(x, mixed, path=path), expected @ mixed[2].dequantize(torch.float64)) <= LIMITS[torch.float32]


def test_inactive_rows_are_not_read():
    """Scales of neurons that no token activates are NaN."""
    neurons, width = 64, 128
    gate, up, w_down = (quantised(neurons, width, double_quant=False) for _ in range(3))
    x = torch.randn(2, width)
    active = (rounded64(x, gate) > -1e-4).any(0)
    assert 0 < int(active.sum()) < neurons
    expected = run(x, [gate, up, w_down])
    for w in (up, w_down):
        w.absmax.view(neurons, -1)[~active] = torch.nan
    assert expected.isfinite().all()
    assert torch.equal(run(x, [gate, up, w_down]), expected)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_auto_on_both_sides_of_the_break_even(monkeypatch, share):
    weights, kinds = [quantised(128, 64) for _ in "123"], []

    def break_even(*args):
        kinds.append(args[6])
        return share

    monkeypatch.setattr(paths, "break_even_density", break_even)
    x = torch.randn(4, 64)
    assert relative(run(x, weights, path="auto"), mlp64(x, weights)) <= LIMITS[torch.float32]
    run(x, weights, path="auto", activations="exact")
    assert kinds == ["4bit-gated-32-int8", "4bit-gated-32"]  # each has its own


def test_threads_change_nothing():
    weights, x = [quantised(1000, 512) for _ in "123"], torch.randn(3, 512)
    assert_same_on_threads(lambda: run(x, weights))


def test_bad_arguments():
    weights, x = [quantised(64, 32) for _ in "123"], torch.randn(2, 32)
    dense = [w.dequantize() for w in weights]
    with pytest.raises(ValueError, match="activations: must be one of"):
        run(x, weights, activations="int4")
    for some in (dense, dense[1:]):
        with pytest.raises(ValueError, match="activations: 'int8' is for weights in 4 bits, these are dense"):
            run(x, some)
    for index, wanted in enumerate((x, torch.zeros(64), torch.zeros(32))):
        inputs = [x, torch.zeros(64), torch.zeros(32)]
        inputs[index] = wanted.clone().requires_grad_()
        with pytest.raises(ValueError, match="activations: 'int8' has no gradient"):
            run(inputs[0], weights[1:], *inputs[1:])
        with torch.no_grad():
            assert run(inputs[0], weights[1:], *inputs[1:]).isfinite().all()


def test_registered():
    weights, x = [quantised(64, 32) for _ in "123"], torch.randn(3, 32)
    tensors = [t for w in weights for t in (w.packed, w.absmax, w.code, w.nested_absmax, w.nested_code)]
    args = (x, tensors, [w.nested_offset for w in weights], [64, 32, 32, 0] * 3, None, torch.randn(32), 0, 0.0, 1)
    torch.library.opcheck(torch.ops.deftcore.sparse_mlp_4bit_int8.default, args)
    compiled = torch.compile(lambda t: run(t, weights), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), run(x, weights))
