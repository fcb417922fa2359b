"""Every op with odd sizes, strides and dtypes, and with bad arguments.

A good call is compared with the same call in float64, gradients and states changed in place included; a call with one
argument spoilt must work or raise ValueError or TypeError. Call n of a case depends on n alone. DEFTCORE_FUZZ_CALLS is
the number of calls a case (24 by default), DEFTCORE_FUZZ_FIRST the first. Over a build with -DDEFTCORE_SANITIZE=ON
(see .ci/run) a report ends the process; DEFTCORE_FUZZ_LOG names a file that then holds the case and number.
"""

import dataclasses
import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from deftcore import ops
from deftcore.ops import decoder, products
from deftcore.ops._library import flatten_tokens
from deftcore.ops.decoder import Block, DecoderStack
from deftcore.ops.decoder_matrix import Matrix
from deftcore.ops.density import ACTIVATIONS, activate, keep_active
from deftcore.ops.galore import galore_step
from deftcore.ops.galore_matrix import AdamMatrix
from deftcore.ops.grouped_delta import LowRankDelta, SliceDelta
from deftcore.ops.natural import DAMPING_MODES, FISHER_NORMS, Damping, Window
from deftcore.ops.quant4 import QuantizedTensor, linear_4bit_int8_ref, quantize_ref, takes_int8
from deftcore.ops.quantized import QUANT_TYPES
from deftcore.ops.ssm.decode import MambaLayer, MambaStack, mamba_step
from deftcore.ops.ssm.projection import LoraPair, Projection

CALLS = int(os.environ.get("DEFTCORE_FUZZ_CALLS", "24"))
FIRST = int(os.environ.get("DEFTCORE_FUZZ_FIRST", "0"))
LOG = os.environ.get("DEFTCORE_FUZZ_LOG")
TOLERANCE = {torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of the largest value


class Draw:
    """The random choices of one call."""

    def __init__(self, case: str, number: int) -> None:
        self.random = random.Random(f"{case} {number}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(60))
        self.dtype = self.random.choice(list(TOLERANCE))

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def size(self, most: int, least: int = 0) -> int:
        """Often 0, 1, or beside a power of two."""
        near = [n for n in (0, 1, 2, 15, 16, 17, 31, 32, 33, 64, 65, 128) if least <= n <= most]
        return self.random.choice(near) if self.chance(0.5) else self.random.randint(least, most)

    def tensor(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """Normal numbers; contiguous, transposed, or a slice of something wider."""
        layout = self.random.choice(("plain", "plain", "turned", "slice", "step"))
        if layout == "turned":
            x = torch.randn(shape[::-1], generator=self.generator).permute(*range(len(shape) - 1, -1, -1))
        else:
            wider = [n + 3 if layout == "slice" else 2 * n if layout == "step" else n for n in shape]
            x = torch.randn(wider, generator=self.generator)
            for dim, n in enumerate(shape):
                x = x.narrow(dim, 1, n) if layout == "slice" else x
                x = x[(slice(None),) * dim + (slice(None, None, 2),)] if layout == "step" else x
        return self.as_dtype(x * scale if layout == "plain" else x.mul_(scale), dtype or self.dtype)

    def as_dtype(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x in another dtype with its strides, gaps included."""
        held = torch.zeros(x.untyped_storage().nbytes() // 4, dtype=dtype)
        return held.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x)

    def odd(self, x: Tensor) -> Tensor:
        """x with another stride where a dimension is 1: PyTorch calls it contiguous all the same."""
        strides = [7777 if n == 1 and self.chance(0.3) else s for n, s in zip(x.shape, x.stride(), strict=True)]
        return x.as_strided(x.shape, strides)

    def maybe(self, make: Callable[[], Any]) -> Any:
        return make() if self.chance(0.5) else None

    def wide(self) -> torch.dtype:
        """A dtype for parameters: x's, or float32."""
        return self.random.choice((self.dtype, torch.float32))

    def packed(self, rows: int, cols: int, scale: float = 1.0) -> QuantizedTensor:
        return ops.quantize_4bit(
            self.tensor(rows, cols, scale=scale), quant_type=self.random.choice(list(QUANT_TYPES)),
            block_size=self.random.choice((32, 64, 128)), double_quant=self.chance(0.5),
        )  # fmt: skip


class Call(NamedTuple):
    """A function and its arguments, those that a gradient is taken for, and those that change in place."""

    run: Callable[..., Any]
    arguments: dict[str, Any]
    differentiable: tuple[str, ...] = ()
    in_place: tuple[str, ...] = ()
    slack: float = 0.0  # absolute error allowed beside the tolerance: what a threshold may leave out
    roundings: int = 1  # how many results of x's dtype follow on one another


CASES: dict[str, Callable[[Draw], Call]] = {}
COVERS: dict[str, set[str]] = {}


def case(*covers: str) -> Callable[[Callable[[Draw], Call]], Callable[[Draw], Call]]:
    """Registers a function that makes calls, and the registered ops that these reach."""

    def register(make: Callable[[Draw], Call]) -> Callable[[Draw], Call]:
        CASES[make.__name__] = make
        COVERS[make.__name__] = set(covers)
        return make

    return register


# ---------------------------------------------------------------------------- cases


@case("act_density", "act_density_backward")
def act_density(d: Draw) -> Call:
    shape = [d.size(5) for _ in range(d.random.randint(0, 2))] + [d.size(300)]
    arguments: dict[str, Any] = {
        "z": d.tensor(*shape), "activation": d.random.choice(list(ACTIVATIONS)),
        "mask": d.maybe(lambda: torch.rand(shape[:-1], generator=d.generator) < 0.7),
        "surrogate": d.random.choice(("l0", "tanh", "l1")), "eps": 1e-2, "beta": 2.0, "tau": 10.0,
    }  # fmt: skip
    return Call(ops.act_density, arguments, ("z",))


@case("density_count")
def density(d: Draw) -> Call:
    shape = [d.size(5), d.size(300)]
    mask = d.maybe(lambda: torch.rand(shape[:1], generator=d.generator) < 0.7)
    return Call(ops.density, {"a": d.tensor(*shape).relu(), "tau": 0.5, "mask": mask})


def _nibbles(w: Tensor, quant_type: str, block_size: int) -> tuple[Tensor, Tensor]:
    double = isinstance(w, Tensor) and w.dtype == torch.float64
    q = ops.quantize_4bit(w.float() if double else w, quant_type=quant_type, block_size=block_size,
                          double_quant=False)  # fmt: skip
    if double:  # the definition stands in for a float64 op
        packed, absmax = quantize_ref(w.float(), block_size, QUANT_TYPES[quant_type])
        assert torch.equal(packed, q.packed)
        assert torch.equal(absmax, q.absmax)
    return q.dequantize(torch.float32), ops.quantize_4bit(w.float(), double_quant=True).dequantize(torch.float32)


@case("quantize_4bit", "dequantize_4bit")
def quantize_4bit(d: Draw) -> Call:
    shape = [d.size(40) for _ in range(d.random.randint(0, 2))] + [d.size(200)]
    kind, block = d.random.choice(list(QUANT_TYPES)), d.random.choice((32, 64, 128, 4096))
    return Call(_nibbles, {"w": d.tensor(*shape), "quant_type": kind, "block_size": block})


@case("linear_4bit", "linear_4bit_backward")
def linear_4bit(d: Draw) -> Call:
    rows, cols = d.size(140), d.size(200)
    q = d.packed(rows, cols)
    if rows and cols % q.block_size == 0 and cols and d.chance(0.4):
        q = q.t()
        rows, cols = cols, rows
    lead = [d.size(3)] * d.chance(0.3)
    arguments = {"x": d.tensor(*lead, d.size(70), cols), "q": q, "bias": d.maybe(lambda: d.tensor(rows))}
    return Call(ops.linear_4bit, arguments, ("x", "bias"))


def _int8(x: Any, q: Any, bias: Any, activations: Any) -> Tensor:
    if isinstance(x, Tensor) and x.dtype == torch.float64:  # the definition stands in for a float64 op
        rows, bias32 = flatten_tokens(x.float()), None if bias is None else bias.float()
        if takes_int8(rows, q.parts()):
            return linear_4bit_int8_ref(rows, q.parts(), bias32).double().reshape(*x.shape[:-1], q.shape[0])
    return ops.linear_4bit(x, q, bias, activations=activations)


@case("linear_4bit_int8")
def linear_4bit_int8(d: Draw) -> Call:
    rows, cols = d.size(140), d.random.choice((32, 64, 128, 256, d.size(200)))
    q, tokens = d.packed(rows, cols), d.size(20)
    arguments = {"x": d.tensor(tokens, cols), "q": q, "bias": d.maybe(lambda: d.tensor(rows)), "activations": "int8"}
    return Call(_int8, arguments)


@case("linear_16bit")
def linear_16bit(d: Draw) -> Call:
    rows, cols, lead = d.size(140), d.size(200), [d.size(3)] * d.chance(0.3)
    arguments = {
        "x": d.tensor(*lead, d.size(70), cols), "weight": d.tensor(rows, cols), "bias": d.maybe(lambda: d.tensor(rows))
    }  # fmt: skip
    return Call(products.linear_16bit, arguments, ("x", "weight", "bias"))


def _lora(d: Draw, weight: Any, rows: int, cols: int) -> Call:
    rank, tokens = d.size(17), d.size(70)
    arguments = {
        "x": d.tensor(tokens, cols), "weight": weight, "lora_a": d.tensor(rank, cols, scale=0.1),
        "lora_b": d.tensor(rows, rank, scale=0.1), "scaling": d.random.choice((0.5, 2.0)),
        "bias": d.maybe(lambda: d.tensor(rows)), "dropped_x": d.maybe(lambda: d.tensor(tokens, cols)),
        "sigma": d.maybe(lambda: d.tensor(rank)), "minus_a": None, "minus_b": None,
    }  # fmt: skip
    if d.chance(0.5):
        taken = d.size(17)
        arguments |= {"minus_a": d.tensor(taken, cols, scale=0.1), "minus_b": d.tensor(rows, taken, scale=0.1)}

    def run(*, minus_a: Any, minus_b: Any, **rest: Any) -> Tensor:
        return ops.lora_linear(**rest, minus=None if minus_a is None else (minus_a, minus_b))

    return Call(run, arguments, ("x", "lora_a", "lora_b", "dropped_x", "sigma", "minus_b"))


@case("lora_linear")
def lora_linear(d: Draw) -> Call:
    rows, cols = d.size(70), d.size(70)
    return _lora(d, d.tensor(rows, cols), rows, cols)


@case("lora_linear_4bit", "linear_4bit_backward")
def lora_linear_4bit(d: Draw) -> Call:
    rows, cols = d.size(140), d.size(140)
    return _lora(d, d.packed(rows, cols), rows, cols)


@case("add_deltas")
def grouped_delta_linear(d: Draw) -> Call:
    rows, cols = d.size(70, 1), d.size(70, 1)

    def delta() -> Any:
        if d.chance(0.4):
            rank = d.size(9)
            return LowRankDelta(d.tensor(rank, cols, scale=0.3), d.tensor(rows, rank, scale=0.3), 0.5)
        axis = d.random.randrange(2)
        indices = torch.randperm((rows, cols)[axis], generator=d.generator)[: d.size(20)]
        return SliceDelta(axis, indices, d.tensor(len(indices), (cols, rows)[axis], scale=0.3))

    deltas = [d.random.choice((None, delta(), [delta()])) for _ in range(d.size(5, 1))]
    lead = [d.size(20)] + [d.size(3)] * d.chance(0.3)
    arguments = {
        "x": d.tensor(*lead, cols), "base": d.tensor(rows, cols), "deltas": deltas,
        "adapter_index": torch.randint(-1, len(deltas), lead[:1], generator=d.generator),
        "bias": d.maybe(lambda: d.tensor(rows)),
    }  # fmt: skip
    return Call(ops.grouped_delta_linear, arguments)


def _logit_penalties(**arguments: Any) -> tuple[Tensor, Tensor]:
    found = ops.logit_penalties(**arguments)
    entropy = ops.mean_entropy(arguments["student"], mask=arguments["mask"], temperature=arguments["temperature"],
                               vocabulary=arguments["vocabulary"])  # fmt: skip
    return found.total, entropy


@case("logit_terms", "logit_terms_backward", "mean_entropy")
def logit_penalties(d: Draw) -> Call:
    lead, words = [d.size(9) for _ in range(d.random.randint(0, 2))], d.size(300, 1)
    student = d.tensor(*lead, words, scale=3.0)
    # no two alike among the largest, or which of them count depends on the dtype
    ranks = student.double().argsort(-1).argsort(-1)
    largest = (ranks - words + 8).clamp(min=0) * (ranks >= words - 7)
    student = (torch.where(largest > 0, 8.0 + largest, student.double().clamp(max=8.0))).to(d.dtype)
    arguments = {
        "student": student, "teacher": d.tensor(*lead, words, scale=3.0),
        "mask": d.maybe(lambda: torch.rand(lead, generator=d.generator) < 0.7),
        "consistency": d.random.choice((0.0, 0.5)), "diversity": d.random.choice((0.0, 0.5)), "spectral": 0.5,
        "temperature": d.random.choice((0.7, 2.0)), "top_k": d.random.choice((0, 1, 5, 1000)), "k": 1,
        "norm": d.random.choice(("frobenius", "nuclear")), "vocabulary": d.maybe(lambda: max(1, words - 3)),
    }  # fmt: skip
    return Call(_logit_penalties, arguments, ("student",))


@case("spectral_share")
def class_penalties(d: Draw) -> Call:
    shape = d.size(9), d.size(6, 1)
    arguments = {
        "student": d.tensor(*shape), "teacher": d.tensor(*shape), "consistency": 0.5, "diversity": 0.5, "spectral": 0.5,
        "temperature": 2.0, "k": 1, "normalized": d.chance(0.5),
    }  # fmt: skip
    return Call(lambda **given: ops.class_penalties(**given).total, arguments, ("student",))


def _whole(x: Tensor, weight: Tensor, part: Tensor, dim: int, start: int, bias: Tensor | None) -> Tensor:
    return ops.partial_linear(x, weight, part, dim=dim, start=start, bias=bias)


@case("partial_linear", "partial_linear_grad")
def partial_linear(d: Draw) -> Call:
    rows, cols, dim = d.size(70), d.size(70), d.random.randrange(2)
    size = d.random.randint(0, (rows, cols)[dim])
    arguments = {
        "x": d.tensor(d.size(20), cols), "weight": d.tensor(rows, cols),
        "part": d.tensor(rows, size) if dim else d.tensor(size, cols), "dim": dim,
        "start": d.random.randint(0, (rows, cols)[dim] - size), "bias": d.maybe(lambda: d.tensor(rows)),
    }  # fmt: skip
    return Call(_whole, arguments, ("x", "part", "bias"))


@case("gated_act", "gated_linear", "gated_linear_grad")
def gated_linear(d: Draw) -> Call:
    rows, cols, tokens = d.size(40), d.size(140), d.size(20)
    size = d.random.randint(0, cols)
    arguments = {
        "gate": d.tensor(tokens, cols), "up": d.tensor(tokens, cols), "weight": d.tensor(rows, cols),
        "trained": d.tensor(rows, size), "start": d.random.randint(0, cols - size),
        "activation": d.random.choice(list(ACTIVATIONS)), "bias": d.maybe(lambda: d.tensor(rows)),
    }  # fmt: skip
    return Call(ops.gated_linear, arguments, ("gate", "up", "trained", "bias"))


def _masked(x: Tensor, mask: Tensor, width: int, activation: str | None) -> Tensor:
    return ops.mask_units(x, mask, width, z=None if activation is None else x, activation=activation)


@case("mask_units", "mask_units_grad")
def mask_units(d: Draw) -> Call:
    units, width = d.size(140), d.random.choice((1, 1, 3, 16, 33))
    arguments = {
        "x": d.tensor(*d.random.choice(((), (d.size(140),), (2, d.size(20)))), units * width),
        "mask": d.tensor(units, dtype=torch.float32), "width": width,
        "activation": d.random.choice((None, None, *ACTIVATIONS)),
    }  # fmt: skip
    return Call(_masked, arguments, ("x", "mask"))


def _cloud(d: Draw, batch: int, points: int) -> Tensor:
    """On a grid that every dtype has: distances are exact, and many are equal."""
    return d.tensor(batch, points, 3, scale=3.0).round_()


@case("farthest_point_sample")
def farthest_point_sample(d: Draw) -> Call:
    batch, points = d.size(4), d.size(150, 1)
    lengths = d.maybe(lambda: torch.randint(1, points + 1, (batch,), generator=d.generator))
    arguments = {
        "points": _cloud(d, batch, points), "samples": d.size(40, 1),
        "start": points // 2 if lengths is None else 0, "lengths": lengths, "repeat": True,
        "skip_near_origin": d.chance(0.3),
    }  # fmt: skip
    return Call(ops.farthest_point_sample, arguments)


def _found(run: Callable[..., tuple[Tensor, Tensor]], **arguments: Any) -> list[Tensor]:
    """Indices, and distances or the mask; a slot without a neighbour has no finite distance."""
    indices, other = run(**arguments)
    return [indices, other.int() if other.dtype == torch.bool else other.clamp(max=1e4)]


@case("knn")
def knn(d: Draw) -> Call:
    batch, points = d.size(4), d.size(150, 1)
    lengths = d.maybe(lambda: torch.randint(1, points + 1, (batch,), generator=d.generator))
    arguments = {
        "points": _cloud(d, batch, points), "queries": _cloud(d, batch, d.size(30)), "k": d.size(40, 1),
        "lengths": lengths,
    }  # fmt: skip
    return Call(partial(_found, ops.knn), arguments, ("points", "queries"))


@case("ball_query")
def ball_query(d: Draw) -> Call:
    call = knn(d)
    arguments = call.arguments | {"radius": d.random.choice((0.5, 1.0, 2.0, 40.0))}
    return Call(partial(_found, ops.ball_query), arguments)


@case("gather_points", "gather_points_grad")
def gather_points(d: Draw) -> Call:
    batch, points, width = d.size(4), d.size(60, 1), d.size(140)
    shape = (batch, *(d.size(20) for _ in range(d.random.randint(1, 2))))
    arguments = {
        "features": d.tensor(batch, points, width),
        "indices": torch.randint(0, points, shape, generator=d.generator),
        "weights": d.maybe(lambda: d.tensor(*shape, dtype=torch.float32)),
    }
    return Call(ops.gather_points, arguments, ("features", "weights"))


@case("knn", "gather_points")
def interpolate(d: Draw) -> Call:
    batch, points = d.size(4), d.size(30, 1)
    arguments = {
        "centres": _cloud(d, batch, points), "queries": _cloud(d, batch, d.size(30)),
        "values": d.tensor(batch, points, d.size(140)), "k": d.maybe(lambda: d.size(40, 1)),
    }  # fmt: skip
    return Call(ops.interpolate, arguments, ("values",))


def _sparse(d: Draw, run: Callable[..., Any], arguments: dict[str, Any], grads: tuple[str, ...]) -> Call:
    """With a threshold, what is just below it in one dtype may be above in the other."""
    tau = d.random.choice((0.0, 0.0, 0.05))
    path = d.random.choice(("sparse", "sparse", "dense"))
    return Call(run, arguments | {"tau": tau, "path": path}, () if tau else grads, slack=40 * tau)


@case("sparse_down", "sparse_mlp_4bit")
def sparse_down(d: Draw) -> Call:
    neurons, width = d.size(200), d.size(140)
    w = d.packed(neurons, width, 0.1) if d.chance(0.4) else d.tensor(neurons, width, scale=0.1)
    a = torch.relu(d.tensor(d.size(70), neurons) - d.random.choice((0.0, 1.0, 9.0)))
    return _sparse(d, ops.sparse_down, {"a": a, "w_down_t": w, "bias": d.maybe(lambda: d.tensor(width))},
                   ("a", "bias"))  # fmt: skip


def _mlp_case(d: Draw, packed: bool, widths: tuple[int, ...] = (), most_tokens: int = 70) -> Call:
    neurons, width, gated = d.size(140), d.random.choice(widths) if widths else d.size(140), d.chance(0.5)
    weight = d.packed if packed else lambda *shape, scale: d.tensor(*shape, scale=scale)
    x, activation = d.tensor(d.size(most_tokens), width), d.random.choice(list(ACTIVATIONS))
    arguments = {"x": x, "w_up": weight(neurons, width, scale=0.1), "w_down_t": weight(neurons, width, scale=0.1)}
    if packed and neurons % 128 == 0 and neurons and d.chance(0.5):  # the transpose of a packed down projection
        arguments["w_down_t"] = d.packed(width, neurons, 0.1).t() if width else arguments["w_down_t"]
    if gated:
        arguments["w_gate"] = weight(neurons, width, scale=0.1)
    else:
        arguments |= {"b_up": d.maybe(lambda: d.tensor(neurons)), "b_down": d.maybe(lambda: d.tensor(width))}
    run = ops.sparse_gated_mlp if gated else ops.sparse_mlp
    # The slope of relu jumps at 0, which a product rounded in another dtype may cross.
    grads = () if activation == "relu" else ("x",)
    return _sparse(d, run, arguments | {"activation": activation}, grads)


@case("sparse_mlp")
def sparse_mlp(d: Draw) -> Call:
    return _mlp_case(d, packed=False)


@case("sparse_mlp_4bit")
def sparse_mlp_4bit(d: Draw) -> Call:
    return _mlp_case(d, packed=True)


def _mlp_int8(x: Any, w_up: Any, w_down_t: Any, w_gate: Any = None, **options: Any) -> Tensor:
    firsts = [w for w in (w_gate, w_up) if w is not None]
    if not isinstance(x, Tensor) or x.dtype != torch.float64:
        run = partial(ops.sparse_mlp, x) if w_gate is None else partial(ops.sparse_gated_mlp, x, w_gate)
        return run(w_up, w_down_t, **options)

    def times(w: Any) -> Tensor:  # the definition stands in for a float64 op
        if takes_int8(x.float(), w.parts()):
            return linear_4bit_int8_ref(x.float(), w.parts()).double()
        return x @ w.dequantize(torch.float64).t()

    z, *up = (times(w) for w in firsts)
    z = z if options.get("b_up") is None else z + options["b_up"]
    a = activate(z, options["activation"])
    h = keep_active(a, a, options["tau"]) * (up[0] if up else 1)
    y = h @ w_down_t.dequantize(torch.float64)
    return y if options.get("b_down") is None else y + options["b_down"]


@case("sparse_mlp_4bit_int8")
def sparse_mlp_4bit_int8(d: Draw) -> Call:
    call = _mlp_case(d, packed=True, widths=(32, 64, 128, d.size(140)), most_tokens=20)
    return call._replace(run=_mlp_int8, arguments=call.arguments | {"activations": "int8"}, differentiable=())


@case("causal_conv1d", "causal_conv1d_grad")
def causal_conv1d(d: Draw) -> Call:
    batch, channels, length, width = d.size(3), d.size(40), d.size(80), d.size(16, 1)
    arguments = {
        "x": d.tensor(batch, channels, length), "weight": d.tensor(channels, width, dtype=d.wide()),
        "bias": d.maybe(lambda: d.tensor(channels, dtype=d.wide())),
        "initial_states": d.maybe(lambda: d.tensor(batch, channels, width - 1)),
        "return_final_states": d.chance(0.5), "activation": d.random.choice((None, "silu")),
        "seq_idx": d.maybe(lambda: _sequences(d, batch, length)),
    }  # fmt: skip
    return Call(ops.causal_conv1d, arguments, ("x", "weight", "bias", "initial_states"))


def _sequences(d: Draw, batch: int, length: int) -> Tensor:
    return (torch.rand(batch, length, generator=d.generator) < 0.1).cumsum(1).to(torch.int32)


def _slots(d: Draw, batch: int, rows: int) -> Tensor | None:
    """Distinct rows of a state for each of the batch, some of them padding; None: they are in the batch's order."""
    if rows == batch and d.chance(0.5):
        return None
    slots = torch.randperm(rows, generator=d.generator)[:batch]
    return torch.where(torch.rand(batch, generator=d.generator) < 0.2, -1, slots)


@case("causal_conv1d_update")
def causal_conv1d_update(d: Draw) -> Call:
    batch, channels, width = d.size(4), d.size(40), d.size(16, 1)
    rows = batch + d.random.randrange(2)
    arguments = {
        "x": d.tensor(batch, channels, *([d.size(20)] * d.chance(0.5))),
        "conv_state": d.tensor(rows, channels, width - 1 + d.random.randrange(3)).contiguous(),
        "weight": d.tensor(channels, width, dtype=d.wide()), "bias": d.maybe(lambda: d.tensor(channels)),
        "activation": d.random.choice((None, "silu")), "conv_state_indices": _slots(d, batch, rows),
    }  # fmt: skip
    return Call(ops.causal_conv1d_update, arguments, in_place=("conv_state",))


@case("selective_scan", "selective_scan_grad")
def selective_scan(d: Draw) -> Call:
    batch, groups, length, states = d.size(3), d.size(3, 1), d.size(40), d.size(20, 1)
    channels = groups * d.size(20)

    def coefficient() -> Tensor:
        if d.chance(0.3):
            return d.tensor(channels, states)
        return d.tensor(batch, groups, states, length) if groups > 1 else d.tensor(batch, states, length)

    arguments = {
        "u": d.tensor(batch, channels, length), "delta": d.tensor(batch, channels, length, scale=0.5),
        "A": -d.tensor(channels, states, dtype=torch.float32).exp(), "B": coefficient(), "C": coefficient(),
        "D": d.maybe(lambda: d.tensor(channels, dtype=torch.float32)),
        "z": d.maybe(lambda: d.tensor(batch, channels, length)),
        "delta_bias": d.maybe(lambda: d.tensor(channels, dtype=torch.float32)), "delta_softplus": True,
        "return_last_state": d.chance(0.5),
        "initial_state": d.maybe(lambda: d.tensor(batch, channels, states, dtype=torch.float32)),
    }  # fmt: skip
    return Call(
        ops.selective_scan, arguments, ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
    )  # fmt: skip


@case("selective_state_update")
def selective_state_update(d: Draw) -> Call:
    batch, states, groups = d.size(4), d.size(40, 1), d.size(3, 1)
    rest = [groups * d.size(4), d.size(20)] if d.chance(0.5) else [d.size(40)]
    groups, rows = groups if len(rest) == 2 else 1, batch + d.random.randrange(2)
    arguments = {
        "state": d.tensor(rows, *rest, states, dtype=d.wide()).contiguous(), "x": d.tensor(batch, *rest),
        "dt": d.tensor(batch, *rest, scale=0.5), "A": -d.tensor(*rest, states, dtype=torch.float32).exp(),
        "B": d.tensor(batch, groups, states), "C": d.tensor(batch, groups, states),
        "D": d.maybe(lambda: d.tensor(*rest, dtype=torch.float32)), "z": d.maybe(lambda: d.tensor(batch, *rest)),
        "dt_bias": d.maybe(lambda: d.tensor(*rest, dtype=torch.float32)), "dt_softplus": True,
        "state_batch_indices": _slots(d, batch, rows),
    }  # fmt: skip
    return Call(ops.selective_state_update, arguments, in_place=("state",))


@case("ssd", "ssd_grad")
def mamba_chunk_scan(d: Draw) -> Call:
    batch, length, groups, dim, states = d.size(3), d.size(40), d.size(3, 1), d.size(34), d.size(34, 1)
    heads = groups * d.size(4, 1)
    arguments = {
        "x": d.tensor(batch, length, heads, dim), "dt": d.tensor(batch, length, heads, scale=0.5),
        "A": -d.tensor(heads, dtype=torch.float32).exp(), "B": d.tensor(batch, length, groups, states),
        "C": d.tensor(batch, length, groups, states), "chunk_size": 64,
        "D": d.maybe(lambda: d.tensor(*((heads, dim) if d.chance(0.5) else (heads,)), dtype=torch.float32)),
        "z": d.maybe(lambda: d.tensor(batch, length, heads, dim)),
        "dt_bias": d.maybe(lambda: d.tensor(heads, dtype=torch.float32)),
        "initial_states": d.maybe(lambda: d.tensor(batch, heads, dim, states, dtype=torch.float32)),
        "seq_idx": d.maybe(lambda: _sequences(d, batch, length)), "dt_softplus": True,
        "return_final_states": d.chance(0.5),
    }  # fmt: skip
    return Call(
        ops.mamba_chunk_scan, arguments, ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states"),
        roundings=4,
    )  # fmt: skip


def _projection(d: Draw, rows: int, cols: int) -> Projection:
    weight = d.packed(rows, cols, 0.2) if d.chance(0.3) else d.tensor(rows, cols, scale=0.2)
    pairs = []
    for _ in range(d.random.randrange(3)):
        start = d.random.randrange(rows)
        stop, rank = d.random.randint(start + 1, rows), d.size(5, 1)
        where = d.random.choice((None, (start, stop)))
        factors = d.tensor(rank, cols, scale=0.2), d.tensor(rows if where is None else stop - start, rank, scale=0.2)
        pairs.append(LoraPair(*factors, 0.5, where))
    return Projection(weight, d.maybe(lambda: d.tensor(rows)), tuple(pairs))


@case("mamba_inner", "mamba_inner_grad")
def mamba_inner(d: Draw) -> Call:
    batch, length, width, rank, states, taps = d.size(3), d.size(40), d.size(20, 1), d.size(4, 1), d.size(17, 1), 4
    arguments = {
        "xz": d.tensor(batch, length, 2 * width), "conv_weight": d.tensor(width, taps, dtype=torch.float32, scale=0.5),
        "conv_bias": d.maybe(lambda: d.tensor(width, dtype=torch.float32)),
        "x_proj": _projection(d, rank + 2 * states, width), "dt_proj": _projection(d, width, rank),
        "out_proj": _projection(d, d.size(20, 1), width),
        "A": -d.tensor(width, states, dtype=torch.float32).exp(), "D": d.tensor(width, dtype=torch.float32),
        "mask": d.maybe(lambda: torch.rand(batch, length, generator=d.generator) < 0.8),
        "conv_state": d.maybe(lambda: d.tensor(batch, width, taps - 1)),
        "initial_state": d.maybe(lambda: d.tensor(batch, width, states, dtype=torch.float32)),
        "norm_eps": d.random.choice((None, 0.1)),  # smaller, and the norm of one element is a step
    }  # fmt: skip
    return Call(ops.mamba_inner, arguments, ("xz", "conv_state", "initial_state"), roundings=6)


@case("mamba2_inner", "mamba2_inner_grad")
def mamba2_inner(d: Draw) -> Call:
    batch, length, groups, dim, states, taps = d.size(3), d.size(40), d.size(2, 1), d.size(9, 1), d.size(17, 1), 4
    heads = groups * d.size(3, 1)
    width, channels = heads * dim, heads * dim + 2 * groups * states
    arguments = {
        "zxbcdt": d.tensor(batch, length, width + channels + heads),
        "conv_weight": d.tensor(channels, taps, dtype=torch.float32, scale=0.5),
        "conv_bias": d.maybe(lambda: d.tensor(channels, dtype=torch.float32)),
        "dt_bias": d.tensor(heads, dtype=torch.float32), "A": -d.tensor(heads, dtype=torch.float32).exp(),
        "D": d.tensor(heads, dtype=torch.float32), "norm_weight": d.tensor(width, dtype=torch.float32),
        "out_proj": _projection(d, d.size(20, 1), width), "head_dim": dim, "groups": groups,
        "mask": d.maybe(lambda: torch.rand(batch, length, generator=d.generator) < 0.8),
        "conv_state": d.maybe(lambda: d.tensor(batch, channels, taps - 1)),
        "initial_state": d.maybe(lambda: d.tensor(batch, heads, dim, states, dtype=torch.float32)),
        "norm_eps": 0.1,  # smaller, and the norm of a row that all but vanishes blows up its roundings
    }  # fmt: skip
    return Call(ops.mamba2_inner, arguments, ("zxbcdt", "conv_state", "initial_state"), roundings=4)


@case("galore_step")
def galore(d: Draw) -> Call:
    """One matrix, whose state is as it is behind its first gradients."""
    rows, columns, rank, size = d.size(40), d.size(40), d.size(9, 1), d.size(6, 1)
    left, right = (d.maybe(lambda n=n: d.tensor(n, rank, dtype=torch.float32)) for n in (rows, columns))
    shape = rows if left is None else rank, columns if right is None else rank
    fill = d.random.randint(0, size)
    arguments: dict[str, Any] = {
        "weight": d.tensor(rows, columns), "grad": d.tensor(rows, columns), "left": left, "right": right,
        "exp_avg": d.tensor(*shape, dtype=torch.float32), "square": d.tensor(*shape, dtype=torch.float32),
        "history": d.tensor(size, shape[0] * shape[1], dtype=torch.float32), "slot": d.random.randint(0, fill) % size,
        "fill": fill, "age": d.random.randint(1, 1000), "lr": 0.1, "weight_decay": 0.1, "scale": 0.5, "eps": 1e-3,
        "betas": (0.9, 0.99), "correct_bias": d.chance(0.5),
        "damping": Damping(1.0, d.random.choice(DAMPING_MODES), d.random.choice(FISHER_NORMS)),
    }  # fmt: skip
    windowed = d.chance(0.7)

    def run(*, square: Any, history: Any, slot: Any, fill: Any, lr: Any, damping: Any, **rest: Any) -> list[Tensor]:
        options = {name: rest.pop(name) for name in ("weight_decay", "scale", "eps", "betas", "correct_bias")}
        window = None
        if windowed and isinstance(history, Tensor) and history.dim() == 2 and history.device.type == "cpu":
            gram = history.double() @ history.double().t() if history.layout == torch.strided else history
            window = Window(history, gram, slot, fill, torch.zeros((), dtype=torch.int64))
        if isinstance(square, Tensor) and square.is_floating_point() and square.layout == torch.strided:
            square = square.square() + 0.5
        galore_step([AdamMatrix(**rest, exp_avg_sq=square, window=window)], lr=lr, damping=damping, **options)
        return [square, *([] if window is None else [window.gram])]

    return Call(run, arguments, in_place=("weight", "exp_avg", "history"))


@case("decode_step")
def decode_step(d: Draw) -> Call:
    heads, group, size, length = d.size(3, 1), d.size(3, 1), 2 * d.size(17, 1), d.size(40, 1)
    width, neurons, tokens, layers = d.size(70, 1), d.size(70, 1), d.size(5, 1), d.size(2, 1)
    d.dtype = torch.float32
    dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def matrix(rows: int, cols: int, *, neuron_major: bool = False) -> Matrix:
        scale, dtype, rank = cols**-0.5, d.random.choice(dtypes), d.size(20, 1)
        bias = d.maybe(lambda: d.tensor(rows).contiguous())
        low = {}
        if d.chance(0.3):
            a = d.tensor(rank, cols, scale=scale).contiguous()
            a = a.t().contiguous() if neuron_major else a
            low = {"lora_a": a, "lora_b": d.tensor(rows, rank, scale=rank**-0.5).contiguous(), "lora_scale": 0.5}
        low["neuron_major"] = neuron_major
        if cols % 32 == 0 and (rows % 2 == 0 or not neuron_major) and d.chance(0.5):
            q = ops.quantize_4bit(d.tensor(rows, cols, scale=scale), block_size=32)
            return Matrix(q.t() if neuron_major else q, bias, **low)
        wide = d.tensor(*((cols, rows) if neuron_major else (rows, cols)), dtype=dtype, scale=scale).contiguous()
        return Matrix(torch.cat((wide, wide), 1)[:, : wide.shape[1]] if d.chance(0.3) else wide, bias, **low)

    def block() -> Block:
        norms = [d.tensor(n).contiguous() for n in (width, width, size, size)]
        norms = norms if d.chance(0.5) else [*norms[:2], None, None]
        shapes = [(heads * group * size, width), (heads * size, width), (heads * size, width),
                  (width, heads * group * size), (neurons, width), (neurons, width)]  # fmt: skip
        tau = 0.0 if relu and d.chance(0.5) else None  # any other threshold is a matter of rounding
        matrices = [*(matrix(*shape) for shape in shapes), matrix(width, neurons, neuron_major=tau is not None)]
        if d.chance(0.2):
            matrices[4:], tau = [None] * 3, None
        return Block(*matrices, *norms, window=d.size(40, 1), tau=tau)

    activation = d.random.choice(list(ACTIVATIONS))
    relu = activation in ("relu", "relu2")
    angles = torch.arange(length)[:, None] * torch.rand(size, generator=d.generator)
    stack = DecoderStack(
        [block() for _ in range(layers)], d.tensor(width).contiguous(), matrix(d.size(70, 1), width), angles.cos(),
        angles.sin(), heads * group, activation, eps=1e-3, scale=size**-0.5,
    )  # fmt: skip
    steps = min(d.size(5, 1), length)
    position, cache = d.random.randrange(length - steps + 1), (layers, tokens + d.size(2), heads, length, size)
    together = (steps,) if steps > 1 or d.chance(0.5) else ()  # several positions, or the one without a dimension
    arguments = {
        "hidden": d.tensor(tokens, *together, width), "position": position,
        "starts": torch.randint(position + 1, (tokens,), generator=d.generator),  # keys of padding would differ
        "keys": torch.randn(cache, generator=d.generator), "values": torch.randn(cache, generator=d.generator),
    }  # fmt: skip
    run = partial(decoder.decode_step, stack=stack)
    return Call(run, arguments, in_place=("keys", "values"), roundings=20 * layers)


@case("mamba_step")
def one_mamba_step(d: Draw) -> Call:
    second, width, tokens, layers, taps = d.chance(0.5), d.size(70, 1), d.size(5, 1), d.size(2, 1), d.size(5, 1)
    states, rank, groups = d.size(40, 1), d.size(33, 1), d.size(3, 1) if second else 1
    heads = groups * d.size(3, 1) if second else 1
    channels, norm_groups = heads * d.size(20, 1) if second else d.size(70, 1), heads if second and d.chance(0.5) else 1
    mixed, own = channels + 2 * groups * states * second, heads if second else channels
    d.dtype = torch.float32

    def matrix(rows: int, cols: int) -> Matrix:
        scale, bias = cols**-0.5, d.maybe(lambda: d.tensor(rows).contiguous())
        if cols % 32 == 0 and d.chance(0.5):
            return Matrix(ops.quantize_4bit(d.tensor(rows, cols, scale=scale), block_size=32), bias)
        dtype = d.random.choice((torch.float32, torch.bfloat16, torch.float16))
        return Matrix(d.tensor(rows, cols, dtype=dtype, scale=scale).contiguous(), bias)

    def vector(*shape: int) -> Tensor:
        return d.tensor(*shape).contiguous()

    def layer() -> MambaLayer:
        first = {} if second else {"x_proj": matrix(rank + 2 * states, channels), "dt_proj": matrix(channels, rank)}
        return MambaLayer(
            matrix(channels + mixed + heads * second, width), matrix(width, channels), vector(width),
            vector(taps, mixed), d.maybe(lambda: vector(mixed)),
            -vector(*((heads,) if second else (channels, states))).abs(), vector(own), d.maybe(lambda: vector(own)),
            gated_norm=vector(channels) if second else None, **first,
        )  # fmt: skip

    stack = MambaStack(
        [layer() for _ in range(layers)], vector(width), matrix(d.size(70, 1), width), states, 0.1, groups, norm_groups
    )
    arguments = {
        "hidden": d.tensor(tokens, width),
        "windows": torch.randn(layers, tokens + 1, taps - 1, mixed, generator=d.generator),
        "states": torch.randn(layers, tokens + 1, channels, states, generator=d.generator),
    }
    run = partial(mamba_step, stack=stack)
    return Call(run, arguments, in_place=("windows", "states"), roundings=20 * layers)


# ---------------------------------------------------------------------------- running a call


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """value with every plain tensor in it changed; 4-bit tensors stay."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (SliceDelta, LowRankDelta)):
        fields = {f.name: mapped(getattr(value, f.name), change) for f in dataclasses.fields(value)}
        return type(value)(**fields)
    if isinstance(value, (LoraPair, Projection)):
        return type(value)(*(mapped(v, change) for v in value))
    if isinstance(value, dict):
        return {name: mapped(v, change) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(v, change) for v in value)
    return value


def evaluate(call: Call, arguments: dict[str, Any], with_gradients: list[str], seed: int) -> list[Tensor]:
    """Outputs, states changed in place, and gradients."""
    leaves = [arguments[name].requires_grad_() for name in with_gradients]
    out = call.run(**arguments)
    outs = [out] if isinstance(out, Tensor) else list(out)
    found = [o.detach() for o in outs] + [arguments[name].detach() for name in call.in_place]
    smooth = [o for o in outs if o.requires_grad]
    if leaves and smooth:
        generator = torch.Generator().manual_seed(seed)
        weights = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in smooth]
        grads = torch.autograd.grad(smooth, leaves, weights, allow_unused=True)
        found += [torch.zeros(()) if g is None else g for g in grads]
    return found


def run_good(d: Draw, call: Call) -> None:
    names = [n for n in call.differentiable if isinstance(call.arguments[n], Tensor) and d.chance(0.6)]
    seed, tolerance = d.random.getrandbits(40), TOLERANCE[d.dtype] * call.roundings
    double = mapped(call.arguments, lambda t: t.double() if t.is_floating_point() else t)
    double |= {name: double[name].clone() for name in call.in_place}
    ours = evaluate(call, dict(call.arguments), names, seed)
    exact = evaluate(call, double, names, seed)
    assert len(ours) == len(exact)
    for i, (found, ref) in enumerate(zip(ours, exact, strict=True)):
        assert found.shape == ref.shape, i
        if ref.numel() == 0:
            continue
        assert found.isfinite().all(), i
        scale = max(1.0, float(ref.abs().max()))
        error = float((found.double() - ref).abs().max())
        assert error <= tolerance * scale + call.slack, (i, error, scale)


def spoilt(d: Draw, value: Any) -> Any:
    """Another value in its place: wrong in kind, shape, dtype or device, or just different."""
    if isinstance(value, Tensor):
        dim = d.random.randrange(max(value.dim(), 1))
        choices: list[Callable[[], Any]] = [
            lambda: None, lambda: "text", lambda: value.tolist(), lambda: value.unsqueeze(0), lambda: value.reshape(-1),
            lambda: value.to(torch.int64), lambda: value.to(torch.float16), lambda: value.to(torch.float32),
            lambda: value.to(torch.complex64), lambda: value.to("meta"), lambda: value.bool(),
            lambda: torch.zeros(()), lambda: value.to_sparse(),
            lambda: value.narrow(dim, 0, max(value.shape[dim] - 1, 0)) if value.dim() else value,
            lambda: torch.cat((value, value), dim) if value.dim() else value, lambda: value * -2,
        ]  # fmt: skip
        return d.random.choice(choices)()
    if isinstance(value, QuantizedTensor):
        rows = d.size(40)
        return d.random.choice((None, value.to("meta"), value.dequantize(), "text", d.packed(rows, d.size(40)),
                                d.packed(1, value.numel())))  # fmt: skip
    if isinstance(value, Projection):
        return value._replace(weight=spoilt(d, value.weight))
    if isinstance(value, (list, tuple)):
        return d.random.choice((None, [], [*value, *value], ["text"]))
    return d.random.choice((None, -1, 0, 1, 3, 1.5, float("nan"), float("inf"), "text", True, []))


def run_bad(d: Draw, call: Call) -> None:
    name = d.random.choice(list(call.arguments))
    wrong = call.arguments | {name: spoilt(d, call.arguments[name])}
    try:
        with torch.no_grad():
            call.run(**wrong)
    except (ValueError, TypeError) as error:
        assert str(error)
    except Exception as error:
        raise AssertionError(f"{name}={wrong[name]!r}: {type(error).__name__}: {error}") from error


def run(name: str, number: int) -> None:
    """Call `number` of a case."""
    d = Draw(name, number)
    call = CASES[name](d)
    call = call._replace(arguments=mapped(call.arguments, d.odd))
    if number % 4 == 3:
        run_bad(d, call)
    else:
        run_good(d, call)


@pytest.mark.parametrize("name", sorted(CASES))
def test_calls(name):
    for number in range(FIRST, FIRST + CALLS):
        if LOG:
            Path(LOG).write_text(f"{name} {number}\n")
        try:
            run(name, number)
        except Exception as error:
            raise AssertionError(f"call {number} of {name}: {error}") from error


def test_every_op_is_called():
    """The table names every registered op, and its cases reach what they name."""
    assert set().union(*COVERS.values()) == set(ops.op_names())
    for name, covered in COVERS.items():
        missing = {f"deftcore::{op}" for op in covered}
        for number in (n for n in range(12) if n % 4 != 3):
            if missing:
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                    run(name, number)
                missing -= {event.name for event in profile.events()}
        assert not missing, name
