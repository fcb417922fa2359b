"""What Light-PEFT gives to recipes: the first phase, the cut, and the model that the main run trains."""

from dataclasses import replace
from typing import Any

import peft
import torch.distributed as dist

from deftcore.methods.light_peft.adapters import add_adapters, peft_config
from deftcore.methods.light_peft.baselines import magnitude_scores, random_scores
from deftcore.methods.light_peft.config import LightPeftConfig
from deftcore.methods.light_peft.estimation import Estimation
from deftcore.methods.light_peft.selection import check_shares, select
from deftcore.methods.light_peft.slimming import slim
from deftcore.models.blocks import base_of
from deftcore.models.coupled import find_coupled, stored_sizes
from deftcore.models.families import model_type
from deftcore.models.kept import Kept
from deftcore.models.slimming import check_cut
from deftcore.training.fields import Count, Share
from deftcore.training.registry import Method, Setup, register

_PHASE = "estimate"  # its folder
_BASELINES = {"random": random_scores, "magnitude": magnitude_scores}


def _wrap(model: Any, config: LightPeftConfig, setup: Setup) -> Any:
    adapted = add_adapters(model, config)
    check_cut(adapted, _by_chance(adapted, config), requantize=config.requantize)  # before anything trains
    slim(adapted, _of_the_first_process(_estimate(adapted, config, setup)), requantize=config.requantize)
    return adapted


def _by_chance(model: Any, config: LightPeftConfig) -> Kept:
    """As much as the estimation will leave, drawn at random."""
    structures = find_coupled(base_of(model))
    check_shares(structures, config)
    scores = random_scores(model, structures, config)
    return select(structures, replace(scores, factors=scores.units), config)


def _estimate(model: Any, config: LightPeftConfig, setup: Setup) -> Kept:
    """What stays, by the first phase: adapters train in any case, masks where they decide."""
    changes = {"max_steps": config.estimate_steps}
    if config.importance in _BASELINES:
        setup.phase(model, _PHASE, changes)
        structures = find_coupled(base_of(model))
        return select(structures, _BASELINES[config.importance](model, structures, config), config)
    estimation = Estimation(model, config)
    try:
        setup.phase(model, _PHASE, changes, objective=estimation)
    finally:
        estimation.detach()
    return select(estimation.structures, estimation.scores(), config)


def _of_the_first_process(kept: Kept) -> Kept:
    if not (dist.is_available() and dist.is_initialized()):
        return kept
    held = [kept.to_dict()]
    dist.broadcast_object_list(held, src=0)
    return Kept.from_dict(held[0])


def _check(model: Any, config: LightPeftConfig) -> None:
    """Prunes a model without weights, by chance."""
    adapted = peft.get_peft_model(model, peft_config(model, config))
    slim(adapted, _by_chance(adapted, config))
    if config.uniform and stored_sizes(base_of(adapted).config):
        raise ValueError(
            f"uniform: the config of {model_type(model)} has no field for the size of a head, without which none is "
            "built with fewer; head_ratio=0 prunes channels alone"
        )


_LIGHT: dict[str, Any] = {
    "paper": "arXiv 2406.03792",
    "config": LightPeftConfig,
    "limits": {"r": Count, "estimate_steps": Count, "dropout": Share | None},
    "wrap": _wrap,
    "check": _check,
}
register(
    Method(
        name="light-peft",
        summary="Heads, channels, adapters and ranks pruned early, the small model trained.",
        needs="a model whose heads and channels are known; trains in two phases, the first of estimate_steps",
        part="MLP",
        **_LIGHT,
    )
)
register(
    Method(
        name="qlight-peft",
        summary="Light-PEFT over a base in 4 bits.",
        needs="as light-peft; requantize where cuts go through blocks of 4-bit weights",
        quantized=True,
        **_LIGHT,
    )
)
