"""One case of a kernel's proof: a call and its inputs, and how these are drawn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deftcore import ops
from deftcore.ops.quantized import QuantizedTensor


@dataclass(frozen=True)
class Case:
    """`run` takes `inputs` in any dtype, and None as it is; what it returns is compared, integers bit for bit."""

    label: str
    run: Callable[..., Any]
    inputs: Sequence[Tensor | None]
    gradients: bool = False


class Numbers:
    """Draws of one kernel's cases, and the device's number of multiprocessors, by which some kernels cut their work."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._generator = device, torch.Generator().manual_seed(0)
        gpu = device.type == "cuda"
        self.processors = torch.cuda.get_device_properties(device).multi_processor_count if gpu else 3

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers that every dtype holds."""
        values = scale * torch.randn(shape, generator=self._generator)
        return values.bfloat16().half().float().to(self.device)

    def below(self, limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape, generator=self._generator).to(self.device)

    def zeroed(self, tokens: int, neurons: int, density: float) -> Tensor:
        """Activations of which whole columns are zero."""
        keep = torch.rand(neurons, generator=self._generator) < density
        return torch.where(keep.to(self.device), self.normal(tokens, neurons), 0.0)

    def quantized(self, *shape: int, **options: Any) -> QuantizedTensor:
        return ops.quantize_4bit(self.normal(*shape, scale=shape[-1] ** -0.5), **options)
