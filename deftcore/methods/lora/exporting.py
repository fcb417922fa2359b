"""Adapters of a `PairedLora` as plain LoRA of the joined rank, which PEFT loads without deftcore."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftType, get_peft_model_state_dict
from safetensors.torch import save_file

from deftcore._files import replacing_folder
from deftcore.methods.lora.paired_model import paired_layers
from deftcore.models.checkpoints import load_model
from deftcore.nn.linear import is_transposed
from deftcore.training.adapters import load_adapter
from deftcore.training.device import choose_device
from deftcore.training.fields import AdapterFolder, Needed, NewFolder, Text, checked

_SAME = (
    "base_model_name_or_path", "bias", "exclude_modules", "layers_pattern", "layers_to_transform", "lora_dropout",
    "modules_to_save", "revision", "target_modules", "task_type",
)  # fmt: skip


@torch.no_grad()
def export_lora(model: Any, folder: str | os.PathLike, *, adapter: str = "default") -> Path:
    """Writes an adapter as plain LoRA: A' = [A; A0], B' = [B, -B0] of rank R + R0 and scaling 1, exact on the original
    weights.

    Args:
        model: the PEFT model; its adapters must not be merged.
        folder: a new folder, or an earlier one, which is replaced.
        adapter: its name.

    Returns:
        The folder, with adapter_config.json and adapter_model.safetensors as PEFT writes them.

    Raises:
        FileExistsError: the folder holds something else than an adapter.
        ValueError: no such adapter; one whose weights were truncated in place.
    """
    config, layers = model.peft_config.get(adapter), dict(paired_layers(model, adapter))
    if config is not None and config.peft_type == PeftType.LORA:
        raise ValueError(f"adapter: {adapter!r} is PEFT's own LoRA already, which loads without deftcore")
    if not layers:
        raise ValueError(f"adapter: the model has no KaSA or BA-LoRA adapter {adapter!r}")
    joined = {name: layer.original(adapter) for name, layer in layers.items()}
    ranks = {name: a.shape[0] for name, (a, _) in joined.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: each for name, each in ranks.items() if each != rank}
    plain = LoraConfig(
        r=rank, lora_alpha=rank, rank_pattern=others, alpha_pattern=dict(others), inference_mode=True,
        fan_in_fan_out=all(is_transposed(layer.get_base_layer()) for layer in layers.values()),
        **{name: getattr(config, name) for name in _SAME if getattr(config, name, None) is not None},
    )  # fmt: skip
    own = tuple(f"base_model.model.{name}.lora_" for name in layers)
    stored = get_peft_model_state_dict(model, adapter_name=adapter)
    tensors = {key: value.contiguous() for key, value in stored.items() if not key.startswith(own)}
    for name, (a, b) in joined.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
    with replacing_folder(folder, only=["adapter_config.json"]) as partial:
        save_file(
            {key: value.cpu() for key, value in tensors.items()},
            partial / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        plain.save_pretrained(str(partial))
    return Path(folder)


@checked
def export(
    model: Needed, output: NewFolder, *, adapter: AdapterFolder, quantize: dict[str, Any] | None = None,
    device: Text = "auto",
) -> dict[str, Any]:  # fmt: skip
    """`export_lora` of an adapter's folder, with the base that it was trained on, in 4 bits where `quantize` says so.

    Returns:
        output, and the rank of most layers.

    Raises:
        FileNotFoundError, ValueError: naming the argument; as `export_lora`.
    """
    if not adapter:
        raise ValueError("adapter: must be a folder with an adapter, got none")
    base: Any = load_model(model, quantize=quantize)
    export_lora(load_adapter(base.to(choose_device(device)), adapter), output)
    return {"output": output, "rank": LoraConfig.from_pretrained(output).r}
