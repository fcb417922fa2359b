"""Buffers of measured numbers, which no cast rounds."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class ExactBuffers(nn.Module):
    """A module some of whose buffers are measurements, means and deviations of data: `.half()`, `.bfloat16()` and their
    like leave them in float32, where they would round away digits that the weights around never had.

    >>> class Centred(ExactBuffers):
    ...     exact = ("mean",)
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.register_buffer("mean", torch.tensor(1165.93982))
    >>> Centred().bfloat16().mean
    tensor(1165.9398)
    """

    exact: ClassVar[Sequence[str]] = ()  # names of these buffers

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        held = {name: self._buffers[name] for name in self.exact}
        super()._apply(fn, recurse)
        for name, before in held.items():
            after = self._buffers[name]
            if before is not None and after is not None:
                wide = torch.promote_types(after.dtype, torch.float32)
                self._buffers[name] = after if after.dtype == wide else before.to(after.device, wide)
        return self
