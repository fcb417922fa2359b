"""Classes of texts, or of pairs of texts: the task of a Transformers encoder with an output per class."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BeforeValidator
from pydantic.dataclasses import dataclass
from torch import Tensor

from deftcore._files import read_record, write_json
from deftcore._processes import is_first_process
from deftcore.models.checkpoints import load_tokenizer
from deftcore.models.classifiers import class_names, empty_classifier, lacking, load_classifier, with_classes
from deftcore.models.preflight import check_lengths
from deftcore.training.config import DataConfig
from deftcore.training.fields import OPTIONS, Length, Needed, Text, record_of
from deftcore.training.metrics import ConfusionCounts
from deftcore.training.pictures import draw_confusion
from deftcore.training.records import read_records
from deftcore.training.saving import save_trained
from deftcore.training.task import Batch, Task

_FILE = "classes.json"
_log = logging.getLogger(__name__)

Names = Annotated[
    tuple[Needed, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) and value else value or ())
]


@dataclass(frozen=True, config=OPTIONS)
class ClassData(DataConfig):
    """Files of records: one text or two, and the class."""

    max_length: Length = 128  # tokens; longer texts are cut, of two the longer one first
    texts: Names = ()  # the field of the text, or those of the two; (): all fields but the label's
    label: Needed = "label"  # the field of the class: a name, or its number
    labels: Names = ()  # names of the classes in their order, or a JSON file that lists them; (): those of the data


@dataclass(frozen=True, config=OPTIONS)
class Classes:
    """What a trained classifier tells, and how it reads; stands beside it."""

    labels: tuple[Text, ...]
    max_length: Length

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the file."""
        write_json(Path(folder) / _FILE, asdict(self))

    @classmethod
    def of(cls, folder: str | os.PathLike) -> "Classes":
        """Of a folder.

        Raises:
            ValueError: it does not say, or the file is damaged.
        """
        found = read_record(folder, _FILE, partial(record_of, cls))
        if found is None:
            raise ValueError(f"model: {os.fspath(folder)} does not say which classes it tells, it has no {_FILE}")
        return found


def is_classifier(folder: str | os.PathLike) -> bool:
    """Whether a run over classes of texts left what a folder holds: a model, or an adapter of one."""
    return (Path(folder) / _FILE).is_file()


def refuse_classifier(model: str, adapter: str = "") -> None:
    """Raises ValueError, naming the argument, unless a model continues texts."""
    for name, folder in (("adapter", adapter), ("model", model)):
        if folder and is_classifier(folder):
            raise ValueError(
                f"{name}: must be of a language model, {folder} tells classes of texts ({_FILE}); deftcore density and "
                "deftcore.training.class_reader.ClassReader take it"
            )


class ClassificationTask(Task):
    """Classes of texts. A batch has the tokenizer's tensors [B, K], padded on the right, and labels [B].

    Args:
        tokenizer: of Transformers, with a padding token.
        labels: names of the classes that a model was trained for; none: the data's.
    """

    name = "classification"
    summary = "Classes of texts or of pairs of texts, by an encoder of Transformers."
    config: ClassVar[type[ClassData]] = ClassData
    metric_names: Sequence[str] = ("accuracy", "macro_f1", "f1", "matthews")

    def __init__(self, tokenizer: Any, labels: Sequence[str] = ()) -> None:
        self.tokenizer, self.labels = tokenizer, list(labels)
        self.max_length = ClassData.max_length
        self.untrained: list[str] = []  # weights that the model's files lack

    # ------------------------------------------------------------------ files

    @classmethod
    def empty_model(cls, path: str | os.PathLike) -> Any:
        return empty_classifier(path)

    @classmethod
    def load_model(cls, path: str | os.PathLike, **options: Any) -> Any:
        return load_classifier(path, **options)

    @classmethod
    def base_of(cls, path: str | os.PathLike, trained: str | os.PathLike) -> Any:
        model = _padding(cls.load_model(path), load_tokenizer(trained))
        return with_classes(model, Classes.of(trained).labels)

    @classmethod
    def of_model(cls, path: str | os.PathLike, model: Any) -> "ClassificationTask":
        tokenizer = load_tokenizer(path)
        if tokenizer.pad_token_id is None:
            raise ValueError(f"model: the tokenizer of {path} has no padding token, which batches of texts need")
        task = cls(tokenizer)
        task.untrained = lacking(path, model)
        return task

    def prepare(self, model: Any, config: ClassData) -> Any:
        """The model with an output for each class, once data were read."""
        _padding(model, self.tokenizer)
        if not self.labels:
            self.labels = _given(config.labels) or class_names(model)
        return with_classes(model, self.labels) if self.labels else model

    def read(self, path: str | os.PathLike, config: ClassData) -> list[dict[str, Any]]:
        records = read_records(Path(path))
        found = [_label(_field(record, config.label), record.where, config.label) for record in records]
        self.max_length = config.max_length
        self._take_labels(found, [record.where for record in records], named=bool(config.labels))
        fields = config.texts or tuple(field for field in records[0] if field != config.label)
        if len(fields) not in (1, 2):
            raise ValueError(
                f"data.texts: must name one field or two, got {', '.join(fields) or 'none'} from {records[0].where}"
            )
        examples, cut = [], 0
        for record, label in zip(records, found, strict=True):
            texts = [_text(_field(record, field), record.where, field) for field in fields]
            example = dict(self.tokenizer(*texts, verbose=False))
            if len(example["input_ids"]) > config.max_length:
                example, cut = dict(self.tokenizer(*texts, truncation=True, max_length=config.max_length)), cut + 1
            if not example["input_ids"]:
                raise ValueError(f"data: {record.where}: its texts have no token")
            examples.append({**example, "labels": self.labels.index(label)})
        if cut and is_first_process():
            _log.warning("data: %d of %d records cut to %d tokens", cut, len(records), config.max_length)
        return examples

    def _take_labels(self, found: list[str], places: list[str], *, named: bool) -> None:
        """Makes names of what stands in records, in place; the first file's are the classes where none were given."""
        if not self.labels:
            self.labels = sorted(
                set(found), key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name)
            )
        if len(self.labels) < 2:
            raise ValueError(f"data.labels: must be two classes or more, got {', '.join(self.labels)}")
        numbered = {str(i): name for i, name in enumerate(self.labels)}
        for i, name in enumerate(found):
            if name in self.labels:
                continue
            if name not in numbered:
                known = ", ".join(self.labels[:8]) + (" ..." if len(self.labels) > 8 else "")
                where = "data.labels" if named else "the model or the data to train on"
                raise ValueError(f"data: {places[i]}: no class {name!r}; {where} has {known}")
            found[i] = numbered[name]
        self.metric_names = tuple(each for each in type(self).metric_names if each != "f1" or len(self.labels) == 2)

    def check(self, model: Any, examples: Sequence[Mapping[str, Any]]) -> None:
        """Raises ValueError for texts that are too long, and where weights that the files lack would stay random."""
        check_lengths(model, examples)
        trained = {
            name.replace("modules_to_save.default.", "") for name, p in model.named_parameters() if p.requires_grad
        }
        if random := [name for name in self.untrained if name not in trained]:
            layers = ", ".join(dict.fromkeys(name.rpartition(".")[0].rpartition(".")[2] for name in random))
            raise ValueError(f"adapter.modules_to_save: must hold {layers}, which the model's files lack ({random[0]})")

    def save(self, model: Any, folder: Path) -> None:
        save_trained(model, folder, self.tokenizer)
        Classes(tuple(self.labels), self.max_length).save(folder)

    # ------------------------------------------------------------------ the loop

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> Batch:
        inputs = [{name: value for name, value in each.items() if name != "labels"} for each in examples]
        padded = self.tokenizer.pad(inputs, padding_side="right", return_tensors="pt", verbose=False)
        return {**padded, "labels": torch.tensor([each["labels"] for each in examples])}

    def predictions(self, batch: Batch) -> int:
        return len(batch["labels"])

    # ------------------------------------------------------------------ metrics

    def counts(self, batch: Batch, output: Any) -> Tensor:
        return ConfusionCounts(self.labels).add(batch["labels"], output.logits.argmax(-1)).counts

    def metrics(self, counts: Tensor) -> dict[str, float]:
        """`f1` is that of the second of two classes."""
        found = ConfusionCounts(self.labels).merge(counts)
        values = {name: getattr(found, name) for name in ("accuracy", "macro_f1", "matthews")}
        return values | ({"f1": float(found.f1()[1])} if len(self.labels) == 2 else {})

    def report(self, model: Any, examples: Sequence[Any], counts: Tensor, folder: Path) -> None:
        """The table of classes."""
        found = ConfusionCounts(self.labels).merge(counts)
        write_json(folder / "confusion.json", found.to_dict())
        draw_confusion(found, folder / "confusion.png", title=f"accuracy {found.accuracy:.3f}")


def _padding(model: Any, tokenizer: Any) -> Any:
    """The model with a padding token: decoders tell the class at the last token before it."""
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model


def _given(labels: tuple[str, ...]) -> list[str]:
    """The names of `data.labels`; those of a file where the one is a file's."""
    if len(labels) != 1:
        names: Any = list(labels)
    else:
        try:
            names = json.loads(Path(labels[0]).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"data.labels: {labels[0]} is no file of JSON that lists names: {error}") from error
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"data.labels: {labels[0]} must hold a list of names")
    if len(set(names)) < len(names):
        raise ValueError("data.labels: each class must have a name of its own")
    return names


def _field(record: Any, name: str) -> Any:
    if name not in record:
        raise ValueError(f"data: {record.where} has no field `{name}`; it has {', '.join(record)}")
    return record[name]


def _text(value: Any, where: str, field: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"data: {where}: `{field}` must be a string, got {type(value).__name__}")
    return value


def _label(value: Any, where: str, field: str) -> str:
    """A class as its name: numbers and flags as JSON writes them."""
    if isinstance(value, str) and value:
        return value
    if isinstance(value, int):
        return json.dumps(value)
    raise ValueError(f"data: {where}: `{field}` must be the name of a class or its number, got {json.dumps(value)}")
