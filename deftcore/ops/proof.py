"""Proof before use: a CUDA kernel is on where it gave its reference's values on a GPU of this model.

The kernels run on small inputs (`proof_cases`) in a child process (`proof_child`), one after the other, each with a
time limit: a fault or a hang there hurts nobody, and what is left goes on in a new child. Verdicts are kept in the
cache folder, under everything that they depend on: GPU, driver, CUDA, PyTorch, and the build.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import cache
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import IO, Any

import torch

from deftcore import __version__
from deftcore._files import add_to_table, one_at_a_time, read_table

logger = logging.getLogger("deftcore")

LIMIT = 180.0  # seconds for one kernel; on a GPU newer than the build the driver compiles it first
_START_LIMIT = 120.0  # for PyTorch and a context
_WAIT = 600.0  # for another process that proves
_FILE = "proved.json"
# Signals that a process gets for what it did itself; any other was sent to it.
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT, signal.SIGTRAP)
# The child sees what this process can import, wherever it took that from.
_COMMAND = (sys.executable or "python3", "-c", "import sys; sys.path[:] = sys.argv.pop(1).split('\\n'); "
            "from deftcore.ops.proof_child import main; main(sys.argv[1:])")  # fmt: skip


class ProofError(RuntimeError):
    """Nothing could be found out, which says nothing about the kernels."""


@dataclass(frozen=True)
class Place:
    """A device ("cuda:0"), and in words everything that a verdict depends on; other devices may have the same."""

    device: str
    words: str

    @classmethod
    def of(cls, device: torch.device) -> "Place":
        if device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            gpu = f"{torch.cuda.get_device_name(device)} ({major}.{minor}), {_driver()}, CUDA {torch.version.cuda}"
        else:
            gpu = "emulated GPU"
        return cls(str(device), f"{gpu}, PyTorch {torch.__version__}, deftcore {__version__} build {_build()}")


@dataclass(frozen=True)
class Verdict:
    """`reason` is empty where the kernel passed; `difference` is the largest error by the largest value, if known."""

    kernel: str
    reason: str
    difference: float | None
    place: str
    date: str

    def __post_init__(self) -> None:
        texts = (self.kernel, self.reason, self.place, self.date)
        if not (all(isinstance(text, str) for text in texts) and isinstance(self.difference, float | None)):
            raise TypeError(f"a verdict has texts and a number, got {self}")


def remembered(kernels: Sequence[str], place: Place) -> dict[str, Verdict]:
    """The verdicts that are kept, by kernel."""
    table, found = read_table(_FILE), {}
    for kernel in kernels:
        with contextlib.suppress(KeyError, TypeError):  # absent, of another layout, or damaged
            verdict = Verdict(**table[_key(kernel, place)])
            if (verdict.kernel, verdict.place) == (kernel, place.words):
                found[kernel] = verdict
    return found


def prove(
    kernels: Sequence[str],
    place: Place,
    *,
    again: bool = False,
    limit: float = LIMIT,
    report: Callable[[Verdict], None] = lambda verdict: None,
) -> dict[str, Verdict]:
    """Verdicts by kernel: the kept ones, and the others by running the kernels, which are then kept.

    Of several processes one runs them and the others wait.

    Args:
        again: runs all.
        limit: seconds for one kernel. That it took longer is kept only where they are at least the usual `LIMIT`.
        report: is called with each verdict as it comes.

    Raises:
        ProofError: a child could not be started, was stopped from outside, had no memory, or a reference failed.
    """
    found = {}
    with one_at_a_time("proved.lock", _WAIT):
        for verdict in () if again else remembered(kernels, place).values():
            report(verdict)
            found[verdict.kernel] = verdict
        left = [kernel for kernel in kernels if kernel not in found]
        if left:
            logger.warning("proving the CUDA kernels on %s, once; this takes some seconds", place.device)
        while left:  # a child ends at the first kernel that fails
            for reason, difference, keep in _in_child(tuple(left), place.device, limit):
                date = datetime.now(timezone.utc).isoformat(timespec="seconds")
                verdict = Verdict(left.pop(0), reason, difference, place.words, date)
                if keep:
                    add_to_table(_FILE, {_key(verdict.kernel, place): asdict(verdict)})
                report(verdict)
                found[verdict.kernel] = verdict
    return found


# ---------------------------------------------------------------------------- the child


def _in_child(kernels: Sequence[str], device: str, limit: float) -> Iterator[tuple[str, float | None, bool]]:
    """(reason, difference, whether to keep them) of kernels in their order, up to the first that fails."""
    with contextlib.ExitStack() as held:
        try:
            output = held.enter_context(tempfile.TemporaryFile())
            child, receiver = _start(held, output, [device, str(limit), *kernels])
        except (OSError, ValueError) as error:  # ValueError: a path that no command can have
            raise ProofError(f"no child process: {error}") from error
        _, silent = _next(receiver, child, _START_LIMIT)
        if silent:
            raise ProofError(f"the child process {silent} before it began: {_last_line(output)}")
        for kernel in kernels:
            verdict, silent = _next(receiver, child, limit)
            if silent:
                logger.info("%s %s: %s", kernel, silent, _last_line(output))
                yield silent, None, child.poll() is not None or limit >= LIMIT  # alive: it timed out
                return
            if verdict.get("unknown"):
                raise ProofError(verdict["unknown"])
            yield verdict["reason"], verdict["difference"], True
            if verdict["reason"]:
                return


def _start(
    held: contextlib.ExitStack, output: IO[bytes], arguments: Sequence[str]
) -> tuple[subprocess.Popen, Connection]:
    """A child, which writes to `output`, and what it sends its messages by: ended and closed with `held`."""
    receiver, sender = Pipe(duplex=False)
    held.enter_context(receiver)
    with sender:
        # Where standard streams are closed the pipe may have their numbers, over which the child's own are laid.
        number = fcntl.fcntl(sender.fileno(), fcntl.F_DUPFD_CLOEXEC, 3)
    importable = "\n".join(path for path in sys.path if isinstance(path, str))  # an import passes over others, too
    try:
        child = subprocess.Popen(
            [*_COMMAND, importable, str(number), *arguments], pass_fds=[number], stdin=subprocess.DEVNULL,
            stdout=output, stderr=output, env=os.environ | {"DEFTCORE_CUDA_KERNELS": "off"},
            start_new_session=True,  # Ctrl-C is for this process, which ends the child
        )  # fmt: skip
    finally:
        os.close(number)
    held.callback(_end, child)
    return child, receiver


def _end(child: subprocess.Popen) -> None:
    child.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold on to a process
        child.wait(10)


def _next(receiver: Connection, child: subprocess.Popen, limit: float) -> tuple[dict[str, Any], str]:
    """The child's next message, or why there is none.

    Raises:
        ProofError: somebody else ended it.
    """
    try:
        if not receiver.poll(limit):
            return {}, f"timed out after {limit:g} s"
        return json.loads(receiver.recv_bytes()), ""
    except (EOFError, OSError):
        pass
    try:
        status = child.wait(10)
    except subprocess.TimeoutExpired:
        raise ProofError("the child process fell silent") from None
    if status >= 0:
        return {}, f"ended with status {status}"
    names = {each.value: each.name for each in signal.Signals}  # of real-time signals the first and the last alone
    if -status not in _CRASHES:
        raise ProofError(f"the child process was sent {names.get(-status, f'signal {-status}')}")
    return {}, f"crashed with signal {names[-status]}"


def _last_line(output: IO[bytes]) -> str:
    output.seek(0)
    lines = output.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "no word")


# ---------------------------------------------------------------------------- what a verdict depends on


def _key(kernel: str, place: Place) -> str:
    return f"{kernel} {hashlib.sha256(place.words.encode()).hexdigest()[:24]}"


@cache
def _driver() -> str:
    """The driver's release where the system tells it, and the CUDA version that it knows."""
    newest = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
    try:
        first = Path("/proc/driver/nvidia/version").read_text().split("\n")[0]
    except OSError:
        first = ""
    release = next((word for word in first.split() if word[0].isdigit() and "." in word), "unknown")
    return f"driver {release} for CUDA {newest // 1000}.{newest % 1000 // 10}"


@cache
def _build() -> str:
    """Changes with the compiled module and with the code that calls it."""
    spec = importlib.util.find_spec("deftcore._C")
    assert spec is not None
    assert spec.origin is not None
    digest = hashlib.sha256(Path(spec.origin).read_bytes())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
