"""`quantize` puts 4-bit layers into a model (QLoRA, Dettmers et al., arXiv 2305.14314)."""

import difflib
import logging
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from deftcore.nn.linear import Linear4bit, is_transposed
from deftcore.nn.linear16 import LINEARS
from deftcore.ops.checks import FLOAT_DTYPES, check_choice
from deftcore.ops.quantized import QUANT_TYPES, check_block_size

logger = logging.getLogger("deftcore")


def quantize(
    model: Any,
    *,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    skip: Collection[str] = ("lm_head",),
    compute_dtype: torch.dtype | None = None,
) -> Any:
    """Replaces the linear layers (GPT-2's Conv1D among them) of a model in memory by `Linear4bit`, one at a time, in
    place.

    For QLoRA: `quantize`, then `peft.get_peft_model`, then `deftcore.patch`. To load a checkpoint straight into 4 bits,
    without the dense model ever in memory, use `deftcore.load_quantized`.

    Args:
        model: any module; a Transformers model also gets a `config.quantization_config`, so that what it saves loads
            in Transformers with bitsandbytes.
        quant_type, block_size, double_quant: as in `deftcore.ops.quantize_4bit`.
        skip: layers to leave dense, by full name or by its last parts. Weights shared with another module (tied heads)
            always stay.
        compute_dtype: of float16 inputs; see `Linear4bit`.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: naming the argument, or the layer whose weight cannot be quantised; for a PEFT model, or
            one without a linear layer to replace. The model is as it was then.
    """
    if hasattr(model, "peft_config"):
        raise ValueError("model: quantise the base model first, then call get_peft_model")
    options: dict[str, Any] = {"quant_type": quant_type, "block_size": block_size, "double_quant": double_quant}
    names = linears_to_quantize(model, skip)
    check_choice("quant_type", quant_type, QUANT_TYPES)
    check_block_size(block_size)
    for name in names:  # all, before the first is replaced
        _check_weight(name, model.get_submodule(name).weight)
    for name in names:
        parent, _, attribute = name.rpartition(".")
        holder = model.get_submodule(parent)
        try:
            packed = Linear4bit.from_linear(getattr(holder, attribute), compute_dtype=compute_dtype, **options)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        setattr(holder, attribute, packed)
    set_quantization_config(model, skip, compute_dtype=compute_dtype, **options)
    logger.info("quantize: %d linear layers in %s", len(names), quant_type)
    return model


def _check_weight(name: str, weight: Tensor) -> None:
    if weight.dtype not in FLOAT_DTYPES[:3]:
        raise TypeError(f"{name}: weight must be float32, bfloat16 or float16, got {weight.dtype}")
    if not weight.is_meta and not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{name}: weight has values that are not finite; 4-bit blocks cannot hold them")


def linears_to_quantize(model: nn.Module, skip: Collection[str]) -> list[str]:
    """Names of the linear layers that `quantize` replaces; Transformers wants some (T5's wo) in float32.

    Raises:
        ValueError: when there is none, or a name in `skip` (other than lm_head) matches nothing.
    """
    found = [name for name, module in model.named_modules() if type(module) in LINEARS or is_transposed(module)]
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for wanted in skip:
        if wanted != "lm_head" and not any(is_named(name, [wanted]) for name, _ in model.named_modules()):
            everything = {n for name, _ in model.named_modules() for n in (name, name.rpartition(".")[2])}
            near = difflib.get_close_matches(wanted, everything, 3)
            raise ValueError(f"skip: no module named {wanted!r}" + (f"; near: {', '.join(near)}" if near else ""))
    kept = (*skip, *(getattr(model, "_keep_in_fp32_modules", None) or ()))
    chosen = [
        name
        for name in found
        if not is_named(name, kept) and owners[id(model.get_submodule(name).weight)] == 1  # not tied
    ]
    if not chosen:
        raise ValueError(f"model: {type(model).__name__} has no linear layer (nn.Linear, Conv1D) to quantise")
    return chosen


def is_named(name: str, wanted: Collection[str]) -> bool:
    """Whether a module, or one that holds it, has one of these names: whole, or its last parts."""
    return any(f".{part}." in f".{name}." for part in wanted)


def set_quantization_config(
    model: Any,
    skip: Collection[str],
    *,
    quant_type: str,
    block_size: int,
    double_quant: bool,
    compute_dtype: torch.dtype | None,
) -> None:
    """Writes what Transformers reads to load the model's files with bitsandbytes; block sizes stand in the files."""
    if not hasattr(model, "config"):
        return
    storage = next(m.weight.dtype for m in model.modules() if isinstance(m, Linear4bit))
    model.config.quantization_config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": str(compute_dtype or torch.float32)[6:],
        "bnb_4bit_quant_storage": str(storage)[6:],
        "llm_int8_skip_modules": sorted(skip) or None,
    }
