"""The texts that every Python ships, and what they are to a model: tokens, and bits per byte."""

import inspect
import json
import math
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deftcore.cli.quickstart.ngrams import NGrams
from deftcore.training.data import Example, encode


def library_text(characters: int) -> tuple[str, str]:
    """Sources of pure-Python standard modules, alphabetical, up to a number of characters: training part and held-out
    part (every tenth module)."""
    parts: tuple[list[str], list[str]] = ([], [])
    size, folder = 0, Path(inspect.getsourcefile(json) or "").parents[1]
    names = sorted(m.name for m in pkgutil.iter_modules([str(folder)]) if not m.ispkg and not m.name.startswith("_"))
    for number, path in enumerate(p for p in (folder / f"{name}.py" for name in names) if p.is_file()):
        if size >= characters:
            break
        text = path.read_text(encoding="utf-8", errors="ignore")[: characters - size]
        parts[number % 10 == 9].append(text)
        size += len(text)
    return "\n".join(parts[0]), "\n".join(parts[1])


def reference_text() -> tuple[str, str]:
    """The language reference of `pydoc_data`: training part and held-out part (every tenth topic)."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    held_out = set(names[::10])
    return "\n".join(topics[n] for n in names if n not in held_out), "\n".join(topics[n] for n in sorted(held_out))


@dataclass(frozen=True)
class HeldOut:
    """The beginning of a held-out text as blocks of tokens, and how many of them stand for a byte."""

    examples: list[Example]
    tokens_per_byte: float

    @property
    def tokens(self) -> Tensor:
        return joined(self.examples)

    def bits_per_byte(self, nats: float) -> float:
        """Of a mean over tokens."""
        return nats * self.tokens_per_byte / math.log(2)

    def by_counting(self, tokens: Tensor, size: int) -> dict[str, float]:
        """Of an n-gram model of a training text's tokens: its order and its bits per byte here."""
        ngrams = NGrams(tokens, size)
        return {"order": ngrams.order, "bits_per_byte": self.bits_per_byte(float(ngrams.nats(self.tokens).mean()))}


def blocks(text: str, tokenizer: Any, length: int) -> list[Example]:
    return encode([{"text": text}], tokenizer, length, is_encoder_decoder=False)


def held_out(text: str, tokenizer: Any, length: int, most: int) -> HeldOut:
    """The first blocks of a text, at most so many."""
    examples = blocks(text, tokenizer, length)[:most]
    return HeldOut(
        examples,
        len(joined(examples)) / max(len(tokenizer.decode(joined(examples), skip_special_tokens=True).encode()), 1),
    )


def joined(examples: list[Example]) -> Tensor:
    return torch.tensor([token for example in examples for token in example["input_ids"]])
