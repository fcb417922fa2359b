"""The main job: fine-tune a model to sparsity, then decode faster; on a small model made here, or on a given one.

The texts are what every Python ships: library sources for the "pre-trained" model, the language reference of
`pydoc_data` for the fine-tuning. Nothing is downloaded.
"""

import shutil
import time
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.console import Console

from deftcore._files import write_json
from deftcore.cli.quickstart.base_model import Settings, base_model, precision
from deftcore.cli.quickstart.decoding import compare_4bit, continued, decode_side_by_side
from deftcore.cli.quickstart.measuring import evaluate
from deftcore.cli.quickstart.real_model import check_real_model, real_model, remark
from deftcore.cli.quickstart.report import draw
from deftcore.cli.quickstart.start import steps_within
from deftcore.cli.quickstart.texts import blocks, held_out, joined, reference_text
from deftcore.methods.deft.objective import DensityLoss
from deftcore.models.families import family_of
from deftcore.nn.quantization import quantize as quantize_model
from deftcore.ops.quantized import QUANT_TYPES
from deftcore.training.config import TrainingConfig
from deftcore.training.data import Example
from deftcore.training.fields import OutputFolder, Seed, Text, checked, one_of
from deftcore.training.loop import TrainResult, train
from deftcore.training.saving import save_trained
from deftcore.training.text import TextTask
from deftcore.training.wrapping import add_adapter

REAL = Settings(least_steps=10, batch_size=4, tune_seconds=60.0, tune_learning_rate=1e-3, validation=24, new_tokens=32)
_PROMPT = 16  # tokens


@checked
def run(
    output: OutputFolder,
    settings: Settings | None = None,
    *,
    seed: Seed = 0,
    quantize: Annotated[Text, one_of("", *QUANT_TYPES)] = "",
    model: Text = "",
    activation: Annotated[Text, one_of("", "relu")] = "",
) -> dict[str, Any]:
    """Trains, compares and reports; returns the report that is also written to `output`/report.json.

    Args:
        settings: None: those of a model made here, or of a given one.
        quantize: a 4-bit type: DEFT also trains on a 4-bit base and is decoded from 4 bits, dense and sparse.
        model: a Transformers folder, a GGUF file or a hub id, instead of the small model that is made here.
        activation: what the given model's MLPs get instead of their own.

    Raises:
        FileNotFoundError, ImportError, ValueError: naming the argument, before weights are read.
    """
    if activation and not model:
        raise ValueError(f"activation: is for a given model (--model), got {activation!r}")
    if model:
        check_real_model(model, activation)
    settings = settings or (REAL if model else Settings())
    start = time.perf_counter()
    console = Console(stderr=True)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    found = real_model(model, activation, console) if model else base_model(settings, seed, console)
    base, tokenizer = found.model, found.tokenizer
    train_text, other_text = reference_text()
    examples = blocks(train_text, tokenizer, settings.max_length)
    unseen = held_out(other_text, tokenizer, settings.max_length, settings.validation)
    prompts = [torch.tensor([e["input_ids"][:_PROMPT]]) for e in unseen.examples[: settings.prompts]]
    runs: dict[str, dict[str, Any]] = {}
    samples = {"prompt": _text(tokenizer, prompts[0])}
    models: dict[str, Any] = {}

    def measured(name: str, model: Any, seconds: float = 0.0) -> None:
        console.print(f"[bold]Measuring: {name}[/bold]")
        of = evaluate(model, unseen.examples, settings.batch_size)
        runs[name] = {**of, "bits_per_byte": unseen.bits_per_byte(of["loss"]), "seconds": seconds}
        samples[name] = _text(tokenizer, continued(model, prompts[0], settings.new_tokens))

    measured("base", base)
    steps = settings.tune_steps or _steps(base, examples, settings, seed)
    console.print(f"{steps} steps of each fine-tuning (tune_seconds={settings.tune_seconds:g})")
    for name, alpha in (("LoRA", 0.0), ("LoRA + DEFT", settings.alpha)):
        console.print(f"[bold]Fine-tuning: {name}[/bold]")
        settled = replace(settings, alpha=alpha, tune_steps=steps)
        result, tuned = _tune(deepcopy(base), "lora", tokenizer, examples, settled, seed, folder, name)
        measured(name, tuned, result.seconds)
        models[name] = tuned.merge_and_unload()

    console.print("[bold]Decoding[/bold]")
    for name, merged in models.items():
        runs[name] |= decode_side_by_side(merged, prompts, settings)
    four_bit = {}
    if quantize:
        name = "QLoRA + DEFT"
        console.print(f"[bold]Fine-tuning: {name}, base in {quantize}[/bold]")
        packed = quantize_model(deepcopy(base), quant_type=quantize)
        settled = replace(settings, tune_steps=steps)
        result, tuned = _tune(packed, "qlora", tokenizer, examples, settled, seed, folder, name)
        measured(name, tuned, result.seconds)
        console.print("[bold]Decoding from 4 bits[/bold]")
        four_bit = compare_4bit(tuned, prompts, settings, folder / "qlora-deft")
    report = {
        "settings": asdict(settings),
        "machine": _machine(),
        "model": model,
        "remark": remark(base),
        "base": {"cached": found.cached, **found.learnt},
        "n_grams": unseen.by_counting(joined(examples), len(tokenizer)),
        "tune_steps": steps,
        "runs": runs,
        "samples": samples,
        "density_ratio": runs["LoRA + DEFT"]["density"] / runs["LoRA"]["density"],
        "loss_ratio": runs["LoRA + DEFT"]["loss"] / runs["LoRA"]["loss"],
        "four_bit": four_bit,
        "seconds": time.perf_counter() - start,
    }
    write_json(folder / "report.json", report)
    draw(report, folder / "quickstart.png")
    return report


def _text(tokenizer: Any, tokens: torch.Tensor) -> str:
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def _adapted(base: Any, method: str, settings: Settings, seed: int) -> Any:
    torch.manual_seed(seed)
    family = family_of(base)
    targets = (
        "all-linear" if family is None else [name for name in family.lora_targets if name not in ("k_proj", "o_proj")]
    )
    options = {"r": settings.lora_r, "lora_alpha": 2 * settings.lora_r, "target_modules": targets}
    return add_adapter(base, method, options)


def _steps(base: Any, examples: list[Example], settings: Settings, seed: int) -> int:
    batch = TextTask().collate(examples[: settings.batch_size])
    return steps_within(
        _adapted(deepcopy(base), "lora", settings, seed), batch, settings.tune_seconds, least=settings.least_steps,
        most=100, mixed_precision=precision(),
    )  # fmt: skip


def _tune(
    base: Any, method: str, tokenizer: Any, examples: list[Example], settings: Settings, seed: int, output: Path,
    name: str,
) -> tuple[TrainResult, Any]:  # fmt: skip
    model = _adapted(base, method, settings, seed)
    objective = DensityLoss(model, alpha=settings.alpha, surrogate=settings.surrogate, beta=settings.beta)
    training = TrainingConfig(
        max_steps=settings.tune_steps, batch_size=settings.batch_size, learning_rate=settings.tune_learning_rate,
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


def _machine() -> dict[str, Any]:
    from deftcore.ops.kernels import machine_name

    return {"name": machine_name(torch.empty(0)), "threads": torch.get_num_threads()}
