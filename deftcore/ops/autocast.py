"""PyTorch's autocast, on devices that have none too."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast on x's device computes in; None where it is off, or unknown as on "meta"."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def autocast_to(device: str, dtype: torch.dtype | None) -> AbstractContextManager:
    """Autocast on a type of device to what `autocast_dtype` said; None turns it off."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, dtype, enabled=dtype is not None)
