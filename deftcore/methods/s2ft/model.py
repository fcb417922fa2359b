"""A model under S2FT: permuted so that what trains is contiguous, and un-permuted when it is unloaded."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from deftcore.methods.s2ft.config import S2ftConfig
from deftcore.methods.s2ft.gated_mlp import FusedGatedMlp
from deftcore.methods.s2ft.layer import S2ftLayer
from deftcore.methods.s2ft.selection import Plan, make_plan
from deftcore.models.coupled import permute
from deftcore.nn.fingerprints import check_base, fingerprints
from deftcore.nn.linear import Linear4bit, is_transposed
from deftcore.nn.linear16 import LINEARS
from deftcore.training.tuners import GathersShards


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
        """PEFT's for an unknown name.

        Raises:
            ValueError: for the adapter itself, which lives in the weights.
        """
        if adapter_name in self.peft_config:
            raise ValueError("delete_adapter: an S2FT adapter lives in the weights; use unload()")
        super().delete_adapter(adapter_name)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's. Of a config that knows no base the model holds a copy, which learns the base and what was
        selected: the one that was given goes on other bases too."""
        config: Any = self.peft_config[adapter_name]
        if config.base_hash is None:
            self.peft_config[adapter_name] = deepcopy(config)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

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
        self, peft_config: S2ftConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str, **_: Any,
    ) -> None:  # fmt: skip
        where = self.plan.slices[current_key]
        layer = S2ftLayer(target, adapter_name, peft_config, where.dim, where.places, where.indices)
        setattr(parent, target_name, layer)

    def _post_injection_hook(self, model: nn.Module, config: S2ftConfig, adapter_name: str) -> None:  # type: ignore
        super()._post_injection_hook(model, config, adapter_name)
        for name in self.plan.gated:
            mlp: Any = model.get_submodule(name)
            down = mlp.down_proj
            if isinstance(down, S2ftLayer) or type(down) in LINEARS:
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
