"""partial_linear and gated_linear."""

import pytest
import torch
from conftest import assert_close_to_ref
from hypothesis import given, settings
from hypothesis import strategies as st

from deftcore import ops
from deftcore.ops.density import ACTIVATIONS
from deftcore.ops.gated_linear import gated_act_ref, gated_linear_ref
from deftcore.ops.partial_linear import partial_linear_ref

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def saved(run):
    """Tensors that the graph of `run` keeps, with the bytes of the storage each holds alive."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run()
    return kept


def tied(weight, dim, start, size):
    """A slice of `weight` as a parameter on its memory."""
    return torch.nn.Parameter(weight.narrow(dim, start, size))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(9,), (7, 9), (2, 3, 9), (2, 2, 3, 9), (0, 9)])
@pytest.mark.parametrize("is_tied", [True, False])
def test_matches_float64(dtype, dim, shape, is_tied):
    x = torch.randn(*shape).to(dtype)
    weight, bias = torch.randn(6, 9).to(dtype), torch.randn(6).to(dtype)
    parts = [tied(weight, dim, 1, 2), tied(weight, dim, 4, 1)]
    parts = parts if is_tied else [p.detach() + 1 for p in parts]
    y = ops.partial_linear(x, weight, parts, dim=dim, start=[1, 4], bias=bias)
    wide = [p.double() for p in parts]
    ref = partial_linear_ref(x.double(), weight.double(), wide, [1, 4], dim, bias.double())
    plain = partial_linear_ref(x, weight, parts, [1, 4], dim, bias)
    work = x.double().abs() @ (weight.double().abs() + 1).sum(0)
    assert_close_to_ref(y, plain, ref, work.unsqueeze(-1).expand(ref.shape) * (1 if dtype == torch.float32 else 1e4))


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("neuron_major", [False, True])
def test_slice_gradient_is_the_slice_of_the_full_gradient(dim, neuron_major):
    x = torch.randn(2, 5, 9, dtype=torch.float64)[:, ::2].requires_grad_()  # strided
    whole = torch.randn(6, 9, dtype=torch.float64)
    whole = whole.t().contiguous().t() if neuron_major else whole
    parts = [tied(whole, dim, 0, 2), tied(whole, dim, 3, 2)]
    y = ops.partial_linear(x, whole, parts, dim=dim, start=[0, 3])
    grad = torch.randn_like(y)
    dx, *ours = torch.autograd.grad(y, (x, *parts), grad)
    full = whole.clone().requires_grad_()
    dx_full, dw = torch.autograd.grad(torch.nn.functional.linear(x, full), (x, full), grad)
    torch.testing.assert_close(dx, dx_full)
    for part, mine, start in zip(parts, ours, (0, 3), strict=True):
        torch.testing.assert_close(mine, dw.narrow(dim, start, 2))
        if neuron_major == (dim == 1):  # a dense block of memory: its gradient is laid out as it is
            assert mine.stride() == part.stride()


def test_gradcheck():
    options = {"dtype": torch.float64, "requires_grad": True}
    x, bias = torch.randn(3, 5, 8, **options), torch.randn(6, **options)
    weight = torch.randn(6, 8, dtype=torch.float64)

    def column(x, a, b, bias):
        return ops.partial_linear(x, weight, [a, b], dim=1, start=[2, 6], bias=bias)

    def row(x, a, bias):
        return ops.partial_linear(x, weight, a, dim=0, start=3, bias=bias)

    assert torch.autograd.gradcheck(column, (x, torch.randn(6, 3, **options), torch.randn(6, 2, **options), bias))
    assert torch.autograd.gradcheck(row, (x, torch.randn(2, 8, **options), bias))
    gate, up = torch.randn(4, 8, **options), torch.randn(4, 8, **options)
    for activation in ("silu", "gelu", "gelu_tanh", "relu2"):
        assert torch.autograd.gradcheck(
            lambda g, u, t, a=activation: ops.gated_linear(g, u, weight, t, start=1, activation=a),
            (gate, up, torch.randn(6, 3, **options)),
        )


def test_weight_gets_no_gradient():
    weight = torch.randn(6, 9, requires_grad=True)
    part = torch.nn.Parameter(torch.randn(6, 2))
    ops.partial_linear(torch.randn(3, 9), weight, part, dim=1).sum().backward()
    assert weight.grad is None
    assert part.grad is not None


def test_keeps_only_the_slice_of_the_input():
    """Spec P4: bytes equal the formula, and no view pins the whole input."""
    x = torch.randn(100, 64, requires_grad=True)
    weight = torch.randn(64, 32).t()
    part = tied(weight, 1, 0, 4)
    kept = saved(lambda: ops.partial_linear(x, weight, part, dim=1))
    extra = [t for t in kept if t.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()]
    assert [t.untyped_storage().nbytes() for t in extra] == [100 * 4 * 4]
    frozen = saved(lambda: ops.partial_linear(x, weight, part.detach(), dim=1))
    assert all(t.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr() for t in frozen)


def test_gated_linear_keeps_gate_and_up_only():
    gate, up = torch.randn(50, 96, requires_grad=True), torch.randn(50, 96, requires_grad=True)
    weight = torch.randn(96, 16).t()
    part = tied(weight, 1, 0, 8)
    kept = saved(lambda: ops.gated_linear(gate, up, weight, part))
    own = {t.untyped_storage().data_ptr() for t in (gate, up, weight)}
    assert {t.untyped_storage().data_ptr() for t in kept} == own


def test_a_step_between_forward_and_backward_raises():
    weight = torch.randn(6, 9)
    part = tied(weight, 0, 0, 2)
    x = torch.randn(3, 9, requires_grad=True)
    y = ops.partial_linear(x, weight, part, dim=0)
    with torch.no_grad():
        part.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (2, 5, 1025), (200, 264), (0, 8)])
def test_gated_linear(dtype, activation, shape):
    """Values and gradients against float64, gate and up lying in one wider buffer."""
    gap = 3 if shape[-1] % 8 else 8  # rows of 16-byte packs, and others
    wide = torch.randn(*shape[:-1], 2 * shape[-1] + gap).to(dtype)
    gate, up = wide[..., : shape[-1]].requires_grad_(), wide[..., shape[-1] : 2 * shape[-1]].requires_grad_()
    weight = torch.eye(shape[-1], dtype=dtype)
    part = tied(weight, 1, 0, min(4, shape[-1]))
    y = ops.gated_linear(gate, up, weight, part, activation=activation)
    g64, u64, p64 = (t.detach().double().requires_grad_() for t in (gate, up, part))
    ref = gated_linear_ref(g64, u64, weight.double(), [p64], [0], activation, None)
    assert_close_to_ref(y, gated_act_ref(gate, up, activation), ref.detach())
    grad = torch.randn(ref.shape).to(dtype)
    ours = torch.autograd.grad(y, (gate, up, part), grad)
    wanted = torch.autograd.grad(ref, (g64, u64, p64), grad.double())
    plain = torch.autograd.grad(
        gated_linear_ref(gate, up, weight, [part], [0], activation, None), (gate, up, part), grad
    )
    for mine, ref64, other in zip(ours, wanted, plain, strict=True):
        bound = gate.abs().double().amax() * up.abs().double().amax() * grad.abs().double().sum() if grad.numel() else 0
        slack = torch.full_like(ref64, float(bound) * (1e-1 if dtype == torch.float32 else 1e3))
        assert_close_to_ref(mine, other, ref64, slack if mine is ours[2] else None)


def test_gated_linear_extremes():
    gate = torch.tensor([[3e4, -3e4, float("inf"), float("nan"), 0.0]])
    up = torch.full_like(gate, 2.0)
    for activation in ("silu", "gelu", "relu"):
        g, u = gate.clone().requires_grad_(), up.clone().requires_grad_()
        assert ops.gated_linear(g[:, 2:4], u[:, 2:4], torch.eye(2), activation=activation).isnan().all()
        y = ops.gated_linear(gate[:, :2], up[:, :2], torch.eye(2), activation=activation)
        assert y.tolist() == [[6e4, pytest.approx(0.0, abs=1e-30)]]
        slope_up = torch.autograd.grad(
            ops.gated_linear(g[:, :2], u[:, :2], torch.eye(2), activation=activation).sum(), u
        )[0]
        assert slope_up[0, :2].tolist() == [3e4, pytest.approx(0.0, abs=1e-30)]


def test_opcheck_and_compile():
    weight = torch.randn(8, 6).t()
    part = torch.randn(6, 3, requires_grad=True)
    x, g, u = (torch.randn(4, 8, requires_grad=True) for _ in range(3))
    space = torch.ops.deftcore
    torch.library.opcheck(space.partial_linear.default, (x, weight, [part], [2], 1, False, None))
    torch.library.opcheck(
        space.partial_linear.default, (x, weight, [part[:, :1].t().expand(1, 6) @ weight], [2], 0, False, None)
    )
    torch.library.opcheck(space.gated_linear.default, (g, u, weight, [part], [2], False, None, 4))
    torch.library.opcheck(space.gated_act.default, (g.detach(), u.detach(), 4))
    torch.library.opcheck(
        space.partial_linear_grad.default, (torch.randn(4, 6), weight, [part.detach()], [2], 1, False)
    )
    torch.library.opcheck(
        space.gated_linear_grad.default,
        (torch.randn(4, 6), g.detach(), u.detach(), weight, [part.detach()], [2], False, 4),
    )

    def both(x):
        return ops.partial_linear(x, weight, part, dim=1, start=2) + ops.gated_linear(x, x, weight, part, start=2)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), both(x))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x).sum(), part)[0], torch.autograd.grad(both(x).sum(), part)[0]
    )


def test_autocast_and_master():
    weight = torch.randn(6, 9)
    part = tied(weight, 1, 0, 3)
    x = torch.randn(4, 9, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.partial_linear(x, weight, part, dim=1)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert part.grad.dtype == torch.float32
    torch.testing.assert_close(part.grad, x.detach()[:, :3].sum(0).expand(6, 3), atol=0.05, rtol=0.05)
    half = weight.bfloat16()
    master = half[:, :3].float().requires_grad_()
    y = ops.partial_linear(x.bfloat16(), half, master, dim=1, synced=True)
    torch.testing.assert_close(y, torch.nn.functional.linear(x.bfloat16(), half))
    y.float().sum().backward()
    assert master.grad.dtype == torch.float32


W = torch.zeros(6, 9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 8)}, "x: last dimension must be 9"),
        ({"x": torch.zeros(3, 9, dtype=torch.int64)}, "x: dtype must be"),
        ({"weight": torch.zeros(6)}, "weight: must be a matrix"),
        ({"weight": W.bfloat16(), "trained": torch.zeros(6, 2).bfloat16()}, "weight: dtype"),
        ({"trained": torch.zeros(5, 2)}, r"trained: shape must be \(6, s\)"),
        ({"trained": torch.zeros(6, 2, dtype=torch.bfloat16)}, "trained: dtype must be"),
        ({"start": 8}, "start: slices must be ascending"),
        ({"start": -1}, "start: slices must be ascending"),
        ({"start": [0, 1]}, "start: must be one number per slice"),
        ({"trained": [torch.zeros(6, 2)] * 2, "start": [0, 1]}, "start: slices must be ascending"),
        ({"dim": 2}, "dim: must be 0"),
        ({"bias": torch.zeros(5)}, "bias: shape must be"),
    ],
)  # fmt: skip
def test_bad_input(change, message):
    given_ = {"x": torch.zeros(3, 9), "weight": W, "trained": torch.zeros(6, 2), "dim": 1, "start": 0} | change
    with pytest.raises((ValueError, TypeError), match=message):
        ops.partial_linear(given_.pop("x"), given_.pop("weight"), given_.pop("trained"), **given_)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=0, max_size=3), st.lists(st.integers(0, 4), min_size=0, max_size=3),
    st.lists(st.integers(0, 4), min_size=0, max_size=3), st.integers(-2, 5), st.sampled_from([0, 1]),
)  # fmt: skip
def test_fuzz(x, w, t, start, dim):
    """Any shapes: a result of the right shape, or a clear error."""
    try:
        y = ops.partial_linear(torch.zeros(x), torch.zeros(w), torch.zeros(t), dim=dim, start=start)
    except (ValueError, TypeError) as error:
        assert ":" in str(error)
    else:
        assert y.shape == (*x[:-1], w[0])
    try:
        y = ops.gated_linear(torch.zeros(x), torch.zeros(x), torch.zeros(w), torch.zeros(t), start=start)
    except (ValueError, TypeError) as error:
        assert ":" in str(error)
    else:
        assert y.shape == (*x[:-1], w[0])
