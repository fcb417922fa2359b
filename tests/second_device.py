"""A second device for machines without one: its tensors keep their numbers in the CPU's memory, but meet no others."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

# PyTorch knows the name, has no code for it that would get in the way, and runs its gradients on the calling thread.
DEVICE = torch.device("lazy", 0)
_aten = torch.ops.aten
# Those that take tensors of two devices. CPU scalars may go everywhere.
_BETWEEN = {_aten.copy_, _aten._to_copy, _aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}


class _Away(torch.Tensor):
    """A tensor of the device; `.numpy()`, and addresses for native code, are refused as for any other device's."""

    numbers: torch.Tensor

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def untyped_storage(self) -> torch.UntypedStorage:  # which tensors share it
        return self.numbers.untyped_storage()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.cpu().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copied: torch.Tensor = self.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, requires_grad=self.requires_grad)
        memo[id(self)] = copied
        return copied


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.away = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = _run(function, args, kwargs or {})
        self.away += isinstance(found, _Away)
        return found


class _Numbers(TorchFunctionMode):
    """Tensors of Python's numbers, which PyTorch makes without telling a dispatch mode."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            where = torch.device(kwargs.pop("device"))
            return function(*args, **kwargs).to(where)
        return function(*args, **kwargs)


@contextmanager
def second_device() -> Iterator[_Operations]:
    """While it lasts, tensors can be made on DEVICE and moved there; its `away` counts the tensors that came to be."""
    with _Operations() as operations, _Numbers():
        yield operations


def _away(numbers: torch.Tensor) -> _Away:
    made = torch.Tensor._make_wrapper_subclass(
        _Away, numbers.shape, strides=numbers.stride(), storage_offset=numbers.storage_offset(), dtype=numbers.dtype,
        device=DEVICE,
    )  # fmt: skip
    made.numbers = numbers
    return made


def _run(function: Any, args: Any, kwargs: Any) -> Any:
    given: dict[int, _Away] = {}
    others = []

    def numbers(value: Any) -> Any:
        if isinstance(value, _Away):
            given[id(value.numbers)] = value
            return value.numbers
        if isinstance(value, torch.Tensor) and value.dim() and value.device.type == "cpu":
            others.append(value)
        return torch.device("cpu") if isinstance(value, torch.device) and value == DEVICE else value

    with torch.utils._python_dispatch._disable_current_modes():
        where = kwargs.get("device")
        args, kwargs = tree_map(numbers, (args, kwargs))
        if function.namespace == "deftcore":
            others = [each for each in others if each.dtype != torch.int64]  # dropout's seeds are read by the host
        if given and others and function.overloadpacket not in _BETWEEN:
            raise RuntimeError(f"{function}: expected all tensors on one device, got {DEVICE} and cpu")
        found = function(*args, **kwargs)
    away = where == DEVICE if where is not None else bool(given)
    if function.overloadpacket is _aten.copy_:
        away = id(args[0]) in given

    def placed(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not away:
            return value
        return given[id(value)] if id(value) in given else _away(value)

    return tree_map(placed, found)
