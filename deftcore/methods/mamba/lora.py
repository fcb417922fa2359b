"""LoRA on the buffers of Mamba's blocks (arXiv 2406.00209): x_proj, whose output holds dt, B and C, and in_proj.

One pair of factors over a fused projection ties its slices: all of them see the same r features of the input. `split`
gives each slice a pair of its own. Both train every projection, `out_proj` and `dt_proj` too, which PEFT refuses or
Transformers bypasses: run `deftcore.patch(model)` on the PEFT model.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, LoraModel
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from deftcore.methods.lora.layer import Pair
from deftcore.models.families import FAMILIES, with_part
from deftcore.nn.linear import Linear4bit
from deftcore.nn.linear16 import LINEARS
from deftcore.training.adapters import MethodName
from deftcore.training.fields import option
from deftcore.training.tuners import GathersShards

_SPLIT_INITS = (True, False, "gaussian", "orthogonal", "olora", "pissa")


@dataclass
class MambaLoraConfig(LoraConfig):
    """LoRA for Transformers' Mamba, FalconMamba and Mamba-2 models; the fields are `peft.LoraConfig`'s.

    Args:
        target_modules: None is the buffers: x_proj and in_proj, on Mamba-2 in_proj.
        split: one pair of rank r for each slice of x_proj (dt, B, C) and in_proj (x, z; on Mamba-2 z, x, B, C, dt)
            instead of one tied pair. The factors are stored as one pair of rank r * slices whose `lora_B` is
            block-diagonal, so that the checkpoint is LoRA's; alpha grows with the rank, which keeps the scaling. A key
            of `rank_pattern` that is a layer's whole name is the rank of the stored pair. Each slice is initialised
            as a layer of its own.

    Raises:
        ValueError: use_dora; with split an `init_lora_weights` that reads data or quantises.
    """

    split: bool = option(False, "one pair of factors per slice of a fused projection")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MethodName("MAMBA_LORA")
        if self.use_dora:
            raise ValueError("use_dora: the fused Mamba blocks take plain LoRA")
        init = self.init_lora_weights
        if self.split and init not in _SPLIT_INITS and not str(init).startswith("pissa_niter_"):
            known = ", ".join(map(repr, _SPLIT_INITS))
            raise ValueError(f"init_lora_weights: with split must be {known} or 'pissa_niter_<n>', got {init!r}")


def slices_of(mixer: Any, name: str) -> tuple[int, ...]:
    """Rows of the slices of a mixer's projection `name`, in order; one where it is no fused projection."""
    width = mixer.intermediate_size
    if hasattr(mixer, "num_heads"):
        states = mixer.n_groups * mixer.ssm_state_size
        return (width, width, states, states, mixer.num_heads) if name == "in_proj" else (0,)
    if name == "x_proj":
        return (mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size)
    return (width, width) if name == "in_proj" else (0,)


class BlockDiagonal(nn.Linear):
    """A `lora_B` that counts on its diagonal blocks only: slice i's rows see its own features."""

    blocks: list[tuple[int, int, int, int]]  # rows start:stop and features i:j of each slice

    def forward(self, low: Tensor) -> Tensor:
        """[..., r * slices] to [..., rows of all slices], each block's product beside the others, plus the bias."""
        out = torch.cat(
            [F.linear(low[..., i:j], self.weight[start:stop, i:j]) for start, stop, i, j in self.blocks], -1
        )
        return out if self.bias is None else out + self.bias


class SplitLoraLinear(LoraLinear):
    """PEFT's LoRA layer where the `lora_B` of some adapters is a `BlockDiagonal`."""

    def factors(self, adapter: str) -> list[Pair]:
        """The pairs of an adapter: one a slice where it is split, else one of all rows."""
        a: Any = self.lora_A[adapter].weight
        b: Any = self.lora_B[adapter]
        if not isinstance(b, BlockDiagonal):
            return [(a, b.weight, None)]
        return [(a[i:j], b.weight[start:stop, i:j], (start, stop)) for start, stop, i, j in b.blocks]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """scaling * B A, [M, K] in B's dtype, of the blocks that count."""
        dtype: Any = self.lora_B[adapter].weight.dtype
        wide = torch.promote_types(dtype, torch.float32)  # some CPUs multiply half precision slowly
        pairs = [b.to(wide) @ a.to(wide) for a, b, _ in self.factors(adapter)]
        return (torch.cat(pairs) * self.scaling[adapter]).to(dtype)


@torch.no_grad()
def _split(layer: Any, name: str, slices: tuple[int, ...], config: LoraConfig) -> None:
    """Makes an adapter of a layer, B zero, split, and initialises each slice as PEFT would a layer of those rows."""
    base, low, up = layer.get_base_layer(), layer.lora_A[name], layer.lora_B[name]
    rank, row = layer.r[name] // len(slices), 0
    layer.__class__, up.__class__, up.blocks = SplitLoraLinear, BlockDiagonal, []
    for i, size in enumerate(slices):
        up.blocks.append((row, row + size, i * rank, (i + 1) * rank))
        row += size
    if config.init_lora_weights is True or low.weight.device.type == "meta":
        return
    options = copy.copy(config)
    options.use_rslora, options.lora_bias, options.lora_dropout = False, False, 0.0
    for start, stop, i, _ in up.blocks:
        piece = nn.Linear(base.in_features, stop - start, bias=False, device=low.weight.device)
        if type(base) in LINEARS:
            piece.weight = nn.Parameter(base.weight[start:stop].clone(), requires_grad=False)
        own = LoraLinear(piece, name, r=rank, lora_alpha=layer.scaling[name] * rank, config=options)
        found: Any = own.lora_A[name].weight  # of lower rank where the slice is
        low.weight[i : i + len(found)] = found
        up.weight[start:stop, i : i + len(found)] = own.lora_B[name].weight
        if type(base) in LINEARS:
            base.weight[start:stop] = piece.weight


class MambaLoraModel(GathersShards, LoraModel):
    """PEFT's LoraModel under another type, with slices where `split` asks for them."""

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        kind = model_config.get("model_type")
        if kind not in with_part("Mamba mixer"):
            known = ", ".join(with_part("Mamba mixer"))
            raise ValueError(f"model: MambaLoraConfig is for {known} models, got {kind!r}")
        if peft_config.target_modules is None:
            peft_config.target_modules = set(FAMILIES[kind].lora_targets)
        return peft_config

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        if target_name == "conv1d":
            raise ValueError("target_modules: conv1d is a depthwise convolution, LoRA cannot be merged into it")

    def _create_and_replace(  # type: ignore[override]
        self, lora_config: Any, adapter_name: str, target: Any, target_name: str, parent: Any, current_key: str,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        slices = slices_of(parent, target_name) if lora_config.split and hasattr(parent, "A_log") else (0,)
        count, options = len(slices), lora_config
        if count > 1:
            self._check_split(lora_config, target, current_key, count)
            growth = {"rank": count, "alpha": math.sqrt(count) if lora_config.use_rslora else count}
            for kind, default in (("rank", lora_config.r), ("alpha", lora_config.lora_alpha)):
                patterns = getattr(lora_config, f"{kind}_pattern")
                if current_key not in patterns:
                    value = patterns.get(get_pattern_key(patterns, current_key), default) * growth[kind]
                    setattr(lora_config, f"{kind}_pattern", {current_key: value, **patterns})  # the first match wins
            options = copy.copy(lora_config)
            options.init_lora_weights = True  # slice by slice below
        super()._create_and_replace(options, adapter_name, target, target_name, parent, current_key, **kwargs)
        layer: Any = getattr(parent, target_name)
        if count > 1:
            if adapter_name in layer.lora_variant:
                raise ValueError(f"split: takes plain LoRA, got {type(layer.lora_variant[adapter_name]).__name__}")
            _split(layer, adapter_name, slices, lora_config)

    @staticmethod
    def _check_split(config: Any, target: Any, key: str, count: int) -> None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if type(base) not in (*LINEARS, Linear4bit):
            raise ValueError(f"split: {key} must be a torch.nn.Linear or Linear4bit, got {type(base).__name__}")
        init = str(config.init_lora_weights)
        if type(base) is Linear4bit and init.startswith(("pissa", "olora")):
            raise ValueError(f"init_lora_weights: {init!r} changes the base weight, which is packed in {key}")
        if config.rank_pattern.get(key, 0) % count:
            raise ValueError(f"rank_pattern: {key} has {count} slices, its rank must be a multiple of it")

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """As PEFT's, which would spread split adapters over all of `lora_B`: those are refused.

        Raises:
            ValueError: naming the split adapters.
        """
        split = [name for name in adapters if getattr(self.peft_config.get(name), "split", False)]
        if split:
            raise ValueError(f"adapters: {', '.join(split)} are split (lora_B is block-diagonal); merge them instead")
        super().add_weighted_adapter(adapters, *args, **kwargs)

    def subtract_mutated_init(self, output_state_dict: dict[str, Tensor], adapter_name: str, kwargs: Any = None) -> Any:
        """As PEFT's, which appends the initial factors: refused for split adapters, whose blocks that would shift.

        Raises:
            ValueError: the adapter is split.
        """
        if getattr(self.peft_config[adapter_name], "split", False):
            raise ValueError(f"path_initial_model_for_weight_conversion: {adapter_name} is split; save it without")
        return super().subtract_mutated_init(output_state_dict, adapter_name, kwargs)
