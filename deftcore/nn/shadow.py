"""Shadows of modules, on which something can be tried without a trace."""

from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from deftcore.nn.linear import PackedModule, dense_layer


def shadow(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy that shares the tensors and nothing else: modules, dictionaries and parameters are its own, hooks are left
    out. No adapter in it counts as merged, for unmerging would change the weights. With a dtype, floating tensors are
    cast to it and 4-bit weights decoded.
    """
    return _shadow(module, dtype, {})


def _shadow(module: nn.Module, dtype: torch.dtype | None, seen: dict[int, Any]) -> nn.Module:
    if id(module) in seen:
        return seen[id(module)]
    new: Any = None if dtype is None else decoded(module, dtype)
    if new is not None:
        seen[id(module)] = new
        return new
    new = object.__new__(type(module))
    seen[id(module)] = new
    bound = ("forward", "_hf_hook", "_old_forward", "save_pretrained")  # to the module itself
    state = {name: value for name, value in vars(module).items() if name not in bound}
    state = {name: OrderedDict() if name.endswith("_hooks") else value for name, value in state.items()}
    new.__dict__.update(state, _parameters={}, _buffers=dict(module._buffers), _modules={})
    if "merged_adapters" in state:
        new.merged_adapters = []
    for name, parameter in module._parameters.items():
        if type(parameter) is nn.Parameter:
            if id(parameter) not in seen:
                cast = dtype if parameter.is_floating_point() else None
                value = parameter.detach() if cast is None else parameter.detach().to(cast)
                seen[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
            parameter = seen[id(parameter)]
        new._parameters[name] = parameter  # others, of bitsandbytes, are frozen and carry their state
    for name, buffer in new._buffers.items():
        if dtype is not None and buffer is not None and buffer.is_floating_point():
            new._buffers[name] = buffer.to(dtype)
    for name, child in module._modules.items():
        new._modules[name] = None if child is None else _shadow(child, dtype, seen)
    return new


def decoded(module: nn.Module, dtype: torch.dtype) -> nn.Module | None:
    """A 4-bit layer as a dense one, by the library that the layer is of; None for other modules."""
    packed = module._parameters.get("weight")
    if hasattr(packed, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(packed.data, packed.quant_state).to(dtype)  # type: ignore[union-attr]
    elif isinstance(module, PackedModule):
        weight = module.quantized.dequantize(dtype)
    else:
        return None
    new: Any = dense_layer(module, weight)
    if new.bias is not None:
        new.bias.requires_grad_(module.bias.requires_grad)
    return new
