"""Language modelling: the task of a Transformers model with a tokenizer."""

import hashlib
import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from deftcore.models.checkpoints import load_model, load_tokenizer, own_adapter
from deftcore.models.preflight import check_lengths, empty_model
from deftcore.training.config import DataConfig
from deftcore.training.data import Example, encode, predicts
from deftcore.training.fields import OPTIONS, Length
from deftcore.training.records import read_records
from deftcore.training.saving import save_trained
from deftcore.training.task import Batch, Task, described


@dataclass(frozen=True, config=OPTIONS)
class TextData(DataConfig):
    """Files of records; see `deftcore.training.data`."""

    max_length: Length = 512
    chat: bool = False  # prompt and completion are messages for the tokenizer's chat template


class TextTask(Task):
    """Next tokens, or those of a decoder behind an encoder. A batch has input_ids, attention_mask and labels, each
    [B, K], padded on the right; labels are -100 where nothing is predicted.

    Args:
        pad_token_id: fills input_ids.
        is_encoder_decoder: labels are the decoder's own sequence, not the input's next tokens.
        tokenizer: for `read` and `save`.
    """

    name = "text"
    summary = "Next tokens of texts, of prompts' completions or of conversations, by a model of Transformers."
    config: ClassVar[type[TextData]] = TextData

    def __init__(self, pad_token_id: int = 0, is_encoder_decoder: bool = False, tokenizer: Any = None) -> None:
        self.pad_token_id, self.is_encoder_decoder, self.tokenizer = pad_token_id, is_encoder_decoder, tokenizer

    @classmethod
    def empty_model(cls, path: str | os.PathLike) -> Any:
        model = empty_model(path)
        if own_adapter(path):
            raise ValueError(f"model: {path} has an unmerged adapter beside it; export it with --merge first")
        return model

    @classmethod
    def load_model(cls, path: str | os.PathLike, **options: Any) -> Any:
        return load_model(path, **options)

    @classmethod
    def of_model(cls, path: str | os.PathLike, model: Any) -> "TextTask":
        tokenizer = load_tokenizer(path)
        return cls(tokenizer.pad_token_id or 0, model.config.is_encoder_decoder, tokenizer)

    def read(self, path: str | os.PathLike, config: TextData) -> list[Example]:
        options = {"is_encoder_decoder": self.is_encoder_decoder, "chat": config.chat}
        return encode(read_records(Path(path)), self.tokenizer, config.max_length, **options)

    def check(self, model: Any, examples: Sequence[Example]) -> None:
        check_lengths(model, examples)

    def save(self, model: Any, folder: Path) -> None:
        save_trained(model, folder, self.tokenizer)

    def collate(self, examples: Sequence[Example]) -> Batch:
        labels = [e.get("labels", e["input_ids"]) for e in examples]
        return {
            "input_ids": _padded([e["input_ids"] for e in examples], self.pad_token_id),
            "attention_mask": _padded([[1] * len(e["input_ids"]) for e in examples], 0),
            "labels": _padded(labels, -100),
        }

    def predictions(self, batch: Batch) -> int:
        labels = batch["labels"] if self.is_encoder_decoder else batch["labels"][:, 1:]  # shifted by one
        return int((labels != -100).sum())

    def predicts(self, example: Example) -> bool:
        return predicts(example, self.is_encoder_decoder)

    def digest(self, examples: Sequence[Example]) -> str:
        """Of all tokens and labels in their order."""
        found = hashlib.sha256()
        for example in examples:
            for ids in (example["input_ids"], example.get("labels", example["input_ids"])):
                found.update(array("q", [len(ids), *ids]).tobytes())
        return described(examples, found.hexdigest())


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    length = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])
