"""The cases that prove a fused LoRA layer, for `patch`."""

from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from deftcore.nn.verify import Case, describe, run_linear, test_bed
from deftcore.ops.quantized import QuantizedTensor


def lora_cases(layer: Any, q: QuantizedTensor | None) -> list[Case]:
    """One case for each adapter of a LoRA layer; `q` is its base's weight where that is in 4 bits."""
    base = layer.get_base_layer()
    dtype = base.weight.dtype if q is None else q.dtype
    cases = []
    for name in layer.lora_A:
        drops = ", dropout" if not isinstance(layer.lora_dropout[name], nn.Identity) else ""
        weight = str(dtype)[6:] if q is None else describe(q)
        factors = f"rank {layer.r[name]} {str(layer.lora_A[name].weight.dtype)[6:]}{drops}"
        label = f"LoRA over {type(base).__name__} ({weight}), {factors}"
        cases.append(Case(label, layer, partial(_lora_bed, layer, name), dtype, run_linear))
    return cases


def _lora_bed(layer: Any, name: str) -> nn.Module:
    unit = lora_ready(test_bed(layer))
    unit._active_adapter = name
    if not isinstance(unit.lora_dropout[name], nn.Identity):
        unit.lora_dropout[name], unit.training = Dropped(), True
    return unit


def lora_ready(unit: Any) -> Any:
    """A test bed whose LoRA layers are in use, and add about half of what their bases give."""
    for layer in unit.modules():
        if isinstance(layer, LoraLayer):
            layer._disable_adapters = False
            factors_b: Any = layer.lora_B
            for name, b in factors_b.items():
                b.weight.data *= 0.5 / (abs(layer.scaling[name]) or 1.0)
    return unit


class Dropped(nn.Module):
    """Stands for dropout in a proof: every third feature, whatever the dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """x with every third feature 0 and the rest times 1.5, in x's dtype."""
        return x * (1.5 * (torch.arange(x.shape[-1], device=x.device) % 3 != 0)).to(x.dtype)
