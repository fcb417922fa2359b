"""Products with a matrix in 4 bits: by the native kernel, or decoded and by a library where that is faster."""

from collections.abc import Callable, Iterator
from functools import cache
from math import gcd

import torch
from torch import Tensor

from deftcore.ops.kernels import DTYPE_CODES, address, aligned, backend, give_workspace, native, runs_cuda, stream
from deftcore.ops.packed import NESTED_BLOCK, Parts, decode
from deftcore.ops.products import add_product_, linear, product
from deftcore.ops.timing import bucket_of, native_pays, no_slower

_LEAST_WORK = 2**27  # multiply-adds from which a product in 16 bits is timed against PyTorch's, where that has AMX
_PIECE = 4 << 20  # weights that are decoded at once: in 16 bits they stay in a cache


def multiply(
    x: Tensor, w: Parts, bias: Tensor | None = None, low: Tensor | None = None, lora: Tensor | None = None
) -> Tensor:
    """x [T, K] W^T + low lora^T + bias: low [T, R], lora [M, R]. The native product; a decode and PyTorch's where the
    device's kernel does not take so many tokens, or is slower; or the reference."""

    def library() -> Tensor:
        return _with_low(_linear_by_rows(x, w, bias), low, None if lora is None else lora.t())

    return _product("linear_4bit", library, x, w, w.rows, bias, low, lora)


def multiply_backward(g: Tensor, w: Parts, low: Tensor | None = None, lora: Tensor | None = None) -> Tensor:
    """g [T, M] W + low lora: low [T, R], lora [R, K]; as `multiply`."""

    def library() -> Tensor:
        return _with_low(product(g, decode(w, g.dtype)), low, lora)

    return _product("linear_4bit_backward", library, g, w, w.cols, None, low, lora)


def _linear_by_rows(x: Tensor, w: Parts, bias: Tensor | None) -> Tensor:
    """x W^T + bias; on a CPU some rows of W at a time, which are multiplied while a cache holds them."""
    pieces = list(_pieces(w)) if x.device.type == "cpu" else [(0, w)]
    if len(pieces) == 1:
        return linear(x, decode(w, x.dtype), bias)
    y = x.new_empty(x.shape[0], w.rows)
    for start, piece in pieces:
        rows = slice(start, start + piece.rows)
        y[:, rows] = linear(x, decode(piece, x.dtype), None if bias is None else bias[rows])
    return y


def _pieces(w: Parts) -> Iterator[tuple[int, Parts]]:
    """(first row, rows of W from there) that begin where a byte, a block and a block of scales do, of about `_PIECE`
    weights; all of W where its rows do not begin so."""
    if w.column_blocks or w.cols == 0 or w.cols % w.block_size or w.cols % 2:
        yield 0, w
        return
    blocks = w.cols // w.block_size  # of a row
    step = 1 if w.nested_absmax is None else NESTED_BLOCK // gcd(blocks, NESTED_BLOCK)
    step *= max(1, _PIECE // (step * w.cols))
    for start in range(0, w.rows, step):
        end = min(start + step, w.rows)
        first, last = start * blocks, end * blocks
        outer = w.nested_absmax
        yield (
            start,
            w._replace(
                packed=w.packed[start * w.cols // 2 : end * w.cols // 2],
                absmax=w.absmax[first:last],
                nested_absmax=None if outer is None else outer[first // NESTED_BLOCK : -(-last // NESTED_BLOCK)],
                rows=end - start,
            ),
        )


def _with_low(y: Tensor, low: Tensor | None, lora: Tensor | None) -> Tensor:
    if low is not None and lora is not None:
        add_product_(y, low, lora, beta=1.0, alpha=1.0)
    return y


def _product(
    op: str, library: Callable[[], Tensor], x: Tensor, w: Parts, width: int, bias: Tensor | None, low: Tensor | None,
    lora: Tensor | None,
) -> Tensor:  # fmt: skip
    """[T, width] by the native function `op`, or by the library."""
    kernels, tokens = backend("linear_4bit", x), x.shape[0]
    if kernels is None or not hasattr(kernels, op):
        return library()
    view, dtype = w.native(), DTYPE_CODES[x.dtype]
    if tokens > kernels.linear_4bit_tokens(view, dtype):
        return library()
    if tokens == 0 or width == 0:
        return x.new_empty((tokens, width))
    whole, bias = aligned(x), None if bias is None else bias.contiguous()
    low, lora = (None, None) if low is None or lora is None else (low.contiguous(), lora.contiguous())
    rank = 0 if low is None else low.shape[1]

    def run() -> Tensor:
        y = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
        args = native.Linear4bit(
            w=view, x=address(whole), bias=address(bias), low=address(low), lora=address(lora), y=address(y),
            workspace=0, tokens=tokens, rank=rank, dtype=dtype,
        )  # fmt: skip
        _held = give_workspace(args, getattr(kernels, f"{op}_workspace")(args), x)
        getattr(kernels, op)(args, stream(x))
        return y

    sizes = (bucket_of(tokens), w.rows, w.cols, w.block_size, rank)
    if runs_cuda(x):
        return run() if native_pays(op, x, sizes, run, library) else library()
    if tokens * w.rows * w.cols < _LEAST_WORK or x.dtype == torch.float32 or not _has_amx():
        return run()
    return run() if no_slower(op, x, sizes, run, library) else library()


@cache
def _has_amx() -> bool:
    """Whether PyTorch multiplies 16 bits by tiles, which kernels here do not use."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)  # not public
    return supported is not None and bool(supported())
