"""What every benchmark family uses: alternating sides, medians, cold weights."""

import ctypes
import statistics
import time

import torch
from rich.console import Console

COLD_BYTES = 128 << 20  # rotate over at least this much, four times this machine's last-level cache
console = Console(stderr=True)


def alternate(sides, repeats):
    """Median seconds per side and the quartiles' spread; the first round does not count."""
    times = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:
                times[name].append(time.perf_counter() - start)
    result = {}
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        result[name] = {"seconds": middle, "spread": (high - low) / middle}
    return result


class Rotating:
    """Copies of tensors, handed out in turn, so that none is still in a cache."""

    def __init__(self, make, nbytes):
        self.items = [make() for _ in range(max(4, -(-COLD_BYTES // max(nbytes, 1))))]
        self.turn = 0

    def __call__(self):
        self.turn += 1
        return self.items[self.turn % len(self.items)]


def keep_freed_memory():
    """Tells glibc not to give large blocks back: fresh pages would cost more than the kernels that fill them."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def streaming_bandwidth(device):
    """Bytes per second of a plain read of 256 MB: the roofline of one-token products."""
    x = torch.ones(64 << 20, device=device)
    return x.nbytes / alternate({"sum": lambda: x.sum()}, 9)["sum"]["seconds"]


def over(calls, run):
    """A side that makes several calls in a row, over rotating weights as a model's layers are; see `per_call`."""

    def side():
        for _ in range(calls):
            run()

    return side


def per_call(times, calls):
    """Seconds of one call from `alternate`'s result over sides made by `over`."""
    return {name: found["seconds"] / calls for name, found in times.items()}
