"""`deftcore quickstart`."""

from pathlib import Path

import click

from deftcore.cli.shared import check_language_model, command, hush, quantize_option, show


@command(example="deftcore quickstart --output quickstart --quantize nf4")
@click.option("--output", default="quickstart", help="Folder for report, adapters and picture.")
@click.option("--model", default="", show_default="a small one", help="Transformers folder, GGUF file or hub id.")
@click.option("--activation", type=click.Choice(["relu"]), show_default="its own", help="For the MLPs of --model.")
@click.option("--seed", default=0, help="Of every random number.")
@quantize_option("Also train on a 4-bit base and decode from 4 bits.")
def quickstart(
    output: str, model: str, activation: str | None, seed: int, quantize: str | None, as_json: bool
) -> None:  # fmt: skip
    """Fine-tune to sparsity, decode faster: an example.

    Trains a small Llama on texts that Python ships, plainly and with DEFT, and decodes both with all neurons and with
    the active ones alone, side by side. Nothing is downloaded; it takes two to four minutes on two cores. With
    --model the same is done to yours, in some minutes more.
    """
    hush()
    if model:
        check_language_model(model)
    from rich.console import Console

    from deftcore.cli.quickstart import report, showcase

    found = showcase.run(
        output, seed=seed, quantize=quantize or "", model=model, activation=activation or ""
    )  # fmt: skip
    if not as_json:
        report.show(found, Console())
    show(as_json, found, [f"Report, adapters and picture are in {Path(output)}/"])
