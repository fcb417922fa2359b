"""The weights of an MLP block's projections, whatever holds them: dense, in 4 bits, under LoRA, gate and up in one."""

from typing import Any

from torch import Tensor

from deftcore.models.blocks import MlpBlock
from deftcore.nn.linear import is_transposed
from deftcore.nn.linear16 import LINEARS
from deftcore.nn.mlp import LowRank
from deftcore.ops.quantized import QuantizedTensor


def weight_of(block: MlpBlock, role: str, *, merge: bool = False) -> tuple[Any, Tensor | None, LowRank | None]:
    """Weight (dense or 4-bit), bias and unmerged LoRA of one projection, or ValueError naming the layer.

    Args:
        merge: the adapter will be merged: look at the layer beneath it.
    """
    slot = getattr(block, role)
    module, low, extra = slot.get(), None, None
    where = f"{block.name}.{slot.attribute}"
    if merge:
        module = getattr(module, "base_layer", module)
    if hasattr(module, "lora_A"):  # PEFT's LoRA layer, known by its attributes: nn does not import PEFT
        active = [name for name in module.active_adapters if name in module.lora_A]
        if not module.merged and not module.disable_adapters and active:
            if len(active) > 1 or active[0] in getattr(module, "lora_variant", {}):
                raise ValueError(
                    f"{where}: only one plain LoRA adapter can stay unmerged, got {active}; use merge=True"
                )
            name = active[0]
            low = LowRank(module.lora_A[name].weight, module.lora_B[name].weight, float(module.scaling[name]))
            if module.lora_B[name].bias is not None:
                extra = low.scaling * module.lora_B[name].bias
        module = module.base_layer
    packed = getattr(module, "quantized", None)
    if not isinstance(packed, QuantizedTensor) and type(module) not in LINEARS and not is_transposed(module):
        raise ValueError(
            f"{where}: must be torch.nn.Linear, Linear4bit, Conv1D, a patched bitsandbytes layer or PEFT LoRA over "
            f"one, got {type(module).__name__}"
        )
    bias = module.bias if extra is None else (module.bias + extra).detach()  # PEFT's `lora_bias` needs a base's bias
    if isinstance(packed, QuantizedTensor):
        weight: Any = packed
    else:
        weight = module.weight.t() if is_transposed(module) else module.weight
    if not block.form.fused or role == "down":
        return weight, bias, low
    if weight is packed:
        raise ValueError(
            f"{where}: holds gate and up in 4 bits, which are not cut in two; leave it out of quantize (skip)"
        )
    half = 0 if role == "gate" else 1
    low = None if low is None else LowRank(low.a, low.b.chunk(2)[half], low.scaling)
    return weight.chunk(2)[half], None if bias is None else bias.chunk(2)[half], low
