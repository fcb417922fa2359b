"""Kernels where OpenMP brings fewer threads than asked for, where the number changes between calls, and repeats."""

import os
import subprocess
import sys

import pytest
import torch

from deftcore import ops
from deftcore.ops.packed import dequantize_ref

# Every kernel, at sizes worth several threads, gradients included. Nothing here goes through a library product: those
# of PyTorch 2.13 (oneDNN, bfloat16) are themselves wrong under a thread limit.
PROGRAM = """
import sys, torch
from deftcore import ops
from deftcore.ops import logit_penalties
from deftcore.ops.density import active_count
from deftcore.ops.logit_rows import Rows, times_columns, times_rows
from deftcore.ops.products import _multiply as multiply_16bit
from deftcore.ops.products4 import multiply

def rand(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

def gradients(out, *inputs):
    outs = out if isinstance(out, tuple) else (out,)
    total = sum((o * rand(*o.shape, seed=99)).sum() for o in outs)
    return [*(o.detach() for o in outs), *torch.autograd.grad(total, inputs)]

found = {}
for dtype in (torch.float32, torch.bfloat16):
    w = ops.quantize_4bit(rand(512, 1024, seed=1).to(dtype))
    for tokens in (2, 16, 40):
        x = rand(tokens, 1024, seed=2).to(dtype).requires_grad_()
        low, lora = rand(tokens, 8, seed=3).to(dtype), rand(512, 8, seed=4).to(dtype)
        found["linear_4bit", dtype, tokens] = gradients(ops.linear_4bit(x, w), x)
        found["low rank", dtype, tokens] = [multiply(x.detach(), w.parts(), None, low, lora)]
        if tokens == 2:
            found["linear_4bit, int8", dtype] = [ops.linear_4bit(x.detach(), w, activations="int8")]
    for rows, inner, columns in ((2, 1024, 512), (40, 300, 700)) if dtype == torch.bfloat16 else ():
        a, b = rand(rows, inner, seed=38).to(dtype), rand(columns, inner, seed=39).to(dtype).t()
        found["product", rows] = [multiply_16bit(a.new_empty(rows, columns), *each, bias=a.new_ones(columns))
                                  for each in ((a, b), (a.t().contiguous().t(), b.contiguous()))]
    z = rand(64, 4096, seed=4).to(dtype).requires_grad_()
    found["act_density", dtype] = gradients(ops.act_density(z, "silu")[:2], z)
    found["density", dtype] = [active_count(z, None, 0.5)]
    z, mask = rand(200, 1100, seed=32).to(dtype).requires_grad_(), rand(275, seed=33).requires_grad_()
    found["mask_units", dtype] = gradients(ops.mask_units(z.sin(), mask, 4, z=z, activation="silu"), z, mask)
    p, near = rand(1, 40000, 3, seed=34), torch.arange(3000).view(1, 1000, 3) % 77
    x, weights = rand(1, 77, 200, seed=35).to(dtype).requires_grad_(), rand(1, 1000, 3, seed=36).requires_grad_()
    found["farthest", dtype] = [ops.farthest_point_sample(p, 9), *ops.knn(p, p[:, :50], 40)]
    found["gather_points", dtype] = gradients(ops.gather_points(x, near, weights), x, weights)
    a = torch.relu(rand(5, 2048, seed=5) - 0.5).to(dtype)
    rows = rand(2048, 640, seed=6).to(dtype)
    for name, down in (("16-bit", rows), ("4-bit", ops.quantize_4bit(rows))):
        found["sparse_down", dtype, name] = [ops.sparse_down(a, down, path="sparse")]
        x = rand(1, 640, seed=7).to(dtype)  # with more the first product is the library's
        up = rand(2048, 640, seed=8).to(dtype)
        up = up if name == "16-bit" else ops.quantize_4bit(up)
        gated = ops.sparse_gated_mlp(x, up, up, down, activation="relu", path="sparse")
        found["sparse_mlp", dtype, name] = [gated, ops.sparse_mlp(x, up, down, path="sparse")]
    found["sparse_mlp, int8", dtype] = [
        ops.sparse_gated_mlp(x, up, up, down, activation="relu", path="sparse", activations="int8")]
    x, y = rand(5, 640, seed=7).to(dtype), torch.zeros(5, 2048, dtype=dtype)
    bank = ops.DeltaBank([ops.LowRankDelta(rand(8, 640, seed=9), rand(2048, 8, seed=10)),
                          ops.SliceDelta(1, torch.arange(64), rand(64, 2048, seed=11)),
                          ops.SliceDelta(0, torch.arange(64), rand(64, 640, seed=12))], (2048, 640), dtype=dtype)
    index = torch.tensor([0, 1, 2, -1, 1])
    torch.ops.deftcore.add_deltas(y, x, index, bank.starts, bank.tensors, bank.most)
    found["grouped_delta", dtype] = [y]
    u, delta, gate = (rand(2, 96, 70, seed=s).to(dtype).requires_grad_() for s in (14, 15, 16))
    A = (-rand(96, 16, seed=17).exp()).requires_grad_()
    B, C = (rand(2, 2, 16, 70, seed=s).to(dtype).requires_grad_() for s in (18, 19))
    D, bias, first = (rand(*s, seed=20).requires_grad_() for s in ((96,), (96,), (2, 96, 16)))
    scan = ops.selective_scan(u, delta, A, B, C, D, gate, bias, True, True, initial_state=first)
    found["selective_scan", dtype] = gradients(scan, u, delta, gate, A, B, C, D, bias, first)
    x = rand(2, 70, 6, 16, seed=21).to(dtype).requires_grad_()
    dt = rand(2, 70, 6, seed=22).to(dtype).requires_grad_()
    A, D = ((-rand(6, seed=23).exp()).requires_grad_(), rand(6, seed=24).requires_grad_())
    for groups in (1, 2):
        B, C = (rand(2, 70, groups, 16, seed=s).to(dtype).requires_grad_() for s in (25, 26))
        scan = ops.mamba_chunk_scan(x, dt, A, B, C, 32, D, dt_softplus=True, return_final_states=True)
        found["mamba_chunk_scan", dtype, groups] = gradients(scan, x, dt, A, B, C, D)
    x, weight = rand(2, 300, 90, seed=27).to(dtype).requires_grad_(), rand(300, 4, seed=28).requires_grad_()
    found["causal_conv1d", dtype] = gradients(ops.causal_conv1d(x, weight, activation="silu"), x, weight)
    z, t = rand(40, 5000, seed=32).to(dtype).requires_grad_(), rand(40, 5000, seed=33).to(dtype)
    for top_k in (0, 20):
        found["logit_rows", dtype, top_k] = gradients(
            logit_penalties(z, t, consistency=1.0, diversity=1.0, top_k=top_k).total, z)
    rows = Rows.of(z, None, None, 5000)
    found["logit_product", dtype] = [times_rows(rows, rand(7, 5000, seed=34)),
                                     times_columns(rows, rand(40, 7, seed=35), slice(0, 5000))]
    state = rand(40, 64, 16, seed=29)
    x, B, C = (rand(*s, seed=30).to(dtype) for s in ((40, 64), (40, 16), (40, 16)))
    update = ops.selective_state_update(state, x, x, -rand(64, 16, seed=31).exp(), B, C, dt_softplus=True)
    found["selective_state_update", dtype] = [update, state]
torch.save({str(k): v for k, v in found.items()}, sys.argv[1])
"""


def results(folder, **environment):
    path = folder / "results.pt"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path)], capture_output=True, text=True, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "4", "OMP_WAIT_POLICY": "passive"} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return results(tmp_path_factory.mktemp("threads"))


@pytest.mark.parametrize("setting", [{"OMP_THREAD_LIMIT": "1"}, {"OMP_THREAD_LIMIT": "3"}, {"OMP_DYNAMIC": "true"}])
def test_fewer_threads_than_asked_for(undisturbed, tmp_path, setting):
    """Work is cut by the number asked for: the same bits, whatever comes."""
    found = results(tmp_path, **setting)
    assert found.keys() == undisturbed.keys()
    for name, tensors in undisturbed.items():
        for i, (tensor, other) in enumerate(zip(tensors, found[name], strict=True)):
            assert tensor.isfinite().all(), (name, i)
            assert torch.equal(tensor, other), (name, i)


@pytest.fixture
def thread_count():
    """Sets PyTorch's number of threads; puts the old one back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_number_of_threads_changes_between_calls(thread_count):
    w = ops.quantize_4bit(torch.randn(384, 512))
    grad = torch.randn(16, 384)
    expected = grad.double() @ dequantize_ref(w.parts(), torch.float64)
    for threads in (1, 4, 2, 7, 1, 3):
        thread_count(threads)
        x = torch.zeros(16, 512, requires_grad=True)
        ops.linear_4bit(x, w).backward(grad)
        torch.testing.assert_close(x.grad.double(), expected, rtol=1e-5, atol=1e-4)


def test_sums_over_threads_are_repeatable(thread_count):
    """Partial sums 2^-53, 2^-53, 0 and 1 + 2^-24: only in this order does their float64 sum round up to 1 + 2^-23."""
    thread_count(4)
    z = torch.zeros(12, 2048)
    z[0, 0] = z[3, 0] = 2.0**-53
    z[9, 0], z[10, 0] = 1.0, 2.0**-24
    totals = {ops.act_density(z, "relu", surrogate="l1")[1].item() for _ in range(3000)}
    assert totals == {1 + 2.0**-23}
