"""Sparse-inference forms of MLP blocks, and `sparsify`, which puts them into a model."""

import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deftcore.nn.blocks import MlpBlock, activation_of, base_of, check_function, find_mlp_blocks
from deftcore.nn.gates import gates_of
from deftcore.nn.linear import PackedModule
from deftcore.nn.tied import merge_and_unload, tuned_ties
from deftcore.ops._library import check_number
from deftcore.ops.density import ACTIVATIONS, default_tau
from deftcore.ops.quantized import QuantizedTensor
from deftcore.ops.sparse_mlp import PATHS, sparse_mlp_op
from deftcore.ops.sparse_mlp4 import NO_LOW_RANK, LowRank4, mlp_4bit

logger = logging.getLogger("deftcore")


@dataclass
class LowRank:
    """An unmerged LoRA pair of one linear layer: delta = scaling * b @ a."""

    a: Tensor  # [R, K]
    b: Tensor  # [M, R]
    scaling: float


class SparseMLP(nn.Module):
    """An MLP block on the sparse kernels; inference only, one op call per forward.

    Rows are neurons. Up and down projections lie side by side in one [F, 2, W] buffer when the block is gated, so that
    a neuron is one contiguous read. W is the model width, plus the ranks of unmerged adapters: gate and up rows carry
    their LoRA `scaling * B` as further columns against `x A^T`, down rows carry `A^T`, so the low-rank terms ride on
    the same active list.

    Shapes: x [..., D] -> [..., D].
    """

    def __init__(
        self,
        w_gate: Tensor | None,
        w_up: Tensor,
        w_down: Tensor,
        b_up: Tensor | None = None,
        b_down: Tensor | None = None,
        *,
        activation: str,
        tau: float | None = None,
        path: str = "auto",
        lora_gate: LowRank | None = None,
        lora_up: LowRank | None = None,
        lora_down: LowRank | None = None,
    ) -> None:
        super().__init__()
        neurons, width = w_up.shape
        self.activation, self.path = activation, path
        self.tau = default_tau(activation) if tau is None else tau
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
            self.w_gate = None if w_gate is None else _frozen(widen(w_gate, lora_gate, 0))
            self.rows = _frozen(torch.stack((up, down), dim=1))
            self.b_up = None if b_up is None else _frozen(b_up.clone())
            self.b_down = None if b_down is None else _frozen(torch.cat((b_down, b_down.new_zeros(padded - width))))
            self.lora_a = _frozen(torch.cat(factors)) if factors else None
            self.lora_b = None if lora_down is None else _frozen((lora_down.scaling * lora_down.b).to(w_up.dtype))

    def forward(self, x: Tensor) -> Tensor:
        width, padded = x.shape[-1], self.rows.shape[2]
        flat = x.reshape(-1, width)
        if padded != width:
            low = flat.new_zeros((flat.shape[0], padded - width))
            if self.lora_a is not None:
                low[:, : self.lora_a.shape[0]] = flat @ self.lora_a.t()
            flat = torch.cat((flat, low), dim=1)
        y = sparse_mlp_op(
            flat, self.w_gate, self.rows[:, 0], self.rows[:, 1], self.b_up, self.b_down,
            ACTIVATIONS[self.activation], self.tau, PATHS[self.path],
        )  # fmt: skip
        if padded != width:
            y, low = y[:, :width], y[:, width : width + self.rank_down]
            if self.lora_b is not None:
                y = torch.addmm(y, low, self.lora_b.t())
        return y.reshape(x.shape)

    def extra_repr(self) -> str:
        neurons, _, width = self.rows.shape
        kind = "plain" if self.w_gate is None else "gated"
        return f"{width}, neurons={neurons}, {kind}, activation={self.activation}, tau={self.tau:.3g}, path={self.path}"


class SparseMLP4bit(nn.Module):
    """An MLP block over 4-bit weights on the sparse kernels; inference only, one op call per forward.

    Gate and up keep their bytes. The down projection is turned neuron-major, exactly, when its rows are whole blocks;
    its scales become float32 then. Unmerged LoRA factors stay apart.

    Shapes: x [..., D] -> [..., D].
    """

    def __init__(
        self,
        gate: QuantizedTensor | None,
        up: QuantizedTensor,
        down: QuantizedTensor,
        b_up: Tensor | None = None,
        b_down: Tensor | None = None,
        *,
        activation: str,
        tau: float | None = None,
        path: str = "auto",
        lora_gate: LowRank | None = None,
        lora_up: LowRank | None = None,
        lora_down: LowRank | None = None,
    ) -> None:
        super().__init__()
        self.activation, self.path = activation, path
        self.tau = default_tau(activation) if tau is None else tau
        self.gate = None if gate is None else PackedModule(gate)
        self.up, self.down = PackedModule(up), PackedModule(down.t())
        self.b_up = None if b_up is None else _frozen(b_up.clone())
        self.b_down = None if b_down is None else _frozen(b_down.clone())
        factors = {
            **_factors("gate_a", "gate_b", lora_gate),
            **_factors("up_a", "up_b", lora_up),
            **_factors("down_a_t", "down_b", lora_down),
        }
        if lora_down is not None:
            factors["down_a_t"] = factors["down_a_t"].t()
        self.lora = nn.ParameterDict({name: _frozen(value) for name, value in factors.items()})

    def forward(self, x: Tensor) -> Tensor:
        weights = [m.quantized for m in (self.gate, self.up, self.down) if m is not None]
        low = LowRank4(**{name: value.to(x.dtype) for name, value in self.lora.items()}) if self.lora else NO_LOW_RANK
        b_up, b_down = (None if b is None else b.to(x.dtype) for b in (self.b_up, self.b_down))
        flat = x.reshape(-1, x.shape[-1])
        y = mlp_4bit(flat, weights, b_up, b_down, ACTIVATIONS[self.activation], self.tau, PATHS[self.path], low)
        return y.reshape(x.shape)

    def extra_repr(self) -> str:
        neurons, width = self.up.quantized.shape
        kind = "plain" if self.gate is None else "gated"
        return f"{width}, neurons={neurons}, {kind}, activation={self.activation}, tau={self.tau:.3g}, path={self.path}"


def _factors(a: str, b: str, low: LowRank | None) -> dict[str, Tensor]:
    return {} if low is None else {a: low.a.detach(), b: low.scaling * low.b.detach()}


class SkippedMLP(nn.Module):
    """A block left out by its adaptive gate: the residual stream gets exactly zero."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


@dataclass(frozen=True)
class SparseBlock:
    """What `sparsify` did with one block."""

    name: str
    kind: str  # "gated", "plain" or "skipped"
    neurons: int
    tau: float


def sparsify(
    model: Any,
    *,
    tau: float | dict[str, float] | None = None,
    path: str = "auto",
    skip: Collection[str] = (),
    merge: bool | None = None,
) -> Any:
    """Replaces the MLP blocks of a trained model by `SparseMLP` or `SparseMLP4bit`, in place; for inference.

    Adaptive gates are folded into the weights first. Bottleneck adapters stay, over the sparse block.

    Args:
        model: a Transformers model of a family that `find_mlp_blocks` knows, or its PEFT model.
        tau: threshold of the active set, for all blocks or per block name; None is exact for ReLU types and
            sqrt(1e-7) for smooth activations.
        path: "auto", "sparse" or "dense".
        skip: names of blocks to leave out altogether (see `DensityLoss.skippable`); their weights are dropped.
        merge: merge the adapter into the weights first. False keeps the low-rank terms apart, exact to the unmerged
            model. None merges into dense models what can be merged, and leaves 4-bit ones apart, where merging would
            round most of the update away.

    Returns:
        The model (the base model when PEFT was merged), in eval mode, with `deftcore_blocks`: one `SparseBlock` each.
        Its files would not load again: write the dense model with `deftcore.save_sparse` instead.

    Raises:
        ValueError, TypeError: naming the argument, or the model, block or layer that is not understood. The model is as
            it was then.
    """
    merge = check_sparsify(model, tau=tau, path=path, skip=skip, merge=merge)
    gates = gates_of(model)
    if gates is not None:
        gates.fold()
    if merge:
        model = merge_and_unload(model)
    # All modules are built before the first is put in, so that a refusal leaves the blocks as they were.
    planned: list[tuple[MlpBlock, nn.Module, SparseBlock]] = []
    for block in find_mlp_blocks(model):
        neurons = _weight(block, "up")[0].shape[0]
        if block.name in skip:
            planned.append((block, SkippedMLP(), SparseBlock(block.name, "skipped", neurons, 0.0)))
            continue
        block_tau = tau.get(block.name) if isinstance(tau, dict) else tau
        sparse = _convert(block, block_tau, path)
        kind = "plain" if block.gate is None else "gated"
        planned.append((block, sparse, SparseBlock(block.name, kind, neurons, sparse.tau)))
    for block, module, _ in planned:
        if block.container is not None:
            block.container.set(module)
        else:  # the layer calls up, activation and down itself
            block.up.set(_identity_like(block.up.get()))
            block.activation.set(nn.Identity())
            block.down.set(module)
    model.eval()
    base: Any = base_of(model)
    base.deftcore_blocks = [report for _, _, report in planned]
    for holder in model.modules():
        if hasattr(holder, "save_pretrained"):
            holder.save_pretrained = _refuse_to_save
    logger.info("sparsify: %d blocks, %d skipped", len(planned), len(skip))
    return model


def check_sparsify(
    model: Any,
    *,
    tau: float | dict[str, float] | None = None,
    path: str = "auto",
    skip: Collection[str] = (),
    merge: bool | None = None,
) -> bool:
    """Whether `sparsify` would merge an adapter; raises what it would raise, and changes nothing.

    Raises:
        ValueError, TypeError: as `sparsify`.
    """
    if path not in PATHS:
        raise ValueError(f"path: must be one of {', '.join(PATHS)}, got {path!r}")
    if hasattr(base_of(model), "deftcore_blocks"):
        raise ValueError("model: is in its sparse form already")
    for value in tau.values() if isinstance(tau, dict) else [] if tau is None else [tau]:
        check_number("tau", value, minimum=0.0)
    blocks = find_mlp_blocks(model)
    names = [block.name for block in blocks]
    for argument, given in (("skip", skip), ("tau", tau if isinstance(tau, dict) else ())):
        unknown = sorted(set(given) - set(names))
        if unknown:
            raise ValueError(f"{argument}: no MLP block named {', '.join(unknown)}; the model has {', '.join(names)}")
    linear = hasattr(model, "merge_and_unload") and not any(hasattr(m, "adds_to_block") for m in model.modules())
    if merge and hasattr(model, "merge_and_unload") and not linear:
        raise ValueError("merge: a bottleneck adapter is not linear and stays over the block; use merge=False")
    if merge is None:
        merge = not any(hasattr(module, "quantized") for module in model.modules())
    merge = merge and linear
    if merge:
        tuned_ties(model)
    gates = gates_of(model)
    if gates is not None:
        gates.check()
    for block in blocks:
        if block.name not in skip:
            _check_block(block, merge)
    return merge


def _check_block(block: MlpBlock, merge: bool) -> None:
    parts = [_weight(block, role, merge=merge) for role in ("up", "down", "gate") if getattr(block, role) is not None]
    if block.gate is not None and any(bias is not None for _, bias, _ in parts):
        raise ValueError(f"{block.name}: a gated MLP with biases has no sparse form")
    check_function(block)
    activation_of(block.activation.get())
    down = parts[1][0]
    if all(isinstance(weight, QuantizedTensor) for weight, _, _ in parts) and down.shape[1] % down.block_size:
        raise ValueError(
            f"{block.name}.{block.down.attribute}: needs a matrix whose rows are whole blocks of {down.block_size}, "
            f"got shape {tuple(down.shape)}"
        )


def _identity_like(module: nn.Module) -> nn.Module:
    """An identity that goes on showing its input to who watched the module's."""
    identity = nn.Identity()
    identity._forward_pre_hooks = module._forward_pre_hooks
    return identity


def _refuse_to_save(*_: Any, **__: Any) -> None:
    raise ValueError(
        "save_pretrained: the model is in its sparse form, whose weights Transformers and PEFT would not find again; "
        "write it with deftcore.save_sparse (or `deftcore export`) before sparsify, and read it with load_sparse"
    )


def _convert(block: MlpBlock, tau: float | None, path: str) -> SparseMLP | SparseMLP4bit:
    w_up, b_up, lora_up = _weight(block, "up")
    w_down, b_down, lora_down = _weight(block, "down")
    w_gate = lora_gate = None
    if block.gate is not None:
        w_gate, _, lora_gate = _weight(block, "gate")
    low = {"lora_gate": lora_gate, "lora_up": lora_up, "lora_down": lora_down}
    options: dict[str, Any] = {"activation": activation_of(block.activation.get()), "tau": tau, "path": path, **low}
    weights = [w_gate, w_up, w_down]
    dense = [w for w in weights if isinstance(w, Tensor)]
    if not dense:
        return SparseMLP4bit(w_gate, w_up, w_down, b_up, b_down, **options)
    if len(dense) < len([w for w in weights if w is not None]):
        logger.warning("sparsify: %s is 4-bit in part; its packed projections were decoded", block.name)
    w_gate, w_up, w_down = (
        w.dequantize(dense[0].dtype) if isinstance(w, QuantizedTensor) else w for w in weights
    )  # fmt: skip
    return SparseMLP(w_gate, w_up, w_down, b_up, b_down, **options)


def _weight(block: MlpBlock, role: str, *, merge: bool = False) -> tuple[Any, Tensor | None, LowRank | None]:
    """Weight (dense or 4-bit), bias and unmerged LoRA of one projection, or ValueError naming the layer.

    Args:
        merge: the adapter will be merged: look at the layer beneath it.
    """
    slot = getattr(block, role)
    module, low, extra = slot.get(), None, None
    where = f"{block.name}.{slot.attribute}"
    if merge:
        module = getattr(module, "base_layer", module)
    if hasattr(module, "lora_A"):  # PEFT's LoRA layer, known by its attributes: nn does not import PEFT
        active = [name for name in module.active_adapters if name in module.lora_A]
        if not module.merged and not module.disable_adapters and active:
            if len(active) > 1 or active[0] in getattr(module, "lora_variant", {}):
                raise ValueError(
                    f"{where}: only one plain LoRA adapter can stay unmerged, got {active}; use merge=True"
                )
            name = active[0]
            low = LowRank(module.lora_A[name].weight, module.lora_B[name].weight, float(module.scaling[name]))
            if module.lora_B[name].bias is not None:
                extra = low.scaling * module.lora_B[name].bias
        module = module.base_layer
    packed = getattr(module, "quantized", None)
    if not isinstance(packed, QuantizedTensor) and type(module) is not nn.Linear:
        raise ValueError(
            f"{where}: must be torch.nn.Linear, Linear4bit, a patched bitsandbytes layer or PEFT LoRA over one, "
            f"got {type(module).__name__}"
        )
    bias = module.bias if extra is None else (module.bias + extra).detach()  # PEFT's `lora_bias` needs a base's bias
    return packed if isinstance(packed, QuantizedTensor) else module.weight, bias, low


def _frozen(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x.contiguous(), requires_grad=False)
