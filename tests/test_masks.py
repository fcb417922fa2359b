"""mask_units."""

import pytest
import torch
from conftest import assert_close_to_ref, assert_same_on_threads

from deftcore import ops
from deftcore.ops.density import ACTIVATIONS, activate
from deftcore.ops.masks import mask_units_ref

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [((1, 1), 1), ((3, 17), 1), ((2, 5, 1030), 1), ((70, 6, 21), 7), ((200, 264), 66), ((12,), 4), ((0, 8), 4),
          ((3, 0), 1)]  # fmt: skip


def masked(z, mask, width, activation):
    """mask_units behind an activation that somebody else computes, or none."""
    if activation is None:
        return ops.mask_units(z, mask, width)
    return ops.mask_units(activate(z, activation), mask, width, z=z, activation=activation)


def plain(z, mask, width, activation):
    return mask_units_ref(z if activation is None else activate(z, activation), mask, width)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "width"), SHAPES)
@pytest.mark.parametrize("lay", ["plain", "strided"])
def test_matches_float64(dtype, shape, width, lay):
    z = torch.randn(*shape, 2).to(dtype)[..., 0] if lay == "strided" else torch.randn(shape).to(dtype)
    mask = (1 + torch.randn(shape[-1] // width, 2))[:, 0] if lay == "strided" else torch.rand(shape[-1] // width)
    z.requires_grad_(), mask.requires_grad_()
    y = ops.mask_units(z, mask, width)
    z64, mask64 = z.detach().double().requires_grad_(), mask.detach().double().requires_grad_()
    ref, other = mask_units_ref(z64, mask64, width), mask_units_ref(z, mask, width)
    assert_close_to_ref(y, other, ref.detach())
    grad = torch.randn(ref.shape).to(dtype)
    ours, theirs = (torch.autograd.grad(t, (z, mask), grad) for t in (y, other))
    dz, dmask = torch.autograd.grad(ref, (z64, mask64), grad.double())
    assert_close_to_ref(ours[0], theirs[0], dz)
    work = torch.autograd.grad(mask_units_ref(z64.abs(), mask64, width), mask64, grad.double().abs())[0]
    assert ours[1].dtype == torch.float32
    assert_close_to_ref(ours[1], dmask.float(), dmask, work)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("shape", "width"), [((3, 17), 1), ((70, 6, 21), 7), ((200, 264), 1), ((0, 8), 4)])
def test_behind_an_activation(dtype, activation, shape, width):
    z, mask = torch.randn(shape).mul(2).to(dtype).requires_grad_(), torch.rand(shape[-1] // width).requires_grad_()
    y = masked(z, mask, width, activation)
    z64, mask64 = z.detach().double().requires_grad_(), mask.detach().double().requires_grad_()
    ref = plain(z64, mask64, width, activation)
    assert torch.equal(y, plain(z, mask, width, activation))
    grad = torch.randn(ref.shape).to(dtype)
    ours, theirs = (
        torch.autograd.grad(t, (z, mask), grad) for t in (y, plain(z.float(), mask, width, activation).to(dtype))
    )
    dz, dmask = torch.autograd.grad(ref, (z64, mask64), grad.double())
    assert_close_to_ref(ours[0], theirs[0], dz)
    assert_close_to_ref(ours[1], theirs[1], dmask, torch.full_like(dmask, float(grad.double().abs().sum())))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_ones_change_no_bit(dtype):
    least, most = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    x = torch.tensor([0.0, -0.0, 1.0, -most, least, least / 4, torch.inf, 0.7], dtype=dtype).repeat(5, 9)
    y = ops.mask_units(x, torch.ones(36), 2)
    numbers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    assert torch.equal(y.view(numbers), x.view(numbers))
    assert ops.mask_units(torch.full_like(x, torch.nan), torch.ones(36), 2).isnan().all()


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_gradcheck(activation):
    z = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, m: masked(z, m, 2, activation), (z, mask))


def test_tokens_without_gradient_add_nothing():
    x, mask = torch.randn(4, 6, requires_grad=True), torch.ones(3, requires_grad=True)
    with torch.no_grad():
        x[2:] = 1e30
    grad = torch.randn(4, 6)
    grad[2:] = 0
    some = torch.autograd.grad(ops.mask_units(x[:2], mask, 2), mask, grad[:2])[0]
    torch.testing.assert_close(torch.autograd.grad(ops.mask_units(x, mask, 2), mask, grad)[0], some)


def kept(run):
    """Bytes that the graph of `run` holds alive, each storage once."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(storages.values())


def test_an_mlp_keeps_no_more_than_without_masks():
    """A frozen MLP whose down projection has an adapter, with and without a gate."""
    z, gate = torch.randn(50, 96, requires_grad=True), torch.randn(50, 96, requires_grad=True)
    mask, down = torch.ones(96, requires_grad=True), torch.randn(4, 96, requires_grad=True)

    def act(z):
        return torch.nn.functional.silu(z)

    def with_mask(z):
        return ops.mask_units(act(z).detach(), mask, z=z, activation="silu")

    small = mask.nbytes
    assert kept(lambda: with_mask(z) @ down.t()) <= kept(lambda: act(z) @ down.t()) + small
    assert kept(lambda: (with_mask(z) * gate) @ down.t()) <= kept(lambda: (act(z) * gate) @ down.t()) + small
    assert kept(lambda: ops.mask_units(gate, mask)) == gate.nbytes + small


def test_repeats_are_equal():
    """Also over other numbers of threads: sums are cut by rows alone."""
    z, mask = torch.randn(700, 3000, requires_grad=True), torch.rand(1000, requires_grad=True)
    grad = torch.randn(700, 3000)
    assert_same_on_threads(lambda: torch.autograd.grad(masked(z, mask, 3, "gelu"), (z, mask), grad), (1, 4, 3, 1))


def test_opcheck_and_compile():
    z, mask = torch.randn(4, 8, requires_grad=True), torch.rand(4, requires_grad=True)
    space = torch.ops.deftcore
    torch.library.opcheck(space.mask_units.default, (z, None, mask, 2, 0))
    torch.library.opcheck(space.mask_units.default, (z.detach(), z, mask, 2, 4))
    torch.library.opcheck(space.mask_units_grad.default, (z.detach(), torch.randn(4, 8), mask.detach(), 2, None))
    compiled = torch.compile(masked, fullgraph=True, backend="aot_eager")
    for activation in (None, "silu"):
        torch.testing.assert_close(compiled(z, mask, 2, activation), masked(z, mask, 2, activation))
        ours, theirs = (
            torch.autograd.grad(f(z, mask, 2, activation).square().sum(), (z, mask)) for f in (compiled, masked)
        )
        torch.testing.assert_close(ours, theirs)


def test_autocast_leaves_dtypes():
    x, mask = torch.randn(4, 6).bfloat16().requires_grad_(), torch.ones(3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.mask_units(x, mask, 2)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert (x.grad.dtype, mask.grad.dtype) == (torch.bfloat16, torch.float32)


X = torch.zeros(3, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": 3}, "x: must be a Tensor"),
        ({"x": torch.zeros(3, 6, dtype=torch.int64)}, "x: dtype must be"),
        ({"x": torch.zeros(())}, "mask: must have a unit per 2"),
        ({"mask": torch.ones(3).bfloat16()}, "mask: must be a float32 Tensor"),
        ({"mask": [1.0, 1.0, 1.0]}, "mask: must be a float32 Tensor"),
        ({"mask": torch.ones(4)}, "mask: must have a unit per 2"),
        ({"mask": torch.ones(3, device="meta")}, "mask: must be on cpu"),
        ({"width": 0}, "width: must be"),
        ({"width": 2.5}, "width: must be"),
        ({"z": X}, "activation: must be given with z"),
        ({"activation": "relu"}, "activation: must be given with z"),
        ({"z": X[:2], "activation": "relu"}, "z: shape must be"),
        ({"z": X.half(), "activation": "relu"}, "z: dtype must be"),
        ({"z": X, "activation": "swash"}, "activation: must be one of"),
    ],
)  # fmt: skip
def test_bad_input(change, message):
    call = {"x": X, "mask": torch.ones(3), "width": 2} | change
    with pytest.raises((ValueError, TypeError), match=message):
        ops.mask_units(**call)
