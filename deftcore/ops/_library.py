"""What every op file uses: registration with PyTorch, the choice of a native back end, and argument checks.

An op is one `define` call: a schema, an implementation for every device (it asks `backend` for native code and calls
its reference otherwise), a fake kernel, and an autograd formula. `torch.library.Library` is used directly because it
costs a quarter of the call overhead of the `custom_op` decorator.
"""

import ctypes
import os
import warnings
from collections.abc import Callable, Iterable
from functools import cache, wraps
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# float64 runs on the references: it is there for gradcheck.
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Names under which a kernel is asked for.
KERNELS = (
    "act_density", "density", "sparse_down", "sparse_mlp", "sparse_mlp_4bit", "quantize_4bit", "dequantize_4bit",
    "linear_4bit", "gated_act", "grouped_delta", "selective_scan", "mamba_chunk_scan", "causal_conv1d",
    "selective_state_update",
)  # fmt: skip
# CUDA kernels that have passed their tests on hardware of a compute capability (bench/results holds the evidence). The
# others are compiled but stay off unless DEFTCORE_EXPERIMENTAL_CUDA=1.
CUDA_PROVED: dict[tuple[int, int], frozenset[str]] = {(9, 0): frozenset(KERNELS)}

_lib = torch.library.Library("deftcore", "DEF")
_defined: list[str] = []


def _import_native() -> ModuleType:
    """Imports the compiled module. It brings no OpenMP of its own: its symbols bind to the runtime PyTorch loaded."""
    try:
        from deftcore import _C
    except ImportError as error:
        if "GOMP_" not in str(error) and "omp_" not in str(error):
            raise ImportError(
                "deftcore: the compiled module deftcore._C is missing or unusable "
                f"({error}); install the package (`pip install .`) and run from outside a source tree that is not built"
            ) from error
        ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)  # this PyTorch brought no OpenMP at all
        from deftcore import _C
    return _C


native = _import_native()
_HOST_ONLY = not hasattr(native, "cuda")


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
            outputs = quiet(*args) if _HOST_ONLY else _on_its_device(quiet, args)
        for i in changed:
            torch.autograd.graph.increment_version(args[i])
        return outputs

    return kernel


def _on_its_device(function: Callable[..., Any], args: tuple) -> Any:
    """Calls an implementation with its first tensor's GPU as the current one: kernels are launched there."""
    device = next((a.device for a in args if isinstance(a, Tensor)), None)
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
    """Names of all registered ops."""
    return list(_defined)


def cuda_enabled(op: str, device: torch.device | int | None = None) -> bool:
    """Whether the CUDA kernel of `op`, one of `KERNELS`, is built and on for a device (None: the current one)."""
    if _HOST_ONLY:
        return False
    return os.environ.get("DEFTCORE_EXPERIMENTAL_CUDA") == "1" or (
        torch.cuda.is_available() and op in CUDA_PROVED.get(_capability(device), ())
    )


@cache
def _capability(device: torch.device | int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _warn_fallback(op: str, device: str, dtype: torch.dtype) -> None:
    warnings.warn(
        f"deftcore.{op}: no native kernel is switched on for {device} and {dtype}; the PyTorch reference runs instead",
        stacklevel=4,
    )


def backend(op: str, x: Tensor) -> ModuleType | None:
    """The native functions for the device and dtype of `x`, or None, with a warning, where the reference serves."""
    found = _native_for(op, x)
    if found is None and x.dtype != torch.float64:
        _warn_fallback(op, x.device.type, x.dtype)
    return found


def has_kernel(op: str, x: Tensor) -> bool:
    """Whether `backend` gives native functions, without its warning."""
    return _native_for(op, x) is not None


def _native_for(op: str, x: Tensor) -> ModuleType | None:
    if x.dtype not in DTYPE_CODES:
        return None
    if x.device.type == "cpu":
        return native.cpu
    return native.cuda if x.device.type == "cuda" and cuda_enabled(op, x.device) else None


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast on x's device computes in; None where it is off, or unknown as on "meta"."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def stream(x: Tensor) -> int:
    """The current CUDA stream of x's device as an address; 0 on the CPU."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.device.type == "cuda" else 0


def give_workspace(args: Any, nbytes: int, x: Tensor) -> Tensor:
    """Gives a kernel's arguments a 64-byte aligned workspace on x's device, to be held until the kernel has run.

    Its last element, an int64, is where those arguments that report `rows_read` do so.
    """
    words = nbytes // 8 + 9
    workspace = torch.empty(words, dtype=torch.int64, device=x.device)
    args.workspace = -(-workspace.data_ptr() // 64) * 64
    if hasattr(args, "rows_read"):
        args.rows_read = workspace.data_ptr() + 8 * (words - 1)
    return workspace


def address(x: Tensor | None) -> int:
    """Of a tensor that a kernel reads as one piece; 0 for None. What is read with its strides gives `data_ptr()`."""
    if x is None:
        return 0
    if not x.is_contiguous():
        raise RuntimeError(f"deftcore: a kernel would read shape {tuple(x.shape)}, strides {x.stride()} as one piece")
    return x.data_ptr()


def aligned(x: Tensor) -> Tensor:
    """x, contiguous and at a multiple of 16 bytes as the CUDA kernels' vector loads want it; a copy where it is not."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def flatten_tokens(x: Tensor) -> Tensor:
    """x [..., D] as [tokens, D]; unlike reshape(-1, D) also where D is 0."""
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


# ---------------------------------------------------------------------------- checks


def check_float(name: str, x: Any) -> None:
    """Raises TypeError unless x is a dense floating-point tensor of a supported dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: must be a Tensor, got {type(x).__name__}")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: dtype must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: must be a dense (strided) tensor, got layout {x.layout}")


def check_like(name: str, x: Any, like_name: str, like: Tensor) -> None:
    """Raises unless x is a tensor of like's dtype on like's device."""
    check_float(name, x)
    if x.dtype != like.dtype:
        raise TypeError(f"{name}: dtype must be {like.dtype} as {like_name}, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{name}: must be on {like.device} as {like_name}, got {x.device}")


def check_integers(name: str, x: Any, shape: tuple[int, ...], why: str, like_name: str, like: Tensor) -> None:
    """Raises unless x is an int32 or int64 tensor of this shape on like's device."""
    if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: must be an int32 or int64 tensor, got {getattr(x, 'dtype', type(x))}")
    check_shape(name, x, shape, why)
    if x.device != like.device:
        raise ValueError(f"{name}: must be on {like.device} as {like_name}, got {x.device}")


def check_shape(name: str, x: Any, shape: tuple[int, ...], why: str) -> None:
    """Raises unless x is a dense tensor of that shape."""
    if not isinstance(x, Tensor) or x.layout != torch.strided:
        raise TypeError(f"{name}: must be a dense Tensor, got {getattr(x, 'layout', type(x).__name__)}")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}: shape must be {shape} ({why}), got {tuple(x.shape)}")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"{name}: must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_number(name: str, value: Any, *, minimum: float, strict: bool = False) -> float:
    """Returns value as a float; raises unless it is a finite number above (`strict`) or not below `minimum`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: must be a number, got {type(value).__name__}")
    above = value > minimum if strict else value >= minimum
    if not above or value != value or value == float("inf"):
        raise ValueError(f"{name}: must be finite and {'above' if strict else 'at least'} {minimum}, got {value}")
    return float(value)
