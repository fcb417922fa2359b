"""What a cloud is, by a classifier that a run left."""

import os
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from deftcore._files import read_record, write_json
from deftcore.methods.point_peft.augment import choose_points
from deftcore.methods.point_peft.classifier import PointClassifier
from deftcore.methods.point_peft.data import as_stored, farthest_first, unit_ball
from deftcore.methods.point_peft.formats import SURFACE, checked_cloud, read_cloud
from deftcore.methods.point_peft.pretraining import PointMae
from deftcore.training.fields import OPTIONS, Count, Text, record_of

_FILE = "clouds.json"


def _different(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError("names, each class its own")
    return names


@dataclass(frozen=True, config=OPTIONS)
class Clouds:
    """What a classifier knows of the clouds that it was trained on; a file beside its weights.

    Args:
        classes: names.
        points: how many of a cloud it sees.
        normalize: whether a cloud is brought into the unit ball.
    """

    classes: Annotated[tuple[Text, ...], Field(min_length=1), AfterValidator(_different)]
    points: Count
    normalize: bool

    def save(self, folder: str | os.PathLike) -> None:
        write_json(Path(folder) / _FILE, asdict(self))

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Clouds | None":
        """Of a folder; None where it does not say.

        Raises:
            ValueError: the file is damaged.
        """
        return read_record(folder, _FILE, partial(record_of, cls))

    def check(self, model: Any, folder: str | os.PathLike) -> None:
        """Raises ValueError where the classifier tells another number of classes than the folder names."""
        told = getattr(model.config, "classes", 0)  # a backbone tells none
        if told != len(self.classes):
            raise ValueError(
                f"model: {Path(folder) / _FILE} names {len(self.classes)} classes ({', '.join(self.classes)}), the "
                f"model tells {told}"
            )


class CloudReader:
    """A trained classifier, from clouds to probabilities of classes.

    Args:
        model: as `load_classifier` gives it.
        clouds: what it was trained on.
    """

    def __init__(self, model: Any, clouds: Clouds) -> None:
        self.model, self.clouds = model, clouds

    def points(self, cloud: Any) -> Tensor:
        """The points of a cloud that the model sees, [N, 3].

        Args:
            cloud: an array [N, 3], or a file as `read_cloud` takes it.

        Raises:
            ValueError: as `read_cloud`.
        """
        if isinstance(cloud, (str, os.PathLike)):
            array, place = read_cloud(cloud, SURFACE * self.clouds.points), os.fspath(cloud)
        else:
            array, place = checked_cloud(cloud, "the array"), "the array"
        array = unit_ball(array) if self.clouds.normalize else as_stored(array, place)
        return choose_points(farthest_first([array], self.clouds.points)[0], self.clouds.points)

    @torch.no_grad()
    def __call__(self, cloud: Any) -> dict[str, float]:
        """The probability of each class, the likeliest first."""
        device = next(self.model.parameters()).device
        logits = self.model(points=self.points(cloud).unsqueeze(0).to(device)).logits[0]
        order = logits.argsort(descending=True).tolist()
        shares = logits.float().softmax(-1).tolist()
        return {self.clouds.classes[i]: shares[i] for i in order}


def with_head(model: Any, classes: int) -> PointClassifier:
    """A new head on a backbone, or on that of a model in pre-training."""
    backbone = model.backbone if isinstance(model, PointMae) else model
    return PointClassifier.on(backbone, classes).to(backbone.class_token.device)
