"""A trained model in its sparse-inference form."""

import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from deftcore.models.block_weights import weight_of
from deftcore.models.blocks import MlpBlock, base_of, check_function, find_mlp_blocks
from deftcore.models.gates import gates_of
from deftcore.models.thresholds import Thresholds
from deftcore.models.tied import merge_and_unload, tuned_ties
from deftcore.nn.activations import activation_of
from deftcore.nn.mlp import SkippedMLP, SparseMLP, SparseMLP4bit
from deftcore.nn.thresholds import Level
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
    tau: float  # the mean, where each neuron has its own


def sparsify(
    model: Any,
    *,
    tau: float | dict[str, float] | None = None,
    thresholds: Thresholds | None = None,
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
        thresholds: of `calibrate_thresholds`, in place of tau.
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
    if thresholds is not None and tau is not None:
        raise ValueError("tau: is for a model without thresholds; give tau or thresholds, not both")
    merge = _will_merge(model, tau, path, skip, merge)
    if thresholds is not None:
        thresholds.check(model, skip)
    gates = gates_of(model)
    if gates is not None:
        gates.fold()
    if merge:
        model = merge_and_unload(model)
    # All modules are built before the first is put in, so that a refusal leaves the blocks as they were.
    planned: list[tuple[MlpBlock, nn.Module, SparseBlock]] = []
    for block in find_mlp_blocks(model):
        neurons = weight_of(block, "down")[0].shape[1]
        if block.name in skip:
            planned.append((block, SkippedMLP(), SparseBlock(block.name, "skipped", neurons, 0.0)))
            continue
        level: Level | None = tau.get(block.name) if isinstance(tau, dict) else tau
        if thresholds is not None:
            level = thresholds.levels[block.name]
        sparse = _convert(block, level, path, thresholds is not None and thresholds.criterion == "product")
        kind = "plain" if block.gate is None else "gated"
        shown = float(sparse.level.mean()) if isinstance(sparse.level, Tensor) else sparse.level
        planned.append((block, sparse, SparseBlock(block.name, kind, neurons, shown)))
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
    parts = [weight_of(block, role, merge=merge) for role in ("up", "down", "gate") if getattr(block, role) is not None]
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


def _convert(block: MlpBlock, tau: Level | None, path: str, by_product: bool) -> SparseMLP | SparseMLP4bit:
    w_up, b_up, lora_up = weight_of(block, "up")
    w_down, b_down, lora_down = weight_of(block, "down")
    w_gate = lora_gate = None
    if block.gate is not None:
        w_gate, _, lora_gate = weight_of(block, "gate")
    low = {"lora_gate": lora_gate, "lora_up": lora_up, "lora_down": lora_down}
    options: dict[str, Any] = {"activation": activation_of(block.activation.get()), "tau": tau, "path": path, **low}
    options["by_product"] = by_product
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
