"""Makes docs/benchmarks.md from the files in bench/results: `python -m bench.tables`, after every `python -m bench`.

A section per machine: the targets beside what was measured, then a table per family of figures.
"""

import inspect
import json
from pathlib import Path

from bench import decode_tables, mamba_tables, spectral_tables
from bench.markdown import against, by_columns, by_shape, by_tokens, milliseconds, pivot, spread, table, times
from bench.targets import AVX2, AVX512, CUDA, LARGE, standing

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
KINDS = {AVX512: "CPU with AVX-512", AVX2: "CPU with AVX2 alone", CUDA: "NVIDIA GPU"}  # in the page's order
DENSITIES = [0.05, 0.1, 0.2, 0.5, 1.0]

HEAD = """# Benchmarks

<!-- Made by `python -m bench.tables` from the files in bench/results. Do not edit: the tests compare. -->

Every figure is a ratio of two sides that alternate in one process, the median of many runs, on cold weights (buffers
rotate beyond the last-level cache), against the best peer that installs: PyTorch's products in either weight layout,
bitsandbytes, PEFT, Transformers, mambapy, galore-torch. `2.00x` is twice as fast as the peer. On a GPU a side is a
CUDA graph, so that the device's time is seen and not the interpreter's; what a call costs the host stands under "Calls
on tiny tensors".

To measure another machine: `python -m bench` on a CPU (an hour; `--only FAMILY` one family, `--only spectral` those of
Natural GaLore, KaSA and BA-LoRA), `bash bench/gpu_check.sh` on a GPU (nine minutes, tests included); then
`python -m bench.tables`. `python -m bench --quick` runs every family in three to four minutes, with fewer points and
repeats; its figures are not kept here. A CPU's kind is the best level that it has: one that `DEFTCORE_CPU_ISA` holds
down to less measures neither, and is labelled so. llama.cpp comes with `pip install "deftcore[bench]"`, which compiles
it.

What density can buy is bounded: a gated block reads its gate matrix whole, so the ideal is 3 / (1 + 2 density), at most
3x; a plain block at most 2x. Batches read the union of their tokens' active neurons. In a compute-bound prefill, or an
encoder, sparsity buys nothing; more than 64 tokens go to the dense product.

Processors without instructions for 16-bit products have been looked at from an AVX-512 machine alone, on which PyTorch
and deftcore were held to AVX2 (`DEFTCORE_CPU_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2`; processor time
of one thread, beside other work): no measurement of an AVX2 machine. There a bfloat16 product runs at 0.8 to 2.2 times
the speed of PyTorch's float32 one, over 576x1536, 1536x576 and 4096x4096, 1 to 512 tokens, three directions, but for
the weight gradient of 1 to 32 tokens over matrices that fit the cache (0.5 to 0.75: its time is the rounding of the
result). `path="auto"` over 2048x5504 in bfloat16, 1 to 64 tokens, is more than 3 % slower than the best dense product
at three points, whose path was timed once and came out even: `sparse_down` of 4 tokens with all neurons active (0.80x,
over dot products with a transposed copy of the weight, which the op is not given; 0.93x over its own layout),
`sparse_mlp` of 4 tokens (0.92x), `sparse_gated_mlp` of 64 (0.94x). `selective_scan` of width 1536 and 1,024 steps takes
8.4 ms on one thread, with its backward 34 to 42 (medians of runs; MKL held to AVX2 too): 0.58 and 0.38 to 0.47 of what
the multiply-adds of a matrix product allow, where 0.6 and 0.55 were wanted. On two threads, on cold inputs, they take
5.8 and 16.8 ms: 0.44 and 0.50. One token of `sparse_down` 4096x11008 in float32 takes 0.8 ms at density 0.1, 3.4 at 0.5
and 6.5 with all neurons (`bench_sparse_mlp`): 23 to 28 GB/s, as on AVX-512, of 30 that the machine can stream. Between
dense products that read 180 MB the op adds 0.3 ms: 5.2, 1.55 and 0.82 times PyTorch; 8.5, 1.7 and 0.97 were wanted.
`linear_4bit` 4096 to 11008 decodes 2.8 weights a cycle: one token is 2.3 times as fast as PyTorch's float32 product and
1.9 times its bfloat16 one, where 4 was wanted of a machine that streams 21 GB/s.
"""

# What holds on a GPU alone, below a family's tables.
ON_A_GPU = {
    "sparse_down": """`path="auto"` takes the sparse path on a GPU only where it loses at no density, because nobody
waits for the count: of these rows the gated MLP. The others run sparse when asked to (`path="sparse"`).""",
    "linear_4bit": "Beyond 8 tokens (16 in float32) a 4-bit weight is decoded once and multiplied by cuBLAS.",
    "s2ft_training": "A step of this size is bound by launches.",
    "selective_scan": "The CUDA scans are first versions, sequential in time.",
}


# ---------------------------------------------------------------------------- families
# Each is named as in the result file; its docstring stands above its tables.


def sparse_down(results, kind):
    """A forced sparse call follows a dense one, whose read has flushed every cache, Python's own included."""
    rows = results["sparse_down"]
    large = [r for r in rows if r["shape"] == LARGE]
    densities = [d for d in DENSITIES if any(r["density"] == d for r in rows)]
    for title, key in (
        ('`sparse_down` 4096x11008, `path="auto"`', "auto_ratio"),
        ('the same, `path="sparse"`', "ratio"),
    ):
        yield pivot(large, f"{title}; density", by_tokens, "density", times(key), densities)
    single = [r for r in large if r["tokens"] == 1]
    title = 'share of the ideal 1 / density, `path="sparse"`, 1 token'
    yield pivot(single, title, lambda r: r["dtype"], "density", lambda r: f"{r['share_of_ideal']:.2f}", densities)
    behind = [
        f"{r['shape']} {by_tokens(r)} at density {r['density']:g} ({times('auto_ratio')(r)})"
        for r in rows
        if r["auto_ratio"] < 0.97
    ]
    if behind:
        yield f"Where `auto` is more than 3 % behind the best dense layout: {'; '.join(behind)}."
    if kind != CUDA:
        yield """One copy of the weights is kept, neuron-major; PyTorch's product on that layout is slower than on the
other, so falling back to it gains nothing there. The kernel alone (`bench_sparse_mlp`) is above the ideal; the call
costs about 40 us warm and 0.1 to 0.3 ms after a flush."""


def gated(results, _):
    """Over PyTorch's block of three products."""
    yield pivot(
        results["gated"], "`sparse_gated_mlp` 4096x11008; density", by_tokens, "density", times("ratio"), DENSITIES
    )


def act_density(results, _):
    """Forward and backward on 8 x 128 x 11008 elements."""
    yield table(
        ["`act_density`", "time over the plain activation", "over the composed expression"],
        (
            [
                f"{r['activation']}, {r['dtype']}",
                times("time_over_plain")(r),
                f"{1 / r['times_faster_than_composed']:.2f}x",
            ]
            for r in results["act_density"]
        ),
    )


def linear_4bit(results, kind):
    """NF4, block size 64, double-quantised, cold weights, a stack of layers in turn."""
    rows = results["linear_4bit"]
    tokens = sorted({r["tokens"] for r in rows})
    peer = "cuBLAS on dense weights" if kind == CUDA else "`F.linear`"
    yield pivot(rows, f"`linear_4bit` over {peer}; tokens", by_shape, "tokens", times("ratio"), tokens)
    yield pivot(rows, "time; tokens", by_shape, "tokens", lambda r: milliseconds(r["ours_ms"]), tokens)
    yield table(
        ["1 token", "share of the streaming read over the packed bytes"],
        ([by_shape(r), f"{r['share_of_bandwidth']:.2f}"] for r in rows if r["tokens"] == 1),
    )
    rows = [r for r in rows if "over_bnb" in r]
    if rows and kind != CUDA:
        large = [r for r in rows if r["shape"] == LARGE]
        exact = {d: spread([r for r in large if r["dtype"] == d], "bnb_ms") for d in ("float32", "bfloat16")}
        yield f"""bitsandbytes 0.50.2 has two paths on a CPU. The exact one decodes a dense weight at every call (4096
to 11008: {exact["float32"]} in float32, {exact["bfloat16"]} in bfloat16, by how the allocator treats 180 MB blocks).
The inference path of AVX-512-BF16 machines repacks the weights in place at the first evaluation, rounds their scales
and any float32 input to bfloat16, and saves other bytes than it loaded. deftcore never changes a byte, and computes
float32 in float32."""
    yield pivot(rows, "over bitsandbytes, exact path; tokens", by_shape, "tokens", times("over_bnb"), tokens)
    if kind != CUDA:
        title = "over bitsandbytes, repacked inference path; tokens"
        yield pivot(rows, title, by_shape, "tokens", times("over_bnb_repacked"), tokens)


def sparse_4bit(results, _):
    """A gated MLP, 4096x11008, whose three weights are NF4."""
    rows = results["sparse_4bit"]
    half = [r for r in rows if r["dtype"] != "float32"]
    for title, found, key in (
        ("sparse NF4 over dense PyTorch", rows, "ratio"),
        ("over the dense NF4 MLP", rows, "over_dense_4bit"),
        ("over dense float32 PyTorch", half, "over_torch_float32"),
    ):
        yield pivot(found, f"{title}; density", by_tokens, "density", times(key), DENSITIES)


def qlora(results, _):
    """A layer of rank 16, forward and backward. Peaks are PyTorch's own memory above what the layer holds, activations
    and gradients included; deftcore's extra is a tile a thread and the float32 sums of the backward, never a dense
    weight. Both sides are bound by the same two dense products, which leaves little to gain in bfloat16."""
    yield table(
        ["LoRA over NF4", "ours, ms", "PEFT + bitsandbytes, ms", "ratio", "peak MB, ours", "theirs"],
        (
            [
                f"{by_shape(r)}, {r['tokens']} tokens",
                f"{r['ours_ms']:.0f}",
                f"{r['peft_bnb_ms']:.0f}",
                times("ratio")(r),
                f"{r['ours_peak_mb']:.0f}",
                f"{r['peft_bnb_peak_mb']:.0f}",
            ]
            for r in results["qlora"]
        ),
    )


def quantise(results, _):
    """45 M weights to NF4 with nested scales, and back."""
    yield table(
        ["", "ours", "bitsandbytes", "ratio"],
        (
            [f"{r['op']}, {r['dtype']}", milliseconds(r["ours_ms"]), milliseconds(r["bnb_ms"]), times("ratio")(r)]
            for r in results["quantise"]
            if "ratio" in r
        ),
    )


def s2ft_training(results, _):
    """A training step of a Llama-shaped stack (layers x width) at equal budgets, against full fine-tuning with
    PyTorch's fused AdamW and PEFT's LoRA without dropout; in brackets what the count of operations alone allows. Peaks
    are the allocator's, each method in its own process: weights and activations dominate, at 2048 tokens the
    activations that every method keeps."""
    rows = results["s2ft_training"]
    lines = []
    for i in range(0, len(rows), 3):
        full, lora, ours = rows[i : i + 3]
        line = [f"{full['layers']} x {full['width']}, {full['dtype']}", full["tokens"]]
        line += [f"{r['step_ms']:.0f}" for r in (full, lora, ours)]
        line += [f"{r['s2ft_speed_up']:.2f}x ({r['ceiling']:.2f})" for r in (full, lora)]
        line += [", ".join(f"{r['peak_mb']:.0f}" for r in (full, lora, ours))]
        line += [f"{full['s2ft_memory']:.2f}, {lora['s2ft_memory']:.2f}"]
        lines.append(line)
    header = ["step", "tokens", "full, ms", "LoRA, ms", "S2FT, ms", "over full (ceiling)", "over LoRA (ceiling)"]
    yield table([*header, "peak MB: full, LoRA, S2FT", "S2FT's share of full, of LoRA"], lines)


def s2ft_serving(results, _):
    """A batch whose rows use different adapters (64 channels, or LoRA of rank 32), time over the base product alone.
    The deltas' bytes set the floor: 16 adapters over a 2048 x 2048 base are half of its bytes, 1.5x."""
    rows = results["s2ft_serving"]
    counts = sorted({r["adapters"] for r in rows})
    for key, text in (("input", "input channels"), ("output", "output channels"), ("LoRA", "LoRA")):
        title = f"`grouped_delta_linear`, {text}; adapters in the batch"
        yield pivot(rows, title, by_shape, "adapters", times(f"{key}_over_base"), counts)
    for r in results.get("s2ft_switching", []):
        yield f"""Switching every adapter of a {r["layers"]}-layer model of width {r["width"]}: {r["s2ft_ms"]:.0f} ms,
against {r["lora_ms"]:.0f} ms for merging and unmerging LoRA."""


def light_peft(results, _):
    """MiniLM's encoder and a stack of Llama blocks with random weights, LoRA of rank 8 on all linear layers, against
    the same without a third of each layer's heads and of all channels; linear layers alone would allow 1.5x. "Adapters
    too": three quarters of the adapters and half of the others' ranks are gone as well, as published. Inference is with
    merged adapters. Peaks are those of training in a process of its own, beyond what one without a model holds, behind
    the cut. A step of estimation is one of the second half, where importance is summed."""

    def memory(r):  # a quick run has none
        if "memory" not in r:
            return "", ""
        return f"{r['slim_peak_mb']:.0f} ({r['lora_peak_mb']:.0f})", f"{r['memory']:.2f}"

    rows = results["light_peft"]
    yield table(
        ["model, what is cut", "weights left", "trained, of LoRA's", "step, ms (LoRA)", "step", "1 sequence",
         "32 sequences", "peak MB (LoRA)", "share", "estimation over LoRA"],
        (
            [f"{r['base']}, {r['layers']} x {r['width']}, {r['tokens']} tokens; {r['variant']}",
             f"{r['weights']:.2f}", f"{r['trained'] / r['lora_trained']:.2f}",
             f"{r['slim_ms']:.0f} ({r['lora_ms']:.0f})", times("speed_up")(r), times("inference_1")(r),
             times("inference_32")(r), *memory(r), times("estimation_over_lora")(r)]
            for r in rows
        ),
    )  # fmt: skip


def tsvit(results, _):
    """TSViT of 1 657 476 parameters, 60 frames of 24 x 24 pixels, 10 bands and 19 classes, float32, against the same
    module with attention written out and all rows of the last layer over dates computed. Kept is what a forward leaves
    for the backward."""
    yield table(
        ["series", "forward, ms (plain)", "forward", "both, ms (plain)", "forward + backward", "kept, MB (plain)"],
        (
            [f"{r['series']}{', masked' if r['mask'] else ''}",
             f"{r['forward_ours_ms']:.0f} ({r['forward_plain_ms']:.0f})", times("forward_ratio")(r),
             f"{r['both_ours_ms']:.0f} ({r['both_plain_ms']:.0f})", times("ratio")(r),
             f"{r['kept_ours_mb']:.0f} ({r['kept_plain_mb']:.0f})"]
            for r in results["tsvit"]
        ),
    )  # fmt: skip


def neighbours(results, _):
    """Points in a cube, float32. Plain are the usual loop over picks, `cdist` and `topk`, PyTorch's `gather` and its
    backward (between patches' centres, 384 features, 16 neighbours). A kd-tree of SciPy is made and asked by all cores.
    Memory is the allocator's peak, results included."""
    yield table(
        ["op", "clouds x points x picks or queries", "neighbours", "ms", "over PyTorch", "over the kd-tree",
         "distances, G/s", "peak MB (PyTorch)"],
        (
            [f"`{r['op']}`", r["shape"], r["k"], f"{r['ours_ms']:.2f}", times("ratio")(r),
             times("over_tree")(r) if r["over_tree"] else "", f"{r['g_per_s']:.1f}" if r["g_per_s"] else "",
             f"{r['ours_peak_mb']:.2f} ({r['plain_peak_mb']:.2f})"]
            for r in results["neighbours"]
        ),
    )  # fmt: skip


def gated_linear(results, _):
    """5440 to 2048, SiLU, a frozen weight, against PyTorch's activation, product and projection."""
    yield by_columns(results["gated_linear"], against("gated_linear", "tokens", "{:.2f}", "PyTorch"))


def train_step(results, _):
    """A 4-layer Llama, 8 x 128 tokens, each side in its own process."""
    names = {"peft": "PEFT", "patched": "patched", "deft": "patched, with DEFT"}
    yield table(
        ["LoRA step", "ms", "peak memory of the process, MB"],
        ([names[r["side"]], f"{r['ms']:.0f}", f"{r['peak_mb']:.0f}"] for r in results["train_step"]),
    )


def overhead(results, _):
    """What an op costs before it does anything."""
    yield table(["op", "us a call"], ([f"`{r['op']}`", f"{r['microseconds']:.0f}"] for r in results["overhead"]))


FAMILIES = {
    "Sparse down projection": sparse_down,
    "Sparse gated MLP": gated,
    "Activation with density": act_density,
    "4-bit products": linear_4bit,
    "Sparse MLP over 4-bit weights": sparse_4bit,
    "LoRA over 4-bit weights": qlora,
    "Quantising": quantise,
    "Gated down projection": gated_linear,
    "S2FT training": s2ft_training,
    "Serving many adapters": s2ft_serving,
    "Selective scan": mamba_tables.selective_scan,
    "Mamba-2's scan": mamba_tables.mamba_chunk_scan,
    "Causal convolution": mamba_tables.conv1d,
    "One step of Mamba": mamba_tables.state_update,
    "Mamba blocks": mamba_tables.mamba_mixer,
    "Mamba decoding": mamba_tables.mamba_decode,
    "Scans against llama.cpp's": decode_tables.scan_vs_llama_cpp,
    "Decoding": decode_tables.decode,
    "Natural GaLore's step": spectral_tables.galore_step,
    "GaLore's subspaces": spectral_tables.galore_refresh,
    "A KaSA layer": spectral_tables.kasa_layer,
    "Smallest singular values": spectral_tables.minor_subspace,
    "BA-LoRA's penalties": spectral_tables.logit_penalties,
    "Light-PEFT": light_peft,
    "Neighbourhoods of points": neighbours,
    "TSViT": tsvit,
    "A LoRA step": train_step,
    "Calls on tiny tensors": overhead,
}


# ---------------------------------------------------------------------------- page


def machine(file):
    """(kind, results, how and where they were measured) of a result file."""
    if "figures" not in file:
        if file["forced"]:
            raise ValueError(f"a result file is {file['forced']}")
        machines = dict.fromkeys([file["machine"], *(each["machine"] for each in file["measured"].values())])
        return file["kind"], file, f"{'; '.join(machines)}; Python {file['python']}: `python -m bench`."
    results, outcomes = file["figures"], file["tests"]
    others = ", ".join(f"`{name}`" for name, outcome in outcomes.items() if outcome != "passed") or "none"
    passed = sum(outcome == "passed" for outcome in outcomes.values())
    where = f"""{file["device"]}, driver {file["driver"]}, PyTorch {file["torch"]}, Python {results["python"]}, commit
`{file["commit"][:10]}`: `bash bench/gpu_check.sh`. {passed} of {len(outcomes)} CUDA tests passed (others:
{others}); compute-sanitizer: {file["compute_sanitizer"]}. {file.get("note", "")}""".rstrip()
    return CUDA, results, where


def section(path):
    """The blocks of one result file."""
    file = json.loads(path.read_text())
    kind, results, where = machine(file)
    notes = results.get("notes", {})  # of a family that was measured under other conditions than the file says
    yield f"## {file.get('device') or KINDS[kind]}"
    measured = results.get("measured", {})  # each family by itself, where a file grew in several runs
    read = "" if measured else f" Streaming read: {results['streaming_gb_per_s']:,.0f} GB/s."
    yield f"""{where}{read} All figures:
`bench/results/{path.name}`."""
    yield "### Targets"
    yield table(["", "asked", "measured, the worst first", ""], standing(results, kind))
    options = "--device cuda --quick --only" if kind == CUDA else "--only"
    for name, family in FAMILIES.items():
        key = family.__name__
        if results.get(key):
            yield f"### {name}"
            own = measured.get(key, results)
            read = own.get("streaming_gb_per_s") if measured else None
            at = f", which streamed {read:,.0f} GB/s" if read else ""
            told = [f"`python -m bench {options} {key}` on {own['machine']}{at}.", notes.get(key)]
            yield " ".join(filter(None, told))
            yield inspect.getdoc(family)
            yield from family(results, kind)
            if kind == CUDA and key in ON_A_GPU:
                yield ON_A_GPU[key]
            if (RESULTS / f"{key}_{path.stem}.png").exists():
                yield f"![{name}](../bench/results/{key}_{path.stem}.png)"


def unmeasured(kind):
    """The blocks of a kind of machine that has no result file."""
    yield f"## {KINDS[kind]}"
    if kind == CUDA:
        yield "Not measured yet: `bash bench/gpu_check.sh` on such a machine writes its file in `bench/results`."
        return
    yield f"""Not measured yet: `python -m bench` on such a machine writes `cpu-{kind}.json` in `bench/results`. A
machine with more instructions that is held down to these (`DEFTCORE_CPU_ISA`) does not measure it."""
    yield table(["asked of it", ""], ((what, asked) for what, asked, *_ in standing({}, kind)))


def finetuning(report):
    """Methods on one real text, from finetuning_cpu.json."""
    yield "## Methods on the same text"
    yield f"""Full fine-tuning, PEFT's LoRA and S2FT on a small Llama and the quickstart's texts, equal budgets for the
last two, the better learning rate of those tried, one seed. `{report["command"]}`, CPU."""
    yield table(
        ["method", "trained, M", "held-out loss, nats a token", "step, ms", "peak memory of the process, MB"],
        (
            [name, f"{r['trained'] / 1e6:.2f}", f"{r['loss']:.3f}", f"{r['step_ms']:.0f}", f"{r['peak_mb']:.0f}"]
            for name, r in report["methods"].items()
        ),
    )
    yield "![loss over steps, step time and memory](../bench/results/finetuning_cpu.png)"


# Files that are no machine's: how each makes its section.
OWN = {"int8_loss": decode_tables.int8_loss, "finetuning_cpu": finetuning}


def page():
    """The text of docs/benchmarks.md."""
    files = [path for path in RESULTS.glob("*.json") if path.stem not in OWN]
    of_kind = {kind: [] for kind in KINDS}
    for path in sorted(files):
        of_kind[machine(json.loads(path.read_text()))[0]].append(path)
    missing = [KINDS[kind] for kind, found in of_kind.items() if not found]
    blocks = [HEAD.strip()]
    blocks += [f"Not measured yet: {', '.join(missing)}."] if missing else []
    for kind, found in of_kind.items():
        blocks += [block for path in found for block in section(path)] or [*unmeasured(kind)]
    found = {name: RESULTS / f"{name}.json" for name in OWN}
    blocks += [
        block for name, file in found.items() if file.is_file() for block in OWN[name](json.loads(file.read_text()))
    ]
    return "\n\n".join(filter(None, blocks)) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
