"""`deftcore sparsify`."""

from typing import Any

import click

from deftcore.cli import shared


@shared.command(example="deftcore sparsify meta-llama/Llama-3.2-1B --data texts.jsonl --density 0.5 -o sparse")
@shared.model_argument
@click.option(
    "--data", required=True, show_default="none", help="A .jsonl, .csv or .txt file, on which thresholds are chosen."
)
@click.option("-o", "--output", required=True, show_default="none", help="A new folder.")
@click.option("--density", default=0.5, help="Share of each block's neurons to keep.")
@click.option(
    "--criterion", default="product", type=click.Choice(["product", "gate"]),
    help="What has to be above a threshold: gate times up, which spares rows of the down projection, or the gate, "
    "which spares those of the up projection too and costs more.",
)  # fmt: skip
@click.option("--scaled", is_flag=True, help="A threshold for each neuron, by the norm of what it adds.")
@click.option(
    "--validation", default="", show_default="every tenth example of the data", help="A file, to measure the loss on."
)
@shared.adapter_option
@shared.quantize_option("Put the base into 4 bits. LoRA stays unmerged beside it.")
@shared.length_option(512)
@shared.batch_option
@shared.device_option()
def sparsify(
    model: str, data: str, output: str, density: float, criterion: str, scaled: bool, validation: str, adapter: str,
    quantize: str | None, max_length: int, batch_size: int, device: str, as_json: bool,
) -> None:  # fmt: skip
    """Choose thresholds of MLP activations, and write a folder for sparse inference.

    MODEL is a Transformers folder, GGUF file or hub id; what is written, `deftcore generate` and `deftcore.load_sparse`
    open. Shows loss, in nats per token, and densities under the thresholds, on text that did not choose them.
    """
    shared.hush()
    shared.check_language_model(model)
    from deftcore.methods.deft import calibrate

    result = calibrate.sparsify(
        model, data, output, density=density, criterion=criterion, scaled=scaled, validation=validation,
        adapter=adapter, quantize=shared.quantize_options(quantize), max_length=max_length, batch_size=batch_size,
        device=device,
    )  # fmt: skip
    if not as_json:
        _show_blocks(result)
    shared.show(as_json, result, [
        f"{output}: density {result['density']:.3f} of the {criterion}, {result['weights']} weights",
        f"loss {result['loss']:.4f} dense, {result['loss_sparse']:.4f} sparse ({result['loss_change']:+.1%})",
    ])  # fmt: skip


def _show_blocks(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("block", "tau, mean" if result["scaled"] else "tau", "density", "where it was chosen")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, block in result["blocks"].items():
        table.add_row(name, f"{block['tau']:.4g}", f"{block['density']:.3f}", f"{block['calibration_density']:.3f}")
    Console().print(table)
