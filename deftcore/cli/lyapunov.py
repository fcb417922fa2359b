"""`deftcore lyapunov`."""

from pathlib import Path

import click

from deftcore.cli import shared


@shared.command(example="deftcore lyapunov state-spaces/mamba-130m-hf texts.txt --steps 0,100 --precisions bf16,fp16")
@shared.model_argument
@shared.data_argument
@click.option("--output", default="lyapunov", help="Folder for report and picture.")
@click.option(
    "--precisions",
    type=shared.Listed(click.Choice(["bf16", "fp16"])),
    default="bf16",
    help="What to compare with float32.",
)
@click.option("--steps", type=shared.Listed(int), default="0,10,100", help="Fine-tuning steps after which to compare.")
@click.option(
    "--against", default="", show_default="none", help="A Transformer of the same size, through the same protocol."
)
@click.option("--seeds", default=1, help="Runs per precision; float32 pairs give the yardstick.")
@shared.length_option(256)
@shared.batch_option
@click.option("--learning-rate", default=2e-4, help="Of the fine-tuning, constant.")
@shared.device_option()
def lyapunov(
    model: str, data: str, output: str, precisions: list[str], steps: list[int], against: str, seeds: int,
    max_length: int, batch_size: int, learning_rate: float, device: str, as_json: bool,
) -> None:  # fmt: skip
    """Measure a Mamba's Lyapunov exponents, and how far mixed precision drifts.

    MODEL is a Transformers folder or hub id of a Mamba, Mamba-2 or FalconMamba; DATA a .jsonl, .csv or .txt file.
    Exponents are in nats per token.
    """
    shared.hush()
    shared.check_language_model(model)
    from deftcore.methods.mamba import stability

    report = stability.run(
        model, data, output, precisions=precisions, steps=steps, against=against, seeds=seeds, max_length=max_length,
        batch_size=batch_size, learning_rate=learning_rate, device=device,
    )  # fmt: skip
    shared.show(as_json, report, [*stability.lines(report), f"Report and picture are in {Path(output)}/"])
