"""lora_linear, plain and in KaSA's form: sigma between the factors, a frozen pair taken away."""

import pytest
import torch
from conftest import assert_close_to_ref
from hypothesis import given, settings
from hypothesis import strategies as st

from deftcore import ops
from deftcore.ops.lora import lora_linear_ref

FORMS = ["sigma", "minus", "both"]


def inputs(dtype=torch.float32, shape=(2, 3), k=12, m=9, r=4):
    x, w, a, b = torch.randn(*shape, k), torch.randn(m, k), torch.randn(r, k), torch.randn(m, r)
    return [t.to(dtype) for t in (x, w, a, b, torch.randn(m))]


def more(form, dtype=torch.float32, k=12, m=9, r=4, r0=3):
    """sigma and the frozen pair, as keywords."""
    sigma, a0, b0 = (t.to(dtype) for t in (torch.randn(r), torch.randn(r0, k), torch.randn(m, r0)))
    pair = {"sigma": sigma, "minus": (a0, b0)}
    return pair if form == "both" else {form: pair[form]}


def widened(value):
    return tuple(map(widened, value)) if isinstance(value, tuple) else value.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (1, 1), (0, 3)])
def test_matches_float64(dtype, with_bias, shape):
    x, w, a, b, bias = inputs(dtype, shape)
    bias = bias if with_bias else None
    y = ops.lora_linear(x, w, a, b, scaling=0.5, bias=bias)
    wide = [None if t is None else t.double() for t in (x, w, a, b, bias)]
    ref = lora_linear_ref(*wide[:4], 0.5, wide[4])
    plain = lora_linear_ref(x, w, a, b, 0.5, bias)
    work = wide[0].abs() @ (wide[1].abs() + 0.5 * wide[3].abs() @ wide[2].abs()).t()
    assert_close_to_ref(y, plain, ref, work * (1 if dtype == torch.float32 else 1e4))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("tokens", "sizes"), [(0, (64, 24, 4, 3)), (1, (64, 24, 1, 1)), (5, (72, 10, 9, 17)),
                                               (40, (320, 72, 16, 16)), (40, (64, 16, 0, 5)),
                                               (3, (64, 16, 5, 0))])  # fmt: skip
def test_sigma_and_minus_match_float64(tokens, sizes, form, dtype, packed):
    """Results and gradients, over dense and 4-bit weights; a rank of 0 too."""
    k, m, r, r0 = sizes
    x, w, a, b, bias = inputs(dtype, (tokens,), k, m, r)
    a, w, rest = a / k**0.5, w.div(k**0.5), more(form, dtype, k, m, r, r0)
    weight = ops.quantize_4bit(w.float()) if packed else w
    rest = {n: (v[0] / k**0.5, v[1]) if n == "minus" else v for n, v in rest.items()}
    trained = [t.requires_grad_() for t in (x, a, b, *([rest["sigma"]] if "sigma" in rest else []))]
    if "minus" in rest:
        trained.append(rest["minus"][1].requires_grad_())
    g = torch.randn(tokens, m).to(dtype)

    def run(function, weight, form=lambda t: t):
        leaves = [form(t) for t in trained]
        left = dict(rest)
        if "sigma" in rest:
            left["sigma"] = leaves[3]
        if "minus" in rest:
            sign = -1 if form is size else 1  # sizes add up
            left["minus"] = (sign * form(rest["minus"][0]).detach(), leaves[-1])
        y = function(leaves, form(weight).detach() if form is size else weight, left, form(bias).detach())
        return [y.detach(), *torch.autograd.grad(y, leaves, form(g).detach())]

    def wide(t):
        return t.detach().double().requires_grad_()

    def size(t):
        return t.detach().double().abs().requires_grad_()

    def plain(leaves, weight, left, bias):
        return lora_linear_ref(leaves[0], weight, leaves[1], leaves[2], 0.5, bias, **left)

    dense = weight.dequantize(torch.float64) if packed else w.double()
    ours = run(lambda t, w, left, bias: ops.lora_linear(t[0], w, *t[1:3], scaling=0.5, bias=bias, **left), weight)
    results = zip(ours, run(plain, dense.to(dtype)), run(plain, dense, wide), run(plain, dense, size), strict=True)
    for mine, theirs, exact, work in results:
        assert mine.dtype == dtype
        rounding = torch.finfo(dtype).eps * exact.norm() + 8 * torch.finfo(torch.float32).eps * work.norm()
        assert (mine.double() - exact).norm() <= 2 * (theirs.double() - exact).norm() + rounding


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("drops", [False, True])
def test_gradients_with_sigma_and_minus(drops, packed):
    """gradcheck; A0 is frozen even if it asks for a gradient."""
    x, w, a, b, _ = (t.requires_grad_() for t in inputs(torch.float64, (2, 2), 6, 5, 2))
    rest = more("both", torch.float64, 6, 5, 2, 3)
    sigma, a0, b0 = (t.requires_grad_() for t in (rest["sigma"], *rest["minus"]))
    weight = ops.quantize_4bit(w.detach().float()) if packed else w.detach()
    dropped = x.detach().mul(2).requires_grad_()

    def run(x, d, a, b, sigma, b0):
        d = d if drops else None
        return ops.lora_linear(x, weight, a, b, scaling=0.3, sigma=sigma, minus=(a0.detach(), b0), dropped_x=d)

    assert torch.autograd.gradcheck(run, (x, dropped, a, b, sigma, b0))
    ops.lora_linear(x, weight, a, b, minus=(a0, b0)).sum().backward()
    assert a0.grad is None


@pytest.mark.parametrize("packed", [False, True])
def test_ones_change_nothing(packed):
    """sigma of ones, and an empty pair, are plain LoRA bit for bit, also where the scaling is no power of two."""
    x, w, a, b, bias = inputs(k=64, m=24)
    weight = ops.quantize_4bit(w) if packed else w
    found = []
    for rest in ({}, {"sigma": torch.ones(4)}):
        leaves = [t.clone().requires_grad_() for t in (x, a, b)]
        y = ops.lora_linear(leaves[0], weight, *leaves[1:], scaling=0.3, bias=bias, **rest)
        found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    assert all(map(torch.equal, *found))
    empty = ops.lora_linear(x, weight, a, b, scaling=0.3, bias=bias, minus=(torch.ones(0, 64), torch.ones(24, 0)))
    torch.testing.assert_close(empty, found[0][0])


@pytest.mark.parametrize("dropped", [False, True])
def test_sigma_and_minus_under_masters(dropped):
    """Float32 factors over bfloat16: computed in float32 and rounded once, with the sum."""
    x, w, a, b, _ = inputs(k=64, m=24)
    x, w, rest = x.bfloat16(), w.bfloat16(), more("both", k=64, m=24)
    d = 2 * x.float() if dropped else None
    y = ops.lora_linear(x, w, a, b, scaling=0.5, dropped_x=d, **rest)
    exact = lora_linear_ref(
        x.double(), w.double(), a.double(), b.double(), 0.5, None, widened(rest["sigma"]), widened(rest["minus"]),
        None if d is None else d.double(),
    )  # fmt: skip
    base = torch.nn.functional.linear(x, w).double()  # rounded by the library
    rounded = (base - x.double() @ w.double().t()).abs() + 2**-8 * exact.abs()
    assert bool(((y.double() - exact).abs() <= rounded + 1e-4).all())


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_frozen_costs_no_gradient(packed):
    """Multiply-adds of the backward: of the frozen pair those that grad x needs, and no more."""
    from torch.utils.flop_counter import FlopCounterMode

    t, k, m, r, r0 = 5, 64, 32, 3, 7
    x, w, a, b, _ = inputs(k=k, m=m, r=r, shape=(t,))
    rest = more("both", k=k, m=m, r=r, r0=r0)
    leaves = [each.requires_grad_() for each in (x, a, b, rest["sigma"])]
    y = ops.lora_linear(x, ops.quantize_4bit(w) if packed else w, a, b, sigma=rest["sigma"], minus=rest["minus"])
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(y.sum(), leaves)
    beside = 0 if packed else m * k + (r + r0) * k  # grad W + low A is one op over 4 bits, uncounted
    assert counter.get_total_flops() == 2 * t * (m * (r + r0) + beside + r * k + m * r)


def test_gradients():
    """gradcheck for x, A, B and the dropped input; the frozen weight gets none."""
    x, w, a, b, bias = (t.requires_grad_() for t in inputs(torch.float64))
    frozen, dropped = w.detach(), x.detach().clone().mul(2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, a, b: ops.lora_linear(x, frozen, a, b, scaling=0.5, bias=bias.detach()), (x, a, b)
    )
    assert torch.autograd.gradcheck(
        lambda x, d, a, b: ops.lora_linear(x, frozen, a, b, scaling=0.5, dropped_x=d), (x, dropped, a, b)
    )
    ops.lora_linear(x, w, a, b).sum().backward()
    assert w.grad is None


def test_opcheck_and_compile():
    x, w, a, b, _ = inputs()
    for t in (x, a, b):
        t.requires_grad_()
    rest = more("both")
    sigma, (a0, b0) = rest["sigma"].requires_grad_(), rest["minus"]
    for beside in ((None, None, None), (sigma, a0, b0.requires_grad_()), (None, a0, b0)):
        torch.library.opcheck(torch.ops.deftcore.lora_linear.default, (x, None, w, a, b, *beside, None, 0.5))
    torch.library.opcheck(torch.ops.deftcore.lora_linear.default, (x, x.detach(), w, a, b, sigma, a0, b0, None, 0.5))
    for keywords in ({}, rest):
        compiled = torch.compile(
            lambda x, k=keywords: ops.lora_linear(x, w, a, b, **k), fullgraph=True, backend="aot_eager"
        )
        torch.testing.assert_close(compiled(x), ops.lora_linear(x, w, a, b, **keywords))


def test_autocast():
    x, w, a, b, bias = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.lora_linear(x, w, a, b, bias=bias)
        both = ops.lora_linear(x, w, a, b, bias=bias, **more("both"))
    assert y.dtype == both.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("index", "value", "error", "message"),
    [
        (0, torch.ones(2, 5), ValueError, "x:"),
        (1, torch.ones(9), ValueError, "weight:"),
        (2, torch.ones(4, 5), ValueError, "lora_a:"),
        (3, torch.ones(9, 5), ValueError, "lora_b:"),
        (3, torch.ones(9, 4).half(), TypeError, "lora_b:"),
    ],
)
def test_bad_input(index, value, error, message):
    arguments = inputs()[:4]
    arguments[index] = value
    with pytest.raises(error, match=message):
        ops.lora_linear(*arguments)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"sigma": torch.ones(3)}, ValueError, r"sigma: shape must be \(4,\)"),
        ({"sigma": torch.ones(4).half()}, TypeError, "sigma: dtype"),
        ({"sigma": 1.0}, TypeError, "sigma:"),
        ({"minus": torch.ones(2, 12)}, TypeError, "minus: must be a pair of tensors"),
        ({"minus": (torch.ones(2, 12),)}, TypeError, "minus: must be a pair of tensors"),
        ({"minus": (torch.ones(2, 11), torch.ones(9, 2))}, ValueError, r"minus\[0\]"),
        ({"minus": (torch.ones(2, 12), torch.ones(9, 3))}, ValueError, r"minus\[1\]"),
        ({"minus": (torch.ones(12), torch.ones(9, 1))}, ValueError, r"minus\[0\]: must be a matrix"),
        ({"minus": (torch.ones(2, 12), None)}, TypeError, r"minus\[1\]"),
        ({"minus": (torch.ones(2, 12).double(), torch.ones(9, 2))}, TypeError, r"minus\[0\]: dtype"),
    ],
)
def test_bad_sigma_and_minus(keywords, error, message):
    with pytest.raises(error, match=message):
        ops.lora_linear(*inputs()[:4], **keywords)


@pytest.mark.parametrize(("dtype", "scaling"), [(torch.float32, 3.402823466385289e38), (torch.bfloat16, -1e300)])
def test_scaling_that_float32_cannot_hold(dtype, scaling):
    one = torch.ones(1, 1, dtype=dtype)
    with pytest.raises(ValueError, match="scaling: must be at most"):
        ops.lora_linear(one, one, one, one, scaling=scaling)
    assert ops.lora_linear(*[one.double()] * 4, scaling=1e300).item() == 1e300


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.tuples(*[st.lists(st.integers(0, 4), max_size=3) for _ in range(4)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int32]),
    scaling=st.floats(),
)
def test_fuzz(shapes, dtype, scaling):
    """Any shapes give a result or an error that names an argument; never a crash."""
    x, w, a, b = (torch.ones(s, dtype=dtype) for s in shapes)
    try:
        y = ops.lora_linear(x, w, a, b, scaling=scaling)
    except (ValueError, TypeError) as error:
        assert ":" in str(error)
    else:
        assert y.shape == (*x.shape[:-1], w.shape[0])
