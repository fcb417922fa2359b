"""Products of matrices against float64."""

import pytest
import torch

from deftcore.ops import products
from deftcore.ops.products import add_product_, linear, product

SHAPES = [
    (1, 1, 1),
    (5, 9, 3),
    (130, 70, 33),
    (600, 16, 40),
    (600, 64, 40),
    (16, 256, 257),
    (0, 3, 2),
    (3, 0, 2),
    (3, 2, 0),
]


def operands(rows, inner, columns, dtype, transposed):
    a, b = torch.randn(inner, rows, dtype=dtype).t(), torch.randn(columns, inner, dtype=dtype).t()
    return (a, b) if transposed else (a.contiguous(), b.contiguous())


@pytest.fixture(params=["oneDNN", "PyTorch"])
def library(request, monkeypatch):
    if request.param == "PyTorch":
        monkeypatch.setattr(products, "_linear", None)
    elif products._linear is None:
        pytest.skip("this PyTorch has no oneDNN")


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_products(shape, transposed, dtype):
    torch.manual_seed(0)
    a, b = operands(*shape, dtype, transposed)
    expected = a.double() @ b.double()
    bound = 4 * torch.finfo(dtype).eps * (a.double().abs() @ b.double().abs())
    found = product(a, b)
    assert found.dtype == dtype
    assert found.shape == expected.shape
    assert ((found - expected).abs() <= bound).all()
    for out in (torch.randn(shape[0], shape[2], dtype=dtype), torch.randn(shape[2], shape[0], dtype=dtype).t()):
        sums = 0.5 * out.double() - 2 * expected
        sizes = out.double().abs() + 2 * bound / torch.finfo(dtype).eps
        add_product_(out, a, b, beta=0.5, alpha=-2.0)
        assert ((out - sums).abs() <= 4 * torch.finfo(dtype).eps * sizes).all()


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("bias", [False, True])
def test_linear(bias):
    torch.manual_seed(0)
    x, weight, added = torch.randn(70, 96), torch.randn(300, 96), torch.randn(300)
    found = linear(x, weight, added if bias else None).double()
    expected, sizes = x.double() @ weight.double().t(), x.double().abs() @ weight.double().abs().t()
    if bias:
        expected, sizes = expected + added.double(), sizes + added.double().abs()
    assert ((found - expected).abs() <= 4 * torch.finfo(torch.float32).eps * sizes).all()


def test_both_libraries_are_there():
    """On PyTorch's own builds for a CPU the quicker one is found, by its name there."""
    assert (products._linear is not None) == torch.backends.mkldnn.is_available()


def test_gradients_flow():
    a, b = torch.randn(64, 128, requires_grad=True), torch.randn(128, 160)
    product(a, b).sum().backward()
    assert torch.allclose(a.grad, b.sum(1).expand(64, 128), rtol=1e-4)


def test_not_a_number_stays_one():
    a, b = torch.ones(128, 128), torch.eye(128)
    a[1, 2] = float("nan")
    b[3, 3] = float("inf")
    assert torch.equal(product(a, b).isnan(), (a @ b).isnan())


@pytest.fixture
def through_float32(monkeypatch):
    monkeypatch.setattr(products, "_float32_is_faster", lambda *_: True)
    monkeypatch.setattr(products, "_LEAST_WORK", 0)
    monkeypatch.setattr(products, "_TILE", 2**12)  # several tiles, a last one that is not whole
    taken, run = [], products._through_float32
    monkeypatch.setattr(products, "_through_float32", lambda *a, **k: (taken.append(1), run(*a, **k))[1])
    return taken


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_16_bits_are_rounded_once(shape, transposed, dtype, through_float32):
    torch.manual_seed(0)
    a, b = operands(*shape, dtype, transposed)
    half, small = torch.finfo(dtype).eps / 2, 2e-6  # of the rounding, of sums in float32
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    found = product(a, b)
    assert found.dtype == dtype
    assert found.shape == exact.shape
    assert ((found.double() - exact).abs() <= half * exact.abs() + small * size + 1e-7).all()
    bias = torch.randn(shape[2], dtype=dtype)
    found, added = linear(a, b.t(), bias), exact + bias.double()
    assert ((found.double() - added).abs() <= half * added.abs() + small * (size + bias.double().abs()) + 1e-7).all()
    for out in (torch.randn(shape[0], shape[2], dtype=dtype), torch.randn(shape[2], shape[0], dtype=dtype).t()):
        sums, sizes = 0.5 * out.double() - 2 * exact, out.double().abs() + 2 * size
        add_product_(out, a, b, beta=0.5, alpha=-2.0)
        assert ((out.double() - sums).abs() <= half * sums.abs() + small * sizes + 1e-7).all()
    few = b.stride(0) < b.stride(1) and shape[0] < products._FEW
    assert len(through_float32) == (0 if few else 4)


def test_what_is_overwritten_is_not_read(through_float32):
    out = torch.full((8, 8), float("nan"), dtype=torch.bfloat16)
    add_product_(out, torch.ones(8, 8).bfloat16(), torch.eye(8).bfloat16(), beta=0.0, alpha=1.0)
    assert through_float32
    assert (out == 1).all()


def test_the_choice_is_measured_and_draws_no_random_numbers():
    state = torch.get_rng_state()
    products._float32_is_faster.cache_clear()
    assert all(
        isinstance(products._float32_is_faster(dtype, *layout), bool)
        for dtype in (torch.bfloat16, torch.float16)
        for layout in ((False, False), (False, True), (True, False), (True, True))
    )
    assert torch.equal(state, torch.get_rng_state())


def test_recorded_products_of_16_bits_are_pytorchs(through_float32):
    a = torch.randn(8, 8, dtype=torch.bfloat16, requires_grad=True)
    assert product(a, torch.eye(8).bfloat16()).requires_grad
    assert not through_float32
