"""Activations at the ends of the float range, through every op that has one inside, against float64."""

import pytest
import torch

from deftcore import ops

MOST, TINY = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
SIZES = (0.0, 1e-45, 1e-40, TINY, 1e-8, 0.5, 3.0, 20.5, 88.0, 88.5, 95.0, 103.0, 110.0, 1e4, 1e15, 1e30, 3e38, MOST)


def numbers():
    found = torch.tensor([*SIZES, torch.inf])
    return torch.cat((found, -found, torch.tensor([torch.nan])))


def exact(z, activation):
    """f(z) in float64, with the limits at infinity."""
    z64 = z.double()
    if activation == "relu":
        return z64.clamp(min=0)
    if activation == "relu2":
        return z64.clamp(min=0) ** 2
    rate = {
        "silu": torch.sigmoid(z64),
        "gelu": torch.special.ndtr(z64),
        "gelu_tanh": torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (z64 + 0.044715 * z64**3)),
    }[activation]
    return torch.where(z64 == -torch.inf, -0.0, z64 * rate)


def by_density(z, activation):
    return ops.act_density(z, activation)[0]


def by_gated_linear(z, activation):
    one = torch.ones(len(z), 1)
    return ops.gated_linear(z[:, None], one, torch.ones(1, 1), activation=activation)[:, 0]


def by_sparse_mlp(z, activation):
    return ops.sparse_mlp(z[:, None], torch.ones(1, 1), torch.ones(1, 1), activation=activation, path="sparse")[:, 0]


def by_convolution(z, _):
    return ops.causal_conv1d(z[None, :, None], torch.ones(len(z), 1), activation="silu")[0, :, 0]


def by_convolution_step(z, _):
    return ops.causal_conv1d_update(z[None], torch.zeros(1, len(z), 1), torch.ones(len(z), 1), activation="silu")[0]


def by_scan(z, _):
    one, rate = torch.ones(1, len(z), 1), torch.zeros(len(z), 1)
    return ops.selective_scan(one, one, rate, one[:, :1], one[:, :1], z=z[None, :, None])[0, :, 0]


def by_scan_step(z, _):
    one, state = torch.ones(1, len(z)), torch.zeros(1, len(z), 1)
    return ops.selective_state_update(state, one, one, state[0], one[:, :1], one[:, :1], z=z[None])[0]


ANY = (by_density, by_gated_linear, by_sparse_mlp)
SILU = (by_convolution, by_convolution_step, by_scan, by_scan_step)
CASES = [(op, f) for op in ANY for f in ("relu", "relu2", "gelu", "gelu_tanh", "silu")] + [(op, "silu") for op in SILU]


@pytest.mark.parametrize(("op", "activation"), CASES, ids=lambda c: getattr(c, "__name__", c))
def test_activation(op, activation):
    z = numbers()
    ours, ref = op(z, activation).double(), exact(z, activation)
    ref = ref.float().double()  # overflows as float32 does
    assert torch.equal(ours.isnan(), ref.isnan())
    finite = ref.isfinite()
    assert torch.equal(ours[~finite].nan_to_num(7.0), ref[~finite].nan_to_num(7.0))
    if activation.startswith("gelu"):  # the tail of the distribution function
        absolute = 2e-6
    else:  # a sparse product skips |a| <= 3.2e-4; subnormals are exact to a few of their steps
        absolute = 1e-42 if op is not by_sparse_mlp or activation != "silu" else 3.2e-4
    worst = (ours - ref).abs()[finite] - 5e-7 * ref[finite].abs()
    assert worst.max() <= absolute, z[finite][worst.argmax()]


def test_decay_overflows_to_infinity():
    """e^x of a growing state is infinite where float32's is, and finite up to there."""
    x = torch.tensor([88.5, 88.72, 89.0, 400.0, MOST, -MOST])
    one = torch.ones(1, len(x))
    state = torch.ones(1, len(x), 1)
    ops.selective_state_update(state, 0 * one, one, x[:, None], one[:, :1], one[:, :1])
    ref = x.double().exp().float()
    torch.testing.assert_close(state[0, :, 0], ref, rtol=1e-6, atol=0)
    u = torch.zeros(1, len(x), 1)
    _, last = ops.selective_scan(
        u, u + 1, x[:, None], u[:, :1], u[:, :1], return_last_state=True, initial_state=torch.ones(1, len(x), 1)
    )
    torch.testing.assert_close(last[0, :, 0], ref, rtol=2e-5, atol=0)


def test_gated_slope_is_zero_where_the_product_before_it_overflows():
    gate = torch.full((1, 4), -1e4, requires_grad=True)
    up, weight = torch.full((1, 4), 1e30), torch.eye(4)
    for activation in ("relu", "silu", "gelu", "gelu_tanh"):
        (grad,) = torch.autograd.grad(
            ops.gated_linear(gate, up, weight, activation=activation), gate, torch.full((1, 4), 1e30)
        )
        assert (grad == 0).all(), activation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parity", [None, "bnb-cpu"])
def test_nested_scales_of_the_largest_and_smallest_weights(dtype, parity):
    """Finite weights give finite scales and finite weights again, each scale within half a step of its own."""
    most = torch.finfo(dtype).max
    uneven = torch.rand(300, 64) * 2 - 1
    uneven[::7] = 0
    mixed = torch.where(torch.arange(300)[:, None] % 50 == 0, 0.0, torch.full((300, 64), 0.985))
    for base in (torch.ones(300, 64), uneven, mixed):
        for size in (most, most / 3, 1e-38, 1e-42):
            w = (base.double() * size).to(dtype)
            q = ops.quantize_4bit(w, double_quant=True, parity=parity)
            plain = ops.quantize_4bit(w, double_quant=False)
            assert q.scales().isfinite().all()
            assert q.dequantize().isfinite().all()
            span = (plain.absmax.double() - plain.absmax.double().mean()).abs().max()
            error = (q.scales().double() - plain.absmax.double()).abs().max()
            assert error <= 0.015 * span + 1e-6 * plain.absmax.double().max() + 3e-45, (size, error / span)
