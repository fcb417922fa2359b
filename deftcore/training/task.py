"""`Task`: the data that a model is trained on and the loss over it; and batches, which any task has."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from deftcore.training.config import DataConfig
from deftcore.training.fields import DataFile
from deftcore.training.saving import save_trained

Example = Mapping[str, Any]
Batch = dict[str, Tensor]


class Task:
    """One kind of data. The loop asks for batches, outputs and counts; a recipe also has it read files and models.

    A task gives at least `name`, `load_model`, `read`, `collate` and `predictions`; one with metrics gives
    `metric_names`, `counts` and `metrics` too.
    """

    name: ClassVar[str]  # what `task:` of a recipe says
    summary: ClassVar[str] = ""  # one line for `deftcore methods`
    config: ClassVar[type[DataConfig]] = DataConfig  # of the recipe's section `data:`
    model_types: ClassVar[Sequence[str]] = ()  # of config.json, of models that are not Transformers'
    source: ClassVar[Any] = DataFile  # the type of `data.train` and `data.validation`; another is DataPlace
    smallest: ClassVar[int] = 1  # examples that a batch must have to learn from: 2 under BatchNorm
    metric_names: Sequence[str] = ()  # what `metrics` gives

    # ------------------------------------------------------------------ files, for recipes

    @classmethod
    def empty_model(cls, path: str | os.PathLike) -> Any:
        """The model of a folder on the meta device, for checks; tasks of large models do it without reading weights.

        Raises:
            FileNotFoundError, ValueError: there is no such model.
        """
        return cls.load_model(path).to("meta")

    @classmethod
    def load_model(cls, path: str | os.PathLike, **options: Any) -> Any:
        """The model of a folder, on the CPU.

        Args:
            options: `dtype`, where the recipe asks for another than the stored one; `quantize`, for methods over 4-bit
                bases.
        """
        raise NotImplementedError

    @classmethod
    def base_of(cls, path: str | os.PathLike, trained: str | os.PathLike) -> Any:
        """The model that an adapter in the folder `trained`, which `save` wrote, goes on.

        Args:
            path: what the run was given as `model`.
        """
        return cls.load_model(path)

    @classmethod
    def of_model(cls, path: str | os.PathLike, model: Any) -> "Task":
        """The task for a model in a folder: with its tokenizer or the like.

        Args:
            model: as of `empty_model`.
        """
        return cls()

    def read(self, path: str | os.PathLike, config: Any) -> list[Any]:
        """The examples in a file.

        Raises:
            ValueError: naming the place in the file.
        """
        raise NotImplementedError

    def held_out(self, config: Any) -> list[Any] | None:
        """The examples to validate on, after `read` gave those to train on; None where there are none."""
        return self.read(config.validation, config) if config.validation else None

    def prepare(self, model: Any, config: Any) -> Any:
        """The model as the data need it, before a method wraps it: with an output for other classes, for example.
        Called for the empty model before data is read, and for the loaded one afterwards.

        Raises:
            ValueError: naming what of `data` does not fit.
        """
        return model

    def check(self, model: Any, examples: Sequence[Any]) -> None:
        """Raises ValueError for examples that the (empty) model cannot take."""

    def save(self, model: Any, folder: Path) -> None:
        """Writes what was trained, and what is needed beside it."""
        save_trained(model, folder)

    # ------------------------------------------------------------------ the loop

    def draw(self, example: Any, generator: torch.Generator, training: bool) -> Any:
        """The example as the model sees it: augmented, with what is drawn at random.

        Args:
            generator: depends on the seed, the epoch and the example's index alone; in an evaluation on the index
                alone. Whatever is drawn from another source makes a run that goes on another one.
            training: whether the model learns from it, or is evaluated on it.
        """
        return example

    def collate(self, examples: Sequence[Any]) -> Batch:
        """The batch of examples, on the CPU."""
        raise NotImplementedError

    def output(self, model: Any, batch: Batch) -> Any:
        """What the model returns for a batch: an object with `.loss`, the mean over the batch's predictions."""
        return model(**batch)

    def predictions(self, batch: Batch) -> int:
        """How many terms the mean of a batch's loss has; 0 leaves the loss out."""
        raise NotImplementedError

    def predicts(self, example: Any) -> bool:
        """Whether an example has anything to predict."""
        return True

    # ------------------------------------------------------------------ metrics, over validation examples

    def counts(self, batch: Batch, output: Any) -> Tensor:
        """What the metrics are made of, for one batch of an evaluation: sums over batches and processes must be the
        same thing for all of them. Of classes, `ConfusionCounts(...).add(labels, predictions).counts`."""
        raise NotImplementedError

    def metrics(self, counts: Tensor) -> dict[str, float]:
        """A number for each of `metric_names`, the higher the better, from the sum of `counts`; NaN where it is not
        defined."""
        raise NotImplementedError

    def report(self, model: Any, examples: Sequence[Any], counts: Tensor, folder: Path) -> None:
        """Writes what is to be seen of a run's last evaluation, pictures for one, into a new folder. Every process is
        asked, the first one's files count."""

    # ------------------------------------------------------------------ which data it was

    def digest(self, examples: Sequence[Any]) -> str:
        """Their number, and a short hash of all that they hold: numbers, arrays or tensors by name."""
        found = hashlib.sha256()
        for example in examples:
            for name, value in example.items():
                tensor = torch.as_tensor(value).cpu().contiguous()
                found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return described(examples, found.hexdigest())


def described(examples: Sequence[Any], digest: str) -> str:
    """How run.json names examples: their number, and the beginning of a digest of them."""
    return f"{len(examples)} examples, {digest[:16]}"


@dataclass(frozen=True)
class Batches:
    """Batches of examples in an order that depends on (seed, epoch) alone, so that any step can be returned to; so does
    what `draw` makes of an example, on (seed, epoch, index).

    With several processes each takes its share of every batch; a last batch in which a process would have fewer
    examples than `smallest` is left out. Shares may differ by one example.
    """

    examples: Sequence[Any]
    batch_size: int  # per process
    collate: Callable[[Sequence[Any]], Batch]
    seed: int = 0
    shuffle: bool = True  # they are to learn from
    draw: Callable[[Any, torch.Generator, bool], Any] | None = None  # `Task.draw`; None: examples are as they are
    process: int = 0
    processes: int = 1
    device: torch.device | str = "cpu"
    smallest: int = 1

    def __len__(self) -> int:
        step = self.batch_size * self.processes
        return (len(self.examples) - self.left_out + step - 1) // step

    @property
    def left_out(self) -> int:
        """Examples of an epoch that are in no batch."""
        rest = len(self.examples) % (self.batch_size * self.processes)
        return rest if rest < self.processes * self.smallest else 0

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches `start`... of one epoch, on the device."""
        order = list(range(len(self.examples)))
        if self.shuffle:
            order = torch.randperm(len(order), generator=self._generator(epoch)).tolist()
        step = self.batch_size * self.processes
        for index in range(start, len(self)):
            batch = order[index * step : (index + 1) * step]
            first, last = (len(batch) * p // self.processes for p in (self.process, self.process + 1))
            collated = self.collate([self._drawn(i, epoch) for i in batch[first:last]])
            yield {name: value.to(self.device) for name, value in collated.items()}

    def _drawn(self, index: int, epoch: int) -> Any:
        example = self.examples[index]
        if self.draw is None:
            return example
        place = (epoch, index) if self.shuffle else (0, index)
        return self.draw(example, self._generator(*place), self.shuffle)

    def _generator(self, *place: int) -> torch.Generator:
        found = self.seed
        for each in place:
            found = found * 1_000_003 + each
        return torch.Generator().manual_seed(found % 2**63)
