"""Pictures of many runs: a panel for each set, a row for each side, a dot for each run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.evidence.sides import Side

_WIDEST = 5  # panels beside each other


@dataclass(frozen=True)
class Panel:
    """What one panel shows.

    Args:
        title: above it.
        measure: below it.
        values: of each side's runs.
        untrained: where a dashed line stands; values above it become one arrow.
    """

    title: str
    measure: str
    values: Sequence[Sequence[float]]
    untrained: float | None = None


def picture(path: Path, sides: Sequence[Sequence[Side]], panels: Sequence[Panel]) -> None:
    """Writes it.

    Args:
        sides: of each panel, the first one on top.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = math.ceil(len(panels) / _WIDEST)
    columns = math.ceil(len(panels) / lines)
    size = (3.1 * max(columns, 2), 3.4 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for axis, own, panel in zip(axes.flat, sides, panels, strict=True):
        _draw(axis, own, panel)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw(axis, sides: Sequence[Side], panel: Panel) -> None:
    most = math.inf if panel.untrained is None else 1.02 * panel.untrained
    for row, (side, values) in enumerate(zip(sides, panel.values, strict=True)):
        shown = [value for value in values if value <= most]
        axis.plot(shown, [row] * len(shown), "o", color=side.color, alpha=0.75, markersize=7)
        if len(shown) < len(values):  # the others would be one dot
            axis.plot([panel.untrained], [row], ">", color=side.color, markersize=8)
            axis.annotate(f"to {max(values):.1f}    ", (panel.untrained, row), ha="right", va="center", fontsize=8)
    if panel.untrained is not None:
        axis.axvline(panel.untrained, color="#bbbbbb", linestyle="--", linewidth=1, zorder=0)
    axis.set_yticks(range(len(sides)), [side.name for side in sides], fontsize=8)
    axis.set_ylim(len(sides) - 0.5, -0.5)
    axis.set_title(panel.title, fontsize=9)
    axis.set_xlabel(panel.measure, fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(axis="x", color="#eeeeee")
