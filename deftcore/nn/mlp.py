"""Sparse-inference forms of MLP blocks; `deftcore.sparsify` puts them into a model."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deftcore.nn.linear import PackedModule
from deftcore.nn.thresholds import Level, keep_above
from deftcore.ops.density import ACTIVATIONS, activate, default_tau
from deftcore.ops.lora import lora_linear
from deftcore.ops.paths import PATHS
from deftcore.ops.products import plus_product, product
from deftcore.ops.quant4 import linear_4bit
from deftcore.ops.quantized import QuantizedTensor
from deftcore.ops.sparse_down import sparse_down
from deftcore.ops.sparse_mlp import sparse_mlp_op
from deftcore.ops.sparse_mlp4 import IDENTITY, NO_LOW_RANK, LowRank4, mlp_4bit


@dataclass
class LowRank:
    """An unmerged LoRA pair of one linear layer: delta = scaling * b @ a."""

    a: Tensor  # [R, K]
    b: Tensor  # [M, R]
    scaling: float


class _SparseBlock(nn.Module):
    """What both forms share: how the active neurons are found, and which path is taken.

    A neuron counts where |f(gate x)| > tau, or, of a gated block that goes by the product, where |f(gate x) * (up x)|
    is; `taus` [F] is a threshold for each, `tau` 0 then.
    """

    def __init__(self, activation: str, tau: Level | None, path: str, by_product: bool) -> None:
        super().__init__()
        self.activation, self.path, self.by_product = activation, path, by_product
        self.taus = frozen(tau.detach().float()) if isinstance(tau, Tensor) else None
        self.tau = default_tau(activation) if tau is None else 0.0 if isinstance(tau, Tensor) else tau

    @property
    def level(self) -> Level:
        """The threshold, or one for each neuron."""
        return self.tau if self.taus is None else self.taus

    def _active(self, x: Tensor, gate: Callable[[Tensor], Tensor] | None, up: Callable[[Tensor], Tensor]) -> Tensor:
        """What the down projection reads, [T, F], where a kernel's one threshold of the gate does not say it: the gate
        and up products are whole."""
        a = activate(up(x) if gate is None else gate(x), self.activation)
        if gate is not None and self.by_product:
            return keep_above(a * up(x), self.level)
        a = keep_above(a, self.level)
        return a if gate is None else a * up(x)

    def _describe(self, width: int, neurons: int, *, gated: bool) -> str:
        kind = "gated" if gated else "plain"
        tau = f"tau={self.tau:.3g}" if self.taus is None else "a tau each"
        of = " of the product" if self.by_product else ""
        return f"{width}, neurons={neurons}, {kind}, activation={self.activation}, {tau}{of}, path={self.path}"


class SparseMLP(_SparseBlock):
    """An MLP block on the sparse kernels; inference only, one op call per forward.

    Rows are neurons. Up and down projections lie side by side in one [F, 2, W] buffer when the block is gated, so that
    a neuron is one contiguous read. W is the model width, plus the ranks of unmerged adapters: gate and up rows carry
    their LoRA `scaling * B` as further columns against `x A^T`, down rows carry `A^T`, so the low-rank terms ride on
    the same active list.

    Shapes: x [..., D] -> [..., D].
    """

    def __init__(
        self, w_gate: Tensor | None, w_up: Tensor, w_down: Tensor, b_up: Tensor | None = None,
        b_down: Tensor | None = None, *, activation: str, tau: Level | None = None, path: str = "auto",
        by_product: bool = False,
        lora_gate: LowRank | None = None, lora_up: LowRank | None = None, lora_down: LowRank | None = None,
    ) -> None:  # fmt: skip
        super().__init__(activation, tau, path, by_product and w_gate is not None)
        neurons, width = w_up.shape
        rank_in = sum(low.a.shape[0] for low in (lora_gate, lora_up) if low is not None)
        self.rank_down = 0 if lora_down is None else lora_down.a.shape[0]
        padded = width + max(rank_in, self.rank_down)

        def widen(w: Tensor, low: LowRank | None, start: int) -> Tensor:
            wide = w.new_zeros((neurons, padded))
            wide[:, :width] = w
            if low is not None:
                wide[:, width + start : width + start + low.a.shape[0]] = (low.scaling * low.b).to(w.dtype)
            return wide

        with torch.no_grad():
            start_up = 0 if lora_gate is None else lora_gate.a.shape[0]
            up = widen(w_up, lora_up, start_up)
            down = widen(w_down.t(), None, 0)
            if lora_down is not None:
                down[:, width : width + self.rank_down] = lora_down.a.t().to(down.dtype)
            factors = [low.a.to(w_up.dtype) for low in (lora_gate, lora_up) if low is not None]
            self.w_gate = None if w_gate is None else frozen(widen(w_gate, lora_gate, 0))
            self.rows = frozen(torch.stack((up, down), dim=1))
            self.b_up = None if b_up is None else frozen(b_up.clone())
            self.b_down = None if b_down is None else frozen(torch.cat((b_down, b_down.new_zeros(padded - width))))
            self.lora_a = frozen(torch.cat(factors)) if factors else None
            self.lora_b = None if lora_down is None else frozen((lora_down.scaling * lora_down.b).to(w_up.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """The block, its inactive neurons' rows not read; the formula is `deftcore.ops.sparse_gated_mlp`'s or
        `deftcore.ops.sparse_mlp`'s, with the LoRA terms.

        Args:
            x: [..., D] in the weights' dtype.

        Returns:
            [..., D] in x's dtype.

        Raises:
            RuntimeError: by PyTorch, for another width or dtype.
        """
        width, padded = x.shape[-1], self.rows.shape[2]
        flat = x.reshape(-1, width)
        if padded != width:
            low = flat.new_zeros((flat.shape[0], padded - width))
            if self.lora_a is not None:
                low[:, : self.lora_a.shape[0]] = product(flat, self.lora_a.t())
            flat = torch.cat((flat, low), dim=1)
        up, down = self.rows[:, 0], self.rows[:, 1]
        if self.by_product or self.taus is not None:
            gate = None if self.w_gate is None else partial(F.linear, weight=self.w_gate)
            h = self._active(flat, gate, partial(F.linear, weight=up, bias=self.b_up))
            y = sparse_down(h, down, self.b_down, path=self.path)
        else:
            y = sparse_mlp_op(
                flat, self.w_gate, up, down, self.b_up, self.b_down, ACTIVATIONS[self.activation], self.tau,
                PATHS[self.path],
            )  # fmt: skip
        if padded != width:
            y, low = y[:, :width], y[:, width : width + self.rank_down]
            if self.lora_b is not None:
                y = plus_product(y, low, self.lora_b.t())
        return y.reshape(x.shape)

    def extra_repr(self) -> str:
        neurons, _, width = self.rows.shape
        return self._describe(width, neurons, gated=self.w_gate is not None)


class SparseMLP4bit(_SparseBlock):
    """An MLP block over 4-bit weights on the sparse kernels; inference only, one op call per forward.

    Gate and up keep their bytes. The down projection is turned neuron-major, exactly, when its rows are whole blocks;
    its scales become float32 then. Unmerged LoRA factors stay apart.

    Shapes: x [..., D] -> [..., D].
    """

    def __init__(
        self, gate: QuantizedTensor | None, up: QuantizedTensor, down: QuantizedTensor, b_up: Tensor | None = None,
        b_down: Tensor | None = None, *, activation: str, tau: Level | None = None, path: str = "auto",
        by_product: bool = False,
        lora_gate: LowRank | None = None, lora_up: LowRank | None = None, lora_down: LowRank | None = None,
    ) -> None:  # fmt: skip
        super().__init__(activation, tau, path, by_product and gate is not None)
        self.gate = None if gate is None else PackedModule(gate)
        self.up, self.down = PackedModule(up), PackedModule(down.t())
        self.b_up = None if b_up is None else frozen(b_up.clone())
        self.b_down = None if b_down is None else frozen(b_down.clone())
        factors = {
            **_factors("gate_a", "gate_b", lora_gate),
            **_factors("up_a", "up_b", lora_up),
            **_factors("down_a_t", "down_b", lora_down),
        }
        if lora_down is not None:
            factors["down_a_t"] = factors["down_a_t"].t()
        self.lora = nn.ParameterDict({name: frozen(value) for name, value in factors.items()})

    def forward(self, x: Tensor) -> Tensor:
        """The block, its inactive neurons' packed rows not read; as `SparseMLP.forward`.

        Args:
            x: [..., D], float32, bfloat16 or float16.

        Returns:
            [..., D] in x's dtype.

        Raises:
            RuntimeError: by PyTorch, for another width.
        """
        weights = [m.quantized for m in (self.gate, self.up, self.down) if m is not None]
        low = LowRank4(**{name: value.to(x.dtype) for name, value in self.lora.items()}) if self.lora else NO_LOW_RANK
        b_up, b_down = (None if b is None else b.to(x.dtype) for b in (self.b_up, self.b_down))
        flat = x.reshape(-1, x.shape[-1])
        if self.by_product or self.taus is not None:
            gate = None if self.gate is None else partial(_product4, self.gate.quantized, low.gate_a, low.gate_b, None)
            h = self._active(flat, gate, partial(_product4, self.up.quantized, low.up_a, low.up_b, b_up))
            of_down = LowRank4(down_a_t=low.down_a_t, down_b=low.down_b)
            y = mlp_4bit(h, weights[-1:], None, b_down, IDENTITY, 0.0, PATHS[self.path], of_down)
        else:
            y = mlp_4bit(flat, weights, b_up, b_down, ACTIVATIONS[self.activation], self.tau, PATHS[self.path], low)
        return y.reshape(x.shape)

    def extra_repr(self) -> str:
        neurons, width = self.up.quantized.shape
        return self._describe(width, neurons, gated=self.gate is not None)


def _product4(w: QuantizedTensor, a: Tensor | None, b: Tensor | None, bias: Tensor | None, x: Tensor) -> Tensor:
    return linear_4bit(x, w, bias) if a is None or b is None else lora_linear(x, w, a, b, bias=bias)


def _factors(a: str, b: str, low: LowRank | None) -> dict[str, Tensor]:
    return {} if low is None else {a: low.a.detach(), b: low.scaling * low.b.detach()}


class SkippedMLP(nn.Module):
    """A block left out by its adaptive gate: the residual stream gets exactly zero."""

    def forward(self, x: Tensor) -> Tensor:
        """Zeros of x's shape [..., D] and dtype."""
        return torch.zeros_like(x)


def frozen(x: Tensor) -> nn.Parameter:
    """x as a parameter that is not trained, in one piece."""
    return nn.Parameter(x.contiguous(), requires_grad=False)
