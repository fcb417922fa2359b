"""What only hardware can show of the CUDA kernels: streams, graphs, repeats, other devices, sizes, its own arithmetic.

Values, odd sizes, dtypes and gradients are tested with the ops, over the emulated kernels (tests/emulator) as over the
CPU's; here each kernel's proof stands for them.
"""

import pytest
import torch
import torch.nn.functional as F

from deftcore import ops
from deftcore._files import read_table
from deftcore.ops import DeltaBank, LowRankDelta, SliceDelta
from deftcore.ops.kernels import KERNELS, cuda_enabled, gpu
from deftcore.ops.proof import Place, prove

pytestmark = pytest.mark.cuda
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _switched_on(monkeypatch):
    monkeypatch.setenv("DEFTCORE_CUDA_KERNELS", "all")
    assert cuda_enabled("density"), "this build has no CUDA kernels"
    torch.backends.cuda.matmul.allow_tf32 = False


# ---------------------------------------------------------------------------- a call of every kernel


def _sparse_mlp(device):
    gate, up, down = (torch.randn(1024, 256, device=device) / 16 for _ in range(3))
    return lambda x: ops.sparse_gated_mlp(x, gate, up, down, activation="relu", path="sparse"), (1, 256)


def _sparse_mlp_4bit(device):
    gate, up, down = (ops.quantize_4bit(torch.randn(512, 256, device=device) / 16) for _ in range(3))
    return lambda x: ops.sparse_gated_mlp(x, gate, up, down, activation="relu", path="sparse"), (3, 256)


def _sparse_down(device):
    w = torch.randn(3000, 512, device=device)
    return lambda a: ops.sparse_down(a.relu(), w, path="sparse", deterministic=True), (9, 3000)


def _linear_4bit(device):
    q = ops.quantize_4bit(torch.randn(300, 1024, device=device))
    return lambda x: ops.linear_4bit(x, q), (2, 1024)


def _dequantize_4bit(device):
    q = ops.quantize_4bit(torch.randn(300, 1024, device=device))
    return lambda x: x + q.dequantize(), (300, 1024)


def _quantize_4bit(device):
    return lambda w: torch.ops.deftcore.quantize_4bit(w, 64, 0), (300, 1024)


def _gated_act(device):
    return lambda x: ops.gated_linear(x, x, torch.eye(264, device=x.device)), (90, 264)


def _mask_units(device):
    mask = torch.randn(65, device=device, requires_grad=True)
    return lambda x: ops.mask_units(x.sigmoid(), mask, 4, z=x, activation="gelu"), (90, 260)


def _grouped_delta(device):
    shape = (1100, 48)
    deltas = [
        SliceDelta(1, torch.randperm(48)[:5], torch.randn(5, 1100)),
        SliceDelta(0, torch.randperm(1100)[:7], torch.randn(7, 48)),
        LowRankDelta(torch.randn(9, 48), torch.randn(1100, 9), 0.5),
    ]
    bank, base = DeltaBank(deltas, shape, device=device), torch.randn(shape, device=device)
    index = torch.tensor([0, 1, 2, -1, 0], device=device)

    def run(x):
        y = x @ base.t()
        torch.ops.deftcore.add_deltas(y, x, index, bank.starts, bank.tensors, bank.most)
        return y

    return run, (5, 48)


def _selective_scan(device):
    a = -torch.rand(130, 17, device=device)
    b, c = (torch.randn(2, 17, 70, device=device) for _ in range(2))
    return lambda u: ops.selective_scan(u, u, a, b, c, z=u, delta_softplus=True, return_last_state=True), (2, 130, 70)


def _mamba_chunk_scan(device):
    dt, a = torch.randn(2, 70, 4, device=device), -torch.rand(4, device=device)
    b, c = (torch.randn(2, 70, 2, 20, device=device) for _ in range(2))
    scan = ops.mamba_chunk_scan
    return lambda x: scan(x, dt, a, b, c, 64, dt_softplus=True, return_final_states=True), (2, 70, 4, 80)


def _causal_conv1d(device):
    weight = torch.randn(130, 4, device=device)
    return lambda x: ops.causal_conv1d(x, weight, activation="silu"), (2, 130, 70)


def _causal_conv1d_update(device):
    weight, state = torch.randn(130, 4, device=device), torch.randn(3, 130, 4, device=device)
    return lambda x: ops.causal_conv1d_update(x, state.clone(), weight, None, "silu"), (3, 130)


def _selective_state_update(device):
    a, state = -torch.rand(130, 17, device=device), torch.randn(3, 130, 17, device=device)
    b = torch.randn(3, 17, device=device)
    return lambda x: ops.selective_state_update(state.clone(), x, x, a, b, b, z=x, dt_softplus=True), (3, 130)


def _act_density(device):
    return lambda z: ops.act_density(z, "gelu")[::2], (37, 4096)  # the sum's order is the hardware's


def _density(device):
    return lambda a: ops.density(a, tau=0.5), (37, 1001)


def _logit_rows(device):
    t = torch.randn(9, 4104, device=device)
    options = {"consistency": 0.5, "diversity": 0.5, "top_k": 0}
    return lambda z: (ops.logit_penalties(z, t.to(z.dtype), **options).total, ops.mean_entropy(z)), (9, 4104)


def _farthest_point_sample(device):
    return lambda x: ops.farthest_point_sample(x, 40), (3, 700, 3)


def _knn(device):
    return lambda x: ops.knn(x, x[:, :50], 40), (3, 1500, 3)


def _ball_query(device):
    return lambda x: ops.ball_query(x, x[:, :50], 40, 0.5), (3, 1500, 3)


def _gather_points(device):
    indices, weights = torch.randint(0, 90, (2, 300, 3), device=device), torch.rand(2, 300, 3, device=device)
    return lambda x: ops.gather_points(x, indices, weights), (2, 90, 264)


# Each makes, on a device, a function of one tensor whose results are the same bits every time, and that tensor's shape.
CALLS = {
    make.__name__[1:]: make
    for make in (
        _act_density, _density, _sparse_down, _sparse_mlp, _sparse_mlp_4bit, _quantize_4bit, _dequantize_4bit,
        _linear_4bit, _gated_act, _mask_units, _grouped_delta, _selective_scan, _mamba_chunk_scan,
        _causal_conv1d, _causal_conv1d_update, _selective_state_update, _logit_rows,
        _farthest_point_sample, _knn, _ball_query, _gather_points,
    )
}  # fmt: skip
every_call = pytest.mark.parametrize("name", CALLS)


def made(name, device="cuda"):
    run, shape = CALLS[name](device)

    def results(x):
        out = run(x)
        return [t.clone() for t in (out if isinstance(out, (tuple, list)) else [out])]

    return results, shape


def assert_same(ours, wanted):
    for i, (mine, other) in enumerate(zip(ours, wanted, strict=True)):
        assert torch.equal(mine, other), f"result {i} differs"


@every_call
def test_on_a_side_stream(name):
    """In the caller's stream and in no other: what that stream wrote before is read, and what it does after waits."""
    run, shape = made(name)
    x = torch.randn(shape, device="cuda")
    wanted = run(x)
    torch.cuda.synchronize()
    stream, late = torch.cuda.Stream(), torch.full_like(x, torch.nan)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # cycles, about ten milliseconds: another stream's kernel would see NaN
        late.copy_(x)
        ours = run(late)
        late.fill_(torch.nan)
    stream.synchronize()
    assert_same(ours, wanted)


@every_call
def test_graph(name):
    """No host read, no allocation outside the graph's pool: new values through a captured graph."""
    run, shape = made(name)
    x = torch.randn(shape, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours = run(x)
    for _ in range(3):
        x.copy_(torch.randn(shape))
        graph.replay()
        torch.cuda.synchronize()
        assert_same(ours, run(x))


@every_call
def test_repeats_are_bit_equal(name):
    """Over and over, beside kernels in another stream that take part of the GPU."""
    run, shape = made(name)
    x, noise = torch.randn(shape, device="cuda"), torch.randn(2048, 2048, device="cuda")
    first, other = run(x), torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(50):
        with torch.cuda.stream(other):
            noise.matmul(noise)
        assert_same(run(x), first)
    torch.cuda.synchronize()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_call
def test_on_a_device_that_is_not_current(name):
    results = []
    for device in ("cuda:0", "cuda:1"):
        torch.manual_seed(0)
        run, shape = made(name, device)
        torch.manual_seed(1)
        results.append([out.cpu() for out in run(torch.randn(shape).to(device))])
        assert torch.cuda.current_device() == 0
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------- the device's arithmetic and sizes


def test_every_kernel_is_proved():
    found = prove(KERNELS, Place.of(gpu()), again=True)
    assert {kernel: verdict.reason for kernel, verdict in found.items() if verdict.reason} == {}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4bit_format(quant_type, dtype):
    """Nibbles, scales and dequantised values bit for bit as on the CPU."""
    for shape in ((65,), (70, 128)):
        w = torch.randn(shape).to(dtype)
        for block in (32, 1024):
            ours = ops.quantize_4bit(w.cuda(), quant_type=quant_type, block_size=block, double_quant=False)
            cpu = ops.quantize_4bit(w, quant_type=quant_type, block_size=block, double_quant=False)
            assert torch.equal(ours.absmax.cpu(), cpu.absmax)
            assert torch.equal(ours.packed.cpu(), cpu.packed)
            for nested in (False, True):
                q = ops.quantize_4bit(w, quant_type=quant_type, block_size=block, double_quant=nested)
                assert torch.equal(q.to("cuda").dequantize().cpu(), q.dequantize())


def test_more_elements_than_an_int_counts():
    rows, width = (1 << 16) + 1, 1 << 15
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GB of GPU memory")
    z = torch.full((rows, width), -1.0, dtype=torch.bfloat16, device="cuda")
    z[-1, -3:] = 2.0
    a, total, count = ops.act_density(z, surrogate="l1")
    assert (count.item(), total.item(), a[-1, -4:].tolist()) == (3, 6.0, [0.0, 2.0, 2.0, 2.0])
    assert ops.density(a).item() == pytest.approx(3 / z.numel())


# ---------------------------------------------------------------------------- with PyTorch's own kernels beside them


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


def test_lora_over_4_bits_trains():
    """Forward and gradients against the host's, below and above what the kernel takes itself."""
    q = ops.quantize_4bit(torch.randn(300, 1024))
    for tokens in (1, 5, 130):
        leaves = [torch.randn(tokens, 1024), torch.randn(9, 1024) / 32, torch.randn(300, 9)]
        results = []
        for device in ("cpu", "cuda"):
            x, a, b = (t.to(device).requires_grad_() for t in leaves)
            y = ops.lora_linear(x, q.to(device), a, b, scaling=0.5)
            grads = torch.autograd.grad(y.square().sum(), (x, a, b))
            results.append([t.detach().cpu() for t in (y, *grads)])
        for mine, wanted in zip(*results, strict=True):
            assert (mine - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_fused_blocks(kind):
    """The whole block with LoRA inside, and its gradients: device against host."""
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
        results.append([t.detach().cpu() for t in (out, last, *grads)])
    for wanted, mine in zip(*results, strict=True):
        assert (mine - wanted).abs().max() <= 1e-4 * max(wanted.abs().max().item(), 1e-3)


# ---------------------------------------------------------------------------- the faster way


def test_auto_is_sparse_or_dense_and_right():
    """Measured on first use; the answer is kept."""
    a, w = torch.relu(torch.randn(2, 512)).cuda(), torch.randn(512, 96).cuda()
    for _ in range(2):
        torch.testing.assert_close(ops.sparse_down(a, w), a @ w, rtol=1e-4, atol=1e-3)
    gate, up, down = (torch.randn(512, 96).cuda() / 10 for _ in range(3))
    x = torch.randn(1, 96).cuda()
    expected = (F.relu(x @ gate.t()) * (x @ up.t())) @ down
    torch.testing.assert_close(
        ops.sparse_gated_mlp(x, gate, up, down, activation="relu"), expected, rtol=1e-4, atol=1e-4
    )


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
    weights = torch.randn(tensors[0].shape)
    for _ in range(2):
        results = []
        for device in ("cpu", "cuda"):
            leaves = [None if t is None else t.to(device).requires_grad_() for t in tensors]
            out, last = ops.mamba_chunk_scan(*leaves[:5], 64, *leaves[5:], None, True, return_final_states=True)
            total = (out * weights.to(device)).sum() + last.sum()
            grads = torch.autograd.grad(total, [t for t in leaves if t is not None])
            results.append([t.detach().cpu() for t in (out, last, *grads)])
        for wanted, mine in zip(*results, strict=True):
            assert (mine - wanted).abs().max() <= 1e-4 * max(wanted.abs().max().item(), 1e-3)
    timed = " ".join(read_table("cost_model.json"))
    assert all(f" {name} " in timed for name in ("linear_4bit", "mamba_chunk_scan", "mamba_chunk_scan_backward"))
