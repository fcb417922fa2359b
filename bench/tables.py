"""The README's speed tables from a result file: `python -m bench.tables [bench/results/cpu.json]` prints Markdown."""

import json
import sys
from pathlib import Path


def pivot(rows, corner, label, column, value, columns):
    """A Markdown table: one line per label(row), one column per row[column] in `columns`."""
    lines = [f"| {corner} | " + " | ".join(f"{c:g}" for c in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in dict.fromkeys(label(row) for row in rows):
        cells = {row[column]: value(row) for row in rows if label(row) == name}
        lines.append(f"| {name} | " + " | ".join(cells.get(c, "") for c in columns) + " |")
    return "\n".join(lines)


def dtype_and_tokens(row):
    return f"{row['dtype']}, {row['tokens']} token{'s' if row['tokens'] > 1 else ''}"


def main():
    results = json.loads(Path(sys.argv[1] if len(sys.argv) > 1 else "bench/results/cpu.json").read_text())
    print(f"{results['machine']}; Python {results['python']}; {results['streaming_gb_per_s']:.0f} GB/s")
    print(f"{results['command']}\n")
    densities = [0.05, 0.1, 0.2, 0.5, 1.0]
    large = [r for r in results.get("sparse_down", []) if r["shape"] == "4096x11008"]
    print(pivot(large, "`sparse_down` 4096x11008, `auto`; density", dtype_and_tokens, "density",
                lambda r: f"{r['auto_ratio']:.2f}x", densities), "\n")  # fmt: skip
    single = [r for r in large if r["tokens"] == 1]
    print(pivot(single, "share of 1 / density, `sparse`, 1 token", lambda r: r["dtype"], "density",
                lambda r: f"{r['share_of_ideal']:.2f}", densities), "\n")  # fmt: skip
    behind = [r for r in results.get("sparse_down", []) if r["auto_ratio"] < 0.97]
    print("auto behind:", "; ".join(
        f"{r['shape']} {dtype_and_tokens(r)} at density {r['density']:g} ({r['auto_ratio']:.2f}x)" for r in behind
    ), "\n")  # fmt: skip
    print(pivot(results.get("gated", []), "`sparse_gated_mlp` 4096x11008; density", dtype_and_tokens, "density",
                lambda r: f"{r['ratio']:.2f}x", densities), "\n")  # fmt: skip
    four = results.get("linear_4bit", [])
    tokens = [1, 4, 16, 128, 512]
    for title, key in (
        ("`linear_4bit` over `F.linear`; tokens", "ratio"), ("over bitsandbytes, exact path", "over_bnb"),
        ("over bitsandbytes, repacked inference path", "over_bnb_repacked"),
    ):  # fmt: skip
        print(pivot([r for r in four if key in r], title, lambda r: f"{r['shape'].replace('x', ' to ')}, {r['dtype']}",
                    "tokens", lambda r, k=key: f"{r[k]:.2f}x", tokens), "\n")  # fmt: skip
    for r in four:
        if r["tokens"] == 1:
            print(
                f"{r['shape']} {r['dtype']}: {r['ours_ms']:.2f} ms, {100 * r['share_of_bandwidth']:.0f} % of bandwidth"
            )
    print()
    print(pivot(results.get("sparse_4bit", []), "sparse NF4 gated MLP over dense PyTorch; density", dtype_and_tokens,
                "density", lambda r: f"{r['ratio']:.2f}x", densities), "\n")  # fmt: skip
    print(pivot(results.get("sparse_4bit", []), "over the dense NF4 MLP; density", dtype_and_tokens, "density",
                lambda r: f"{r['over_dense_4bit']:.2f}x", densities), "\n")  # fmt: skip
    for r in results.get("sparse_4bit", []):
        if r["density"] == 0.1 and r["tokens"] == 1:
            print(f"sparse NF4, {r['dtype']}, density 0.1: {r['over_torch_float32']:.1f}x dense float32 PyTorch")
    print(
        "\n| LoRA over NF4, forward + backward | ours, ms | PEFT + bitsandbytes, ms | ratio | peak MB, ours | theirs |"
    )
    print("|---|---|---|---|---|---|")
    for r in results.get("qlora", []):
        times = f"{r['ours_ms']:.0f} | {r['peft_bnb_ms']:.0f} | {r['ratio']:.2f}x"
        peaks = f"{r['ours_peak_mb']:.0f} | {r['peft_bnb_peak_mb']:.0f}"
        print(f"| {r['shape'].replace('x', ' to ')}, {r['dtype']}, {r['tokens']} tokens | {times} | {peaks} |")
    for r in results.get("quantise", []):
        print(f"{r['op']} {r['dtype']}: {r['ours_ms']:.1f} ms, {r.get('ratio', 0):.1f}x bitsandbytes")
    print("\n| training step | tokens | full, ms | LoRA, ms | S2FT, ms | over full (ceiling) | over LoRA (ceiling) |"
          " peak MB: full, LoRA, S2FT | share of full, of LoRA |")  # fmt: skip
    print("|---" * 9 + "|")
    training = results.get("s2ft_training", [])
    for i in range(0, len(training), 3):
        full, lora, ours = training[i : i + 3]
        speed = " | ".join(f"{r['s2ft_speed_up']:.2f}x ({r['ceiling']:.2f})" for r in (full, lora))
        times = " | ".join(f"{r['step_ms']:.0f}" for r in (full, lora, ours))
        peaks = ", ".join(f"{r['peak_mb']:.0f}" for r in (full, lora, ours))
        print(
            f"| {full['layers']} x {full['width']}, {full['dtype']} | {full['tokens']} | {times} | {speed} | {peaks} "
            f"| {full['s2ft_memory']:.2f}, {lora['s2ft_memory']:.2f} |"
        )
    for key in ("input", "output", "LoRA"):
        print()
        print(pivot(results.get("s2ft_serving", []), f"`grouped_delta_linear`, {key}, time over base; adapters",
                    lambda r: f"{r['shape'].replace('x', ' to ')}, {r['dtype']}", "adapters",
                    lambda r, k=key: f"{r[f'{k}_over_base']:.2f}x", [1, 4, 16, 64]))  # fmt: skip
    for r in results.get("s2ft_switching", []):
        print(f"\nswitching {r['layers']} x {r['width']}: S2FT {r['s2ft_ms']:.0f} ms, LoRA {r['lora_ms']:.0f} ms")
    scans = results.get("selective_scan", [])
    print("\n| `selective_scan`, N 16 | us a token | share of the bound | over Transformers | over mambapy |")
    print("|---" * 5 + "|")
    for r in scans:
        over = " | ".join(f"{r[k]:.1f}x" if k in r else "" for k in ("over_transformers", "over_mambapy"))
        kind = "forward" if r["what"] == "forward" else "forward + backward"
        size = f"{r['batch']} x {r['length']} x {r['width']}"
        print(f"| {kind}, {r['dtype']}, {size} | {r['us_per_token']:.1f} | {r['share_of_bound']:.2f} | {over} |")
    print("\n| `mamba_chunk_scan`, 24 heads x 64, N 128 | length | ms | over Transformers |\n|---|---|---|---|")
    for r in results.get("mamba_chunk_scan", []):
        kind = "forward" if r["what"] == "forward" else "forward + backward"
        print(f"| {kind}, {r['dtype']} | {r['length']} | {r['ours_ms']:.1f} | {r['ratio']:.1f}x |")
    print(
        "\n| frozen mixer | width | length | ms | its matrix products alone, ms | over Transformers |\n"
        + "|---" * 6
        + "|"
    )
    for r in results.get("mamba_mixer", []):
        kind = "forward" if r["what"] == "forward" else "forward + backward"
        over = f"{r['over_transformers']:.1f}x" if "over_transformers" in r else ""
        print(f"| {r['kind']} {kind}, {r['dtype']} | {r['hidden']} | {r['length']} | {r['ours_ms']:.1f} "
              f"| {r['products_ms']:.1f} | {over} |")  # fmt: skip
    print("\n| decode, 4 layers, float32 | width | batch | ms a token | over Transformers |\n" + "|---" * 5 + "|")
    for r in results.get("mamba_decode", []):
        print(f"| {r['kind']} | {r['hidden']} | {r['batch']} | {r['ours_ms']:.2f} | {r['ratio']:.2f}x |")
    print("\n| `act_density` forward + backward, 8x128x11008 | time over plain | over the composed expression |")
    print("|---|---|---|")
    for r in results.get("act_density", []):
        composed = 1 / r["times_faster_than_composed"]
        print(f"| {r['activation']}, {r['dtype']} | {r['time_over_plain']:.2f}x | {composed:.2f}x |")
    print("\n" + ", ".join(f"`{r['op']}` {r['microseconds']:.0f} us" for r in results.get("overhead", [])))
    print(", ".join(f"{r['side']} {r['ms']:.0f} ms, {r['peak_mb']:.0f} MB" for r in results.get("train_step", [])))


if __name__ == "__main__":
    main()
