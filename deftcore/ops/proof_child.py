"""The child process of `proof`: runs kernels against their references and says what came of it.

Every case runs three times over the same numbers: with the kernel, with PyTorch in the same dtype, and with PyTorch in
float64. With w the last, a value passes where the kernel's |ours - w| is at most twice the largest |PyTorch's - w|,
plus two roundings of the dtype at |w| and 128 of float32 at the largest |w|. Gradients are compared where the kernel
computes them.
"""

import faulthandler
import json
import math
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from deftcore.ops.kernels import DTYPE_CODES, only
from deftcore.ops.proof_case import Case, Numbers
from deftcore.ops.proof_cases import CASES

EPS32 = torch.finfo(torch.float32).eps


def check(kernel: str, device: torch.device) -> tuple[str, float]:
    """Why the kernel must stay off (empty: it need not), and the largest error by the largest value.

    What is raised here is not the kernel's: its reference failed, or there is no memory.
    """
    worst = 0.0
    with only():
        for case in CASES[kernel](Numbers(device)):
            exact = _results(case, torch.float64, device)
            for dtype in DTYPE_CODES:
                plain = _results(case, dtype, device)
                where = f"{case.label}, {str(dtype)[6:]}"
                try:
                    with only(kernel):
                        ours = _results(case, dtype, device)
                except Exception as error:
                    if _lacks_memory(error):
                        raise
                    return f"failed, {_words(error)} ({where})", math.inf
                if len(ours) != len(plain):
                    return f"gives {len(ours)} tensors, not {len(plain)} ({where})", math.inf
                for our, their, right in zip(ours, plain, exact, strict=True):
                    reason, difference = _compare(our, their, right)
                    if reason:
                        return f"{reason} ({where})", difference
                    worst = max(worst, difference)
    return "", worst


def _lacks_memory(error: Exception) -> bool:
    """Whoever has the memory is to blame. CUDA's libraries have words of their own for it."""
    words = ("out of memory", "ALLOC_FAILED", "NOT_INITIALIZED")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _results(case: Case, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    try:
        return _outputs_and_gradients(case, dtype)
    finally:  # a fault that the device reports late belongs here, whatever was raised by then
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _outputs_and_gradients(case: Case, dtype: torch.dtype) -> list[Tensor]:
    inputs = [None if x is None else x.detach().to(dtype).requires_grad_(case.gradients) for x in case.inputs]
    found = case.run(*inputs)
    outputs = [found] if isinstance(found, Tensor) else list(found)
    if case.gradients:
        ends = [y for y in outputs if y.requires_grad]
        weights = [Numbers(y.device).normal(*y.shape).to(y.dtype) for y in ends]
        leaves = [x for x in inputs if x is not None]
        outputs += [g for g in torch.autograd.grad(ends, leaves, weights, allow_unused=True) if g is not None]
    return [y.detach() for y in outputs]


def _compare(ours: Tensor, plain: Tensor, exact: Tensor) -> tuple[str, float]:
    """The reason against a value (empty: none) and its largest error by the largest value.

    Raises:
        ArithmeticError: what it is compared with has values that are not finite, which would allow any error.
    """
    if ours.shape != plain.shape or ours.dtype != plain.dtype:
        return f"gives {tuple(ours.shape)} {ours.dtype}, not {tuple(plain.shape)} {plain.dtype}", math.inf
    if not ours.numel():
        return "", 0.0
    wide = exact.double()
    if not (wide.isfinite().all() and plain.isfinite().all()):
        raise ArithmeticError(f"PyTorch's own result in {plain.dtype} or float64 is not finite")
    error, size = (ours.double() - wide).abs().nan_to_num(nan=math.inf), float(wide.abs().max())
    allowed = torch.zeros_like(wide)
    if ours.is_floating_point():
        allowed = 2 * torch.finfo(ours.dtype).eps * wide.abs() + 128 * EPS32 * size
        allowed += 2 * (plain.double() - wide).abs().max()
    difference = float(error.max()) / max(size, 1e-30)
    place = (error - allowed).argmax()
    if error.flatten()[place] <= allowed.flatten()[place]:
        return "", difference
    return f"differs by {error.flatten()[place]:.3g}, {allowed.flatten()[place]:.3g} is rounding", difference


def main(arguments: Sequence[str]) -> None:
    """Runs kernels in their order, reporting each on a pipe; ends at the first that fails, as the device may be lost.

    Args:
        arguments: number of the pipe, device, seconds for one kernel, kernels.
    """
    pipe, device, limit = Connection(int(arguments[0]), readable=False), torch.device(arguments[1]), float(arguments[2])
    faulthandler.enable()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        libraries: Any = torch.backends
        for library in (libraries.cuda.matmul, libraries.cudnn.conv):
            library.fp32_precision = "ieee"  # TF32 would be no measure
    torch.ones(1, device=device).item()
    pipe.send_bytes(b"{}")
    for kernel in arguments[3:]:
        faulthandler.dump_traceback_later(limit + 10, exit=True)  # should nobody be left who would end it
        message = _report(kernel, device)
        pipe.send_bytes(json.dumps(message).encode())
        if message["reason"]:
            return


def _report(kernel: str, device: torch.device) -> dict[str, Any]:
    try:
        reason, difference = check(kernel, device)
    except Exception as error:
        return {"reason": "unknown", "unknown": f"{kernel}: {_words(error)}"}
    return {"reason": reason, "difference": difference if math.isfinite(difference) else None}
