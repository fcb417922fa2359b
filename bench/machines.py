"""Which kind of machine this is, and which file its figures may go to.

A kind is the best instruction set that the processor has, not the one in use: a machine with AVX-512 that is told to
use AVX2 (`DEFTCORE_CPU_ISA`) has other caches, clocks and peers than a machine that has no more, so that what it
measures is a result of neither.
"""

import os
from pathlib import Path

from bench.targets import AVX512, CUDA
from deftcore.ops.kernels import cpu_name, native

RESULTS = Path(__file__).parent / "results"
FORCED = "forced, not a measurement of that level"
_OWN_LEVELS = ("lanes16",)  # of the tests, which no machine prefers


def level_of(isa):
    """The kind that an instruction set makes: bfloat16 products do not make one of their own."""
    return AVX512 if isa.startswith(AVX512) else isa


def describe(device="cpu", isa=None, available=None):
    """The head of a result file.

    Args:
        device: "cpu" or "cuda".
        isa, available: the instruction set in use, and all that the machine has, the plainest first; as found here.
    """
    isa = isa or native.isa_name()
    best = [each for each in available or native.isa_available().split() if each not in _OWN_LEVELS][-1]
    forced = device == "cpu" and isa != best
    return {
        "kind": device if device != "cpu" else level_of(best),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "isa": isa,
        "forced": f"{isa} on a machine with {best}: {FORCED}" if forced else None,
    }


def headline(head):
    """The head as a line of text, the kind first."""
    words = f"{head['kind']}: {head['cpu']}, {head['cores']} cores, instruction set {head['isa']}"
    return f"{words} ({head['forced']})" if head["forced"] else words


def result_file(head, output=None, quick=False, results=RESULTS):
    """Where figures go: `output`, or the result file of this kind of machine; a quick run's are no results.

    Raises:
        ValueError: the level is forced and no other file is named, or one among the results.
    """
    if head["forced"] and output is None:
        raise ValueError(f"DEFTCORE_CPU_ISA: {head['forced']}; name a file for it with --output")
    if head["forced"] and results.resolve() in Path(output).resolve().parents:
        raise ValueError(f"--output: {head['forced']}; it cannot be in {results.name}, got {output}")
    name = f"{'' if head['kind'] == CUDA else 'cpu-'}{head['kind']}.json"
    return Path(output) if output else (results / "quick" if quick else results) / name


def keep_origins(results):
    """Writes down where each family of a file was measured, before another run changes the file's head."""
    measured = results.setdefault("measured", {})
    for name, rows in results.items():
        if isinstance(rows, list) and rows and name not in measured:
            measured[name] = origin(results)


def put_down(results, name, rows, seconds):
    """Writes down a family that was measured just now, and where; what a note told was of an earlier run.

    Where a peer is not installed there may be no rows: what was measured with it stays.
    """
    if not rows:
        return
    results[name] = rows
    results.get("notes", {}).pop(name, None)
    results["measured"][name] = origin(results) | {"seconds": round(seconds, 1)}


def origin(results):
    """What the head of a file says of a family in it."""
    return {key: results[key] for key in ("machine", "streaming_gb_per_s") if key in results}
