"""What the native steps of all models share: matrices, and numbers under which ops find what they compute with."""

import itertools
from dataclasses import dataclass, fields, replace
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from deftcore.ops.checks import check_shape
from deftcore.ops.kernels import DTYPE_CODES, address, native
from deftcore.ops.quant4 import int8_blocks, linear_4bit_int8_ref
from deftcore.ops.quantized import QuantizedTensor

_INT8_BLOCK = 32  # of x, where it meets a matrix in int8
_INT8_ROWS = 3  # in place of a dtype's code
_numbers = itertools.count()
_stacks: "WeakValueDictionary[int, Any]" = WeakValueDictionary()


@dataclass(frozen=True, eq=False)
class Matrix:
    """y = x W^T + bias.

    A weight in int8 is worth `scales` times it, and x is rounded to int8 by blocks of 32 there. With `int8` a weight in
    4 bits rounds x too, as `linear_4bit` does.

    Raises:
        TypeError, ValueError: naming the field.
    """

    weight: Tensor | QuantizedTensor  # [M, K]; in 4 bits of any kind whose rows are whole blocks
    bias: Tensor | None = None  # [M] float32
    scales: Tensor | None = None  # [M] float32, of a weight in int8
    int8: bool = False

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
        if (self.scales is None) == (self.weight.dtype == torch.int8):
            raise ValueError(f"scales: are of a weight in int8, and needed there; the weight is {self.weight.dtype}")
        if self.scales is not None and self.weight.shape[1] % _INT8_BLOCK:
            raise ValueError(f"weight: rows in int8 must be whole blocks of {_INT8_BLOCK}, got {self.weight.shape[1]}")
        if self.int8 and not isinstance(self.weight, QuantizedTensor):
            raise TypeError(f"int8: is of weights in 4 bits, got {self.weight.dtype}")
        for name, vector in (("bias", self.bias), ("scales", self.scales)):
            if vector is not None:
                check_shape(name, vector, (self.weight.shape[0],), "one per row")
                if vector.dtype != torch.float32:
                    raise TypeError(f"{name}: dtype must be torch.float32, got {vector.dtype}")

    def rounded(self) -> "Matrix":
        """In int8 where that is faster: of a weight in 4 bits x is, of a dense one with whole blocks both are, each row
        to 255 steps of its largest magnitude."""
        if isinstance(self.weight, QuantizedTensor):
            return replace(self, int8=True)
        if self.scales is not None or self.weight.shape[1] % _INT8_BLOCK:
            return self
        scales = self.weight.float().abs().amax(1) / 127
        steps = torch.where(scales > 0, scales, 1.0).unsqueeze(1)
        return Matrix((self.weight / steps).round_().to(torch.int8), self.bias, scales)

    @property
    def has_kernel(self) -> bool:
        """Whether native steps read it."""
        return isinstance(self.weight, QuantizedTensor) or self.weight.dtype in (*DTYPE_CODES, torch.int8)

    def __call__(self, x: Tensor) -> Tensor:
        """By PyTorch, in x's dtype."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if isinstance(self.weight, QuantizedTensor):
            if self.int8:
                return linear_4bit_int8_ref(x, self.weight.parts(), bias)
            return F.linear(x, self.weight.dequantize().to(x.dtype), bias)
        weight = self.weight.to(x.dtype)
        if self.scales is not None:
            x8, steps = int8_blocks(x, _INT8_BLOCK)
            weight, x = weight * self.scales.to(x.dtype).unsqueeze(1), (x8 * steps.unsqueeze(2)).flatten(1)
        return F.linear(x, weight, bias)


def rounded_layer(layer: Any) -> Any:
    """A layer, which is a dataclass, whose weights in 4 bits round what they are multiplied with."""
    matrices = {f.name: getattr(layer, f.name) for f in fields(layer)}
    in_4_bits = {
        name: m for name, m in matrices.items() if isinstance(m, Matrix) and isinstance(m.weight, QuantizedTensor)
    }
    return replace(layer, **{name: m.rounded() for name, m in in_4_bits.items()})


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
        code = _INT8_ROWS if m.scales is not None else DTYPE_CODES.get(m.weight.dtype, -1)
        row |= {"weight": address(m.weight), "dtype": code, "absmax": address(m.scales)}
        return list(row.values())
    q = m.weight
    row |= {"weight": address(q.packed), "code": address(q.code), "absmax": address(q.absmax)}
    row |= {"block_size": q.block_size, "int8": int(m.int8)}
    if q.nested_absmax is not None:
        held.append(torch.tensor([q.nested_offset]))
        row |= {"nested_absmax": address(q.nested_absmax), "nested_code": address(q.nested_code)}
        row["nested_offset"] = address(held[-1])
    return list(row.values())


def rms_normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] over its root mean square, times weight [D]; in x's dtype."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)
