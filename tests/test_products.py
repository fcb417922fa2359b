"""Products of matrices against float64."""

import pytest
import torch

from deftcore import ops
from deftcore.nn.mlp import LowRank, SparseMLP, SparseMLP4bit
from deftcore.ops import products
from deftcore.ops.products import add_product_, linear, plus_product, product

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
def ours(monkeypatch):
    """Our kernel is the faster one, by the clock; a list of the sizes of its products."""
    monkeypatch.setattr(products, "_seconds", lambda *_: (2.0, 1.0))
    monkeypatch.setattr(products, "_LEAST_WORK_16", 0)
    products._is_faster.cache_clear()
    taken, run = [], products._multiply

    def counted(out, a, b, **rest):
        taken.append((*a.shape, b.shape[1]))
        return run(out, a, b, **rest)

    monkeypatch.setattr(products, "_multiply", counted)
    yield taken
    products._is_faster.cache_clear()


HALVES = [torch.bfloat16, torch.float16]
MORE_SHAPES = [(1, 300, 50), (3, 70, 5000), (4, 9, 33), (9, 600, 70), (70, 8, 97), (8, 257, 300), (300, 513, 130)]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("transposed", [(False, False), (True, True), (False, True), (True, False)])
@pytest.mark.parametrize("shape", [*SHAPES, *MORE_SHAPES])
def test_products_of_16_bits_are_rounded_once(shape, transposed, dtype, ours):
    torch.manual_seed(0)
    a, b = (operands(*shape, dtype, flag)[i] for i, flag in enumerate(transposed))
    half, small = torch.finfo(dtype).eps / 2, 2e-6  # of the rounding, of sums in float32
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    found = product(a, b)
    assert found.dtype == dtype
    assert found.shape == exact.shape
    assert ((found.double() - exact).abs() <= half * exact.abs() + small * size + 1e-7).all()
    bias = torch.randn(2 * shape[2], dtype=dtype)[::2]
    found, added = linear(a, b.t(), bias), exact + bias.double()
    assert ((found.double() - added).abs() <= half * added.abs() + small * (size + bias.double().abs()) + 1e-7).all()
    outs = (
        torch.randn(shape[0], shape[2], dtype=dtype),
        torch.randn(shape[2], shape[0], dtype=dtype).t(),
        torch.randn(shape[0], shape[2] + 5, dtype=dtype)[:, 2 : 2 + shape[2]],
        torch.randn(shape[0], 2 * shape[2], dtype=dtype)[:, ::2],
    )
    for out in outs:
        sums, sizes = 0.5 * out.double() - 2 * exact, out.double().abs() + 2 * size
        add_product_(out, a, b, beta=0.5, alpha=-2.0)
        assert ((out.double() - sums).abs() <= half * sums.abs() + small * sizes + 1e-7).all()
    assert len(ours) >= 6


@pytest.mark.parametrize("dtype", HALVES)
def test_operands_of_any_strides(dtype, ours):
    torch.manual_seed(0)
    for a, b in (
        (torch.randn(20, 60, dtype=dtype)[::2, ::3], torch.randn(40, 14, dtype=dtype)[::2, ::2]),
        (torch.ones((), dtype=dtype).expand(10, 20), torch.randn(7, dtype=dtype).expand(20, 7)),
        (torch.randn(10, 40, dtype=dtype)[:, 3:23], torch.randn(9, 40, dtype=dtype)[:7, 5:25].t()),
    ):
        exact = a.double() @ b.double()
        assert ((product(a, b).double() - exact).abs() <= 0.02 * (1 + exact.abs())).all()
    assert len(ours) >= 3


def test_what_is_overwritten_is_not_read(ours):
    out = torch.full((8, 8), float("nan"), dtype=torch.bfloat16)
    add_product_(out, torch.ones(8, 8).bfloat16(), torch.eye(8).bfloat16(), beta=0.0, alpha=1.0)
    assert ours
    assert (out == 1).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows", [1, 4, 8, 40])
def test_no_number_of_16_bits_stays_none(rows, dtype, ours):
    """What is not finite stays in its row and column, whichever way the kernel goes."""
    for transposed in (False, True):
        a, b = (m.to(dtype) for m in (torch.ones(rows, 70), torch.ones(70, 90)))
        a[-1, 69], b[3, 88] = float("nan"), float("inf")
        b = b.t().contiguous().t() if transposed else b
        found, wanted = product(a, b), a.double() @ b.double()
        assert torch.equal(found.isnan(), wanted.isnan())
        assert torch.equal(found.isinf(), wanted.isinf())


def test_the_choice_is_measured_and_draws_no_random_numbers():
    state = torch.get_rng_state()
    for dtype in HALVES:
        theirs, taken = products._seconds(dtype, True, False, False)
        assert theirs > 0
        assert taken > 0
        assert isinstance(products.ours_pays(dtype), bool)
    assert not products.ours_pays(torch.float32)
    assert torch.equal(state, torch.get_rng_state())


def test_the_choice_has_a_margin(monkeypatch):
    for theirs, wanted in ((1.2, False), (1.3, True)):
        monkeypatch.setattr(products, "_seconds", lambda *_, theirs=theirs: (theirs, 1.0))
        products._is_faster.cache_clear()
        assert products.ours_pays(torch.bfloat16) is wanted
    products._is_faster.cache_clear()


def test_where_pytorchs_product_stays_the_bits_are_its_own(monkeypatch):
    monkeypatch.setattr(products, "_seconds", lambda *_: (1.0, 1.0))
    products._is_faster.cache_clear()
    x, w, bias = torch.randn(20, 64).bfloat16(), torch.randn(33, 64).bfloat16(), torch.randn(33).bfloat16()
    ones = [t.clone().requires_grad_() for t in (x, w, bias)]
    others = [t.clone().requires_grad_() for t in (x, w, bias)]
    y, z = products.linear_16bit(*ones), torch.nn.functional.linear(*others)
    assert torch.equal(y, z)
    g = torch.randn(20, 33).bfloat16()
    y.backward(g)
    z.backward(g)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ones, others, strict=True))
    products._is_faster.cache_clear()


@pytest.mark.parametrize("need", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)])
def test_recorded_products_of_16_bits(need, ours):
    torch.manual_seed(0)
    shapes = ((9, 40), (30, 40), (30,))
    x, w, bias = (torch.randn(s).bfloat16().requires_grad_(n) for s, n in zip(shapes, need, strict=True))
    y = linear(x, w, bias)
    y.sum().backward()
    wide = [t.detach().double().requires_grad_(n) for t, n in zip((x, w, bias), need, strict=True)]
    torch.nn.functional.linear(*wide).sum().backward()
    for t, exact in zip((x, w, bias), wide, strict=True):
        if t.requires_grad:
            assert ((t.grad.double() - exact.grad).abs() <= 0.02 + 0.01 * exact.grad.abs()).all()
    assert len(ours) == 1 + need[0] + need[1]
    assert product(x, w.t()).requires_grad is (need[0] or need[1])


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_sums_with_products(dtype, ours):
    """In 16 bits they are rounded once, and their gradients are right; float32 is PyTorch's own."""
    torch.manual_seed(0)
    a, b = torch.randn(9, 40).to(dtype), torch.randn(70, 40).to(dtype).t()
    y = torch.randn(9, 80).to(dtype)[:, 3:73]
    before = y.clone()
    found = plus_product(y, a, b)
    exact = y.double() + a.double() @ b.double()
    assert found.dtype == dtype
    assert ((found.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + 1e-5).all()
    assert torch.equal(y, before)
    assert ours == ([(9, 40, 70)] if dtype in HALVES else [])
    inputs = [t.clone().requires_grad_() for t in (y, a, b)]
    grads = torch.autograd.grad(plus_product(*inputs).sum(), inputs)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    for grad, wanted in zip(grads, torch.autograd.grad(torch.addmm(*wide).sum(), wide), strict=True):
        torch.testing.assert_close(grad.double(), wanted, rtol=1e-2, atol=0.05)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_low_rank_terms_of_sparse_mlps(dtype, packed, ours):
    """Forward, and the gradient of x."""
    torch.manual_seed(0)
    weights = [torch.randn(64, 32) / 6, torch.randn(64, 32) / 6, torch.randn(32, 64) / 8]
    low = [LowRank(torch.randn(4, w.shape[1]) / w.shape[1] ** 0.5, torch.randn(w.shape[0], 4), 0.5) for w in weights]
    lows = dict(zip(("lora_gate", "lora_up", "lora_down"), low, strict=True))
    if packed:
        weights = [ops.quantize_4bit(w, block_size=32) for w in weights]
        mlp = SparseMLP4bit(*weights, activation="silu", tau=0.0, path="sparse", **lows)
        weights = [w.dequantize() for w in weights]
    else:
        lows = {name: LowRank(each.a.to(dtype), each.b.to(dtype), 0.5) for name, each in lows.items()}
        weights = [w.to(dtype) for w in weights]
        mlp = SparseMLP(*weights, activation="silu", tau=0.0, path="sparse", **lows)
    x = torch.randn(3, 32).to(dtype).requires_grad_()
    with torch.no_grad():
        mlp(x)
    assert {(3, 32, 4 if packed else 8), (3, 4, 32)} <= set(ours)
    y = mlp(x)
    y.sum().backward()
    wide = x.detach().double().requires_grad_()
    gate, up, down = (
        w.double() + 0.5 * each.b.double() @ each.a.double() for w, each in zip(weights, low, strict=True)
    )
    exact = (torch.nn.functional.silu(wide @ gate.t()) * (wide @ up.t())) @ down.t()
    exact.sum().backward()
    for found, wanted in ((y, exact), (x.grad, wide.grad)):
        assert float((found.detach().double() - wanted.detach()).norm() / wanted.detach().norm()) < 0.03


def test_linear_16bit_is_an_op():
    x, w, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (5, 4), (5,)))
    assert torch.autograd.gradcheck(products.linear_16bit, (x, w, bias))
    assert torch.autograd.gradgradcheck(products.linear_16bit, (x, w, bias))
    half = [t.detach().bfloat16().requires_grad_() for t in (x, w, bias)]
    for arguments in (half, [*half[:2], None], [half[0].detach(), half[1], None]):
        torch.library.opcheck(torch.ops.deftcore.linear_16bit.default, tuple(arguments))
