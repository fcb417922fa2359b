"""A Mamba, a Mamba-2 and a Llama of equal size, pre-trained here on the same tokens, because no weights are at hand.

The text is half of the training rows of e2e_nlg and gsm8k and what Python says about itself: the topics of `pydoc` and
the docstrings of its standard library. The other halves are what `bench.evidence.mamba` tunes on.
"""

import ast
import json
import math
import shutil
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers

import deftcore
from bench.evidence.sets import SPECS, Row, read_rows
from deftcore._files import write_json
from deftcore.cli.quickstart.base_model import make_tokenizer
from deftcore.cli.quickstart.texts import HeldOut, blocks, held_out, reference_text
from deftcore.models.families import is_mamba
from deftcore.training import TrainingConfig, train
from deftcore.training.saving import save_trained
from deftcore.training.task import Batches
from deftcore.training.text import TextTask

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LEARNT = "learnt.json"  # in a model's folder, written last


@dataclass(frozen=True)
class Pretraining:
    """Sizes of the models, which all share, and of their training."""

    vocab_size: int = 2048
    width: int = 256
    length: int = 256
    batch_size: int = 4
    steps: int = 900
    rate: float = 3e-3
    documentation: int = 1_200_000  # characters
    measured: int = 24  # held-out blocks of each text


@dataclass(frozen=True)
class Kind:
    """An architecture.

    Args:
        name: in results.
        make: (sizes) to a model with random weights.
        color: in pictures.
    """

    name: str
    make: Callable[[Pretraining], Any]
    color: str


def _mamba(sizes: Pretraining) -> Any:
    config = transformers.MambaConfig(
        vocab_size=sizes.vocab_size, hidden_size=sizes.width, state_size=16, num_hidden_layers=6, pad_token_id=0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.MambaForCausalLM(config)


def _mamba2(sizes: Pretraining) -> Any:
    head = min(64, sizes.width)
    config = transformers.Mamba2Config(
        vocab_size=sizes.vocab_size, hidden_size=sizes.width, state_size=32, num_hidden_layers=6, head_dim=head,
        num_heads=2 * sizes.width // head, n_groups=1, tie_word_embeddings=True, chunk_size=64, pad_token_id=0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.Mamba2ForCausalLM(config)


def _llama(sizes: Pretraining) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=sizes.vocab_size, hidden_size=sizes.width, intermediate_size=2 * sizes.width, num_hidden_layers=4,
        num_attention_heads=4, tie_word_embeddings=True, max_position_embeddings=1024, pad_token_id=0, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


KINDS = (
    Kind("Mamba", _mamba, "#e4572e"),
    Kind("Mamba-2", _mamba2, "#4c78a8"),
    Kind("Llama", _llama, "#2e8b57"),
)


# ---------------------------------------------------------------------------- texts


def docstrings(characters: int) -> tuple[str, str]:
    """Docstrings of the standard library's modules, alphabetically, up to so many characters: training part and
    held-out part (every tenth module)."""
    parts: tuple[list[str], list[str]] = ([], [])
    size = number = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[!_]*.py")):
        with suppress(SyntaxError):
            found = "\n\n".join(_docstrings_of(path))[: characters - size]
            if found:
                parts[number % 10 == 9].append(found)
                size, number = size + len(found), number + 1
        if size >= characters:
            break
    return "\n\n".join(parts[0]), "\n\n".join(parts[1])


def _docstrings_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="ignore"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
            yield text if isinstance(node, ast.Module) else f"{node.name}\n{text}"


@dataclass(frozen=True)
class Texts:
    """The texts of a folder of data sets.

    Args:
        folder: with e2e_nlg and gsm8k.
        sizes: of the training.
    """

    folder: Path
    sizes: Pretraining

    def halves(self, name: str) -> tuple[list[Row], list[Row]]:
        """Training rows of a set: those to pre-train on, those to tune on. No meaning representation is in both."""
        rows = read_rows(self.folder / name / "train.jsonl")
        border = len(rows) // 2
        while 0 < border < len(rows) and "mr" in rows[0] and rows[border]["mr"] == rows[border - 1]["mr"]:
            border += 1
        return rows[:border], rows[border:]

    @cached_property
    def parts(self) -> dict[str, tuple[str, str]]:
        """Training text and held-out text by name."""
        topics, other = reference_text()
        more, other_more = docstrings(max(self.sizes.documentation - len(topics) - len(other), 1000))
        found = {"documentation": (f"{topics}\n\n{more}"[: self.sizes.documentation], f"{other}\n\n{other_more}")}
        for name, unseen in (("e2e_nlg", "validation"), ("gsm8k", "test")):
            rows = read_rows(self.folder / name / f"{unseen}.jsonl")
            found[name] = (self._text(name, self.halves(name)[0]), self._text(name, rows))
        return found

    def _text(self, name: str, rows: Sequence[Row]) -> str:
        return "\n\n".join("".join(SPECS[name].texts(row)) for row in rows)

    @cached_property
    def tokenizer(self) -> Any:
        """Trained on the training texts; it pads on the left, as generation needs."""
        found = make_tokenizer("\n\n".join(text for text, _ in self.parts.values()), self.sizes.vocab_size)
        found.padding_side = "left"
        return found

    def training(self) -> list[Any]:
        """Blocks of all training texts."""
        each = (blocks(text, self.tokenizer, self.sizes.length) for text, _ in self.parts.values())
        return [block for found in each for block in found if len(block["input_ids"]) == self.sizes.length]

    def held_out(self) -> dict[str, HeldOut]:
        """Blocks of each held-out text."""
        sizes = self.sizes
        return {
            name: held_out(text, self.tokenizer, sizes.length, sizes.measured) for name, (_, text) in self.parts.items()
        }


# ---------------------------------------------------------------------------- models


@contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """The precision that a model runs in."""
    with torch.autocast("cpu", DTYPES[precision] if precision != "no" else None, enabled=precision != "no"):
        yield


@torch.no_grad()
def loss_of(model: Any, examples: Sequence[Any], precision: str = "no") -> float:
    """Mean loss over what examples predict, nats a token."""
    task, total, count = TextTask(), 0.0, 0
    model.eval()
    ordered = sorted(examples, key=lambda each: len(each["input_ids"]))
    for batch in Batches(ordered, 8, task.collate, shuffle=False).epoch(0):
        with arithmetic(precision):
            loss = float(model(**batch).loss)
        total, count = total + loss * task.predictions(batch), count + task.predictions(batch)
    return total / count


def native(model: Any) -> Any:
    """A model on deftcore's kernels, where it has a Mamba mixer; a Llama without adapters has nothing to patch."""
    return deftcore.patch(model) if is_mamba(model) else model


def pretrain(kind: Kind, texts: Texts, cache: Path) -> dict[str, Any]:
    """Trains a model where `cache` does not hold it; what it learnt: steps, tokens, seconds, bits per byte.

    Raises:
        ValueError: the folder holds a model of other sizes.
    """
    folder, sizes = cache / kind.name.lower(), texts.sizes
    if (folder / LEARNT).exists():
        found = json.loads((folder / LEARNT).read_text())
        if found["sizes"] != vars(sizes):
            raise ValueError(f"cache: {folder} holds a model of other sizes, {found['sizes']}")
        return found
    torch.manual_seed(0)
    model = native(kind.make(sizes))
    config = TrainingConfig(
        max_steps=sizes.steps, batch_size=sizes.batch_size, learning_rate=sizes.rate, weight_decay=0.01,
        schedule="cosine", warmup_ratio=0.05, mixed_precision="bf16", log_every=25, save_every=150,
    )  # fmt: skip
    start, examples = time.process_time(), texts.training()
    result = train(model, examples, config, folder / "run", label=kind.name)
    found = {
        "sizes": vars(sizes), "steps": sizes.steps, "tokens": sizes.steps * sizes.batch_size * sizes.length,
        "text_tokens": len(examples) * sizes.length, "cpu_s": time.process_time() - start,
        "parameters": sum(p.numel() for p in model.parameters()), "train_loss": result.train_loss,
        "bits_per_byte": {name: each.bits_per_byte(loss_of(model, each.examples))
                          for name, each in texts.held_out().items()},
    }  # fmt: skip
    if not math.isfinite(result.train_loss):
        raise ValueError(f"{kind.name}: its pre-training diverged")
    save_trained(model, folder / "final", texts.tokenizer)
    write_json(folder / LEARNT, found)
    shutil.rmtree(folder / "run")
    return found


def load(kind: Kind, cache: Path) -> Any:
    """A pre-trained model, in float32 and on Transformers' own modules.

    Raises:
        FileNotFoundError: it has not been trained yet.
    """
    folder = cache / kind.name.lower()
    if not (folder / LEARNT).exists():
        raise FileNotFoundError(f"cache: {folder} holds no {kind.name}; run with --only pretraining first")
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "final", dtype=torch.float32)
