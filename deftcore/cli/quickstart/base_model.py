"""The quickstart's "pre-trained" model: a small Llama, whose MLPs are widened once it is trained, so that reading
weights dominates decoding, as it does in large models. It learns what every Python ships, and is kept in the cache
folder.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from deftcore._files import cache_folder, write_json
from deftcore.cli.quickstart.measuring import evaluate
from deftcore.cli.quickstart.start import induction_room, start_from_bigrams, start_induction, steps_within, widen
from deftcore.cli.quickstart.texts import blocks, held_out, joined, library_text, reference_text
from deftcore.training.config import TrainingConfig
from deftcore.training.loop import train
from deftcore.training.saving import save_trained
from deftcore.training.text import TextTask

LEARNT = "learnt.json"  # in the cached base's folder, written last


@dataclass(frozen=True)
class Settings:
    """Sizes of the run."""

    vocab_size: int = 1024
    hidden_size: int = 384
    intermediate_size: int = 2048  # while the base trains
    widening: int = 2  # each neuron is cut into so many afterwards: reading weights is to dominate decoding
    num_layers: int = 2
    num_heads: int = 3
    max_length: int = 128
    batch_size: int = 8
    base_batch_size: int = 8
    base_steps: int = 0  # 0: as many as fit into base_seconds, by a few timed ones
    base_seconds: float = 55.0
    tune_steps: int = 0  # likewise, of each fine-tuning
    tune_seconds: float = 14.0
    least_steps: int = 24  # of each fine-tuning, however slow the machine
    base_learning_rate: float = 2e-3
    tune_learning_rate: float = 2e-3
    lora_r: int = 16
    alpha: float = 1.5
    surrogate: str = "tanh"
    beta: float = 20.0
    base_characters: int = 400_000  # about what the model reads in its time
    base_validation: int = 64  # blocks of max_length tokens
    validation: int = 32
    new_tokens: int = 48
    prompts: int = 2
    rounds: int = 2


@dataclass
class Base:
    """The model that is fine-tuned."""

    model: Any
    tokenizer: Any
    cached: bool = False
    learnt: dict[str, Any] = field(default_factory=dict)  # bits per byte of the text that it was trained on, held out


def base_model(settings: Settings, seed: int, console: Console) -> Base:
    """The "pre-trained" model and its tokenizer, from the cache or trained now."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    shape = {k: v for k, v in asdict(settings).items() if k.startswith("base_") or k in (
        "vocab_size", "hidden_size", "intermediate_size", "widening", "num_layers", "num_heads",
        "max_length")}  # fmt: skip
    text, other = library_text(settings.base_characters)
    key = hashlib.sha256(json.dumps([shape, seed, hashlib.sha256(text.encode()).hexdigest()]).encode()).hexdigest()[:16]
    folder = cache_folder() / f"quickstart-{key}"
    if (folder / LEARNT).exists():
        console.print(f"Base model: cached in {folder}")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "final")
        model: Any = AutoModelForCausalLM.from_pretrained(folder / "final")
        model.set_attn_implementation("eager")
        return Base(model, tokenizer, True, json.loads((folder / LEARNT).read_text()))
    console.print("[bold]Training the base model (once; it is cached)[/bold]")
    tokenizer = make_tokenizer(text, settings.vocab_size)
    config = LlamaConfig(
        vocab_size=settings.vocab_size, hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size, num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads, num_key_value_heads=settings.num_heads, hidden_act="relu",
        max_position_embeddings=512, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.generation_config.pad_token_id = 0
    examples = blocks(text, tokenizer, settings.max_length)
    room = induction_room(model)
    start_from_bigrams(model, joined(examples), room=room)
    if room:
        start_induction(model, seed)
    model.set_attn_implementation("eager")  # trains faster on CPUs
    few = TextTask().collate(examples[: settings.base_batch_size])
    steps = settings.base_steps or steps_within(
        model, few, settings.base_seconds, least=20, most=2000, mixed_precision=precision()
    )
    console.print(f"{steps} steps of {few['input_ids'].numel()} tokens (base_seconds={settings.base_seconds:g})")
    training = TrainingConfig(
        max_steps=steps, batch_size=settings.base_batch_size, learning_rate=settings.base_learning_rate,
        weight_decay=0.01, schedule="linear", mixed_precision=precision(), seed=seed,
    )  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)
    train(model, examples, training, folder, label="base model")
    unseen = held_out(other, tokenizer, settings.max_length, settings.base_validation)
    learnt = {
        "steps": steps,
        "bits_per_byte": unseen.bits_per_byte(evaluate(model, unseen.examples, settings.batch_size)["loss"]),
        "n_grams": unseen.by_counting(joined(examples), settings.vocab_size),
    }
    widen(model, settings.widening)
    save_trained(model, folder / "final", tokenizer)
    write_json(folder / LEARNT, learnt)
    return Base(model, tokenizer, False, learnt)


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
    """bf16 where the CPU multiplies it natively and PyTorch is not held to less; elsewhere autocast only costs time."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    native = "avx512_bf16" in flags or "amx_bf16" in flags
    return "bf16" if native and torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2") else "no"
