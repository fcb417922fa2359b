"""causal_conv1d and its one-step form."""

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close_to_ref, assert_same_on_threads
from hypothesis import given, settings
from hypothesis import strategies as st

from deftcore import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def reference(x, weight, bias, first, seq_idx, silu):
    """PyTorch's grouped convolution; sequences one by one where they are packed."""
    reach = weight.shape[1] - 1
    first = x.new_zeros(*x.shape[:2], reach) if first is None else first
    rows = []
    for row in range(x.shape[0]):
        before, outs, start = first[row : row + 1], [], 0
        numbers = [0] * x.shape[2] if seq_idx is None else seq_idx[row].tolist()
        for t in range(1, x.shape[2] + 1):
            if t == x.shape[2] or numbers[t] != numbers[t - 1]:
                padded = torch.cat((before, x[row : row + 1, :, start:t]), -1)
                outs.append(F.conv1d(padded, weight.unsqueeze(1), bias, groups=x.shape[1]))
                before, start = torch.zeros_like(before), t
        rows.append(torch.cat(outs, -1) if outs else x[row : row + 1])
    out = torch.cat(rows) if rows else x
    return F.silu(out) if silu else out


def inputs(batch=2, channels=20, length=37, width=4, dtype=torch.float32, layout="last", packed=False):
    x = torch.randn(batch, length, channels).transpose(1, 2)
    x = (x if layout == "last" else x.contiguous()).to(dtype)
    seq_idx = torch.randint(2, (batch, length)).cumsum(1) if packed else None
    return [
        x, torch.randn(channels, width), torch.randn(channels), torch.randn(batch, channels, width - 1).to(dtype)
    ], seq_idx  # fmt: skip


def compare(tensors, seq_idx, silu=True):
    activation = "silu" if silu else None
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    x, weight, bias, first = leaves
    out = ops.causal_conv1d(x, weight, bias, first, activation=activation, seq_idx=seq_idx)
    assert out.dtype == x.dtype
    weights = torch.randn(out.shape).to(out.dtype)
    results = []
    for dtype in (torch.float64, torch.float32):
        other = [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]
        ref = reference(*other, seq_idx, silu)
        present = [t for t in other if t is not None]
        grads = torch.autograd.grad(ref, present, weights.to(dtype), allow_unused=True)
        results.append(
            [ref.detach(), *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, present, strict=True))]
        )
    mine = [out, *torch.autograd.grad(out, [t for t in leaves if t is not None], weights)]
    for ours, wanted, plain in zip(mine, *results, strict=True):
        slack = torch.full_like(wanted, 8 * wanted.abs().max().item() if wanted.numel() else 0.0)
        assert_close_to_ref(ours, plain.to(ours.dtype), wanted, slack)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["last", "first"])
@pytest.mark.parametrize(
    "sizes",
    [
        {}, {"length": 0}, {"length": 1}, {"length": 2}, {"length": 32}, {"length": 65, "channels": 33}, {"width": 1},
        {"width": 2}, {"width": 7, "length": 5}, {"packed": True}, {"packed": True, "length": 90, "width": 3},
        {"channels": 1}, {"width": 16, "length": 130, "batch": 1},
    ],
)  # fmt: skip
def test_matches_float64(dtype, layout, sizes):
    tensors, seq_idx = inputs(dtype=dtype, layout=layout, **sizes)
    compare(tensors, seq_idx)


@pytest.mark.parametrize("missing", [[2], [3], [2, 3]])
@pytest.mark.parametrize("silu", [True, False])
def test_optional_arguments(missing, silu):
    tensors, _ = inputs()
    for i in missing:
        tensors[i] = None
    compare(tensors, None, silu)


@pytest.mark.parametrize("lengths", [(20, 17), (1, 36), (2, 35), (37, 0)])
def test_pieces_continue(lengths):
    (x, weight, bias, first), _ = inputs()
    whole, end = ops.causal_conv1d(x, weight, bias, first, True, "silu")
    outs, state, start = [], first, 0
    for length in lengths:
        out, state = ops.causal_conv1d(x[..., start : start + length], weight, bias, state, True, "silu")
        outs.append(out)
        start += length
    torch.testing.assert_close(torch.cat(outs, -1), whole, rtol=0, atol=0)
    assert torch.equal(state, end)


def test_pieces_continue_inside_a_sequence():
    """Steps of the sequence before are not carried on."""
    (x, weight, bias, first), _ = inputs()
    numbers = torch.tensor([0] * 9 + [1] * 2 + [2] * 26).expand(2, -1)
    whole = ops.causal_conv1d(x, weight, bias, first, seq_idx=numbers)
    for cut in (1, 2, 5, 10, 12, 13, 20):
        head, tail = slice(cut), slice(cut, None)
        out, state = ops.causal_conv1d(x[..., head], weight, bias, first, True, seq_idx=numbers[:, head])
        rest = ops.causal_conv1d(x[..., tail], weight, bias, state, seq_idx=numbers[:, tail])
        torch.testing.assert_close(torch.cat((out, rest), -1), whole, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [3, 4, 9])
@pytest.mark.parametrize("steps", [0, 1, 2, 6])
def test_update_is_the_next_step(dtype, window, steps):
    (x, weight, bias, _), _ = inputs(length=12, dtype=dtype)
    state = torch.zeros(2, 20, window, dtype=dtype)
    whole = ops.causal_conv1d(x, weight, bias, activation="silu")
    shape = slice(0, 12) if steps else None
    if steps == 0:
        outs = [ops.causal_conv1d_update(x[..., t], state, weight, bias, "silu").unsqueeze(-1) for t in range(12)]
    else:
        assert shape is not None
        outs = [
            ops.causal_conv1d_update(x[..., t : t + steps], state, weight, bias, "silu") for t in range(0, 12, steps)
        ]
    torch.testing.assert_close(torch.cat(outs, -1), whole)
    expected = F.pad(x, (max(window - 12, 0), 0))[..., -window:]
    assert torch.equal(state, expected)


def test_update_slots_and_gradients():
    (x, weight, bias, _), _ = inputs(batch=3, length=1)
    state = torch.randn(5, 20, 4)
    before = state.clone()
    out = ops.causal_conv1d_update(x, state, weight, bias, "silu", conv_state_indices=torch.tensor([4, -1, 0]))
    assert not out[1].any()
    assert torch.equal(state[1:4], before[1:4])
    alone = before[4:5].clone()
    torch.testing.assert_close(out[0:1], ops.causal_conv1d_update(x[0:1], alone, weight, bias, "silu"))
    assert torch.equal(state[4:5], alone)
    turned = torch.randn(5, 4, 20).transpose(1, 2)  # a view: still updated in place
    kept = turned.contiguous()
    ops.causal_conv1d_update(x, turned[:3], weight)
    ops.causal_conv1d_update(x, kept[:3], weight)
    assert torch.equal(turned, kept)
    leaf = weight.clone().requires_grad_()
    held = before[:3].clone()
    grown = ops.causal_conv1d_update(x, held, leaf, bias, "silu")
    grown.sum().backward()
    assert leaf.grad.abs().sum() > 0
    assert torch.equal(held[..., -1], x[..., 0])


def test_gradcheck_and_opcheck():
    tensors, seq_idx = inputs(channels=3, length=6, packed=True)
    leaves = [t.double().requires_grad_() for t in tensors]

    def conv(x, weight, bias, first):
        return ops.causal_conv1d(x, weight, bias, first, activation="silu", seq_idx=seq_idx)

    assert torch.autograd.gradcheck(conv, tuple(leaves))
    x, weight, bias, first = (t.detach().requires_grad_() for t in tensors)
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, bias, first), conv(x, weight, bias, first))
    sequence = seq_idx.to(torch.int32)
    torch.library.opcheck(
        torch.ops.deftcore.causal_conv1d.default, (x, weight.t().contiguous(), bias, first, sequence, True)
    )
    torch.library.opcheck(
        torch.ops.deftcore.causal_conv1d_update.default,
        (x.detach(), torch.randn(2, 3, 4), weight.detach().t().contiguous(), None, None, True),
    )


def test_threads_do_not_change_anything():
    tensors, _ = inputs(channels=200, length=300)

    def gradients():
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = ops.causal_conv1d(*leaves, activation="silu")
        return [out, *torch.autograd.grad(out.sum(), leaves)]

    assert_same_on_threads(gradients, (1, 2))


@pytest.mark.parametrize("empty", [{"batch": 0}, {"length": 0}, {"channels": 0}])
def test_empty(empty):
    tensors, _ = inputs(**empty)
    leaves = [t.detach().requires_grad_() for t in tensors]
    out, state = ops.causal_conv1d(*leaves, return_final_states=True, activation="silu")
    assert out.shape == tensors[0].shape
    assert state.shape == tensors[3].shape
    out.sum().backward()
    assert not leaves[1].grad.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: ops.causal_conv1d(x[0], w), r"x: must be \[B, C, L\]"),
        (lambda x, w: ops.causal_conv1d(x, w[:3]), "weight: shape must be"),
        (lambda x, w: ops.causal_conv1d(x, torch.zeros(20, 17)), r"W in 1\.\.16"),
        (lambda x, w: ops.causal_conv1d(x, w, torch.zeros(3)), "bias: shape must be"),
        (lambda x, w: ops.causal_conv1d(x, w, None, torch.zeros(2, 20, 2)), "initial_states: shape must be"),
        (lambda x, w: ops.causal_conv1d(x, w, activation="relu"), "activation: must be"),
        (lambda x, w: ops.causal_conv1d(x, w, seq_idx=torch.zeros(2, 37)), "seq_idx: must be an int32"),
        (lambda x, w: ops.causal_conv1d(x, w, seq_idx=torch.zeros(2, 3, dtype=torch.int32)), "seq_idx: shape"),
        (lambda x, w: ops.causal_conv1d_update(x, torch.zeros(2, 20, 2), w), "conv_state: must be"),
        (lambda x, w: ops.causal_conv1d_update(x, torch.zeros(2, 20, 4).half(), w), "conv_state: dtype"),
        (lambda x, w: ops.causal_conv1d_update(x, torch.zeros(3, 20, 4), w), "conv_state: must have 2 rows"),
        (
            lambda x, w: ops.causal_conv1d_update(x, torch.zeros(3, 20, 4), w, conv_state_indices=torch.tensor([0, 3])),
            "must be below 3",
        ),
        (
            lambda x, w: ops.causal_conv1d_update(x, torch.zeros(3, 20, 4), w, conv_state_indices=torch.tensor([1, 1])),
            "cannot share",
        ),
    ],
)
def test_bad_input(call, message):
    (x, weight, _, _), _ = inputs()
    with pytest.raises((ValueError, TypeError), match=message):
        call(x, weight)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 3), st.integers(1, 40), st.integers(0, 70), st.integers(1, 16), st.sampled_from(["last", "first"])
)
def test_fuzz(batch, channels, length, width, layout):
    (x, weight, bias, first), seq_idx = inputs(batch, channels, length, width, layout=layout, packed=length > 0)
    out = ops.causal_conv1d(x, weight, bias, first, activation="silu", seq_idx=seq_idx)
    ref = reference(*(t.double() for t in (x, weight, bias, first)), seq_idx, True)
    torch.testing.assert_close(out.double(), ref, rtol=1e-4, atol=1e-4)
