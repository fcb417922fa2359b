"""Plain linear layers in 16 bits, frozen or trained, where PyTorch's own products are the slower ones. See `patch`."""

from functools import partial
from typing import Any

import torch
from torch import nn

from deftcore.methods.lora.patch import Replacement
from deftcore.nn.linear import PackedModule, called_plainly
from deftcore.nn.linear16 import LINEARS, Linear16
from deftcore.nn.verify import Case, run_linear, test_bed
from deftcore.ops.products import ours_pays


def replacement(module: nn.Module, parent: nn.Module | None) -> Replacement | str:
    """As `patch.Replacements`, for `nn.Linear` with 16-bit weights on a CPU."""
    if not isinstance(module, nn.Linear) or isinstance(module, PackedModule):
        return ""
    weight: Any = module._parameters.get("weight")
    if weight is None or weight.device.type != "cpu" or not ours_pays(weight.dtype):
        return ""
    if type(module) not in LINEARS:
        return f"a subclass of Linear, {type(module).__name__}"
    if type(weight) is not nn.Parameter:
        return f"weights are {type(weight).__name__}"
    if type(module) is nn.Linear and not called_plainly(module):
        return "hooks on a linear layer"
    return Linear16, lambda: [_case(module)]


def _case(layer: Any) -> Case:
    bias = "" if layer.bias is None else ", bias"
    label = f"Linear ({str(layer.weight.dtype)[6:]}{bias})"
    return Case(label, layer, partial(test_bed, layer), layer.weight.dtype, run_linear)


def unpatch_module(module: nn.Module) -> None:
    """As `patch.Replacements`."""
    if type(module) is Linear16:
        module.__class__ = nn.Linear  # type: ignore[assignment]


def is_at_its_best(model: nn.Module) -> bool:
    """Whether a model has plain 16-bit layers, all of which PyTorch's own products serve best."""
    dtypes = {m.weight.dtype for m in model.modules() if type(m) is nn.Linear and m.weight.device.type == "cpu"}
    return any(dtype in (torch.bfloat16, torch.float16) and not ours_pays(dtype) for dtype in dtypes)
