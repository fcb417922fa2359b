"""`QuantizedTensor`: a matrix in 4 bits with a scale per block, as bitsandbytes stores it; code books and layout."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deftcore.ops.checks import FLOAT_DTYPES, check_choice
from deftcore.ops.kernels import DTYPE_CODES, native
from deftcore.ops.packed import NESTED_BLOCK, Parts, dequantize_op

QUANT_TYPES = {"nf4": 0, "fp4": 1}
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
STATE_KEY = "quant_state.bitsandbytes__"


@cache
def code_book(quant_type: str) -> Tensor:
    """The 16 values of a 4-bit type, float32, by nibble."""
    return torch.tensor(native.code_book(QUANT_TYPES[quant_type]), dtype=torch.float32)


@cache
def dynamic_book() -> Tensor:
    """The 256 values of the signed dynamic 8-bit type, ascending float32 (Dettmers et al., arXiv 2110.02861)."""
    values = [0.0, 1.0]
    for i in range(7):
        points = torch.linspace(0.1, 1, 2**i + 1)
        middles = 10.0 ** (i - 6) * ((points[1:] + points[:-1]) / 2)
        values += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


@dataclass(eq=False)
class QuantizedTensor:
    """Packed nibbles and their scales; w[i] = code[nibble i] * scale[i / block_size], i the flat row-major index.

    Scales are float32, or nested: 8-bit codes of the dynamic type in blocks of 256, scale = book[code] * nested_absmax
    + nested_offset. The tensors are plain and hold bitsandbytes' bytes; nothing changes them after construction.
    With `column_blocks` a block is `block_size` rows of one column instead: the form that `t` gives. QLoRA, Dettmers et
    al., arXiv 2305.14314.

    Raises:
        TypeError, ValueError: naming the field, for a tensor of another dtype, size or device.
    """

    packed: Tensor  # uint8 [ceil(numel / 2)], the even element in the high nibble
    absmax: Tensor  # float32 [blocks], or uint8 [blocks] when nested
    shape: torch.Size
    dtype: torch.dtype  # of the tensor that was quantised
    quant_type: str = "nf4"
    block_size: int = 64
    nested_absmax: Tensor | None = None  # float32 [ceil(blocks / 256)]
    nested_offset: float = 0.0
    code: Tensor | None = None  # float32 [16]; None is the type's own
    nested_code: Tensor | None = None  # float32 [256]; None is the dynamic book when nested
    storage: torch.dtype = torch.uint8  # how files view the packed bytes
    column_blocks: bool = False  # absmax is float32 [rows / block_size * cols] then

    def __post_init__(self) -> None:
        check_choice("quant_type", self.quant_type, QUANT_TYPES)
        check_block_size(self.block_size)
        if self.dtype not in FLOAT_DTYPES[:3]:
            raise TypeError(f"dtype: must be float32, bfloat16 or float16, got {self.dtype}")
        self.shape = torch.Size(self.shape)
        count, blocks = self.numel(), self.blocks
        nested = self.nested_absmax is not None
        if self.column_blocks and (nested or self.dim() != 2 or self.shape[0] % self.block_size):
            raise ValueError(
                f"column_blocks: needs plain scales and a matrix whose rows are a multiple of {self.block_size}, got "
                f"shape {tuple(self.shape)}{' and nested scales' if nested else ''}"
            )
        device = self.packed.device
        self.code = code_book(self.quant_type).to(device) if self.code is None else self.code
        if nested and self.nested_code is None:
            self.nested_code = dynamic_book().to(device)
        nested_blocks = -(-blocks // NESTED_BLOCK)
        for name, tensor, dtype, size in (
            ("packed", self.packed, torch.uint8, -(-count // 2)),
            ("absmax", self.absmax, torch.uint8 if nested else torch.float32, blocks),
            ("nested_absmax", self.nested_absmax, torch.float32, nested_blocks),
            ("code", self.code, torch.float32, 16),
            ("nested_code", self.nested_code, torch.float32, 256),
        ):
            if tensor is None:
                continue
            if tensor.dtype != dtype:
                raise TypeError(f"{name}: dtype must be {dtype}, got {tensor.dtype}")
            if tensor.numel() != size or tensor.dim() != 1:
                raise ValueError(
                    f"{name}: must have {size} elements for shape {tuple(self.shape)} and block_size "
                    f"{self.block_size}, got {tuple(tensor.shape)}"
                )
            if tensor.device != device:
                raise ValueError(f"{name}: must be on {device} as packed, got {tensor.device}")
            if tensor.requires_grad:
                raise ValueError(f"{name}: packed weights are frozen; requires_grad must be False")

    def numel(self) -> int:
        return self.shape.numel()

    def dim(self) -> int:
        return len(self.shape)

    @property
    def blocks(self) -> int:
        return -(-self.numel() // self.block_size)

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def double_quant(self) -> bool:
        return self.nested_absmax is not None

    @property
    def nbytes(self) -> int:
        """Bytes of nibbles and scales; the code books, shared by all, are not counted."""
        return sum(t.nbytes for t in (self.packed, self.absmax, self.nested_absmax) if t is not None)

    def scales(self) -> Tensor:
        """Scale of each block, float32 [blocks]."""
        if self.nested_absmax is None or self.nested_code is None:
            return self.absmax
        outer = self.nested_absmax.repeat_interleave(NESTED_BLOCK)[: self.blocks]
        return self.nested_code[self.absmax.long()] * outer + self.nested_offset

    def scaled(self, factor: float) -> "QuantizedTensor":
        """This tensor times a number, through the scales: nibbles and 8-bit codes stay."""
        if self.nested_absmax is None:
            return replace(self, absmax=self.absmax * factor)
        return replace(self, nested_absmax=self.nested_absmax * factor, nested_offset=self.nested_offset * factor)

    def t(self) -> "QuantizedTensor":
        """The transposed matrix with exactly the same values: blocks of rows become blocks of columns, and back.

        Nested scales become float32 (4.5 instead of 4.13 bits a weight at block_size 64).

        Raises:
            ValueError: when this is not a matrix, or its rows are not whole blocks.
        """
        if self.dim() != 2 or (not self.column_blocks and self.shape[1] % self.block_size):
            raise ValueError(
                f"t: needs a matrix whose rows are whole blocks of {self.block_size}, got shape {tuple(self.shape)}"
            )
        rows, cols = self.shape
        nibbles = torch.stack((self.packed >> 4, self.packed & 15), 1).flatten()[: self.numel()]
        turned = F.pad(nibbles.view(rows, cols).t().flatten(), (0, self.numel() % 2)).view(-1, 2)
        grid = (rows // self.block_size, cols) if self.column_blocks else (rows, cols // self.block_size)
        return replace(
            self, packed=(turned[:, 0] << 4) | turned[:, 1], absmax=self.scales().view(grid).t().flatten().contiguous(),
            shape=torch.Size((cols, rows)), nested_absmax=None, nested_code=None, nested_offset=0.0,
            storage=torch.uint8, column_blocks=not self.column_blocks,
        )  # fmt: skip

    def has_whole(self, dim: int, lines: Tensor) -> bool:
        """Whether some rows (dim 0) or columns (dim 1) of this matrix, int64 and ascending, are whole blocks."""
        return _whole_groups(lines, self._lines_per_block(dim), self.shape[dim]) is not None

    def _lines_per_block(self, dim: int) -> int:
        """How many neighbouring rows or columns share blocks; of columns all, where a row is not whole blocks."""
        along = 0 if self.column_blocks else 1  # the side that blocks run along
        length = self.shape[along]
        if dim == along:
            return self.block_size if length % self.block_size == 0 else length
        return self.block_size // math.gcd(self.block_size, length)

    def select(self, dim: int, lines: Tensor) -> "QuantizedTensor":
        """Some rows (dim 0) or columns (dim 1) of this matrix, bit by bit: its nibbles and scales as they are.

        Nested scales become float32, as in `t`. All lines are this tensor itself.

        Args:
            lines: int64, ascending.

        Raises:
            ValueError: blocks would be cut (`has_whole`).
        """
        if lines.numel() == self.shape[dim]:
            return self
        if self.column_blocks:
            return self.t().select(1 - dim, lines).t()
        groups = _whole_groups(lines, self._lines_per_block(dim), self.shape[dim])
        if groups is None:
            raise ValueError(f"lines: must be whole blocks of {self.block_size} of {self}")
        rows, cols = self.shape
        nibbles = torch.stack((self.packed >> 4, self.packed & 15), 1).flatten()[: self.numel()].view(rows, cols)
        taken = nibbles.index_select(dim, lines.to(self.device))
        pairs = F.pad(taken.flatten(), (0, taken.numel() % 2)).view(-1, 2)
        packed = (pairs[:, 0] << 4) | pairs[:, 1]
        scales, groups = self.scales(), groups.to(self.device)
        if dim == 1:
            scales = scales.view(rows, -1).index_select(1, groups).flatten()
        else:
            each = self._lines_per_block(0) * cols // self.block_size  # blocks of a group; the last may have fewer
            places = (groups.view(-1, 1) * each + torch.arange(each, device=self.device)).flatten()
            scales = scales[places[places < self.blocks]]
        return replace(
            self, packed=packed, absmax=scales.contiguous(), shape=taken.shape, nested_absmax=None, nested_code=None,
            nested_offset=0.0, storage=torch.uint8 if packed.numel() % self.storage.itemsize else self.storage,
        )  # fmt: skip

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """code[nibble] * scale, one float32 product rounded once to dtype; None is the dtype that this was made from.

        Raises:
            TypeError: a dtype that is not floating-point.
        """
        dtype = self.dtype if dtype is None else dtype
        if dtype not in FLOAT_DTYPES:
            raise TypeError(f"dtype: must be float32, bfloat16, float16 or float64, got {dtype}")
        kernel_dtype = torch.float32 if dtype == torch.float64 else dtype
        return dequantize_op(*self.parts(), DTYPE_CODES[kernel_dtype]).to(dtype).reshape(self.shape)

    def parts(self) -> Parts:
        """As the arguments of an op; a tensor that is no matrix as one row."""
        assert self.code is not None
        rows, cols = self.shape if self.dim() == 2 else (1, self.numel())
        return Parts(
            self.packed, self.absmax, self.code, self.nested_absmax, self.nested_code, self.nested_offset, rows, cols,
            self.block_size, self.column_blocks,
        )  # fmt: skip

    def to(self, device: torch.device | str) -> "QuantizedTensor":
        """The same bytes on another device."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self._tensors().items()}
        return replace(self, **moved)

    def _tensors(self) -> dict[str, Tensor]:
        found = {n: getattr(self, n) for n in ("packed", "absmax", "nested_absmax", "code", "nested_code")}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def __repr__(self) -> str:
        nested = ", double_quant" if self.double_quant else ", column_blocks" if self.column_blocks else ""
        return (
            f"QuantizedTensor({tuple(self.shape)}, {self.quant_type}, block_size={self.block_size}{nested}, "
            f"dtype={str(self.dtype)[6:]}, device={self.device})"
        )

    # ------------------------------------------------------------------ files

    def state_dict(self, prefix: str = "weight") -> dict[str, Tensor]:
        """The tensors under bitsandbytes' names, as Transformers stores them, `prefix` being the weight's own name."""
        if self.column_blocks:
            raise ValueError("column_blocks: files hold blocks in rows; keep the tensor that this is the transpose of")
        meta: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": self.block_size,
            "dtype": str(self.dtype)[6:],
            "shape": list(self.shape),
        }
        packed = self.packed.view(self.storage).reshape(-1, 1)
        assert self.code is not None
        state = {prefix: packed, f"{prefix}.absmax": self.absmax, f"{prefix}.quant_map": self.code}
        if self.nested_absmax is not None and self.nested_code is not None:
            meta |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": self.nested_offset}
            state |= {f"{prefix}.nested_absmax": self.nested_absmax, f"{prefix}.nested_quant_map": self.nested_code}
        encoded = torch.tensor(list(json.dumps(meta).encode()), dtype=torch.uint8)
        return state | {f"{prefix}.{STATE_KEY}{self.quant_type}": encoded}

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Tensor], prefix: str = "weight", *, allow_custom_map: bool = False
    ) -> "QuantizedTensor":
        """Reads what `state_dict` or bitsandbytes wrote.

        Raises:
            ValueError: naming the tensor that is missing, damaged or of another shape than the stored state says; for
                a code book other than the type's own unless `allow_custom_map`.
        """
        for needed in (prefix, f"{prefix}.absmax", f"{prefix}.quant_map"):
            if needed not in state:
                raise ValueError(f"{needed}: missing from the quantised state")
        keys = [f"{prefix}.{STATE_KEY}{quant_type}" for quant_type in QUANT_TYPES]
        key = next((key for key in keys if key in state), None)
        if key is None:
            raise ValueError(f"{keys[0]}: missing from the quantised state")
        meta = _parse_state(key, state[key])
        stored, device = state[prefix], state[prefix].device
        books = {"quant_map": code_book(meta["quant_type"])}
        nested = "nested_blocksize" in meta
        if nested:
            books["nested_quant_map"] = dynamic_book()
            if meta["nested_blocksize"] != NESTED_BLOCK:
                raise ValueError(f"{key}: nested_blocksize must be {NESTED_BLOCK}, got {meta['nested_blocksize']}")
            for needed in (f"{prefix}.nested_absmax", f"{prefix}.nested_quant_map"):
                if needed not in state:
                    raise ValueError(f"{needed}: missing from the quantised state")
        for name, book in books.items():
            found = state[f"{prefix}.{name}"].to("cpu", torch.float32)
            if not allow_custom_map and not (found.shape == book.shape and bool((found == book).all())):
                raise ValueError(f"{prefix}.{name}: not the code book of {meta['quant_type']}; see allow_custom_map")
        try:
            q = cls(
                packed=stored.detach().contiguous().view(torch.uint8).reshape(-1),
                absmax=state[f"{prefix}.absmax"].detach().reshape(-1),
                shape=torch.Size(meta["shape"]),
                dtype=getattr(torch, meta["dtype"]),
                quant_type=meta["quant_type"],
                block_size=meta["blocksize"],
                nested_absmax=state[f"{prefix}.nested_absmax"].detach().reshape(-1) if nested else None,
                nested_offset=float(meta["nested_offset"]) if nested else 0.0,
                code=state[f"{prefix}.quant_map"].detach().to(device),
                nested_code=state[f"{prefix}.nested_quant_map"].detach().to(device) if nested else None,
                storage=stored.dtype,
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{prefix}: damaged quantised weight: {error}") from error
        if device.type != "meta" and not bool(torch.isfinite(q.scales()).all()):
            raise ValueError(f"{prefix}.absmax: has scales that are not finite")
        return q


def _whole_groups(lines: Tensor, size: int, total: int) -> Tensor | None:
    """The groups of `size` neighbours that some of `total` lines are made of; None where they cut one, or are none."""
    if lines.numel() == 0:
        return None
    groups = (lines // size).unique()
    wanted = (groups * size + size).clamp(max=total) - groups * size
    return groups if int(wanted.sum()) == lines.numel() else None


def _parse_state(key: str, encoded: Tensor) -> dict[str, Any]:
    """The JSON of a quant_state tensor, its fields checked."""
    try:
        meta = json.loads(bytes(encoded.to("cpu", torch.uint8).flatten().tolist()).decode())
    except ValueError as error:
        raise ValueError(f"{key}: not JSON: {error}") from error
    expected: dict[str, Any] = {"quant_type": str, "blocksize": int, "dtype": str, "shape": list}
    if isinstance(meta, dict) and "nested_blocksize" in meta:
        expected |= {"nested_blocksize": int, "nested_offset": (int, float)}
    if not isinstance(meta, dict):
        raise ValueError(f"{key}: must be a JSON object, got {type(meta).__name__}")
    for name, kind in expected.items():
        if not isinstance(meta.get(name), kind):
            raise ValueError(f"{key}: field {name!r} is missing or wrong, got {meta.get(name)!r}")
    if meta["quant_type"] not in QUANT_TYPES or not key.endswith(meta["quant_type"]):
        raise ValueError(f"{key}: quant_type must be {' or '.join(QUANT_TYPES)} and agree, got {meta['quant_type']!r}")
    if not all(isinstance(n, int) and n >= 0 for n in meta["shape"]):
        raise ValueError(f"{key}: shape must be whole numbers, got {meta['shape']}")
    if meta["dtype"] not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"{key}: dtype must be float32, bfloat16 or float16, got {meta['dtype']!r}")
    return meta


def check_block_size(block_size: Any) -> None:
    """Raises ValueError unless it is one of `BLOCK_SIZES`."""
    if isinstance(block_size, bool) or block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size: must be one of {', '.join(map(str, BLOCK_SIZES))}, got {block_size!r}")
