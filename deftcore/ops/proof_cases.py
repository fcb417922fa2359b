"""What proves a CUDA kernel: small inputs on which it runs against its PyTorch reference, in every dtype, at odd sizes,
on packed rows, on rows enough to fill the device, forward and backward.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from deftcore import ops
from deftcore.ops.density import ACTIVATIONS, SURROGATES, activate
from deftcore.ops.proof_case import Case, Numbers
from deftcore.ops.proof_galore import galore_cases
from deftcore.ops.proof_neighbours import NEIGHBOUR_CASES
from deftcore.ops.sparse_mlp4 import LowRank4, mlp_4bit

# ---------------------------------------------------------------------------- activations


def _act_density(draw: Numbers) -> Iterator[Case]:
    for activation in ACTIVATIONS:
        for surrogate in SURROGATES:
            for width in (17, 64):
                mask = draw.below(3, 3) > 0
                yield Case(
                    f"{activation}, {surrogate}, {width}",
                    lambda z, f=activation, s=surrogate, m=mask: ops.act_density(z, f, mask=m, surrogate=s),
                    [draw.normal(3, width, scale=3.0)], gradients=True,
                )  # fmt: skip
    for width in (2049, 4096):
        z = draw.normal(5, width, scale=3.0)
        yield Case(f"gelu, {width}", lambda z: ops.act_density(z, "gelu"), [z], gradients=True)


def _density(draw: Numbers) -> Iterator[Case]:
    for shape in ((1, 1), (37, 101), (2, 4099), (5, 2048)):
        mask = draw.below(2, shape[0]) > 0
        for m in (None, mask):
            yield Case(f"{shape}", lambda a, m=m: ops.density(a, mask=m), [draw.zeroed(*shape, 0.3)])
    yield Case("threshold", lambda a: ops.density(a, tau=0.5), [draw.normal(9, 33)])


def _gated_act(draw: Numbers) -> Iterator[Case]:
    def run(both: Tensor, activation: str) -> Tensor:
        gate, up = both.chunk(2, dim=1)
        one = torch.eye(gate.shape[1], dtype=both.dtype, device=both.device)
        return ops.gated_linear(gate, up, one, activation=activation)

    for activation in ACTIVATIONS:
        for rows, width in ((5, 17), (3, 264)):
            both = draw.normal(rows, 2 * width, scale=2.0)
            yield Case(f"{activation}, {width}", lambda x, f=activation: run(x, f), [both], gradients=True)


def _mask_units(draw: Numbers) -> Iterator[Case]:
    def run(x: Tensor, mask: Tensor, width: int, activation: str | None) -> Tensor:
        mask = mask if x.dtype == torch.float64 else mask.float()
        if activation is None:
            return ops.mask_units(x, mask, width)
        return ops.mask_units(activate(x.detach(), activation), mask, width, z=x, activation=activation)

    for activation in (None, *ACTIVATIONS):
        for rows, units, width in ((5, 17, 1), (3, 264, 1), (70, 3, 40), (2, 9, 3), (200, 2056, 1)):
            yield Case(
                f"{activation}, {rows} x {units} x {width}", lambda x, m, w=width, f=activation: run(x, m, w, f),
                [draw.normal(rows, units * width), draw.normal(units)], gradients=True,
            )  # fmt: skip


# ---------------------------------------------------------------------------- sparse products


def _sparse_down(draw: Numbers) -> Iterator[Case]:
    for tokens, neurons, width in ((1, 67, 17), (4, 259, 64), (5, 130, 333), (64, 70, 72), (2, 40, 2064)):
        for density in (0.0, 0.3, 1.0):
            yield Case(
                f"{tokens} tokens, density {density}",
                lambda a, w, b, fixed=tokens == 5: ops.sparse_down(a, w, b, path="sparse", deterministic=fixed),
                [draw.zeroed(tokens, neurons, density), draw.normal(neurons, width), draw.normal(width)],
            )
    yield Case("threshold", lambda a, w: ops.sparse_down(a, w, tau=0.5, path="sparse"),
               [draw.normal(3, 90), draw.normal(90, 24)])  # fmt: skip


def _sparse_mlp(draw: Numbers) -> Iterator[Case]:
    def run(x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, activation: str, *biases: Tensor) -> Tensor:
        options: dict[str, Any] = {"activation": activation, "tau": 0.0, "path": "sparse"}
        if gate is None:
            return ops.sparse_mlp(x, up, down, *biases, **options)
        return ops.sparse_gated_mlp(x, gate, *ops.bundle_rows(up, down), **options)

    for activation in ("relu", "silu"):
        for tokens in (1, 3):
            for neurons, width in ((70, 33), (200, 64), (40, 2064)):
                up, down = (draw.normal(neurons, width, scale=width**-0.5) for _ in range(2))
                gate = draw.normal(neurons, width, scale=width**-0.5)
                x, biases = draw.normal(tokens, width), (draw.normal(neurons), draw.normal(width))
                label = f"{activation}, {tokens} tokens, {neurons} x {width}"
                yield Case(f"gated {label}", lambda *t, f=activation: run(*t, f), [x, gate, up, down])
                yield Case(
                    label, lambda x, up, down, *b, f=activation: run(x, None, up, down, f, *b), [x, up, down, *biases]
                )


def _sparse_mlp_4bit(draw: Numbers) -> Iterator[Case]:
    sparse, relu = 1, ACTIVATIONS["relu"]
    for quant_type, block, double in (("nf4", 32, False), ("fp4", 64, False), ("nf4", 64, True)):
        neurons, width = 160, 2 * block
        gate, up, down = (
            draw.quantized(neurons, width, quant_type=quant_type, block_size=block, double_quant=double)
            for _ in range(3)
        )
        columns = draw.quantized(width, 160, quant_type=quant_type, block_size=32, double_quant=False).t()
        for tokens in (1, 4):
            x = draw.normal(tokens, width)
            for label, weights in (("rows", (gate, up, down)), ("columns", (gate, up, columns)), ("plain", (up, down))):
                yield Case(
                    f"{quant_type}, block {block}, {label}, {tokens} tokens",
                    lambda x, w=weights: mlp_4bit(x, w, None, None, relu, 0.0, sparse), [x],
                )  # fmt: skip
    wide = [draw.quantized(40, 2112, double_quant=False) for _ in range(3)]
    for tokens in (1, 4):
        yield Case(f"wide, {tokens} tokens", lambda x: mlp_4bit(x, wide, None, None, relu, 0.0, sparse),
                   [draw.normal(tokens, 2112)])  # fmt: skip
    low = [draw.normal(*shape, scale=0.2) for shape in ((9, 128), (160, 9), (9, 128), (160, 9), (160, 9), (128, 9))]
    yield Case("LoRA", lambda x, *low: mlp_4bit(x, (gate, up, down), None, None, relu, 0.0, sparse, LowRank4(*low)),
               [draw.normal(3, 128), *low])  # fmt: skip


# ---------------------------------------------------------------------------- 4 bits


def _quantize_4bit(draw: Numbers) -> Iterator[Case]:
    def run(w: Tensor, quant_type: str, block: int) -> tuple[Tensor, Tensor]:
        low = w.float() if w.dtype == torch.float64 else w
        q = ops.quantize_4bit(low, quant_type=quant_type, block_size=block, double_quant=False)
        # Beside a threshold either neighbour is right: it is the distance that counts.
        return q.absmax.to(w.dtype), (q.dequantize(torch.float64) - w.double()).abs().to(w.dtype)

    for quant_type in ("nf4", "fp4"):
        for block in (32, 64, 1024):
            for shape in ((1,), (65,), (5, 7), (19, 128)):
                label = f"{quant_type}, block {block}, {shape}"
                yield Case(label, lambda w, q=quant_type, b=block: run(w, q, b), [draw.normal(*shape)])


def _dequantize_4bit(draw: Numbers) -> Iterator[Case]:
    for quant_type in ("nf4", "fp4"):
        for block in (32, 64, 1024):
            for double in (False, True):
                for shape in ((65,), (19, 128)):
                    q = draw.quantized(*shape, quant_type=quant_type, block_size=block, double_quant=double)
                    label = f"{quant_type}, block {block}, {shape}, double_quant {double}"
                    yield Case(label, lambda x, q=q: q.dequantize(x.dtype), [draw.normal(1)])
    columns = draw.quantized(38, 64, block_size=32, double_quant=False).t()
    yield Case("columns", lambda x: columns.dequantize(x.dtype), [draw.normal(1)])


def _linear_4bit(draw: Numbers) -> Iterator[Case]:
    many = 64 * draw.processors + 5  # rows from which a warp takes several, and columns that are staged in parts
    for quant_type, rows, cols, block in (
        ("nf4", 24, 128, 64), ("fp4", 40, 96, 32), ("nf4", 5, 7, 64), ("nf4", many, 64, 64), ("fp4", 3, 20544, 64),
    ):  # fmt: skip
        for double in (False, True):
            q = draw.quantized(rows, cols, quant_type=quant_type, block_size=block, double_quant=double)
            for tokens in (1, 2, 3, 8, 13):
                x, bias = draw.normal(tokens, cols), draw.normal(rows)
                a, b = draw.normal(9, cols, scale=cols**-0.5), draw.normal(rows, 9)
                label = f"{quant_type}, {rows} x {cols}, double_quant {double}, {tokens} tokens"
                yield Case(label, lambda x, bias, q=q: ops.linear_4bit(x, q, bias), [x, bias], gradients=True)
                yield Case(f"LoRA, {label}", lambda x, a, b, q=q: ops.lora_linear(x, q, a, b, scaling=0.5), [x, a, b],
                           gradients=True)  # fmt: skip
            sigma, a0, b0 = draw.normal(9), draw.normal(3, cols, scale=cols**-0.5), draw.normal(rows, 3)
            yield Case(
                f"sigma and a pair taken away, {label}",
                lambda x, a, b, s, b0, q=q, a0=a0: ops.lora_linear(
                    x, q, a, b, scaling=0.5, sigma=s, minus=(a0.to(x.dtype), b0)
                ),
                [x, a, b, sigma, b0], gradients=True,
            )  # fmt: skip


def _grouped_delta(draw: Numbers) -> Iterator[Case]:
    def run(x: Tensor, base: Tensor, columns: Tensor, row: Tensor, a: Tensor, b: Tensor) -> Tensor:
        deltas: list[Any] = [
            ops.SliceDelta(1, torch.arange(5, device=x.device) * 3, columns),
            ops.SliceDelta(0, torch.zeros(1, dtype=torch.int64, device=x.device), row),
            ops.LowRankDelta(a, b, 0.5),
            None,
        ]
        index = torch.tensor([0, 1, 2, 3, -1, 0, 2], device=x.device)
        return ops.grouped_delta_linear(x, base, deltas, index)

    for rows, cols in ((70, 130), (1, 40), (300, 48), (1100, 16)):
        inputs = [draw.normal(*shape) for shape in ((7, 3, cols), (rows, cols), (5, rows), (1, cols), (9, cols))]
        yield Case(f"{rows} x {cols}", run, [*inputs, draw.normal(rows, 9)])


# ---------------------------------------------------------------------------- state-space models


def _selective_scan(draw: Numbers) -> Iterator[Case]:
    def run(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, *rest: Tensor, rows: bool) -> Any:
        u, delta = (t.transpose(1, 2).contiguous().transpose(1, 2) if rows else t for t in (u, delta))
        d, z, bias, first = rest or [None] * 4
        return ops.selective_scan(u, delta, -torch.exp(a), b, c, d, z, bias, True, True, initial_state=first)

    for batch, channels, length, states, groups, rows in (
        (2, 20, 37, 5, 0, True), (1, 36, 1, 16, 4, False), (1, 33, 70, 16, 0, True), (2, 6, 40, 40, 2, False),
        (1, 130, 40, 16, 0, True),
    ):  # fmt: skip
        coefficients = (batch, groups, states, length) if groups else (batch, states, length)
        shapes = ((batch, channels, length), (batch, channels, length), (channels, states), coefficients, coefficients)
        more = ((channels,), (batch, channels, length), (channels,), (batch, channels, states))
        for every in (True, False):
            inputs = [draw.normal(*shape) for shape in (*shapes, *(more if every else ()))]
            label = f"[{batch}, {channels}, {length}], {states} states{', all arguments' if every else ''}"
            yield Case(label, lambda *t, rows=rows: run(*t, rows=rows), inputs, gradients=True)


def _mamba_chunk_scan(draw: Numbers) -> Iterator[Case]:
    def run(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, *rest: Tensor, seq_idx: Tensor | None) -> Any:
        d, z, bias, first = rest or [None] * 4
        return ops.mamba_chunk_scan(
            x, dt, -torch.exp(a), b, c, 64, d, z, bias, first, seq_idx, True, return_final_states=True
        )

    for batch, length, heads, head_dim, states, groups in (
        (2, 37, 4, 5, 6, 2), (1, 1, 2, 16, 16, 1), (1, 65, 2, 33, 17, 1), (1, 40, 3, 16, 64, 3),
        (1, 70, 2, 80, 20, 1),
    ):  # fmt: skip
        coefficients = (batch, length, groups, states)
        shapes = ((batch, length, heads, head_dim), (batch, length, heads), (heads,), coefficients, coefficients)
        more = ((heads,), (batch, length, heads, head_dim), (heads,), (batch, heads, head_dim, states))
        for every in (True, False):
            inputs = [draw.normal(*shape) for shape in (*shapes, *(more if every else ()))]
            seq_idx = (draw.below(3, batch, length) == 0).long().cumsum(1) if every else None
            label = f"[{batch}, {length}, {heads}, {head_dim}], {states} states{', all arguments' if every else ''}"
            yield Case(label, lambda *t, s=seq_idx: run(*t, seq_idx=s), inputs, gradients=True)


def _causal_conv1d(draw: Numbers) -> Iterator[Case]:
    def run(x: Tensor, weight: Tensor, *rest: Tensor, rows: bool, seq_idx: Tensor | None) -> Any:
        x = x.transpose(1, 2).contiguous().transpose(1, 2) if rows else x
        bias, first = rest or (None, None)
        return ops.causal_conv1d(x, weight, bias, first, activation="silu" if rest else None, seq_idx=seq_idx)

    for channels, length, width, rows in ((20, 37, 4, True), (20, 2, 4, False), (33, 70, 7, True), (5, 130, 2, False)):
        shapes, more = ((2, channels, length), (channels, width)), ((channels,), (2, channels, width - 1))
        for every in (True, False):
            inputs = [draw.normal(*shape) for shape in (*shapes, *(more if every else ()))]
            seq_idx = draw.below(2, 2, length).cumsum(1) if every and length > 2 else None
            label = f"[2, {channels}, {length}], width {width}{', all arguments' if every else ''}"
            yield Case(label, lambda *t, r=rows, s=seq_idx: run(*t, rows=r, seq_idx=s), inputs, gradients=True)

    slots = torch.tensor([2, -1, 0], device=draw.device)

    def step(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        state = state.clone()
        return ops.causal_conv1d_update(x, state, weight, bias, "silu", conv_state_indices=slots), state

    for shape in ((3, 20), (3, 20, 3)):
        yield Case(f"update {shape}", step, [draw.normal(*shape), draw.normal(4, 20, 5), draw.normal(20, 4),
                                             draw.normal(20)])  # fmt: skip


def _selective_state_update(draw: Numbers) -> Iterator[Case]:
    slots = torch.tensor([2, -1, 0], device=draw.device)

    def step(state: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, *rest: Tensor) -> Any:
        state = state.to(torch.promote_types(state.dtype, torch.float32), copy=True)
        d, z, bias = rest or [None] * 3
        y = ops.selective_state_update(state, x, dt, -torch.exp(a), b, c, d, z, bias, True, state_batch_indices=slots)
        return y, state

    for rest, states, groups in (((20,), 5, ()), ((4, 33), 16, (2,)), ((3, 7), 64, (1,))):
        shapes = (
            (4, *rest, states),
            (3, *rest),
            (3, *rest),
            (*rest, states),
            (3, *groups, states),
            (3, *groups, states),
        )
        for more in ((), (rest, (3, *rest), rest)):
            label = f"{rest}, {states} states{', all arguments' if more else ''}"
            yield Case(label, step, [draw.normal(*shape) for shape in (*shapes, *more)])


# ---------------------------------------------------------------------------- logits


def _logit_rows(draw: Numbers) -> Iterator[Case]:
    def run(z: Tensor, t: Tensor, mask: Tensor | None, **options: Any) -> Any:
        found = ops.logit_penalties(z, t, mask=mask, consistency=0.5, diversity=0.25, spectral=0.125, **options)
        entropy = ops.mean_entropy(t, mask=mask, temperature=2.0, vocabulary=options["vocabulary"])
        return found.total, found.consistency, found.diversity, found.spectral, entropy

    for tokens, words, padding, top_k in (
        (1, 1, 0, 0), (3, 37, 0, 5), (6, 264, 0, 0), (5, 2051, 4, 20), (9, 4104, 8, 3), (2, 300, 0, 1),
    ):  # fmt: skip
        # whatever the dtype, the same logits are the largest: a row's first ones, far apart, above all others
        z, t = (draw.normal(tokens, words + padding) for _ in range(2))
        z[:, : min(words, 24)] += 6.0 + 0.5 * torch.arange(min(words, 24), device=z.device).flip(0)
        z = z.bfloat16().half().float()
        mask = draw.below(4, tokens) > 0
        for m in (None, mask):
            yield Case(
                f"[{tokens}, {words}] of {words + padding}, top {top_k}{', some tokens' if m is not None else ''}",
                lambda z, t, m=m, v=words, n=top_k: run(z, t, m, vocabulary=v, top_k=n, k=2), [z, t], gradients=True,
            )  # fmt: skip


CASES: dict[str, Callable[[Numbers], Iterator[Case]]] = {
    "act_density": _act_density, "density": _density, "sparse_down": _sparse_down, "sparse_mlp": _sparse_mlp,
    "sparse_mlp_4bit": _sparse_mlp_4bit, "quantize_4bit": _quantize_4bit, "dequantize_4bit": _dequantize_4bit,
    "linear_4bit": _linear_4bit, "gated_act": _gated_act, "grouped_delta": _grouped_delta, "mask_units": _mask_units,
    "selective_scan": _selective_scan, "mamba_chunk_scan": _mamba_chunk_scan, "causal_conv1d": _causal_conv1d,
    "selective_state_update": _selective_state_update, "logit_rows": _logit_rows,
    "galore_step": galore_cases, **NEIGHBOUR_CASES,
}  # fmt: skip
