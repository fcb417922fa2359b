"""`nn.Linear` in 16 bits on processors where PyTorch's own product is the slower one."""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from deftcore.ops.autocast import autocast_dtype
from deftcore.ops.products import linear_16bit

_HALVES = (torch.bfloat16, torch.float16)


class Linear16(nn.Linear):
    """`nn.Linear` whose 16-bit forward, input gradient and weight gradient are the fastest product's.

    `patch` changes a layer's class to this one and `unpatch` changes it back: parameters, names and files stay.
    """

    def forward(self, input: Tensor) -> Tensor:
        """x W^T + bias, [..., K] to [..., M], in x's dtype or autocast's: 16 bits on a CPU by
        `deftcore.ops.products.linear_16bit`, all else by PyTorch."""
        dtype = autocast_dtype(input) or input.dtype
        if not _covers(dtype, input, self.weight, self.bias):
            return super().forward(input)
        if torch.is_autocast_enabled("cpu"):
            bias = None if self.bias is None else self.bias.to(dtype)
            return linear_16bit(input.to(dtype), self.weight.to(dtype), bias)
        return linear_16bit(input, self.weight, self.bias)


LINEARS = (nn.Linear, Linear16)  # the classes of a plain linear layer, as it is made and as `patch` leaves it


def _covers(dtype: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the op takes a call; what it does not know, and all errors, are PyTorch's."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if dtype not in _HALVES or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        return False
    if any(t.device.type != "cpu" or not t.is_floating_point() or t.layout != torch.strided for t in tensors):
        return False
    if torch.is_autocast_enabled("cpu"):
        if any(t.dtype == torch.float64 for t in tensors):
            return False
    elif any(t.dtype != dtype for t in tensors):
        return False
    # The op has no rules for vmap and forward-mode derivatives.
    return forward_ad._current_level < 0 and not torch._C._are_functorch_transforms_active()
