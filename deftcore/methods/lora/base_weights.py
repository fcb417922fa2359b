"""The weight of a layer that an adapter stands on, whatever keeps it: dense, transposed or in 4 bits."""

import sys
import warnings
from typing import Any

import torch
from torch import Tensor

from deftcore.nn.linear import Linear4bit, is_transposed
from deftcore.nn.linear16 import LINEARS
from deftcore.nn.merging import merged_4bit
from deftcore.nn.sharding import whole
from deftcore.ops.quantized import QuantizedTensor

_BASES = "torch.nn.Linear, Linear4bit, bitsandbytes' Linear4bit or Conv1D"


def weight_of(base: Any) -> Any:
    """The weight [M, K] of a layer that a `PairedLora` can go on: a Tensor (the layer's own Parameter, or for Conv1D a
    view of it) or, over 4 bits, a QuantizedTensor.

    Raises:
        ValueError: another kind of layer.
    """
    if type(base) in LINEARS:
        return base.weight
    if isinstance(base, Linear4bit):
        return base.quantized
    if is_transposed(base):
        return base.weight.t()
    if "bitsandbytes" in sys.modules:
        import bitsandbytes

        if isinstance(base, bitsandbytes.nn.Linear4bit):
            from deftcore.methods.lora.bitsandbytes import quantized_of

            return quantized_of(base)
    raise ValueError(f"target_modules: must be {_BASES}, got {type(base).__name__}")


def stored_weight(base: Any) -> Any:
    """A copy of a layer's weight as it stores it: a Tensor, or the QuantizedTensor, which nothing changes in place."""
    return base.quantized if isinstance(base, Linear4bit) else base.weight.data.clone()


def dense_weight(base: Any) -> Tensor:
    """The values [M, K] of such a layer's weight, decoded where it is packed and whole where it is sharded."""
    weight = weight_of(base)
    return weight.dequantize() if isinstance(weight, QuantizedTensor) else whole(weight.detach())


def change_weight(base: Any, before: Any, update: Tensor) -> None:
    """Sets a layer's weight to that of before plus an update [M, K], with one rounding.

    Args:
        base: of those that `weight_of` takes.
        before: a Tensor as the layer stores it, or a QuantizedTensor.

    Raises:
        ValueError: a layer of bitsandbytes, whose bytes are not changed in place.
    """
    if not isinstance(base, Linear4bit) and not base.weight.is_floating_point():
        raise ValueError(
            f"model: the weight of a {type(base).__name__} cannot be changed in place; use base_mode "
            "'factored', and deftcore.merge to merge"
        )
    if isinstance(before, QuantizedTensor):
        merged, report = merged_4bit(before, update)
        base.set_quantized(merged)
        warnings.warn(f"merged into 4 bits: {report}", stacklevel=3)
        return
    moved = update.t() if is_transposed(base) else update
    base.weight.data.copy_(before.to(torch.promote_types(before.dtype, moved.dtype)) + moved)
