"""grouped_delta_linear."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deftcore import ops
from deftcore.ops import DeltaBank, LowRankDelta, SliceDelta

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def slice_delta(axis, shape, size, dtype=torch.float32):
    indices = torch.randperm(shape[axis])[:size]
    return SliceDelta(axis, indices, torch.randn(size, shape[1 - axis]).to(dtype))


def low_rank(shape, rank, dtype=torch.float32):
    return LowRankDelta(torch.randn(rank, shape[1]).to(dtype), torch.randn(shape[0], rank).to(dtype), 0.5)


def dense(delta, shape, size=lambda t: t):
    """The delta as a float64 matrix, `size` taken of each part's numbers."""
    total = torch.zeros(shape, dtype=torch.float64)
    for part in [] if delta is None else delta if isinstance(delta, list) else [delta]:
        if isinstance(part, LowRankDelta):
            total += part.scaling * size(part.lora_b.double()) @ size(part.lora_a.double())
        elif part.axis == 1:
            total[:, part.indices] += size(part.block.double()).t()
        else:
            total[part.indices] += size(part.block.double())
    return total


def merged_loop(x, base, deltas, index, bias=None):
    """Row by row with merged weights, in float64; and sum |x||w|."""
    rows, work = [], []
    for row, j in zip(x.double(), index.tolist(), strict=True):
        w = base.double() + (dense(deltas[j], base.shape) if j >= 0 else 0)
        sizes = base.double().abs() + (dense(deltas[j], base.shape, torch.abs) if j >= 0 else 0)
        rows.append(torch.nn.functional.linear(row, w, None if bias is None else bias.double()))
        work.append(row.abs() @ sizes.t() + (0 if bias is None else bias.double().abs()))
    return torch.stack(rows), torch.stack(work)


def assert_equal_to_loop(y, x, base, deltas, index, bias=None):
    ref, work = merged_loop(x, base, deltas, index, bias)
    roundings = {torch.float32: 1e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[y.dtype]
    assert y.shape == ref.shape
    assert bool(((y.double() - ref).abs() <= roundings * work + 1e-6).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(70, 130), (33, 1), (1, 40), (1100, 48)])
def test_equals_a_loop_of_merged_models(dtype, shape):
    base, bias = torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype)
    size = min(*shape, 5)
    deltas = [
        slice_delta(1, shape, size, dtype), slice_delta(0, shape, size, dtype), low_rank(shape, 3, dtype), None,
        [slice_delta(1, shape, 1, dtype), slice_delta(0, shape, 1, dtype), low_rank(shape, 9, dtype)],
    ]  # fmt: skip
    index = torch.tensor([4, 0, 1, 2, 3, -1, 0, 0, 0, 0, 4, 2])
    for tail in ((), (1,), (3,), (20,), (2, 2)):
        x = torch.randn(len(index), *tail, shape[1]).to(dtype)
        y = ops.grouped_delta_linear(x, base, deltas, index, bias=bias)
        assert_equal_to_loop(y, x, base, deltas, index, bias)


@pytest.mark.parametrize("count", [1, 16, 64])
def test_all_distinct_all_the_same_and_none(count):
    shape = (64, 96)
    base, x = torch.randn(shape), torch.randn(count, shape[1])
    deltas = [slice_delta(1, shape, 7) for _ in range(count)]
    bank = DeltaBank(deltas, shape)
    for index in (torch.arange(count), torch.zeros(count, dtype=torch.int32), torch.full((count,), -1)):
        assert_equal_to_loop(ops.grouped_delta_linear(x, base, bank, index), x, base, deltas, index)


def test_over_a_4bit_base():
    q = ops.quantize_4bit(torch.randn(64, 128))
    x, index = torch.randn(5, 128), torch.tensor([0, 1, -1, 1, 0])
    deltas = [slice_delta(1, q.shape, 4), slice_delta(0, q.shape, 4)]
    assert_equal_to_loop(ops.grouped_delta_linear(x, q, deltas, index), x, q.dequantize(), deltas, index)


def test_many_rows():
    """More than a grid of CUDA blocks has along its second dimension."""
    base, deltas = torch.randn(3, 2), [low_rank((3, 2), 1), slice_delta(0, (3, 2), 1)]
    x, index = torch.randn(65_540, 2), torch.arange(65_540) % 3 - 1
    y = ops.grouped_delta_linear(x, base, deltas, index)
    for part in (slice(0, 6), slice(65_530, None)):  # both ends, before and after the cut
        assert_equal_to_loop(y[part], x[part], base, deltas, index[part])


def test_empty_strided_and_repeatable():
    shape = (40, 24)
    base, deltas = torch.randn(shape), [slice_delta(1, shape, 3), low_rank(shape, 2)]
    assert ops.grouped_delta_linear(torch.zeros(0, 24), base, deltas, torch.zeros(0, dtype=torch.int64)).shape == (
        0,
        40,
    )
    nothing = [slice_delta(1, (0, 24), 3), low_rank((0, 24), 2)]
    index = torch.tensor([0, 1])
    assert ops.grouped_delta_linear(torch.ones(2, 24), base[:0], nothing, index).shape == (2, 0)
    wide = torch.randn(6, 2, 48)
    x, index = wide[:, :, ::2], torch.tensor([0, 1, 0, 1, 0, -1])
    first = ops.grouped_delta_linear(x, base, deltas, index)
    assert_equal_to_loop(first, x, base, deltas, index)
    assert all(torch.equal(first, ops.grouped_delta_linear(x, base, deltas, index)) for _ in range(5))


def test_float64_and_opcheck():
    shape = (12, 8)
    base, deltas = torch.randn(shape, dtype=torch.float64), [slice_delta(1, shape, 3, torch.float64)]
    x, index = torch.randn(4, 8, dtype=torch.float64), torch.tensor([0, -1, 0, 0])
    ref, _ = merged_loop(x, base, deltas, index)
    torch.testing.assert_close(ops.grouped_delta_linear(x, base, deltas, index), ref)
    bank = DeltaBank([slice_delta(1, shape, 3), low_rank(shape, 2)], shape)
    arguments = (torch.randn(4, 12), torch.randn(4, 8), index, bank.starts, bank.tensors, bank.most)
    torch.library.opcheck(torch.ops.deftcore.add_deltas.default, arguments)
    compiled = torch.compile(
        lambda x: ops.grouped_delta_linear(x, base.float(), bank, index), fullgraph=True, backend="aot_eager"
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(x.float()), ops.grouped_delta_linear(x.float(), base.float(), bank, index))


@pytest.mark.parametrize(
    ("delta", "message"),
    [
        (SliceDelta(2, torch.tensor([0]), torch.zeros(1, 4)), "axis: must be 0 or 1"),
        (SliceDelta(1, torch.tensor([9]), torch.zeros(1, 4)), r"indices: must be in 0\.\.5"),
        (SliceDelta(1, torch.tensor([1, 1]), torch.zeros(2, 4)), "a number twice"),
        (SliceDelta(1, torch.tensor([1]), torch.zeros(1, 5)), "block: shape must be"),
        (SliceDelta(1, torch.tensor([1.0]), torch.zeros(1, 4)), "indices: must be whole"),
        (LowRankDelta(torch.zeros(2, 5), torch.zeros(4, 2)), "lora_a: shape must be"),
        (LowRankDelta(torch.zeros(2, 6), torch.zeros(4, 3)), "lora_b: shape must be"),
        ([SliceDelta(0, torch.tensor([1]), torch.zeros(1, 6))] * 2, "two parts change"),
        ("nothing", "must be a SliceDelta"),
    ],
)
def test_bad_deltas(delta, message):
    with pytest.raises((ValueError, TypeError), match=message):
        DeltaBank([delta], (4, 6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(6)}, r"x: must be \[B"),
        ({"x": torch.zeros(2, 5)}, "x: last dimension must be 6"),
        ({"base": torch.zeros(5, 6)}, r"deltas: must be of a weight \(5, 6\)"),
        ({"index": torch.tensor([0, 1])}, r"adapter_index: must be in -1\.\.0"),
        ({"index": torch.tensor([0, -2])}, r"adapter_index: must be in -1\.\.0"),
        ({"index": torch.tensor([0])}, "adapter_index: shape"),
        ({"index": torch.tensor([0.0, 1.0])}, "adapter_index: must be an int64"),
        ({"x": torch.zeros(2, 6, dtype=torch.bfloat16)}, "deltas: must be"),
        ({"x": torch.zeros(2, 6, requires_grad=True)}, "x: this op is for inference"),
    ],
)
def test_bad_calls(change, message):
    bank = DeltaBank([SliceDelta(1, torch.tensor([1]), torch.zeros(1, 4))], (4, 6))
    call = {"x": torch.zeros(2, 6), "base": torch.zeros(4, 6), "index": torch.tensor([0, 0])} | change
    with pytest.raises((ValueError, TypeError), match=message):
        ops.grouped_delta_linear(call["x"], call["base"], bank, call["index"])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9), st.integers(1, 40), st.integers(1, 40), st.data())
def test_fuzz(tokens, outputs, inputs, data):
    """Random mixtures of kinds and sizes, empty ones among them."""
    shape = (outputs, inputs)
    kinds = data.draw(st.lists(st.sampled_from(["in", "out", "low", "none"]), min_size=1, max_size=5))
    deltas = [
        None if kind == "none" else low_rank(shape, 2) if kind == "low"
        else slice_delta(int(kind == "in"), shape, data.draw(st.integers(0, shape[int(kind == "in")])))
        for kind in kinds
    ]  # fmt: skip
    index = torch.tensor(
        data.draw(st.lists(st.integers(-1, len(deltas) - 1), min_size=tokens, max_size=tokens)), dtype=torch.int64
    )
    x, base = torch.randn(tokens, inputs), torch.randn(shape)
    y = ops.grouped_delta_linear(x, base, deltas, index)
    if tokens:
        assert_equal_to_loop(y, x, base, deltas, index)
