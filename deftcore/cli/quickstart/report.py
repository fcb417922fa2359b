"""The quickstart's report as tables and as a picture."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deftcore._files import replacing_file


def show(report: dict[str, Any], console: Console) -> None:
    """The report as tables and sentences."""
    if "n_grams" in report["base"]:
        base = report["base"]
        console.print(f"The base has learnt {_against(base['bits_per_byte'], base['n_grams'], 'library text')}")
    elif report["model"]:
        bits = report["runs"]["base"]["bits_per_byte"]
        console.print(f"The model takes {_against(bits, report['n_grams'], 'language reference')}")
    table = Table(title="tokens/s by Transformers, and by compile_decoder dense and sparse")
    for column in ("model", "loss", "bits/byte", "density", "Transf.", "dense", "sparse", "gain", "same"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, r in report["runs"].items():
        row = [name, f"{r['loss']:.3f}", f"{r['bits_per_byte']:.3f}", f"{100 * r['density']:.1f} %"]
        if "speed_up" in r:
            rates = (r[f"{side}_tokens_per_s"] for side in ("transformers", "dense", "sparse"))
            row += [*(f"{rate:.0f}" for rate in rates), f"{r['speed_up']:.2f}x", "yes" if r["same_tokens"] else "NO"]
        table.add_row(*row)
    console.print(table)
    if report["four_bit"]:
        table = Table(title="QLoRA + DEFT, the same weights three ways")
        for column in ("decoded from", "on disk, MB", "peak memory, MB", "tok/s"):
            table.add_column(column, justify="left" if column == "decoded from" else "right")
        for name, row in report["four_bit"]["rows"].items():
            table.add_row(name, f"{row['disk_mb']:.0f}", f"{row['peak_mb']:.0f}", f"{row['tokens_per_s']:.0f}")
        console.print(table)
        same = "the same tokens" if report["four_bit"]["same_tokens"] else "DIFFERENT tokens"
        idle = report["four_bit"]["idle_mb"]
        console.print(f"4-bit sparse gives {same} as 4-bit dense. An idle process takes {idle:.0f} MB.")
    for name, text in report["samples"].items():
        console.print(f"[bold]{name}[/bold]:", end=" ")
        console.print(repr(text), markup=False, highlight=False, soft_wrap=True)
    deft, lora = report["runs"]["LoRA + DEFT"], report["runs"]["LoRA"]
    console.print(
        f"DEFT leaves {100 * report['density_ratio']:.0f} % of plain LoRA's density "
        f"at {100 * (report['loss_ratio'] - 1):+.1f} % loss; the DEFT model decodes {deft['speed_up']:.2f}x as fast "
        f"with its active neurons as with all (plain LoRA: {lora['speed_up']:.2f}x). {report['seconds']:.0f} s in all."
    )
    if deft["not_native"]:
        console.print(f"Transformers decoded, not the native step: {deft['not_native']}.")
    if report["remark"]:
        console.print(report["remark"])


def _against(bits: float, counted: dict[str, float], text: str) -> str:
    return (
        f"{bits:.3f} bits per byte of unseen {text}; counting {counted['order']:.0f}-grams of the same text gives "
        f"{counted['bits_per_byte']:.3f} (interpolated Kneser-Ney)."
    )


def draw(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    runs = report["runs"]
    colors = ["#9aa5b1", "#4c78a8", "#e4572e", "#72b7b2"]
    for i, (name, r) in enumerate(runs.items()):
        blocks = range(len(r["density_blocks"]))
        width = 0.8 / len(runs)
        left.bar(
            [b + width * (i - (len(runs) - 1) / 2) for b in blocks], r["density_blocks"], 0.93 * width, label=name,
            color=colors[i],
        )  # fmt: skip
    left.set(title="Active neurons per MLP block", xlabel="block", ylabel="density")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    beside = {"frameon": False, "loc": "upper center", "bbox_to_anchor": (0.5, -0.18), "ncols": 2}  # no bar below it
    left.legend(**beside)
    names = [n for n in runs if "speed_up" in runs[n]]
    for offset, side, color in ((-0.2, "dense", colors[0]), (0.2, "sparse", colors[2])):
        values = [runs[n][f"{side}_tokens_per_s"] for n in names]
        bars = right.bar([i + offset for i in range(len(names))], values, 0.38, label=side, color=color)
        right.bar_label(bars, fmt="%.0f")
    right.set(title="Decoding, tokens per second", xticks=range(len(names)), xticklabels=names)
    right.margins(y=0.15)
    right.legend(**beside)
    with replacing_file(path) as partial:
        figure.savefig(partial, dpi=150)
    plt.close(figure)
