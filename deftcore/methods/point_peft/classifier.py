"""A cloud's class: the backbone and a head over its tokens."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.utils import ModelOutput

from deftcore.methods.point_peft.backbone import BatchNorm, PointConfig, PointTransformer, check_counts, check_rates
from deftcore.models.own import OwnModel
from deftcore.ops.checks import check_integers


@dataclass
class PointClassifierConfig(PointConfig):
    """Sizes of a backbone and of the head on it.

    Args:
        classes: how many there are.
        head_width: of the head's two hidden layers.
        head_dropout: after each of them.
    """

    model_type = "point_classifier"
    published = "deftcore.methods.point_peft.checkpoints.load_classifier"
    classes: int = 40
    head_width: int = 256
    head_dropout: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "classes", "head_width")
        check_rates(self, "head_dropout")


@dataclass
class PointClassifierOutput(ModelOutput):
    """logits [B, classes]; loss, where labels were given."""

    loss: Tensor | None = None
    logits: Tensor | None = None


class ClassificationHead(nn.Sequential):
    """[B, 2C] -> [B, classes]: two hidden layers with BatchNorm, ReLU and dropout, and the last."""

    def __init__(self, features: int, width: int, classes: int, dropout: float) -> None:
        hidden = [
            layer
            for size in (features, width)
            for layer in (nn.Linear(size, width), BatchNorm(width), nn.ReLU(), nn.Dropout(dropout))
        ]
        super().__init__(*hidden, nn.Linear(width, classes))


class PointClassifier(OwnModel):
    """Clouds [B, N, 3] to logits [B, classes], over [class token ; largest over the patches].

    >>> config = PointClassifierConfig(width=24, depth=2, heads=2, patches=8, patch_points=4, classes=3)
    >>> PointClassifier(config)(torch.randn(2, 32, 3), labels=torch.tensor([0, 2])).logits.shape
    torch.Size([2, 3])
    """

    config_class = PointClassifierConfig

    def __init__(self, config: PointClassifierConfig, backbone: PointTransformer | None = None) -> None:
        super().__init__(config)
        self.backbone = PointTransformer(config.backbone) if backbone is None else backbone
        self.head = ClassificationHead(2 * config.width, config.head_width, config.classes, config.head_dropout)

    @classmethod
    def on(cls, backbone: PointTransformer, classes: int, **options: Any) -> "PointClassifier":
        """A new head on a backbone, which becomes the classifier's own. The class token, which pre-training holds
        still, trains with the head.

        Args:
            options: `head_width` and `head_dropout` of the config.
        """
        for token in (backbone.class_token, backbone.class_position):
            token.requires_grad_(True)
        return cls(PointClassifierConfig(**asdict(backbone.config), classes=classes, **options), backbone)

    def forward(
        self, points: Tensor, labels: Tensor | None = None, index: Tensor | None = None
    ) -> PointClassifierOutput:
        """Logits, and with labels [B] int32 or int64 the mean cross-entropy.

        Args:
            index: as of the backbone.

        Raises:
            TypeError, ValueError: naming the argument; one cloud alone in training, of which BatchNorm has no spread.
        """
        tokens = self.backbone(points, index)
        if labels is not None:
            self._check_labels(labels, points)
        pooled = torch.cat([tokens[:, 0], tokens[:, 1:].max(1).values], -1)
        logits = self.head(pooled)
        if labels is None:
            return PointClassifierOutput(logits=logits)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return PointClassifierOutput(loss=cross_entropy(wide, labels.long()), logits=logits)

    def _check_labels(self, labels: Tensor, points: Tensor) -> None:
        check_integers("labels", labels, (points.shape[0],), "one of each cloud", "points", points)
        if labels.numel() and not torch.compiler.is_compiling():
            low, high = (int(each) for each in labels.aminmax())
            if low < 0 or high >= self.config.classes:
                raise ValueError(f"labels: must be in 0..{self.config.classes - 1}, got values in {low}..{high}")
