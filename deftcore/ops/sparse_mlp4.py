"""Sparse MLP products over 4-bit weights: packed rows of inactive neurons are not read. Public in `sparse_mlp`."""

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deftcore.ops import paths
from deftcore.ops._library import define
from deftcore.ops.density import ACTIVATIONS, activate, keep_active
from deftcore.ops.kernels import DTYPE_CODES, address, aligned, backend, give_workspace, native, runs_cuda, stream
from deftcore.ops.packed import Parts
from deftcore.ops.paths import DENSE, MAX_TOKENS, SPARSE
from deftcore.ops.products import add_product_, plus_product, product
from deftcore.ops.products4 import multiply, multiply_backward
from deftcore.ops.quant4 import check_weight, linear_4bit_grad, linear_4bit_op, multiply_int8, takes_int8
from deftcore.ops.quantized import QuantizedTensor

IDENTITY = -1  # in place of an activation's number: x holds activations already


class LowRank4(NamedTuple):
    """Unmerged LoRA of a 4-bit block, scalings included; None where a projection has none.

    gate_a, up_a: [R, D]; gate_b, up_b: [F, R]; down_a_t: [F, R] neuron-major; down_b: [D, R].
    """

    gate_a: Tensor | None = None
    gate_b: Tensor | None = None
    up_a: Tensor | None = None
    up_b: Tensor | None = None
    down_a_t: Tensor | None = None
    down_b: Tensor | None = None


NO_LOW_RANK = LowRank4()


def mlp_4bit(
    x: Tensor, weights: Sequence[QuantizedTensor], b_up: Tensor | None, b_down: Tensor | None, activation: int, tau:
    float, path: int, lora: LowRank4 = NO_LOW_RANK, int8: bool = False,
) -> Tensor:  # fmt: skip
    """The MLP of x [T, D] over [gate, up, down_t], [up, down_t], or (x being [T, F] activations) [down_t] alone.

    With `int8`, which has no gradient and no low-rank terms, gate and up round x.
    """
    matrices = [w.parts() for w in weights]
    tensors = [t for w in matrices for t in w[:5]]
    sizes = [n for w in matrices for n in w[6:]]
    offsets = [w.offset for w in matrices]
    if int8:
        return _sparse_mlp_4bit_int8(x, tensors, offsets, sizes, b_up, b_down, activation, tau, path)
    return _sparse_mlp_4bit(x, tensors, offsets, sizes, list(lora), b_up, b_down, activation, tau, path)


def check_weights(x: Tensor, neurons_major: dict[str, Any], width: int | None) -> None:
    """Raises unless all weights are 4-bit matrices [F, D] of one shape on x's device; D is `width` if given."""
    first = next(iter(neurons_major.values()))
    for name, w in neurons_major.items():
        if not isinstance(w, QuantizedTensor):
            raise TypeError(f"{name}: must be a QuantizedTensor as the other weights are, got {type(w).__name__}")
        if width is not None and name != "w_down_t":
            check_weight(name, w, x)
        if w.dim() != 2 or w.shape != first.shape or (width is not None and w.shape[1] != width):
            raise ValueError(f"{name}: shape must be [F, D] with D = {width} and as the others, got {tuple(w.shape)}")
        if w.device != x.device:
            raise ValueError(f"{name}: must be on {x.device} as x, got {w.device}")


def _unpack(tensors: Sequence[Tensor | None], offsets: Sequence[float], sizes: Sequence[int]) -> list[Parts]:
    every_tensor: Any = iter(tensors)
    every_size = iter(sizes)
    found = []
    for offset in offsets:
        packed, absmax, code, nested_absmax, nested_code = islice(every_tensor, 5)
        rows, cols, block_size, column_blocks = islice(every_size, 4)
        weight = packed, absmax, code, nested_absmax, nested_code, offset, rows, cols, block_size, bool(column_blocks)
        found.append(Parts(*weight))
    return found


def _supports(w: Parts) -> bool:
    """Whether the kernel reads w by rows: whole blocks, or column blocks of even width."""
    if runs_cuda(w.packed) and w.packed.data_ptr() % 16:  # a view into the middle of somebody's buffer
        return False
    return w.cols % 2 == 0 if w.column_blocks else w.cols % w.block_size == 0


def _low(x: Tensor, a: Tensor | None) -> Tensor | None:
    return None if a is None else product(x, a.t())


def _capacity(x: Tensor, matrices: list[Parts], path: int, int8: bool) -> int:
    """Most active neurons for which the sparse path is taken; -1 for none."""
    down, tokens = matrices[-1], x.shape[0]
    supported = _supports(down) and (len(matrices) < 3 or (_supports(matrices[1]) and not matrices[1].column_blocks))
    if path == DENSE or tokens > MAX_TOKENS or not supported or 0 in (tokens, down.rows, down.cols):
        return -1
    if path == SPARSE:
        return down.rows
    return paths.most_active(x, down.rows, _break_even(x, len(matrices) == 3, down, int8))


def _break_even(x: Tensor, gated: bool, down: Parts, int8: bool) -> float:
    """Union density below which the sparse path is the faster, measured once: of a gated block, or of down alone."""
    neurons, width, device = down.rows, down.cols, x.device
    if gated:
        zeros = torch.zeros(x.shape[0], width, dtype=x.dtype, device=device)

        def run(a: Tensor, w: QuantizedTensor, path: int) -> Tensor:
            # The bias sets which neurons are active: ReLU keeps those at 1.
            x, bias, relu = zeros[:1].expand(len(a), -1), a[0] - 0.5, ACTIVATIONS["relu"]
            return mlp_4bit(x, [w, w, w], bias, None, relu, 0.0, path, int8=int8)
    else:

        def run(a: Tensor, w: QuantizedTensor, path: int) -> Tensor:
            return mlp_4bit(a, [w], None, None, IDENTITY, 0.0, path)

    def make_weight() -> QuantizedTensor:
        packed = torch.zeros(neurons * width // 2, dtype=torch.uint8, device=device)
        absmax = torch.ones(neurons * width // down.block_size, device=device)
        return QuantizedTensor(
            packed, absmax, torch.Size((neurons, width)), torch.float32, block_size=down.block_size,
            column_blocks=down.column_blocks and not gated,
        )  # fmt: skip

    return paths.break_even_density(
        x, x.shape[0], neurons, width, lambda a, w: run(a, w, SPARSE), lambda a, w: run(a, w, DENSE),
        f"4bit-{'gated' if gated else 'down'}-{down.block_size}{'-int8' if gated and int8 else ''}", make_weight,
    )  # fmt: skip


def _sparse_mlp_4bit_impl(
    x: Tensor, tensors: list[Tensor | None], offsets: list[float], sizes: list[int], lora: list[Tensor | None],
    b_up: Tensor | None, b_down: Tensor | None, activation: int, tau: float, path: int, int8: bool = False,
) -> Tensor:  # fmt: skip
    matrices, low = _unpack(tensors, offsets, sizes), LowRank4(*lora)
    tokens, down, gated = x.shape[0], matrices[-1], len(matrices) == 3
    x = aligned(x)
    z = _pre_activation(x, matrices, low, b_up, int8)
    rounds = int8 and gated and takes_int8(x, matrices[1])
    op = "sparse_mlp_4bit_int8" if rounds else "sparse_mlp_4bit"
    kernels = backend("sparse_mlp_4bit_int8", x) if rounds else backend("sparse_mlp_4bit", x)
    capacity = -1 if kernels is None else _capacity(x, matrices, path, rounds)
    if kernels is None or capacity < 0:
        return _dense_rest(x, z, matrices, low, b_down, activation, tau, rounds)
    up_low = _low(x, low.up_a) if gated else None
    # Held until the kernel has run: an address keeps nothing alive.
    up_b, down_a_t, b_down = (None if t is None else t.contiguous() for t in (low.up_b, low.down_a_t, b_down))
    y = torch.empty((tokens, down.cols), dtype=x.dtype, device=x.device)
    rank = 0 if low.down_a_t is None else low.down_a_t.shape[1]
    down_low = torch.empty((tokens, rank), dtype=x.dtype, device=x.device) if rank else None
    args = native.SparseMlp4bit(
        x=address(x), z=address(z), w_up=matrices[1].native() if gated else None, w_down_t=down.native(),
        up_low=address(up_low), up_lora=address(up_b), down_lora=address(down_a_t), down_low=address(down_low),
        b_down=address(b_down), y=address(y), workspace=0, rows_read=0, tokens=tokens, neurons=down.rows,
        width=down.cols, up_rank=0 if up_low is None else up_low.shape[1], down_rank=rank, capacity=capacity,
        dtype=DTYPE_CODES[x.dtype], activation=max(activation, 0), activated=activation == IDENTITY, tau=tau,
    )  # fmt: skip
    workspace = give_workspace(args, getattr(kernels, f"{op}_workspace")(args), x)
    getattr(kernels, op)(args, stream(x))
    if capacity < down.rows and workspace[-1].item() > capacity:
        return _dense_rest(x, z, matrices, low, b_down, activation, tau, rounds)
    if down_low is not None and low.down_b is not None:
        add_product_(y, down_low, low.down_b.t(), beta=1.0, alpha=1.0)
    return y


def _sparse_mlp_4bit_int8_impl(
    x: Tensor, tensors: list[Tensor | None], offsets: list[float], sizes: list[int], b_up: Tensor | None,
    b_down: Tensor | None, activation: int, tau: float, path: int,
) -> Tensor:  # fmt: skip
    no_low = list(NO_LOW_RANK)
    return _sparse_mlp_4bit_impl(x, tensors, offsets, sizes, no_low, b_up, b_down, activation, tau, path, int8=True)


def _pre_activation(x: Tensor, matrices: list[Parts], low: LowRank4, b_up: Tensor | None, int8: bool) -> Tensor:
    """z of the first projection: x itself where there is none."""
    if len(matrices) == 1:
        return x
    if int8:
        return multiply_int8(x, matrices[0], b_up)
    a, b = (low.gate_a, low.gate_b) if len(matrices) == 3 else (low.up_a, low.up_b)
    return multiply(x, matrices[0], b_up, _low(x, a), b)


def _keep_active(z: Tensor, activation: int, tau: float) -> Tensor:
    a = z if activation == IDENTITY else activate(z, list(ACTIVATIONS)[activation])
    return keep_active(a, a, tau)


def _dense_rest(
    x: Tensor, z: Tensor, matrices: list[Parts], low: LowRank4, b_down: Tensor | None, activation: int, tau: float,
    int8: bool,
) -> Tensor:  # fmt: skip
    """The block after its first product, on the dense 4-bit products; with their references, its definition."""
    h = _keep_active(z, activation, tau)
    if len(matrices) == 3:
        up = matrices[1]
        h = h * (multiply_int8(x, up) if int8 else multiply(x, up, None, _low(x, low.up_a), low.up_b))
    down_low = None if low.down_a_t is None else product(h, low.down_a_t)
    y = multiply_backward(h, matrices[-1], down_low, None if low.down_b is None else low.down_b.t())
    return y if b_down is None else y + b_down


def _sparse_mlp_4bit_fake(x: Tensor, tensors: list, offsets: list, sizes: list, *_: object) -> Tensor:
    return x.new_empty((x.shape[0], _unpack(tensors, offsets, sizes)[-1].cols))


def _sparse_mlp_4bit_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, tensors, offsets, sizes, lora, b_up, b_down, activation, tau, _ = inputs
    ctx.save_for_backward(x, b_up, b_down, *tensors, *lora)
    ctx.offsets, ctx.sizes, ctx.activation, ctx.tau = offsets, sizes, activation, tau
    ctx.count = len(tensors)


def _sparse_mlp_4bit_backward(ctx: Any, grad: Tensor) -> tuple:
    # Inference op: gradients of x and the biases, by recomputing the block on the dense 4-bit ops.
    x, b_up, b_down, *rest = ctx.saved_tensors
    matrices, low = _unpack(rest[: ctx.count], ctx.offsets, ctx.sizes), LowRank4(*rest[ctx.count :])
    gated, down = len(matrices) == 3, matrices[-1]
    first_low = (low.gate_a, low.gate_b) if gated else (low.up_a, low.up_b)
    grad_h = _forward(grad, down, None if low.down_b is None else low.down_b.t(), low.down_a_t)
    grad_x = None
    z = x if len(matrices) == 1 else _forward(x, matrices[0], *first_low, b_up)
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        a = _keep_active(z, ctx.activation, ctx.tau)
    if gated:
        grad_x = _back(grad_h * a.detach(), matrices[1], low.up_a, low.up_b)
        grad_h = grad_h * _forward(x, matrices[1], low.up_a, low.up_b)
    (grad_z,) = torch.autograd.grad(a, z, grad_h)
    through = grad_z if len(matrices) == 1 else _back(grad_z, matrices[0], *first_low)
    grad_x = through if grad_x is None else grad_x + through
    grad_b_up = grad_z.sum(0) if b_up is not None else None
    grad_b_down = grad.sum(0) if b_down is not None else None
    # PyTorch wants a list back for a list of tensors, and None for one that has a None in it.
    of_weights, of_lora = ([None] * len(g) if all(t is not None for t in g) else None for g in (rest[: ctx.count], low))
    return (grad_x, of_weights, None, None, of_lora, grad_b_up, grad_b_down, None, None, None)


def _forward(x: Tensor, w: Parts, a: Tensor | None, b: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """x W^T + (x A^T) B^T + bias, as registered ops."""
    y = linear_4bit_op(x, *w, bias)
    return y if a is None or b is None else plus_product(y, product(x, a.t()), b.t())


def _back(grad: Tensor, w: Parts, a: Tensor | None, b: Tensor | None) -> Tensor:
    """Gradient of x for `_forward`."""
    return linear_4bit_grad(grad, *w, None if b is None else product(grad, b), a)


_sparse_mlp_4bit = define(
    "sparse_mlp_4bit(Tensor x, Tensor?[] weights, float[] offsets, SymInt[] sizes, Tensor?[] lora, Tensor? b_up, "
    "Tensor? b_down, int activation, float tau, int path) -> Tensor",
    _sparse_mlp_4bit_impl,
    _sparse_mlp_4bit_fake,
    setup_context=_sparse_mlp_4bit_setup,
    backward=_sparse_mlp_4bit_backward,
)
_sparse_mlp_4bit_int8 = define(
    "sparse_mlp_4bit_int8(Tensor x, Tensor?[] weights, float[] offsets, SymInt[] sizes, Tensor? b_up, Tensor? b_down, "
    "int activation, float tau, int path) -> Tensor",
    _sparse_mlp_4bit_int8_impl,
    _sparse_mlp_4bit_fake,
)
