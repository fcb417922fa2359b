"""PEFT's LoRA layers on deftcore's fused op, in place and back."""

import logging
from typing import Any

from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from deftcore.ops.lora import lora_linear

logger = logging.getLogger("deftcore")


class FusedLoraLinear(LoraLinear):
    """PEFT's LoRA layer with its plain forward fused; parameters, names, merging and checkpoints are PEFT's.

    `patch` changes a layer's class to this one and `unpatch` changes it back, so nothing else can differ.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = [name for name in self.active_adapters if name in self.lora_A]
        base = self.base_layer
        plain = not (args or kwargs or self.disable_adapters or self.merged or len(active) != 1)
        if not plain or base.weight.requires_grad or active[0] in self.lora_variant:
            return super().forward(x, *args, **kwargs)
        name = active[0]
        a, b, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
        if b.bias is not None or not (x.dtype == base.weight.dtype == a.weight.dtype):
            return super().forward(x)  # PEFT casts between the base's and the adapter's dtype
        dropped = dropout(x) if self.training and not isinstance(dropout, nn.Identity) else None
        return lora_linear(
            x, base.weight, a.weight, b.weight, scaling=self.scaling[name], bias=base.bias, dropped_x=dropped
        )


def patch(model: nn.Module) -> nn.Module:
    """Runs the LoRA layers of a PEFT model on the fused op, in place; returns the model.

    Layers it leaves alone are logged with the reason: bases that are not `torch.nn.Linear`, DoRA and other variants.
    Calls that the op does not cover (several active adapters, mixed batches, mixed dtypes) go to PEFT's own forward.

    Raises:
        ValueError: when the model has no LoRA layer at all.
    """
    patched, left = [], []
    for name, module in model.named_modules():
        if type(module) is FusedLoraLinear:
            patched.append(name)
        elif isinstance(module, LoraLinear):
            if type(module) is not LoraLinear:
                left.append(f"{name} ({type(module).__name__})")
            elif type(module.get_base_layer()) is not nn.Linear:
                left.append(f"{name} (base {type(module.get_base_layer()).__name__})")
            elif module.lora_variant:
                left.append(f"{name} (variant {', '.join(module.lora_variant)})")
            else:
                module.__class__ = FusedLoraLinear
                patched.append(name)
    if not patched and not left:
        raise ValueError(f"model: {type(model).__name__} has no PEFT LoRA layer; call get_peft_model first")
    logger.info("patch: %d LoRA layers fused", len(patched))
    if left:
        logger.warning("patch: left alone: %s", "; ".join(left))
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Gives the LoRA layers PEFT's own class back, in place; returns the model."""
    for module in model.modules():
        if type(module) is FusedLoraLinear:
            module.__class__ = LoraLinear  # type: ignore[assignment]
    return model
