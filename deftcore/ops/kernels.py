"""The compiled module: which kernels it has, where they are switched on, and how they are given memory."""

import ctypes
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from deftcore.ops.proof import Place, ProofError, prove, remembered

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Names under which a kernel is asked for: those that both devices have, each CUDA kernel with its proof, and the CPU's.
KERNELS = (
    "act_density", "density", "sparse_down", "sparse_mlp", "sparse_mlp_4bit", "quantize_4bit", "dequantize_4bit",
    "linear_4bit", "gated_act", "grouped_delta", "mask_units", "selective_scan", "mamba_chunk_scan",
    "causal_conv1d", "selective_state_update", "logit_rows",
    "galore_step", "farthest_point_sample", "knn", "ball_query", "gather_points",
)  # fmt: skip
CPU_ONLY = ("decode_step", "mamba_step", "linear_4bit_int8", "sparse_mlp_4bit_int8")


def _import_native() -> ModuleType:
    """Imports the compiled module. It brings no OpenMP of its own: its symbols bind to the runtime PyTorch loaded."""
    try:
        from deftcore import _C
    except ImportError as error:
        if "GOMP_" not in str(error) and "omp_" not in str(error):
            message = f"deftcore: the compiled module deftcore._C {_why_unusable(Path(__file__).parents[1], error)}"
            raise ImportError(message) from error
        ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)  # this PyTorch brought no OpenMP at all
        from deftcore import _C
    return _C


def _why_unusable(package: Path, error: ImportError) -> str:
    """What an import without the compiled module says: above all that Python found a clone's sources, unbuilt."""
    if any(package.glob("_C.*so")) or not (package.parent / "CMakeLists.txt").is_file():
        return f"is missing or unusable ({error}); install the package again (`pip install '.[train]'` in its sources)"
    where = "in the current directory" if package.parent == Path.cwd() else "on its path (PYTHONPATH?)"
    return (
        f"is missing: Python found the source folder {package} {where} instead of an installed package. Leave "
        "that folder for one of your own, or build the sources in place: pip install -e '.[train]'"
    )


native = _import_native()
HAS_CUDA = hasattr(native, "cuda")
# A build for tests has CUDA kernels that take CPU addresses (tests/emulator); here they stand in for the CPU's own.
_EMULATED = hasattr(native, "emulated") and os.environ.get("DEFTCORE_EMULATE") == "1"
_off_on: dict[torch.device, dict[str, str]] = {}  # kernels that are off on a device, and why
_only: frozenset[str] | None = None


def has_gpu() -> bool:
    """Whether there is something to run CUDA kernels on, and kernels."""
    return HAS_CUDA and (_EMULATED or torch.cuda.is_available())


def gpu(device: torch.device | int | None = None) -> torch.device:
    """A GPU with its number, the current one for None; in an emulated build the CPU, which is in its place."""
    if _EMULATED:
        return torch.device("cpu")
    if isinstance(device, torch.device) and device.type != "cuda":
        raise ValueError(f"device: must be a CUDA device, got {device}")
    number = device.index if isinstance(device, torch.device) else device
    number = torch.cuda.current_device() if number is None else number
    if not 0 <= number < (count := torch.cuda.device_count()):
        raise ValueError(f"device: there is no GPU {number}, the last one is {count - 1}")
    return torch.device("cuda", number)


def cuda_enabled(op: str, device: torch.device | int | None = None) -> bool:
    """Whether the CUDA kernel of an op is built and switched on.

    On are those that gave their reference's values on a GPU of this model: found out at first use, in a child process,
    and kept. The variable DEFTCORE_CUDA_KERNELS makes it none ("off") or all, unproved ones too ("all"); it is
    "proved".

    Args:
        op: one of `deftcore.ops.kernels.KERNELS`; any other is never on.
        device: a CUDA device or its number; None is the current one.

    Raises:
        ValueError: for a device that is not there or none of CUDA's, or another value of the variable.
    """
    return not why_off(op, device)


def switch() -> str:
    """What DEFTCORE_CUDA_KERNELS says."""
    mode = os.environ.get("DEFTCORE_CUDA_KERNELS") or "proved"
    if mode not in ("off", "proved", "all"):
        raise ValueError(f"DEFTCORE_CUDA_KERNELS: must be off, proved or all, got {mode!r}")
    return mode


def why_off(op: str, device: torch.device | int | None = None) -> str:
    """Why the CUDA kernel of an op is off on a device, as in `cuda_enabled`; empty where it is on."""
    if _only is not None:
        return "" if op in _only else "left out"
    mode = switch()
    if op in CPU_ONLY:
        return "only CPUs have such a kernel"
    if op not in KERNELS:
        return "there is no such kernel"
    if not HAS_CUDA:
        return "not built"
    if mode == "off":
        return "DEFTCORE_CUDA_KERNELS=off"
    if device not in _off_on:
        if not has_gpu():
            return "no GPU"
        if mode == "all":
            return ""
        device = gpu(device)
        if device not in _off_on:
            _off_on[device] = _reasons_off(device)
    return "" if mode == "all" else _off_on[device].get(op, "")


def too_old(device: torch.device) -> str:
    """Why no kernel can run on a GPU, proved or not; empty where one can."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0):
        return ""
    major, minor = torch.cuda.get_device_capability(device)
    return f"the kernels need compute capability 8.0, {torch.cuda.get_device_name(device)} has {major}.{minor}"


def _reasons_off(device: torch.device) -> dict[str, str]:
    """Kernels that are off on a GPU, and why; this may run them all."""
    if why := too_old(device):
        return dict.fromkeys(KERNELS, why)
    place = Place.of(device)
    found, why = remembered(KERNELS, place), ""
    if len(found) < len(KERNELS):
        if capturing(device):
            # Off from here on: what was captured must stay true.
            why = "not proved before a CUDA graph came; run `deftcore gpu-check` first"
        else:
            try:
                found = prove(KERNELS, place)
            except ProofError as error:
                found, why = remembered(KERNELS, place), f"could not be proved, {error}"
    if why:
        warnings.warn(f"deftcore: CUDA kernels on {device}: {why}", stacklevel=2)
    reasons = {kernel: found[kernel].reason if kernel in found else why for kernel in KERNELS}
    return {kernel: reason for kernel, reason in reasons.items() if reason}


@contextmanager
def only(*names: str) -> Iterator[None]:
    """Within it exactly these CUDA kernels are on, for the whole process: to compare one with its reference."""
    global _only  # a backward runs in threads of its own, which see no context variable
    before, _only = _only, frozenset(names)
    try:
        yield
    finally:
        _only = before


@cache
def _warn_fallback(op: str, device: str, dtype: torch.dtype, why: str) -> None:
    warnings.warn(
        f"deftcore.{op}: no native kernel is switched on for {device} and {dtype}{why and f' ({why})'}; the PyTorch "
        "reference runs instead",
        stacklevel=4,
    )


def backend(op: str, x: Tensor) -> ModuleType | None:
    """The native functions for the device and dtype of `x`, or None, with a warning, where the reference serves."""
    found = _native_for(op, x)
    if found is None and _only is None and x.dtype != torch.float64:
        _warn_fallback(op, x.device.type, x.dtype, why_off(op, x.device) if runs_cuda(x) else "")
    return found


def _native_for(op: str, x: Tensor) -> ModuleType | None:
    if x.dtype not in DTYPE_CODES:
        return None
    if x.device.type == "cpu" and not _EMULATED:
        return native.cpu
    return native.cuda if runs_cuda(x) and not why_off(op, x.device) else None


def runs_cuda(x: Tensor) -> bool:
    """Whether the native kernels for x are the CUDA ones, which want 16-byte aligned addresses."""
    return x.device.type == ("cpu" if _EMULATED else "cuda")


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is captured on a device's current stream: nothing can be measured or waited for."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):  # "current" is a stream of the current device
        return torch.cuda.is_current_stream_capturing()


def cpu_name() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine_name(like: Tensor) -> str:
    """What a measurement on like's device depends on: the processor and how it is used, and versions.

    On a GPU it is what a kernel's proof depends on, the driver and the build with it.
    """
    if like.device.type == "cuda":
        return Place.of(like.device).words
    threads = torch.get_num_threads()
    return f"{cpu_name()} {native.isa_name()} threads={threads} torch-{torch.__version__} deftcore-{native.version}"


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
