"""The quickstart's "pre-trained" model: a small Llama with a very wide MLP, so that weight traffic dominates decoding,
as it does in large models. It learns what every Python ships, and is kept in the cache folder.
"""

import hashlib
import inspect
import json
import pkgutil
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from deftcore._files import cache_folder
from deftcore.cli.quickstart.start import start_from_bigrams, steps_within
from deftcore.training.config import TrainingConfig
from deftcore.training.data import encode
from deftcore.training.loop import train
from deftcore.training.saving import save_trained
from deftcore.training.text import TextTask


@dataclass(frozen=True)
class Settings:
    """Sizes of the run."""

    vocab_size: int = 2048
    hidden_size: int = 384
    intermediate_size: int = 12288
    num_layers: int = 2
    max_length: int = 128
    batch_size: int = 8
    base_steps: int = 0  # 0: as many as fit into base_seconds, by a few timed ones
    base_seconds: float = 60.0
    tune_steps: int = 0  # likewise, of each fine-tuning
    tune_seconds: float = 30.0
    base_learning_rate: float = 1e-3
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
    tokenizer = make_tokenizer(text, settings.vocab_size)
    config = LlamaConfig(
        vocab_size=settings.vocab_size, hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size, num_hidden_layers=settings.num_layers,
        num_attention_heads=6, num_key_value_heads=2, hidden_act="relu", max_position_embeddings=512,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.generation_config.pad_token_id = 0
    examples = encode([{"text": text}], tokenizer, settings.max_length, is_encoder_decoder=False)
    start_from_bigrams(model, torch.tensor([token for example in examples for token in example["input_ids"]]))
    few = TextTask().collate(examples[: settings.batch_size])
    steps = settings.base_steps or steps_within(
        model, few, settings.base_seconds, least=20, most=300, mixed_precision=precision()
    )
    console.print(f"{steps} steps of {few['input_ids'].numel()} tokens (base_seconds={settings.base_seconds:g})")
    training = TrainingConfig(
        max_steps=steps, batch_size=settings.batch_size, learning_rate=settings.base_learning_rate,
        weight_decay=0.01, schedule="cosine", mixed_precision=precision(), seed=seed,
    )  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)
    train(
        model, examples, training, folder, label="base model",
        save_model=lambda trained, where: save_trained(trained, where, tokenizer),
    )  # fmt: skip
    return model, tokenizer, False


def make_tokenizer(text: str, vocab_size: int) -> Any:
    """A byte-level BPE tokenizer trained on a text."""
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


def precision() -> str:
    """bf16 where the CPU multiplies it natively; autocast would only cost time elsewhere."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "no"
