"""What stays: pure functions from scores to places (arXiv 2406.03792, section 3.3)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deftcore.methods.light_peft.config import LightPeftConfig
from deftcore.models.coupled import Coupled
from deftcore.models.kept import Kept

_SLACK = 1e-6  # the published 0.333333333 of 12 is 4, not 3


@dataclass(frozen=True)
class Scores:
    """What counts, the more the better; any device and floating dtype.

    Args:
        units: [units] by name of a structure: of heads and channels that may go. Others stay as they are.
        modules: a scalar by name of an adapted layer.
        ranks: [r] by name of an adapted layer.
        factors: [units], what `keep_masks="fold"` folds.
    """

    units: Mapping[str, Tensor] = field(default_factory=dict)
    modules: Mapping[str, Tensor] = field(default_factory=dict)
    ranks: Mapping[str, Tensor] = field(default_factory=dict)
    factors: Mapping[str, Tensor] = field(default_factory=dict)


def keep(
    scores: Sequence[Tensor],
    ratio: float,
    *,
    scope: str = "layer",
    rule: str = "floor",
    least: int = 1,
    round_to: int = 1,
    uniform: bool = False,
) -> list[Tensor]:
    """Places that stay, of each layer, ascending, int64.

    Args:
        scores: [n] of each layer; any lengths.
        ratio: share that goes, in [0, 1). 0 keeps all.
        scope: "layer" takes that share of each, "global" of all together.
        rule: "floor" takes floor(ratio n + 1e-6), lowest first, of equal ones those behind first. "quantile", the
            authors', takes all up to the ratio's quantile, interpolated in float64: of equal ones all.
        least: how many stay in every layer, its best, whatever the rule. Under floor others go for them.
        round_to: what stays of a layer is rounded up to a multiple of this, as far as it has them.
        uniform: as many stay in every layer as in the one that keeps most; the scope is then "layer".

    Raises:
        ValueError: a score is not finite.

    >>> [places.tolist() for places in keep([torch.tensor([3.0, 1.0, 2.0, 1.0])], 0.25)]
    [[0, 1, 2]]
    """
    layers = [each.detach().double().cpu() for each in scores]
    if not all(bool(each.isfinite().all()) for each in layers):
        raise ValueError("scores: must be finite; the estimation has diverged")
    ranked = [each.argsort(descending=True, stable=True) for each in layers]  # best first; of equal ones those before
    if ratio == 0 or not layers:
        counts = [each.numel() for each in layers]
    elif scope == "global" and not uniform:
        counts = _over_all(layers, ranked, ratio, rule, least)
    else:
        counts = [max(each.numel() - _pruned(each, ratio, rule), min(least, each.numel())) for each in layers]
    most = max(counts, default=0)
    counts = [-(-(most if uniform else count) // round_to) * round_to for count in counts]
    return [order[:count].sort().values for order, count in zip(ranked, counts, strict=True)]


def _pruned(scores: Tensor, ratio: float, rule: str) -> int:
    if rule == "floor":
        return math.floor(ratio * scores.numel() + _SLACK)
    return int((scores <= _quantile(scores, ratio)).sum()) if scores.numel() else 0


def _quantile(scores: Tensor, ratio: float) -> float:
    """Interpolated linearly, from the nearer side, as NumPy has it."""
    ordered = scores.sort().values.tolist()
    place = ratio * (len(ordered) - 1)
    below = math.floor(place)
    low, high, weight = ordered[below], ordered[min(below + 1, len(ordered) - 1)], place - below
    return high - (high - low) * (1 - weight) if weight >= 0.5 else low + (high - low) * weight


def _over_all(layers: list[Tensor], ranked: list[Tensor], ratio: float, rule: str, least: int) -> list[int]:
    """How many of each layer stay, of one share for all."""
    joined = torch.cat(layers)
    if rule == "quantile":
        threshold = _quantile(joined, ratio)
        return [max(int((each > threshold).sum()), min(least, each.numel())) for each in layers]
    safe = torch.cat([torch.zeros(each.numel(), dtype=torch.bool) for each in layers])
    start = 0
    for order in ranked:
        safe[order[:least] + start] = True
        start += order.numel()
    lowest = joined.flip(0).argsort(stable=True)  # of equal ones those behind come first
    lowest = joined.numel() - 1 - lowest
    gone = torch.zeros_like(safe)
    gone[lowest[~safe[lowest]][: _pruned(joined, ratio, rule)]] = True
    return [int((~each).sum()) for each in gone.split([each.numel() for each in layers])]


def by_group(coupled: Coupled, config: LightPeftConfig) -> bool:
    """Whether whole key-value groups of an attention go, or heads of each."""
    if config.head_granularity is not None:
        return config.head_granularity == "group" or coupled.group == 1
    groups = coupled.units // coupled.group
    return coupled.group == 1 or config.rule == "quantile" or math.floor(config.head_ratio * groups + _SLACK) > 0


def check_shares(structures: Sequence[Coupled], config: LightPeftConfig) -> None:
    """Raises ValueError, naming the ratio, where it is less than one of the heads, groups or channels of a layer."""
    if config.rule == "quantile":  # which takes at least one
        return
    for each in structures:
        count, what, name = each.units, "channels", "ffn_ratio"
        if part_of(each) == "heads":
            whole, name = by_group(each, config), "head_ratio"
            count = each.units // each.group if whole else each.group
            what = "heads" if each.group == 1 else "key-value groups" if whole else "query heads of a group"
        elif config.ffn_scope == "global" and not config.uniform:
            continue
        ratio = config.ratio(part_of(each))
        if ratio and math.floor(ratio * count + _SLACK) == 0:
            raise ValueError(
                f"{name}: {ratio:g} of {count} {what} of {each.name} is less than one; raise it or set it to 0"
            )


def select(structures: Sequence[Coupled], scores: Scores, config: LightPeftConfig) -> Kept:
    """What stays of a model and its adapters. The same scores give the same, on any device.

    Args:
        structures: of the base model, in `find_coupled`'s order.

    Raises:
        ValueError: no adapter would be left, or a score is not finite.
    """
    units = select_units(structures, scores, config)
    empty = {axis.module for each in structures if units.get(each.name) == () for axis in each.axes}
    stay = _keep_ranks(scores, config) | {name: () for name in scores.ranks if name in empty}
    ranks = {name: stay[name] for name in scores.ranks if name in stay}  # in the model's order
    if scores.ranks and all(ranks.get(name) == () for name in scores.ranks):
        raise ValueError(
            f"module_ratio: no adapter is left of {len(scores.ranks)} at module_ratio {config.module_ratio} and "
            f"rank_ratio {config.rank_ratio}; lower them"
        )
    scales = {}
    if config.keep_masks == "fold":
        scales = {name: tuple(scores.factors[name].detach().cpu()[list(kept)].tolist()) for name, kept in units.items()}
    return Kept(units, ranks, scales)


def select_units(structures: Sequence[Coupled], scores: Scores, config: LightPeftConfig) -> dict[str, tuple[int, ...]]:
    """Heads and channels that stay, by structure."""
    units: dict[str, tuple[int, ...]] = {}
    for part, kept_of in (("heads", _keep_heads), ("ffn", _keep_channels)):
        found = [each for each in structures if part_of(each) == part and each.name in scores.units]
        places = kept_of(found, scores, config)
        units |= {each.name: tuple(kept.tolist()) for each, kept in zip(found, places, strict=True)}
    return units


def part_of(coupled: Coupled) -> str:
    """ "heads" or "ffn"."""
    return "heads" if coupled.mlp is None else "ffn"


def _keep_heads(found: Sequence[Coupled], scores: Scores, config: LightPeftConfig) -> list[Tensor]:
    """Query heads that stay; of grouped queries whole groups, by their members' sum, or as many of each group."""
    options: dict[str, Any] = {"rule": config.rule, "least": 0 if config.allow_empty else 1}
    groups = {each.name: scores.units[each.name].view(-1, each.group) for each in found}
    kept: dict[str, Tensor] = {}
    whole = [each for each in found if by_group(each, config)]
    places = keep([groups[each.name].sum(1) for each in whole], config.head_ratio, uniform=config.uniform, **options)
    for each, own in zip(whole, places, strict=True):
        kept[each.name] = (own.view(-1, 1) * each.group + torch.arange(each.group)).flatten()
    # As many of each group; of each layer's groups, or of all of them.
    parted = [each for each in found if each.name not in kept]
    for some in [parted] if config.uniform else [[each] for each in parted]:
        rows = [row for each in some for row in groups[each.name]]
        left = iter(keep(rows, config.head_ratio, uniform=True, **options))
        for each in some:
            kept[each.name] = torch.cat([next(left) + start for start in range(0, each.units, each.group)])
    return [kept[each.name] for each in found]


def _keep_channels(found: Sequence[Coupled], scores: Scores, config: LightPeftConfig) -> list[Tensor]:
    return keep(
        [scores.units[each.name] for each in found], config.ffn_ratio, scope=config.ffn_scope, rule=config.rule,
        least=0 if config.allow_empty else 1, round_to=config.round_to, uniform=config.uniform,
    )  # fmt: skip


def _keep_ranks(scores: Scores, config: LightPeftConfig) -> dict[str, tuple[int, ...]]:
    """By adapted layer: the ranks that stay, () where the adapter goes. Layers without a change are left out."""
    names = list(scores.ranks)
    found: dict[str, tuple[int, ...]] = {}
    if config.module_ratio and names:
        (stay,) = keep(
            [torch.stack([scores.modules[n] for n in names])], config.module_ratio, rule=config.rule, least=0
        )
        left = [names[i] for i in stay.tolist()]
        found = {name: () for name in names if name not in left}
        names = left
    if config.rank_ratio:
        places = keep(
            [scores.ranks[n] for n in names], config.rank_ratio, scope=config.rank_scope, rule=config.rule, least=0
        )
        found |= {name: tuple(each.tolist()) for name, each in zip(names, places, strict=True)}
    return found
