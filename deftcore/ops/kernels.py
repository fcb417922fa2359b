"""The compiled module: which kernels it has, where they are switched on, and how they are given memory."""

import ctypes
import os
import platform
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Names under which a kernel is asked for.
KERNELS = (
    "act_density", "density", "sparse_down", "sparse_mlp", "sparse_mlp_4bit", "quantize_4bit", "dequantize_4bit",
    "linear_4bit", "gated_act", "grouped_delta", "selective_scan", "mamba_chunk_scan", "causal_conv1d",
    "selective_state_update",
)  # fmt: skip
# CUDA kernels that have passed their tests on hardware of a compute capability (bench/results holds the evidence). The
# others are compiled but stay off unless DEFTCORE_EXPERIMENTAL_CUDA=1.
CUDA_PROVED: dict[tuple[int, int], frozenset[str]] = {(9, 0): frozenset(KERNELS)}


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
HAS_CUDA = hasattr(native, "cuda")
# A build for tests has CUDA kernels that take CPU addresses (tests/emulator); here they stand in for the CPU's own.
_EMULATED = hasattr(native, "emulated") and os.environ.get("DEFTCORE_EMULATE") == "1"


def cuda_enabled(op: str, device: torch.device | int | None = None) -> bool:
    """Whether the CUDA kernel of an op is built and switched on.

    On are those that have passed their tests on hardware of the device's compute capability, and all of them under
    DEFTCORE_EXPERIMENTAL_CUDA=1.

    Args:
        op: one of `deftcore.ops.kernels.KERNELS`; any other is never on, the variable aside.
        device: a CUDA device or its number; None is the current one.

    Raises:
        RuntimeError: by PyTorch, for a device that is not there.
    """
    if not HAS_CUDA:
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
        return native.cuda if _EMULATED else native.cpu
    return native.cuda if x.device.type == "cuda" and cuda_enabled(op, x.device) else None


def runs_cuda(x: Tensor) -> bool:
    """Whether the native kernels for x are the CUDA ones, which want 16-byte aligned addresses."""
    return x.device.type == "cuda" or _EMULATED


def machine_name(like: Tensor) -> str:
    """What a measurement on like's device depends on: the processor and how it is used, and versions."""
    if like.device.type == "cuda":
        return f"{torch.cuda.get_device_name(like.device)} torch-{torch.__version__} deftcore-{native.version}"
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    threads = torch.get_num_threads()
    return f"{cpu} {native.isa_name()} threads={threads} torch-{torch.__version__} deftcore-{native.version}"


# ---------------------------------------------------------------------------- memory


def stream(x: Tensor) -> int:
    """The current CUDA stream of x's device as an address; 0 on the CPU."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.device.type == "cuda" else 0


def give_workspace(args: Any, nbytes: int, x: Tensor) -> Tensor:
    """Gives a kernel's arguments a workspace on x's device, to be held until the kernel has run.

    Its last element, an int64, is where those arguments that report `rows_read` do so.
    """
    words = (nbytes + 7) // 8 + 1
    workspace = torch.empty(words, dtype=torch.int64, device=x.device)
    args.workspace = start = workspace.data_ptr()  # a multiple of 64, as all that PyTorch allocates
    if hasattr(args, "rows_read"):
        args.rows_read = start + 8 * (words - 1)
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
