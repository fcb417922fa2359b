"""How a cloud is changed before the model learns from it."""

import math

import torch
from torch import Tensor


def choose_points(cloud: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """`count` of a cloud's points [N, 3]: by chance, or without a generator the first; from the beginning again where
    there are fewer."""
    order = torch.arange(len(cloud)) if generator is None else torch.randperm(len(cloud), generator=generator)
    return cloud[order[torch.arange(count) % len(cloud)]]


def augment(
    cloud: Tensor,
    generator: torch.Generator,
    *,
    rotate: bool = False,
    scale: tuple[float, float] = (1.0, 1.0),
    shift: float = 0.0,
) -> Tensor:
    """A cloud [N, 3] turned about y by any angle, then stretched and shifted along each axis by factors from
    [scale[0], scale[1]) and steps from [-shift, shift)."""
    angle, *rest = torch.rand(7, generator=generator, dtype=torch.float64).tolist()
    if rotate:
        c, s = math.cos(2 * math.pi * angle), math.sin(2 * math.pi * angle)
        cloud = cloud @ torch.tensor([[c, 0, -s], [0, 1, 0], [s, 0, c]], dtype=cloud.dtype)
    low, high = scale
    factors = torch.tensor([low + (high - low) * each for each in rest[:3]], dtype=cloud.dtype)
    steps = torch.tensor([shift * (2 * each - 1) for each in rest[3:]], dtype=cloud.dtype)
    return cloud * factors + steps
