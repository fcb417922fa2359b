"""4-bit weights against PyTorch's dense products and bitsandbytes."""

import copy
import logging

import torch
import torch.nn.functional as F
from rich.progress import track

from bench.harness import Rotating, allocator_peak_mb, alternate, console, over, per_call
from deftcore import ops

CALLS = 4  # in a row, over distinct weights: the layers of a model


def _bitsandbytes():
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except ImportError:
        console.print("bitsandbytes is not installed: its columns are left out")
        return None
    return bitsandbytes


def bnb_layer(bnb, w):
    """bitsandbytes' layer over w, double-quantised."""
    layer = bnb.nn.Linear4bit(w.shape[1], w.shape[0], bias=False, quant_type="nf4", compute_dtype=w.dtype)
    layer.weight = bnb.nn.Params4bit(w.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True)
    return layer.to(w.device).eval()


def as_model(layer):
    """A layer as a model that PEFT takes, which calls it "0"."""
    wrapper = torch.nn.Sequential(layer)
    wrapper.anchor = torch.nn.Parameter(torch.zeros(1), requires_grad=False)  # PEFT wants a parameter
    return wrapper


@torch.no_grad()
def bench_linear(device, quick, bandwidth):
    """linear_4bit forward: NF4, block 64, double-quantised."""
    rows, bnb = [], _bitsandbytes()
    shapes = [(11008, 4096)] if quick else [(4096, 1024), (4096, 4096), (11008, 4096)]
    cases = [(s, d) for s in shapes for d in (torch.float32, torch.bfloat16)]
    for (outputs, inputs), dtype in track(cases, "linear_4bit", console=console):
        w = (torch.randn(outputs, inputs, device=device) / inputs**0.5).to(dtype)
        dense = Rotating(lambda w=w: w.clone(), w.nbytes)
        q = ops.quantize_4bit(w)
        packed = Rotating(lambda q=q: copy.deepcopy(q), q.nbytes)
        if bnb:  # its inference path, which repacks the weights at the first call, and its path for training
            layer = bnb_layer(bnb, w).train()
            exact = Rotating(lambda m=layer: copy.deepcopy(m), q.nbytes)
            layer.eval()(torch.zeros(1, inputs, dtype=dtype, device=device))
            layers = Rotating(lambda m=layer: copy.deepcopy(m), q.nbytes)
        plain = bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True) if bnb else None
        for tokens in (1, 16, 128) if quick else (1, 4, 16, 128, 512):
            x = torch.randn(tokens, inputs).to(device, dtype)
            sides = {
                "torch": over(CALLS, lambda x=x: F.linear(x, dense())),
                "ours": over(CALLS, lambda x=x: ops.linear_4bit(x, packed())),
            }
            if bnb:
                sides["bnb_repacked"] = over(CALLS, lambda x=x: layers()(x))
                sides["bnb_exact"] = lambda x=x: exact()(x)
                sides["bnb_dequantise"] = lambda x=x, p=plain: F.linear(x, bnb.functional.dequantize_4bit(*p))
            times = alternate(sides, 5 if tokens > 16 else 13, device)
            batched = {k: t for k, t in times.items() if k in ("torch", "ours", "bnb_repacked")}
            found = {k: t["seconds"] for k, t in times.items()} | per_call(batched, CALLS)
            row = {
                "shape": f"{inputs}x{outputs}", "dtype": str(dtype)[6:], "tokens": tokens,
                "ours_ms": found["ours"] * 1e3, "torch_ms": found["torch"] * 1e3,
                "ratio": found["torch"] / found["ours"],
                "gb_per_s": q.nbytes / found["ours"] / 1e9,
                "share_of_bandwidth": q.nbytes / found["ours"] / bandwidth,
                "gflop_per_s": 2 * tokens * w.numel() / found["ours"] / 1e9,
            }  # fmt: skip
            if bnb:
                row |= {
                    "bnb_ms": found["bnb_exact"] * 1e3, "over_bnb": found["bnb_exact"] / found["ours"],
                    "over_bnb_dequantise": found["bnb_dequantise"] / found["ours"],
                    "over_bnb_repacked": found["bnb_repacked"] / found["ours"],
                }  # fmt: skip
            rows.append(row)
    return rows


@torch.no_grad()
def bench_sparse(device, quick):
    """Gated MLP, 4096x11008: sparse 4-bit against dense 4-bit (this library) and dense PyTorch."""
    rows = []
    width, neurons = 4096, 11008
    weights = [torch.randn(neurons, width, device=device) / 64 for _ in range(3)]
    packed = [[ops.quantize_4bit(w) for w in weights[:2]] for _ in range(3)]
    downs = [ops.quantize_4bit(weights[2].t().contiguous()) for _ in range(3)]
    turned = [q.t() for q in downs]
    float_weights = [*weights[:2], weights[2].t().contiguous()]
    turn = [0]

    def pick(items):
        turn[0] += 1
        return items[turn[0] % len(items)]

    cases = [(d, t) for d in (torch.float32, torch.bfloat16) for t in ((1,) if quick else (1, 4, 16))]
    for dtype, tokens in track(cases, "sparse 4-bit MLP", console=console):
        dense = [w.to(dtype) for w in float_weights]
        x = torch.randn(tokens, width).to(device, dtype)
        peak = torch.relu(ops.linear_4bit(x, packed[0][0])).amax(0).float()
        for u in (0.05, 0.1, 0.2, 0.5, 1.0):
            activation = "silu" if u == 1.0 else "relu"
            tau = 0.0 if u == 1.0 else max(peak.quantile(1 - u).item(), 0.0)
            f = F.silu if u == 1.0 else F.relu

            def plain(gate, up, down, x=x, f=f):
                return F.linear(f(F.linear(x, gate)) * F.linear(x, up), down)

            def dense4(x=x, f=f):
                gate, up = pick(packed)
                return ops.linear_4bit(f(ops.linear_4bit(x, gate)) * ops.linear_4bit(x, up), pick(downs))

            def sparse4(x=x, activation=activation, tau=tau):
                return ops.sparse_gated_mlp(x, *pick(packed), pick(turned), activation=activation, tau=tau)

            x32 = x.float()
            sparse4()  # the first call measures which path is faster
            sides = {
                "torch": lambda d=dense: plain(*d),
                "torch_float32": lambda x32=x32: plain(*float_weights, x=x32),
                "dense4": over(CALLS, dense4),
                "sparse4": over(CALLS, sparse4),
            }
            times = alternate(sides, 5 if quick else 7, device)
            ours, dense_4bit = (times[k]["seconds"] / CALLS for k in ("sparse4", "dense4"))
            rows.append(
                {
                    "shape": f"{width}x{neurons}", "dtype": str(dtype)[6:], "tokens": tokens, "density": u,
                    "sparse_4bit_ms": ours * 1e3, "dense_4bit_ms": dense_4bit * 1e3,
                    "gb_per_s": (1 + 2 * u) * downs[0].nbytes / ours / 1e9,
                    "torch_ms": times["torch"]["seconds"] * 1e3,
                    "over_dense_4bit": dense_4bit / ours, "ratio": times["torch"]["seconds"] / ours,
                    "over_torch_float32": times["torch_float32"]["seconds"] / ours,
                }
            )  # fmt: skip
    return rows


def bench_lora(device, quick):
    """A LoRA layer (r = 16) over NF4, forward + backward, against PEFT over bitsandbytes; extra memory of each."""
    bnb = _bitsandbytes()
    if bnb is None:
        return []
    import peft

    import deftcore
    from deftcore.nn import Linear4bit

    rows = []
    shapes = [(4096, 1024), (4096, 4096), (11008, 4096)]
    if quick:  # on a CPU the smallest: the peer decodes a weight at each step, and may have no fast 16-bit product
        shapes = shapes[-1:] if device == "cuda" else shapes[:1]
    cases = [(s, d) for s in shapes for d in (torch.float32, torch.bfloat16)]
    for (outputs, inputs), dtype in track(cases, "QLoRA layer", console=console):
        w = (torch.randn(outputs, inputs, device=device) / inputs**0.5).to(dtype)
        config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=["0"], init_lora_weights=False)

        def adapted(base, config=config, dtype=dtype, device=device):
            wrapper = as_model(base)
            wrapper.is_loaded_in_4bit = not isinstance(base, Linear4bit)
            model = peft.get_peft_model(wrapper, config).to(device)
            for p in model.parameters():
                if p.requires_grad:
                    p.data = p.data.to(dtype)
            return model.train()

        ours = deftcore.patch(adapted(Linear4bit(ops.quantize_4bit(w))))
        theirs = adapted(bnb_layer(bnb, w))
        for tokens in (128,) if quick else (128, 512):
            x = torch.randn(tokens, inputs, device=device, dtype=dtype, requires_grad=True)
            grad = torch.randn(tokens, outputs, device=device, dtype=dtype)

            def step(model, x=x, grad=grad):
                model(x).backward(grad)
                x.grad = None
                model.zero_grad(set_to_none=True)

            sides = {"ours": lambda: step(ours), "theirs": lambda: step(theirs)}
            times = alternate(sides, 5, device, graph=False)  # as a training step runs it
            a, b = times["ours"]["seconds"], times["theirs"]["seconds"]
            rows.append(
                {
                    "shape": f"{inputs}x{outputs}", "dtype": str(dtype)[6:], "tokens": tokens,
                    "ours_ms": a * 1e3, "peft_bnb_ms": b * 1e3, "ratio": b / a,
                    "gflop_per_s": 4 * tokens * w.numel() / a / 1e9,
                    "activations_mb": (x.nbytes + grad.nbytes) / 2**20,
                    "ours_peak_mb": allocator_peak_mb(device, lambda: step(ours)),
                    "peft_bnb_peak_mb": allocator_peak_mb(device, lambda: step(theirs)),
                    "dense_weight_mb": w.nbytes / 2**20,
                }
            )  # fmt: skip
    return rows


@torch.no_grad()
def bench_quantise(device, quick):
    """NF4, block 64: quantise with nested scales, and dequantise."""
    rows, bnb = [], _bitsandbytes()
    for dtype in (torch.float32, torch.bfloat16):
        w = torch.randn(11008, 4096, device=device, dtype=dtype)
        q = ops.quantize_4bit(w)
        sides = {"quantise": lambda w=w: ops.quantize_4bit(w), "dequantise": lambda q=q: q.dequantize()}
        if bnb:
            packed, state = bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
            sides |= {
                "bnb_quantise": lambda w=w: bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True),
                "bnb_dequantise": lambda p=packed, s=state: bnb.functional.dequantize_4bit(p, s),
            }
        times = alternate(sides, 3 if quick else 5, device, graph=False)  # quantising checks its scales on the host
        for name in ("quantise", "dequantise"):
            ours = times[name]["seconds"]
            row = {"op": name, "dtype": str(dtype)[6:], "weights": w.numel(), "ours_ms": ours * 1e3,
                   "gb_per_s": (w.nbytes + q.nbytes) / ours / 1e9}  # fmt: skip
            if bnb:
                theirs = times[f"bnb_{name}"]["seconds"]
                row |= {"bnb_ms": theirs * 1e3, "ratio": theirs / ours}
            rows.append(row)
    return rows
