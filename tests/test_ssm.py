"""selective_scan."""

import pytest
import torch
from conftest import assert_close_to_ref
from hypothesis import given, settings
from hypothesis import strategies as st

from deftcore import ops
from deftcore.ops.ssm.scan import selective_scan_ref

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(batch=2, channels=20, length=37, states=5, groups=0, dtype=torch.float32, layout="last", fixed=""):
    """u, delta, A, B, C, D, z, delta_bias, initial state; groups 0 is the form without a group dimension."""

    def sequence(scale=1.0):
        x = scale * torch.randn(batch, length, channels)
        x = x.transpose(1, 2) if layout == "last" else x.transpose(1, 2).contiguous()
        return x.to(dtype)

    def coefficients(name):
        if name in fixed:
            return torch.randn(channels, states)
        shape = (batch, states, length) if groups == 0 else (batch, groups, states, length)
        return torch.randn(shape).to(dtype)

    a = -torch.exp(torch.randn(channels, states))
    return [
        sequence(), sequence(), a, coefficients("B"), coefficients("C"), torch.randn(channels), sequence(),
        torch.randn(channels) - 1, torch.randn(batch, channels, states),
    ]  # fmt: skip


def run(call, tensors, softplus=True):
    u, delta, a, b, c, d, z, bias, first = tensors
    if call is selective_scan_ref:
        return call(u, delta, a, b, c, d, z, bias, softplus, first)
    return call(u, delta, a, b, c, d, z, bias, softplus, True, initial_state=first)


def as_dtype(tensors, dtype, grad=False):
    return [None if t is None else t.detach().to(dtype).requires_grad_(grad) for t in tensors]


def compare(tensors, softplus=True, seed=3):
    """Values and every gradient against float64; allowed is twice what plain PyTorch in the same dtype is off, and the
    roundings of the result."""
    dtype = tensors[0].dtype
    ours_in = [None if t is None else t.detach().requires_grad_() for t in tensors]
    out, last = run(ops.selective_scan, ours_in, softplus)
    ref_in = as_dtype(tensors, torch.float64, grad=True)
    ref, ref_last = run(selective_scan_ref, ref_in, softplus)
    plain_in = as_dtype(tensors, torch.float32, grad=True)
    plain, plain_last = run(selective_scan_ref, plain_in, softplus)
    assert out.dtype == dtype
    assert last.dtype == torch.float32
    scale = ref.abs().max().item() if ref.numel() else 0.0
    assert_close_to_ref(out, plain.to(dtype), ref.detach(), torch.full_like(ref, scale).detach())
    assert_close_to_ref(last, plain_last, ref_last.detach(), torch.full_like(ref_last, scale).detach())
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(out.shape, generator=generator).to(dtype), torch.randn(last.shape, generator=generator)]

    def gradients(outputs, leaves):
        weights = [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)]
        return torch.autograd.grad(outputs, [t for t in leaves if t is not None], weights)

    order = ("u", "delta", "A", "B", "C", "D", "z", "bias", "first")
    names = [name for name, t in zip(order, tensors, strict=True) if t is not None]
    for name, mine, other, wanted in zip(
        names, gradients((out, last), ours_in), gradients((plain, plain_last), plain_in),
        gradients((ref, ref_last), ref_in), strict=True,
    ):  # fmt: skip
        if wanted.numel():
            slack = torch.full_like(wanted, wanted.abs().max().item() * 4)
            assert_close_to_ref(mine, other.to(mine.dtype), wanted, slack), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["last", "first"])
@pytest.mark.parametrize(
    "sizes",
    [
        {}, {"length": 1}, {"length": 32}, {"length": 33}, {"length": 64, "channels": 16, "states": 16},
        {"channels": 1, "states": 1}, {"channels": 17, "states": 16, "length": 70}, {"groups": 1},
        {"groups": 4, "channels": 36}, {"states": 128, "length": 9}, {"fixed": "B"}, {"fixed": "C"}, {"fixed": "BC"},
        {"batch": 3, "channels": 40, "length": 5}, {"channels": 130, "states": 17, "length": 34},
        {"groups": 2, "channels": 140, "states": 9, "length": 33},
    ],
)  # fmt: skip
def test_matches_float64(dtype, layout, sizes):
    compare(inputs(dtype=dtype, layout=layout, **sizes))


@pytest.mark.parametrize("missing", [[5], [6], [7], [8], [5, 6, 7, 8]])
def test_optional_arguments(missing):
    tensors = inputs()
    for i in missing:
        tensors[i] = None
    compare(tensors)
    tensors[1], tensors[7] = tensors[1].abs(), None  # without softplus steps must be given as positive
    compare(tensors, softplus=False)


@pytest.mark.parametrize("empty", [{"batch": 0}, {"length": 0}])
def test_empty(empty):
    tensors = inputs(**empty)
    out, last = run(ops.selective_scan, tensors)
    assert out.shape == tensors[0].shape
    torch.testing.assert_close(last, tensors[8])
    leaves = [t.detach().requires_grad_() for t in tensors]
    out, last = run(ops.selective_scan, leaves)
    (out.sum() + last.sum()).backward()
    assert torch.equal(leaves[8].grad, torch.ones_like(leaves[8]))
    assert not leaves[2].grad.any()


def test_many_sequences():
    """More than a grid of CUDA blocks has along its second dimension."""
    tensors = inputs(batch=65_537, channels=1, length=2, states=1)
    for ours, wanted in zip(run(ops.selective_scan, tensors), run(selective_scan_ref, tensors), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


def test_extreme_steps():
    """Zero, tiny and huge steps: finite values and gradients, as the reference's."""
    tensors = inputs(length=8)
    tensors[7] = None
    tensors[1] = torch.tensor([0.0, 1e-8, 20.0, 20.001, 80.0, -90.0, -20.0, 3.0]).expand(2, 20, 8).clone()
    compare(tensors)
    u, delta, a, b, c = tensors[:5]
    still = ops.selective_scan(u, torch.zeros_like(delta), a, b, c, return_last_state=True, initial_state=tensors[8])
    assert torch.equal(still[1], tensors[8])  # exp(0) is 1 exactly
    long = ops.selective_scan(
        torch.zeros(1, 16, 4096), torch.full((1, 16, 4096), 1e-9), a[:16], torch.zeros(1, 5, 4096),
        torch.ones(1, 5, 4096), return_last_state=True, initial_state=torch.ones(1, 16, 5),
    )[1]  # fmt: skip
    assert bool((long <= 1).all())


def test_decay():
    """Exactly 1 at 0, never above 1, 2 ulp near 0 (and the rounding of the exponent), rising, 0 below the underflow."""

    def decay(x):
        """exp(x) as the scan computes it, from a state of 1 and no input."""
        count = x.numel()
        one, nothing = torch.ones(1, count, 1), torch.zeros(1, 1, 1)
        _, last = ops.selective_scan(
            0 * one, -x.view(1, count, 1), -torch.ones(count, 1), nothing, nothing, return_last_state=True,
            initial_state=one,
        )  # fmt: skip
        return last.flatten()

    near = torch.linspace(-1, 0, 40001)
    ulp = torch.finfo(torch.float32).eps / 2
    exact = near.double().exp()
    assert decay(torch.zeros(3)).tolist() == [1.0] * 3
    assert ((decay(near).double() - exact).abs() / exact).max() <= 3 * ulp * 2
    far = torch.cat((torch.linspace(-120, 0, 60001), torch.tensor([-1e-8, -1e-20, -1e4, -1e30])))
    values = decay(far)
    assert bool((values <= 1).all())
    assert values[far < -105].max() == 0
    rising = values[:60001]
    assert bool((rising[1:] >= rising[:-1] * (1 - 4 * ulp)).all())
    wanted = far[:60001].double().exp()
    normal = wanted > 2e-38
    assert ((values[:60001].double() - wanted).abs() / wanted)[normal].max() < 2e-5  # |x| ulp of the exponent


def test_algebra():
    """Causal to the bit; channels are independent; linear in u; C scales what D does not add."""
    u, delta, a, b, c, d, z, bias, _ = inputs(length=40)
    scan = lambda u, c=c, d=d: ops.selective_scan(u, delta, a, b, c, d, z, bias, True)  # noqa: E731
    base = scan(u)
    later = u.clone()
    later[..., 25] += 1
    assert torch.equal(scan(later)[..., :25], base[..., :25])
    order = torch.randperm(20)
    permuted = ops.selective_scan(
        u[:, order], delta[:, order], a[order], b, c, d[order], z[:, order], bias[order], True
    )
    torch.testing.assert_close(permuted, base[:, order])
    other = torch.randn_like(u)
    torch.testing.assert_close(scan(2 * u - 3 * other), 2 * base - 3 * scan(other), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(scan(u, c=4 * c, d=None), 4 * scan(u, d=None), rtol=1e-4, atol=1e-4)


def test_chunks_continue():
    """Two halves with the state carried over are the whole."""
    tensors = inputs(length=50)
    whole, last = run(ops.selective_scan, tensors)
    first = [t[..., :23] if i in (0, 1, 3, 4, 6) else t for i, t in enumerate(tensors)]
    rest = [t[..., 23:] if i in (0, 1, 3, 4, 6) else t for i, t in enumerate(tensors)]
    a, state = run(ops.selective_scan, first)
    rest[8] = state
    b, end = run(ops.selective_scan, rest)
    torch.testing.assert_close(torch.cat((a, b), dim=2), whole)
    torch.testing.assert_close(end, last)


def test_gradcheck():
    tensors = [t.double().requires_grad_() for t in inputs(batch=1, channels=4, length=5, states=3, groups=2)]

    def scan(*tensors):
        return run(ops.selective_scan, tensors)

    assert torch.autograd.gradcheck(scan, tuple(tensors))


def test_deterministic_and_repeatable_over_threads():
    tensors = inputs(channels=200, length=70, states=16)
    results = []
    for threads in (1, 2, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        leaves = [t.detach().requires_grad_() for t in tensors]
        out, _ = run(ops.selective_scan, leaves)
        results.append([out, *torch.autograd.grad(out.sum(), leaves[:8])])
        torch.set_num_threads(before)
    for one, two in zip(*results[:2], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(*results[1:], strict=True))


def test_keeps_a_state_per_chunk_only():
    """Memory for the backward: the inputs, and one state every 32 steps; nothing of size L x N."""
    tensors = [t.detach().requires_grad_() for t in inputs(batch=1, channels=16, length=320, states=16)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run(ops.selective_scan, tensors)
    assert max(t.numel() for t in kept) <= 320 * 16
    assert sum(t.numel() for t in kept if t.dim() == 4 and t.shape[1] == 10) == 10 * 16 * 16


def test_opcheck_and_compile():
    u, delta, a, b, c, d, z, bias, first = (t.detach().requires_grad_() for t in inputs(length=6))

    def scan(u):
        return ops.selective_scan(u, delta, a, b, c, d, z, bias, True, initial_state=first)

    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(u), scan(u))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(u).sum(), (u, a, b)), torch.autograd.grad(scan(u).sum(), (u, a, b))
    )
    op = torch.ops.deftcore.selective_scan.default
    at, bt, ct = a.t().contiguous(), b.permute(0, 2, 1).unsqueeze(2).contiguous(), c.permute(0, 2, 1).unsqueeze(2)
    state = first.transpose(1, 2).contiguous()
    torch.library.opcheck(op, (u, delta, at, bt, ct.contiguous(), d, z, bias, state, True, True))


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(2, 20), r"u: must be \[B, D, L\]"),
        (1, None, "delta: must be a Tensor"),
        (1, torch.zeros(2, 20, 36), "delta: shape must be"),
        (1, torch.zeros(2, 20, 37, dtype=torch.bfloat16), "delta: dtype must be"),
        (2, torch.zeros(19, 5), "A: shape must be"),
        (2, torch.zeros(20, 5, dtype=torch.complex64), "A: must be real"),
        (2, torch.zeros(20, 300), "A: shape must be"),
        (3, torch.zeros(2, 5, 36), "B: shape must be"),
        (3, torch.zeros(2, 3, 5, 37), "B: the number of groups must divide"),
        (4, torch.zeros(2, 2, 5, 37), "C: must have B's 1 groups"),
        (4, torch.zeros(5), "C: shape must be"),
        (5, torch.zeros(19), "D: shape must be"),
        (7, torch.zeros(19), "delta_bias: shape must be"),
        (8, torch.zeros(2, 5, 20), "initial_state: shape must be"),
    ],
)
def test_bad_input(index, value, message):
    tensors = inputs()
    tensors[index] = value
    with pytest.raises((ValueError, TypeError), match=message):
        run(ops.selective_scan, tensors)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 3), st.integers(1, 40), st.integers(0, 70), st.integers(1, 20), st.sampled_from(["last", "first"])
)
def test_fuzz(batch, channels, length, states, layout):
    """Odd sizes in both layouts."""
    tensors = inputs(batch, channels, length, states, layout=layout)
    out, last = run(ops.selective_scan, tensors)
    ref, ref_last = run(selective_scan_ref, [t.double() for t in tensors])
    torch.testing.assert_close(out.double(), ref, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last.double(), ref_last, rtol=1e-4, atol=1e-4)
