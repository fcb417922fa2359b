"""The CUDA kernels on hardware: values against float64, odd shapes, streams, graphs, repeats."""

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close_to_ref

from deftcore import ops
from deftcore._files import read_table
from deftcore.ops import DeltaBank, LowRankDelta, SliceDelta
from deftcore.ops.density import ACTIVATIONS, SURROGATES, act_density_ref
from deftcore.ops.gated_linear import gated_act_ref, gated_linear_ref
from deftcore.ops.kernels import KERNELS, cuda_enabled, gpu
from deftcore.ops.proof import Place, prove
from deftcore.ops.sparse_mlp import sparse_mlp_ref

pytestmark = pytest.mark.cuda
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _switched_on(monkeypatch):
    monkeypatch.setenv("DEFTCORE_CUDA_KERNELS", "all")
    assert cuda_enabled("density"), "this build has no CUDA kernels"
    torch.backends.cuda.matmul.allow_tf32 = False


def activations(tokens, neurons, density, dtype):
    a = torch.randn(tokens, neurons)
    keep = torch.zeros(neurons, dtype=torch.bool)
    keep[torch.randperm(neurons)[: round(density * neurons)]] = True
    return torch.where(keep, a, 0.0).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_act_density(activation, surrogate, dtype):
    for shape in ((1, 1), (3, 17), (5, 2049), (64, 4096), (0, 8)):
        z = (3 * torch.randn(shape)).to(dtype)
        mask = torch.rand(shape[0]) > 0.3
        zc = z.cuda().requires_grad_()
        a, total, count = ops.act_density(zc, activation, mask=mask.cuda(), surrogate=surrogate)
        z64 = z.double().requires_grad_()
        a64, total64, count64 = ops.act_density(z64, activation, mask=mask, surrogate=surrogate)
        plain = act_density_ref(z, activation, None, surrogate, 1e-7 if surrogate == "l0" else 20.0, 0.0)[0]
        assert_close_to_ref(a.cpu(), plain, a64.detach())
        assert abs(total.item() - total64.item()) <= 1e-5 * abs(total64.item()) + 1e-6
        assert abs(count.item() - count64.item()) <= max(1, z.numel() // 1000)
        if z.numel() == 0:
            continue
        grad = torch.randn(shape).to(dtype)
        (ours,) = torch.autograd.grad([a, total], zc, [grad.cuda(), torch.tensor(0.5, device="cuda")])
        (ref,) = torch.autograd.grad([a64, total64], z64, [grad.double(), torch.tensor(0.5, dtype=torch.float64)])
        scale = ref.abs().max() + 1e-3
        assert (ours.cpu().double() - ref).abs().max() <= scale * (1e-3 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_density(dtype):
    a = activations(37, 1001, 0.3, dtype)
    mask = torch.rand(37) > 0.5
    for m in (None, mask):
        expected = ops.density(a.double(), mask=m)
        assert ops.density(a.cuda(), mask=None if m is None else m.cuda()).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 16, 64, 100])
def test_sparse_down(tokens, dtype):
    for neurons, width in ((1, 1), (67, 17), (1025, 64), (4096, 1032), (259, 333)):
        w, bias = torch.randn(neurons, width).to(dtype), torch.randn(width).to(dtype)
        for density in (0, 1 / neurons, 0.1, 0.5, 1):
            a = activations(tokens, neurons, density, dtype)
            y = ops.sparse_down(a.cuda(), w.cuda(), bias.cuda(), path="sparse").cpu()
            ref = a.double() @ w.double() + bias.double()
            work = a.double().abs() @ w.double().abs() + bias.double().abs()
            assert_close_to_ref(y, (a.float() @ w.float() + bias.float()).to(dtype), ref, work)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 13])
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_mlps(activation, tokens, dtype):
    for neurons, width in ((70, 33), (1200, 64)):
        x = torch.randn(tokens, width).to(dtype)
        gate, up, down = ((torch.randn(neurons, width) / width**0.5).to(dtype) for _ in range(3))
        for w_gate in (None, gate):
            wide = [None if t is None else t.double() for t in (x, w_gate, up, down, None, None)]
            ref = sparse_mlp_ref(*wide, activation, 0.0)
            options = {"activation": activation, "tau": 0.0, "path": "sparse"}
            weights = [t.cuda() for t in ((up, down) if w_gate is None else (gate, up, down))]
            run = ops.sparse_mlp if w_gate is None else ops.sparse_gated_mlp
            y = run(x.cuda(), *weights, **options).cpu().double()
            limit = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}[dtype]
            assert (y - ref).abs().max() <= limit * ref.abs().max()


def test_bundled_and_unaligned_rows():
    up, down, x = (torch.randn(*s, device="cuda") for s in ((90, 24), (90, 24), (3, 24)))
    gate = torch.randn(90, 25, device="cuda")[:, 1:]
    y = ops.sparse_gated_mlp(x, gate, *ops.bundle_rows(up, down), activation="relu", path="sparse")
    torch.testing.assert_close(y, (F.relu(x @ gate.t()) * (x @ up.t())) @ down, rtol=1e-4, atol=1e-3)


def test_poisoned_rows_are_not_read():
    w = torch.randn(200, 64, device="cuda")
    a = torch.zeros(2, 200, device="cuda")
    a[:, ::7] = 1.0
    clean = ops.sparse_down(a, w, path="sparse")
    w[a[0] == 0] = float("nan")
    assert torch.equal(clean, ops.sparse_down(a, w, path="sparse"))


def test_repeats_are_bit_equal():
    a, w = torch.relu(torch.randn(9, 3000, device="cuda")), torch.randn(3000, 512, device="cuda")
    first = ops.sparse_down(a, w, path="sparse", deterministic=True)
    for run in range(100):
        assert torch.equal(first, ops.sparse_down(a, w, path="sparse", deterministic=True)), f"run {run} differs"


def test_graph_capture():
    """No host read, no allocation outside the graph's pool: new activations through a captured graph."""
    x = torch.randn(1, 256, device="cuda")
    gate, up, down = (torch.randn(1024, 256, device="cuda") / 16 for _ in range(3))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            ops.sparse_gated_mlp(x, gate, up, down, activation="relu")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.sparse_gated_mlp(x, gate, up, down, activation="relu")
    for _ in range(3):
        x.copy_(torch.randn(1, 256))
        graph.replay()
        expected = (F.relu(x @ gate.t()) * (x @ up.t())) @ down
        torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)


def test_side_stream():
    stream = torch.cuda.Stream()
    a, w = torch.relu(torch.randn(4, 512)), torch.randn(512, 128)
    with torch.cuda.stream(stream):
        y = ops.sparse_down(a.cuda(), w.cuda(), path="sparse")
    stream.synchronize()
    torch.testing.assert_close(y.cpu(), a @ w, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4bit_format(quant_type, dtype):
    """Nibbles and scales as on the CPU, except within rounding of a threshold; dequantised values bit for bit."""
    for shape in ((1,), (65,), (5, 7), (70, 128), (64, 512)):
        w = torch.randn(shape).to(dtype)
        for block in (32, 64, 1024):
            ours = ops.quantize_4bit(w.cuda(), quant_type=quant_type, block_size=block, double_quant=False)
            cpu = ops.quantize_4bit(w, quant_type=quant_type, block_size=block, double_quant=False)
            assert torch.equal(ours.absmax.cpu(), cpu.absmax)
            assert torch.equal(ours.packed.cpu(), cpu.packed)
            for nested in (False, True):
                q = ops.quantize_4bit(w, quant_type=quant_type, block_size=block, double_quant=nested)
                assert torch.equal(q.to("cuda").dequantize().cpu(), q.dequantize())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [(24, 128, 64), (40, 320, 32), (4, 96, 64), (5, 7, 64), (300, 1024, 64)], ids=str)
def test_linear_4bit(case, dtype):
    m, k, block = case
    q = ops.quantize_4bit(torch.randn(m, k), block_size=block)
    exact, on_gpu = q.dequantize(torch.float64), q.to("cuda")
    for tokens in (1, 3, 4, 5, 16, 64, 130):
        x, a, b = torch.randn(tokens, k), torch.randn(9, k) / k**0.5, torch.randn(m, 9)
        x, a, b = (t.to(dtype) for t in (x, a, b))
        g = torch.randn(tokens, m).to(dtype)
        leaf = x.cuda().requires_grad_()
        y = ops.lora_linear(leaf, on_gpu, a.cuda(), b.cuda(), scaling=0.5)
        (grad,) = torch.autograd.grad(y, leaf, g.cuda())
        low = 0.5 * b.double() @ a.double()
        for found, ref in ((y, x.double() @ (exact + low).t()), (grad, g.double() @ (exact + low))):
            error = (found.detach().cpu().double() - ref).norm() / ref.norm()
            assert error < {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [False, True])
def test_sparse_mlp_4bit(columns, dtype):
    for neurons, width in ((64, 64), (160, 96), (1024, 256)):
        gate, up, down = (ops.quantize_4bit(torch.randn(neurons, width) / width**0.5, block_size=32) for _ in range(3))
        down = ops.quantize_4bit(torch.randn(width, neurons), block_size=32).t() if columns else down
        g64, u64, d64 = (w.dequantize(torch.float64) for w in (gate, up, down))
        on_gpu = [w.to("cuda") for w in (gate, up, down)]
        for tokens in (1, 3, 4, 5, 64):
            x = torch.randn(tokens, width).to(dtype)
            y = ops.sparse_gated_mlp(x.cuda(), *on_gpu, activation="relu")
            expected = (F.relu(x.double() @ g64.t()) * (x.double() @ u64.t())) @ d64
            error = (y.cpu().double() - expected).norm() / expected.norm()
            assert error < {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
            a = F.relu(torch.randn(tokens, neurons) - 1).to(dtype)
            y, expected = ops.sparse_down(a.cuda(), on_gpu[-1]), a.double() @ d64
            error = (y.cpu().double() - expected).norm() / expected.norm().clamp(min=1e-9)
            assert error < {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_4bit_views_at_odd_addresses(dtype):
    """Activations and packed bytes that are views into the middle of a buffer."""
    gate, up, down = (ops.quantize_4bit(torch.randn(96, 128) / 11).to("cuda") for _ in range(3))
    x = torch.randn(3 * 128 + 1, dtype=dtype, device="cuda")[1:].view(3, 128)
    x64, g64, u64, d64 = x.double(), *(w.dequantize(torch.float64) for w in (gate, up, down))
    for moved in (False, True):
        if moved:
            for w in (gate, up, down):
                w.packed = torch.cat((w.packed[:1], w.packed))[1:]
                assert w.packed.data_ptr() % 2 == 1
        mlp = ops.sparse_gated_mlp(x, gate, up, down, activation="relu", path="sparse")
        pairs = (ops.linear_4bit(x, gate), x64 @ g64.t()), (mlp, (F.relu(x64 @ g64.t()) * (x64 @ u64.t())) @ d64)
        for found, ref in pairs:
            error = (found.double() - ref).norm() / ref.norm()
            assert error < {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]


def test_auto_is_sparse_or_dense_and_right():
    """Measured on first use; the answer is kept, inside a captured graph too."""
    a, w = torch.relu(torch.randn(2, 512)).cuda(), torch.randn(512, 96).cuda()
    for _ in range(2):
        torch.testing.assert_close(ops.sparse_down(a, w), a @ w, rtol=1e-4, atol=1e-3)
    gate, up, down = (torch.randn(512, 96).cuda() / 10 for _ in range(3))
    x = torch.randn(1, 96).cuda()
    expected = (F.relu(x @ gate.t()) * (x @ up.t())) @ down
    torch.testing.assert_close(
        ops.sparse_gated_mlp(x, gate, up, down, activation="relu"), expected, rtol=1e-4, atol=1e-4
    )


# ---------------------------------------------------------------------------- partial linear layers and deltas


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [1, 17, 2048, 2051])
def test_gated_linear(activation, dtype, width):
    """Values and both slopes; gate and up as strided halves of one buffer."""
    both = torch.randn(33, 2 * width).to(dtype)
    gate, up = (t.requires_grad_() for t in both.cuda().chunk(2, dim=1))
    weight = torch.eye(width, dtype=dtype, device="cuda")
    y = ops.gated_linear(gate, up, weight, activation=activation)
    g, u = (t.double().requires_grad_() for t in both.chunk(2, dim=1))
    ref = gated_linear_ref(g, u, torch.eye(width, dtype=torch.float64), [], [], activation, None)
    assert_close_to_ref(y.cpu(), gated_act_ref(*both.chunk(2, dim=1), activation), ref.detach())
    grad = torch.randn(33, width).to(dtype)
    ours = torch.autograd.grad(y, (gate, up), grad.cuda())
    for mine, wanted in zip(ours, torch.autograd.grad(ref, (g, u), grad.double()), strict=True):
        scale = wanted.abs().max() + 1e-3
        assert (mine.cpu().double() - wanted).abs().max() <= scale * (1e-3 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("fused", [False, True])
def test_slices_train_in_place(fused):
    """Both axes, an optimiser in place: everything outside the slices keeps its bytes."""
    for dim in (0, 1):
        lines = torch.randn(48, 40, device="cuda")
        before = lines.clone()
        part = torch.nn.Parameter(lines[:8])
        weight, trained = (lines.t(), part.t()) if dim == 1 else (lines, part)
        optimizer = torch.optim.AdamW([part], lr=1e-2, fused=fused)
        for _ in range(5):
            view = part.t() if dim == 1 else part
            x = torch.randn(16, weight.shape[1], device="cuda", requires_grad=True)
            ops.partial_linear(x, weight, view, dim=dim).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert trained.data_ptr() == weight.data_ptr()
        assert torch.equal(lines[8:], before[8:])
        assert not torch.equal(lines[:8], before[:8])


@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_delta_linear(dtype):
    for shape in ((70, 130), (1, 40), (1100, 48)):
        base = torch.randn(shape).to(dtype)
        deltas = [
            SliceDelta(1, torch.randperm(shape[1])[:5], torch.randn(5, shape[0]).to(dtype)),
            SliceDelta(0, torch.zeros(1, dtype=torch.int64), torch.randn(1, shape[1]).to(dtype)),
            LowRankDelta(torch.randn(9, shape[1]).to(dtype), torch.randn(shape[0], 9).to(dtype), 0.5),
            None,
        ]
        index = torch.tensor([0, 1, 2, 3, -1, 0, 2])
        x = torch.randn(7, 3, shape[1]).to(dtype)
        ref = ops.grouped_delta_linear(x.double(), base.double(), deltas_as(deltas, torch.float64), index)
        bank = DeltaBank(deltas, shape, device="cuda")
        y = ops.grouped_delta_linear(x.cuda(), base.cuda(), bank, index.cuda())
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
        assert (y.cpu().double() - ref).abs().max() <= tolerance * (ref.abs().max() + x.abs().double().sum(-1).max())
        again = ops.grouped_delta_linear(x.cuda(), base.cuda(), bank, index.cuda())
        assert torch.equal(y, again)


def deltas_as(deltas, dtype):
    def cast(delta):
        if isinstance(delta, LowRankDelta):
            return LowRankDelta(delta.lora_a.to(dtype), delta.lora_b.to(dtype), delta.scaling)
        return delta and SliceDelta(delta.axis, delta.indices, delta.block.to(dtype))

    return [cast(delta) for delta in deltas]


# ---------------------------------------------------------------------------- state-space models


def on_cuda(tensors):
    return [t.detach().cuda().requires_grad_() if isinstance(t, torch.Tensor) else t for t in tensors]


def agree(mine, wanted, dtype):
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for ours, ref in zip(mine, wanted, strict=True):
        scale = ref.abs().max().item() if ref.numel() else 0.0
        assert ours.shape == ref.shape
        assert ref.numel() == 0 or (ours.cpu().double() - ref).abs().max().item() <= tolerance * max(scale, 1e-3)


def check_op(call, tensors, dtype):
    """Values and gradients on the device against float64 on the host."""
    device = on_cuda(tensors)
    host = [t.detach().double().requires_grad_() if isinstance(t, torch.Tensor) else t for t in tensors]
    mine, wanted = call(*device), call(*host)
    weights = [torch.randn(o.shape) for o in wanted]
    leaves = [[t for t in side if isinstance(t, torch.Tensor)] for side in (device, host)]
    found = torch.autograd.grad(mine, leaves[0], [w.to(o) for w, o in zip(weights, mine, strict=True)])
    exact = [w.to(o.dtype).double() for w, o in zip(weights, mine, strict=True)]
    agree((*mine, *found), (*wanted, *torch.autograd.grad(wanted, leaves[1], exact)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["last", "first"])
@pytest.mark.parametrize("sizes", [{}, {"length": 1}, {"channels": 130, "states": 16, "length": 70}, {"groups": 4,
                         "channels": 36}, {"states": 40}, {"fixed": "BC"}, {"batch": 0}])  # fmt: skip
def test_selective_scan(dtype, layout, sizes):
    from test_ssm import inputs

    def scan(u, delta, a, b, c, d, z, bias, first):
        return ops.selective_scan(u, delta, a, b, c, d, z, bias, True, True, initial_state=first)

    check_op(scan, inputs(dtype=dtype, layout=layout, **sizes), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [{}, {"length": 1}, {"head_dim": 80, "states": 20, "length": 40}, {"groups": 1},
                         {"batch": 0}, {"length": 0}])  # fmt: skip
def test_mamba_chunk_scan(dtype, sizes):
    from test_ssd import inputs

    tensors, _ = inputs(dtype=dtype, **sizes)
    tensors[6] = None

    def scan(x, dt, a, b, c, d, z, bias, first):
        return ops.mamba_chunk_scan(x, dt, a, b, c, 64, d, z, bias, first, None, True, return_final_states=True)

    check_op(scan, tensors, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["last", "first"])
@pytest.mark.parametrize("sizes", [{}, {"packed": True}, {"length": 2}, {"width": 7, "length": 100}, {"batch": 0}])
def test_causal_conv1d(dtype, layout, sizes):
    from test_conv1d import inputs

    tensors, seq_idx = inputs(dtype=dtype, layout=layout, **sizes)

    def conv(x, weight, bias, first):
        index = None if seq_idx is None else seq_idx.to(x.device)
        return (ops.causal_conv1d(x, weight, bias, first, activation="silu", seq_idx=index),)

    check_op(conv, tensors, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_steps(dtype):
    """Both updates, with slots, against the host."""
    torch.manual_seed(0)
    slots = torch.tensor([2, -1, 0])
    x, dt, z = (torch.randn(3, 20).to(dtype) for _ in range(3))
    a, b, c = -torch.rand(20, 5), torch.randn(3, 5).to(dtype), torch.randn(3, 5).to(dtype)
    state, window = torch.randn(4, 20, 5), torch.randn(4, 20, 4).to(dtype)
    weight = torch.randn(20, 4)
    results = []
    for device in ("cpu", "cuda"):
        s, w = state.clone().to(device), window.clone().to(device)
        index = slots.to(device)
        moved = [t.to(device) for t in (x, dt, a, b, c)]
        y = ops.selective_state_update(s, *moved, None, z.to(device), None, True, state_batch_indices=index)
        u = ops.causal_conv1d_update(x.to(device), w, weight.to(device), None, "silu", conv_state_indices=index)
        results.append([t.cpu().double() for t in (y, s, u, w)])
    agree(results[1], results[0], dtype)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_fused_blocks(kind):
    """The whole block with LoRA inside: device against host."""
    from test_mamba import KINDS, leaves_of

    fused, _, inputs = KINDS[kind]
    host = inputs()

    def move(value):
        if isinstance(value, torch.Tensor):
            return value.detach().cuda().requires_grad_(value.requires_grad)
        if isinstance(value, tuple):
            moved = [move(v) for v in value]
            return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
        return value

    device = {k: move(v) for k, v in host.items()}
    results = []
    for side in (host, device):
        out, last = fused(**side)
        grads = torch.autograd.grad(out.sum() + last.sum(), leaves_of(side))
        results.append([t.detach().cpu().double() for t in (out, last, *grads)])
    agree(results[1], results[0], torch.float32)


# ---------------------------------------------------------------------------- proof, and the faster way


def test_every_kernel_is_proved():
    found = prove(KERNELS, Place.of(gpu()), again=True)
    assert {kernel: verdict.reason for kernel, verdict in found.items() if verdict.reason} == {}


def test_the_faster_way_gives_the_same(monkeypatch):
    """Timed on the device, at the first call; the second takes what was found."""
    from test_ssd import inputs

    monkeypatch.setenv("DEFTCORE_CUDA_KERNELS", "proved")
    q, x = ops.quantize_4bit(torch.randn(96, 128)), torch.randn(4, 128)
    for _ in range(2):
        y = ops.linear_4bit(x.cuda(), q.to("cuda")).cpu()
        torch.testing.assert_close(y, x @ q.dequantize().t(), rtol=1e-4, atol=1e-4)
    tensors, _ = inputs(length=70)
    tensors[6] = None
    for _ in range(2):
        check_op(lambda *t: ops.mamba_chunk_scan(*t[:5], 64, *t[5:], None, True, return_final_states=True), tensors,
                 torch.float32)  # fmt: skip
    timed = " ".join(read_table("cost_model.json"))
    assert all(f" {name} " in timed for name in ("linear_4bit", "mamba_chunk_scan", "mamba_chunk_scan_backward"))
