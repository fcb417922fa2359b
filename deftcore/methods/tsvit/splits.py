"""What is held out: a year or an area, never both seen and tested."""

from collections.abc import Iterator, Sequence
from typing import Literal

from deftcore.methods.tsvit.scene import Scene

By = Literal["year", "area"]


def hold_out(scenes: Sequence[Scene], by: By, value: str | int) -> tuple[list[Scene], list[Scene]]:
    """The scenes of all other years, or areas, and those of the one that is held out, each in their order.

    Raises:
        ValueError: a scene does not say its year or area; there is nothing to train on, or nothing held out.
    """
    silent = [scene.where for scene in scenes if not getattr(scene, by)]
    if silent:
        raise ValueError(f"{by}: every scene must say its {by} in the list, {silent[0]} does not")
    train = [scene for scene in scenes if getattr(scene, by) != value]
    test = [scene for scene in scenes if getattr(scene, by) == value]
    if not train or not test:
        known = sorted({getattr(scene, by) for scene in scenes})
        raise ValueError(f"{by}: must be one of several that the scenes have, {known}, got {value!r}")
    return train, test


def leave_one_out(scenes: Sequence[Scene], by: By) -> Iterator[tuple[str | int, list[Scene], list[Scene]]]:
    """Each year, or area, in order: it, the scenes of all others, its own; raises as `hold_out`."""
    for value in sorted({getattr(scene, by) for scene in scenes}):
        yield value, *hold_out(scenes, by, value)
