"""A matrix in 4 bits as the arguments of an op, and the op that decodes it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from deftcore.ops._library import define
from deftcore.ops.kernels import DTYPE_CODES, address, backend, native, stream

NESTED_BLOCK: int = native.nested_block
_DTYPES = list(DTYPE_CODES)


class Parts(NamedTuple):
    """A matrix in 4 bits as the arguments of an op; `SCHEMA` names them."""

    packed: Tensor
    absmax: Tensor
    code: Tensor
    nested_absmax: Tensor | None
    nested_code: Tensor | None
    offset: float
    rows: int
    cols: int
    block_size: int
    column_blocks: bool

    def native(self) -> Any:
        return native.Quant4(
            packed=address(self.packed), code=address(self.code), absmax=address(self.absmax),
            nested_absmax=address(self.nested_absmax), nested_code=address(self.nested_code),
            nested_offset=self.offset, rows=self.rows, cols=self.cols, block_size=self.block_size,
            column_blocks=self.column_blocks,
        )  # fmt: skip


# Of `Parts` in an op.
SCHEMA = (
    "Tensor packed, Tensor absmax, Tensor code, Tensor? nested_absmax, Tensor? nested_code, float offset, "
    "SymInt rows, SymInt cols, int block_size, bool column_blocks"
)
PARTS = len(Parts._fields)


def dequantize_ref(w: Parts, dtype: torch.dtype) -> Tensor:
    """The definition, in plain PyTorch; float64 holds the float32 values."""
    nibbles = torch.stack((w.packed >> 4, w.packed & 15), 1).flatten()[: w.rows * w.cols].long()
    scale = w.absmax
    if w.nested_absmax is not None and w.nested_code is not None:
        outer = w.nested_absmax.repeat_interleave(NESTED_BLOCK)[: len(scale)]
        scale = w.nested_code[scale.long()] * outer + w.offset
    if w.column_blocks:
        scale = scale.view(-1, w.cols).repeat_interleave(w.block_size, 0).flatten()
    else:
        scale = scale.repeat_interleave(w.block_size)[: w.rows * w.cols]
    return (w.code[nibbles] * scale).to(dtype).reshape(w.rows, w.cols)


def decode(w: Parts, dtype: torch.dtype) -> Tensor:
    """The dense matrix [rows, cols]."""
    out = torch.empty((w.rows, w.cols), dtype=dtype, device=w.packed.device)
    kernels = backend("dequantize_4bit", out)
    if kernels is None:
        return dequantize_ref(w, dtype)
    args = native.Dequantize4bit(w=w.native(), out=address(out), dtype=DTYPE_CODES[dtype])
    kernels.dequantize_4bit(args, stream(out))
    return out


def _dequantize_4bit_impl(*args: Any) -> Tensor:
    return decode(Parts(*args[:-1]), _DTYPES[args[-1]])


def _dequantize_4bit_fake(*args: Any) -> Tensor:
    w, dtype = Parts(*args[:-1]), _DTYPES[args[-1]]
    return w.packed.new_empty((w.rows, w.cols), dtype=dtype)


dequantize_op = define(
    f"dequantize_4bit({SCHEMA}, int dtype) -> Tensor",
    _dequantize_4bit_impl,
    _dequantize_4bit_fake,
)
