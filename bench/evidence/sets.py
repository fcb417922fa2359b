"""Data sets as examples of a task: a folder per set, with JSON lines, as their README says."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bench.evidence.models import MINILM, SMOLLM2, Base
from deftcore.training import encode
from deftcore.training.task import Batch, Task
from deftcore.training.text import TextTask

Row = dict[str, Any]


def read_rows(file: Path) -> list[Row]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


class ClassTask(Task):
    """Texts, or pairs of texts, and their class. A batch has the tokenizer's tensors and labels [B]."""

    name = "classes"

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length

    def encode(self, texts: Sequence[str], label: int) -> Row:
        """An example of one text or two."""
        return {**self.tokenizer(*texts, truncation=True, max_length=self.max_length), "labels": label}

    def collate(self, examples: Sequence[Any]) -> Batch:
        """The batch of examples, padded on the right."""
        inputs = [{name: value for name, value in each.items() if name != "labels"} for each in examples]
        padded = self.tokenizer.pad(inputs, return_tensors="pt")
        return {**padded, "labels": torch.tensor([each["labels"] for each in examples])}

    def predictions(self, batch: Batch) -> int:
        """One a text."""
        return len(batch["labels"])


@dataclass(frozen=True)
class Spec:
    """How a set is used.

    Args:
        base: the model.
        held_out: the file of rows that are only measured on.
        texts: of a row, what the model reads: one text or two; of text sets prompt and completion.
        classes: 0: a text set.
        max_length: tokens; longer examples of text sets are left out, of classes cut.
        longest: of held-out examples of text sets, that are left out beyond.
        batch_size, steps, tries: of a run, and the steps of a run that only finds a learning rate.
        tuning, test: examples that rates are chosen by, from the end of the training rows, and held-out ones.
        references: (rows) to what is generated for and compared with, by prompt.
        generated: prompts, and new tokens at most.
        every_seed: whether it is generated in every run; false: for seed 0.
    """

    name: str
    base: Base
    held_out: str
    texts: Callable[[Row], tuple[str, ...]]
    classes: int = 0
    max_length: int = 64
    longest: int = 96
    batch_size: int = 4
    steps: int = 12
    tries: int = 4
    tuning: int = 16
    test: int = 24
    references: Callable[[list[Row]], dict[str, list[str]]] | None = None
    generated: tuple[int, int] = (12, 32)
    every_seed: bool = True


def _sentence(row: Row) -> tuple[str, ...]:
    return (row["sentence"],)


def _e2e(row: Row) -> tuple[str, ...]:
    return f"Restaurant: {row['mr']}\nText:", " " + row["ref"]


def _e2e_references(rows: list[Row]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(_e2e(row)[0], []).append(row["ref"])
    return found


def _gsm8k(row: Row) -> tuple[str, ...]:
    return f"Question: {row['question']}\nAnswer:", " " + row["answer"]


SPECS = {
    spec.name: spec
    for spec in (
        Spec("e2e_nlg", SMOLLM2, "test", _e2e, references=_e2e_references, steps=32, tries=8, test=32,
             generated=(24, 32)),
        Spec("gsm8k", SMOLLM2, "test", _gsm8k, max_length=128, longest=160, batch_size=2, steps=20, tries=5,
             references=lambda rows: {_gsm8k(row)[0]: [row["final"]] for row in rows}, generated=(12, 72),
             every_seed=False),
        Spec("mr_sentiment", MINILM, "validation", _sentence, classes=2, batch_size=16, steps=96, tries=96, tuning=100,
             test=600, max_length=48),
        Spec("banking77", MINILM, "test", lambda row: (row["text"],), classes=77, batch_size=16, steps=144, tries=144,
             tuning=154, test=600, max_length=64),
        Spec("qnli", MINILM, "validation", lambda row: (row["question"], row["sentence"]), classes=2, batch_size=16,
             steps=64, tries=64, tuning=100, test=400, max_length=80),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Data:
    """A set of a folder, read when first asked for; the same rows in every run."""

    spec: Spec
    folder: Path

    @cached_property
    def task(self) -> Task:
        """What the loop trains on."""
        tokenizer = self.spec.base.tokenizer()
        if self.spec.classes:
            return ClassTask(tokenizer, self.spec.max_length)
        return TextTask(tokenizer.pad_token_id or 0, tokenizer=tokenizer)

    @cached_property
    def _training(self) -> list[Any]:
        rows = read_rows(self.folder / self.spec.name / "train.jsonl")
        if self.spec.classes:  # some files are sorted by class; in text sets neighbours share a prompt
            random.Random(0).shuffle(rows)
        return self.examples(rows, self.spec.max_length)

    @cached_property
    def held_out(self) -> list[Row]:
        """The rows to measure on, in an order that mixes."""
        rows = read_rows(self.folder / self.spec.name / f"{self.spec.held_out}.jsonl")
        random.Random(0).shuffle(rows)
        return rows

    @property
    def train(self) -> list[Any]:
        """Examples to train on."""
        return self._training[: -self.spec.tuning]

    @property
    def tuning(self) -> list[Any]:
        """Examples to choose a learning rate by."""
        return self._training[-self.spec.tuning :]

    @cached_property
    def test(self) -> list[Any]:
        """Held-out examples."""
        return self.examples(self.held_out[: 2 * self.spec.test], self.spec.longest)[: self.spec.test]

    @cached_property
    def references(self) -> dict[str, list[str]]:
        """Prompts of the held-out rows, and what is right."""
        found = self.spec.references(self.held_out) if self.spec.references else {}
        return dict(list(found.items())[: self.spec.generated[0]])

    def examples(self, rows: Sequence[Row], longest: int) -> list[Any]:
        """Rows as the task has them; of texts those of at most so many tokens."""
        spec, task = self.spec, self.task
        if isinstance(task, ClassTask):
            return [task.encode(spec.texts(row), row["label"]) for row in rows]
        pairs = [dict(zip(("prompt", "completion"), spec.texts(row), strict=True)) for row in rows]
        found = encode(pairs, spec.base.tokenizer(), longest + 1, is_encoder_decoder=False)
        return [each for each in found if len(each["input_ids"]) <= longest]

    def model(self) -> Any:
        """A copy of its own of the pre-trained model."""
        return self.spec.base.fresh(self.spec.classes)


def sentences(file: Path, field: str, count: int) -> list[str]:
    """Different texts of a file, drawn once for all."""
    rows = read_rows(file)
    random.Random(1).shuffle(rows)
    return list(dict.fromkeys(row[field] for row in rows))[:count]


def elsewhere(data: Data, count: int = 12) -> list[str]:
    """Texts of another domain than a set's: of an encyclopaedia, or where it has those, of restaurants."""
    name = "e2e_nlg" if data.spec.name == "qnli" else "qnli"
    return sentences(data.folder / name / "validation.jsonl", "ref" if name == "e2e_nlg" else "sentence", count)
