"""`deftcore quickstart`."""

from pathlib import Path

import click

from deftcore.cli.shared import command, hush, quantize_option, show


@command(example="deftcore quickstart --output quickstart --quantize nf4")
@click.option("--output", default="quickstart", help="Folder for report, adapters and picture.")
@click.option("--seed", default=0, help="Of every random number.")
@quantize_option("Also train on a 4-bit base and decode from 4 bits.")
def quickstart(output: str, seed: int, quantize: str | None, as_json: bool) -> None:
    """Fine-tune to sparsity, decode faster: an example.

    Trains a small Llama on texts that Python ships, plainly and with DEFT, and decodes both on dense and sparse
    kernels, side by side. Nothing is downloaded; it takes a few minutes on two cores.
    """
    hush()
    from rich.console import Console

    from deftcore.cli.quickstart import report, showcase

    found = showcase.run(output, seed=seed, quantize=quantize or "")
    if not as_json:
        report.show(found, Console())
    show(as_json, found, [f"Report, adapters and picture are in {Path(output)}/"])
