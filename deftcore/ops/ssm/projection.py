"""Frozen projections with LoRA over them, as the fused mixers take them: dense or in 4 bits, never merged."""

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deftcore.ops.autocast import autocast_dtype
from deftcore.ops.checks import check_float, check_like, check_shape
from deftcore.ops.packed import Parts
from deftcore.ops.products import add_product_, linear, product
from deftcore.ops.products4 import multiply, multiply_backward
from deftcore.ops.quant4 import check_weight
from deftcore.ops.quantized import QuantizedTensor


class LoraPair(NamedTuple):
    """scaling dropout(x) a^T b^T, added to all outputs of a projection or to `rows` of them.

    a: [R, K]; b: [M, R], or one row for each of `rows` (start, stop); any floating dtype. LoRA, Hu et al., arXiv
    2106.09685, eq. 3.
    """

    a: Tensor
    b: Tensor
    scaling: float = 1.0
    rows: tuple[int, int] | None = None
    dropout: float = 0.0


class Projection(NamedTuple):
    """A frozen linear layer, [M, K] dense or in 4 bits, its bias [M], and the LoRA pairs over it.

    What does not fit is named by the op that takes the projection: TypeError, ValueError.
    """

    weight: Tensor | QuantizedTensor
    bias: Tensor | None = None
    lora: tuple[LoraPair, ...] = ()


def project(x: Tensor, layer: Projection) -> Tensor:
    """x [..., K] through a projection, by plain differentiable operations; dropout applied."""
    weight = layer.weight
    dense = weight.dequantize(x.dtype) if isinstance(weight, QuantizedTensor) else weight
    y = F.linear(x, dense, layer.bias)
    for pair in layer.lora:
        dropped = F.dropout(x, pair.dropout) if pair.dropout else x
        low = F.linear(F.linear(dropped, pair.a.to(x.dtype)), pair.b.to(x.dtype)) * pair.scaling
        start, stop = pair.rows or (0, y.shape[-1])
        y = y + F.pad(low, (start, y.shape[-1] - stop))
    return y


# ---------------------------------------------------------------------------- arguments


def shape_of(layer: Projection) -> tuple[int, int]:
    """Outputs and inputs of a projection."""
    if not isinstance(layer, Projection):
        raise TypeError(f"projections: must be Projection, got {type(layer).__name__}")
    if not isinstance(layer.weight, (Tensor, QuantizedTensor)):
        raise TypeError(f"a projection's weight: must be a Tensor or in 4 bits, got {type(layer.weight).__name__}")
    if len(layer.weight.shape) != 2:
        raise ValueError(f"a projection's weight: must be a matrix [M, K], got shape {tuple(layer.weight.shape)}")
    rows, columns = layer.weight.shape
    return int(rows), int(columns)


def lower(x: Tensor, layers: Sequence[Projection]) -> tuple[Tensor, tuple[Projection, ...]]:
    """Under autocast, activations and weights in its dtype; LoRA factors in the activations' dtype always."""
    dtype = autocast_dtype(x)
    if dtype is not None:
        x = x.to(dtype)
        layers = [
            layer if isinstance(layer.weight, QuantizedTensor) else layer._replace(weight=layer.weight.to(dtype))
            for layer in layers
        ]
    return x, tuple(
        layer._replace(
            bias=None if layer.bias is None else layer.bias.to(x.dtype),
            lora=tuple(pair._replace(a=pair.a.to(x.dtype), b=pair.b.to(x.dtype)) for pair in layer.lora),
        )
        for layer in layers
    )


def check_projection(name: str, layer: Projection, shape: tuple[int, int], x: Tensor) -> None:
    """Raises unless the projection is of that shape, its weight of x's dtype and device, its pairs in its rows."""
    if isinstance(layer.weight, QuantizedTensor):
        if tuple(layer.weight.shape) != shape:
            raise ValueError(f"{name}: shape must be {shape}, got {tuple(layer.weight.shape)}")
        check_weight(name, layer.weight, x.new_empty((0, shape[1])))
    else:
        check_like(name, layer.weight, "the input", x)
        check_shape(name, layer.weight, shape, "outputs, inputs")
    if layer.bias is not None:
        check_float(f"{name}'s bias", layer.bias)
        check_shape(f"{name}'s bias", layer.bias, shape[:1], "one per output")
    for i, pair in enumerate(layer.lora):
        start, stop = pair.rows or (0, shape[0])
        if not 0 <= start < stop <= shape[0]:
            raise ValueError(f"{name}'s LoRA pair {i}: rows must lie in 0..{shape[0]}, got {pair.rows}")
        check_shape(f"{name}'s LoRA pair {i}: a", pair.a, (pair.a.shape[0], shape[1]), "[R, K]")
        check_shape(f"{name}'s LoRA pair {i}: b", pair.b, (stop - start, pair.a.shape[0]), "[rows, R]")
        if not 0 <= pair.dropout < 1:
            raise ValueError(f"{name}'s LoRA pair {i}: dropout must be in [0, 1), got {pair.dropout}")


# ---------------------------------------------------------------------------- as arguments of an op


class Pair(NamedTuple):
    """A LoRA pair inside an op: scaling dropout(x) a^T b^T, added to the outputs start:stop."""

    a: Tensor
    b: Tensor
    start: int
    stop: int
    scaling: float
    dropout: float
    seed: Tensor | None  # of the dropout, int64 []


class Layer(NamedTuple):
    """A projection inside an op."""

    weight: Tensor | Parts
    bias: Tensor | None
    pairs: list[Pair]

    @property
    def outputs(self) -> int:
        return self.weight.rows if isinstance(self.weight, Parts) else self.weight.shape[0]


class Flat(NamedTuple):
    """Projections one after another in the types that an op may take; `SCHEMA` names them, `layers` reads them."""

    frozen: list[Tensor]  # of each: the weight, or a packed one's three or five tensors; the bias
    factors: list[Tensor]  # of each pair: a, b
    whole: list[int]  # of each: tensors of the weight, whether a bias follows, pairs, and of each pair start, stop;
    # then of a packed weight rows, columns, block size, whether in column blocks
    real: list[float]  # of each: the packed weight's offset, or 0, and of each pair scaling, dropout
    seeds: Tensor  # one for each pair, or none where nothing drops out


SCHEMA = "Tensor[] frozen, Tensor[] factors, SymInt[] whole, float[] real, Tensor seeds"


def flatten(projections: Sequence[Projection]) -> Flat:
    """The projections' tensors and numbers, with a new seed for each pair's dropout."""
    frozen: list[Tensor] = []
    factors: list[Tensor] = []
    whole: list[int] = []
    real: list[float] = []
    drops = False
    for weight, bias, pairs in projections:
        tensors, offset, layout = _tensors_and_numbers(weight)
        frozen += tensors if bias is None else [*tensors, bias.detach()]
        whole += [len(tensors), int(bias is not None), len(pairs)]
        real.append(offset)
        for pair in pairs:
            factors += [pair.a, pair.b]
            whole += pair.rows or (0, weight.shape[0])
            real += [float(pair.scaling), float(pair.dropout)]
            drops = drops or pair.dropout > 0
        whole += layout
    return Flat(frozen, factors, whole, real, torch.randint(2**62, (len(factors) // 2 if drops else 0,)))


def _tensors_and_numbers(weight: Tensor | QuantizedTensor) -> tuple[list[Tensor], float, list[int]]:
    if isinstance(weight, Tensor):
        return [weight.detach()], 0.0, []
    packed = weight.parts()
    layout = [packed.rows, packed.cols, packed.block_size, int(packed.column_blocks)]
    return [t for t in packed[:5] if t is not None], packed.offset, layout


def layers(
    frozen: Sequence[Tensor], factors: Sequence[Tensor], whole: Sequence[int], real: Sequence[float], seeds: Tensor
) -> list[Layer]:
    """The projections that `flatten` laid out."""
    weights, matrices, numbers, reals = iter(frozen), iter(factors), iter(whole), iter(real)
    each_seed = iter(seeds) if len(seeds) else iter([None] * len(factors))
    found = []
    for count in numbers:
        has_bias, pairs, offset = next(numbers), next(numbers), next(reals)
        tensors: list[Any] = list(islice(weights, count))
        bias = next(weights) if has_bias else None
        own = [
            Pair(
                next(matrices), next(matrices), next(numbers), next(numbers), next(reals), next(reals), next(each_seed)
            )
            for _ in range(pairs)
        ]
        weight: Tensor | Parts = tensors[0]
        if count > 1:
            packed, absmax, code, *nested = tensors
            rows, cols, block_size, column_blocks = islice(numbers, 4)
            outer, outer_code = nested or (None, None)
            weight = Parts(packed, absmax, code, outer, outer_code, offset, rows, cols, block_size, bool(column_blocks))
        found.append(Layer(weight, bias, own))
    return found


# ---------------------------------------------------------------------------- products inside an op


def _dropped(x: Tensor, pair: Pair) -> Tensor:
    """x after the pair's dropout; the same whenever it is asked for."""
    p = pair.dropout
    if not p or pair.seed is None:
        return x
    generator = torch.Generator(x.device).manual_seed(int(pair.seed))
    keep = torch.empty(x.shape, dtype=x.dtype, device=x.device).bernoulli_(1 - p, generator=generator)
    return x * keep.mul_(1 / (1 - p))


def apply(x: Tensor, layer: Layer) -> Tensor:
    """x [T, K] through a projection: [T, M]."""
    weight, bias, pairs = layer
    y = multiply(x, weight, bias) if isinstance(weight, Parts) else linear(x, weight, bias)
    for pair in pairs:
        low = product(_dropped(x, pair), pair.a.t())
        add_product_(y[:, pair.start : pair.stop], low, pair.b.t(), beta=1.0, alpha=pair.scaling)
    return y


def pull_back(g: Tensor, layer: Layer) -> Tensor:
    """The gradient of x [T, K] from that of the outputs, [T, M]."""
    weight, _, pairs = layer
    dx = multiply_backward(g, weight) if isinstance(weight, Parts) else product(g, weight)
    for pair in pairs:
        low = product(g[:, pair.start : pair.stop], pair.b)
        if pair.dropout:
            dx += _dropped(product(low.mul_(pair.scaling), pair.a), pair)
        else:
            add_product_(dx, low, pair.a, beta=1.0, alpha=pair.scaling)
    return dx


def factor_gradients(x: Tensor, g: Tensor, layer: Layer) -> list[Tensor]:
    """The gradients of a and b of each pair, from x [T, K] and the gradient of the outputs [T, M]."""
    found = []
    for pair in layer.pairs:
        dropped, own = _dropped(x, pair), g[:, pair.start : pair.stop]
        found += [
            product(product(own, pair.b).mul_(pair.scaling).t(), dropped),
            product(own.t(), product(dropped, pair.a.t())).mul_(pair.scaling),
        ]
    return found


def empty_gradients(factors: Sequence[Tensor], train: bool) -> list[Tensor]:
    """In the shapes of the factors' gradients, empty ones where nothing is trained."""
    return [t.new_empty(t.shape if train else 0) for t in factors]
