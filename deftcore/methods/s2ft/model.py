"""S2FT: structured sparse fine-tuning (Yang et al., arXiv 2412.06289): a few heads and channels, trained in place.

The selected units are permuted to one contiguous slice of each weight, and that slice, an ordinary `nn.Parameter` on
the weight's own memory, is all that trains.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn

from deftcore.methods.s2ft.fingerprints import check_base, fingerprints
from deftcore.methods.s2ft.gated_mlp import FusedGatedMlp
from deftcore.methods.s2ft.layer import S2ftLayer
from deftcore.methods.s2ft.selection import Plan, make_plan
from deftcore.models.coupled import is_transposed, permute
from deftcore.nn.linear import Linear4bit
from deftcore.training.tuners import GathersShards, MethodName

STRATEGIES = ("random", "weight", "activation", "product", "gradient")
DATA_STRATEGIES = ("activation", "product", "gradient")
TARGETS = ("o", "down", "v", "up", "gate", "q", "k")
_RECOMPUTE = ("none", "up", "gate_up")


@dataclass
class S2ftConfig(PeftConfig):
    """Config of S2FT.

    Raises ValueError, naming the field, on a value out of range.
    """

    channel_ratio: float = field(default=0.02, metadata={"help": "Share of the MLP channels trained, in (0, 1)."})
    head_ratio: float | None = field(
        default=None, metadata={"help": "Share of the heads trained, in (0, 1); None spends what the channels do."}
    )
    targets: list[str] | None = field(
        default=None, metadata={"help": f"Of {', '.join(TARGETS)}; None is o and down, down alone on grouped queries."}
    )
    strategy: str = field(default="random", metadata={"help": f"How to score units: {', '.join(STRATEGIES)}."})
    order: str = field(default="largest", metadata={"help": "Which scores to take: largest or smallest."})
    budget: str = field(default="layer", metadata={"help": "layer: equal counts; global: over all layers at once."})
    head_granularity: str | None = field(
        default=None, metadata={"help": "group: whole key-value groups (default for grouped queries); head."}
    )
    round_to: int = field(default=1, metadata={"help": "Round channel counts up to a multiple of this."})
    seed: int = field(default=0, metadata={"help": "Of the random strategy."})
    storage: str = field(
        default="shared", metadata={"help": "shared: in place; split: beside the weight (FSDP2; always for 4-bit)."}
    )
    master: str | None = field(
        default=None, metadata={"help": "fp32: optimise a float32 copy of the slice; none. None is fp32 for 16 bits."}
    )
    recompute: str = field(
        default="none", metadata={"help": "Of a gated MLP's two products, what the backward computes again: "
                                          "none, up or gate_up."}
    )  # fmt: skip
    exclude: dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Units not to select, as in `indices` of another adapter."}
    )
    indices: dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Selected units per weight; None selects when the model is wrapped."}
    )
    base_hash: dict[str, str] | None = field(
        default=None, metadata={"help": "Of the slices before training, by dtype; set on wrapping."}
    )
    target_modules: list[str] | None = field(default=None, metadata={"help": "Set on wrapping."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained and saved whole."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MethodName("S2FT")
        for name in ("channel_ratio", "head_ratio"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{name}: must be above 0 and below 1 (all of it is full fine-tuning), got {value}")
        for name, choices in (
            ("strategy", STRATEGIES), ("order", ("largest", "smallest")), ("budget", ("layer", "global")),
            ("storage", ("shared", "split")), ("recompute", _RECOMPUTE),
            ("head_granularity", (None, "group", "head")), ("master", (None, "fp32", "none")),
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: must be one of {', '.join(map(str, choices))}, got {getattr(self, name)!r}")
        if not isinstance(self.round_to, int) or self.round_to < 1:
            raise ValueError(f"round_to: must be an integer of at least 1, got {self.round_to!r}")
        for target in self.targets or []:
            if target not in TARGETS:
                raise ValueError(f"targets: must be among {', '.join(TARGETS)}, got {target!r}")
        if self.targets is not None and not self.targets:
            raise ValueError(f"targets: must name at least one of {', '.join(TARGETS)}, got []")

    @property
    def needs_data(self) -> bool:
        """Whether `select_channels` has to run over batches before wrapping."""
        return self.indices is None and self.strategy in DATA_STRATEGIES


class S2ftModel(GathersShards):
    """Permutes a model and puts `S2ftLayer`s into it; made by `peft.get_peft_model`. One adapter per model: adapters
    are taken out, switched and served with `deftcore.methods.s2ft.delta` and `serving`."""

    prefix: str = "s2ft_"
    tuner_layer_cls = S2ftLayer
    target_module_mapping = {}  # noqa: RUF012

    plan: Plan

    def _prepare_adapter_config(self, peft_config: S2ftConfig, model_config: dict) -> S2ftConfig:  # type: ignore
        return peft_config

    def _check_new_adapter_config(self, config: S2ftConfig) -> None:  # type: ignore[override]
        super()._check_new_adapter_config(config)
        if len(self.peft_config) > 1:
            raise ValueError("adapter_name: S2FT trains one adapter at a time, in place; extract it, then switch")

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self.peft_config:
            raise ValueError("delete_adapter: an S2FT adapter lives in the weights; use unload()")
        super().delete_adapter(adapter_name)

    def _prepare_model(self, peft_config: S2ftConfig, model: nn.Module) -> None:  # type: ignore[override]
        self.plan = make_plan(model, peft_config)
        here = fingerprints(_slices_before(model, self.plan))
        if peft_config.base_hash is not None:
            check_base("model", peft_config.base_hash, here)
        peft_config.base_hash = here
        peft_config.indices = {key: units.tolist() for key, units in self.plan.selected.items()}
        peft_config.target_modules = sorted(self.plan.slices)
        for coupled, order in self.plan.orders:
            permute(model, coupled, order)

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: S2ftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        where = self.plan.slices[current_key]
        layer = S2ftLayer(target, adapter_name, peft_config, where.dim, where.places, where.indices)
        setattr(parent, target_name, layer)

    def _post_injection_hook(self, model: nn.Module, config: S2ftConfig, adapter_name: str) -> None:  # type: ignore
        super()._post_injection_hook(model, config, adapter_name)
        for name in self.plan.gated:
            mlp: Any = model.get_submodule(name)
            down = mlp.down_proj
            if isinstance(down, S2ftLayer) or type(down) is nn.Linear:
                mlp.unfused_class, mlp.recompute = type(mlp), config.recompute
                mlp.__class__ = FusedGatedMlp

    @staticmethod
    def _create_new_module(peft_config: S2ftConfig, adapter_name: str, target: nn.Module) -> nn.Module:
        raise NotImplementedError  # `_create_and_replace` knows the places

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """The slices' dtype is `S2ftConfig.master`'s business."""

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        for module in model.modules():
            if isinstance(module, FusedGatedMlp):
                module.__class__ = module.unfused_class  # type: ignore[assignment]
                del module.unfused_class, module.recompute
        for coupled, order in self.plan.orders:
            permute(model, coupled, torch.argsort(order))
        return model


@torch.no_grad()
def _slices_before(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """The values that the adapter will change, named by their places; of the model before permuting."""
    found = {}
    for name in sorted(plan.slices):
        where, module = plan.slices[name], model.get_submodule(name)
        if isinstance(module, Linear4bit):
            weight = module.quantized.dequantize()
        else:
            weight = module.weight.t() if is_transposed(module) else module.weight  # type: ignore
        indices = where.indices.sort().values
        values = weight.index_select(where.dim, indices.to(weight.device))
        found[f"{name} {where.dim} {indices.tolist()}"] = values
    return found
