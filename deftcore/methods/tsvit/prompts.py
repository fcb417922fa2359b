"""Prompts of TSViT: learned rows, or keys and values, that attention reads beside a sequence's own and that put out
nothing (Zahweh et al., arXiv 2310.01825)."""

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn

from deftcore.methods.tsvit.encoder import Attention, Prompt
from deftcore.methods.tsvit.model import TSViT
from deftcore.methods.tsvit.tuner import TSViTTuner
from deftcore.ops.checks import check_count
from deftcore.training.adapters import MethodName
from deftcore.training.fields import option
from deftcore.training.tuners import NeverMerged, WrapperLayer

_CHOICES = {"place": ("outside", "inside"), "depth": ("deep", "shallow")}


@dataclass
class TSViTPromptConfig(PeftConfig):
    """Config of prompts in TSViT's attention.

    Raises ValueError, naming the field, on a value out of range.
    """

    temporal: int = option(2, "Prompts a layer over dates; 0 is none.")
    spatial: int = option(2, "Prompts a layer over patches; 0 is none.")
    place: str = option("outside", "outside: rows, before qkv; inside: a key and a value of each head, behind it.")
    depth: str = option("deep", "deep: every layer has its own; shallow: the first alone.")
    modules_to_save: list[str] | None = option(None, "Modules trained and saved whole.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MethodName("TSVIT_PROMPT")
        self.target_modules = None  # which PEFT reads; the attention is found by what it is
        for name in ("temporal", "spatial"):
            check_count(name, getattr(self, name), minimum=0)
        if not self.temporal and not self.spatial:
            raise ValueError("temporal: must be at least 1 where spatial is 0, got 0")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: must be one of {', '.join(choices)}, got {getattr(self, name)!r}")


class PromptLayer(WrapperLayer, NeverMerged):
    """An attention with prompts at the end of its keys and values; several active adapters' stand there together.

    Outside, an adapter is rows [m, d], which pass qkv and not the norm; inside, keys and values [heads, m, d_h]. All
    start standard normal: prompts change the model from the start.
    """

    no_merge = "prompts are no weights and cannot be merged into them"
    shown_as = "tsvit_prompt"
    adapter_layer_names = ("tsvit_prompt_rows", "tsvit_prompt_keys", "tsvit_prompt_values")

    def __init__(self, base_layer: Attention, adapter_name: str, config: TSViTPromptConfig, prompts: int) -> None:
        super().__init__(base_layer)
        self.tsvit_prompt_rows = nn.ParameterDict()
        self.tsvit_prompt_keys = nn.ParameterDict()
        self.tsvit_prompt_values = nn.ParameterDict()
        self.update_layer(adapter_name, config, prompts)

    def update_layer(self, adapter_name: str, config: TSViTPromptConfig, prompts: int) -> None:
        """Adds an adapter of `prompts` prompts, m."""
        base = self.base_layer
        like = {"device": base.norm.weight.device, "dtype": base.norm.weight.dtype}
        if config.place == "outside":
            width = base.norm.normalized_shape[0]
            self.tsvit_prompt_rows[adapter_name] = nn.Parameter(torch.randn(prompts, width, **like))
        else:
            for each in (self.tsvit_prompt_keys, self.tsvit_prompt_values):
                shape = (base.heads, prompts, base.projection.in_features // base.heads)
                each[adapter_name] = nn.Parameter(torch.randn(shape, **like))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, queries: int | None = None) -> Tensor:
        """As `Attention`'s: prompts have no output."""
        return self.base_layer(x, mask, queries=queries, prompt=self._prompt())

    def _prompt(self) -> Prompt | None:
        """Keys and values of all active adapters; None: there are none."""
        found: list[Prompt] = []
        for name in () if self.disable_adapters else self.active_adapters:
            if name in self.tsvit_prompt_rows:
                rows: Any = self.tsvit_prompt_rows[name]
                found.append(self.base_layer.keys_and_values(rows.to(self.base_layer.norm.weight.dtype)))
            elif name in self.tsvit_prompt_keys:
                found.append((self.tsvit_prompt_keys[name], self.tsvit_prompt_values[name]))
        if not found:
            return None
        keys, values = (torch.cat(each, 1) for each in zip(*found, strict=True))
        return keys, values


class TSViTPromptModel(TSViTTuner):
    """Puts `PromptLayer`s into a TSViT; made by `peft.get_peft_model`."""

    prefix: str = "tsvit_prompt_"
    tuner_layer_cls = PromptLayer

    def places(self, config: TSViTPromptConfig, model: TSViT) -> dict[str, tuple[int]]:
        """Names of the attentions, and how many prompts each gets."""
        depths = {"temporal": model.config.temporal_depth, "spatial": model.config.spatial_depth}
        return {
            f"{name}.layers.{i}.attention": (prompts,)
            for name, prompts in (("temporal", config.temporal), ("spatial", config.spatial))
            for i in range(depths[name] if config.depth == "deep" else 1)
            if prompts
        }
