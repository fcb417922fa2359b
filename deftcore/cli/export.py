"""`deftcore export`."""

import click

from deftcore.cli import shared


@shared.command(example="deftcore export meta-llama/Llama-3.2-1B sparse --adapter runs/deft-qlora/final --quantize nf4")
@shared.model_argument
@click.argument("output")
@shared.adapter_option
@click.option(
    "--skip",
    type=shared.Listed(str),
    default=[],
    show_default="none",
    metavar="BLOCK,...",
    help="MLP blocks to leave out, by name, as model.layers.0.mlp.",
)
@shared.quantize_option("Put the base into 4 bits. LoRA stays unmerged beside it; S2FT is merged into dense weights.")
@click.option(
    "--merge", type=click.Choice(["16bit", "4bit"]), show_default="no", help="Merge an adapter over a 4-bit base."
)
@click.option(
    "--lora", is_flag=True, help="Write a KaSA or BA-LoRA adapter alone, as LoRA that PEFT loads without deftcore."
)
@shared.device_option()
def export(
    model: str, output: str, adapter: str, skip: list[str], quantize: str | None, merge: str | None, lora: bool,
    device: str, as_json: bool,
) -> None:  # fmt: skip
    """Merge an adapter and write a folder for sparse inference.

    MODEL is a Transformers folder, GGUF file or hub id, OUTPUT a new folder, which `deftcore generate` and
    `deftcore.load_sparse` open. MODEL may be a folder of deftcore's own as well, of a point cloud transformer or a
    TSViT: its adapter is merged and nothing else, OUTPUT is what `model` of a recipe, and `deftcore map`, take.
    """
    shared.hush()
    from deftcore.training.registry import task_of

    if (task := task_of(model)) is not None:
        from deftcore.training.exporting import export_own

        for name, value in (("skip", skip), ("merge", merge), ("quantize", quantize), ("lora", lora)):
            if value:
                raise ValueError(f"{name}: is not for a model of {task.name}, got {value!r}")
        shared.show(as_json, export_own(model, output, adapter=adapter), [f"{output}: adapter merged"])
        return
    if lora:
        from deftcore.methods.lora import exporting

        for name, value in (("skip", skip), ("merge", merge)):
            if value:
                raise ValueError(f"{name}: is not for --lora, which writes the adapter alone, got {value!r}")
        result = exporting.export(
            model, output, adapter=adapter, quantize=shared.quantize_options(quantize), device=device
        )  # fmt: skip
        shared.show(as_json, result, [f"{output}: LoRA of rank {result['rank']}"])
        return
    from deftcore.methods.deft import export as sparse

    result = sparse.export(
        model, output, adapter=adapter, skip=tuple(skip), quantize=shared.quantize_options(quantize), merge=merge or "",
        device=device,
    )  # fmt: skip
    weights = f"{result['weights']} weights"
    if result["merged_adapter"]:
        weights = f"adapter merged into {weights}"
    elif result["unmerged_adapter"]:
        weights = f"adapter unmerged beside {weights}"
    counts = f"{len(result['blocks'])} blocks, {len(result['skipped'])} skipped"
    shared.show(as_json, result, [f"{output}: {counts}; {weights}"])
