"""LoRA on the buffers of Mamba's blocks (arXiv 2406.00209): x_proj, whose output holds dt, B and C, and in_proj.

One pair of factors over a fused projection ties its slices: all of them see the same r features of the input. `split`
gives each slice a pair of its own. Both train every projection, `out_proj` and `dt_proj` too, which PEFT refuses or
Transformers bypasses: run `deftcore.patch(model)` on the PEFT model.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, LoraModel
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

BUFFERS = {"mamba": ("x_proj", "in_proj"), "falcon_mamba": ("x_proj", "in_proj"), "mamba2": ("in_proj",)}


@dataclass
class MambaLoraConfig(LoraConfig):
    """LoRA for Transformers' Mamba, FalconMamba and Mamba-2 models; the fields are `peft.LoraConfig`'s.

    Args:
        target_modules: None is the buffers: x_proj and in_proj, on Mamba-2 in_proj.
        split: one pair of rank r for each slice of x_proj (dt, B, C) and in_proj (x, z; on Mamba-2 z, x, B, C, dt)
            instead of one tied pair. The factors are stored as one pair of rank r * slices whose `lora_B` is
            block-diagonal, so that the checkpoint is LoRA's; alpha grows with the rank, which keeps the scaling.
    """

    split: bool = field(default=False, metadata={"help": "one pair of factors per slice of a fused projection"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "MAMBA_LORA"
        if self.use_dora:
            raise ValueError("use_dora: the fused Mamba blocks take plain LoRA")


def slices_of(mixer: Any, name: str) -> tuple[int, ...]:
    """Rows of the slices of a mixer's projection `name`, in order; one where it is no fused projection."""
    width = mixer.intermediate_size
    if hasattr(mixer, "num_heads"):
        states = mixer.n_groups * mixer.ssm_state_size
        return (width, width, states, states, mixer.num_heads) if name == "in_proj" else (0,)
    if name == "x_proj":
        return (mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size)
    return (width, width) if name == "in_proj" else (0,)


class SplitLoraLinear(LoraLinear):
    """PEFT's LoRA layer whose `lora_B` counts on its diagonal blocks only: slice i's rows see its own r features."""

    slices: tuple[int, ...]

    def blocks(self, name: str) -> list[tuple[int, int, int, int]]:
        """Row range and feature range of each slice."""
        rank, found, row = self.r[name] // len(self.slices), [], 0
        for i, size in enumerate(self.slices):
            found.append((row, row + size, i * rank, (i + 1) * rank))
            row += size
        return found

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:
            given = ", ".join([*(type(a).__name__ for a in args), *kwargs])
            raise TypeError(f"split: the layer takes x alone, no mixed batches of adapters; got {given} as well")
        y = self.base_layer(x)
        if self.disable_adapters or self.merged:
            return y
        for name in self.active_adapters:
            if name in self.lora_A:
                a: Any = self.lora_A[name].weight
                b: Any = self.lora_B[name].weight
                low = F.linear(self.lora_dropout[name](x.to(a.dtype)), a) * self.scaling[name]
                parts = [F.linear(low[..., i:j], b[start:stop, i:j]) for start, stop, i, j in self.blocks(name)]
                y = y + torch.cat(parts, dim=-1).to(y.dtype)
        return y


class MambaLoraModel(LoraModel):
    """PEFT's LoraModel under another type, with slices where `split` asks for them."""

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        kind = model_config.get("model_type")
        if kind not in BUFFERS:
            raise ValueError(f"model: MambaLoraConfig is for {', '.join(BUFFERS)} models, got {kind!r}")
        if peft_config.target_modules is None:
            peft_config.target_modules = set(BUFFERS[kind])
        return peft_config

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        if target_name == "conv1d":
            raise ValueError("target_modules: conv1d is a depthwise convolution, LoRA cannot be merged into it")

    def _create_and_replace(  # type: ignore[override]
        self, lora_config: Any, adapter_name: str, target: Any, target_name: str, parent: Any, current_key: str,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        slices = slices_of(parent, target_name) if lora_config.split and hasattr(parent, "A_log") else (0,)
        if len(slices) > 1:
            lora_config.rank_pattern.setdefault(current_key, lora_config.r * len(slices))
            lora_config.alpha_pattern.setdefault(current_key, lora_config.lora_alpha * len(slices))
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key, **kwargs)
        layer: Any = getattr(parent, target_name)
        if len(slices) > 1 and type(layer) is LoraLinear:
            layer.__class__ = SplitLoraLinear
            setattr(layer, "slices", slices)  # noqa: B010
