"""One base product with a different adapter for each row of a batch (S2FT, arXiv 2412.06289, section 6.2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deftcore.ops._library import define, flatten_tokens
from deftcore.ops.checks import check_bias, check_float, check_like, check_shape
from deftcore.ops.kernels import DTYPE_CODES, address, backend, capturing, give_workspace, native, runs_cuda, stream
from deftcore.ops.products import add_product_, linear, product
from deftcore.ops.quant4 import check_weight, linear_4bit
from deftcore.ops.quantized import QuantizedTensor
from deftcore.ops.timing import bucket_of, native_pays


@dataclass(frozen=True)
class SliceDelta:
    """Delta of a slice of W [M, K]: s vectors along the other axis, whichever it is (S2FT, arXiv 2412.06289).

    `axis` 0 adds `block` [s, K] to the rows `indices` [s]; 1 adds block [s, M] to the columns `indices`. Indices are
    whole numbers, each once; block has a floating dtype.
    """

    axis: int
    indices: Tensor
    block: Tensor


@dataclass(frozen=True)
class LowRankDelta:
    """Delta scaling * lora_b lora_a, with lora_a [R, K] and lora_b [M, R] of one dtype (LoRA, arXiv 2106.09685)."""

    lora_a: Tensor
    lora_b: Tensor
    scaling: float = 1.0


Delta = SliceDelta | LowRankDelta


class DeltaBank:
    """The deltas of one weight, one after another, as `grouped_delta_linear` reads them. Made once, used per call.

    Args:
        deltas: one per adapter: a delta, several that add up, or None for an adapter that leaves this weight alone.
        shape: of the weight, [M, K].
        dtype, device: to hold them in, a floating dtype; None is that of the first delta.

    Raises:
        TypeError, ValueError: naming the delta.
    """

    def __init__(
        self,
        deltas: Sequence[Delta | Sequence[Delta] | None],
        shape: tuple[int, int],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        outputs, inputs = (int(n) for n in shape)
        self.shape = (outputs, inputs)
        several = [_as_list(delta) for delta in deltas]
        for j, parts in enumerate(several):
            for delta in parts:
                _check_delta(f"deltas[{j}]", delta, self.shape)
        first = next((_data(d) for parts in several for d in parts), None)
        dtype = dtype or (torch.float32 if first is None else first.dtype)
        device = torch.device(device or ("cpu" if first is None else first.device))
        kinds: dict[str, list[Any]] = {"gather": [], "scatter": [], "low": []}
        starts: dict[str, list[int]] = {name: [0] for name in kinds}
        totals = dict.fromkeys(kinds, 0)
        self.most = 0
        for j, parts in enumerate(several):
            before = dict(totals)
            for delta in parts:
                kind = "low" if isinstance(delta, LowRankDelta) else "gather" if delta.axis == 1 else "scatter"
                kinds[kind].append(delta)
                totals[kind] += _data(delta).shape[0]
            scattered = [d.indices for d in parts if isinstance(d, SliceDelta) and d.axis == 0]
            if len(scattered) > 1 and torch.cat(scattered).unique().numel() < sum(i.numel() for i in scattered):
                raise ValueError(f"deltas[{j}]: two parts change the same output channel; fuse them first")
            for name in kinds:
                starts[name].append(totals[name])
            self.most = max(self.most, sum(totals[n] - before[n] for n in kinds))

        def rows(tensors: list[Tensor], width: int) -> Tensor:
            joined = [t.detach().to(device=device, dtype=dtype) for t in tensors]
            return torch.cat(joined).contiguous() if joined else torch.empty((0, width), dtype=dtype, device=device)

        def numbers(deltas_of_kind: list[SliceDelta]) -> Tensor:
            joined = [d.indices.to(device=device, dtype=torch.int32) for d in deltas_of_kind]
            return torch.cat(joined) if joined else torch.empty(0, dtype=torch.int32, device=device)

        self.starts = torch.tensor(list(starts.values()), dtype=torch.int64, device=device)  # [3, adapters + 1]
        self.tensors = [
            numbers(kinds["gather"]),
            rows([d.block for d in kinds["gather"]], outputs),
            numbers(kinds["scatter"]),
            rows([d.block for d in kinds["scatter"]], inputs),
            rows([d.lora_a for d in kinds["low"]], inputs),
            rows([d.scaling * d.lora_b.t() for d in kinds["low"]], outputs),
        ]

    def __len__(self) -> int:
        return self.starts.shape[1] - 1

    def __repr__(self) -> str:
        gathered, scattered, ranks = self.starts[:, -1].tolist()
        return (
            f"DeltaBank({len(self)} adapters, shape={self.shape}, input channels={gathered}, "
            f"output channels={scattered}, ranks={ranks}, {self.dtype})"
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[1].dtype


def _as_list(delta: Delta | Sequence[Delta] | None) -> list[Delta]:
    if delta is None:
        return []
    return [delta] if isinstance(delta, (SliceDelta, LowRankDelta)) else list(delta)


def _data(delta: Delta) -> Tensor:
    return delta.lora_a if isinstance(delta, LowRankDelta) else delta.block


def _check_delta(name: str, delta: Any, shape: tuple[int, int]) -> None:
    if isinstance(delta, LowRankDelta):
        check_float(f"{name}.lora_a", delta.lora_a)
        check_float(f"{name}.lora_b", delta.lora_b)
        rank = delta.lora_a.shape[0]
        check_shape(f"{name}.lora_a", delta.lora_a, (rank, shape[1]), "[R, K]")
        check_shape(f"{name}.lora_b", delta.lora_b, (shape[0], rank), "[M, R]")
        return
    if not isinstance(delta, SliceDelta):
        raise TypeError(f"{name}: must be a SliceDelta, a LowRankDelta or None, got {type(delta).__name__}")
    if delta.axis not in (0, 1):
        raise ValueError(f"{name}.axis: must be 0 or 1, got {delta.axis!r}")
    check_float(f"{name}.block", delta.block)
    indices, size = delta.indices, shape[delta.axis]
    if indices.dim() != 1 or indices.is_floating_point():
        raise ValueError(f"{name}.indices: must be whole numbers [s], got {indices.dtype} {tuple(indices.shape)}")
    check_shape(f"{name}.block", delta.block, (indices.numel(), shape[1 - delta.axis]), "[s, n]")
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= size):
        raise ValueError(f"{name}.indices: must be in 0..{size - 1}, got {int(indices.min())}..{int(indices.max())}")
    if indices.unique().numel() != indices.numel():
        raise ValueError(f"{name}.indices: has a number twice")


def grouped_delta_linear(
    x: Tensor,
    base: Tensor | QuantizedTensor,
    deltas: DeltaBank | Sequence[Delta | Sequence[Delta] | None],
    adapter_index: Tensor,
    *,
    bias: Tensor | None = None,
) -> Tensor:
    """y[i] = x[i] (W + delta[adapter_index[i]])^T + bias: a different adapter for each row of a batch; inference only.

    S2FT's serving of many adapters at once (Yang et al., arXiv 2412.06289, section 6.2).

    No weight is merged. A few rows per adapter (decoding) run in one native pass that reads each adapter in use once,
    after the base product; many tokens (prefill) as library products, adapter by adapter. Sums are in a fixed order.

    Args:
        x: [B, ..., K], float32, bfloat16, float16 or float64.
        base: [M, K] in x's dtype, or 4-bit.
        deltas: per adapter a `SliceDelta`, `LowRankDelta`, a list of them, or None; or a `DeltaBank` made of these.
        adapter_index: [B] whole numbers; -1 is no adapter.
        bias: [M] or None.

    Returns:
        [B, ..., M] in x's dtype.

    Raises:
        TypeError, ValueError: naming the argument.

    >>> delta = SliceDelta(axis=1, indices=torch.tensor([1]), block=torch.tensor([[5.0, 0.0]]))
    >>> grouped_delta_linear(torch.ones(2, 2), torch.eye(2), [delta], torch.tensor([-1, 0])).tolist()
    [[1.0, 1.0], [6.0, 1.0]]
    """
    check_float("x", x)
    if x.dim() < 2:
        raise ValueError(f"x: must be [B, ..., K], got shape {tuple(x.shape)}")
    if not isinstance(base, (Tensor, QuantizedTensor)):
        raise TypeError(f"base: must be a Tensor or a QuantizedTensor, got {type(base).__name__}")
    if base.dim() != 2:
        raise ValueError(f"base: must be a matrix [M, K], got shape {tuple(base.shape)}")
    shape = (int(base.shape[0]), int(base.shape[1]))
    if x.shape[-1] != shape[1]:
        raise ValueError(f"x: last dimension must be {shape[1]} (base.shape[1]), got {tuple(x.shape)}")
    bank = deltas if isinstance(deltas, DeltaBank) else DeltaBank(deltas, shape, dtype=x.dtype, device=x.device)
    if bank.shape != shape:
        raise ValueError(f"deltas: must be of a weight {shape}, got {bank.shape}")
    if bank.dtype != x.dtype or bank.tensors[1].device != x.device:
        raise TypeError(f"deltas: must be {x.dtype} on {x.device} as x, got {bank.dtype} on {bank.tensors[1].device}")
    if not isinstance(adapter_index, Tensor) or adapter_index.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            "adapter_index: must be an int64 or int32 Tensor, got "
            + str(getattr(adapter_index, "dtype", type(adapter_index)))
        )
    check_shape("adapter_index", adapter_index, (x.shape[0],), "one per row of x")
    # On a GPU reading the numbers would wait for it; there, and in compiled code, what is out of range is no adapter.
    if adapter_index.device.type == "cpu" and adapter_index.numel() and not torch.compiler.is_compiling():
        low, high = (int(n) for n in adapter_index.aminmax())
        if low < -1 or high >= len(bank):
            raise ValueError(f"adapter_index: must be in -1..{len(bank) - 1}, got {low}..{high}")
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("x: this op is for inference; call it under torch.no_grad()")
    if isinstance(base, QuantizedTensor):
        check_weight("base", base, x)
    else:
        check_like("base", base, "x", x)
    check_bias("bias", bias, shape[0], "x", x)
    y = linear_4bit(x, base, bias) if isinstance(base, QuantizedTensor) else _dense(x, base, bias)
    _add_deltas(y, x, adapter_index, bank.starts, bank.tensors, bank.most)
    return y


def _dense(x: Tensor, base: Tensor, bias: Tensor | None) -> Tensor:
    y = linear(flatten_tokens(x), base, bias)
    return y.reshape(*x.shape[:-1], base.shape[0])


# Tokens of a row from which products are the library's: the native pass reads an adapter once per four tokens.
_MANY_TOKENS = 16


def _add_deltas_impl(
    y: Tensor, x: Tensor, adapter_index: Tensor, starts: Tensor, tensors: list[Tensor], most: int
) -> None:
    out, flat = flatten_tokens(y), flatten_tokens(x)
    per_row = x.shape[1:-1].numel()
    index = adapter_index.to(device=x.device, dtype=torch.int64)
    index = index.contiguous() if per_row == 1 else index.repeat_interleave(per_row)
    kernels, many = backend("grouped_delta", x), per_row >= _MANY_TOKENS
    if kernels is None or (many and not runs_cuda(x)):
        _add_by_adapter(out, flat, index, starts, tensors)
        return
    flat, t = flat.contiguous(), [address(tensor) for tensor in tensors]
    (tokens, inputs), count = flat.shape, starts.shape[1] - 1
    first, step = address(starts), 8 * (count + 1)
    bank = native.DeltaBank(
        gather_start=first, gather_index=t[0], gather_rows=t[1], scatter_start=first + step, scatter_index=t[2],
        scatter_rows=t[3], low_start=first + 2 * step, low_in=t[4], low_out=t[5], count=count, inputs=inputs,
        outputs=out.shape[1],
    )  # fmt: skip

    def run(out: Tensor) -> None:
        args = native.GroupedDelta(
            bank=bank, x=address(flat), adapter=address(index), y=address(out), workspace=0, tokens=tokens, most=most,
            dtype=DTYPE_CODES[x.dtype],
        )  # fmt: skip
        _held = give_workspace(args, kernels.grouped_delta_workspace(args), x)
        kernels.grouped_delta(args, stream(x))

    def library(out: Tensor) -> None:
        _add_by_adapter(out, flat, index, starts, tensors)

    sizes = (bucket_of(tokens), inputs, out.shape[1], count, most)
    # The library's way waits for the device, which a captured graph cannot.
    choose = many and not capturing(x.device)
    if choose and not native_pays("grouped_delta", x, sizes, lambda: run(out.clone()), lambda: library(out.clone())):
        library(out)
    else:
        run(out)


def _add_by_adapter(out: Tensor, flat: Tensor, index: Tensor, starts: Tensor, tensors: list[Tensor]) -> None:
    """Adds the deltas, adapter by adapter, with library products; the definition, in any dtype."""
    gather_index, gather_rows, scatter_index, scatter_rows, low_in, low_out = tensors
    gather, scatter, low = starts.tolist()
    for j in index.unique().tolist():
        if j < 0:
            continue
        tokens = (index == j).nonzero().squeeze(1)
        x = flat[tokens]
        total = out[tokens]
        g, s, r = (slice(bounds[j], bounds[j + 1]) for bounds in (gather, scatter, low))
        add_product_(total, x[:, gather_index[g].long()], gather_rows[g], beta=1.0, alpha=1.0)
        add_product_(total, product(x, low_in[r].t()), low_out[r], beta=1.0, alpha=1.0)
        total.index_add_(1, scatter_index[s].long(), product(x, scatter_rows[s].t()))
        out[tokens] = total


def _add_deltas_fake(*_: Any) -> None:
    return None


_add_deltas = define(
    "add_deltas(Tensor(a!) y, Tensor x, Tensor adapter_index, Tensor starts, Tensor[] tensors, int most) -> ()",
    _add_deltas_impl,
    _add_deltas_fake,
)
