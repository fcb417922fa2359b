"""What every benchmark family uses: alternating sides, medians, cold weights."""

import ctypes
import importlib
import statistics
import time

import torch
from rich.console import Console

COLD_BYTES = 128 << 20  # rotate over at least this much, more than twice a last-level cache (an H100's: 50 MB)
GRAPH_CALLS = 16  # calls in one CUDA graph, over rotating weights
LIMIT = {"seconds": float("inf")}  # of one comparison, behind which no further round begins; `--quick` lowers it
console = Console(stderr=True)


def alternate(sides, repeats, device="cpu", graph=True):
    """Median seconds per side and the quartiles' spread; the first round does not count, unless it takes all the time
    that a comparison has (`LIMIT`).

    On "cuda" a side is a graph of GRAPH_CALLS calls timed by events, so that the device's time is seen and not the
    interpreter's (what a call costs the host is the family `overhead`); calls that read a value back cannot be in one.
    """
    in_graph = graph and device == "cuda"
    clock = {name: _graph_clock(run) if in_graph else _wall_clock(run, device) for name, run in sides.items()}
    times = {name: [] for name in sides}
    end = time.perf_counter() + LIMIT["seconds"]
    for _ in range(repeats + 1):
        for name, seconds in clock.items():
            times[name].append(seconds())
        if time.perf_counter() > end:
            break
    result = {}
    for name, values in times.items():
        values = values[1:] or values
        low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        result[name] = {"seconds": middle, "spread": (high - low) / middle}
    return result


def _wall_clock(run, device):
    def seconds():
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return seconds


def _graph_clock(run):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_CALLS):
            run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds():
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / GRAPH_CALLS

    return seconds


def optional(module, name):
    """What a peer calls this, or None where the package is not there or cannot be loaded."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # one that was built for another PyTorch fails in many ways
        if not isinstance(error, ModuleNotFoundError):
            console.print(f"{module} does not load, its columns are left out: {error}")
        return None


class Rotating:
    """Copies of tensors, handed out in turn, so that none is still in a cache."""

    def __init__(self, make, nbytes):
        self.items = [make() for _ in range(max(4, -(-COLD_BYTES // max(nbytes, 1))))]
        self.turn = 0

    def __call__(self):
        self.turn += 1
        return self.items[self.turn % len(self.items)]


def allocator_peak_mb(device, run):
    """The most memory that PyTorch's allocator held at once beyond what it held before, in MB."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 2**20


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
    return x.nbytes / alternate({"sum": lambda: x.sum()}, 9, device)["sum"]["seconds"]


def over(calls, run):
    """A side that makes several calls in a row, over rotating weights as a model's layers are; see `per_call`."""

    def side():
        for _ in range(calls):
            run()

    return side


def per_call(times, calls):
    """Seconds of one call from `alternate`'s result over sides made by `over`."""
    return {name: found["seconds"] / calls for name, found in times.items()}
