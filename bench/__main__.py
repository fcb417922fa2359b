"""Ratios to the best peer: `python -m bench`. Sides alternate in one process, weights are cold, medians are reported.

Prints which kind of machine this is and writes bench/results/<kind of machine>.json (cpu-avx512, cpu-avx2, cuda), with
a plot beside it; `--quick` takes a few minutes and writes into bench/results/quick. A level that DEFTCORE_CPU_ISA
forces is no kind of machine: see machines.py.
"""

import argparse
import json
import platform
import statistics
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track

from bench import decode, light_peft, neighbours, quant4, s2ft, scans, spectral, ssm, train_step, tsvit
from bench.harness import LIMIT, Rotating, alternate, console, keep_freed_memory, streaming_bandwidth
from bench.machines import describe, headline, keep_origins, put_down, result_file
from deftcore import ops
from deftcore._files import write_json
from deftcore.cli.info import collect
from deftcore.ops.kernels import machine_name

QUICK_SECONDS = 1.0  # of one comparison
GROUPS = {"spectral": list(spectral.FAMILIES)}  # what --only takes as one name


def union_activations(tokens, neurons, density, dtype, device):
    a = torch.randn(tokens, neurons)
    keep = torch.zeros(neurons, dtype=torch.bool)
    keep[torch.randperm(neurons)[: round(density * neurons)]] = True
    return torch.where(keep, a, 0.0).to(device, dtype)


@torch.no_grad()
def bench_sparse_down(device, quick, bandwidth):
    rows = []
    shapes = [(4096, 11008)] if quick else [(1024, 4096), (4096, 11008)]
    dtypes = [torch.float32, torch.bfloat16] if quick else [torch.float32, torch.bfloat16, torch.float16]
    densities = [0.1, 0.5, 1.0] if quick else [0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0]
    cases = [(s, d, t) for s in shapes for d in dtypes for t in ((1, 16) if quick else (1, 4, 16, 64))]
    for (width, neurons), dtype, tokens in track(cases, "sparse_down", console=console):
        nbytes = width * neurons * dtype.itemsize

        weight = (torch.randn(width, neurons, device=device) / 100).to(dtype)
        dense = Rotating(weight.clone, nbytes)
        # A GPU's graph repeats what it has read: the rows of a tenth must be cold too.
        turned = Rotating(lambda w=weight: w.t().contiguous(), nbytes // (10 if device == "cuda" else 1))
        for density in densities:
            a = union_activations(tokens, neurons, density, dtype, device)
            sides = {
                "linear": lambda a=a: F.linear(a, dense()),
                "matmul": lambda a=a: a @ turned(),  # the other layout; the better of the two is the peer
                "sparse": lambda a=a: ops.sparse_down(a, turned(), path="sparse"),
                "auto": lambda a=a: ops.sparse_down(a, turned()),
            }
            if dtype == torch.float16 and device == "cpu":
                del sides["matmul"]  # 27 to 100 times slower than linear on this layout
            sides["auto"]()  # its first call measures which path is faster; a quick run may have one round alone
            times = alternate(sides, 5 if quick or tokens > 16 else 9, device)
            best = min(times[s]["seconds"] for s in ("linear", "matmul") if s in times)
            sparse, auto = times["sparse"]["seconds"], times["auto"]["seconds"]
            read = density * nbytes
            rows.append(
                {
                    "shape": f"{width}x{neurons}", "dtype": str(dtype)[6:], "tokens": tokens, "density": density,
                    "dense_ms": best * 1e3, "sparse_ms": sparse * 1e3, "auto_ms": auto * 1e3,
                    "ratio": best / sparse, "share_of_ideal": best / sparse * density, "auto_ratio": best / auto,
                    "gb_per_s": read / sparse / 1e9, "share_of_bandwidth": read / sparse / bandwidth,
                    "spread": times["sparse"]["spread"],
                }
            )  # fmt: skip
    return rows


@torch.no_grad()
def bench_gated(device, quick, bandwidth):
    rows = []
    width, neurons = 4096, 11008
    copies = 8 if device == "cuda" else 2
    cases = [(d, t) for d in (torch.float32, torch.bfloat16) for t in ((1,) if quick else (1, 4, 16))]
    for dtype, tokens in track(cases, "sparse_gated_mlp", console=console):
        gates, ups, downs = (
            [(torch.randn(neurons, width, device=device) / 64).to(dtype) for _ in range(copies)] for _ in range(3)
        )
        wide_downs = [w.t().contiguous() for w in downs]
        bundles = [ops.bundle_rows(u, d) for u, d in zip(ups, downs, strict=True)]
        x = torch.randn(tokens, width).to(device, dtype)
        turn = [0]

        def pick(items, turn=turn):
            return items[turn[0] % copies]

        for u in (0.05, 0.1, 0.2, 0.5, 1.0):
            # A threshold at the right quantile sets the density without touching the dense side's work.
            peak = torch.relu(x @ gates[0].t()).amax(0).float()
            tau = 0.0 if u == 1.0 else max(peak.quantile(1 - u).item(), 0.0)
            activation = "silu" if u == 1.0 else "relu"

            def dense(activation=activation):
                turn[0] += 1
                f = F.silu if activation == "silu" else F.relu
                return F.linear(f(F.linear(x, pick(gates))) * F.linear(x, pick(ups)), pick(wide_downs))

            def sparse(activation=activation, tau=tau):
                turn[0] += 1
                return ops.sparse_gated_mlp(
                    x, pick(gates), *pick(bundles), activation=activation, tau=tau, path="sparse"
                )

            times = alternate({"dense": dense, "sparse": sparse}, 5 if quick else 9, device)
            a, b = times["dense"]["seconds"], times["sparse"]["seconds"]
            read = (1 + 2 * u) * gates[0].nbytes
            rows.append(
                {
                    "shape": f"{width}x{neurons}", "dtype": str(dtype)[6:], "tokens": tokens, "density": u,
                    "dense_ms": a * 1e3, "sparse_ms": b * 1e3, "ratio": a / b,
                    "share_of_ideal": a / b * (1 + 2 * u) / 3,
                    "share_of_bandwidth": read / b / bandwidth,
                }
            )  # fmt: skip
    return rows


def bench_act_density(device, quick):
    rows = []
    plain = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"), "silu": F.silu}
    cases = [(d, n) for d in (torch.float32, torch.bfloat16) for n in plain]
    for dtype, name in track(cases, "act_density", console=console):
        z = torch.randn(8, 128, 11008, device=device, dtype=dtype).requires_grad_()
        grad, one = torch.randn_like(z), torch.tensor(0.1, device=device)

        def ours(z=z, grad=grad, name=name, one=one):
            a, total, _ = ops.act_density(z, name)
            torch.autograd.grad([a, total], z, [grad, one])

        def theirs(z=z, grad=grad, name=name):
            torch.autograd.grad(plain[name](z), z, grad)

        def composed(z=z, grad=grad, name=name, one=one):
            a = plain[name](z)
            square = a.float().square()
            torch.autograd.grad([a, (square / (square + 1e-7)).sum()], z, [grad, one])

        times = alternate({"plain": theirs, "ours": ours, "composed": composed}, 5 if quick else 9, device)
        p, o, c = (times[k]["seconds"] for k in ("plain", "ours", "composed"))
        rows.append(
            {"activation": name, "dtype": str(dtype)[6:], "plain_ms": p * 1e3, "ours_ms": o * 1e3,
             "composed_ms": c * 1e3, "time_over_plain": o / p, "times_faster_than_composed": c / o,
             "gb_per_s": 5 * z.nbytes / o / 1e9}  # z twice, a, its gradient, z's
        )  # fmt: skip
    return rows


def bench_overhead(device):
    """Microseconds a call on tiny tensors: what an op costs before it does anything."""
    a, w = torch.ones(1, 8, device=device), torch.ones(8, 8, device=device)
    x, q = torch.ones(1, 64, device=device), ops.quantize_4bit(torch.ones(64, 64, device=device))
    bank = ops.DeltaBank([ops.SliceDelta(1, torch.zeros(1, dtype=torch.int64), a)], (8, 8), device=device)
    calls = {
        "torch.nn.functional.linear": lambda: F.linear(a, w),
        "density": lambda: ops.density(a),
        "act_density": lambda: ops.act_density(a),
        "sparse_down": lambda: ops.sparse_down(a, w),
        "sparse_gated_mlp": lambda: ops.sparse_gated_mlp(a, w, w, w, activation="relu"),
        "lora_linear": lambda: ops.lora_linear(a, w, w, w),
        "linear_4bit": lambda: ops.linear_4bit(x, q),
        "partial_linear": lambda: ops.partial_linear(a, w, w[:, :2], dim=1),
        "gated_linear": lambda: ops.gated_linear(a, a, w),
        "grouped_delta_linear": lambda: ops.grouped_delta_linear(a, w, bank, torch.zeros(1, dtype=torch.int64)),
        "sparse_gated_mlp, 4-bit": lambda: ops.sparse_gated_mlp(x, q, q, q, activation="relu"),
    }
    rows = []
    with torch.no_grad():
        for name, call in calls.items():
            for _ in range(50):
                call()
            start = time.perf_counter()
            for _ in range(2000):
                call()
            if device == "cuda":
                torch.cuda.synchronize()
            rows.append({"op": name, "microseconds": (time.perf_counter() - start) / 2000 * 1e6})
    return rows


def plot(results, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [r for r in results["sparse_down"] if r["shape"] == "4096x11008" and r["dtype"] in ("float32", "bfloat16")]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True, layout="constrained")
    for axis, dtype in zip(axes, ("float32", "bfloat16"), strict=True):
        for tokens in sorted({r["tokens"] for r in rows}):
            points = [r for r in rows if r["dtype"] == dtype and r["tokens"] == tokens]
            axis.plot([p["density"] for p in points], [p["auto_ratio"] for p in points], "o-", label=f"{tokens} tokens")
        densities = sorted({r["density"] for r in rows})
        axis.plot(densities, [1 / d for d in densities], "k:", label="1 / density")
        axis.set(xscale="log", yscale="log", xlabel="union density", title=f"sparse_down 4096x11008, {dtype}")
        axis.axhline(1, color="grey", lw=0.5)
    axes[0].set_ylabel("speed over the best dense product")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def print_tables(results):
    for name, rows in results.items():
        if not isinstance(rows, list) or not rows:
            continue
        print(f"\n{name}")
        columns = list(dict.fromkeys(key for row in rows for key in row))
        print("  ".join(f"{key:>12}" for key in columns))
        for row in rows:
            cells = ((row.get(key, ""), max(12, len(key))) for key in columns)
            print("  ".join(f"{v:{n}.3f}" if isinstance(v, float) else f"{v!s:>{n}}" for v, n in cells))
        ratios = [row["ratio"] for row in rows if "ratio" in row]
        if ratios:
            print(f"geometric mean of ratio: {statistics.geometric_mean(ratios):.2f}")


def main():
    parser = argparse.ArgumentParser(prog="python -m bench")
    parser.add_argument("--quick", action="store_true", help="fewer points and repeats, a few minutes")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", nargs="*", metavar="FAMILY", help="these alone; others keep what the file has")
    parser.add_argument(
        "--output",
        type=Path,
        default=None,
        help="JSON file; default bench/results/<kind of machine>.json, a quick run's in bench/results/quick; a forced "
        "level has no default",
    )
    args = parser.parse_args()
    head = describe(args.device)
    print(headline(head))
    try:
        output = result_file(head, args.output, args.quick)
    except ValueError as error:
        parser.error(str(error))
    torch.manual_seed(0)
    bandwidth = streaming_bandwidth(args.device)
    results = json.loads(output.read_text()) if args.only and output.exists() else {}
    if results.get("forced") != head["forced"] and results:
        parser.error(f"--output: {output} was measured otherwise ({results.get('forced') or 'not forced'})")
    keep_origins(results)
    results |= head | {
        "command": " ".join(["python -m bench", *sys.argv[1:]]),
        "machine": machine_name(torch.empty(0, device=args.device)),
        "python": platform.python_version(),
        "info": collect(),
        "streaming_gb_per_s": bandwidth / 1e9,
    }
    # In a process as it is by default: bitsandbytes allocates a dense weight per call, and pays for fresh pages.
    default = {
        "linear_4bit": lambda: quant4.bench_linear(args.device, args.quick, bandwidth),
        "qlora": lambda: quant4.bench_lora(args.device, args.quick),
        "quantise": lambda: quant4.bench_quantise(args.device, args.quick),
    }
    # With an allocator that keeps freed memory, which flatters nobody.
    tuned = {
        "linear_4bit_tuned_allocator": lambda: quant4.bench_linear(args.device, True, bandwidth),
        "qlora_tuned_allocator": lambda: quant4.bench_lora(args.device, True),
        "sparse_4bit": lambda: quant4.bench_sparse(args.device, args.quick),
        "sparse_down": lambda: bench_sparse_down(args.device, args.quick, bandwidth),
        "gated": lambda: bench_gated(args.device, args.quick, bandwidth),
        "act_density": lambda: bench_act_density(args.device, args.quick),
        "overhead": lambda: bench_overhead(args.device),
        "gated_linear": lambda: s2ft.bench_gated_linear(args.device, args.quick),
        "s2ft_training": lambda: s2ft.bench_training(args.device, args.quick),
        "s2ft_serving": lambda: s2ft.bench_serving(args.device, args.quick),
        "s2ft_switching": lambda: s2ft.bench_switching(args.quick),
        "selective_scan": lambda: ssm.bench_scan(args.device, args.quick),
        "mamba_chunk_scan": lambda: ssm.bench_chunk_scan(args.device, args.quick),
        "conv1d": lambda: ssm.bench_conv1d(args.device, args.quick),
        "state_update": lambda: ssm.bench_state_update(args.device, args.quick),
        "mamba_mixer": lambda: ssm.bench_mixer(args.device, args.quick),
        "mamba_decode": lambda: ssm.bench_decode(args.device, args.quick),
        "scan_vs_llama_cpp": lambda: scans.bench_scans(args.quick),
        "decode": lambda: decode.bench_decode(args.quick),
        "train_step": lambda: train_step.bench_train_step(args.quick),
        "light_peft": lambda: light_peft.bench_light_peft(args.quick),
        "neighbours": lambda: neighbours.bench_neighbours(args.device, args.quick),
        "tsvit": lambda: tsvit.bench_tsvit(args.device, args.quick),
    }
    if args.device != "cpu":
        del tuned["scan_vs_llama_cpp"], tuned["decode"]
    tuned |= {name: partial(run, args.quick) for name, run in spectral.FAMILIES.items()}  # on a CPU
    families = default | tuned
    if args.quick:
        LIMIT["seconds"] = QUICK_SECONDS
        families = {
            name: run for name, run in families.items() if not name.endswith("_tuned_allocator")
        }  # a repetition
    wanted = [name for each in args.only or families for name in GROUPS.get(each, [each])]
    unknown = sorted(set(wanted) - families.keys())
    if unknown:
        parser.error(f"--only: unknown {', '.join(unknown)}; known: {', '.join([*families, *GROUPS])}")
    output.parent.mkdir(exist_ok=True)
    failed = []
    for name in [n for n in families if n in wanted]:
        if name in tuned:
            keep_freed_memory()
        start = time.perf_counter()
        try:
            rows = families[name]()
            put_down(results, name, rows, time.perf_counter() - start)
        except Exception:  # one family's failure must not cost the others' hour
            traceback.print_exc()
            failed.append(name)
        write_json(output, results)
    print_tables(results)
    print(f"\nstreaming read {bandwidth / 1e9:.1f} GB/s\n{headline(head)}")
    if results.get("sparse_down") and not args.quick:
        plot(results, output.parent / f"sparse_down_{output.stem}.png")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
