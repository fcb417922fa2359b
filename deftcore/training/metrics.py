"""Metrics of classes from one table of counts: of labels, pixels or whatever is classified."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_WHOLE = ("accuracy", "mean_class_accuracy", "mean_iou", "macro_f1", "matthews")  # metrics that are one number


class ConfusionCounts:
    """How often a label met a prediction: `counts` [K, K] int64, rows are labels, columns predictions.

    Metrics are made of the sums, never of means over batches: however the data is split, they are the same. Counts of
    several processes are summed by whatever sums tensors.

    >>> counts = ConfusionCounts(["other", "wheat"]).add(torch.tensor([1, 1, 0]), torch.tensor([1, 0, 0]))
    >>> counts
    ConfusionCounts(3 of 2 classes, accuracy 0.6667, mean IoU 0.5)
    >>> round(float(counts.f1()[1]), 4)
    0.6667

    Args:
        classes: their names, or how many there are.
        undefined: the value of a quotient 0 / 0, as the F1 of a class that is neither a label nor predicted. NaN is
            left out of means over classes.

    Raises:
        ValueError: no class, or two of one name.
    """

    def __init__(self, classes: int | Sequence[str], *, undefined: float = math.nan) -> None:
        self.classes = [str(i) for i in range(classes)] if isinstance(classes, int) else list(classes)
        if not self.classes or len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes: must be at least one, each with a name of its own, got {classes!r}")
        self.undefined = undefined
        self.counts = torch.zeros(len(self.classes), len(self.classes), dtype=torch.int64)

    def add(self, labels: Tensor, predictions: Tensor, mask: Tensor | None = None) -> "ConfusionCounts":
        """Counts a batch; returns itself.

        Args:
            labels, predictions: whole numbers below K, of one shape.
            mask: of that shape, true where an element counts; labels and predictions elsewhere may be anything.

        Raises:
            TypeError: not whole numbers, or a mask that is not bool.
            ValueError: of different shapes, or no class.
        """
        if mask is not None and mask.dtype != torch.bool:
            raise TypeError(f"mask: must be bool, got {mask.dtype}")
        kept = []
        for name, value in (("labels", labels), ("predictions", predictions)):
            if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
                raise TypeError(f"{name}: must be whole numbers, got {value.dtype}")
            other, shape = ("labels", labels.shape) if mask is None else ("mask", mask.shape)
            if value.shape != shape:
                raise ValueError(f"{name}: must have the shape {list(shape)} of {other}, got {list(value.shape)}")
            chosen = (value.reshape(-1) if mask is None else value[mask]).to(torch.int64)
            wrong = chosen[(chosen < 0) | (chosen >= len(self.classes))]
            if wrong.numel():
                raise ValueError(f"{name}: must be classes from 0 to {len(self.classes) - 1}, got {int(wrong[0])}")
            kept.append(chosen)
        found = torch.bincount(kept[0] * len(self.classes) + kept[1], minlength=self.counts.numel())
        self.counts = self.counts.to(found.device) + found.view_as(self.counts)
        return self

    def merge(self, other: "ConfusionCounts | Tensor") -> "ConfusionCounts":
        """Adds what another, or a table of counts, holds; returns itself.

        Raises:
            ValueError: of other classes.
        """
        if isinstance(other, ConfusionCounts) and other.classes != self.classes:
            raise ValueError(f"other: must be of the classes {self.classes}, got {other.classes}")
        table = other.counts if isinstance(other, ConfusionCounts) else other
        if table.shape != self.counts.shape:
            raise ValueError(f"other: must have the shape {list(self.counts.shape)}, got {list(table.shape)}")
        self.counts = self.counts.to(table.device) + table.to(torch.int64)
        return self

    # ------------------------------------------------------------------ metrics

    @property
    def total(self) -> int:
        """How many elements were counted."""
        return int(self.counts.sum())

    @property
    def accuracy(self) -> float:
        """The share of elements whose prediction is their label."""
        return float(self._quotient(self._hits().sum(), self.counts.sum()))

    @property
    def mean_class_accuracy(self) -> float:
        """The mean over classes of the share of their labels that were predicted."""
        return self._mean(self.class_accuracy())

    @property
    def mean_iou(self) -> float:
        """The mean of `iou`."""
        return self._mean(self.iou())

    @property
    def macro_f1(self) -> float:
        """The mean of `f1`."""
        return self._mean(self.f1())

    @property
    def matthews(self) -> float:
        """Matthews' correlation of labels and predictions, -1 to 1, of any number of classes (Gorodkin 2004); 0 / 0
        where one class is all labels or all predictions."""
        counts = self.counts.double()
        labels, predictions, total = counts.sum(1), counts.sum(0), counts.sum()
        covariance = counts.diagonal().sum() * total - labels @ predictions
        spread = (total**2 - labels @ labels) * (total**2 - predictions @ predictions)
        return float(self._quotient(covariance, spread.sqrt()))

    def class_accuracy(self) -> Tensor:
        """TP / (TP + FN) of each class, [K] float64."""
        return self._quotient(self._hits(), self.counts.sum(1))

    def iou(self) -> Tensor:
        """TP / (TP + FP + FN) of each class, [K] float64."""
        return self._quotient(self._hits(), self.counts.sum(0) + self.counts.sum(1) - self._hits())

    def f1(self) -> Tensor:
        """2 TP / (2 TP + FP + FN) of each class, [K] float64; of two classes that of the second is the binary F1."""
        return self._quotient(2 * self._hits(), self.counts.sum(0) + self.counts.sum(1))

    def _hits(self) -> Tensor:
        return self.counts.diagonal()

    def _quotient(self, above: Tensor, below: Tensor) -> Tensor:
        found = above.double() / below.double()
        return torch.where(below == 0, torch.full_like(found, self.undefined), found)

    @staticmethod
    def _mean(values: Tensor) -> float:
        return float(values.nanmean())

    # ------------------------------------------------------------------ shown and kept

    def __repr__(self) -> str:
        return (
            f"ConfusionCounts({self.total} of {len(self.classes)} classes, accuracy {self.accuracy:.4g}, "
            f"mean IoU {self.mean_iou:.4g})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: classes, counts, and the metrics, None where they are not defined."""
        per_class = {"class_accuracy": self.class_accuracy(), "iou": self.iou(), "f1": self.f1()}
        return {
            "classes": self.classes,
            "counts": self.counts.tolist(),
            **{name: _plain(getattr(self, name)) for name in _WHOLE},
            **{name: [_plain(value) for value in values.tolist()] for name, values in per_class.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, undefined: float = math.nan) -> "ConfusionCounts":
        """Of what `to_dict` gave."""
        return cls(values["classes"], undefined=undefined).merge(torch.tensor(values["counts"]))


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
