"""How long calls take, by the device's own clock, and which of two is the faster: that is kept in the cost model."""

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deftcore._files import first_in_table, read_table
from deftcore.ops.kernels import capturing, machine_name, runs_cuda, switch

logger = logging.getLogger("deftcore")

COST_MODEL = "cost_model.json"
_WARM_UPS = 2  # one loads code and memory, the other tells how long the launches take
_REPEATS = 5
_FASTEST = 3e9  # cycles a second, more than a GPU has
_pays: dict[tuple, bool] = {}


def native_pays(
    op: str, x: Tensor, sizes: tuple[int, ...], native: Callable[[], Any], library: Callable[[], Any]
) -> bool:
    """Whether a CUDA kernel is no slower than PyTorch's form of the same product, both of which are timed once.

    It is taken to be on a CPU, where DEFTCORE_CUDA_KERNELS is "all", and, unless the answer is known, while a CUDA
    graph is captured. Where PyTorch's form has no memory the kernel pays, from then on.

    Args:
        op: name of the kernel.
        x: a tensor of the device and dtype in question.
        sizes: what the times depend on beside these; numbers of tokens as `bucket_of` gives them.
        native, library: the two, on the call's own inputs, which they must leave as they are.
    """
    return not runs_cuda(x) or switch() != "proved" or no_slower(op, x, sizes, native, library)


def no_slower(
    op: str, x: Tensor, sizes: tuple[int, ...], native: Callable[[], Any], library: Callable[[], Any]
) -> bool:
    """`native_pays` on any device, whatever the switch says."""
    quick = (op, x.device, x.dtype, sizes, torch.get_num_threads())
    if quick not in _pays:
        key = f"{machine_name(x)} {op} {'x'.join(map(str, sizes))} {str(x.dtype)[6:]}"
        ratio = read_table(COST_MODEL).get(key)
        if not isinstance(ratio, float):
            if capturing(x.device):
                return True
            try:
                ours, theirs = medians(lambda _: (native, library), x.device)
                ratio = ours / max(theirs, 1e-9)
            except torch.OutOfMemoryError:
                ratio = 0.0  # kept too, or a run that is continued could take the other way
            logger.info("cost model: %s: the kernel takes %.2f of PyTorch's time", key, ratio)
            ratio = first_in_table(COST_MODEL, key, ratio)
        _pays[quick] = ratio <= 1
    return _pays[quick]


def bucket_of(tokens: int) -> int:
    """The number of tokens, a power of two, that stands for this one in the measurements."""
    return 1 << max(tokens - 1, 0).bit_length()


def medians(calls: Callable[[int], Sequence[Callable[[], Any]]], device: torch.device) -> list[float]:
    """Seconds of some calls that take turns: the median of each, without the rounds that warm up.

    Args:
        calls: gives those of a round, by its number; each time the same ones, if with other inputs.
    """
    for round_number in range(_WARM_UPS):
        launches = [_host_seconds(call, device) for call in calls(round_number)]
    times = []
    for round_number in range(_WARM_UPS, _WARM_UPS + _REPEATS):
        pairs = zip(calls(round_number), launches, strict=True)
        times.append([seconds(call, device, launch) for call, launch in pairs])
    return [statistics.median(found) for found in zip(*times, strict=True)]


def seconds(call: Callable[[], Any], device: torch.device, launch: float) -> float:
    """Seconds of one call; on a GPU the device's own.

    There the call's launches wait behind a kernel that sleeps for longer than `launch`, the seconds that the host takes
    for them. A call that itself waits for the device ends the sleep: what it launches after that is not hidden.
    """
    if device.type != "cuda":
        return _host_seconds(call, device)
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        torch.cuda._sleep(int(1.5 * _FASTEST * launch) + 1_000_000)
        start_event.record()
        call()
        end_event.record()
        end_event.synchronize()
    return start_event.elapsed_time(end_event) / 1e3


def _host_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds until a call returns; on a GPU that is idle before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    taken = time.perf_counter() - start
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return taken
