"""Products with 4-bit weights that are decoded for a library's product, some rows at a time."""

import pytest
import torch

from deftcore import ops
from deftcore.ops import products4, timing
from deftcore.ops.packed import Parts, decode


def parts(rows, cols, **options):
    torch.manual_seed(rows * cols)
    return Parts(*ops.quantize_4bit(torch.randn(rows, cols), **options).parts())


@pytest.fixture
def by_library(monkeypatch):
    """A processor whose library is always the faster one, and pieces of few rows."""
    asked = []
    monkeypatch.setattr(products4, "_PIECE", 1 << 15)
    monkeypatch.setattr(products4, "_LEAST_WORK", 0)
    monkeypatch.setattr(products4, "_has_amx", lambda: True)
    monkeypatch.setattr(products4, "no_slower", lambda op, *_: asked.append(op))
    return asked


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(1000, 192), (700, 576), (513, 64), (65, 1024), (3, 64), (0, 64), (300, 96)])
def test_pieces_are_the_whole(monkeypatch, shape, double_quant):
    monkeypatch.setattr(products4, "_PIECE", 1 << 15)
    w = parts(*shape, double_quant=double_quant)
    pieces = list(products4._pieces(w))
    assert len(pieces) > 1 or w.rows * w.cols < 1 << 16 or w.cols % 64
    assert [start for start, _ in pieces] == [sum(p.rows for _, p in pieces[:i]) for i in range(len(pieces))]
    found = [decode(piece, torch.float32) for _, piece in pieces]
    assert torch.equal(torch.cat(found) if found else torch.empty(0, w.cols), decode(w, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1000, 192), (300, 96)])
def test_the_library_gives_the_same_products(by_library, shape, dtype):
    w = parts(*shape)
    dense = decode(w, torch.float64)
    x, g = (torch.randn(33, n, dtype=torch.float64).to(dtype) for n in reversed(shape))
    bias, low = torch.randn(shape[0]).to(dtype), torch.randn(33, 4).to(dtype)
    lora, back = (torch.randn(n, 4).to(dtype) for n in shape)
    y = products4.multiply(x, w, bias, low, lora)
    wanted = x.double() @ dense.t() + bias.double() + low.double() @ lora.double().t()
    assert (y.double() - wanted).abs().max() <= 4 * torch.finfo(dtype).eps * wanted.abs().max()
    y = products4.multiply_backward(g, w, low, back.t())
    wanted = g.double() @ dense + low.double() @ back.double().t()
    assert (y.double() - wanted).abs().max() <= 4 * torch.finfo(dtype).eps * wanted.abs().max()
    assert by_library == ["linear_4bit", "linear_4bit_backward"]


def test_other_products_are_not_timed(by_library, monkeypatch):
    w = parts(256, 64)
    products4.multiply(torch.randn(8, 64), w)  # float32 has no tiles
    monkeypatch.setattr(products4, "_LEAST_WORK", 1 << 30)
    products4.multiply(torch.randn(8, 64).bfloat16(), w)
    assert not by_library


def test_the_faster_side_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("DEFTCORE_CACHE", str(tmp_path))
    monkeypatch.setattr(timing, "_pays", {})
    measured = []
    monkeypatch.setattr(timing, "medians", lambda calls, _: measured.append(calls(0)) or [2.0, 1.0])
    for forget in (False, True, False):  # another process reads what the first wrote
        if forget:
            timing._pays.clear()
        assert not timing.no_slower("a test", torch.empty(1), (1,), int, float)
    assert measured == [(int, float)]
