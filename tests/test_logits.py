"""Penalties on logits: every property of BA-LoRA's specification that is about their terms, the kernels against
float64, and the edges.
"""

import math

import pytest
import torch

from deftcore import ops
from deftcore.ops import class_penalties, kernels, logit_penalties, logit_rows, mean_entropy, spectrum
from deftcore.ops import logits as logits_ops
from deftcore.ops.logits import logit_penalties_ref

ZERO = {"consistency": 0.0, "diversity": 0.0, "spectral": 0.0}


def random(*shape, scale=2.0):
    return scale * torch.randn(*shape, dtype=torch.float64)


# ---------------------------------------------------------------------------- values of the terms


def test_values_of_consistency():
    """Property 3, of tokens and classes."""
    p, q = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    z, t = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3), 0.0]])
    for op in (logit_penalties, class_penalties):
        assert float(op(q, p, consistency=1.0, temperature=1.0).total) == pytest.approx(0.130812, abs=1e-6)
        assert float(op(z, t, consistency=1.0, temperature=2.0).total) == pytest.approx(0.145363, abs=1e-6)


def test_values_of_class_diversity():
    """Property 4."""
    assert float(class_penalties(torch.eye(2), diversity=1.0).total) == pytest.approx(0.25)
    assert float(class_penalties(torch.ones(5, 3), diversity=1.0).total) == 0
    z = random(6, 4)
    moved = class_penalties(z + random(1, 4), diversity=1.0).total
    assert torch.allclose(moved, class_penalties(z, diversity=1.0).total, rtol=1e-10)


def test_values_of_token_diversity():
    """Property 5."""
    z = random(4, 9)
    flat = logit_penalties(torch.ones(3, 9), diversity=1.0, top_k=5).total
    assert float(flat) == pytest.approx(-math.log(5), rel=1e-6)
    assert float(logit_penalties(z, diversity=1.0, top_k=1).total) == 0
    one, other = (logit_penalties(x, diversity=1.0, top_k=4).total for x in (z, z + random(4, 1)))
    assert torch.allclose(one, other, rtol=1e-12)
    whole = -torch.distributions.Categorical(logits=z).entropy().mean()
    for top_k in (0, 9, 99):
        assert torch.allclose(logit_penalties(z, diversity=1.0, top_k=top_k).total, whole, rtol=1e-12)


def test_values_of_the_spectral_term():
    """Property 6."""
    z = torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    for k, classes, tokens in ((1, -4 / 7, -0.8), (2, -1.0, -1.4)):
        assert float(class_penalties(z, spectral=1.0, k=k).total) == pytest.approx(classes, rel=1e-12)
        assert float(logit_penalties(z, spectral=1.0, k=k).total) == pytest.approx(tokens, rel=1e-12)
    rank_one = random(5, 1) @ random(1, 7)
    for k in (1, 3):
        for op in (class_penalties, logit_penalties):
            assert float(op(rank_one, spectral=1.0, k=k).total) == pytest.approx(-1.0, rel=1e-7)
            z = random(6, 5)
            assert torch.allclose(op(3 * z, spectral=1.0, k=k).total, op(z, spectral=1.0, k=k).total, rtol=1e-9)


def test_values_of_the_old_consistency():
    """Property 7."""
    z, t = torch.tensor([[3.0, 4.0]], dtype=torch.float64), torch.tensor([[4.0, 3.0]], dtype=torch.float64)
    for scale in (1.0, 5.0):
        found = class_penalties(scale * z, t, consistency=1.0, normalized=True).total
        assert float(found) == pytest.approx(0.04, rel=1e-12)


TERMS = [
    {"consistency": 0.7}, {"diversity": 0.7, "top_k": 3}, {"diversity": 0.7, "top_k": 0}, {"spectral": 0.7, "k": 1},
    {"spectral": 0.7, "k": 2}, {"spectral": 0.7, "k": 99}, {"spectral": 0.7, "k": 2, "norm": "nuclear"},
    {"consistency": 0.2, "diversity": 0.3, "spectral": 0.4, "k": 2, "top_k": 4},
]  # fmt: skip


@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_tokens(terms, masked):
    """Property 8."""
    z, t = random(2, 4, 6).requires_grad_(), random(2, 4, 6)
    mask = torch.tensor([[True, False, True, True], [False, True, True, False]]) if masked else None
    run = lambda x: logit_penalties(x, t, mask=mask, **terms).total  # noqa: E731
    assert torch.autograd.gradcheck(run, (z,), atol=1e-6, rtol=1e-5)
    (grad,) = torch.autograd.grad(run(z), z)
    if masked:
        assert torch.equal(grad[~mask], torch.zeros_like(grad[~mask]))


@pytest.mark.parametrize(
    "terms",
    [{"consistency": 0.7}, {"consistency": 0.7, "normalized": True}, {"diversity": 0.7}, {"spectral": 0.7, "k": 1},
     {"spectral": 0.7, "k": 2}, {"spectral": 0.7, "k": 4}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("shape", [(7, 4), (3, 5)])
def test_gradients_of_classes(terms, shape):
    """Property 8, where k is the shorter side too."""
    z, t = random(*shape).requires_grad_(), random(*shape)
    assert torch.autograd.gradcheck(lambda x: class_penalties(x, t, **terms).total, (z,), atol=1e-6, rtol=1e-5)


def test_repeated_singular_values_have_a_finite_gradient():
    z = torch.eye(4, dtype=torch.float64, requires_grad=True)
    for op in (class_penalties, logit_penalties):
        (grad,) = torch.autograd.grad(op(z, spectral=1.0, k=2).total, z)
        assert grad.isfinite().all()


@pytest.mark.parametrize("k", [1, 5, 10])
def test_randomised_values(monkeypatch, k):
    """Property 9: never above the true ones, and within 1 %."""
    u, v = (torch.linalg.qr(torch.randn(n, 120, dtype=torch.float64)).Q for n in (200, 500))
    values = torch.arange(1, 121, dtype=torch.float64) ** -1.0
    z = ((u * values) @ v.t()).requires_grad_()
    found = logit_penalties(z, spectral=1.0, k=k).total
    exact = -values[:k].sum() / values.norm()
    assert float(exact) - 1e-12 <= float(found) <= 0.99 * float(exact)
    (fast,) = torch.autograd.grad(found, z)
    monkeypatch.setattr(spectrum, "_FEW", 10**6)
    (slow,) = torch.autograd.grad(logit_penalties(z, spectral=1.0, k=k).total, z)
    assert (fast - slow).norm() <= 0.1 * slow.norm()


@pytest.mark.parametrize("block", [1, 7, 40, 10**9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_blocks_equal_the_dense_result(monkeypatch, block, dtype):
    """Property 12."""
    monkeypatch.setattr(logit_rows, "_BLOCK", block)
    z, t = random(3, 5, 17).to(dtype).requires_grad_(), random(3, 5, 17).to(dtype)
    mask = torch.rand(3, 5) > 0.4
    weights = {"consistency": 0.3, "diversity": 0.5, "spectral": 0.7}
    found = logit_penalties(z, t, mask=mask, **weights, temperature=2.0, top_k=6, k=3)
    exact = z.detach().double().requires_grad_()
    terms = logit_penalties_ref(exact[mask], t.double()[mask], 2.0, 6, 3)
    total = sum(weight * term for weight, term in zip(weights.values(), terms, strict=True))
    tight = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6}[dtype]
    for ours, theirs in zip((found.total, *found[1:]), (total, *terms), strict=True):
        assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=tight, abs=tight)
    (ours,), (theirs,) = torch.autograd.grad(found.total, z), torch.autograd.grad(total, exact)
    assert ours.dtype == dtype
    rounding = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-3}[dtype]
    assert (ours.double() - theirs).abs().max() <= rounding * theirs.abs().max()


def distinct(*shape, dtype):
    """Logits of which no two in a row are equal: their largest are the same in every dtype."""
    halves = torch.arange(0x3B80, 0x4080, dtype=torch.int16).view(torch.bfloat16)  # 2^-8 to 4
    values = torch.cat([halves, -halves])
    rows = [values[torch.randperm(len(values))[: shape[-1]]] for _ in range(math.prod(shape[:-1]))]
    return torch.stack(rows).view(shape).to(dtype)


SHAPES = [(1, 1, 1), (1, 2, 17), (3, 5, 16), (1, 9, 515), (2, 7, 2049), (1, 120, 300), (1, 111, 97)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("top_k", [0, 1, 20])
@pytest.mark.parametrize("padding", [0, 3])
def test_terms_and_gradients_against_float64(shape, dtype, top_k, padding):
    z, t = (distinct(*shape[:-1], shape[-1] + padding, dtype=dtype) for _ in range(2))
    z.requires_grad_()
    mask = torch.rand(shape[:-1]) > 0.3
    mask[0, 0] = True
    options = {"mask": mask, "vocabulary": shape[-1], "temperature": 1.7, "top_k": top_k, "k": 2}
    weights = {"consistency": 0.3, "diversity": 0.5, "spectral": 0.7}
    found = logit_penalties(z, t, **weights, **options)
    (ours,) = torch.autograd.grad(found.total, z)
    wide = z.detach().double()[..., : shape[-1]].requires_grad_()
    terms = list(logit_penalties_ref(wide[mask], t.double()[mask][:, : shape[-1]], 1.7, top_k, 2))
    if min(int(mask.sum()), shape[-1]) < 2:
        terms[2] = wide.sum() * 0
    total = sum(weight * term for weight, term in zip(weights.values(), terms, strict=True))
    (theirs,) = torch.autograd.grad(total, wide)
    for term, exact in zip(found[1:], terms, strict=True):
        assert term.dtype == torch.float32
        assert float(term) == pytest.approx(float(exact.detach()), rel=1e-5, abs=1e-5)
    assert ours.dtype == dtype
    assert not ours[..., shape[-1] :].any()
    assert not ours[~mask].any()
    rounding = {torch.float32: 1.2e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    error = (ours[..., : shape[-1]].double() - theirs).abs()
    spectral_slack = 2e-2 if int(mask.sum()) > spectrum._FEW else 1e-5  # of randomised singular vectors
    assert (error <= rounding * theirs.abs() + spectral_slack * theirs.abs().max() + 2.0**-24).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["sliced", "turned", "stepped"])
def test_logits_that_are_not_contiguous(layout, dtype):
    def made(x):
        if layout == "sliced":
            return torch.nn.functional.pad(x, (1, 2, 0, 1))[:, :-1, 1:-2]
        return x.mT.contiguous().mT if layout == "turned" else torch.stack((x, x), -1)[..., 0]

    z, t = (distinct(2, 6, 70, dtype=dtype) for _ in range(2))
    options = {"consistency": 1.0, "diversity": 1.0, "spectral": 1.0, "top_k": 5}
    plain, other = z.clone().requires_grad_(), made(z).requires_grad_()
    assert not other.is_contiguous()
    expected, found = logit_penalties(plain, t, **options), logit_penalties(other, made(t), **options)
    assert all(map(torch.equal, found, expected))
    (ours,), (theirs,) = torch.autograd.grad(found.total, other), torch.autograd.grad(expected.total, plain)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_rows_that_are_left_out_may_hold_anything(dtype):
    z, t = (random(7, 40).to(dtype) for _ in range(2))
    mask = torch.tensor([True, False, True, True, False, True, True])
    options = {"consistency": 1.0, "diversity": 1.0, "spectral": 1.0, "top_k": 5}
    expected = logit_penalties(z[mask], t[mask], **options).total
    z[1], t[1], z[4], t[4] = math.nan, math.inf, -math.inf, math.nan
    z.requires_grad_()
    found = logit_penalties(z, t, mask=mask, **options).total
    assert torch.allclose(found, expected, rtol=1e-5)
    found.backward()
    assert z.grad.isfinite().all()
    assert not z.grad[~mask].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_show(dtype, value):
    """But in the spectral term, which is left out."""
    z, t = (random(4, 40).to(dtype) for _ in range(2))
    z[2, 39] = value
    found = logit_penalties(z, t, consistency=1.0, diversity=1.0, spectral=1.0, top_k=3)
    assert not found.consistency.isfinite()
    assert not found.diversity.isfinite()
    assert float(found.spectral) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("most", [1, 5, 20, 63])
def test_the_first_of_equal_logits_is_kept(dtype, most):
    z = torch.randint(-4, 5, (6, 64)).to(dtype)
    rows = logit_rows.Rows.of(z, None, None, 64)
    if not hasattr(rows.kernels(), "top_logits"):
        pytest.skip("CUDA's are a library's, which keeps any of them")
    expected = torch.sort(z, dim=1, descending=True, stable=True).indices[:, :most].sort(1).values
    assert torch.equal(logit_rows.top_logits(rows, most).long().sort(1).values, expected)


def test_fewer_logits_than_are_to_be_kept():
    z = torch.full((2, 30), -math.inf)
    z[0, :3], z[1, 29] = torch.tensor([1.0, 2.0, 3.0]), 4.0
    z.requires_grad_()
    found = logit_penalties(z, diversity=1.0, top_k=7)
    whole = -torch.distributions.Categorical(logits=torch.tensor([1.0, 2.0, 3.0])).entropy() / 2
    assert torch.allclose(found.total, whole)
    found.total.backward()
    assert z.grad.isfinite().all()
    assert not z.grad[1].any()
    assert z.grad[0, :3].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_products(dtype, transposed):
    for count, width, stride, rank in ((1, 1, 1, 1), (5, 37, 40, 3), (41, 2100, 2100, 15), (9, 513, 520, 6)):
        z = torch.randn(count, stride).to(dtype)
        z[0, 0] = -math.inf
        mask = torch.rand(count) > 0.3
        rows = logit_rows.Rows.of(z, None, mask, width)
        exact = z[:, :width].double().masked_fill(~mask.unsqueeze(1), 0.0)
        exact[exact == -math.inf] = 0
        if transposed:
            factor = torch.randn(count, rank, dtype=rows.dtype)
            for columns in (slice(0, width), slice(width // 3, width // 2 + 1)):
                found = logit_rows.times_columns(rows, factor, columns)
                expected = factor.double().t() @ exact[:, columns]
                torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
        else:
            factor = torch.randn(rank, width, dtype=rows.dtype)
            found = logit_rows.times_rows(rows, factor)
            torch.testing.assert_close(found.double(), exact @ factor.double().t(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("norm", ["frobenius", "nuclear"])
@pytest.mark.parametrize("tokens", [128, 90])
def test_no_copy_of_the_logits(monkeypatch, tokens, norm, native):
    """Whatever is made is a block, or the gradient in the logits' own dtype; what is kept, a few numbers a token."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Made(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.wide, self.all = [0], [0]

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for each in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(each, torch.Tensor) and each.untyped_storage().data_ptr() not in given:
                    self.all.append(each.numel())
                    if each.dtype in (torch.float32, torch.float64):
                        self.wide.append(each.numel())
            return result

    monkeypatch.setattr(logit_rows, "_BLOCK", 4096)
    monkeypatch.setattr(spectrum, "_GRAM_BLOCK", 4096)
    if not native:
        monkeypatch.setattr(kernels, "_native_for", lambda op, x: None)
    z, t = (torch.randn(tokens, 2048).bfloat16() for _ in range(2))
    given = {x.untyped_storage().data_ptr() for x in (z, t)}
    options = (2048, 2.0, 20, 4, norm == "nuclear")
    with Made() as seen:
        terms, *kept = logits_ops._logit_terms_impl(z, t, None, *options)
    assert 0 < max(seen.all) <= max(2048 * 9, tokens**2)  # the projections of the vocabulary, or inner products
    assert sum(x.numel() for x in kept) <= tokens * (8 + 20 + 20 + 2 * (tokens if norm == "nuclear" else 4)) + 1
    with Made() as seen:
        logits_ops._logit_terms_backward_impl(z, t, None, *kept, torch.ones_like(terms), *options)
    assert max(seen.all) == z.numel()
    assert 0 < max(seen.wide) <= 1024 * (tokens if norm == "nuclear" else 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_as_large_as_the_logits_is_kept(dtype):
    z, t = (torch.randn(2, 20, 500).to(dtype) for _ in range(2))
    z.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        total = logit_penalties(z, t, consistency=1.0, diversity=1.0, spectral=1.0).total
    given = {z.data_ptr(), t.data_ptr()}
    assert given <= {x.data_ptr() for x in kept}
    assert sum(x.numel() for x in kept if x.data_ptr() not in given) < 40 * 100
    total.backward()


@pytest.mark.parametrize("norm", ["frobenius", "nuclear"])
@pytest.mark.parametrize("top_k", [0, 3])
def test_compiled_without_a_break(top_k, norm):
    z, t = (torch.randn(2, 5, 40) for _ in range(2))
    mask = torch.rand(2, 5) > 0.3

    def run(z, t, mask, weight):
        options = {"consistency": weight, "diversity": 0.5, "spectral": 0.25, "norm": norm}
        found = logit_penalties(z, t, mask=mask, top_k=top_k, **options)
        return found.total, found.consistency, ops.mean_entropy(t, mask=mask, temperature=2.0)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for weight in (0.5, 0.25):
        ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
        found, expected = compiled(ours, t, mask, weight), run(theirs, t, mask, weight)
        assert all(map(torch.equal, found, expected))
        found[0].backward()
        expected[0].backward()
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("options", [{"consistency": 1.0}, {"diversity": 1.0}, {"spectral": 1.0, "k": 1},
                                     {"consistency": 1.0, "normalized": True}], ids=str)  # fmt: skip
def test_classes_compiled_without_a_break(options):
    z, t = (torch.randn(6, 4) for _ in range(2))
    compiled = torch.compile(lambda x: class_penalties(x, t, **options).total, backend="aot_eager", fullgraph=True)
    ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    compiled(ours).backward()
    class_penalties(theirs, t, **options).total.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    namespace = torch.ops.deftcore
    z, t, mask = random(5, 12).to(dtype), random(5, 12).to(dtype), torch.rand(5) > 0.3
    for options in ((12, 2.0, 3, 2, False), (10, 1.0, 0, 9, True), (12, 1.0, None, None, False)):
        for teacher in (t, None):
            given = (z.clone().requires_grad_(), teacher, mask, *options)
            torch.library.opcheck(namespace.logit_terms.default, given)
            terms, *kept = namespace.logit_terms(z, teacher, mask, *options)
            backward = (z, teacher, mask, *kept, torch.ones_like(terms), *options)
            torch.library.opcheck(namespace.logit_terms_backward.default, backward)
    torch.library.opcheck(namespace.mean_entropy.default, (z, mask, 12, 2.0))
    torch.library.opcheck(namespace.spectral_share.default, (z.float().requires_grad_(), 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_reference_is_the_kernels_equal(monkeypatch, dtype):
    """Where no kernel serves, the same is computed by blocks."""
    z, t = (distinct(3, 50, 41, dtype=dtype) for _ in range(2))
    mask = torch.rand(3, 50) > 0.2
    options = {"consistency": 0.3, "diversity": 0.5, "spectral": 0.7, "k": 2, "vocabulary": 40}
    found = []
    for without in (False, True):
        if without:
            monkeypatch.setattr(kernels, "_native_for", lambda op, x: None)
            monkeypatch.setattr(logit_rows, "_BLOCK", 700)
        x = z.clone().requires_grad_()
        total = logit_penalties(x, t, mask=mask, **options).total
        found.append((total.detach(), *torch.autograd.grad(total, x)))
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 1e-2}[dtype]
    for ours, theirs in zip(*found, strict=True):
        assert (ours.double() - theirs.double()).abs().max() <= tolerance * theirs.double().abs().max()


def test_a_teacher_of_another_dtype():
    z, t = distinct(6, 50, dtype=torch.bfloat16).requires_grad_(), random(6, 50).float()
    found = logit_penalties(z, t, consistency=1.0).total
    expected = logit_penalties_ref(z.double(), t.double(), 2.0, 0, 1)[0]
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_logits_that_changed_before_the_backward():
    z = torch.randn(3, 9, requires_grad=True) * 1
    total = logit_penalties(z, diversity=1.0).total
    z.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_mean_entropy(dtype):
    z, mask = random(3, 7, 300).to(dtype), torch.rand(3, 7) > 0.3
    exact = torch.distributions.Categorical(logits=z[mask].double()[:, :290] / 1.5).entropy().mean()
    found = mean_entropy(z, mask=mask, temperature=1.5, vocabulary=290)
    assert float(found) == pytest.approx(float(exact), rel=1e-5)
    assert float(mean_entropy(z, mask=torch.zeros_like(mask))) == 0
    for options, message in (({"temperature": 0.0}, "temperature"), ({"vocabulary": 301}, "vocabulary"),
                             ({"mask": mask.float()}, "mask: must be bool")):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=message):
            mean_entropy(z, **options)


@pytest.mark.parametrize("scale", [1.0, 65536.0])
@pytest.mark.parametrize("weights", [(0.025, 0.0, 0.0), (0.0, 0.005, 0.0), (0.0, 0.0, 0.005), (0.025, 0.005, 0.005)])
def test_gradients_in_half_precision(weights, scale):
    """As a loss scaler has them: one rounding from float32's, of a loss times what float16 does not hold."""
    z, t = random(120, 3000).half().requires_grad_(), random(120, 3000).half()
    options = dict(zip(ZERO, weights, strict=True))
    wide = z.detach().float().requires_grad_()
    ours, theirs = (
        torch.autograd.grad(logit_penalties(x, t.to(x.dtype), **options).total * scale, x)[0] for x in (z, wide)
    )
    assert ours.dtype == torch.float16
    tiny = 2.0**-24  # half of which is what a result below float16's normal numbers may be off by
    order = 1.2e-7 * theirs.abs().max()  # of sums in float32, which a kernel may take by other packs
    assert ((ours.float() - theirs).abs() <= 2.0**-10 * theirs.abs() + 0.51 * tiny + order).all()


def test_the_backward_leaves_what_it_keeps():
    z, t = random(6, 9).float().requires_grad_(), random(6, 9).float()
    total = logit_penalties(z, t, consistency=1.0).total
    first, second = (torch.autograd.grad(3 * total, z, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


# ---------------------------------------------------------------------------- edges of the terms


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens):
    """None: all terms are 0. One: no spectrum."""
    z, mask = random(2, 3, 5).requires_grad_(), torch.zeros(2, 3, dtype=torch.bool)
    mask[0, :tokens] = True
    found = logit_penalties(z, random(2, 3, 5), mask=mask, consistency=1.0, diversity=1.0, spectral=1.0)
    found.total.backward()
    assert float(found.spectral) == 0
    assert (float(found.consistency) == 0) == (float(found.diversity) == 0) == (tokens == 0)
    assert z.grad.isfinite().all()


def test_empty_logits():
    z = torch.zeros(0, 5, requires_grad=True)
    for op in (logit_penalties, class_penalties):
        found = op(z, z.detach(), consistency=1.0, diversity=1.0, spectral=1.0)
        assert float(found.total) == 0
        found.total.backward()


@pytest.mark.parametrize("value", [0.0, 1e-12])
def test_no_spectrum_without_a_norm(value):
    z = torch.full((3, 4), value, requires_grad=True)
    for op in (logit_penalties, class_penalties):
        found = op(z, spectral=1.0)
        found.total.backward()
        assert float(found.total) == 0
        assert not z.grad.any()


def test_padding_of_the_vocabulary_does_not_count():
    z, t = random(4, 8), random(4, 8)
    z[:, 6:], t[:, 6:] = 50.0, -50.0
    padded = z.clone().requires_grad_()
    options = {"consistency": 1.0, "diversity": 1.0, "spectral": 1.0, "k": 2, "top_k": 3}
    found = logit_penalties(padded, t, vocabulary=6, **options)
    assert torch.allclose(found.total, logit_penalties(z[:, :6], t[:, :6], **options).total)
    found.total.backward()
    assert not padded.grad[:, 6:].any()


def test_minus_infinity():
    """No probability, 0 in the spectrum, not among the largest."""
    z, t = random(4, 8), random(4, 8)
    z[:, 5:], t[:, 5:] = -math.inf, -math.inf
    z.requires_grad_()
    options = {"consistency": 1.0, "diversity": 1.0, "spectral": 1.0, "k": 2, "top_k": 7}
    found = logit_penalties(z, t, **options)
    assert torch.allclose(found.total, logit_penalties(z.detach()[:, :5], t[:, :5], **options).total)
    found.total.backward()
    assert z.grad.isfinite().all()
    assert not z.grad[:, 5:].any()


def test_one_example_and_one_class():
    assert float(class_penalties(random(1, 4), diversity=1.0).total) == 0
    one = class_penalties(random(5, 1), random(5, 1), consistency=1.0, diversity=1.0, spectral=1.0)
    assert (float(one.consistency), float(one.diversity), float(one.spectral)) == (0, 0, -1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"consistency": 1.0}, "teacher: consistency needs"), ({"consistency": -1.0}, "consistency"),
        ({"temperature": 0.0}, "temperature"), ({"k": 0}, "k: must be"), ({"top_k": -1}, "top_k"),
        ({"norm": "l1"}, "norm"), ({"vocabulary": True}, "vocabulary"),
        ({"vocabulary": 9}, "vocabulary: must be from 1 to 4"),
        ({"mask": torch.ones(3)}, "mask: must be bool"), ({"mask": torch.ones(2, dtype=torch.bool)}, "mask: shape"),
        ({"teacher": torch.ones(3, 5)}, "teacher: shape"),
    ],
)  # fmt: skip
def test_token_penalties_refuse(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        logit_penalties(torch.ones(3, 4), **options)


@pytest.mark.parametrize(
    ("student", "options", "message"),
    [
        (torch.ones(3), {}, "student: must be logits"), (torch.ones(3, 4), {"consistency": 1.0}, "teacher"),
        (torch.ones(3, 4), {"k": 0}, "k: must"), (torch.ones(3, 4).int(), {}, "student: dtype"),
        (torch.ones(3, 4), {"consistency": 1.0, "teacher": torch.ones(3, 4).int()}, "teacher: dtype"),
        (torch.ones(3, 4), {"consistency": 1.0, "teacher": torch.ones(3, 4, device="meta")}, "teacher: must be on cpu"),
    ],
)  # fmt: skip
def test_class_penalties_refuse(student, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        class_penalties(student, **options)


def test_no_gradient_is_computed_without_a_graph():
    z = random(3, 5).requires_grad_()
    with torch.no_grad():
        found = logit_penalties(z, spectral=1.0, diversity=1.0)
    assert not found.total.requires_grad
    assert torch.equal(found.total, logit_penalties(z, spectral=1.0, diversity=1.0).total)
