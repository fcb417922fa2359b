"""Tables of Natural GaLore, KaSA and BA-LoRA for docs/benchmarks.md; each function is as those of bench/tables.py."""

from bench.markdown import by_shape, milliseconds, optional, table, times


def galore_step(results, _):
    """The optimizer's part of a step without a new subspace, over all weights of a Llama-shaped stack. PyTorch's fused
    AdamW reads and writes 28 bytes a weight and multiplies nothing; a projection to and fro is 4 r multiply-adds a
    weight, and a window is read twice. Beside galore-torch's GaLore, and what the published Natural GaLore is described
    to do, in plain PyTorch (its own code does not install): both sides projected, so that its window is small."""
    rows = results["galore_step"]
    yield table(
        [f"{rows[0]['layers']} blocks x {rows[0]['width']}, rank {rows[0]['rank']}", "ms", "time over AdamW's",
         "over galore-torch", "over the published", "state, MB", "estimated", "AdamW's"],
        (
            [
                r["variant"],
                milliseconds(r["ours_ms"]),
                times("over_adamw")(r),
                optional(r, "ratio", "{:.2f}x") or "not installed",
                optional(r, "over_published", "{:.2f}x"),
                *(f"{r[key] / 1e6:.1f}" for key in ("state_bytes", "estimated_bytes", "adamw_bytes")),
            ]
            for r in rows
        ),
    )  # fmt: skip


def galore_refresh(results, _):
    """The next subspace by one product with the last one and a small decomposition, moments and window rotated into it,
    against the SVD alone."""
    rows = results["galore_refresh"]
    yield table(
        [f"a subspace of rank {rows[0]['rank']}", "ours", "SVD", "ratio"],
        ([by_shape(r), milliseconds(r["warm_ms"]), milliseconds(r["svd_ms"]), times("ratio")(r)] for r in rows),
    )


def kasa_layer(results, _):
    """Over a frozen base; what KaSA takes away are further columns of LoRA's products. Both layers as PEFT makes them,
    with float32 factors."""
    yield table(
        ["KaSA, rank 16", "tokens", "KaSA, ms", "fused LoRA, ms", "time over LoRA's"],
        (
            [f"{by_shape(r)}, {r['base']}", r["tokens"], f"{r['kasa_ms']:.1f}", f"{r['lora_ms']:.1f}",
             times("over_lora")(r)]
            for r in results["kasa_layer"]
        ),
    )  # fmt: skip


def minor_subspace(results, _):
    """The triplets that KaSA takes away, in float64, against PyTorch's SVD in float32, which is run once."""
    yield table(
        ["`minor_subspace`, rank 16", "ours", "SVD", "ratio"],
        (
            [by_shape(r), milliseconds(r["ours_ms"]), milliseconds(r["svd_ms"]), times("ratio")(r)]
            for r in results["minor_subspace"]
        ),
    )


def logit_penalties(results, _):
    """Consistency, diversity and spectral term, forward + backward, against PyTorch's operations, singular values by
    random projections on both sides. Peaks are PyTorch's own memory beyond the logits of student and teacher; the
    gradient of the logits, which both sides return, is in them."""
    yield table(
        ["`logit_penalties`", "ours, ms", "PyTorch, ms", "ratio", "peak MB, ours", "theirs", "the gradient's"],
        (
            [
                f"{r['tokens']} tokens x {r['words']:,} words, {r['dtype']}",
                f"{r['ours_ms']:.0f}",
                f"{r['torch_ms']:.0f}",
                times("ratio")(r),
                *(f"{r[key]:.0f}" for key in ("ours_peak_mb", "torch_peak_mb", "gradient_mb")),
            ]
            for r in results["logit_penalties"]
        ),
    )
