"""lora_linear."""

import pytest
import torch
from conftest import assert_close_to_ref
from hypothesis import given, settings
from hypothesis import strategies as st

from deftcore import ops
from deftcore.ops.lora import lora_linear_ref


def inputs(dtype=torch.float32, shape=(2, 3), k=12, m=9, r=4):
    x, w, a, b = torch.randn(*shape, k), torch.randn(m, k), torch.randn(r, k), torch.randn(m, r)
    return [t.to(dtype) for t in (x, w, a, b, torch.randn(m))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (1, 1), (0, 3)])
def test_matches_float64(dtype, with_bias, shape):
    x, w, a, b, bias = inputs(dtype, shape)
    bias = bias if with_bias else None
    y = ops.lora_linear(x, w, a, b, scaling=0.5, bias=bias)
    wide = [None if t is None else t.double() for t in (x, w, a, b, bias)]
    ref = lora_linear_ref(*wide[:4], 0.5, wide[4])
    plain = lora_linear_ref(x, w, a, b, 0.5, bias)
    work = wide[0].abs() @ (wide[1].abs() + 0.5 * wide[3].abs() @ wide[2].abs()).t()
    assert_close_to_ref(y, plain, ref, work * (1 if dtype == torch.float32 else 1e4))


def test_gradients():
    """gradcheck for x, A, B and the dropped input; the frozen weight gets none."""
    x, w, a, b, bias = (t.requires_grad_() for t in inputs(torch.float64))
    frozen, dropped = w.detach(), x.detach().clone().mul(2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, a, b: ops.lora_linear(x, frozen, a, b, scaling=0.5, bias=bias.detach()), (x, a, b)
    )
    assert torch.autograd.gradcheck(
        lambda x, d, a, b: ops.lora_linear(x, frozen, a, b, scaling=0.5, dropped_x=d), (x, dropped, a, b)
    )
    ops.lora_linear(x, w, a, b).sum().backward()
    assert w.grad is None


def test_opcheck_and_compile():
    x, w, a, b, _ = inputs()
    for t in (x, a, b):
        t.requires_grad_()
    torch.library.opcheck(torch.ops.deftcore.lora_linear.default, (x, None, w, a, b, None, 0.5))
    compiled = torch.compile(lambda x: ops.lora_linear(x, w, a, b), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), ops.lora_linear(x, w, a, b))


def test_autocast():
    x, w, a, b, bias = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.lora_linear(x, w, a, b, bias=bias)
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("index", "value", "error", "message"),
    [
        (0, torch.ones(2, 5), ValueError, "x:"),
        (1, torch.ones(9), ValueError, "weight:"),
        (2, torch.ones(4, 5), ValueError, "lora_a:"),
        (3, torch.ones(9, 5), ValueError, "lora_b:"),
        (3, torch.ones(9, 4).half(), TypeError, "lora_b:"),
    ],
)
def test_bad_input(index, value, error, message):
    arguments = inputs()[:4]
    arguments[index] = value
    with pytest.raises(error, match=message):
        ops.lora_linear(*arguments)


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.tuples(*[st.lists(st.integers(0, 4), max_size=3) for _ in range(4)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int32]),
    scaling=st.floats(),
)
def test_fuzz(shapes, dtype, scaling):
    """Any shapes give a result or an error that names an argument; never a crash."""
    x, w, a, b = (torch.ones(s, dtype=dtype) for s in shapes)
    try:
        y = ops.lora_linear(x, w, a, b, scaling=scaling)
    except (ValueError, TypeError) as error:
        assert ":" in str(error)
    else:
        assert y.shape == (*x.shape[:-1], w.shape[0])
