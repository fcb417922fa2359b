"""Which base weights an adapter was made for, whatever dtype they are loaded in and however they are sharded."""

from typing import Any

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether other processes hold parts of the tensor (FSDP2's DTensor)."""
    return hasattr(tensor, "full_tensor")


def flattened_by(tensor: Tensor) -> str:
    """Who has taken a parameter's rows and columns away, so that its whole cannot be asked for; empty for nobody."""
    if hasattr(tensor, "ds_id"):
        return "DeepSpeed's ZeRO-3"
    return "FSDP1" if hasattr(tensor, "_fsdp_flattened") or getattr(tensor, "_is_flat_param", False) else ""


def whole(tensor: Tensor) -> Tensor:
    """The tensor that a shard belongs to; every process of the mesh must call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def sharded_as(tensor: Tensor, values: Tensor) -> Tensor:
    """A whole tensor's values, in shards where `tensor` has shards; every process must call it with the same values."""
    if not is_sharded(tensor):
        return values
    from torch.distributed.tensor import distribute_tensor

    shards: Any = tensor
    return distribute_tensor(values.to(tensor.device), shards.device_mesh, shards.placements, src_data_rank=None)
