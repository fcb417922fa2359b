"""`points-pretraining`: a backbone learns from clouds without classes, by telling their hidden patches."""

import os
from collections.abc import Mapping
from typing import Any

import torch

from deftcore.methods.point_peft.pretraining import PointMae, PointMaeConfig
from deftcore.methods.point_peft.task import CloudTask
from deftcore.models.own import load_own

# Sizes to begin with, by the name that `model` of a recipe gives in place of a folder.
NEW: Mapping[str, PointMaeConfig] = {
    "point-mae": PointMaeConfig(),
    "point-mae-small": PointMaeConfig(
        width=96, depth=4, heads=4, patches=32, patch_points=16, decoder_depth=2, decoder_heads=4
    ),
}


class PointPretrainingTask(CloudTask):
    """Masked auto-encoding. A batch has points [B, N, 3] and masked [B, M], the patches to hide; an evaluation always
    hides the same ones.

    Args:
        model: sizes.
    """

    name = "points-pretraining"
    summary = "Hidden patches of point clouds, whose classes need not be known: makes a backbone."

    def __init__(self, model: PointMaeConfig) -> None:
        super().__init__()
        self.model = model

    @classmethod
    def load_model(cls, path: str | os.PathLike, **options: Any) -> PointMae:
        if options.pop("quantize", None):
            raise ValueError("method: the weights of a point cloud's model are not kept in 4 bits")
        if os.fspath(path) in NEW:
            return PointMae(NEW[os.fspath(path)]).to(options.get("dtype"))
        return load_own(path, (PointMae,), **options)

    @classmethod
    def of_model(cls, path: str | os.PathLike, model: Any) -> "PointPretrainingTask":
        return cls(model.config)

    def draw(self, example: dict[str, Any], generator: torch.Generator, training: bool) -> dict[str, Any]:
        points = self.view(example["points"], generator if training else None)
        return {
            "points": points,
            "masked": torch.randperm(self.model.patches, generator=generator)[: self.model.masked],
        }
