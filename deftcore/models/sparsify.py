"""A trained model in its sparse-inference form."""

import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from deftcore.models.blocks import MlpBlock, base_of, check_function, find_mlp_blocks
from deftcore.models.gates import gates_of
from deftcore.models.tied import merge_and_unload, tuned_ties
from deftcore.nn.activations import activation_of
from deftcore.nn.linear import is_transposed
from deftcore.nn.linear16 import LINEARS
from deftcore.nn.mlp import LowRank, SkippedMLP, SparseMLP, SparseMLP4bit
from deftcore.ops.checks import check_number
from deftcore.ops.paths import PATHS
from deftcore.ops.quantized import QuantizedTensor

logger = logging.getLogger("deftcore")


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
    merge = _will_merge(model, tau, path, skip, merge)
    gates = gates_of(model)
    if gates is not None:
        gates.fold()
    if merge:
        model = merge_and_unload(model)
    # All modules are built before the first is put in, so that a refusal leaves the blocks as they were.
    planned: list[tuple[MlpBlock, nn.Module, SparseBlock]] = []
    for block in find_mlp_blocks(model):
        neurons = _weight(block, "down")[0].shape[1]
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


def check_sparsify(model: Any, *, skip: Collection[str] = (), merge: bool | None = None) -> bool:
    """Whether `sparsify` would merge an adapter; raises what it would raise, and changes nothing.

    Raises:
        ValueError, TypeError: as `sparsify`.
    """
    return _will_merge(model, None, "auto", skip, merge)


def _will_merge(
    model: Any, tau: float | dict[str, float] | None, path: str, skip: Collection[str], merge: bool | None
) -> bool:
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
    if not isinstance(packed, QuantizedTensor) and type(module) not in LINEARS and not is_transposed(module):
        raise ValueError(
            f"{where}: must be torch.nn.Linear, Linear4bit, Conv1D, a patched bitsandbytes layer or PEFT LoRA over "
            f"one, got {type(module).__name__}"
        )
    bias = module.bias if extra is None else (module.bias + extra).detach()  # PEFT's `lora_bias` needs a base's bias
    if isinstance(packed, QuantizedTensor):
        weight: Any = packed
    else:
        weight = module.weight.t() if is_transposed(module) else module.weight
    if not block.form.fused or role == "down":
        return weight, bias, low
    if weight is packed:
        raise ValueError(
            f"{where}: holds gate and up in 4 bits, which are not cut in two; leave it out of quantize (skip)"
        )
    half = 0 if role == "gate" else 1
    low = None if low is None else LowRank(low.a, low.b.chunk(2)[half], low.scaling)
    return weight.chunk(2)[half], None if bias is None else bias.chunk(2)[half], low
