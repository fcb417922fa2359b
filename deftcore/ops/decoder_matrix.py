"""What the native steps of all models share: matrices, and numbers under which ops find what they compute with."""

import itertools
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from deftcore.ops.checks import check_shape
from deftcore.ops.kernels import DTYPE_CODES, address, native
from deftcore.ops.quantized import QuantizedTensor

_numbers = itertools.count()
_stacks: "WeakValueDictionary[int, Any]" = WeakValueDictionary()


@dataclass(frozen=True, eq=False)
class Matrix:
    """y = x W^T + bias.

    Raises:
        TypeError, ValueError: naming the field.
    """

    weight: Tensor | QuantizedTensor  # [M, K]; in 4 bits of any kind whose rows are whole blocks
    bias: Tensor | None = None  # [M] float32

    def __post_init__(self) -> None:
        if self.weight.dim() != 2:
            raise ValueError(f"weight: must be a matrix, got shape {tuple(self.weight.shape)}")
        if isinstance(self.weight, QuantizedTensor):
            if self.weight.column_blocks or self.weight.shape[1] % self.weight.block_size:
                raise ValueError(
                    f"weight: rows in 4 bits must be whole blocks of {self.weight.block_size}, got shape "
                    f"{tuple(self.weight.shape)}"
                )
        elif not self.weight.is_contiguous():
            raise ValueError(f"weight: must be contiguous, got strides {self.weight.stride()}")
        if self.bias is not None:
            check_shape("bias", self.bias, (self.weight.shape[0],), "one per row")
            if self.bias.dtype != torch.float32:
                raise TypeError(f"bias: dtype must be torch.float32, got {self.bias.dtype}")

    @property
    def has_kernel(self) -> bool:
        """Whether native steps read it."""
        return isinstance(self.weight, QuantizedTensor) or self.weight.dtype in DTYPE_CODES

    def __call__(self, x: Tensor) -> Tensor:
        """By PyTorch, in x's dtype."""
        weight = self.weight.dequantize() if isinstance(self.weight, QuantizedTensor) else self.weight
        return F.linear(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def enlist(stack: Any) -> int:
    """A number for a model's weights, under which `enlisted` gives them as long as they live."""
    number = next(_numbers)
    _stacks[number] = stack
    return number


def enlisted(number: int) -> Any:
    """What has that number."""
    return _stacks[number]


def matrix_row(m: Matrix | None, held: list[Tensor]) -> list[int]:
    """The fields of the native struct, all 0 for None; what they point to beside m's own tensors is added to `held`."""
    row = dict.fromkeys(native.decoder_matrix.split(", "), 0)
    if m is None:
        return list(row.values())
    row |= {"bias": address(m.bias), "rows": m.weight.shape[0], "cols": m.weight.shape[1]}
    if isinstance(m.weight, Tensor):
        row |= {"weight": address(m.weight), "dtype": DTYPE_CODES.get(m.weight.dtype, -1)}
        return list(row.values())
    q = m.weight
    row |= {"weight": address(q.packed), "code": address(q.code), "absmax": address(q.absmax)}
    row["block_size"] = q.block_size
    if q.nested_absmax is not None:
        held.append(torch.tensor([q.nested_offset]))
        row |= {"nested_absmax": address(q.nested_absmax), "nested_code": address(q.nested_code)}
        row["nested_offset"] = address(held[-1])
    return list(row.values())


def rms_normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] over its root mean square, times weight [D]; in x's dtype."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)
