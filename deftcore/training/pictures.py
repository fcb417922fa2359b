"""Pictures of what a model predicts: a table of classes, maps beside each other, a cloud in colours.

Each is a PNG file that appears whole. They are drawn by matplotlib without `pyplot`, whose state belongs to the user.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from deftcore._files import replacing_file
from deftcore.training.metrics import ConfusionCounts

_UNKNOWN = "0.85"  # of pixels without a class: light grey
_LARGEST = 40.0  # inches, of a table's side: memory goes with its square
_NUMBERED = 16  # the most classes whose counts are written into the table's cells


def draw_confusion(counts: ConfusionCounts, path: str | os.PathLike, *, title: str = "") -> None:
    """A table of counts, each row coloured by its share of the row's label."""
    table = counts.counts.cpu().numpy()
    k = len(counts.classes)
    share = table / np.maximum(table.sum(1, keepdims=True), 1)

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        axes.set(xlabel="predicted", ylabel="label", title=_plain(title), xticks=range(k), yticks=range(k))
        axes.set_xticklabels([*map(_plain, counts.classes)], rotation=90)
        axes.set_yticklabels([*map(_plain, counts.classes)])
        for i, j in np.ndindex(table.shape) if k <= _NUMBERED else ():
            colour = "white" if share[i, j] > 0.5 else "black"
            axes.text(j, i, int(table[i, j]), ha="center", va="center", color=colour, fontsize=8)
        figure.colorbar(image, label="share of the label")

    side = min(3 + 0.3 * k, _LARGEST)
    _draw(draw, path, (side + 1, side))


def draw_maps(
    maps: Mapping[str, Any], path: str | os.PathLike, *, classes: Sequence[str] = (), title: str = ""
) -> None:
    """Maps of one area beside each other, by what they are called.

    Args:
        maps: [H, W] whole numbers, classes, of which those below 0 are drawn grey as unknown; [H, W] floats, on a scale
            of their own; or [H, W, 3], a picture with values from 0 to 1. Arrays or tensors.
        classes: names of the classes, for a legend.

    Raises:
        ValueError: no map, or one of another shape.
    """
    if not maps:
        raise ValueError("maps: must not be empty")
    arrays = {name: _array(value) for name, value in maps.items()}
    for name, value in arrays.items():
        if value.ndim != 2 and value.shape[2:] != (3,):
            raise ValueError(f"maps: {name!r} must be [H, W] or [H, W, 3], got {list(value.shape)}")
    labels = {
        name: value.astype(np.int64) for name, value in arrays.items() if value.ndim == 2 and value.dtype.kind in "iu"
    }
    count = max([len(classes), *(int(value.max(initial=-1)) + 1 for value in labels.values())])

    def draw(figure: Any) -> None:
        from matplotlib.colors import ListedColormap
        from matplotlib.patches import Patch

        colours = class_colours(max(count, 1))
        palette = ListedColormap(colours).with_extremes(bad=_UNKNOWN)
        for i, (name, value) in enumerate(arrays.items()):
            axes = figure.add_subplot(1, len(arrays), i + 1)
            if name in labels:
                shown = np.ma.masked_less(labels[name], 0)
                axes.imshow(shown, cmap=palette, vmin=-0.5, vmax=len(colours) - 0.5, interpolation="nearest")
            else:
                axes.imshow(np.clip(value, 0, 1) if value.ndim == 3 else value, interpolation="nearest")
            axes.set(title=_plain(name), xticks=[], yticks=[])
        if classes:
            handles = [Patch(color=colours[i], label=_plain(name)) for i, name in enumerate(classes)]
            figure.legend(handles=handles, loc="outside lower center", ncols=min(len(classes), 6), fontsize=8)
        figure.suptitle(_plain(title) or None)

    _draw(draw, path, (3.2 * len(arrays), 3.8))


def class_colours(count: int) -> np.ndarray:
    """What classes are drawn in: red, green, blue and opacity from 0 to 1, [count, 4]."""
    from matplotlib import colormaps

    table = colormaps["tab10" if count <= 10 else "tab20"]
    return table(np.arange(count) % table.N)


def draw_cloud(
    points: Any, path: str | os.PathLike, *, values: Any = None, marks: Any = None, label: str = "", title: str = ""
) -> None:
    """A cloud of points [N, 3], coloured by a value of each [N]: an attention, a neighbourhood. y is up.

    Args:
        values: floats, on a scale; or whole numbers, groups, each in a colour of its own as far as there are colours,
            those below 0 grey. None colours by height.
        marks: [M, 3], places to be drawn in black.
        label: what values on a scale are.

    Raises:
        ValueError: of another shape.
    """
    cloud = _array(points)
    if cloud.ndim != 2 or cloud.shape[1] != 3:
        raise ValueError(f"points: must be [N, 3], got {list(cloud.shape)}")
    colour = cloud[:, 1] if values is None else _array(values)
    if colour.shape != cloud.shape[:1]:
        raise ValueError(f"values: must be [{len(cloud)}], one of each point, got {list(colour.shape)}")
    marked = np.zeros((0, 3)) if marks is None else _array(marks)
    if marked.ndim != 2 or marked.shape[1] != 3:
        raise ValueError(f"marks: must be [M, 3], got {list(marked.shape)}")
    grouped = values is not None and colour.dtype.kind in "iu"

    def draw(figure: Any) -> None:
        from matplotlib.colors import to_rgba

        axes = figure.add_subplot(projection="3d", computed_zorder=False)  # marks over points
        if grouped:
            palette = class_colours(int(colour.max(initial=0)) + 1)
            drawn: dict[str, Any] = {"c": np.where(colour[:, None] < 0, to_rgba(_UNKNOWN), palette[colour])}
        else:
            drawn = {"c": colour, "cmap": "viridis"}
        dots = axes.scatter(cloud[:, 0], cloud[:, 2], cloud[:, 1], s=6, depthshade=not grouped, **drawn)
        axes.scatter(marked[:, 0], marked[:, 2], marked[:, 1], s=12, c="black", depthshade=False)
        axes.set(title=_plain(title))
        axes.set_aspect("equal")
        axes.set_axis_off()
        if values is not None and not grouped:
            figure.colorbar(dots, label=_plain(label), shrink=0.6)

    _draw(draw, path, (5.5, 5))


def _plain(text: str) -> str:
    """What matplotlib shows as it is: names are no formulas."""
    return text.replace("$", r"\$")


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def _draw(draw: Callable[[Any], None], path: str | os.PathLike, size: tuple[float, float]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    with replacing_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
