"""Norms of heads' and channels' own vectors in the matrices that hold them: how much each of them weighs."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from deftcore.models.coupled import Axis, Coupled, elements, layer_at
from deftcore.nn.linear import PackedModule, is_transposed


def unit_norms(model: nn.Module, coupled: Coupled, axis: Axis, tensor: Tensor) -> Tensor:
    """Norm of each unit's rows or columns of a matrix [units], float64 on the CPU; of each group's, where it has one
    per group.

    Args:
        tensor: of the weight's shape, as its module keeps it: the weight or its gradient.
    """
    logical = tensor.t() if is_transposed(layer_at(model, axis.module)) else tensor
    lines = logical.t() if axis.dim == 1 else logical
    units = coupled.units // coupled.group if axis.shared else coupled.units
    own = lines.index_select(0, elements(torch.arange(units), axis).to(lines.device))
    return own.double().square().sum(1).view(units, axis.width).sum(1).sqrt().cpu()


def weight_norms(model: nn.Module, structures: Iterable[Coupled], roles: Iterable[str]) -> dict[str, Tensor]:
    """`unit_norms` of the weights of these roles, by `Axis.key`; of a packed weight, decoded."""
    found, roles = {}, list(roles)
    for coupled in structures:
        for axis in coupled.weights(roles):
            module = layer_at(model, axis.module)
            weight = module.quantized.dequantize() if isinstance(module, PackedModule) else module.weight
            found[axis.key] = unit_norms(model, coupled, axis, weight.detach())
    return found
