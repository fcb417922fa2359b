"""`deftcore density`."""

from typing import Any

from deftcore.cli import shared


@shared.command(
    example="deftcore density meta-llama/Llama-3.2-1B texts.jsonl --adapter runs/deft-lora/final --batch-size 8"
)
@shared.model_argument
@shared.data_argument
@shared.adapter_option
@shared.quantize_option("Load the base into 4 bits, as QLoRA trained on it.")
@shared.length_option(512)
@shared.batch_option
@shared.device_option()
def density(
    model: str, data: str, adapter: str, quantize: str | None, max_length: int, batch_size: int, device: str,
    as_json: bool,
) -> None:  # fmt: skip
    """Measure loss and activation density per block.

    MODEL is a Transformers folder, an exported folder, a GGUF file or a hub id; DATA a .jsonl, .csv or .txt file.
    The loss is in nats per token. The density is the share of neurons above tau, a mean over tokens and blocks: tau is
    0 where the activation has exact zeros (ReLU) and 0.00032 where it has none (SiLU, GELU), and under thresholds that
    lie beside the adapter or the model it is their mean. The mask policy exclude_padding says that tokens of padding do
    not count. What a recipe's task of classes left is measured over records as its recipe reads them; the
    loss is per text then.
    """
    shared.hush()
    shared.check_language_model(model)
    from deftcore.methods.deft.measure import measure_density

    report = measure_density(
        model, data, adapter=adapter, quantize=shared.quantize_options(quantize), max_length=max_length,
        batch_size=batch_size, device=device,
    )  # fmt: skip
    lines = [f"{name}: {value:.4f}" for name, value in report["blocks"].items()]
    lines += [f"{key}: {_shown(key, value)}" for key, value in report.items() if key != "blocks"]
    shared.show(as_json, report, [*lines, f"data: {data}"])


def _shown(key: str, value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if key == "tau" else f"{value:.4f}"
