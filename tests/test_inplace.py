"""Changing an op's output, or the state that it moved on, in place: autograd is right or raises."""

import pytest
import torch

from deftcore import ops

B, L, D, N = 2, 6, 4, 3


def leaf(*shape):
    return torch.randn(*shape).requires_grad_()


def channel_last(*shape):
    """[B, D, L] over memory [B, L, D], the layout in which a model calls."""
    return leaf(shape[0], shape[2], shape[1]).transpose(1, 2)


def mamba_inner(u):
    layers = (torch.randn(2 + 2 * N, D), torch.randn(D, 2), torch.randn(5, D))
    projections = (ops.Projection(w) for w in layers)
    return ops.mamba_inner(u, torch.randn(D, 3), None, *projections, -torch.rand(D, N), torch.randn(D))


def mamba2_inner(u):
    return ops.mamba2_inner(
        u, torch.randn(D + 2 * N, 3), None, torch.randn(2), -torch.rand(2), torch.randn(2), torch.ones(D),
        ops.Projection(torch.randn(5, D)), head_dim=2,
    )  # fmt: skip


# fmt: off
CALLS = {
    "selective_scan": (
        lambda u: ops.selective_scan(
            u, u, -torch.rand(D, N), leaf(B, N, L), leaf(B, N, L), z=u, delta_softplus=True, return_last_state=True
        ),
        (B, D, L),
    ),
    "mamba_chunk_scan": (
        lambda u: ops.mamba_chunk_scan(
            u.transpose(1, 2).unflatten(2, (2, 2)), u.transpose(1, 2)[..., :2], -torch.rand(2), leaf(B, L, 1, N),
            leaf(B, L, 1, N), 4, dt_softplus=True, return_final_states=True,
        ),
        (B, D, L),
    ),
    "causal_conv1d": (
        lambda u: ops.causal_conv1d(u, leaf(D, 3), None, leaf(B, D, 2), return_final_states=True, activation="silu"),
        (B, D, L),
    ),
    "causal_conv1d, one step": (
        lambda u: ops.causal_conv1d_update(u[..., 0], torch.randn(B, D, 3), leaf(D, 3), None, "silu"), (B, D, L)
    ),
    "causal_conv1d, steps": (
        lambda u: ops.causal_conv1d_update(u, torch.randn(B, D, 3), leaf(D, 3), None, "silu"), (B, D, L)
    ),
    "selective_state_update": (
        lambda u: ops.selective_state_update(
            torch.randn(B, D, N), u[..., 0], u[..., 1], leaf(D, N), leaf(B, N), leaf(B, N), dt_softplus=True
        ),
        (B, D, L),
    ),
    "mamba_inner": (mamba_inner, (B, L, 2 * D)),
    "mamba2_inner": (mamba2_inner, (B, L, 2 * D + 2 * N + 2)),
    "act_density": (lambda u: ops.act_density(u, "silu")[:2], (B, D, L)),
    "lora_linear": (lambda u: ops.lora_linear(u, torch.randn(5, L), leaf(2, L), leaf(5, 2)), (B, D, L)),
    "lora_linear, sigma and a pair taken away": (
        lambda u: ops.lora_linear(
            u, torch.randn(5, L), leaf(2, L), leaf(5, 2), sigma=leaf(2), minus=(torch.randn(3, L), leaf(5, 3))
        ),
        (B, D, L),
    ),
    "lora_linear, 4 bits": (
        lambda u: ops.lora_linear(u, ops.quantize_4bit(torch.randn(5, 32)), leaf(2, 32), leaf(5, 2)), (B, D, 32)
    ),
    "linear_4bit": (lambda u: ops.linear_4bit(u, ops.quantize_4bit(torch.randn(5, 32))), (B, D, 32)),
    "partial_linear": (lambda u: ops.partial_linear(u, torch.randn(5, L), leaf(5, 2), dim=1), (B, D, L)),
    "sparse_down": (lambda u: ops.sparse_down(u, leaf(L, 5)), (B, D, L)),
    "sparse_mlp": (lambda u: ops.sparse_mlp(u, leaf(7, L), leaf(7, L)), (B, D, L)),
    "sparse_gated_mlp": (lambda u: ops.sparse_gated_mlp(u, leaf(7, L), leaf(7, L), leaf(7, L)), (B, D, L)),
}
# fmt: on


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("layout", [leaf, channel_last])
def test_outputs_change_in_place(name, layout):
    """Every output, one after the other; value and gradient as of the same operation out of place."""
    call, shape = CALLS[name]
    u = layout(*shape)

    def run(in_place):
        torch.manual_seed(1)
        outputs = call(u)
        results = []
        for out in outputs if isinstance(outputs, tuple) else (outputs,):
            changed = out.mul_(u.sum()).add_(1) if in_place else out * u.sum() + 1
            results.append(changed.square().sum())
        return sum(results), torch.autograd.grad(sum(results), u)[0]

    for ours, wanted in zip(run(True), run(False), strict=True):
        # PyTorch's own sums over an output and over its copy may round differently, and what is left of them is small.
        torch.testing.assert_close(ours, wanted, rtol=0, atol=2.4e-7 * wanted.abs().max().item() + 1e-6)


def test_outputs_made_without_gradients_change_in_place():
    u = channel_last(B, D, L)
    with torch.no_grad():
        out = ops.causal_conv1d(u, leaf(D, 3))
    out += u
    assert torch.equal(torch.autograd.grad(out.sum(), u)[0], torch.ones(B, D, L))


def test_outputs_change_in_place_when_compiled():
    u, weight = channel_last(B, D, L), leaf(D, 3)

    def conv(u, weight):
        out, last = ops.causal_conv1d(u, weight, return_final_states=True, activation="silu")
        out += torch.sigmoid(last).sum(-1, keepdim=True)
        return out.square()

    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    mine, plain = (torch.autograd.grad(f(u, weight).sum(), (u, weight)) for f in (compiled, conv))
    torch.testing.assert_close(mine, plain)


def test_a_kept_output_that_changed_is_an_error():
    """ReLU keeps its output for the backward."""
    u = leaf(B, D)
    out, total, _ = ops.act_density(u, "relu")
    out += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (out.sum() + total).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moved_states_are_seen_by_autograd(dtype):
    """Native code and reference: a product that kept the state from before must not use it as it is afterwards."""
    x, weight = torch.randn(B, D, dtype=dtype), torch.randn(D, 3, dtype=dtype)
    coefficients = torch.randn(B, N, dtype=dtype)
    for state, move in (
        (torch.randn(B, D, 3, dtype=dtype), lambda s: ops.causal_conv1d_update(x, s, weight)),
        (torch.randn(B, D, N, dtype=dtype), lambda s: ops.selective_state_update(s, x, x, weight, *[coefficients] * 2)),
    ):
        for grad in (True, False):
            factor = leaf(1).to(dtype)
            kept = (factor * state).sum()
            with torch.set_grad_enabled(grad):
                move(state)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                kept.backward()


@pytest.mark.parametrize("needed", range(6))
def test_step_gradients(needed):
    """Gradients of one decoding step to each argument alone, the state moving on underneath."""
    torch.manual_seed(0)
    tensors = [torch.randn(*s, dtype=torch.float64) for s in ((3, D), (3, D), (D, N), (3, N), (3, N), (D,))]
    tensors[needed].requires_grad_()
    state, slots = torch.randn(5, D, N, dtype=torch.float64), torch.tensor([4, -1, 0])

    def step(given):
        arguments = [*tensors[:needed], given, *tensors[needed + 1 :]]
        return ops.selective_state_update(state.clone(), *arguments, dt_softplus=True, state_batch_indices=slots)

    assert torch.autograd.gradcheck(step, (tensors[needed],))
    moved, plain = state.clone(), state.clone()
    out = ops.selective_state_update(moved, *tensors, dt_softplus=True, state_batch_indices=slots)
    with torch.no_grad():
        wanted = ops.selective_state_update(plain, *tensors, dt_softplus=True, state_batch_indices=slots)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(moved, plain)
    assert torch.equal(moved[1:4], state[1:4])
