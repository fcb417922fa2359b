"""linear_4bit with activations rounded to int8: against its definition, and its error against the exact product."""

import pytest
import torch
from conftest import assert_same_on_threads

from deftcore import ops
from deftcore.ops.quant4 import linear_4bit_int8_ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 5e-4}  # of the largest sum of magnitudes


def weights(rows, cols, block=64, **options):
    return ops.quantize_4bit(torch.randn(rows, cols), block_size=block, **options)


def int8(x, q, bias=None):
    return ops.linear_4bit(x, q, bias, activations="int8")


def assert_defined(x, q, bias=None):
    """The definition's values up to the rounding of float32 sums and of the result; returns them."""
    y = int8(x, q, bias)
    wanted = linear_4bit_int8_ref(x, q.parts(), bias)
    size = x.double().abs() @ q.dequantize(torch.float64).abs().t() + (0 if bias is None else bias.double().abs())
    assert y.dtype == x.dtype
    assert y.isfinite().all()
    assert ((y.double() - wanted.double()).abs() <= LIMITS[x.dtype] * size.max() + 1e-44).all()
    return y


def bound(x, q):
    """Most that rounding x and the code book can change a product, in float64."""
    block, code = q.block_size, q.code.double().abs().max()
    w, scales = q.dequantize(torch.float64).abs(), q.scales().double().abs().repeat_interleave(block).view(q.shape)
    x = x.double().abs()
    largest = x.unflatten(1, (-1, block)).amax(2).repeat_interleave(block, 1)
    return (largest @ w.t() + code * (x + largest / 254) @ scales.t()) / 254


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [32, 64, 128, 4096])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_definition_and_error(dtype, block, quant_type):
    torch.manual_seed(0)
    for rows, blocks, tokens in ((1, 1, 1), (3, 3, 2), (4, 2, 5), (13, 5, 1), (70, 2, 16)):
        cols = blocks * block
        q = weights(rows, cols, block, quant_type=quant_type, double_quant=tokens % 2 == 1)
        x = torch.randn(tokens, cols).to(dtype)
        y = assert_defined(x, q)
        exact = x.double() @ q.dequantize(torch.float64).t()
        rounding = LIMITS[dtype] * exact.abs() + 1e-6 * (x.double().abs() @ q.dequantize(torch.float64).abs().t())
        assert ((y.double() - exact).abs() <= bound(x, q) + rounding).all()
        assert_defined(x, q, torch.randn(rows).to(dtype))


def test_int8_is_what_runs():
    torch.manual_seed(0)
    q, x = weights(40, 256), torch.randn(3, 256)
    error = (int8(x, q) - ops.linear_4bit(x, q)).norm() / ops.linear_4bit(x, q).norm()
    assert 1e-3 < error < 2e-2


def test_layouts_of_x():
    torch.manual_seed(0)
    q = weights(24, 64)
    wide = torch.randn(2, 3, 128)
    for x in (wide[..., ::2], wide[..., 1:65], torch.randn(64, 3, 2).permute(2, 1, 0)):
        y = int8(x, q)
        assert y.shape == (2, 3, 24)
        assert torch.equal(y, int8(x.contiguous(), q))
    assert int8(torch.randn(64), q).shape == (24,)


def test_exact_where_int8_does_not_pay():
    torch.manual_seed(0)
    q = weights(24, 64)
    bad = torch.randn(2, 64)
    bad[0, 3], bad[1, 5] = torch.nan, torch.inf
    for x, w in (
        (torch.randn(17, 64), q), (torch.randn(2, 64, dtype=torch.float64), q), (bad, q), (torch.randn(0, 64), q),
        (torch.randn(2, 50), weights(7, 50)), (torch.randn(2, 24), q.t()),
    ):  # fmt: skip
        torch.testing.assert_close(int8(x, w), ops.linear_4bit(x, w), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-38, 1e30])
def test_extremes(scale):
    torch.manual_seed(0)
    q = weights(9, 192)
    x = torch.randn(2, 192) * scale
    x[1, 64:128] = 0  # a block of zeros
    assert_defined(x, q)
    x = torch.randn(2, 192)
    x[0, 70] = 1e30  # what stands beside it in its block is lost, other blocks are not
    y = assert_defined(x, q)
    assert torch.equal(y[1], int8(x[1:], q)[0])


def test_threads_change_nothing():
    torch.manual_seed(0)
    q, x = weights(1000, 512), torch.randn(3, 512)
    assert_same_on_threads(lambda: int8(x, q))


def test_bad_arguments():
    q, x = weights(8, 64), torch.randn(2, 64)
    with pytest.raises(ValueError, match="activations"):
        ops.linear_4bit(x, q, activations="int4")
    with pytest.raises(ValueError, match="activations"):
        int8(x.requires_grad_(), q)
    with pytest.raises(ValueError, match="activations"):
        int8(x.detach(), q, torch.zeros(8, requires_grad=True))
    with torch.no_grad():
        assert torch.equal(int8(x, q), int8(x.detach(), q))


def test_registered():
    torch.manual_seed(0)
    q, x = weights(8, 64), torch.randn(2, 64)
    torch.library.opcheck(torch.ops.deftcore.linear_4bit_int8.default, (x, *q.parts(), torch.randn(8)))
    compiled = torch.compile(lambda t: int8(t, q), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), int8(x, q))
    with torch.autocast("cpu", torch.bfloat16):
        y = int8(x, q)
    assert torch.equal(y, int8(x.bfloat16(), q))
