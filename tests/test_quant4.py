"""4-bit weights: format, quantise, dequantise, linear_4bit and lora_linear over them."""

import copy
import json
import pickle
import threading

import pytest
import torch
from conftest import on_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from deftcore import ops
from deftcore.ops.packed import dequantize_ref
from deftcore.ops.quant4 import nest_scales, quantize_ref
from deftcore.ops.quantized import BLOCK_SIZES, QUANT_TYPES, QuantizedTensor, code_book, dynamic_book

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1,), (63,), (64,), (65,), (127,), (130,), (3, 33), (5, 7), (4, 96), (8, 32), (64, 512), (70, 128)]
# Relative Frobenius error against float64 on the same weights (spec section 11); small outputs are a few roundings.
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 5e-4}


def wave(n):
    """n values that need no random generator."""
    i = torch.arange(n, dtype=torch.float64)
    return (torch.sin(i * 1.7) * torch.exp(torch.cos(i * 0.3))).float()


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-30))


# ---------------------------------------------------------------------------- format

# What bitsandbytes 0.50.2 makes of wave(n) on a CPU: by n and block size the scales, and by type the codes.
STORED_SCALES = {
    (130, 64): [2.6030991077423096, 2.6846656799316406, 1.5848076343536377],
    (97, 32): [2.5778775215148926, 2.6030991077423096, 2.6846656799316406, 0.06825296580791473],
}
STORED = {
    ("nf4", 130, 64): "7f51ab5598679758b42ed04e728a6588669847d41de12d937a7589669936e70bf32ba4697679659b33ea07e529a5"
                      "698679749d31ed04d7389668866a837e40de01",
    ("nf4", 97, 32): "7f51ab5598579758b42ed04f728a6588669847d41de12d937a7589669936e70bf32ba4697679659b33ea07e529a5"
                     "698607",
    ("fp4", 130, 64): "03fa74fe61e969f64cd25bc31d67ee66e961c15fa52ad26c979e16ee66ce29b43dd47f961e169e64dc27b92ed67e"
                      "e61e969c65da25bf21c169e66e971d12fb52ba",
    ("fp4", 97, 32): "03fa74fe61e969f64cd25bc31d67ee66e961c15fa52ad26c979e16ee66ce29b43dd47f961e169e64dc27b92ed67e"
                     "e61eb0",
}  # fmt: skip


@pytest.mark.parametrize("case", STORED, ids=str)
def test_stored_vectors(case):
    quant_type, n, block = case
    q = ops.quantize_4bit(wave(n), quant_type=quant_type, block_size=block, double_quant=False)
    assert bytes(q.packed.tolist()).hex() == STORED[case]
    assert q.absmax.tolist() == STORED_SCALES[n, block]


def test_stored_nested_scales():
    q = ops.quantize_4bit(wave(64 * 300), parity="bnb-cpu")
    assert bytes(q.absmax[:40].tolist()).hex() == (
        "33cac4c7c72b31ccc1cac42e2fceb8ccc130d0a506ceba33d1590dd0a835d34314d15b36d33cd246"
    )
    assert q.nested_absmax.tolist() == [0.15407729148864746, 0.09879851341247559]
    assert q.nested_offset == 2.6446101665496826


HARD = {
    "normal": lambda n: torch.randn(n),
    "constant": lambda n: torch.full((n,), 0.37),
    "zero": lambda n: torch.zeros(n),
    "huge": lambda n: torch.randn(n) * 1e30,
    "denormal": lambda n: torch.randn(n) * 1e-40,
    "spike": lambda n: torch.zeros(n).index_fill(0, torch.tensor([n // 2]), -3.0),
}


@pytest.mark.parametrize("block", BLOCK_SIZES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_bytes_equal_bitsandbytes(block, quant_type):
    bnb = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes; stored vectors are tested anyway")
    for kind, make in HARD.items():
        for n in (1, 63, 65, 99, 130, 384, 2 * block, 3 * block + 17):
            for dtype in DTYPES if kind != "huge" else DTYPES[:2]:
                w = make(n).to(dtype)
                packed, state = bnb.quantize_4bit(w.view(1, -1), blocksize=block, quant_type=quant_type)
                q = ops.quantize_4bit(w, quant_type=quant_type, block_size=block, double_quant=False)
                where = (kind, n, dtype)
                assert torch.equal(q.absmax, state.absmax), where
                assert torch.equal(q.packed, packed.flatten()), where
                found, expected = q.dequantize(), bnb.dequantize_4bit(packed, state).flatten()
                if kind == "denormal":  # its vector path flushes subnormal bfloat16 results, its scalar path does not
                    found, expected = (torch.where(t.abs() < 1.2e-38, 0, t) for t in (found, expected))
                assert torch.equal(found, expected), where


def test_nested_scales_equal_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes; stored vectors are tested anyway")
    for w in (torch.randn(300, 320), torch.randn(64, 64).bfloat16(), torch.full((64, 128), 0.25)):
        _, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
        q = ops.quantize_4bit(w, parity="bnb-cpu")
        assert torch.equal(q.absmax, state.absmax)
        assert torch.equal(q.nested_absmax, state.state2.absmax)
        assert q.nested_offset == float(state.offset)
        nearest = ops.quantize_4bit(w)
        exact = ops.quantize_4bit(w, double_quant=False).absmax
        assert (nearest.scales() - exact).abs().max() <= (q.scales() - exact).abs().max()


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_thresholds(quant_type):
    """On a midpoint of two codes the lower one; one ulp above it the upper."""
    ascending = code_book(quant_type).sort().values.unique()
    middles = (ascending[:-1] + ascending[1:]) * 0.5
    above = torch.nextafter(middles, torch.tensor(2.0))
    for values, expected in ((middles, ascending[:-1]), (above, ascending[1:])):
        w = torch.cat((torch.ones(1), values, torch.zeros(64 - 1 - len(values))))
        q = ops.quantize_4bit(w, quant_type=quant_type, double_quant=False)
        assert torch.equal(q.dequantize()[1 : 1 + len(values)], expected)


def test_dynamic_book():
    book = dynamic_book()
    assert len(book.unique()) == 256
    assert book[127] == 0
    assert book[255] == 1
    assert book[0] == -0.992968738079071
    assert book[128] == 5.500000384017767e-07


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("block", [32, 64, 4096])
def test_native_equals_reference(dtype, quant_type, block):
    for shape in SHAPES:
        w = torch.randn(shape).to(dtype)
        q = ops.quantize_4bit(w, quant_type=quant_type, block_size=block, double_quant=False)
        packed, absmax = quantize_ref(w, block, QUANT_TYPES[quant_type])
        assert torch.equal(q.packed, packed)
        assert torch.equal(q.absmax, absmax)
        for out in DTYPES:
            for each in (q, nest_scales(q)):
                expected = dequantize_ref(each.parts(), out).reshape(w.shape)
                assert torch.equal(each.dequantize(out), expected), (shape, out)
        assert q.dequantize().shape == w.shape
        assert q.dequantize().dtype == dtype


def test_properties():
    w = torch.randn(40, 192)
    q = ops.quantize_4bit(w, double_quant=False)
    again = ops.quantize_4bit(q.dequantize(), double_quant=False)
    assert torch.equal(again.packed, q.packed), "quantising what was dequantised changes nothing"
    assert torch.equal(again.absmax, q.absmax)
    scaled = ops.quantize_4bit(w * 8, double_quant=False)
    assert torch.equal(scaled.packed, q.packed), "a power of two goes into the scales"
    assert torch.equal(scaled.absmax, q.absmax * 8)
    for quant_type, half_gap in (("nf4", 0.1520), ("fp4", 0.1667)):
        q = ops.quantize_4bit(w, quant_type=quant_type, double_quant=False)
        bound = q.absmax.repeat_interleave(64).view_as(w) * half_gap
        assert bool(((q.dequantize() - w).abs() <= bound).all())
    noise = torch.randn(512, 4096)
    for block, expected in ((32, 0.0875), (64, 0.0920), (256, 0.0990)):
        assert abs(relative(ops.quantize_4bit(noise, block_size=block).dequantize(), noise.double()) - expected) < 5e-4


def test_constant_scales_are_lossless():
    w = torch.ones(300, 64)
    q = ops.quantize_4bit(w)
    assert torch.equal(q.dequantize(), w)
    assert torch.equal(ops.quantize_4bit(w, parity="bnb-cpu").dequantize(), w)


def test_sizes():
    """4.127 bits a weight when nested (spec section 4)."""
    q = ops.quantize_4bit(torch.randn(1024, 1024))
    assert abs(8 * q.nbytes / q.numel() - 4.127) < 1e-3
    assert "double_quant" in repr(q)


# ---------------------------------------------------------------------------- files


def test_state_dict_round_trip():
    for double_quant in (True, False):
        for storage in (torch.uint8, torch.bfloat16, torch.float32):
            q = ops.quantize_4bit(torch.randn(24, 64).bfloat16(), double_quant=double_quant)
            q.storage = storage
            state = q.state_dict("layer.weight")
            assert state["layer.weight"].dtype == storage
            assert state["layer.weight"].shape == (24 * 32 // storage.itemsize, 1)
            back = QuantizedTensor.from_state_dict(state, "layer.weight")
            again = back.state_dict("layer.weight")
            assert list(again) == list(state)
            for key, value in state.items():
                assert torch.equal(again[key].view(torch.uint8), value.view(torch.uint8)), key
            assert torch.equal(back.dequantize(), q.dequantize())


def test_quant_state_text():
    q = ops.quantize_4bit(torch.randn(128, 128).bfloat16(), parity="bnb-cpu")
    text = bytes(q.state_dict()["weight.quant_state.bitsandbytes__nf4"].tolist()).decode()
    assert text == (
        '{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [128, 128], "nested_blocksize": 256, '
        f'"nested_dtype": "float32", "nested_offset": {q.nested_offset!r}}}'
    )


def test_state_equals_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes; stored vectors are tested anyway")
    w = torch.randn(96, 128).bfloat16()
    layer = bnb.nn.Linear4bit(128, 96, bias=False, quant_type="nf4", compress_statistics=True)
    layer.weight = bnb.nn.Params4bit(w.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True)
    layer = layer.to("cpu")
    theirs = dict(layer.state_dict())
    ours = ops.quantize_4bit(w, parity="bnb-cpu").state_dict()
    assert theirs.keys() == ours.keys()
    for key, value in theirs.items():
        assert torch.equal(value, ours[key]), key
    read = QuantizedTensor.from_state_dict(theirs)
    x = torch.randn(3, 128)
    assert relative(ops.linear_4bit(x, read), x.double() @ read.dequantize(torch.float64).t()) < 1e-6
    for key, value in read.state_dict().items():
        assert torch.equal(value, theirs[key]), "a product must not change the bytes"


def test_damaged_state():
    good = ops.quantize_4bit(torch.randn(8, 64)).state_dict()
    meta_key = "weight.quant_state.bitsandbytes__nf4"

    def text(**changes):
        meta = json.loads(bytes(good[meta_key].tolist())) | changes
        return torch.tensor(list(json.dumps(meta).encode()), dtype=torch.uint8)

    cases = {
        "missing": ({**good, "weight.absmax": None}, "weight.absmax: missing"),
        "truncated": ({**good, "weight": good["weight"][:-1]}, "packed"),
        "absmax": ({**good, "weight.absmax": good["weight.absmax"][:-1]}, "absmax"),
        "json": ({**good, meta_key: torch.tensor([1, 2, 3], dtype=torch.uint8)}, "not JSON"),
        "list": ({**good, meta_key: torch.tensor(list(b"[]"), dtype=torch.uint8)}, "must be a JSON object"),
        "block": ({**good, meta_key: text(blocksize=48)}, "block_size"),
        "type": ({**good, meta_key: text(quant_type="int4")}, "quant_type"),
        "shape": ({**good, meta_key: text(shape=[8, 65])}, "packed"),
        "negative": ({**good, meta_key: text(shape=[-8, 64])}, "shape"),
        "dtype": ({**good, meta_key: text(dtype="int8")}, "dtype"),
        "nested": ({**good, meta_key: text(nested_blocksize=128)}, "nested_blocksize"),
        "offset": ({**good, meta_key: text(nested_offset=None)}, "nested_offset"),
        "map": ({**good, "weight.quant_map": torch.linspace(-1, 1, 16)}, "quant_map"),
        "nan": ({**good, "weight.nested_absmax": good["weight.nested_absmax"] * torch.nan}, "finite"),
    }
    for name, (state, message) in cases.items():
        state = {key: value for key, value in state.items() if value is not None}
        with pytest.raises(ValueError, match=message):
            QuantizedTensor.from_state_dict(state)
        assert name
    custom = {**good, "weight.quant_map": torch.linspace(-1, 1, 16)}
    assert QuantizedTensor.from_state_dict(custom, allow_custom_map=True).dequantize().isfinite().all()


def test_copies():
    q = ops.quantize_4bit(torch.randn(8, 64))
    for other in (copy.deepcopy(q), pickle.loads(pickle.dumps(q)), q.to("cpu")):
        assert torch.equal(other.dequantize(), q.dequantize())
        assert other.nested_offset == q.nested_offset
    assert q.to("meta").device.type == "meta"


# ---------------------------------------------------------------------------- linear_4bit

LINEARS = [  # M, K, block: regular, blocks across rows, odd rows, fewer columns than a block, the long row
    (24, 128, 64), (40, 320, 32), (9, 192, 64), (4, 96, 64), (8, 32, 64), (64, 512, 1024), (13, 72, 64), (5, 7, 64),
    (1, 1, 32), (3, 100, 128), (16, 4096, 256), (100, 1056, 32), (300, 1024, 64),
]  # fmt: skip
TOKENS = [1, 2, 3, 4, 5, 7, 8, 16, 17, 64, 130]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", LINEARS, ids=str)
def test_linear(dtype, case):
    """Forward and backward against float64 on the same weights, over token counts and both scale forms."""
    m, k, block = case
    w = torch.randn(m, k).to(dtype)
    for quant_type, double_quant in (("nf4", True), ("fp4", False)):
        q = ops.quantize_4bit(w, quant_type=quant_type, block_size=block, double_quant=double_quant)
        exact = q.dequantize(torch.float64)
        bias = torch.randn(m).to(dtype)
        for tokens in TOKENS:
            x = torch.randn(tokens, k).to(dtype).requires_grad_()
            y = ops.linear_4bit(x, q, bias)
            # Against sums of magnitudes, so that cancellation in tiny products cannot fail a right answer.
            ref = x.double() @ exact.t() + bias.double()
            work = x.double().abs() @ exact.abs().t() + bias.double().abs()
            eps = {torch.float32: 2e-7 * max(k, 64) ** 0.5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
            assert bool(((y.double() - ref).abs() <= eps * work).all()), (tokens, quant_type)
            g = torch.randn(tokens, m).to(dtype)
            (grad,) = torch.autograd.grad(y, x, g)
            ref, work = g.double() @ exact, g.double().abs() @ exact.abs()
            eps = {torch.float32: 2e-7 * max(m, 64) ** 0.5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
            assert bool(((grad.double() - ref).abs() <= eps * work).all()), (tokens, quant_type)


@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy(dtype):
    """Spec section 11, K = 4096."""
    w = torch.randn(256, 4096)
    q = ops.quantize_4bit(w)
    exact = q.dequantize(torch.float64)
    for tokens in (1, 2, 8, 16, 128):
        x = torch.randn(tokens, 4096).to(dtype)
        assert relative(ops.linear_4bit(x, q), x.double() @ exact.t()) < LIMITS[dtype]
        g = torch.randn(tokens, 256).to(dtype).requires_grad_()
        grad = torch.ops.deftcore.linear_4bit_backward(g, *q.parts(), None, None)
        assert relative(grad.detach(), g.detach().double() @ exact) < 2 * LIMITS[dtype]


def test_unit_vectors_read_columns():
    """e_k gives column k exactly in float32, e_m through the backward row m."""
    for k in (96, 128, 160):
        q = ops.quantize_4bit(torch.randn(20, k), block_size=32)
        w = q.dequantize()
        assert torch.equal(ops.linear_4bit(torch.eye(k), q).t(), w)
        assert torch.equal(torch.cat([ops.linear_4bit(row[None], q) for row in torch.eye(k)]).t(), w)
        x = torch.zeros(20, k, requires_grad=True)
        (grad,) = torch.autograd.grad(ops.linear_4bit(x, q), x, torch.eye(20))
        assert torch.equal(grad, w)


def test_linear_forms():
    q = ops.quantize_4bit(torch.randn(24, 64))
    x = torch.randn(2, 3, 64)
    y = ops.linear_4bit(x, q)
    assert y.shape == (2, 3, 24)
    assert torch.allclose(y, F.linear(x, q.dequantize()), atol=1e-4)
    assert torch.allclose(ops.linear_4bit(x[0, 0], q), y[0, 0], atol=1e-5)
    wide = torch.randn(3, 128)[:, ::2]
    assert torch.equal(ops.linear_4bit(wide, q), ops.linear_4bit(wide.contiguous(), q))
    empty = torch.randn(0, 64, requires_grad=True)
    y = ops.linear_4bit(empty, q)
    y.sum().backward()
    assert y.shape == (0, 24)
    assert empty.grad.shape == (0, 64)
    assert ops.linear_4bit(torch.randn(3, 64), ops.quantize_4bit(torch.randn(0, 64))).shape == (3, 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.linear_4bit(x, q).dtype == torch.bfloat16
    assert torch.equal(ops.linear_4bit(x, q), ops.linear_4bit(x, q)), "repeats are bit-equal"


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_at_odd_addresses(dtype):
    """Packed bytes, activations and a bias that are views into the middle of a buffer."""
    for case in ((24, 128), (10, 72)):
        q, expected = ops.quantize_4bit(torch.randn(case)), {}
        expected = q.dequantize(dtype), q.dequantize(torch.float64)
        q.packed = torch.cat((q.packed[:1], q.packed))[1:]
        assert q.packed.data_ptr() % 2 == 1
        assert torch.equal(q.dequantize(dtype), expected[0])
        x = torch.randn(3 * case[1] + 1).to(dtype)[1:].view(3, -1)
        bias = torch.randn(case[0] + 1).to(dtype)[1:]
        y = ops.linear_4bit(x, q, bias)
        assert relative(y, x.double() @ expected[1].t() + bias.double()) < 2 * LIMITS[dtype]
    w = torch.randn(70 * 128 + 1).to(dtype)[1:].view(70, 128)
    assert torch.equal(ops.quantize_4bit(w).packed, ops.quantize_4bit(w.clone()).packed)


def test_many_passes_over_tokens():
    """More tokens than one pass holds."""
    q = ops.quantize_4bit(torch.randn(16, 64))
    for dtype in DTYPES:
        x = torch.randn(1100, 64).to(dtype)
        exact = x.double() @ q.dequantize(torch.float64).t()
        assert relative(ops.linear_4bit(x, q), exact) < 2 * LIMITS[dtype]


def test_only_packed_bytes_are_saved():
    q = ops.quantize_4bit(torch.randn(64, 128))
    x = torch.randn(32, 128, requires_grad=True)
    a, b = torch.randn(4, 128, requires_grad=True), torch.randn(64, 4, requires_grad=True)
    own = {t.data_ptr() for t in (q.packed, q.absmax, q.code, q.nested_absmax, q.nested_code)}

    def saved_by(run):
        found = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
            run()
        return sum(
            t.nbytes for t in found if t.data_ptr() not in own and t.data_ptr() not in (a.data_ptr(), b.data_ptr())
        )

    assert saved_by(lambda: ops.linear_4bit(x, q)) == 0
    assert saved_by(lambda: ops.lora_linear(x, q, a, b)) == x.nbytes + 32 * 4 * 4
    assert saved_by(lambda: ops.lora_linear(x, q, a.detach(), b.detach())) == 32 * 4 * 4
    minus = torch.randn(2, 128), torch.randn(64, 2)
    own |= {t.data_ptr() for t in minus}
    assert saved_by(lambda: ops.lora_linear(x, q, a, b, minus=minus)) == x.nbytes + 32 * (4 + 2) * 4


def test_threads_first_calls():
    q = ops.quantize_4bit(torch.randn(64, 128))
    x, found = torch.randn(5, 128), []
    workers = [threading.Thread(target=lambda: found.append(ops.linear_4bit(x, q))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(y, found[0]) for y in found)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_thread_counts(threads):
    q = ops.quantize_4bit(torch.randn(200, 256))
    x, g = torch.randn(40, 256), torch.randn(40, 200)
    y = ops.linear_4bit(x, q)
    grad = torch.ops.deftcore.linear_4bit_backward(g, *q.parts(), None, None)
    with on_threads(threads):
        assert torch.allclose(ops.linear_4bit(x, q), y, atol=1e-5)
        assert torch.allclose(torch.ops.deftcore.linear_4bit_backward(g, *q.parts(), None, None), grad, atol=1e-5)


# ---------------------------------------------------------------------------- lora_linear


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "rank", "shape"), [(1, 4, (24, 64)), (3, 3, (24, 64)), (40, 16, (72, 320)),
                                                       (20, 600, (16, 64)), (9, 5, (10, 72))])  # fmt: skip
def test_lora(dtype, tokens, rank, shape):
    m, k = shape
    q = ops.quantize_4bit(torch.randn(m, k))
    x, a, b = torch.randn(tokens, k).to(dtype), torch.randn(rank, k).to(dtype) / k**0.5, torch.randn(m, rank).to(dtype)
    x, a, b = (t.requires_grad_() for t in (x, a, b))
    g = torch.randn(tokens, m).to(dtype)
    y = ops.lora_linear(x, q, a, b, scaling=0.5, bias=torch.ones(m, dtype=dtype))
    wide = [t.detach().double().requires_grad_() for t in (x, a, b)]
    ref = F.linear(wide[0], q.dequantize(torch.float64)) + 0.5 * wide[0] @ wide[1].t() @ wide[2].t() + 1
    limit = 4 * LIMITS[dtype]  # x A^T is rounded to x's dtype on the way
    assert relative(y.detach(), ref.detach()) < limit
    for found, expected in zip(
        torch.autograd.grad(y, (x, a, b), g), torch.autograd.grad(ref, wide, g.double()), strict=True
    ):
        assert found.dtype == dtype
        assert relative(found, expected) < limit


def test_lora_is_base_where_b_is_zero():
    q = ops.quantize_4bit(torch.randn(48, 128))
    for tokens in (1, 40):
        for dtype in DTYPES:
            x, a = torch.randn(tokens, 128).to(dtype), torch.randn(8, 128).to(dtype)
            assert torch.equal(ops.lora_linear(x, q, a, torch.zeros(48, 8, dtype=dtype)), ops.linear_4bit(x, q))


def test_lora_dropped_input():
    q = ops.quantize_4bit(torch.randn(24, 64))
    leaves = [torch.randn(5, 64), torch.randn(5, 64), torch.randn(4, 64), torch.randn(24, 4)]
    x, dropped, a, b = (t.requires_grad_() for t in leaves)
    y = ops.lora_linear(x, q, a, b, scaling=2.0, dropped_x=dropped)
    ref = F.linear(x, q.dequantize()) + 2 * dropped @ a.t() @ b.t()
    g = torch.randn_like(y)
    for found, expected in zip(
        torch.autograd.grad(y, (x, dropped, a, b), g), torch.autograd.grad(ref, (x, dropped, a, b), g), strict=True
    ):
        assert torch.allclose(found, expected, atol=1e-3)


def test_gradcheck():
    q = ops.quantize_4bit(torch.randn(6, 10))
    x, a, b, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 10), (2, 10), (6, 2), (6,)))
    assert torch.autograd.gradcheck(lambda x, bias: ops.linear_4bit(x, q, bias), (x, bias))
    assert torch.autograd.gradcheck(lambda x, a, b: ops.lora_linear(x, q, a, b, scaling=0.3), (x, a, b))


def test_opcheck_and_compile():
    q = ops.quantize_4bit(torch.randn(24, 64))
    x = torch.randn(5, 64, requires_grad=True)
    a, b = torch.randn(4, 64, requires_grad=True), torch.randn(24, 4, requires_grad=True)
    namespace = torch.ops.deftcore
    torch.library.opcheck(namespace.quantize_4bit.default, (torch.randn(70), 64, 0))
    torch.library.opcheck(namespace.dequantize_4bit.default, (*q.parts(), 1))
    torch.library.opcheck(namespace.linear_4bit.default, (x, *q.parts(), None))
    torch.library.opcheck(namespace.linear_4bit_backward.default, (torch.randn(5, 24), *q.parts(), None, None))
    a0, b0, sigma = torch.randn(3, 64), torch.randn(24, 3, requires_grad=True), torch.randn(4, requires_grad=True)
    for beside in ((None, None, None), (sigma, a0, b0), (sigma, a0, b0.detach())):
        torch.library.opcheck(namespace.lora_linear_4bit.default, (x, None, *q.parts(), a, b, *beside, None, 0.5))
    compiled = torch.compile(
        lambda x: ops.linear_4bit(x, q) + ops.lora_linear(x, q, a, b), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x), ops.linear_4bit(x, q) + ops.lora_linear(x, q, a, b))


def test_gradient_checkpointing():
    from torch.utils.checkpoint import checkpoint

    q = ops.quantize_4bit(torch.randn(24, 64))
    x = torch.randn(5, 64, requires_grad=True)
    (plain,) = torch.autograd.grad(ops.linear_4bit(x, q).square().sum(), x)
    (again,) = torch.autograd.grad(checkpoint(ops.linear_4bit, x, q, use_reentrant=False).square().sum(), x)
    assert torch.equal(plain, again)


# ---------------------------------------------------------------------------- bad input


def test_bad_input():
    q, x = ops.quantize_4bit(torch.randn(24, 64)), torch.randn(3, 64)
    cases = [
        (lambda: ops.quantize_4bit(torch.randn(4, dtype=torch.float64)), TypeError, "w: must be"),
        (lambda: ops.quantize_4bit([1.0]), TypeError, "w: must be"),
        (lambda: ops.quantize_4bit(torch.tensor([1.0, torch.nan])), ValueError, "w: .*not finite"),
        (lambda: ops.quantize_4bit(torch.tensor([1.0, -torch.inf])), ValueError, "w: .*not finite"),
        (lambda: ops.quantize_4bit(x, block_size=48), ValueError, "block_size"),
        (lambda: ops.quantize_4bit(x, block_size=8192), ValueError, "block_size"),
        (lambda: ops.quantize_4bit(x, quant_type="int4"), ValueError, "quant_type"),
        (lambda: ops.quantize_4bit(x, parity="cuda"), ValueError, "parity"),
        (lambda: ops.quantize_4bit(x, double_quant=1), TypeError, "double_quant"),
        (lambda: ops.linear_4bit(torch.randn(3, 65), q), ValueError, "x: last dimension must be 64"),
        (lambda: ops.linear_4bit(torch.tensor(1.0), q), ValueError, "x: last dimension must be 64"),
        (lambda: ops.linear_4bit(x, x), TypeError, "q: must be a QuantizedTensor"),
        (lambda: ops.linear_4bit(x, ops.quantize_4bit(torch.randn(64))), ValueError, "q: must be a matrix"),
        (lambda: ops.linear_4bit(x, q.to("meta")), ValueError, "q: must be on cpu"),
        (lambda: ops.linear_4bit(x, q, torch.randn(23)), ValueError, "bias: shape"),
        (lambda: ops.linear_4bit(x, q, torch.randn(24).half()), TypeError, "bias: dtype"),
        (lambda: ops.linear_4bit(x.int(), q), TypeError, "x: dtype"),
        (lambda: ops.lora_linear(x, q, torch.randn(4, 63), torch.randn(24, 4)), ValueError, "lora_a"),
        (lambda: ops.dequantize_4bit(x), TypeError, "q: must be"),
        (lambda: q.dequantize(torch.int8), TypeError, "dtype"),
        (lambda: QuantizedTensor(q.packed, q.absmax, q.shape, q.dtype), TypeError, "absmax: dtype"),
        (lambda: QuantizedTensor(q.packed[1:], q.scales(), q.shape, q.dtype), ValueError, "packed: must have 768"),
        (lambda: QuantizedTensor(q.packed, q.scales()[1:], q.shape, q.dtype), ValueError, "absmax: must have 24"),
    ]
    for run, kind, message in cases:
        with pytest.raises(kind, match=message):
            run()


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(0, 40), k=st.integers(0, 200), tokens=st.integers(0, 20), block=st.sampled_from([32, 64, 128]),
    dtype=st.sampled_from(DTYPES), rank=st.integers(0, 9),
)  # fmt: skip
def test_fuzz_shapes(m, k, tokens, block, dtype, rank):
    q = ops.quantize_4bit(torch.randn(m, k).to(dtype), block_size=block)
    x = torch.randn(tokens, k).to(dtype).requires_grad_()
    a, b = torch.randn(rank, k).to(dtype), torch.randn(m, rank).to(dtype)
    y = ops.lora_linear(x, q, a, b)
    assert y.shape == (tokens, m)
    assert y.isfinite().all()
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert grad.shape == x.shape
    assert grad.isfinite().all()
