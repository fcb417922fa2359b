"""The main job on an embedded default: fine-tune a small model to sparsity, then decode faster. No downloads.

The texts are what every Python ships: library sources for the "pre-trained" model, the language reference of
`pydoc_data` for the fine-tuning.
"""

import shutil
import time
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.console import Console
from torch import nn

from deftcore._files import write_json
from deftcore.cli.quickstart.base_model import Settings, base_model, precision, reference_text
from deftcore.cli.quickstart.decoding import compare_4bit, decode_side_by_side
from deftcore.cli.quickstart.report import draw
from deftcore.cli.quickstart.start import steps_within
from deftcore.methods.deft.objective import DensityLoss
from deftcore.nn.quantization import quantize as quantize_model
from deftcore.ops.quantized import QUANT_TYPES
from deftcore.training.config import TrainingConfig
from deftcore.training.data import Example, encode
from deftcore.training.fields import OutputFolder, Seed, Text, checked, one_of
from deftcore.training.loop import TrainResult, train
from deftcore.training.saving import save_trained
from deftcore.training.task import Batches
from deftcore.training.text import TextTask
from deftcore.training.wrapping import add_adapter


@checked
def run(
    output: OutputFolder,
    settings: Settings | None = None,
    *,
    seed: Seed = 0,
    quantize: Annotated[Text, one_of("", *QUANT_TYPES)] = "",
) -> dict[str, Any]:
    """Trains, compares and reports; returns the report that is also written to `output`/report.json.

    With `quantize`, a 4-bit type, DEFT also trains on a 4-bit base and is decoded from 4 bits, dense and sparse.
    """
    settings = settings or Settings()
    start = time.perf_counter()
    console = Console(stderr=True)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    base, tokenizer, cached = base_model(settings, seed, console)
    train_text, held_out = reference_text()
    length = settings.max_length
    examples = encode([{"text": train_text}], tokenizer, length, is_encoder_decoder=False)
    validation = encode([{"text": held_out}], tokenizer, length, is_encoder_decoder=False)[:64]

    runs: dict[str, dict[str, Any]] = {}
    models: dict[str, Any] = {}
    before = _evaluate(base, validation, settings)
    runs["base"] = before
    steps = settings.tune_steps or steps_within(
        deepcopy(base), TextTask().collate(examples[: settings.batch_size]), settings.tune_seconds,
        least=30, most=100, mixed_precision=precision(),
    )  # fmt: skip
    console.print(f"{steps} steps of each fine-tuning (tune_seconds={settings.tune_seconds:g})")
    for name, alpha in (("LoRA", 0.0), ("LoRA + DEFT", settings.alpha)):
        console.print(f"[bold]Fine-tuning: {name}[/bold]")
        result, model = _tune(deepcopy(base), "lora", tokenizer, examples, settings, steps, alpha, seed, folder, name)
        runs[name] = {**_evaluate(model, validation, settings), "seconds": result.seconds}
        models[name] = model.merge_and_unload()

    console.print("[bold]Decoding[/bold]")
    prompts = [torch.tensor([e["input_ids"][:32]]) for e in validation[: settings.prompts]]
    for name, model in models.items():
        runs[name] |= decode_side_by_side(model, prompts, settings)
    four_bit = {}
    if quantize:
        name = "QLoRA + DEFT"
        console.print(f"[bold]Fine-tuning: {name}, base in {quantize}[/bold]")
        packed = quantize_model(deepcopy(base), quant_type=quantize)
        result, model = _tune(
            packed, "qlora", tokenizer, examples, settings, steps, settings.alpha, seed, folder, name
        )  # fmt: skip
        runs[name] = {**_evaluate(model, validation, settings), "seconds": result.seconds}
        console.print("[bold]Decoding from 4 bits[/bold]")
        four_bit = compare_4bit(model, prompts, settings, folder / "qlora-deft")
    report = {
        "settings": asdict(settings),
        "machine": _machine(),
        "base_cached": cached,
        "tune_steps": steps,
        "runs": runs,
        "density_ratio": runs["LoRA + DEFT"]["density"] / runs["LoRA"]["density"],
        "loss_ratio": runs["LoRA + DEFT"]["loss"] / runs["LoRA"]["loss"],
        "four_bit": four_bit,
        "seconds": time.perf_counter() - start,
    }
    write_json(folder / "report.json", report)
    draw(report, folder / "quickstart.png")
    return report


def _tune(
    base: nn.Module,
    method: str,
    tokenizer: Any,
    examples: list[Example],
    settings: Settings,
    steps: int,
    alpha: float,
    seed: int,
    output: Path,
    name: str,
) -> tuple[TrainResult, Any]:
    torch.manual_seed(seed)
    targets = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    options = {"r": settings.lora_r, "lora_alpha": 2 * settings.lora_r, "target_modules": targets}
    model = add_adapter(base, method, options)
    objective = DensityLoss(model, alpha=alpha, surrogate=settings.surrogate, beta=settings.beta)
    training = TrainingConfig(
        max_steps=steps, batch_size=settings.batch_size, learning_rate=settings.tune_learning_rate,
        schedule="cosine", mixed_precision=precision(), seed=seed,
    )  # fmt: skip
    folder = output / name.lower().replace(" + ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    result = train(
        model, examples, training, folder, objective=objective, label=name, resume=False,
        save_model=lambda trained, where: save_trained(trained, where, tokenizer),
    )  # fmt: skip
    objective.detach()
    return result, model


@torch.no_grad()
def _evaluate(model: nn.Module, validation: list[Example], settings: Settings) -> dict[str, Any]:
    """Loss (nats per token), density and density per block on the held-out text, in float32."""
    objective = DensityLoss(model, alpha=0.0)
    model.eval()
    total, count = 0.0, 0
    task = TextTask()
    for batch in Batches(validation, settings.batch_size, task.collate, shuffle=False).epoch(0):
        predicted = task.predictions(batch)
        total += float(model(**batch).loss) * predicted
        count += predicted
    report = objective.report()
    objective.detach()
    return {"loss": total / count, "density": report["density"], "density_blocks": list(report["blocks"].values())}


def _machine() -> dict[str, Any]:
    from deftcore.ops.kernels import machine_name

    return {"name": machine_name(torch.empty(0)), "threads": torch.get_num_threads()}
