"""4-bit models from safetensors files, one tensor at a time."""

import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from deftcore.models.families import family_of
from deftcore.nn.linear import Linear4bit, out_by_in
from deftcore.nn.quantization import is_named, linears_to_quantize, set_quantization_config
from deftcore.ops.quant4 import quantize_4bit
from deftcore.ops.quantized import QuantizedTensor


def is_4bit(config: Any) -> bool:
    """Whether a model's configuration says that its files are bitsandbytes' 4-bit ones."""
    stored = getattr(config, "quantization_config", None) or {}
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    return bool(stored.get("load_in_4bit")) and stored.get("quant_method") == "bitsandbytes"


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
        path: a local Transformers folder or a hub id, with safetensors files.
        quant_type, block_size, double_quant, skip, compute_dtype: as in `deftcore.quantize`.
        dtype: of the weights that stay dense, and before quantising; None is the checkpoint's.
        missing_ok: beginnings of names whose weights may be missing; they stay on the meta device.

    Returns:
        The model on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError, ValueError: naming the folder, file or weights that are missing, unexpected or damaged.
    """
    from accelerate.utils import set_module_tensor_to_device
    from rich.console import Console
    from rich.progress import track

    folder = _snapshot(path)
    files = _weight_files(folder)
    config = AutoConfig.from_pretrained(folder)
    stored: Any = getattr(config, "quantization_config", None)
    if stored is not None:
        if not is_4bit(config):
            raise ValueError(f"path: {folder} is quantised in another way: {stored}")
        stored = stored if isinstance(stored, dict) else stored.to_dict()
        del config.quantization_config
        skip = stored.get("llm_int8_skip_modules") or ("lm_head",)
    dtype = dtype or getattr(config, "dtype", None) or _stored_dtype(files)
    with init_empty_weights(include_buffers=False):
        model = model_kind(config).from_config(config, dtype=dtype)
    model.tie_weights()
    expected = set(model.state_dict())
    files = _as_in(model, files, expected)
    packed = {f"{name}.weight" for name in linears_to_quantize(model, skip)}
    grouped = {key: [k for k in files if k.startswith(f"{key}.")] for key in packed}
    allowed = tuple(missing_ok)
    missing = sorted(
        k
        for k in expected - files.keys()
        if not (k.startswith(allowed) or _is_tied(model, k, files) or _is_made(model, k))
    )
    known = expected | {k for keys in grouped.values() for k in keys}
    unexpected = sorted(k for k in files.keys() - known if not _is_left_over(model, k))
    if missing or unexpected:
        raise ValueError(f"path: {folder} is of another model: missing {missing[:5]}, unexpected {unexpected[:5]}")

    def read(name: str) -> Tensor:
        # The file is only mapped: a model that kept the mapping would crash once the file is written again.
        return mapped(name).clone()

    def mapped(name: str) -> Tensor:
        file, stored_name = files[name]
        return file.get_tensor(stored_name)

    options: dict[str, Any] = {"quant_type": quant_type, "block_size": block_size, "double_quant": double_quant}
    keys = sorted(expected & files.keys())
    for key in track(keys, "loading into 4 bits", console=Console(stderr=True), transient=True):
        if key not in packed:
            value = read(key)
            kept = torch.float32 if is_named(key, _kept_wide(model, dtype)) else dtype
            try:
                set_module_tensor_to_device(model, key, "cpu", value.to(kept) if value.is_floating_point() else value)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from error
            continue
        name = key.removesuffix(".weight")
        holder, _, attribute = name.rpartition(".")
        linear = model.get_submodule(name)
        try:
            if grouped[key]:
                q = QuantizedTensor.from_state_dict({k: read(k) for k in (key, *grouped[key])}, key)
            else:
                q = quantize_4bit(out_by_in(linear, mapped(key)).to(dtype), **options)  # straight from the mapped file
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        expected_shape = out_by_in(linear, linear.weight).shape  # on the meta device
        if q.shape != expected_shape:
            raise ValueError(f"{key}: shape must be {tuple(expected_shape)}, got {tuple(q.shape)}")
        layer = Linear4bit(q, compute_dtype=compute_dtype, source_cls=type(linear))
        layer.bias = linear.bias  # on the meta device until its own turn
        setattr(model.get_submodule(holder), attribute, layer)
    model.tie_weights(missing_keys=expected - files.keys(), recompute_mapping=False)  # what is stored apart stays apart
    if stored is None:
        set_quantization_config(model, skip, compute_dtype=compute_dtype, **options)
    else:
        model.config.quantization_config = stored
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def _snapshot(path: str | os.PathLike) -> Path:
    path = checked_folder(path)
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors"]))


def _weight_files(folder: Path) -> dict[str, tuple[Any, str]]:
    """The open safetensors file of each weight, and the name that it has there."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"path: {index} is damaged: {error}") from error
    found = {}
    for name in names:
        if not (folder / name).exists():
            raise FileNotFoundError(f"path: no such file: {folder / name}")
        try:
            file = safe_open(folder / name, "pt")
        except SafetensorError as error:
            raise ValueError(f"path: {folder / name} is damaged: {error}") from error
        found.update({key: (file, key) for key in file.keys()})  # noqa: SIM118  a handle, not a dictionary
    return found


def _as_in(model: Any, files: dict[str, tuple[Any, str]], expected: set[str]) -> dict[str, tuple[Any, str]]:
    """The files' weights under the model's names: a checkpoint of the bare model lacks the prefix."""
    family = family_of(model)
    for here, stored in family.stored_as if family else ():
        files = {here + key.removeprefix(stored) if key.startswith(stored) else key: at for key, at in files.items()}
    prefix = f"{model.base_model_prefix}."
    bare = any(key.startswith(prefix) for key in expected) and not any(key.startswith(prefix) for key in files)
    return {f"{prefix}{key}" if bare and key not in expected else key: value for key, value in files.items()}


def _stored_dtype(files: dict[str, tuple[Any, str]]) -> torch.dtype:
    """The type of the first floating weight; Transformers takes it where the configuration is silent."""
    types = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    stored = (file.get_slice(name).get_dtype() for file, name in files.values())
    return next((types[kind] for kind in stored if kind in types), torch.float32)


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


def _is_tied(model: nn.Module, key: str, files: dict[str, Any]) -> bool:
    """Whether the parameter is another one's, which the files hold."""
    wanted = model.get_parameter(key) if key in dict(model.named_parameters(remove_duplicate=False)) else None
    return wanted is not None and any(
        other is wanted and name in files for name, other in model.named_parameters(remove_duplicate=False)
    )


def checked_folder(path: str | os.PathLike) -> str:
    """The path of a Transformers folder, or the hub id of a model that the cache or the hub has.

    Raises:
        FileNotFoundError: naming the path.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    path = os.fspath(path)
    if Path(path).is_dir():
        if not (Path(path) / CONFIG_NAME).is_file():
            raise FileNotFoundError(f"model: {path} is no Transformers folder, it has no {CONFIG_NAME}")
        return path
    if Path(path).exists():
        raise FileNotFoundError(f"model: must be a folder, {path} is a file")
    if path.count("/") > 1 or path.startswith((".", "/", "~")) or path.endswith("/"):
        raise FileNotFoundError(f"model: no such folder: {path}")
    try:
        if not isinstance(try_to_load_from_cache(path, CONFIG_NAME), str):
            HfApi().model_info(path, timeout=10)  # one request; a download would try for half a minute
    except Exception as error:  # no such id, no possible id, or whatever the client raises where there is no network
        raise FileNotFoundError(
            f"model: no such folder: {path}; nor has the Hugging Face cache or hub, if within reach, such a model"
        ) from error
    return path


def model_kind(config: Any) -> Any:
    """The class of Transformers that builds a language model of this configuration."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
