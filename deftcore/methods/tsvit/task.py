"""`crops`: what grows on each pixel, of windows of satellite image time series."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar

import torch
from peft.utils import ModulesToSaveWrapper
from pydantic.dataclasses import dataclass
from torch import Tensor

from deftcore._files import write_json
from deftcore.methods.tsvit.adapting import MODES
from deftcore.methods.tsvit.losses import predicted_classes, segmentation_loss
from deftcore.methods.tsvit.model import TSViT, TSViTConfig
from deftcore.methods.tsvit.predicting import (
    NEW_PARTS,
    is_normalized,
    outputs_of,
    predict,
    read_as,
    with_classes,
    with_statistics,
)
from deftcore.methods.tsvit.reading import Reading, statistics, windows
from deftcore.methods.tsvit.scene import UNLABELLED, Scene
from deftcore.methods.tsvit.series import read_scenes
from deftcore.methods.tsvit.splits import hold_out
from deftcore.methods.tsvit.tokens import TokenLayer
from deftcore.training.config import DataConfig
from deftcore.training.fields import (
    OPTIONS,
    DataPlace,
    Integer,
    NonNegative,
    Number,
    Positive,
    Real,
    Text,
    Whole,
    one_of,
)
from deftcore.training.metrics import ConfusionCounts
from deftcore.training.pictures import draw_confusion, draw_maps
from deftcore.training.registry import register
from deftcore.training.saving import save_trained
from deftcore.training.task import Batch, Task


@dataclass(frozen=True, config=OPTIONS)
class CropData(DataConfig):
    """Scenes, see `deftcore.methods.tsvit.series`, and how they are read."""

    bands: tuple[Integer | Text, ...] = ()  # names or numbers from 1; none: as the model's data was, or all
    scale: Positive | None = None  # what stored values are multiplied with; None: as the model's data was, or 1
    nodata: Real | None = None  # the stored value that is none, NaN may be one; None: what the files say
    classes: dict[Text, tuple[Integer, ...]] | None = None  # codes of each; None: the model's, whose numbers are codes
    unlabelled: tuple[Integer, ...] = ()  # codes that are no class, without `classes`
    masked: bool | None = None  # leave out what is clouded or without data; None: as the model's data was, or true
    overlap: Whole = 0  # of windows, in pixels
    flips: bool = True  # mirror windows at random
    dice: NonNegative = 0.0  # weight of Dice in the loss
    mean: tuple[Number, ...] = ()  # of each band; none: the model's, or, where it has none, of the training scenes
    std: tuple[Positive, ...] = ()
    held_out_year: Whole = 0  # validation in place of a file; 0: none
    held_out_area: Text = ""
    head: Annotated[Text, one_of("", *MODES)] = ""  # how other classes than the model's are made


class CropTask(Task):
    """Classes of pixels. A batch has x [B, T, C, H, W], doy [B, T] (0: padding), usable [B, T, H, W] and labels
    [B, H, W], UNLABELLED where unknown.

    Where a model has one output there are two classes, the second of which its logit is of; the loss is the binary
    cross-entropy then, else the cross-entropy, over labelled pixels.

    Args:
        model: a TSViT.
        reading: how scenes are read.
    """

    name = "crops"
    summary = "Classes of pixels in satellite image time series, by a TSViT."
    config: ClassVar[type[CropData]] = CropData
    model_types = (TSViTConfig.model_type,)
    source = DataPlace

    def __init__(self, model: TSViT, reading: Reading) -> None:
        self.model, self.reading = model.config, reading
        self.flips, self.dice = False, 0.0
        self.scenes: list[Scene] = []  # to train on
        self.new_tokens = 0  # class tokens that `prepare` made
        self._name_metrics()

    # ------------------------------------------------------------------ files

    @classmethod
    def empty_model(cls, path: str | os.PathLike) -> TSViT:
        """With its weights, which are few: new classes may be made of them."""
        return cls.load_model(path)

    @classmethod
    def load_model(cls, path: str | os.PathLike, **options: Any) -> TSViT:
        if options.pop("quantize", None):
            raise ValueError("method: the weights of a TSViT are not kept in 4 bits")
        return TSViT.from_pretrained(path, **options)

    @classmethod
    def base_of(cls, path: str | os.PathLike, trained: str | os.PathLike) -> TSViT:
        return read_as(cls.load_model(path), Reading.load(trained) or Reading())

    @classmethod
    def of_model(cls, path: str | os.PathLike, model: TSViT) -> "CropTask":
        stored = Reading.load(path) or Reading()
        return cls(model, replace(stored, mean=(), std=(), head=""))  # which are in the model

    def prepare(self, model: TSViT, config: CropData) -> TSViT:
        """The model with an output for the data's classes, and its bands' mean and deviation: those that `data` gives,
        else its own, else the training scenes'."""
        self.reading = self._read_as(config, model)
        kept = 0 if self.reading.head == "token" else model.config.num_classes
        model = with_classes(model, self.reading)
        self.new_tokens = model.config.num_classes - kept
        self.model = model.config
        self._name_metrics()
        if self.scenes and not self.reading.mean and not is_normalized(model):
            mean, std = statistics(self.scenes, self.reading)
            self.reading = replace(self.reading, mean=tuple(mean), std=tuple(std))
        return with_statistics(model, self.reading)

    def _read_as(self, config: CropData, model: TSViT) -> Reading:
        """How the data is to be read: what `data` says, and what the model's folder says where it is silent."""
        given: dict[str, Any] = {
            name: value for name in ("bands", "scale", "nodata", "masked", "head")
            if (value := getattr(config, name)) not in (None, (), "")
        }  # fmt: skip
        if bool(config.mean) != bool(config.std) or {len(config.mean), len(config.std)} - {0, model.config.channels}:
            raise ValueError(
                f"data.mean: mean and std must be given both, with {model.config.channels} numbers, one a band, "
                f"got {len(config.mean)} and {len(config.std)}"
            )
        if config.mean:
            given |= {"mean": config.mean, "std": config.std}
        if config.classes is not None:
            codes = [code for codes in config.classes.values() for code in codes]
            if len(config.classes) < 2 or len(set(codes)) < len(codes) or not all(config.classes.values()):
                raise ValueError(
                    f"data.classes: must be two or more, with codes that are no other's, got {config.classes}"
                )
            given |= {"classes": tuple(config.classes), "codes": tuple(config.classes.values()), "unlabelled": ()}
        if config.unlabelled:
            if config.classes is not None:
                raise ValueError(
                    "data.unlabelled: is for data without classes, of which all other codes are unlabelled"
                )
            given["unlabelled"] = config.unlabelled
        found = replace(self.reading, **given)
        if not found.classes:
            found = replace(found, classes=tuple(str(i) for i in range(max(outputs_of(model.config), 2))))
        return found

    def read(self, path: str | os.PathLike, config: CropData) -> list[dict[str, Tensor]]:
        """Windows that have labels; without the scenes that are held out."""
        scenes = read_scenes(path)
        by = self._held_out_by(config)
        if by:
            scenes, _ = hold_out(scenes, *by)
        self.scenes, self.flips, self.dice = scenes, config.flips, config.dice
        return self._windows(scenes, config.overlap)

    def held_out(self, config: CropData) -> list[dict[str, Tensor]] | None:
        """Windows in which every labelled pixel of a scene counts once."""
        by = self._held_out_by(config)
        if not by and not config.validation:
            return None
        scenes = hold_out(read_scenes(config.train), *by)[1] if by else read_scenes(config.validation)
        return self._windows(scenes, once=True)

    @staticmethod
    def _held_out_by(config: CropData) -> tuple[Any, Any] | None:
        given = {
            "validation": config.validation, "held_out_year": config.held_out_year,
            "held_out_area": config.held_out_area,
        }  # fmt: skip
        said = {name: value for name, value in given.items() if value}
        if len(said) > 1:
            raise ValueError(f"data.validation, held_out_year, held_out_area: must be one of them alone, got {said}")
        by = {name.removeprefix("held_out_"): value for name, value in said.items() if name != "validation"}
        return next(iter(by.items()), None)

    def _windows(self, scenes: Sequence[Scene], overlap: int = 0, once: bool = False) -> list[dict[str, Tensor]]:
        found = []
        for scene in scenes:
            self.reading.check(scene, self.model.channels)
            found += windows(scene, self.reading, self.model.image_size, overlap, once=once)
        found = [each for each in found if self.predicts(each)]
        if not found:
            raise ValueError(f"data: {scenes[0].where}: no pixel has a label of {', '.join(self.reading.classes)}")
        return found

    def check(self, model: Any, examples: Sequence[Any]) -> None:
        """Raises ValueError where a part that is new since the model was trained would not be written whole."""
        new = []
        for name in NEW_PARTS.get(self.reading.head, ()):
            part = model.get_submodule(name)
            if isinstance(part, TokenLayer):
                self._check_tokens(part)
            elif not _trains(part):
                new.append(name)
        if new:
            raise ValueError(
                f"data.head: {self.reading.head} makes a new {', '.join(new)}, which must train: "
                f"adapter.modules_to_save={new}"
            )

    def _check_tokens(self, layer: TokenLayer) -> None:
        trained = min(map(len, layer.tsvit_token_rows.values()))
        if trained < self.new_tokens:
            raise ValueError(
                f"adapter.tokens: must be at least {self.new_tokens}, the new tokens of data.head {self.reading.head}, "
                f"or empty for all, got {trained}"
            )

    def save(self, model: Any, folder: Path) -> None:
        save_trained(model, folder)
        self.reading.save(folder)

    # ------------------------------------------------------------------ the loop

    def draw(self, example: dict[str, Tensor], generator: torch.Generator, training: bool) -> dict[str, Tensor]:
        """Mirrored up and down, and left and right, each every other time, where the model learns from it."""
        if not (training and self.flips):
            return example
        sides = [side for side in (-2, -1) if torch.rand((), generator=generator) < 0.5]
        return {name: value if name == "doy" else _flipped(value, sides) for name, value in example.items()}

    def collate(self, examples: Sequence[dict[str, Tensor]]) -> Batch:
        frames = max(len(each["doy"]) for each in examples)
        shape = (len(examples), frames)
        channels, *size = examples[0]["images"].shape[1:]
        batch = {
            "x": torch.zeros(*shape, channels, *size), "doy": torch.zeros(*shape, dtype=torch.int64),
            "usable": torch.zeros(*shape, *size, dtype=torch.bool),
            "labels": torch.stack([each["labels"] for each in examples]),
        }  # fmt: skip
        for i, each in enumerate(examples):
            t = len(each["doy"])
            batch["x"][i, :t] = self.reading.numbers(each["images"], each["usable"])
            batch["doy"][i, :t], batch["usable"][i, :t] = each["doy"], each["usable"]
        return batch

    def output(self, model: Any, batch: Batch) -> SimpleNamespace:
        """The logits [B, K, H, W] and the mean loss over labelled pixels, 0 where there is none."""
        logits = predict(model, batch, self.reading, self.model.patch_size)
        return SimpleNamespace(logits=logits, loss=segmentation_loss(logits, batch["labels"], dice=self.dice))

    def predictions(self, batch: Batch) -> int:
        return int((batch["labels"] != UNLABELLED).sum())

    def predicts(self, example: dict[str, Tensor]) -> bool:
        return bool((example["labels"] != UNLABELLED).any())

    # ------------------------------------------------------------------ metrics

    def _name_metrics(self) -> None:
        binary = ("f1", "iou") if len(self.reading.classes) == 2 else ()  # of the second class
        self.metric_names = ("accuracy", "mean_iou", "macro_f1", *binary)

    def _counts(self) -> ConfusionCounts:
        return ConfusionCounts(self.reading.classes)

    def counts(self, batch: Batch, output: Any) -> Tensor:
        labels = batch["labels"]
        return self._counts().add(labels, predicted_classes(output.logits), labels != UNLABELLED).counts

    def metrics(self, counts: Tensor) -> dict[str, float]:
        """Over all pixels at once."""
        found = self._counts().merge(counts)
        values = {"accuracy": found.accuracy, "mean_iou": found.mean_iou, "macro_f1": found.macro_f1}
        if len(self.reading.classes) == 2:
            values |= {"f1": float(found.f1()[1]), "iou": float(found.iou()[1])}
        return values

    @torch.no_grad()
    def report(self, model: Any, examples: Sequence[Any], counts: Tensor, folder: Path) -> None:
        """The table of counts, as a picture and in numbers, and the first window beside its labels."""
        found = self._counts().merge(counts)
        draw_confusion(found, folder / "confusion.png")
        write_json(folder / "metrics.json", found.to_dict())
        device = next(model.parameters()).device
        batch = {name: value.to(device) for name, value in self.collate(examples[:1]).items()}
        model.eval()
        maps = {"labels": batch["labels"][0], "predicted": predicted_classes(self.output(model, batch).logits)[0]}
        model.train()
        draw_maps(maps, folder / "map.png", classes=self.reading.classes)


def _trains(module: torch.nn.Module) -> bool:
    """Whether all of a module trains, or all of a copy that PEFT keeps; an adapter on what is frozen is not enough."""
    return isinstance(module, ModulesToSaveWrapper) or all(p.requires_grad for p in module.parameters())


def _flipped(value: Tensor, sides: list[int]) -> Tensor:
    """As `flip`, of types too that PyTorch flips not, as uint16."""
    for side in sides:
        value = value.index_select(side, torch.arange(value.shape[side] - 1, -1, -1))
    return value


register(CropTask)
