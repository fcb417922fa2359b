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
    """y = x W^T + bias + lora_scale (x A^T) B^T.

    A weight in int8, in -127..127 and contiguous, is worth `scales` times it, and x is rounded to int8 by blocks of 32
    there. With `int8` a weight in 4 bits rounds x too, as `linear_4bit` does.

    Raises:
        TypeError, ValueError: naming the field.
    """

    weight: Tensor | QuantizedTensor  # [M, K], each row in one piece; in 4 bits of any kind whose rows are whole blocks
    bias: Tensor | None = None  # [M] float32
    scales: Tensor | None = None  # [M] float32, of a weight in int8
    int8: bool = False
    lora_a: Tensor | None = None  # [R, K] float32
    lora_b: Tensor | None = None  # [M, R] float32
    lora_scale: float = 1.0
    neuron_major: bool = False  # weight is [K, M], in 4 bits also of column blocks; lora_a is [K, R]

    def __post_init__(self) -> None:
        w = self.weight
        if w.dim() != 2:
            raise ValueError(f"weight: must be a matrix, got shape {tuple(w.shape)}")
        if isinstance(w, QuantizedTensor):
            whole = w.shape[1] % (2 if w.column_blocks else w.block_size) == 0
            if not whole or (w.column_blocks and not self.neuron_major):
                raise ValueError(
                    f"weight: rows in 4 bits must be whole blocks of {w.block_size}, got shape {tuple(w.shape)}"
                )
        elif (w.stride(1) != 1 and w.shape[1] > 1) or (w.stride(0) < w.shape[1] and w.shape[0] > 1):
            raise ValueError(f"weight: rows must be in one piece, got strides {w.stride()}")
        if (self.scales is None) == (w.dtype == torch.int8):
            raise ValueError(f"scales: are of a weight in int8, and needed there; the weight is {w.dtype}")
        if self.scales is not None:
            self._check_int8(w)
        if self.int8 and (not isinstance(w, QuantizedTensor) or self.neuron_major):
            raise TypeError(f"int8: is of weights in 4 bits whose rows are outputs, got {w.dtype}")
        columns, rows = self.shape[1], self.shape[0]
        ranks = [] if self.lora_b is None else [self.lora_b.shape[-1]]
        wanted = {"bias": (rows,), "scales": (rows,), "lora_a": (*ranks, columns), "lora_b": (rows, *ranks)}
        if self.neuron_major:
            wanted["lora_a"] = (columns, *ranks)
        if (self.lora_a is None) != (self.lora_b is None):
            raise ValueError("lora_a: comes with lora_b, or neither does")
        for name, shape in wanted.items():
            tensor = getattr(self, name)
            if tensor is None:
                continue
            check_shape(name, tensor, shape, "the matrix'")
            if tensor.dtype != torch.float32:
                raise TypeError(f"{name}: dtype must be torch.float32, got {tensor.dtype}")
            if not tensor.is_contiguous():
                raise ValueError(f"{name}: must be contiguous, got strides {tensor.stride()}")

    def _check_int8(self, w: Any) -> None:
        if w.shape[1] % _INT8_BLOCK:
            raise ValueError(f"weight: rows in int8 must be whole blocks of {_INT8_BLOCK}, got {w.shape[1]}")
        if self.neuron_major:
            raise ValueError("neuron_major: is of no weight in int8")
        if not w.is_contiguous():
            raise ValueError(f"weight: in int8 must be contiguous, got strides {w.stride()}")
        if (w == -128).any():  # whose sign some processors' products cannot turn
            raise ValueError("weight: in int8 must be in -127..127, got -128")

    @property
    def shape(self) -> tuple[int, int]:
        """(M, K)."""
        rows, columns = self.weight.shape
        return (columns, rows) if self.neuron_major else (rows, columns)

    def rounded(self) -> "Matrix":
        """In int8 where that is faster: of a weight in 4 bits x is, of a dense one with whole blocks both are, each row
        to 255 steps of its largest magnitude."""
        if self.neuron_major or self.scales is not None:
            return self
        if isinstance(self.weight, QuantizedTensor):
            return replace(self, int8=True)
        if self.weight.shape[1] % _INT8_BLOCK:
            return self
        scales = self.weight.float().abs().amax(1) / 127
        steps = torch.where(scales > 0, scales, 1.0).unsqueeze(1)
        return replace(self, weight=(self.weight / steps).round_().to(torch.int8), scales=scales)

    @property
    def has_kernel(self) -> bool:
        """Whether native steps read it."""
        return isinstance(self.weight, QuantizedTensor) or self.weight.dtype in (*DTYPE_CODES, torch.int8)

    def __call__(self, x: Tensor) -> Tensor:
        """By PyTorch, in x's dtype."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = self._product(x) if bias is None else self._product(x) + bias
        if self.lora_a is None or self.lora_b is None:
            return y
        a = self.lora_a.to(x.dtype)
        return y + self.lora_scale * (x @ (a if self.neuron_major else a.t())) @ self.lora_b.to(x.dtype).t()

    def _product(self, x: Tensor) -> Tensor:
        w = self.weight
        if isinstance(w, QuantizedTensor):
            if self.int8:
                return linear_4bit_int8_ref(x, w.parts())
            w = w.dequantize()
        weight = w.to(x.dtype)
        if self.scales is not None:
            x8, steps = int8_blocks(x, _INT8_BLOCK)
            weight, x = weight * self.scales.to(x.dtype).unsqueeze(1), (x8 * steps.unsqueeze(2)).flatten(1)
        return F.linear(x, weight.t() if self.neuron_major else weight)


class Addressed:
    """What holds addresses of its tensors, where a copy's would not be."""

    def __reduce__(self) -> Any:
        raise TypeError(
            f"{type(self).__name__}: holds addresses of its weights and is neither pickled nor copied; make another one"
        )


def check_vector(name: str, vector: Tensor, shape: tuple[int, ...]) -> None:
    """Raises unless a native step can read a tensor of a model, a norm's or a table, where it lies."""
    if vector.dtype != torch.float32:
        raise TypeError(f"{name}: dtype must be torch.float32, got {vector.dtype}")
    check_shape(name, vector, shape, "the model's")
    if not vector.is_contiguous():
        raise ValueError(f"{name}: must be contiguous, got strides {vector.stride()}")


def rounded_layer(layer: Any) -> Any:
    """A layer, which is a dataclass, whose weights in 4 bits round what they are multiplied with."""
    values = {f.name: getattr(layer, f.name) for f in fields(layer)}
    packed = {n: m for n, m in values.items() if isinstance(m, Matrix) and isinstance(m.weight, QuantizedTensor)}
    return replace(layer, **{name: m.rounded() for name, m in packed.items()})


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
    if m.lora_b is not None:
        row |= {"lora_a": address(m.lora_a), "lora_b": address(m.lora_b), "rank": m.lora_b.shape[1]}
        row["lora_scale"] = number_row(m.lora_scale, held)
    if isinstance(m.weight, Tensor):
        row |= {
            "weight": m.weight.data_ptr(),
            "stride": max(m.weight.stride(0), m.weight.shape[1]),  # of a single row it may be anything
            "dtype": _INT8_ROWS if m.scales is not None else DTYPE_CODES.get(m.weight.dtype, -1),
            "absmax": address(m.scales),
        }
        return list(row.values())
    q = m.weight
    row |= {"weight": address(q.packed), "code": address(q.code), "absmax": address(q.absmax)}
    row |= {"block_size": q.block_size, "column_blocks": int(q.column_blocks), "int8": int(m.int8)}
    if q.nested_absmax is not None:
        row |= {"nested_absmax": address(q.nested_absmax), "nested_code": address(q.nested_code)}
        row["nested_offset"] = number_row(q.nested_offset, held)
    return list(row.values())


def number_row(value: float, held: list[Tensor]) -> int:
    """Where native steps find a float, which is added to `held`."""
    held.append(torch.tensor([value], dtype=torch.float32))
    return address(held[-1])


def rms_normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] over its root mean square, times weight [D]; in x's dtype."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)
