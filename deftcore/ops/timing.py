"""Which of two ways is the faster, by the device's own clock: what is measured is kept in the cost model."""

import logging
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deftcore._files import add_to_table, read_table
from deftcore.ops.kernels import capturing, machine_name, runs_cuda, switch

logger = logging.getLogger("deftcore")

COST_MODEL = "cost_model.json"
_REPEATS = 5
_pays: dict[tuple, bool] = {}


def native_pays(
    op: str, x: Tensor, sizes: tuple[int, ...], native: Callable[[], Any], library: Callable[[], Any]
) -> bool:
    """Whether a CUDA kernel is no slower than PyTorch's form of the same product, both of which are timed once.

    It is taken to be on a CPU, where DEFTCORE_CUDA_KERNELS is "all", and, unless the answer is known, while a CUDA
    graph is captured and where PyTorch's form has no memory.

    Args:
        op: name of the kernel.
        x: a tensor of the device and dtype in question.
        sizes: what the times depend on beside these; numbers of tokens as `bucket_of` gives them.
        native, library: the two, on the call's own inputs, which they must leave as they are.
    """
    if not runs_cuda(x) or switch() != "proved":
        return True
    quick = (op, x.device, x.dtype, sizes)
    if quick not in _pays:
        key = f"{machine_name(x)} {op} {'x'.join(map(str, sizes))} {str(x.dtype)[6:]}"
        ratio = read_table(COST_MODEL).get(key)
        if not isinstance(ratio, float):
            if capturing(x.device):
                return True
            try:
                ratio = _ratio(native, library, x.device)
            except torch.OutOfMemoryError:
                return _pays.setdefault(quick, True)
            logger.info("cost model: %s: the kernel takes %.2f of PyTorch's time", key, ratio)
            add_to_table(COST_MODEL, {key: ratio})
        _pays[quick] = ratio <= 1
    return _pays[quick]


def bucket_of(tokens: int) -> int:
    """The number of tokens, a power of two, that stands for this one in the measurements."""
    return 1 << max(tokens - 1, 0).bit_length()


def _ratio(native: Callable[[], Any], library: Callable[[], Any], device: torch.device) -> float:
    times: list[list[float]] = [[], []]
    for repeat in range(_REPEATS + 1):
        for call, found in zip((native, library), times, strict=True):
            taken = seconds(call, device)
            if repeat:  # the first round warms up
                found.append(taken)
    ours, theirs = map(statistics.median, times)
    return ours / max(theirs, 1e-9)


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call; on a GPU the device's own, the call's launches waiting behind a kernel that sleeps."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        torch.cuda._sleep(2_000_000)  # cycles, about a millisecond: longer than Python takes to launch
        start_event.record()
        call()
        end_event.record()
        end_event.synchronize()
    return start_event.elapsed_time(end_event) / 1e3
