"""act_density and density: spec deft.md section 10, P1-P9."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close_to_ref
from hypothesis import given, settings
from hypothesis import strategies as st

from deftcore import ops
from deftcore.ops.density import ACTIVATIONS, SURROGATES, act_density_ref, default_tau

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN = {
    "relu": F.relu,
    "relu2": lambda z: F.relu(z).square(),
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_matches_float64(activation, surrogate, dtype):
    for shape in ((1, 1, 1), (2, 3, 17), (1, 5, 2049), (13, 1, 4096)):
        z = (3 * torch.randn(shape)).to(dtype).requires_grad_()
        z64 = z.detach().double().requires_grad_()
        a, total, count = ops.act_density(z, activation, surrogate=surrogate)
        a64, total64, count64 = ops.act_density(z64, activation, surrogate=surrogate)
        plain_z = z.detach().clone().requires_grad_()
        plain = PLAIN[activation](plain_z)
        assert_close_to_ref(a, plain, a64.detach())
        assert abs(total.item() - total64.item()) <= 1e-5 * abs(total64.item()) + 1e-6  # P9
        assert abs(count.item() - count64.item()) <= max(1, z.numel() // 1000)  # values at tau may fall either way
        grad = torch.randn_like(a)
        (ours,) = torch.autograd.grad(a, z, grad, retain_graph=True)
        (theirs,) = torch.autograd.grad(plain, plain_z, grad)
        (ref,) = torch.autograd.grad(a64, z64, grad.double(), retain_graph=True)
        assert_close_to_ref(ours, theirs, ref)
        (ours,) = torch.autograd.grad(total, z)
        (ref,) = torch.autograd.grad(total64, z64)
        scale = ref.abs().max() + 1e-3  # s' of l0 is steep near 0: f(z)'s own rounding there moves it by this much
        assert (ours.double() - ref).abs().max() <= scale * (8e-3 if dtype != torch.float32 else 1e-3)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_surrogate_shape(surrogate):
    """P1: 0 at 0, even, non-decreasing in |a|, at most 1 (l0, tanh); s(sqrt eps) = 1/2 for l0."""

    def s(value):
        z = torch.tensor([[value]])
        return act_density_ref(z.double(), "relu", None, surrogate, 1e-7 if surrogate == "l0" else 20.0, 0.0)[1].item()

    grid = [0.0, 1e-6, 1e-4, math.sqrt(1e-7), 1e-2, 0.5, 3.0]
    values = [s(v) for v in grid]
    assert values[0] == 0
    assert values == sorted(values)
    if surrogate != "l1":
        assert max(values) <= 1
    if surrogate == "l0":
        assert s(math.sqrt(1e-7)) == pytest.approx(0.5)
    z = torch.randn(1, 64).abs() + 0.1
    up = ops.act_density(z, "silu", surrogate=surrogate)[1]
    assert torch.isfinite(up)


def test_bounds_of_the_surrogate():
    """P2: D_sqrt(eps) / 2 <= Dhat <= D_0, Dhat <= D_t + s(t), Dhat -> D_0 as eps -> 0."""
    a = torch.relu(torch.randn(4, 5, 64, dtype=torch.float64)) * 10.0 ** torch.randint(-6, 1, (4, 5, 64))
    eps, n = 1e-7, a.numel()
    dhat = ops.act_density(a, "relu", eps=eps)[1].item() / n
    at = lambda tau: ops.density(a, tau=tau).item()  # noqa: E731
    assert 0.5 * at(math.sqrt(eps)) <= dhat <= at(0.0) <= 1
    for t in (1e-5, 1e-3, 1e-1):
        assert dhat <= at(t) + t * t / (t * t + eps) + 1e-7
    assert ops.act_density(a, "relu", eps=1e-30)[1].item() / n == pytest.approx(at(0.0), abs=1e-6)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation, surrogate):
    """P3: analytic gradients are central differences in float64; eps is widened so that differences resolve s."""
    z = torch.randn(2, 3, 5, dtype=torch.float64)
    z = torch.where(z.abs() < 0.2, z.sign() * 0.2 + z, z).requires_grad_()
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    run = lambda z: ops.act_density(z, activation, mask=mask, surrogate=surrogate, eps=1e-2, beta=2.0)[:2]  # noqa: E731
    assert torch.autograd.gradcheck(run, z, eps=1e-6, rtol=1e-5, atol=1e-7)


def test_gradient_of_the_sum_is_zero_at_zero():
    z = torch.zeros(3, 8, requires_grad=True)
    for surrogate in SURROGATES:
        (grad,) = torch.autograd.grad(ops.act_density(z, "silu", surrogate=surrogate)[1], z)
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_masked_tokens_change_nothing(bad):
    """P4: select, not multiply: NaN and infinity at masked tokens reach neither sum, count nor the sum's gradient."""
    for activation in ACTIVATIONS:
        z = torch.randn(2, 4, 33)
        mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
        kept = ops.act_density(z, activation, mask=mask)
        z[~mask] = bad
        z.requires_grad_()
        a, total, count = ops.act_density(z, activation, mask=mask)
        assert torch.equal(total, kept[1])
        assert torch.equal(count, kept[2])
        assert ops.density(a.detach(), mask=mask) == ops.density(kept[0], mask=mask)
        if math.isnan(bad):
            continue
        (grad,) = torch.autograd.grad(total, z)
        assert torch.equal(grad[~mask].nan_to_num(0.0), torch.zeros_like(grad[~mask]))


def test_sum_form_is_invariant():
    """P5: padding, permutations of tokens and neurons, and micro-batches give the same sums."""
    z, mask = torch.randn(4, 6, 40), torch.ones(4, 6)
    total, count = ops.act_density(z, "gelu", mask=mask)[1:]
    padded = F.pad(z, (0, 0, 0, 3), value=7.0)
    pad_mask = F.pad(mask, (0, 3))
    for other, other_mask in (
        (padded, pad_mask), (z[:, torch.randperm(6)], mask), (z[..., torch.randperm(40)], mask)
    ):  # fmt: skip
        t, c = ops.act_density(other, "gelu", mask=other_mask)[1:]
        assert c == count
        assert t.item() == pytest.approx(total.item(), rel=1e-6)
    parts = [ops.act_density(part, "gelu") for part in z.split(1)]
    assert sum(p[2].item() for p in parts) == count
    assert sum(p[1].item() for p in parts) == pytest.approx(total.item(), rel=1e-6)


def test_zero_and_empty():
    """P6 for the op: nothing active, nothing counted, nothing there."""
    z = -torch.ones(2, 3, 8)
    a, total, count = ops.act_density(z)
    assert (a.sum(), total, count) == (0, 0, 0)
    assert ops.act_density(torch.ones(2, 3, 8), mask=torch.zeros(2, 3))[1:] == (0, 0)
    for shape in ((0, 3, 8), (2, 0, 8), (2, 3, 0)):
        z = torch.randn(shape, requires_grad=True)
        a, total, count = ops.act_density(z)
        assert a.shape == shape
        assert (total, count) == (0, 0)
        (grad,) = torch.autograd.grad(a.sum() + total, z)
        assert grad.shape == shape
        assert ops.density(a.detach()) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes_stay_finite(dtype):
    """P9: s and s' are finite up to the dtype's maximum, down to its smallest subnormal."""
    info = torch.finfo(dtype)
    z = torch.tensor([[info.max, -info.max, info.tiny, -info.tiny, info.smallest_normal / 4, 0.0, -0.0]], dtype=dtype)
    for activation in ("relu", "gelu", "gelu_tanh", "silu"):
        z = z.detach().requires_grad_()
        a, total, _ = ops.act_density(z, activation)
        (grad,) = torch.autograd.grad(a.float().sum() * 1e-30 + total, z)
        assert total.isfinite()
        assert grad.isfinite().all(), activation


def test_special_values():
    """NaN is active and goes through; -0.0 is not active; relu keeps infinities."""
    z = torch.tensor([[math.nan, -0.0, math.inf, -math.inf, 1.0]])
    a, _, count = ops.act_density(z)
    assert count == 3
    assert a[0, 0].isnan()
    assert a[0, 2:].tolist() == [math.inf, 0.0, 1.0]
    assert ops.density(torch.tensor([-0.0, 0.0])) == 0
    for activation in ("gelu", "gelu_tanh", "silu"):
        a = ops.act_density(torch.tensor([[-math.inf, math.inf, math.nan] * 7]), activation)[0]
        assert a[0, :2].tolist() == [0.0, math.inf], activation
        assert a[0, 2].isnan(), activation


def test_default_tau():
    assert default_tau("relu") == default_tau("relu2") == 0
    assert default_tau("silu") == default_tau("gelu_new") == pytest.approx(math.sqrt(1e-7))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_layout(dtype):
    wide = torch.randn(3, 6, 80, dtype=dtype)
    for z in (wide[..., 5:48], wide.transpose(0, 1), wide[::2], wide.expand(3, 6, 80)[:, 1]):
        mask = torch.rand(z.shape[:-1]) > 0.3
        ours = ops.act_density(z, "silu", mask=mask)
        dense = ops.act_density(z.contiguous(), "silu", mask=mask.to(torch.uint8))
        assert all(torch.equal(x, y) for x, y in zip(ours, dense, strict=True))


def test_saves_one_tensor():
    """No extra full-size tensor: ReLU keeps its output (which the next layer keeps too), GELU its input."""
    for activation, kept_is_output in (("relu", True), ("gelu", False), ("silu", False)):
        saved = []
        z = torch.randn(2, 3, 64, requires_grad=True) * 1
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            a, total, _ = ops.act_density(z, activation)
        full = [t for t in saved if t.numel() == z.numel()]
        assert len(full) == 1
        assert full[0].data_ptr() == (a if kept_is_output else z).data_ptr()
        (a.sum() + total).backward()


@pytest.mark.parametrize("grads", [(True, False), (False, True), (True, True)])
def test_partial_gradients(grads):
    z = torch.randn(2, 40, requires_grad=True)
    a, total, _ = ops.act_density(z, "gelu", surrogate="tanh", beta=2.0)
    z64 = z.detach().double().requires_grad_()
    a64, total64, _ = ops.act_density(z64, "gelu", surrogate="tanh", beta=2.0)
    pick = lambda a, total: [t for t, used in ((a.sum(), grads[0]), (total, grads[1])) if used]  # noqa: E731
    (ours,), (ref,) = torch.autograd.grad(pick(a, total), z), torch.autograd.grad(pick(a64, total64), z64)
    torch.testing.assert_close(ours.double(), ref, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    z = torch.randn(2, 3, 9, dtype=dtype, requires_grad=True)
    mask = torch.ones(2, 3, dtype=torch.bool)
    torch.library.opcheck(torch.ops.deftcore.act_density.default, (z, mask, 2, 0, 1e-2, 0.0))
    torch.library.opcheck(torch.ops.deftcore.density_count.default, (z.detach(), None, 0.0))
    grads = (torch.randn_like(z), torch.ones((), dtype=dtype))
    torch.library.opcheck(torch.ops.deftcore.act_density_backward.default, (z.detach(), *grads, mask, 2, 0, 1e-2))


def test_compile():
    def run(z):
        a, total, count = ops.act_density(z, "silu")
        return a * 2, total, count

    z = torch.randn(3, 8, requires_grad=True)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(compiled(z), run(z), strict=True):
        assert torch.equal(ours, eager)
    compiled(z)[0].sum().backward()
    assert z.grad is not None


BAD = [
    ({"z": [1.0]}, TypeError, "z:"),
    ({"z": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "z: dtype"),
    ({"z": torch.tensor(1.0)}, ValueError, "z:"),
    ({"activation": "swoosh"}, ValueError, "activation:"),
    ({"surrogate": "l2"}, ValueError, "surrogate:"),
    ({"eps": 0.0}, ValueError, "eps:"),
    ({"eps": math.nan}, ValueError, "eps:"),
    ({"eps": "1"}, TypeError, "eps:"),
    ({"beta": -1}, ValueError, "beta:"),
    ({"tau": -1e-9}, ValueError, "tau:"),
    ({"tau": math.inf}, ValueError, "tau:"),
    ({"mask": torch.ones(2)}, ValueError, "mask:"),
    ({"mask": 1}, TypeError, "mask:"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change, error, message):
    arguments = {"z": torch.ones(3, 4)} | change
    with pytest.raises(error, match=message):
        ops.act_density(arguments.pop("z"), arguments.pop("activation", "relu"), **arguments)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), max_size=4),
    dtype=st.sampled_from([*DTYPES, torch.float64, torch.int32, torch.complex64, torch.bool]),
    mask_shape=st.none() | st.lists(st.integers(0, 5), max_size=3),
    activation=st.sampled_from([*ACTIVATIONS, "nope", ""]),
    surrogate=st.sampled_from([*SURROGATES, "nope"]),
    eps=st.floats() | st.integers(-2, 2),
    tau=st.none() | st.floats(),
)
def test_fuzz(shape, dtype, mask_shape, activation, surrogate, eps, tau):
    """Any input gives a result or an error that names an argument; never a crash."""
    z = torch.ones(shape, dtype=dtype)
    mask = None if mask_shape is None else torch.ones(mask_shape)
    try:
        a, _, count = ops.act_density(z, activation, mask=mask, surrogate=surrogate, eps=eps, tau=tau)
    except (ValueError, TypeError) as error:
        assert ":" in str(error)
    else:
        assert a.shape == z.shape
        assert 0 <= count <= z.numel()


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), max_size=4),
    dtype=st.sampled_from([*DTYPES, torch.float64, torch.int8]),
    mask_shape=st.none() | st.lists(st.integers(0, 5), max_size=3),
    tau=st.floats(),
)
def test_fuzz_density(shape, dtype, mask_shape, tau):
    """As for act_density; the result is a share."""
    try:
        share = ops.density(torch.ones(shape, dtype=dtype), tau=tau, mask=mask_shape and torch.ones(mask_shape))
    except (ValueError, TypeError) as error:
        assert ":" in str(error)
    else:
        assert 0 <= share <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1, 16, 17, 2049])
def test_relu_keeps_subnormal_numbers(dtype, width):
    z = torch.full((3, width), 3 * torch.finfo(dtype).smallest_normal / 128).to(dtype).requires_grad_()
    a = ops.act_density(z, "relu")[0]
    assert 0 < a.min() < torch.finfo(dtype).smallest_normal
    assert torch.equal(a, z)
    assert torch.equal(torch.autograd.grad(a.sum(), z)[0], torch.ones_like(z))
