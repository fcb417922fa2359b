"""Token sequences from JSONL, CSV and plain text, and their batches."""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Example = dict[str, list[int]]  # "input_ids", and "labels" where they differ


def read_records(path: str | Path) -> list[dict[str, str]]:
    """Records of a .jsonl, .csv or text file (one record for a whole text file).

    Raises:
        FileNotFoundError: naming the file.
        ValueError: naming file and line, for lines that are not records, unknown endings and empty files.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data: no such file: {path}")
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            records = [dict(row) for row in csv.DictReader(file)]
    elif path.suffix == ".jsonl":
        records = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"data: {path}:{number} is not JSON: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(f"data: {path}:{number} must be an object, got {type(record).__name__}")
            records.append(record)
    elif path.suffix in (".txt", ".md", ""):
        records = [{"text": path.read_text(encoding="utf-8")}]
    else:
        raise ValueError(f"data: {path} must end in .jsonl, .csv or .txt")
    if not records or records == [{"text": ""}]:
        raise ValueError(f"data: {path} is empty")
    return records


def encode(
    records: Sequence[dict[str, str]], tokenizer: Any, max_length: int, *, is_encoder_decoder: bool
) -> list[Example]:
    """Examples for a language model.

    Records with `prompt` and `completion` become one example each, with the loss on the completion alone; records with
    `text` are joined and cut into blocks of max_length (decoder-only models).
    """
    if all("prompt" in r and "completion" in r for r in records):
        return [_pair(r, tokenizer, max_length, is_encoder_decoder) for r in records]
    missing = next((i for i, r in enumerate(records, 1) if not isinstance(r.get("text"), str)), None)
    if missing is not None:
        raise ValueError(
            f"data: record {missing} has neither `text` nor `prompt` and `completion`; "
            f"it has {', '.join(records[missing - 1])}"
        )
    if is_encoder_decoder:
        raise ValueError("data: an encoder-decoder model needs records with `prompt` and `completion`, got `text`")
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    stream = [token for r in records for token in [*_tokens(tokenizer, r["text"]), *end]]
    blocks = [stream[i : i + max_length] for i in range(0, len(stream), max_length)]
    return [{"input_ids": block} for block in blocks if len(block) > 1]


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _pair(record: dict[str, str], tokenizer: Any, max_length: int, is_encoder_decoder: bool) -> Example:
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    prompt = _tokens(tokenizer, str(record["prompt"]))
    completion = [*_tokens(tokenizer, str(record["completion"])), *end]
    if is_encoder_decoder:
        return {"input_ids": prompt[:max_length], "labels": completion[:max_length]}
    ids = (prompt + completion)[:max_length]
    return {"input_ids": ids, "labels": ([-100] * len(prompt) + completion)[:max_length]}


@dataclass(frozen=True)
class Batches:
    """Batches of examples in an order that depends on (seed, epoch) alone, so that any step can be returned to.

    With several processes each takes its share of every batch; a last batch that cannot be shared evenly is dropped.
    """

    examples: Sequence[Example]
    batch_size: int  # per process
    pad_token_id: int
    is_encoder_decoder: bool
    seed: int = 0
    shuffle: bool = True
    process: int = 0
    processes: int = 1

    def __len__(self) -> int:
        total = len(self.examples)
        whole, rest = divmod(total, self.batch_size * self.processes)
        return whole + (1 if rest >= self.processes else 0)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        """Batches `start`... of one epoch."""
        order = list(range(len(self.examples)))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(len(order), generator=generator).tolist()
        step = self.batch_size * self.processes
        for index in range(start, len(self)):
            batch = order[index * step : (index + 1) * step]
            share = len(batch) // self.processes
            yield self.collate([self.examples[i] for i in batch[self.process * share : (self.process + 1) * share]])

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Right-padded tensors: input_ids, attention_mask, labels (-100 where nothing is predicted)."""
        labels = [e.get("labels", e["input_ids"]) for e in examples]
        return {
            "input_ids": _pad([e["input_ids"] for e in examples], self.pad_token_id),
            "attention_mask": _pad([[1] * len(e["input_ids"]) for e in examples], 0),
            "labels": _pad(labels, -100),
        }


def _pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    length = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])
