"""Registration with PyTorch.

An op is one `define` call: a schema, an implementation for every device (it asks `kernels.backend` for native code and
calls its reference otherwise), a fake kernel, and an autograd formula. `torch.library.Library` is used directly because
it costs a quarter of the call overhead of the `custom_op` decorator.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from deftcore.ops.kernels import HAS_CUDA

_lib = torch.library.Library("deftcore", "DEF")
_defined: list[str] = []


def define(
    schema: str,
    impl: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Registers one op in the `deftcore` namespace and returns a function that calls it."""
    name = schema.split("(", 1)[0]
    _lib.define(schema)
    op = getattr(torch.ops.deftcore, name).default
    changed = [i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    _lib.impl(name, _as_kernel(impl, changed), "CompositeExplicitAutograd")
    torch.library.register_fake(f"deftcore::{name}", fake, lib=_lib)
    if backward is not None:
        torch.library.register_autograd(
            f"deftcore::{name}", _without_autocast(backward), setup_context=setup_context, lib=_lib
        )
    _defined.append(name)
    if backward is None:
        return op

    def call(*args: Any) -> Any:
        # Without gradients the autograd formula's Python layer is a third of the overhead; inference mode skips it too.
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return op(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return call


def _as_kernel(impl: Callable[..., Any], changed: list[int]) -> Callable[..., Any]:
    """What the dispatcher calls: to autograd the outputs are new tensors and the `changed` arguments were written.

    Views made inside are not tracked, or an output that the implementation transposed would be a view of an op's output
    to autograd, which nobody may change in place. What native code writes by address is counted by hand, so that a
    backward that kept the argument's old value raises.
    """
    quiet = _without_autocast(impl)

    @wraps(impl)
    def kernel(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            outputs = _on_its_device(quiet, args) if HAS_CUDA else quiet(*args)
        for i in changed:
            torch.autograd.graph.increment_version(args[i])
        return outputs

    return kernel


def _on_its_device(function: Callable[..., Any], args: tuple) -> Any:
    """Calls an implementation with its first tensor's GPU as the current one: it sizes workspaces and runs kernels."""
    tensors = (x for a in args for x in (a if isinstance(a, (list, tuple)) else (a,)) if isinstance(x, Tensor))
    device = next((x.device for x in tensors), None)
    if device is None or device.type != "cuda" or device.index == torch.cuda.current_device():
        return function(*args)
    with torch.cuda.device(device):
        return function(*args)


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Library products inside an op must keep the dtype that the op was given."""

    @wraps(function)
    def run(*args: Any) -> Any:
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                return function(*args)
        return function(*args)

    return run


def op_names() -> list[str]:
    """Names of all registered ops, as under `torch.ops.deftcore`, in the order of their definition."""
    return list(_defined)


def flatten_tokens(x: Tensor) -> Tensor:
    """x [..., D] as [tokens, D]; unlike reshape(-1, D) also where D is 0."""
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
