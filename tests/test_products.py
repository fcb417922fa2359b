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
