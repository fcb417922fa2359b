"""What runs inside the backward: hooks on gradients as they become ready, and their mean over processes."""

from collections.abc import Callable, Iterable
from types import TracebackType

import torch.distributed as dist
from torch import Tensor


class Hooks:
    """Calls a function with each parameter whose gradient has just been accumulated.

    Args:
        parameters: those that require a gradient count.
        function: it may use and clear `.grad`.
    """

    def __init__(self, parameters: Iterable[Tensor], function: Callable[[Tensor], None]) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]  # until they are removed
        self._handles = [p.register_post_accumulate_grad_hook(function) for p in self.parameters]

    def remove(self) -> None:
        """No more calls."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.parameters.clear()

    def __enter__(self) -> "Hooks":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()


def processes() -> int:
    """How many train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def average_over_processes(x: Tensor) -> None:
    """The mean over all processes, in place; each of them must ask, in one order."""
    dist.all_reduce(x)
    x /= dist.get_world_size()
