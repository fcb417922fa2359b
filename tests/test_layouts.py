"""What an op returns has one shape and one layout: of its kernel, its reference and its fake, whatever is switched on.

A compiled graph is kept on disk with the layouts that the fakes told, and serves after a kernel was switched on or off.
"""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from deftcore import ops
from deftcore.ops import grouped_delta, kernels, products4
from deftcore.ops.decoder import Block, DecoderStack, decode_step
from deftcore.ops.decoder_matrix import Matrix
from deftcore.ops.galore import galore_step
from deftcore.ops.galore_matrix import AdamMatrix
from deftcore.ops.products import linear_16bit
from deftcore.ops.ssm import ssd
from deftcore.ops.ssm.decode import MambaLayer, MambaStack, mamba_step
from deftcore.ops.ssm.projection import LoraPair, Projection

LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.mT.contiguous().mT,
    "reversed": lambda t: t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim()))),
    "packed": lambda t: F.pad(t, (1, 2))[..., 1:-2],
    "stepped": lambda t: torch.stack((t, t), -1).flatten(-2)[..., ::2],
    "expanded": lambda t: t[:1].expand_as(t),
}


def layout(t):
    """Shape, dtype and strides; that of a dimension of one can be anything."""
    return tuple(t.shape), t.dtype, [s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1 and t.numel()]


class Calls(TorchDispatchMode):
    """Compares each call of our ops with its fake, and keeps its outputs' layouts."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "deftcore":
            return func(*args, **(kwargs or {}))
        mode = FakeTensorMode()
        fakes = tree_map_only(torch.Tensor, lambda t: mode.from_tensor(t.detach()), args)
        with mode:
            told = [layout(t) for t in tree_leaves(func(*fakes)) if t is not None]
        outputs = func(*args)
        found = [layout(t) for t in tree_leaves(outputs) if t is not None]
        assert found == told, func
        self.seen.append((func._schema.name.removeprefix("deftcore::"), found))
        return outputs


def calls(dtype):
    """Functions of float tensors, which may lie in any way, and whether they have gradients."""

    def r(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    q = ops.quantize_4bit(torch.randn(64, 32), block_size=32)
    yield lambda z: ops.act_density(z, "silu", mask=torch.tensor([1, 0, 1])), [r(3, 17)], True
    yield lambda z: ops.act_density(z, "relu"), [r(2, 3, 17)], True
    yield ops.density, [r(3, 17)], False
    yield lambda x, w, t: ops.partial_linear(x, w, t, dim=0, start=1), [r(3, 17), r(4, 17), r(2, 17)], True
    yield lambda x, w, t: ops.partial_linear(x, w, t, dim=1, start=1), [r(3, 17), r(4, 17), r(4, 2)], True
    yield lambda g, u, w, t: ops.gated_linear(g, u, w, t), [r(3, 17), r(3, 17), r(4, 17), r(4, 2)], True
    mask = torch.randn(17, requires_grad=True)
    yield lambda x: ops.mask_units(x, mask), [r(2, 3, 17)], True
    yield lambda z: ops.mask_units(z.detach(), mask, 2, z=z, activation="silu"), [r(3, 34)], True
    p, indices = r(2, 9, 3), torch.randint(0, 9, (2, 4, 3))
    yield lambda p: ops.farthest_point_sample(p, 4), [p], False
    yield lambda p, q: ops.knn(p, q, 4)[1], [p, r(2, 5, 3)], True
    yield lambda p, q: ops.ball_query(p, q, 4, 1.0), [p, r(2, 5, 3)], False
    yield lambda x: ops.gather_points(x, indices), [r(2, 9, 7)], True
    wide = torch.promote_types(dtype, torch.float32)
    yield lambda x, w: ops.gather_points(x, indices, w.to(wide)), [r(2, 9, 7), r(2, 4, 3)], True
    if dtype != torch.float64:
        yield lambda w: ops.quantize_4bit(w).packed, [r(7, 33)], False
    yield lambda: ops.dequantize_4bit(q, dtype), [], False
    yield linear_16bit, [r(5, 17), r(4, 17), r(4)], True
    yield lambda x, b: ops.linear_4bit(x, q, b), [r(5, 32), r(64)], True
    yield lambda x, b: ops.linear_4bit(x, q, b, activations="int8"), [r(5, 32), r(64)], False
    yield lambda x, d, *w: ops.lora_linear(x, *w, dropped_x=d), [r(3, 17), r(3, 17), r(5, 17), r(2, 17), r(5, 2)], True
    yield lambda x, *w: ops.lora_linear(x, q, *w), [r(5, 32), r(2, 32), r(64, 2)], True
    for weight, cols, rows in ((r(5, 17), 17, 5), (q, 32, 64)):
        yield lambda x, a, b, s, a0, b0, w=weight: ops.lora_linear(x, w, a, b, sigma=s, minus=(a0, b0)), [
            r(3, cols), r(2, cols), r(rows, 2), r(2), r(3, cols), r(rows, 3)
        ], True  # fmt: skip
    for path in ("sparse", "dense"):
        yield lambda a, *w, p=path: ops.sparse_down(a, *w, path=p), [r(3, 17), r(17, 9), r(9)], True
        yield lambda x, *w, p=path: ops.sparse_mlp(x, *w, path=p), [r(3, 17), r(7, 17), r(7, 17), r(7), r(17)], True
        yield lambda x, *w, p=path: ops.sparse_gated_mlp(x, *w, path=p), [r(3, 17), *(r(7, 17) for _ in "123")], True
        yield lambda x, p=path: ops.sparse_gated_mlp(x, q, q, q, path=p), [r(3, 32)], True
        yield lambda x, p=path: ops.sparse_gated_mlp(x, q, q, q, path=p, activations="int8"), [r(3, 32)], False
    delta = ops.SliceDelta(axis=1, indices=torch.tensor([1]), block=r(1, 5))
    rows = torch.tensor([0, -1, 0])
    yield lambda x, w: ops.grouped_delta_linear(x, w, [delta], rows), [r(3, 4, 17), r(5, 17)], False
    every = {"consistency": 1.0, "diversity": 1.0, "spectral": 1.0, "k": 2}
    for norm, top_k in (("frobenius", 3), ("nuclear", 0)):
        options = every | {"norm": norm, "top_k": top_k, "vocabulary": 15}
        yield lambda z, t, o=options: ops.logit_penalties(z, t.detach(), **o).total, [r(2, 3, 17), r(2, 3, 17)], True
    yield lambda z: ops.mean_entropy(z, vocabulary=15), [r(2, 3, 17)], False
    yield lambda z: ops.class_penalties(z, diversity=1.0, spectral=1.0, k=2).total, [r(5, 4)], True

    def step(weight, grad, mean):
        state = torch.promote_types(dtype, torch.float32)
        moments = {"exp_avg": mean.to(state, copy=True), "exp_avg_sq": mean.to(state).square()}
        right = torch.eye(17, 3, dtype=state)
        galore_step([AdamMatrix(weight=weight.clone(), grad=grad, left=None, right=right, **moments, age=1)], lr=0.1)

    yield step, [r(5, 17), r(5, 17), r(5, 3)], False
    yield decoding_step(dtype), [r(2, 6)], False
    yield mamba_decoding_step(dtype), [r(2, 6)], False
    yield from mamba_calls(r)


def decoding_step(dtype):
    def matrix(rows, cols):
        return Matrix(torch.randn(rows, cols))

    shapes = (8, 6), (4, 6), (4, 6), (6, 8), (5, 6), (5, 6), (6, 5)
    block = Block(*(matrix(*shape) for shape in shapes), torch.ones(6), torch.ones(6))
    stack = DecoderStack([block], torch.ones(6), matrix(9, 6), torch.ones(7, 4), torch.ones(7, 4), 2, "silu", 1e-5, 0.5)
    return lambda x: decode_step(x, stack, *stack.new_cache(2, dtype), torch.tensor([0, 1]), 2)


def mamba_decoding_step(dtype):
    def matrix(rows, cols):
        return Matrix(torch.randn(rows, cols))

    layer = MambaLayer(matrix(20, 6), matrix(6, 10), torch.ones(6), torch.ones(3, 10), None, -torch.ones(10, 4),
                       torch.ones(10), None, matrix(10, 10), matrix(10, 2))  # fmt: skip
    stack = MambaStack([layer], torch.ones(6), matrix(9, 6), 4, 1e-5)
    return lambda x: mamba_step(x, stack, *stack.new_state(2, dtype))


def mamba_calls(r):
    """Sequences longer than a chunk of the scans'."""
    sequence = (torch.arange(70) > 30).long().expand(2, -1)
    x, a = r(2, 6, 70), r(6, 4).abs().neg()
    yield lambda x, w, b: ops.causal_conv1d(x, w, b, activation="silu", seq_idx=sequence), [x, r(6, 4), r(6)], True
    yield lambda x, w, b, s: ops.causal_conv1d(x, w, b, s, True), [x, r(6, 4), r(6), r(2, 6, 3)], True
    yield lambda x, w: ops.causal_conv1d(x, w.detach()), [x, r(6, 4)], True
    few = [x, x.abs(), a, r(2, 2, 4, 70), r(2, 2, 4, 70)]
    yield lambda *t: ops.selective_scan(*t, return_last_state=True), few, True
    yield lambda *t: ops.selective_scan(*t, True), [*few, r(6), x, r(6)], True
    yield lambda u, *t: ops.selective_scan(u, *(w.detach() for w in t)), few, True
    few = [r(2, 70, 6, 5), r(2, 70, 6).abs(), a[:, 0], r(2, 70, 2, 4), r(2, 70, 2, 4)]
    yield lambda *t: ops.mamba_chunk_scan(*t, 64, return_final_states=True), few, True
    yield lambda *t: ops.mamba_chunk_scan(*t[:5], 64, t[5], seq_idx=sequence), [*few, r(6)], True

    def step(x, state, *rest):
        return ops.causal_conv1d_update(x, state.clone(), *rest)

    yield step, [r(3, 6, 2), r(3, 6, 3), r(6, 4), r(6)], False
    state, b = r(3, 6, 5, 4), r(3, 2, 4)
    yield lambda s, *t: ops.selective_state_update(s.clone(), *t), [
        state, r(3, 6, 5), r(3, 6, 5).abs(), a.unsqueeze(1).repeat(1, 5, 1), b, b, r(6, 5), r(3, 6, 5)
    ], False  # fmt: skip

    def layer(outputs, inputs):
        return Projection(r(outputs, inputs), None, (LoraPair(r(2, inputs).requires_grad_(), r(outputs, 2)),))

    x_proj, dt_proj, out_proj = layer(2 + 8, 6), layer(6, 2)._replace(bias=r(6)), layer(7, 6)

    def mamba(xz, window, first, a):
        return ops.mamba_inner(
            xz, r(6, 4), None, x_proj, dt_proj, out_proj, a, r(6), conv_state=window, initial_state=first
        )

    yield mamba, [r(2, 70, 12), r(2, 6, 3), r(2, 6, 4), a], True
    yield lambda x, *t: mamba(x, *(s.detach() for s in t)), [r(2, 70, 12), r(2, 6, 3), r(2, 6, 4), a], True

    def mamba2(x, window, first):
        return ops.mamba2_inner(
            x, r(14, 4), None, r(3), a[:3, 0], r(3), r(6), out_proj, head_dim=2, conv_state=window, initial_state=first
        )

    yield mamba2, [r(2, 70, 12 + 8 + 3), r(2, 14, 3), r(2, 3, 2, 4)], True


def outputs_of(run, inputs, lay, gradients):
    """Layouts of all that was called, forward and backward."""
    inputs = [lay(t).detach().requires_grad_(gradients) if t.dim() > 1 else t for t in inputs]
    with Calls() as seen:
        outputs = [t for t in tree_leaves(run(*inputs)) if isinstance(t, torch.Tensor)]
        outputs = [t for t in outputs if t.requires_grad]
        if outputs:
            leaves = [t for t in inputs if t.requires_grad]
            torch.autograd.grad(outputs, leaves, [torch.ones_like(t) for t in outputs], allow_unused=True)
    return seen.seen


@pytest.mark.parametrize("lay", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_kernel_reference_and_fake_return_one_layout(monkeypatch, lay, dtype):
    names = set()
    for module in (products4, grouped_delta, ssd):
        monkeypatch.setattr(module, "native_pays", lambda *_: True)
    for run, inputs, gradients in calls(dtype):
        with kernels.only(*kernels.KERNELS):
            on = outputs_of(run, inputs, LAYOUTS[lay], gradients)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "_native_for", lambda op, x: None)
            with kernels.only():
                off = outputs_of(run, inputs, LAYOUTS[lay], gradients)
        assert on == off
        names |= {name for name, _ in on}
    assert names >= set(ops.op_names()) - ({"quantize_4bit"} if dtype == torch.float64 else set())
