"""How much of a model a run trains, and the memory that this takes."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deftcore.nn.linear import PackedModule
from deftcore.nn.sharding import is_sharded


def describe(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Two lines: what is trained of how many parameters, and the bytes that weights, gradients and optimizer state take
    on this process; state is known of AdamW, and of optimizers that have `estimate_state_bytes`. Tensors that share
    memory count once; 4-bit matrices count by the weights that they stand for.
    """
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    count = sum(p.numel() for p in trained)
    packed = sum(module.quantized.shape.numel() for module in model.modules() if isinstance(module, PackedModule))
    total = packed + _numbers([*model.parameters(), *trained])
    gradients = sum(local.numel() * local.element_size() for local in map(_local, trained))
    parts = {
        "weights": sum(_memory([*model.parameters(), *model.buffers(), *trained]).values()),
        "gradients": gradients,
    }
    if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW):
        parts["optimizer state"] = 2 * gradients
    elif hasattr(optimizer, "estimate_state_bytes"):
        parts["optimizer state"] = optimizer.estimate_state_bytes().total
    rest = "activations" if "optimizer state" in parts else "optimizer state and activations"
    return [
        f"trains {count:,} of {total:,} parameters ({100 * count / total:.3g} %, {_bytes(gradients)})",
        f"memory: {' + '.join(f'{_bytes(size)} {name}' for name, size in parts.items())} = "
        f"{_bytes(sum(parts.values()))}, and {rest} on top",
    ]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def _memory(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address and bytes of each piece of memory under the tensors."""
    storages = [_local(tensor).untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def _numbers(parameters: Iterable[Tensor]) -> int:
    """How many numbers the parameters hold: a slice that trains in place is part of its weight."""
    shared, apart = dict[int, int](), 0
    for p in {id(p): p for p in parameters}.values():
        if is_sharded(p):
            apart += p.numel()
            continue
        place = p.untyped_storage()
        held = shared.get(place.data_ptr(), 0) + p.numel()
        shared[place.data_ptr()] = min(held, place.nbytes() // p.element_size())
    return apart + sum(shared.values())


def _bytes(size: float) -> str:
    units = ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"
