"""What one compares the estimation with: chance, and the size of weights."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deftcore.methods.light_peft.adapters import Site, sites
from deftcore.methods.light_peft.config import LightPeftConfig
from deftcore.methods.light_peft.selection import Scores, part_of
from deftcore.models.blocks import base_of
from deftcore.models.coupled import CHANNEL_ROLES, HEAD_ROLES, Coupled
from deftcore.models.unit_norms import weight_norms


def random_scores(model: Any, structures: Sequence[Coupled], config: LightPeftConfig) -> Scores:
    """Uniform ones, drawn by `config.seed`; for the adapters of a PEFT model."""
    generator = torch.Generator().manual_seed(config.seed)

    def draw(*size: int) -> Tensor:
        return torch.rand(size, generator=generator, dtype=torch.float64)

    found = sites(model)
    return Scores(
        {each.name: draw(each.units) for each in structures if config.ratio(part_of(each))},
        {site.name: draw() for site in found},
        {site.name: draw(site.first.shape[0]) for site in found},
    )


def magnitude_scores(model: Any, structures: Sequence[Coupled], config: LightPeftConfig) -> Scores:
    """Norms: of a unit's rows and columns in all matrices that hold it, of an adapter's product of factors, of a rank's
    share of that. Keys and values of a group of queries count for each of them."""
    base = base_of(model)
    norms = weight_norms(base, structures, [*HEAD_ROLES, *CHANNEL_ROLES])
    found = sites(model)
    return Scores(
        {each.name: _unit_norms(each, norms) for each in structures if config.ratio(part_of(each))},
        {site.name: _product_norm(site) for site in found},
        {
            site.name: site.first.detach().double().norm(dim=1) * site.second.detach().double().norm(dim=0)
            for site in found
        },
    )


def _unit_norms(coupled: Coupled, norms: dict[str, Tensor]) -> Tensor:
    squares = torch.zeros(coupled.units, dtype=torch.float64)
    for axis in coupled.weights([*HEAD_ROLES, *CHANNEL_ROLES]):
        own = norms[axis.key].square()
        squares += own.repeat_interleave(coupled.group) if axis.shared else own
    return squares.sqrt()


def _product_norm(site: Site) -> Tensor:
    """||second first||, from the factors' Gram matrices."""
    first, second = site.first.detach().double(), site.second.detach().double()
    return ((second.t() @ second) * (first @ first.t())).sum().clamp(min=0).sqrt()
