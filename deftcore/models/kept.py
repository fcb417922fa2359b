"""`Kept`: which heads, channels and adapter ranks of a model stay when it is pruned. Selection writes it, slimming and
files read it.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from deftcore.models.coupled import Coupled


@dataclass(frozen=True)
class Kept:
    """What pruning leaves of a model. A name that is missing is left whole.

    Args:
        units: by name of a `Coupled` of the base model (`find_coupled`), the units that stay, in ascending order: of
            an attention, query heads. Every key-value group that keeps any keeps as many as the others. (): the
            sub-layer is gone, but for its residual path and the output's bias.
        ranks: by dotted name, in the base model, of a linear layer with an adapter, the ranks that stay, in ascending
            order. (): the adapter is gone.
        scales: by name in `units`, a factor per unit that stays, in its order, which the weights that read the units
            take over; empty for none.

    Raises:
        TypeError, ValueError: naming the field and the name.
    """

    units: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ranks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    scales: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what, lists in (("units", self.units), ("ranks", self.ranks)):
            for name, places in lists.items():
                _check_places(f"{what}[{name!r}]", places)
        for name, factors in self.scales.items():
            if len(factors) != len(self.units.get(name, ())):
                got = len(factors)
                raise ValueError(f"scales[{name!r}]: must have one factor per unit that stays, got {got}")
            if not all(isinstance(x, float) and math.isfinite(x) for x in factors):
                raise ValueError(f"scales[{name!r}]: must be finite numbers, got {list(factors)}")

    def check(self, structures: Iterable[Coupled], ranks: Mapping[str, int]) -> None:
        """Whether a model has what this names.

        Args:
            structures: all of the model, as `find_coupled` gives them.
            ranks: of the adapters, by the name of their linear layer in the base model.

        Raises:
            ValueError: naming a structure or layer that the model lacks, a place that it does not have, or key-value
                groups that would keep different numbers of query heads.
        """
        known = {each.name: each for each in structures}
        for what, lists, sizes in (
            ("units", self.units, {name: each.units for name, each in known.items()}),
            ("ranks", self.ranks, ranks),
        ):
            for name, places in lists.items():
                if name not in sizes:
                    raise ValueError(f"{what}: the model has no {name!r}")
                if places and places[-1] >= sizes[name]:
                    raise ValueError(f"{what}[{name!r}]: must be below {sizes[name]}, got {places[-1]}")
        for name, places in self.units.items():
            counts: dict[int, int] = {}
            for place in places:
                group = place // known[name].group
                counts[group] = counts.get(group, 0) + 1
            if len(set(counts.values())) > 1:
                raise ValueError(
                    f"units[{name!r}]: key-value groups must keep equally many query heads or none, got {counts}"
                )

    def then(self, later: "Kept") -> "Kept":
        """What stays where `later`, whose places are in what this one left, was cut after it.

        >>> first = Kept({"layer.0.mlp": (0, 2, 5)}, scales={"layer.0.mlp": (1.0, 2.0, 4.0)})
        >>> first.then(Kept({"layer.0.mlp": (1, 2)}))
        Kept(units={'layer.0.mlp': (2, 5)}, ranks={}, scales={'layer.0.mlp': (2.0, 4.0)})
        """
        scales = {name: _picked(each, later.units.get(name)) for name, each in self.scales.items()}
        for name, factors in later.scales.items():
            before = scales.get(name) or (1.0,) * len(factors)
            scales[name] = tuple(a * b for a, b in zip(before, factors, strict=True))
        units, ranks = (
            {**after, **{name: _picked(places, after.get(name)) for name, places in before.items()}}
            for before, after in ((self.units, later.units), (self.ranks, later.ranks))
        )
        return Kept(units, ranks, scales)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return {
            "units": {name: list(places) for name, places in self.units.items()},
            "ranks": {name: list(places) for name, places in self.ranks.items()},
            "scales": {name: list(factors) for name, factors in self.scales.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Kept":
        """The inverse of `to_dict`.

        >>> kept = Kept({"layer.0.mlp": (0, 2)}, {"layer.0.mlp.up": (1,)}, {"layer.0.mlp": (1.0, 0.5)})
        >>> Kept.from_dict(kept.to_dict()) == kept
        True
        """
        unknown = set(values) - {"units", "ranks", "scales"}
        if unknown:
            raise ValueError(f"values: must have units, ranks and scales alone, got {', '.join(sorted(unknown))} too")
        return cls(*(
            {name: tuple(each) for name, each in values.get(what, {}).items()} for what in ("units", "ranks", "scales")
        ))  # fmt: skip


def _picked(values: tuple[Any, ...], places: tuple[int, ...] | None) -> tuple[Any, ...]:
    return values if places is None else tuple(values[place] for place in places)


def _check_places(what: str, places: Any) -> None:
    if not isinstance(places, tuple) or not all(type(place) is int for place in places):
        raise TypeError(f"{what}: must be a tuple of integers, got {places!r}")
    if any(place < 0 for place in places) or any(a >= b for a, b in pairwise(places)):
        raise ValueError(f"{what}: must be ascending places from 0 on, got {list(places)}")
