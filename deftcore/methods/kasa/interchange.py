"""PEFT's own KaSA adapters (a variant of LoRA that truncates the weights in place), read and written."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from peft import KasaConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from deftcore._files import replacing_folder
from deftcore.methods.kasa.config import KasaFactoredConfig
from deftcore.methods.lora.paired_model import paired_layers

_SHARED = (
    "alpha_pattern", "base_model_name_or_path", "bias", "exclude_modules", "layers_pattern", "layers_to_transform",
    "lora_alpha", "lora_dropout", "modules_to_save", "r", "rank_pattern", "revision", "target_modules", "task_type",
    "use_rslora",
)  # fmt: skip


def load_peft_kasa(model: Any, folder: str | os.PathLike, *, adapter: str = "default", **options: Any) -> Any:
    """The PEFT model of a base and a KaSA adapter that PEFT wrote, in the form that leaves the weights alone.

    Args:
        model: the original base; its weights must not have been truncated, which PEFT's files cannot show.
        folder: of adapter_config.json and adapter_model.safetensors.
        adapter: what to call it.
        options: fields of `KasaFactoredConfig` that PEFT's config lacks, `base_mode` and the like; `inference_mode`.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: one that is not KaSA, is damaged, or is of another model.
    """
    files = Path(folder) / "adapter_config.json", Path(folder) / "adapter_model.safetensors"
    for needed in files:
        if not needed.exists():
            raise FileNotFoundError(f"folder: no such file: {needed}")
    try:
        stored, tensors = json.loads(files[0].read_text()), load_file(files[1])
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"folder: {folder} is damaged: {error}") from error
    penalties = stored.get("kasa_config")
    if not penalties:
        raise ValueError(f"folder: {files[0]} has no kasa_config, it is a {stored.get('peft_type')} adapter")
    fields = {name: stored[name] for name in _SHARED if stored.get(name) is not None}
    weights = {"beta": penalties["beta"], "gamma": penalties["gamma"], "reduction": "sum"}
    adapted = get_peft_model(model, KasaFactoredConfig(**{**fields, **weights, **options}), adapter_name=adapter)
    state = get_peft_model_state_dict(adapted, adapter_name=adapter)
    needed_keys = {key for key in state if "lora_minus_" not in key}
    if needed_keys != tensors.keys():
        missing, unexpected = sorted(needed_keys - tensors.keys())[:5], sorted(tensors.keys() - needed_keys)[:5]
        raise ValueError(f"folder: {files[1]} is of another model: missing {missing}, unexpected {unexpected}")
    for key, value in tensors.items():
        if state[key].shape != value.shape:
            raise ValueError(f"folder: {key} must be {tuple(state[key].shape)}, got {tuple(value.shape)}")
    with torch.no_grad():
        for key, value in tensors.items():
            state[key].copy_(value)  # shares the parameter's memory
    return adapted


def save_peft_kasa(model: Any, folder: str | os.PathLike, *, adapter: str = "default") -> Path:
    """Writes a KaSA adapter as PEFT's own: on loading PEFT truncates the original weights once more.

    Args:
        model: the PEFT model.
        folder: a new folder, or an earlier one, which is replaced.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder holds something else than an adapter.
        ValueError: no such adapter; one that PEFT's form cannot say: another number of singular values taken away
            than the rank, or a Conv1D.
    """
    layers = dict(paired_layers(model, adapter))
    if not layers:
        raise ValueError(f"adapter: the model has no KaSA adapter {adapter!r}")
    config = model.peft_config[adapter]
    for name, layer in layers.items():
        rows, columns = layer.out_features, layer.in_features
        if config.cut(layer.r[adapter], rows, columns) != layer.r[adapter]:
            raise ValueError(
                f"adapter: {name}: PEFT takes away as many singular values as the rank, {layer.r[adapter]}"
            )
        if layer.fan_in_fan_out:
            raise ValueError(f"adapter: {name}: PEFT's KaSA does not go on Conv1D")
    count = len(layers) if config.reduction == "mean" else 1  # PEFT's penalty is the sum
    fields = {name: getattr(config, name) for name in _SHARED if getattr(config, name, None) is not None}
    plain = LoraConfig(
        kasa_config=KasaConfig(beta=config.beta / count, gamma=config.gamma / count), inference_mode=True, **fields
    )
    state = get_peft_model_state_dict(model, adapter_name=adapter)
    tensors = {key: value.cpu().contiguous() for key, value in state.items() if "lora_minus_" not in key}
    with replacing_folder(folder, only=["adapter_config.json"]) as partial:
        save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        plain.save_pretrained(str(partial))
    return Path(folder)
