"""S2FT against full fine-tuning and PEFT's LoRA: training steps, memory, switching and serving adapters.

`python -m bench.s2ft DEVICE METHOD WIDTH LAYERS LENGTH BATCH DTYPE` is one process of the memory comparison.
"""

import itertools
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from rich.progress import track

from bench.harness import Rotating, alternate, console
from deftcore import ops
from deftcore.ops import DeltaBank, LowRankDelta, SliceDelta

METHODS = ("full", "LoRA", "S2FT")
RATIO = 0.02
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS = 5
WARM = 2  # optimiser state and layouts exist from the third step on


def mlp_width(width):
    return width * 8 // 3 // 64 * 64


def lora_rank(width):
    """The rank at which LoRA on all linears trains what S2FT on o and down does."""
    channels = int(RATIO * mlp_width(width))
    heads = max(1, round(channels / 64)) * 64
    return max(1, round((channels + heads) * width / (4 * 2 * width + 3 * (width + mlp_width(width)))))


def make(device, method, width, layers, dtype):
    """A stack of Llama blocks and an optimiser, torch's fused AdamW, over what the method trains."""
    import peft
    from transformers import LlamaConfig, LlamaModel

    from deftcore.methods.s2ft.config import S2ftConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=width, intermediate_size=mlp_width(width), num_hidden_layers=layers,
        num_attention_heads=width // 64,
    )  # fmt: skip
    torch.set_default_dtype(dtype)  # built in the dtype that it trains in: a float32 copy would be the peak
    with torch.device(device):
        model = LlamaModel(config)
    torch.set_default_dtype(torch.float32)
    model.config.use_cache = False
    if method == "LoRA":
        lora = peft.LoraConfig(r=lora_rank(width), lora_dropout=0.0, target_modules=LINEARS)
        model = peft.get_peft_model(model, lora, autocast_adapter_dtype=False)
    elif method == "S2FT":
        model = peft.get_peft_model(model, S2ftConfig(channel_ratio=RATIO, targets=["o", "down"], master="none"))
    trained = [p for p in model.parameters() if p.requires_grad]
    return model.train(), torch.optim.AdamW(trained, lr=1e-5, fused=True), sum(p.numel() for p in trained)


def step(model, optimizer, x):
    """Seconds of forward, backward and optimiser."""

    def now():
        if x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    marks = [now()]
    loss = model(inputs_embeds=x).last_hidden_state.float().square().mean()
    marks.append(now())
    loss.backward()
    marks.append(now())
    optimizer.step()
    optimizer.zero_grad()
    marks.append(now())
    return [b - a for a, b in itertools.pairwise(marks)]


def multiply_adds(method, width, layers, length, batch):
    """Multiplications of a step's products and attention, the lowest layer's savings included."""
    tokens, mlp, rank = batch * length, mlp_width(width), lora_rank(width)
    linears = tokens * (4 * width * width + 3 * width * mlp)
    attention = tokens * length * width  # causal: half of scores and values; the backward takes 2.5 of it
    first = tokens * 3 * width * width  # dX of the lowest q, k and v, whose input needs no gradient
    if method == "full":
        return layers * (3 * linears + 3.5 * attention) - first
    if method == "LoRA":
        low = tokens * rank * (4 * 2 * width + 3 * (width + mlp))
        return layers * (2 * linears + 3 * low + 3.5 * attention) - first
    slices = tokens * 2 * int(RATIO * mlp) * width
    lowest = first + tokens * width * width + 2.5 * attention  # o needs no dX either, nor attention a backward
    return layers * (2 * linears + slices + 3.5 * attention) - lowest


def bench_training(device, quick):
    cases = [(1024, 8, 512, 1), (2048, 4, 512, 1), (2048, 4, 512, 4), (1024, 8, 256, 8)]
    cases = [(1024 if device == "cuda" else 512, 4, 512, 1)] if quick else cases
    dtypes = [torch.float32] if quick else [torch.float32, torch.bfloat16]
    both = [(*case, dtype) for case in cases for dtype in dtypes]
    return [
        row for case in track(both, "S2FT training", console=console) for row in training_case(device, quick, *case)
    ]


def training_case(device, quick, width, layers, length, batch, dtype):
    """A row per method: the three train in turn, step by step, in one process, and alone in one each for the memory,
    which a quick run on a CPU leaves out: a process takes ten seconds to begin."""
    x = torch.randn(batch, length, width).to(device, dtype)
    sides = {method: make(device, method, width, layers, dtype) for method in METHODS}
    times = {method: [] for method in METHODS}
    for _ in range(STEPS + WARM):
        for method, (model, optimizer, _) in sides.items():
            times[method].append(step(model, optimizer, x))
    counts = {method: trained for method, (_, _, trained) in sides.items()}
    del sides
    phases = {m: [statistics.median(p) for p in zip(*t[WARM:], strict=True)] for m, t in times.items()}
    total = {m: statistics.median(sum(p) for p in t[WARM:]) for m, t in times.items()}
    peak = {}
    if device != "cpu" or not quick:
        peak = {m: peak_mb(device, m, width, layers, length, batch, str(dtype)[6:]) for m in ("idle", *METHODS)}
    work = {m: multiply_adds(m, width, layers, length, batch) for m in METHODS}
    rows = []
    for method in METHODS:
        forward, backward, update = phases[method]
        rows.append(
            {
                "width": width, "layers": layers, "tokens": length * batch, "dtype": str(dtype)[6:],
                "method": method, "trained": counts[method], "forward_ms": forward * 1e3,
                "backward_ms": backward * 1e3, "optimizer_ms": update * 1e3, "step_ms": total[method] * 1e3,
                "s2ft_speed_up": total[method] / total["S2FT"], "ceiling": work[method] / work["S2FT"],
                "gflop_per_s": 2 * work[method] / total[method] / 1e9,
                **(memory_of(method, peak) if peak else {}),
                "optimizer_mb": 2 * counts[method] * dtype.itemsize / 1e6,
            }
        )  # fmt: skip
    return rows


def memory_of(method, peak):
    """A row's columns, from all high-water marks."""
    s2ft, own = (peak[each] - peak["idle"] for each in ("S2FT", method))
    return {"peak_mb": own, "s2ft_memory": s2ft / own}


def peak_mb(*arguments):
    """High-water mark of a fresh process's memory (of the device's, on a GPU); "idle" only imports."""
    command = [sys.executable, "-m", "bench.s2ft", *map(str, arguments)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def run_for_memory(device, method, width, layers, length, batch, dtype):
    dtype = getattr(torch, dtype)
    x = torch.randn(int(batch), int(length), int(width)).to(device, dtype)
    if method == "idle":
        model, optimizer, _ = make(device, "LoRA", 64, 1, dtype)  # so that every module is imported
        x = torch.randn(1, 8, 64).to(device, dtype)
    else:
        model, optimizer, _ = make(device, method, int(width), int(layers), dtype)
    for _ in range(WARM + 1):
        step(model, optimizer, x)
    if x.is_cuda:
        print(torch.cuda.max_memory_allocated() / 2**20)
        return
    with open("/proc/self/status") as status:
        print(next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024)


def bench_gated_linear(device, quick):
    """A gated MLP's down projection with its activation inside, against PyTorch's three steps; the weight is frozen."""
    rows = []
    counts = (128, 512, 2048)
    if quick:
        counts = (512,) if device == "cuda" else (128,)
    cases = [(t, d) for t in counts for d in (torch.float32, torch.bfloat16)]
    for tokens, dtype in track(cases, "gated_linear", console=console):
        gate, up = (torch.randn(tokens, mlp_width(2048)).to(device, dtype).requires_grad_() for _ in range(2))
        weight = (torch.randn(2048, mlp_width(2048)) / 50).to(device, dtype)
        grad = torch.randn(tokens, 2048).to(device, dtype)
        calls = {
            "ours": lambda g=gate, u=up, w=weight: ops.gated_linear(g, u, w),
            "torch": lambda g=gate, u=up, w=weight: F.linear(F.silu(g) * u, w),
        }
        for what in ("forward", "both"):

            def side(run, leaves=(gate, up), grad=grad, what=what):
                if what == "forward":
                    with torch.no_grad():
                        return run()
                return torch.autograd.grad(run(), leaves, grad)

            times = alternate({n: lambda run=run, f=side: f(run) for n, run in calls.items()}, 5, device)
            ours, theirs = times["ours"]["seconds"], times["torch"]["seconds"]
            rows.append(
                {"what": what, "dtype": str(dtype)[6:], "tokens": tokens, "ours_ms": ours * 1e3,
                 "torch_ms": theirs * 1e3, "ratio": theirs / ours}
            )  # fmt: skip
    return rows


# ---------------------------------------------------------------------------- adapters


@torch.no_grad()
def bench_serving(device, quick):
    rows = []
    shapes = [(2048, 2048)] if quick else [(2048, 2048), (2048, 5504), (5504, 2048)]
    counts = [16] if quick else [1, 4, 16, 64]
    cases = [(s, n, d) for s in shapes for n in counts for d in (torch.float32, torch.bfloat16)]
    for (outputs, inputs), count, dtype in track(cases, "serving", console=console):
        nbytes = outputs * inputs * dtype.itemsize
        base = Rotating(lambda o=outputs, i=inputs, d=dtype: (torch.randn(o, i) / 50).to(device, d), nbytes)
        x, index = torch.randn(count, inputs).to(device, dtype), torch.arange(count, device=device)

        def bank(kind, outputs=outputs, inputs=inputs, dtype=dtype, count=count):
            def delta():
                if kind == "LoRA":
                    return LowRankDelta(torch.randn(32, inputs).to(dtype), torch.randn(outputs, 32).to(dtype))
                size, length = (inputs, outputs) if kind == "input" else (outputs, inputs)
                return SliceDelta(int(kind == "input"), torch.randperm(size)[:64], torch.randn(64, length).to(dtype))

            return DeltaBank([delta() for _ in range(count)], (outputs, inputs), device=device)

        own = 64 * count * outputs * dtype.itemsize
        banks = {kind: Rotating(lambda k=kind: bank(k), own) for kind in ("input", "output", "LoRA")}
        sides = {"base": lambda: F.linear(x, base())}
        for kind, rotating in banks.items():
            sides[kind] = lambda r=rotating: ops.grouped_delta_linear(x, base(), r(), index)
        times = {name: found["seconds"] for name, found in alternate(sides, 9 if quick else 25, device).items()}
        rows.append(
            {
                "shape": f"{inputs}x{outputs}", "dtype": str(dtype)[6:], "adapters": count,
                "base_ms": times["base"] * 1e3,
                **{f"{kind}_over_base": times[kind] / times["base"] for kind in banks},
                "bytes_over_base": 1 + 64 * count / inputs,
            }
        )  # fmt: skip
    return rows


@torch.no_grad()
def bench_switching(quick):
    """All adapters of a 12-layer model, from one to the next: S2FT writes slices, LoRA unmerges and merges."""
    import peft
    from transformers import LlamaConfig, LlamaModel

    from deftcore.methods.s2ft.delta import DeltaAdapter, DeltaHost

    width, layers = (1024, 2) if quick else (2048, 12)
    config = LlamaConfig(
        vocab_size=32, hidden_size=width, intermediate_size=mlp_width(width), num_hidden_layers=layers,
        num_attention_heads=width // 64,
    )  # fmt: skip
    rows = []
    plain = LlamaModel(config)
    names = [f"layers.{i}.{part}" for i in range(layers) for part in ("self_attn.o_proj", "mlp.down_proj")]

    def adapter():
        return DeltaAdapter(
            {
                n: SliceDelta(1, torch.randperm(plain.get_submodule(n).in_features)[:64].sort().values,
                              torch.randn(64, width) / 100)
                for n in names
            }
        )  # fmt: skip

    two, host = [adapter(), adapter()], DeltaHost(plain)
    turn = [0]

    def switch_slices():
        turn[0] += 1
        host.switch(two[turn[0] % 2])

    lora = peft.get_peft_model(
        LlamaModel(config), peft.LoraConfig(r=32, target_modules=["o_proj", "down_proj"], init_lora_weights=False)
    )
    lora.merge_adapter()

    def switch_lora():
        lora.unmerge_adapter()
        lora.merge_adapter()

    times = alternate({"S2FT": switch_slices, "LoRA": switch_lora}, 3 if quick else 7)
    ours, theirs = times["S2FT"]["seconds"], times["LoRA"]["seconds"]
    rows.append(
        {"width": width, "layers": layers, "s2ft_ms": ours * 1e3, "lora_ms": theirs * 1e3, "ratio": theirs / ours}
    )
    return rows


if __name__ == "__main__":
    run_for_memory(*sys.argv[1:])
