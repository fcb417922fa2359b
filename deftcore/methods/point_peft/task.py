"""`points`: the class of a cloud."""

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn.functional import cross_entropy

from deftcore._files import write_json
from deftcore.methods.point_peft.attention import attention_to_points, patches_of
from deftcore.methods.point_peft.augment import augment, choose_points
from deftcore.methods.point_peft.backbone import PointTransformer
from deftcore.methods.point_peft.classifier import PointClassifier
from deftcore.methods.point_peft.data import (
    CloudSet,
    as_stored,
    class_names,
    farthest_first,
    has_test,
    read_clouds,
    unit_ball,
)
from deftcore.methods.point_peft.formats import SURFACE
from deftcore.methods.point_peft.predicting import CloudReader, Clouds, with_head
from deftcore.methods.point_peft.pretraining import PointMae
from deftcore.models.own import load_own
from deftcore.training.adapters import load_adapter
from deftcore.training.config import DataConfig
from deftcore.training.fields import OPTIONS, Count, DataPlace, NonNegative, Positive
from deftcore.training.metrics import ConfusionCounts
from deftcore.training.pictures import draw_cloud, draw_confusion
from deftcore.training.saving import save_trained
from deftcore.training.task import Batch, Task

_SHOWN = 3  # classes of which a cloud is drawn
MODELS = (PointClassifier, PointMae, PointTransformer)  # that a run may begin with


@dataclass(frozen=True, config=OPTIONS)
class PointData(DataConfig):
    """Sets of clouds, see `deftcore.methods.point_peft.data`, and how they are changed before a model learns from them.
    Where `validation` is empty and `train` has a part to test on, that is it."""

    points: Count = 1024  # of a cloud, that the model sees
    normalize: bool = True  # into the unit ball
    rotate: bool = False  # about y
    scale: tuple[Positive, Positive] = (2 / 3, 3 / 2)  # the least and the largest factor, drawn for each axis
    shift: NonNegative = 0.2  # the largest, along each axis


@dataclass(frozen=True, config=OPTIONS)
class LabelledPointData(PointData):
    """Sets of clouds with classes."""

    votes: Count = 1  # views of a validation cloud whose logits are averaged: the plain one, and changed ones


class CloudTask(Task):
    """What tasks over clouds share. An example has `points` as `farthest_first` gives them: its first points are those
    to evaluate on."""

    config: ClassVar[type[PointData]] = PointData
    source = DataPlace
    model_types = tuple(kind.config_class.model_type for kind in MODELS)
    smallest = 2  # under BatchNorm one cloud alone has no spread

    def __init__(self) -> None:
        self.data = self.config("?")  # what `prepare` was told

    def prepare(self, model: Any, config: Any) -> Any:
        fewest = max(model.config.patches, model.config.patch_points)
        if config.points < fewest:
            raise ValueError(f"data.points: must be at least {fewest}, the model's patches, and a patch's points")
        if config.scale[0] > config.scale[1]:
            raise ValueError(f"data.scale: must be the least and the largest factor, got {list(config.scale)}")
        self.data = config
        return model

    def read(self, path: str | os.PathLike, config: Any) -> list[dict[str, Any]]:
        return self._examples(read_clouds(path, "train", surface=SURFACE * config.points), config)

    def held_out(self, config: Any) -> list[dict[str, Any]] | None:
        if not config.validation and not has_test(config.train):
            return None
        return self._examples(
            read_clouds(config.validation or config.train, "test", surface=SURFACE * config.points), config
        )

    def _examples(self, found: CloudSet, config: Any) -> list[dict[str, Any]]:
        clouds = [
            unit_ball(cloud) if config.normalize else as_stored(cloud, place)
            for cloud, place in zip(found.points, found.places, strict=True)
        ]
        return [{"points": each} for each in farthest_first(clouds, config.points)]

    def view(self, cloud: Tensor, generator: torch.Generator | None) -> Tensor:
        """What a model sees of a cloud: [N, 3], changed by chance or, without a generator, as it is."""
        chosen = choose_points(cloud, self.data.points, generator)
        if generator is None:
            return chosen
        return augment(chosen, generator, rotate=self.data.rotate, scale=self.data.scale, shift=self.data.shift)

    def collate(self, examples: Sequence[dict[str, Any]]) -> Batch:
        return {name: torch.stack([torch.as_tensor(each[name]) for each in examples]) for name in examples[0]}

    def predictions(self, batch: Batch) -> int:
        return len(batch["points"])


class PointTask(CloudTask):
    """Classes of clouds. A batch has points [B, N, 3], labels [B] and index [B], the clouds' numbers in the data;
    in an evaluation with votes points [B, V, N, 3].

    Args:
        classes: names that the model's folder gives its classes; empty: none.
    """

    name = "points"
    summary = "Classes of point clouds, by a transformer of their patches."
    config: ClassVar[type[LabelledPointData]] = LabelledPointData
    metric_names = ("accuracy", "mean_class_accuracy")

    def __init__(self, classes: Sequence[str] = ()) -> None:
        super().__init__()
        self.classes = list(classes)
        self.new_head = False

    # ------------------------------------------------------------------ files

    @classmethod
    def load_model(cls, path: str | os.PathLike, **options: Any) -> Any:
        if options.pop("quantize", None):
            raise ValueError("method: the weights of a point cloud's model are not kept in 4 bits")
        return load_own(path, MODELS, **options)

    @classmethod
    def base_of(cls, path: str | os.PathLike, trained: str | os.PathLike) -> PointClassifier:
        model, known = cls.load_model(path), Clouds.load(trained)
        if isinstance(model, PointClassifier):
            if known is not None:
                known.check(model, trained)
            return model
        if known is None:
            raise ValueError(f"adapter: {trained} does not say which classes it tells, and {path} has no head")
        return with_head(model, len(known.classes))

    @classmethod
    def reader(cls, path: str | os.PathLike, trained: str | os.PathLike = "") -> CloudReader:
        """What a run left, ready to tell what clouds are.

        Args:
            path: the run's final/, or what `model` of its recipe was, where final/ holds an adapter.
            trained: final/ in the latter case.

        Raises:
            FileNotFoundError, ValueError: there is no model, or one that does not say what its classes are.
        """
        known = Clouds.load(trained or path)
        if known is None:
            raise ValueError(f"model: {os.fspath(trained or path)} does not say which classes it tells")
        if trained:
            return CloudReader(load_adapter(cls.base_of(path, trained), trained).eval(), known)
        model = cls.load_model(path)
        known.check(model, path)
        return CloudReader(model.eval(), known)

    @classmethod
    def of_model(cls, path: str | os.PathLike, model: Any) -> "PointTask":
        known = Clouds.load(path)
        if known is None:
            return cls()
        if isinstance(model, PointClassifier):
            known.check(model, path)
        return cls(known.classes)

    def prepare(self, model: Any, config: LabelledPointData) -> PointClassifier:
        """The classifier, or one with a new head on a backbone."""
        super().prepare(model, config)
        classes = class_names(config.train)
        if len(classes) < 2:
            raise ValueError(f"data.train: must have clouds of two classes or more, {config.train} has {len(classes)}")
        if isinstance(model, PointClassifier):
            if model.config.classes != len(classes) or self.classes not in ([], classes):
                has = ", ".join(self.classes) or model.config.classes
                raise ValueError(
                    f"data.train: the model tells other classes ({has}) than {config.train} has "
                    f"({', '.join(classes)}); a backbone without a head takes any"
                )
        else:
            self.new_head = True
            model = with_head(model, len(classes))
        self.classes = classes
        return model

    def _examples(self, found: CloudSet, config: LabelledPointData) -> list[dict[str, Any]]:
        if found.labels is None:
            raise ValueError(f"data: {found.places[0]} has no label")
        strange = [name for name in found.classes if name not in self.classes]
        if strange:
            raise ValueError(f"data: {found.places[0]}: no cloud to train on has the class {', '.join(strange)}")
        labels = [self.classes.index(found.classes[label]) for label in found.labels]
        examples = super()._examples(found, config)
        return [
            {**each, "labels": label, "index": index}
            for index, (each, label) in enumerate(zip(examples, labels, strict=True))
        ]

    def held_out(self, config: LabelledPointData) -> list[dict[str, Any]] | None:
        found = super().held_out(config)
        return None if found is None else [{**each, "votes": config.votes} for each in found]

    def check(self, model: Any, examples: Sequence[Any]) -> None:
        """Raises ValueError where a new head would stay as it began."""
        if self.new_head and not any(p.requires_grad for p in model.head.parameters()):
            raise ValueError("adapter.modules_to_save: must hold head, which is new: adapter.modules_to_save=[head]")

    def save(self, model: Any, folder: Path) -> None:
        save_trained(model, folder)
        Clouds(tuple(self.classes), self.data.points, self.data.normalize).save(folder)

    # ------------------------------------------------------------------ the loop

    def draw(self, example: dict[str, Any], generator: torch.Generator, training: bool) -> dict[str, Any]:
        cloud, votes = example["points"], example.get("votes", 1)
        points = self.view(cloud, generator if training else None)
        if votes > 1:
            points = torch.stack([points, *(self.view(cloud, generator) for _ in range(votes - 1))])
        return {"points": points, "labels": example["labels"], "index": example["index"]}

    def output(self, model: Any, batch: Batch) -> Any:
        points, labels = batch["points"], batch["labels"]
        if points.dim() == 3:
            return model(points=points, labels=labels, index=batch["index"])
        logits = model(points=points.flatten(0, 1)).logits.unflatten(0, points.shape[:2]).mean(1)
        return SimpleNamespace(logits=logits, loss=cross_entropy(logits.float(), labels))

    # ------------------------------------------------------------------ metrics

    def counts(self, batch: Batch, output: Any) -> Tensor:
        return ConfusionCounts(self.classes).add(batch["labels"], output.logits.argmax(-1)).counts

    def metrics(self, counts: Tensor) -> dict[str, float]:
        found = ConfusionCounts(self.classes).merge(counts)
        return {name: getattr(found, name) for name in self.metric_names}

    def report(self, model: Any, examples: Sequence[Any], counts: Tensor, folder: Path) -> None:
        """The table of classes; a cloud of each of the first classes, in the colours of the attention to it, and of its
        neighbourhoods: the patches, and their centres in black."""
        found = ConfusionCounts(self.classes).merge(counts)
        write_json(folder / "confusion.json", found.to_dict())
        draw_confusion(found, folder / "confusion.png", title=f"accuracy {found.accuracy:.3f}")
        device = next(model.parameters()).device
        shown = {each["labels"]: each for each in reversed(examples)}
        for label in sorted(shown)[:_SHOWN]:
            points = self.view(shown[label]["points"], None)
            attention, logits = attention_to_points(model, points.to(device))
            told = f"{self.classes[label]}, taken for {self.classes[int(logits.argmax())]}"
            draw_cloud(points, folder / f"cloud-{label}.png", values=attention, label="attention", title=told)
            patches = patches_of(model, points.to(device))
            draw_cloud(
                points, folder / f"patches-{label}.png", values=patches.of_points()[0], marks=patches.centres[0],
                title=f"{self.classes[label]}, {patches.centres.shape[1]} patches",
            )  # fmt: skip
