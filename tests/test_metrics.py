"""Metrics of classes, and pictures of predictions."""

import json
import math

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from deftcore.training import pictures
from deftcore.training.metrics import ConfusionCounts


def by_hand(labels, predictions, classes):
    """(accuracy, accuracy per class, IoU, F1), an element at a time."""
    pairs = list(zip(labels.tolist(), predictions.tolist(), strict=True))
    found = []
    for c in range(classes):
        tp = sum(a == c and b == c for a, b in pairs)
        fp, fn = sum(a != c and b == c for a, b in pairs), sum(a == c and b != c for a, b in pairs)
        nan = math.nan
        found.append(
            (
                tp / (tp + fn) if tp + fn else nan,
                tp / (tp + fp + fn) if tp + fp + fn else nan,
                2 * tp / (2 * tp + fp + fn) if tp + fp + fn else nan,
            )
        )
    return sum(a == b for a, b in pairs) / len(pairs), *zip(*found, strict=True)


def test_metrics_are_those_of_pooled_counts():
    """However the elements are split into batches; the last class occurs nowhere."""
    labels, predictions = torch.randint(0, 4, (300,)), torch.randint(0, 4, (300,))
    whole = ConfusionCounts(5).add(labels.view(10, 30), predictions.view(10, 30))
    accuracy, per_class, iou, f1 = by_hand(labels, predictions, 5)
    assert whole.accuracy == accuracy
    for ours, theirs in ((whole.class_accuracy(), per_class), (whole.iou(), iou), (whole.f1(), f1)):
        torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), equal_nan=True)
        assert math.isnan(ours[4])
    assert whole.mean_class_accuracy == pytest.approx(np.nanmean(per_class))
    assert whole.mean_iou == pytest.approx(np.nanmean(iou))
    assert whole.macro_f1 == pytest.approx(np.nanmean(f1))
    parts = ConfusionCounts(5)
    for a, b in zip(labels.split(37), predictions.split(37), strict=True):
        parts.merge(ConfusionCounts(5).add(a, b))
    assert torch.equal(parts.counts, whole.counts)
    assert whole.total == 300
    assert "300 of 5 classes" in repr(whole)


def test_masked_elements_may_be_anything():
    labels, predictions = torch.tensor([[1, -100], [0, 7]]), torch.tensor([[1, 0], [1, 0]])
    counts = ConfusionCounts(2).add(labels, predictions, torch.tensor([[True, False], [True, False]]))
    assert counts.counts.tolist() == [[0, 1], [0, 1]]
    assert counts.f1()[1] == 2 / 3


@pytest.mark.parametrize("undefined", [1.0, math.nan])
def test_nothing_counted_has_the_value_that_was_asked_for(undefined):
    counts = ConfusionCounts(["no", "yes"], undefined=undefined)
    counts.add(torch.tensor([0, 0]), torch.tensor([0, 0]))  # no positives and none predicted
    values = torch.stack([counts.f1()[1], counts.iou()[1], counts.class_accuracy()[1]])
    torch.testing.assert_close(values, torch.full((3,), undefined, dtype=torch.float64), equal_nan=True)
    assert counts.macro_f1 == 1
    empty = ConfusionCounts(2, undefined=undefined)
    assert empty.accuracy == pytest.approx(undefined, nan_ok=True)
    assert empty.mean_iou == pytest.approx(undefined, nan_ok=True)


def test_counts_travel_as_json():
    counts = ConfusionCounts(["a", "b", "c"]).add(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]))
    text = json.dumps(counts.to_dict(), allow_nan=False)
    assert json.loads(text)["f1"][2] is None
    again = ConfusionCounts.from_dict(json.loads(text))
    assert again.classes == counts.classes
    assert torch.equal(again.counts, counts.counts)


@pytest.mark.parametrize(
    ("labels", "predictions", "mask", "message"),
    [
        ([0, 2], [0, 0], None, "labels: must be classes from 0 to 1, got 2"),
        ([0, 1], [0, -1], None, "predictions: must be classes from 0 to 1, got -1"),
        ([0, 1], [0], None, r"predictions: must have the shape \[2\] of labels, got \[1\]"),
        ([0, 1], [0, 1], [True], r"labels: must have the shape \[1\] of mask, got \[2\]"),
        ([0.0, 1.0], [0, 1], None, "labels: must be whole numbers, got torch.float32"),
        ([0, 1], [0, 1], [1, 0], "mask: must be bool, got torch.int64"),
    ],
)
def test_elements_that_cannot_be_counted(labels, predictions, mask, message):
    counts = ConfusionCounts(2)
    mask = None if mask is None else torch.tensor(mask)
    with pytest.raises((ValueError, TypeError), match=message):
        counts.add(torch.tensor(labels), torch.tensor(predictions), mask)
    assert counts.total == 0


def test_classes_that_cannot_be_counted_together():
    with pytest.raises(ValueError, match="classes: must be at least one, each with a name of its own"):
        ConfusionCounts(["a", "a"])
    with pytest.raises(ValueError, match="classes: must be at least one"):
        ConfusionCounts(0)
    with pytest.raises(ValueError, match=r"other: must be of the classes \['0', '1'\], got \['a', 'b'\]"):
        ConfusionCounts(2).merge(ConfusionCounts(["a", "b"]))
    with pytest.raises(ValueError, match=r"other: must have the shape \[2, 2\], got \[3, 3\]"):
        ConfusionCounts(2).merge(torch.zeros(3, 3))


# ---------------------------------------------------------------------------- pictures


def colours(path):
    """Those of a picture's pixels, and how many have each."""
    pixels = (imread(path)[..., :3] * 255).round().astype(int) @ (1 << 16, 1 << 8, 1)  # sorted as numbers, not as rows
    found = zip(*np.unique(pixels, return_counts=True), strict=True)
    return {(each >> 16, each >> 8 & 255, each & 255): n for each, n in found}


@pytest.mark.parametrize("classes", [3, 30])
def test_a_table_of_classes(classes, tmp_path):
    """A row is dark where most of its label went."""
    pictures.draw_confusion(ConfusionCounts(classes), tmp_path / "empty.png")
    counts = ConfusionCounts(classes).add(torch.arange(classes), torch.arange(classes))
    pictures.draw_confusion(counts, tmp_path / "table.png", title="test")
    dark = (8, 48, 107)  # the far end of the scale
    assert colours(tmp_path / "table.png")[dark] > 2 * colours(tmp_path / "empty.png").get(dark, 0)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["empty.png", "table.png"]


def test_names_are_no_formulas(tmp_path):
    name = r"5$ to $\frac"
    pictures.draw_confusion(ConfusionCounts([name, "other"]), tmp_path / "table.png", title=name)
    pictures.draw_maps({name: np.zeros((2, 2), int)}, tmp_path / "maps.png", classes=[name], title=name)
    pictures.draw_cloud(np.ones((4, 3)), tmp_path / "cloud.png", values=np.ones(4), label=name, title=name)


def test_a_table_of_many_classes_has_a_size_that_fits_into_memory(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(pictures, "_draw", lambda draw, path, size: sizes.append(size))
    pictures.draw_confusion(ConfusionCounts(5000), tmp_path / "table.png")
    assert max(sizes[0]) < 50


def test_maps_beside_each_other(tmp_path):
    labels = np.zeros((8, 8), dtype=np.int64)
    labels[:4], labels[0, 0] = 1, -1
    maps = {"image": np.random.rand(8, 8, 3), "labels": labels, "predicted": torch.ones(8, 8, dtype=torch.uint8)}
    pictures.draw_maps(maps, tmp_path / "maps.png", classes=["other", "wheat"], title="a field")
    found = colours(tmp_path / "maps.png")
    blue, orange, grey = found[31, 119, 180], found[255, 127, 14], found[217, 217, 217]
    assert orange > 2.5 * blue > 50 * grey > 0  # 95 pixels, 32 and 1
    for wrong, message in (({}, "must not be empty"), ({"x": np.zeros(4)}, r"'x' must be \[H, W\] or \[H, W, 3\]")):
        with pytest.raises(ValueError, match=f"maps: {message}"):
            pictures.draw_maps(wrong, tmp_path / "none.png")


def test_a_cloud_in_colours(tmp_path):
    points = torch.randn(64, 3)
    for name, value in (("low", 0.0), ("high", 1.0)):
        values = torch.full((64,), value)
        values[:2] = torch.tensor([0.0, 1.0])
        pictures.draw_cloud(points, tmp_path / f"{name}.png", values=values, label="attention")
    pictures.draw_cloud(points.numpy(), tmp_path / "height.png")
    yellow = {n: sum(c for (r, g, b), c in colours(tmp_path / f"{n}.png").items() if r > 200 and g > 200 and b < 120)
              for n in ("low", "high")}  # fmt: skip
    assert yellow["high"] > 2 * yellow["low"]  # of which the scale beside it has some
    groups = torch.tensor([0] * 40 + [1] * 20 + [-1] * 4)
    pictures.draw_cloud(points, tmp_path / "groups.png", values=groups, label="unused", marks=points[:3])
    found = colours(tmp_path / "groups.png")
    blue, orange, grey, black = found[31, 119, 180], found[255, 127, 14], found[217, 217, 217], found[0, 0, 0]
    assert blue > 1.3 * orange > 1.3 * grey > 0
    pictures.draw_cloud(points, tmp_path / "bare.png", values=groups)
    assert black > colours(tmp_path / "bare.png").get((0, 0, 0), 0)
    with pytest.raises(ValueError, match=r"marks: must be \[M, 3\], got \[3\]"):
        pictures.draw_cloud(points, tmp_path / "none.png", marks=[1, 2, 3])
    with pytest.raises(ValueError, match=r"points: must be \[N, 3\], got \[64, 2\]"):
        pictures.draw_cloud(points[:, :2], tmp_path / "none.png")
    with pytest.raises(ValueError, match=r"values: must be \[64\], one of each point, got \[3\]"):
        pictures.draw_cloud(points, tmp_path / "none.png", values=[1, 2, 3])
