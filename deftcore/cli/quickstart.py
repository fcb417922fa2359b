"""The main job on an embedded default: fine-tune a small Llama to sparsity, then decode faster. No downloads.

The text is what every Python ships: library sources for the "pre-trained" model, the language reference of
`pydoc_data` for the fine-tuning. The model has few layers and a very wide MLP, so that weight traffic dominates
decoding, as it does in large models.
"""

import hashlib
import inspect
import json
import logging
import pkgutil
import shutil
import statistics
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from deftcore._files import cache_folder, replacing_file, write_json
from deftcore.methods.deft.files import save_sparse
from deftcore.methods.deft.objective import DensityLoss
from deftcore.methods.lora.merging import merge
from deftcore.models.decoding import greedy_decode
from deftcore.models.sparsify import sparsify
from deftcore.nn.linear import quantize as quantize_model
from deftcore.ops.quantized import QUANT_TYPES
from deftcore.training.data import Batches, Example, encode
from deftcore.training.fields import OutputFolder, Seed, Text, checked, one_of
from deftcore.training.loop import TrainResult, train
from deftcore.training.pipeline import save_adapter
from deftcore.training.recipe import TrainingConfig
from deftcore.training.wrapping import add_adapter

logger = logging.getLogger("deftcore")


@dataclass(frozen=True)
class Settings:
    """Sizes of the run. The defaults fit five minutes on two cores."""

    vocab_size: int = 2048
    hidden_size: int = 384
    intermediate_size: int = 12288
    num_layers: int = 2
    max_length: int = 128
    batch_size: int = 8
    base_steps: int = 150
    tune_steps: int = 70
    base_learning_rate: float = 2e-3
    tune_learning_rate: float = 2e-3
    lora_r: int = 16
    alpha: float = 1.0
    surrogate: str = "tanh"
    beta: float = 20.0
    base_characters: int = 2_000_000
    new_tokens: int = 48
    prompts: int = 3
    rounds: int = 3


def library_text(characters: int) -> str:
    """Sources of pure-Python standard modules, alphabetical, up to a number of characters."""
    parts, size = [], 0
    for module in sorted(pkgutil.iter_modules([str(Path(inspect.getsourcefile(json) or "").parents[1])]), key=str):
        if module.ispkg or module.name.startswith("_"):
            continue
        path = Path(inspect.getsourcefile(json) or "").parents[1] / f"{module.name}.py"
        if path.is_file() and size < characters:
            text = path.read_text(encoding="utf-8", errors="ignore")
            parts.append(text)
            size += len(text)
    return "\n".join(parts)[:characters]


def reference_text() -> tuple[str, str]:
    """The language reference of `pydoc_data`: training part and held-out part (every tenth topic)."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    held_out = set(names[::10])
    return "\n".join(topics[n] for n in names if n not in held_out), "\n".join(topics[n] for n in sorted(held_out))


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
    for name, alpha in (("LoRA", 0.0), ("LoRA + DEFT", settings.alpha)):
        console.print(f"[bold]Fine-tuning: {name}[/bold]")
        result, model = _tune(deepcopy(base), "lora", tokenizer, examples, settings, alpha, seed, folder, name)
        runs[name] = {**_evaluate(model, validation, settings), "seconds": result.seconds}
        models[name] = model.merge_and_unload()

    console.print("[bold]Decoding[/bold]")
    prompts = [torch.tensor([e["input_ids"][:32]]) for e in validation[: settings.prompts]]
    for name, model in models.items():
        runs[name] |= _decode_side_by_side(model, prompts, settings)
    four_bit = {}
    if quantize:
        name = "QLoRA + DEFT"
        console.print(f"[bold]Fine-tuning: {name}, base in {quantize}[/bold]")
        packed = quantize_model(deepcopy(base), quant_type=quantize)
        result, model = _tune(
            packed, "qlora", tokenizer, examples, settings, settings.alpha, seed, folder, name
        )  # fmt: skip
        runs[name] = {**_evaluate(model, validation, settings), "seconds": result.seconds}
        console.print("[bold]Decoding from 4 bits[/bold]")
        four_bit = _compare_4bit(model, prompts, settings, folder / "qlora-deft")
    report = {
        "settings": asdict(settings),
        "machine": _machine(),
        "base_cached": cached,
        "runs": runs,
        "density_ratio": runs["LoRA + DEFT"]["density"] / runs["LoRA"]["density"],
        "loss_ratio": runs["LoRA + DEFT"]["loss"] / runs["LoRA"]["loss"],
        "four_bit": four_bit,
        "seconds": time.perf_counter() - start,
    }
    write_json(folder / "report.json", report)
    _picture(report, folder / "quickstart.png")
    return report


def print_report(report: dict[str, Any], console: Console) -> None:
    """The report as a table."""
    table = Table(title="deftcore quickstart")
    for column in ("model", "loss", "density", "dense tok/s", "sparse tok/s", "speed-up", "same tokens"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, r in report["runs"].items():
        decoded = "dense_tokens_per_s" in r
        table.add_row(
            name, f"{r['loss']:.3f}", f"{100 * r['density']:.1f} %",
            f"{r['dense_tokens_per_s']:.0f}" if decoded else "",
            f"{r['sparse_tokens_per_s']:.0f}" if decoded else "",
            f"{r['speed_up']:.2f}x" if decoded else "",
            ("yes" if r["same_tokens"] else "NO") if decoded else "",
        )  # fmt: skip
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
    deft, lora = report["runs"]["LoRA + DEFT"], report["runs"]["LoRA"]
    console.print(
        f"DEFT cuts the density to {100 * report['density_ratio']:.0f} % of plain LoRA's "
        f"at {100 * (report['loss_ratio'] - 1):+.1f} % loss; the DEFT model decodes {deft['speed_up']:.2f}x as fast on "
        f"sparse kernels as on dense PyTorch (plain LoRA: {lora['speed_up']:.2f}x). {report['seconds']:.0f} s in all."
    )


def base_model(settings: Settings, seed: int, console: Console) -> tuple[Any, Any, bool]:
    """The "pre-trained" model and its tokenizer, from the cache or trained now."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    fields = asdict(settings)
    shape = {k: v for k, v in fields.items() if k.startswith("base_") or k in (
        "vocab_size", "hidden_size", "intermediate_size", "num_layers", "max_length", "batch_size")}  # fmt: skip
    text = library_text(settings.base_characters)
    key = hashlib.sha256(json.dumps([shape, seed, hashlib.sha256(text.encode()).hexdigest()]).encode()).hexdigest()[:16]
    folder = cache_folder() / f"quickstart-{key}"
    if (folder / "final" / "config.json").exists():
        console.print(f"Base model: cached in {folder}")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "final")
        return AutoModelForCausalLM.from_pretrained(folder / "final"), tokenizer, True
    console.print("[bold]Training the base model (once; it is cached)[/bold]")
    tokenizer = _tokenizer(text, settings.vocab_size)
    config = LlamaConfig(
        vocab_size=settings.vocab_size, hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size, num_hidden_layers=settings.num_layers,
        num_attention_heads=6, num_key_value_heads=2, hidden_act="relu", max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.generation_config.pad_token_id = 0
    examples = encode([{"text": text}], tokenizer, settings.max_length, is_encoder_decoder=False)
    training = TrainingConfig(
        max_steps=settings.base_steps, batch_size=settings.batch_size, learning_rate=settings.base_learning_rate,
        weight_decay=0.01, schedule="cosine", mixed_precision=_precision(), seed=seed,
    )  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)
    train(
        model, examples, training, folder, label="base model",
        save_model=lambda trained, where: save_adapter(trained, tokenizer, where),
    )  # fmt: skip
    return model, tokenizer, False


def _tokenizer(text: str, vocab_size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([text, reference_text()[0]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<eos>")


def _precision() -> str:
    """bf16 where the CPU multiplies it natively; autocast would only cost time elsewhere."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "no"


def _tune(
    base: nn.Module,
    method: str,
    tokenizer: Any,
    examples: list[Example],
    settings: Settings,
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
        max_steps=settings.tune_steps, batch_size=settings.batch_size, learning_rate=settings.tune_learning_rate,
        schedule="cosine", mixed_precision=_precision(), seed=seed,
    )  # fmt: skip
    folder = output / name.lower().replace(" + ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    result = train(
        model, examples, training, folder, objective=objective, label=name, resume=False,
        save_model=lambda trained, where: save_adapter(trained, tokenizer, where),
    )  # fmt: skip
    objective.detach()
    return result, model


@torch.no_grad()
def _evaluate(model: nn.Module, validation: list[Example], settings: Settings) -> dict[str, Any]:
    """Loss (nats per token), density and density per block on the held-out text, in float32."""
    objective = DensityLoss(model, alpha=0.0)
    model.eval()
    total, count = 0.0, 0
    for batch in Batches(validation, settings.batch_size, 0, False, shuffle=False).epoch(0):
        predicted = int((batch["labels"][:, 1:] != -100).sum())
        total += float(model(**batch).loss) * predicted
        count += predicted
    report = objective.report()
    objective.detach()
    return {"loss": total / count, "density": report["density"], "density_blocks": list(report["blocks"].values())}


def _decode_side_by_side(model: nn.Module, prompts: list[torch.Tensor], settings: Settings) -> dict[str, Any]:
    """Greedy decoding, dense PyTorch against sparse kernels."""
    model.eval()
    rate, same, error = _decode({"dense": model, "sparse": sparsify(deepcopy(model))}, prompts, settings)
    return {
        "dense_tokens_per_s": rate["dense"],
        "sparse_tokens_per_s": rate["sparse"],
        "speed_up": rate["sparse"] / rate["dense"],
        "same_tokens": same["sparse"],
        "largest_logit_difference": error["sparse"],
    }


def _decode(
    sides: dict[str, nn.Module], prompts: list[torch.Tensor], settings: Settings
) -> tuple[dict[str, float], dict[str, bool], dict[str, float]]:
    """Tokens per second of each side, alternating on the same prompts, medians; and whether a side's tokens are those
    of the first, and how far its logits are off."""
    for side in sides.values():  # warms up; the cost model measures its shapes here
        greedy_decode(side, prompts[0], 4)
    times: dict[str, list[float]] = {name: [] for name in sides}
    same, error = dict.fromkeys(sides, True), dict.fromkeys(sides, 0.0)
    first = next(iter(sides))
    for _ in range(settings.rounds):
        for prompt in prompts:
            found = {}
            for name, side in sides.items():
                start = time.perf_counter()
                found[name] = greedy_decode(side, prompt, settings.new_tokens)
                times[name].append(time.perf_counter() - start)
            for name, (tokens, logits) in found.items():
                same[name] &= bool(torch.equal(tokens, found[first][0]))
                error[name] = max(error[name], float((logits - found[first][1]).abs().max()))
    return {name: settings.new_tokens / statistics.median(t) for name, t in times.items()}, same, error


PEAK_MEMORY = """
import sys, torch
from deftcore.methods.deft.files import load_sparse
from deftcore.models.checkpoints import load_model
from deftcore.training.adapters import load_adapter
from deftcore.methods.lora.patch import patch
from deftcore.models.decoding import greedy_decode
kind, folder, *ids = sys.argv[1:]
model = {
    "idle": lambda: None,
    "float32": lambda: load_model(folder),
    "4-bit dense": lambda: patch(load_adapter(load_model(folder), folder + "/adapter")),
    "4-bit sparse": lambda: load_sparse(folder),
}[kind]()
if model is not None:
    greedy_decode(model, torch.tensor([[int(i) for i in ids]]), 8)
with open("/proc/self/status") as status:  # ru_maxrss would count the parent that forked this process
    print(next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024)
"""


def _compare_4bit(model: Any, prompts: list[torch.Tensor], settings: Settings, folder: Path) -> dict[str, Any]:
    """Size on disk, peak memory of a fresh process and speed of one fine-tuned model: float32, 4-bit, 4-bit sparse."""
    model.eval()
    folders = {"float32": folder / "float32", "4-bit dense": folder / "4-bit", "4-bit sparse": folder / "4-bit"}
    for path in set(folders.values()):
        shutil.rmtree(path, ignore_errors=True)
    dense = merge(deepcopy(model), to="16bit", dtype=torch.float32)
    dense.save_pretrained(folders["float32"])
    model.save_pretrained(folder / "adapter")
    save_sparse(deepcopy(model).unload(), folders["4-bit dense"], adapter=folder / "adapter")
    sides = {"4-bit dense": model, "4-bit sparse": sparsify(deepcopy(model)), "float32": dense}
    rate, same, error = _decode(sides, prompts, settings)
    ids = [str(i) for i in prompts[0][0].tolist()]
    peak = {}
    for kind in ("idle", *folders):
        command = [sys.executable, "-c", PEAK_MEMORY, kind, str(folders.get(kind, folder)), *ids]
        peak[kind] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    rows = {}
    for kind, path in folders.items():
        size = sum(file.stat().st_size for file in path.rglob("*.safetensors")) / 1e6
        rows[kind] = {"disk_mb": size, "peak_mb": peak[kind], "tokens_per_s": rate[kind]}
    return {
        "rows": rows,
        "idle_mb": peak["idle"],
        "same_tokens": same["4-bit sparse"],
        "same_tokens_as_float32": same["float32"],
        "largest_logit_difference": error["4-bit sparse"],
    }


def _machine() -> dict[str, Any]:
    from deftcore.ops.kernels import machine_name

    return {"name": machine_name(torch.empty(0)), "threads": torch.get_num_threads()}


def _picture(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    runs = report["runs"]
    colors = ["#9aa5b1", "#4c78a8", "#e4572e", "#72b7b2"]
    for i, (name, r) in enumerate(runs.items()):
        blocks = range(len(r["density_blocks"]))
        width = 0.8 / len(runs)
        left.bar(
            [b + width * (i - (len(runs) - 1) / 2) for b in blocks], r["density_blocks"], 0.93 * width, label=name,
            color=colors[i],
        )  # fmt: skip
    left.set(title="Active neurons per MLP block", xlabel="block", ylabel="density", xticks=list(blocks))
    left.legend(frameon=False)
    names = [n for n in runs if "speed_up" in runs[n]]
    for offset, side, color in ((-0.2, "dense", colors[0]), (0.2, "sparse", colors[2])):
        values = [runs[n][f"{side}_tokens_per_s"] for n in names]
        bars = right.bar([i + offset for i in range(len(names))], values, 0.38, label=side, color=color)
        right.bar_label(bars, fmt="%.0f")
    right.set(title="Decoding, tokens per second", xticks=range(len(names)), xticklabels=names)
    right.margins(y=0.15)
    right.legend(frameon=False)
    with replacing_file(path) as partial:
        figure.savefig(partial, dpi=150)
    plt.close(figure)
