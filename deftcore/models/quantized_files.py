"""4-bit models from safetensors files, one tensor at a time."""

import os
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from deftcore.models.folders import StoredWeights, is_4bit, local_folder, model_kind
from deftcore.models.gguf_files import gguf_config, is_gguf, load_gguf
from deftcore.nn.linear import Linear4bit, out_by_in
from deftcore.nn.quantization import is_named, linears_to_quantize, quantize, set_quantization_config
from deftcore.ops.quant4 import quantize_4bit
from deftcore.ops.quantized import QuantizedTensor


def load_quantized(
    path: str | os.PathLike,
    *,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    skip: Collection[str] = ("lm_head",),
    compute_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    missing_ok: Collection[str] = (),
) -> PreTrainedModel:
    """A language model straight into 4 bits: one tensor after another from its safetensors files, each quantised as it
    comes, so that the dense model is never in memory. A checkpoint that is 4-bit already (ours, or Transformers' with
    bitsandbytes) keeps its bytes, and the options of quantisation are its own.

    Args:
        path: a local Transformers folder or a hub id, with safetensors files; or a GGUF file, whose weights are dense
            in memory first.
        quant_type, block_size, double_quant, skip, compute_dtype: as in `deftcore.quantize`.
        dtype: of the weights that stay dense, and before quantising; None is the checkpoint's.
        missing_ok: beginnings of names whose weights may be missing; they stay on the meta device.

    Returns:
        The model on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError, ValueError: naming the folder, file or weights that are missing, unexpected or damaged.
    """
    from accelerate.utils import set_module_tensor_to_device

    from deftcore._progress import tracked

    options: dict[str, Any] = {"quant_type": quant_type, "block_size": block_size, "double_quant": double_quant}
    if is_gguf(path):
        model = load_gguf(path, model_kind(gguf_config(path)), **({} if dtype is None else {"dtype": dtype}))
        return quantize(model, skip=skip, compute_dtype=compute_dtype, **options).eval()
    folder = local_folder(path)
    weights = StoredWeights(folder)
    config = AutoConfig.from_pretrained(folder)
    stored: Any = getattr(config, "quantization_config", None)
    if stored is not None:
        if not is_4bit(config):
            raise ValueError(f"path: {folder} is quantised in another way: {stored}")
        stored = stored if isinstance(stored, dict) else stored.to_dict()
        del config.quantization_config
        skip = stored.get("llm_int8_skip_modules") or ("lm_head",)
    dtype = dtype or getattr(config, "dtype", None) or weights.dtype()
    with init_empty_weights(include_buffers=False):
        model = model_kind(config).from_config(config, dtype=dtype)
    model.tie_weights()
    weights.name_as(model)
    packed = {f"{name}.weight": name for name in linears_to_quantize(model, skip)}
    parts = {key: [name for name in weights.names() if name.startswith(f"{key}.")] for key in packed}
    absent = _check_names(f"path: {folder}", model, weights, parts, tuple(missing_ok))
    wide = _kept_wide(model, dtype)
    keys = sorted(model.state_dict().keys() - absent)
    for key in tracked(keys, "loading into 4 bits"):
        try:
            if key not in packed:
                value = weights.read(key)
                if value.is_floating_point():
                    value = value.to(torch.float32 if is_named(key, wide) else dtype)
                set_module_tensor_to_device(model, key, "cpu", value)
                continue
            linear = model.get_submodule(packed[key])
            if parts[key]:
                q = QuantizedTensor.from_state_dict({name: weights.read(name) for name in (key, *parts[key])}, key)
            else:
                q = quantize_4bit(out_by_in(linear, weights.mapped(key)).to(dtype), **options)
        except ValueError as error:
            raise ValueError(f"{packed.get(key, key)}: {error}") from error
        expected = out_by_in(linear, linear.weight).shape  # on the meta device
        if q.shape != expected:
            raise ValueError(f"{key}: shape must be {tuple(expected)}, got {tuple(q.shape)}")
        layer = Linear4bit(q, compute_dtype=compute_dtype, source_cls=type(linear))
        layer.bias = linear.bias  # on the meta device until its own turn
        model.set_submodule(packed[key], layer)
    model.tie_weights(missing_keys=absent, recompute_mapping=False)  # what is stored apart stays apart
    if stored is None:
        set_quantization_config(model, skip, compute_dtype=compute_dtype, **options)
    else:
        model.config.quantization_config = stored
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def _check_names(
    where: str, model: Any, weights: StoredWeights, parts: Mapping[str, list[str]], missing_ok: tuple[str, ...]
) -> set[str]:
    """The model's tensors that are not stored, all of which may be absent.

    Args:
        parts: what is stored beside each packed weight.

    Raises:
        ValueError: naming tensors that are missing, or stored and unknown.
    """
    expected, names = model.state_dict().keys(), weights.names()
    absent = expected - names
    missing = sorted(
        key for key in absent if not (key.startswith(missing_ok) or _is_tied(model, key, names) or _is_made(model, key))
    )
    known = expected | {name for beside in parts.values() for name in beside}
    unexpected = sorted(name for name in names - known if not _is_left_over(model, name))
    if missing or unexpected:
        raise ValueError(f"{where} is of another model: missing {missing[:5]}, unexpected {unexpected[:5]}")
    return absent


def _kept_wide(model: Any, dtype: torch.dtype) -> list[str]:
    """Modules that Transformers keeps in float32 in a model of this dtype."""
    names = list(getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else []
    strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    return [*names, *strict] if dtype in (torch.float16, torch.bfloat16) else []


def _is_left_over(model: Any, key: str) -> bool:
    """Whether Transformers passes over a stored name that the model lacks: an older version's buffers, or heads that
    the model's class names."""
    patterns = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    buffers = dict(model.named_buffers())
    for last in ("rotary_emb.inv_freq", "position_ids"):  # were stored, in each layer, and are computed now
        if any(name.endswith(last) for name in buffers):
            patterns.append(rf"(^|\.){re.escape(last)}$")
    return key in buffers or any(re.search(pattern, key) for pattern in patterns)


def _is_made(model: Any, key: str) -> bool:
    """Whether Transformers lets a buffer be missing: it stands in the model as made."""
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    return key in dict(model.named_buffers()) and any(re.search(pattern, key) for pattern in patterns)


def _is_tied(model: nn.Module, key: str, stored: Collection[str]) -> bool:
    """Whether the parameter is another one's, which is stored."""
    wanted = model.get_parameter(key) if key in dict(model.named_parameters(remove_duplicate=False)) else None
    return wanted is not None and any(
        other is wanted and name in stored for name, other in model.named_parameters(remove_duplicate=False)
    )
