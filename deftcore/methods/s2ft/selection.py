"""Which heads and channels S2FT trains (arXiv 2412.06289, section 4), and where they lie once permuted."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from deftcore.methods.s2ft.config import S2ftConfig
from deftcore.methods.s2ft.scores import Scores, activation_scores, gradient_scores
from deftcore.models.coupled import (
    CHANNEL_ROLES,
    HEAD_ROLES,
    Axis,
    Coupled,
    elements,
    find_coupled,
    is_packed,
    selected_first,
)
from deftcore.models.families import GATED_MLP
from deftcore.models.unit_norms import weight_norms
from deftcore.nn.activations import has_kernel
from deftcore.nn.linear import Linear4bit, is_transposed
from deftcore.nn.linear16 import LINEARS

logger = logging.getLogger("deftcore")


@dataclass(frozen=True)
class Slice:
    """The trained channels of one weight."""

    dim: int
    places: Tensor  # [s] after the permutation, ascending
    indices: Tensor  # [s] before it, in the same order


@dataclass(frozen=True)
class Plan:
    """What wrapping does to a model."""

    selected: dict[str, Tensor]  # units per Axis.key, ascending
    orders: list[tuple[Coupled, Tensor]]  # permutations to apply
    slices: dict[str, Slice]  # per module
    gated: list[str]  # gated MLP modules of the Llama form, whose activation can be fused


def make_plan(model: nn.Module, config: S2ftConfig) -> Plan:
    """Selects units (or takes `config.indices`), and finds orders in which they are contiguous.

    Raises:
        ValueError: naming the field of the config, or the model's part, that does not fit.
    """
    structures = find_coupled(model)
    targets = _targets(structures, config)
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for coupled in structures:
        for axis in coupled.weights(targets):
            module = model.get_submodule(axis.module)
            if type(module) not in (*LINEARS, Linear4bit) and not is_transposed(module):
                kind = f"{type(module).__module__}.{type(module).__name__}"
                raise ValueError(
                    f"{axis.module}: must be a plain linear layer, got {kind}; unload other adapters first"
                )
            if owners.get(id(module.weight), 1) > 1:
                raise ValueError(f"{axis.module}: its weight is tied to another module's")
    if config.indices is None:
        selected = select(structures, model, config, targets, None)
    else:
        selected = {key: torch.tensor(sorted(units), dtype=torch.int64) for key, units in config.indices.items()}
        _check_indices(structures, selected)
    orders: list[tuple[Coupled, Tensor]] = []
    slices: dict[str, Slice] = {}
    for coupled in structures:
        axes = [axis for axis in coupled.axes if axis.tensor == "weight" and axis.key in selected]
        if not axes:
            continue
        order = torch.arange(coupled.units)
        if config.storage == "shared" and not is_packed(model, coupled):
            # Weights that share a role (T5's stack) share the selection too.
            order = selected_first(coupled, {axis.role: selected[axis.key] for axis in axes})
            orders.append((coupled, order))
        for axis in axes:
            own = coupled.order_of(axis, order)
            here = torch.isin(own, selected[axis.key]).nonzero().flatten()
            places, indices = elements(here, axis), elements(own[here], axis)
            before = slices.get(axis.module)
            if before is not None:  # a fused weight with several selected parts
                places, by_place = torch.cat((before.places, places)).sort()
                indices = torch.cat((before.indices, indices))[by_place]
            slices[axis.module] = Slice(axis.dim, places, indices)
    gated = [c.name for c in structures if c.mlp == GATED_MLP]
    fusible = [name for name in gated if has_kernel(model.get_submodule(f"{name}.{GATED_MLP.act}"))]
    return Plan(selected, orders, slices, fusible)


def _targets(structures: list[Coupled], config: S2ftConfig) -> list[str]:
    grouped = any(c.group > 1 for c in structures)
    targets = config.targets or (["down"] if grouped else ["o", "down"])
    known = {axis.role for c in structures for axis in c.axes}
    for target in targets:
        if target not in known:
            raise ValueError(f"targets: this model has {', '.join(sorted(known - {'bias'}))}, got {target!r}")
    return list(dict.fromkeys(targets))


def _check_indices(structures: list[Coupled], selected: Mapping[str, Tensor]) -> None:
    sizes = {
        axis.key: c.units // c.group if axis.shared else c.units
        for c in structures for axis in c.axes if axis.tensor == "weight" and axis.role != "bias"
    }  # fmt: skip
    for key, units in selected.items():
        if key not in sizes:
            raise ValueError(f"indices: the model has no weight {key!r}")
        if units.unique().numel() != units.numel() or units.numel() == 0:
            raise ValueError(f"indices: {key} must be units, each once, got {units.tolist()[:5]}")
        if int(units.min()) < 0 or int(units.max()) >= sizes[key]:
            raise ValueError(
                f"indices: {key} must be in 0..{sizes[key] - 1}, got {int(units.min())}..{int(units.max())}"
            )


def select(
    structures: list[Coupled], model: nn.Module, config: S2ftConfig, targets: list[str], scores: Scores | None
) -> dict[str, Tensor]:
    """Selected units per weight, ascending, int64.

    Args:
        targets: roles whose weights train.
        scores: of `deftcore.methods.s2ft.scores`; None where the strategy needs no data.

    Raises:
        ValueError: naming the field of the config: a strategy that needs data, a share below one unit, too many
            excluded.
    """
    if scores is None:
        if config.needs_data:
            raise ValueError(
                f"strategy: {config.strategy!r} needs data; use config = select_channels(model, config, batches)"
            )
        scores = weight_norms(model, structures, targets) if config.strategy == "weight" else {}
    generator = torch.Generator().manual_seed(config.seed)
    widths = [c.units for c in structures if c.weights(["down"])]
    channels = int(config.channel_ratio * max(widths, default=0) + 1e-9)
    chosen: dict[str, Tensor] = {}
    for role in targets:
        pools: list[tuple[Coupled, Axis, Tensor, int]] = []  # a score per candidate: units, or groups of them
        for coupled in structures:
            axes = coupled.weights([role])
            if not axes:
                continue
            whole = _whole_groups(coupled, axes[0], config)
            units = coupled.units // (coupled.group if axes[0].shared or whole else 1)
            if config.strategy == "random":
                score = torch.rand(units, generator=generator, dtype=torch.float64)
            else:
                squares = sum(scores[axis.key].square() for axis in axes)
                score = torch.as_tensor(squares).view(units, -1).sum(1).sqrt()
            score = score if config.order == "largest" else -score
            for axis in axes:
                used = torch.tensor((config.exclude or {}).get(axis.key, []), dtype=torch.int64)
                score[used // coupled.group if whole else used] = -torch.inf
            pools.append((coupled, axes[0], score, coupled.group if whole else 1))
        for (coupled, _, _, per), taken in zip(pools, _take(role, pools, config, channels), strict=True):
            members = (taken.view(-1, 1) * per + torch.arange(per)).flatten()
            if members.numel():
                chosen.update({axis.key: members for axis in coupled.weights([role])})
    return chosen


def _whole_groups(coupled: Coupled, axis: Axis, config: S2ftConfig) -> bool:
    return coupled.group > 1 and not axis.shared and axis.role in HEAD_ROLES and config.head_granularity != "head"


def _take(role: str, pools: list[tuple[Coupled, Axis, Tensor, int]], config: S2ftConfig, channels: int) -> list[Tensor]:
    """The best of each pool, or of all together, ascending; `channels` is what an MLP trains."""
    counts = [_count(role, score.numel(), axis, per, channels, config) for _, axis, score, per in pools]
    if config.budget == "global":
        joined = torch.cat([score for _, _, score, _ in pools])
        total = _global_count(role, pools, counts, config)
        best = torch.zeros_like(joined, dtype=torch.bool)
        best[torch.argsort(joined, descending=True, stable=True)[:total]] = True
        best &= joined > -torch.inf
        return [b.nonzero().flatten() for b in best.split([score.numel() for _, _, score, _ in pools])]
    taken = []
    for (coupled, _, score, _), count in zip(pools, counts, strict=True):
        ranked = torch.argsort(score, descending=True, stable=True)[:count]
        if bool(torch.isinf(score[ranked]).any()):
            raise ValueError(f"exclude: leaves fewer than {count} units of {coupled.name}")
        taken.append(ranked.sort().values)
    return taken


def _ratio(role: str, config: S2ftConfig) -> float | None:
    return config.head_ratio if role in HEAD_ROLES else config.channel_ratio


def _count(role: str, units: int, axis: Axis, per: int, channels: int, config: S2ftConfig) -> int:
    ratio = _ratio(role, config)
    if ratio is None:  # as many parameters as the MLP's channels: a head is `width` channels of the same length
        return min(max(1, round(channels / (axis.width * per))), units - 1)
    count = int(ratio * units + 1e-9)
    if count == 0 and config.budget == "layer":
        name = "head_ratio" if role in HEAD_ROLES else "channel_ratio"
        raise ValueError(
            f"{name}: {ratio} of {units} is less than one unit of {axis.module}; raise it, or budget=global"
        )
    if role in CHANNEL_ROLES and count % config.round_to:
        rounded = min(-(-count // config.round_to) * config.round_to, units)
        logger.info("S2FT: %s: %d channels rounded up to %d", axis.module, count, rounded)
        count = rounded
    return count


def _global_count(role: str, pools: list, counts: list[int], config: S2ftConfig) -> int:
    ratio = _ratio(role, config)
    if ratio is None:
        return sum(counts)
    total = int(ratio * sum(score.numel() for _, _, score, _ in pools) + 1e-9)
    if total == 0:
        raise ValueError(f"{role}: a ratio of {ratio} selects nothing")
    return total


def select_channels(
    model: Any, config: S2ftConfig, batches: Iterable[Mapping[str, Tensor]] | None = None
) -> S2ftConfig:
    """The config with `indices` filled: what wrapping this model will train.

    Args:
        model: a Transformers model, not yet wrapped.
        batches: inputs of the model, for the strategies activation, product and gradient (then with labels). Padding,
            by attention_mask, and by labels in a decoder with an encoder, does not count.

    Raises:
        ValueError: when the strategy needs batches and there are none.
    """
    structures = find_coupled(model)
    targets = _targets(structures, config)
    scores = None
    if config.needs_data:
        batches = list(batches or [])
        if not batches:
            raise ValueError(f"batches: strategy {config.strategy!r} needs at least one, got none")
        if config.strategy == "gradient":
            scores = gradient_scores(model, structures, targets, batches)
        else:
            scores = activation_scores(model, structures, targets, batches)
            if config.strategy == "product":
                weights = weight_norms(model, structures, targets)
                scores = {key: score * weights[key] for key, score in scores.items()}
    chosen = select(structures, model, config, targets, scores)
    return replace(config, indices={key: units.tolist() for key, units in chosen.items()})
