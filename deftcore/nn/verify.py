"""Proof before use: what `patch` puts in runs against what it replaces, on a small random input, before it takes over.

A case is one configuration of one class. The original and its replacement run on shadows of the module: copies that
share large weights and hold random values in place of small ones, so that no term is hidden by zeros. With w the
original in float32, a result passes where |ours - w| is at most three times the original's own |theirs - w|, plus four
roundings of its dtype and 128 of float32 at the size of the largest |w|. Verdicts are kept in the cache folder, under
everything that they depend on: both classes and their code, configuration, versions, build, device.
"""

import hashlib
import inspect
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from deftcore._files import add_to_table, read_table
from deftcore._versions import TESTED, installed
from deftcore.nn.shadow import shadow
from deftcore.ops.autocast import autocast_to
from deftcore.ops.kernels import KERNELS, cuda_enabled, native, runs_cuda
from deftcore.ops.quantized import QuantizedTensor

_FILE = "verified.json"
_SMALL = 1 << 18  # parameters up to this size are replaced by random values
_Results = Iterator[tuple[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """One configuration to prove.

    `module` holds the original, at the path `at` in it ("": itself), and `make` gives a test bed of it.
    `run(unit, dtype)` yields named results from inputs of that dtype, the same ones at every call.
    """

    label: str
    module: nn.Module
    make: Callable[[], nn.Module]
    dtype: torch.dtype
    run: Callable[[nn.Module, torch.dtype], _Results]
    at: str = ""


@dataclass(frozen=True)
class Verdict:
    """`difference` is the largest |ours - w| over the largest |w|, `reason` empty where it passed."""

    what: str
    reason: str
    difference: float
    versions: str
    build: str

    def __post_init__(self) -> None:
        texts = (self.what, self.reason, self.versions, self.build)
        if not (all(isinstance(text, str) for text in texts) and isinstance(self.difference, float)):
            raise TypeError(f"a verdict has texts and a number, got {self}")


class Proofs:
    """The verdicts of one call of `patch`: looked up, or made and kept."""

    def __init__(self) -> None:
        self._known = read_table(_FILE)
        self._new: dict[str, Any] = {}
        self._code = cache(_code)  # for one call: methods may be replaced before the next

    def refusal(self, original: type, fused: type, cases: Callable[[], list[Case]]) -> str:
        """Why `fused` must not take `original`'s place; empty where every case passes."""
        theirs, ours = (getattr(kind, "forward") for kind in (original, fused))  # noqa: B009
        unknown = _unknown_arguments(theirs, ours)
        if unknown:
            return f"{original.__name__}.forward takes {', '.join(unknown)}, which {fused.__name__} does not know"
        try:
            with torch.inference_mode(False), torch.enable_grad():
                reasons = (self._verdict(case, original, fused).reason for case in cases())
                return next(filter(None, reasons), "")
        except Exception as error:  # the original itself fails, on the meta device for example: nothing to keep
            return f"cannot be verified: {type(error).__name__}: {error}"

    def _verdict(self, case: Case, original: type, fused: type) -> Verdict:
        versions, build = _versions(), _build()
        parts = (case.label, case.dtype, self._code(original), self._code(fused), _structure(case.module), versions,
                 build, native.isa_name(), _kernels(_device(case.module)))  # fmt: skip
        key = hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:24]
        try:
            return Verdict(**self._known[key])
        except (KeyError, TypeError):  # absent, of another layout, or damaged
            reason, difference = _compare(case, fused)
            self._known[key] = asdict(verdict := Verdict(case.label, reason, difference, versions, build))
            self._new[key] = self._known[key]
            return verdict

    def keep(self) -> None:
        """Writes what is new."""
        if self._new:
            add_to_table(_FILE, self._new)


def verdicts() -> dict[str, list[str]]:
    """What this build proved and refused on this machine with the libraries installed now, one line each."""
    found: dict[str, list[str]] = {"proved": [], "refused": []}
    for entry in read_table(_FILE).values():
        try:
            verdict = Verdict(**entry)
        except TypeError:
            continue
        if (verdict.versions, verdict.build) != (_versions(), _build()):
            continue
        line = f"{verdict.what}: " + (verdict.reason or f"difference {verdict.difference:.1e}")
        found["refused" if verdict.reason else "proved"].append(line)
    return {kind: sorted(set(lines)) for kind, lines in found.items()}


# ---------------------------------------------------------------------------- one comparison


def _compare(case: Case, fused: type) -> tuple[str, float]:
    """The reason against `fused` (empty: none) and the largest relative difference from the original."""
    if _device(case.module) == "meta":
        raise ValueError("its weights are on the meta device, as offloaded ones are")
    low = case.dtype.itemsize == 2
    unit = case.make()
    replaced, wide = shadow(unit), shadow(unit, torch.float32) if low else None
    replaced.get_submodule(case.at).__class__ = fused
    theirs = _results(case, unit, case.dtype)
    reference = theirs if wide is None else _results(case, wide, torch.float32)
    try:
        ours = _results(case, replaced, case.dtype)
    except (MemoryError, torch.OutOfMemoryError):
        raise  # says nothing about the class
    except Exception as failure:
        return f"{fused.__name__} failed, {type(failure).__name__}: {failure}", math.inf
    if ours.keys() != theirs.keys():
        return f"gives {sorted(ours.keys() ^ theirs.keys())} on one side only", math.inf
    rounding = (4 * torch.finfo(case.dtype).eps if low else 0.0) + 128 * torch.finfo(torch.float32).eps
    worst = 0.0
    for name, their in theirs.items():
        our, exact = ours[name], reference[name]
        if our.shape != their.shape or our.dtype != their.dtype:
            return f"{name}: {tuple(our.shape)} {our.dtype}, not {tuple(their.shape)} {their.dtype}", math.inf
        size, error = _largest(exact), _largest(our.to(exact.dtype) - exact)
        allowed = rounding * size + (0.0 if wide is None else 3 * _largest(their.to(exact.dtype) - exact))
        relative = error / max(size, 1e-30)
        if not error <= allowed:
            return f"{name} differs by {error:.3g}, {allowed:.3g} is rounding", relative
        worst = max(worst, relative)
    return "", worst


def _largest(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, math.inf)) if x.numel() else 0.0


def _results(case: Case, unit: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    device = _device(unit)
    devices = [torch.device(device)] if device.startswith("cuda") else []
    disabled = logging.root.manager.disable
    with torch.random.fork_rng(devices), warnings.catch_warnings(), _full_precision():
        warnings.simplefilter("ignore")  # what a library says about the proof's input is no news to the user
        warnings.filterwarnings("default", message=r"deftcore\.")  # said once per process: not here and then never
        logging.disable(max(disabled, logging.WARNING))
        try:
            with autocast_to(device.partition(":")[0], None):
                torch.manual_seed(0)
                return {name: value.detach() for name, value in case.run(unit, dtype)}
        finally:
            logging.disable(disabled)


@contextmanager
def _full_precision() -> Iterator[None]:
    """float32 products as such: where TF32 or bfloat16 may stand for it, the original is no measure."""
    libraries: Any = torch.backends
    backends = [libraries.cuda.matmul, libraries.cudnn.conv, libraries.mkldnn.matmul, libraries.mkldnn.conv]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def run_linear(unit: nn.Module, dtype: torch.dtype) -> _Results:
    """Forward and backward of six tokens, and one token without gradients."""
    x = random_like(unit, (2, 3, unit.in_features), dtype).requires_grad_()  # type: ignore[arg-type]
    yield from with_gradients(unit, unit(x), x)
    with torch.no_grad():
        yield "one token", unit(x[:1, :1].detach().requires_grad_())


def with_gradients(unit: nn.Module, y: Tensor, x: Tensor) -> _Results:
    """y, and the gradients of x and of all that trains."""
    yield "forward", y
    wanted = {"x": x} | {name: p for name, p in unit.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(y, list(wanted.values()), random_like(unit, y.shape, y.dtype), allow_unused=True)
    for name, grad in zip(wanted, grads, strict=True):
        if grad is not None:
            yield f"gradient of {name}", grad


def random_like(unit: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Normal numbers on the unit's device, the same for every dtype up to rounding to 16 bits."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1]))
    return values.to(torch.bfloat16).to(torch.float16).to(dtype).to(_device(unit))


# ---------------------------------------------------------------------------- what a case is made of


def describe(q: QuantizedTensor) -> str:
    """What of a 4-bit weight may change which code runs."""
    blocks = "whole" if q.shape[1] % q.block_size == 0 else "broken"
    double = ", double_quant" if q.double_quant else ""
    return f"{q.quant_type} of {str(q.dtype)[6:]}, {blocks} blocks of {q.block_size}{double}"


def test_bed(module: nn.Module) -> Any:
    """A shadow in evaluation mode, with random values of ordinary size for the small parameters."""
    unit = shadow(module).eval()
    for part in unit.modules():  # bitsandbytes' layers repack their weights at the first evaluation
        part.training = hasattr(part._parameters.get("weight"), "quant_state")
    generator = torch.Generator().manual_seed(0)
    for parameter in unit.parameters():
        if type(parameter) is nn.Parameter and parameter.is_floating_point() and parameter.numel() <= _SMALL:
            fan_in = max(math.prod(parameter.shape[1:]), 1)
            values = torch.randn(parameter.shape, generator=generator) / math.sqrt(fan_in)
            parameter.data = values.to(parameter.dtype).to(parameter.device)
    return unit


# ---------------------------------------------------------------------------- what a verdict depends on


@cache
def _unknown_arguments(original: Any, fused: Any) -> list[str]:
    """Arguments of the original's forward that the replacement neither names nor takes as further keywords."""
    ours, theirs = inspect.signature(fused).parameters, inspect.signature(original).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in ours.values()):
        return []
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [name for name, p in theirs.items() if name not in ours and p.kind not in several]


def _code(kind: type) -> str:
    """Changes with any method of a class, wrappers around it and constants in it included; nn.Module's are left out."""
    lines = [f"{kind.__module__}.{kind.__qualname__}"]
    for base in kind.__mro__:
        if not issubclass(nn.Module, base):
            for name, method in sorted(vars(base).items()):
                lines += [f"{base.__qualname__}.{name} {layer}" for layer in _layers(method)]
    return "\n".join(lines)


def _layers(method: Any) -> Iterator[str]:
    """The code and the defaults of a function and of those that it wraps."""
    method = getattr(method, "__func__", getattr(method, "fget", method))  # beneath a class method, a property
    while method is not None:
        if isinstance(code := getattr(method, "__code__", None), CodeType):
            yield f"{_bytecode(code)} {method.__defaults__} {method.__kwdefaults__}"
        method = getattr(method, "__wrapped__", None)


@cache
def _bytecode(code: CodeType) -> str:
    constants = [_bytecode(c) if isinstance(c, CodeType) else _constant(c) for c in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {constants}"


def _constant(value: Any) -> str:
    return str(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


def _structure(unit: nn.Module) -> str:
    """Classes, dtypes and what trains, without sizes."""
    lines = []
    for name, module in unit.named_modules():
        tensors = [*module._parameters.items(), *module._buffers.items()]
        own = [f"{key}:{t.dtype}:{t.requires_grad}" for key, t in tensors if t is not None]
        lines.append(f"{name} {type(module).__module__}.{type(module).__qualname__} {own}")
    return "\n".join(lines)


@cache
def _versions() -> str:
    return ", ".join(f"{name} {installed(name)}" for name in TESTED if installed(name))


@cache
def _build() -> str:
    """Changes with any file of the installed package."""
    folder = Path(__file__).parents[1]
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".so", ".pyd"))
    stats = [(str(p.relative_to(folder)), s.st_size, s.st_mtime_ns) for p in files for s in (p.stat(),)]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def _kernels(device: str) -> str:
    """A device and, where it is a GPU, which one and what is on there."""
    if not runs_cuda(torch.empty(0, device=device)):
        return device
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "emulated"
    return f"{device} {name} {[kernel for kernel in KERNELS if cuda_enabled(kernel, torch.device(device))]}"


def _device(unit: nn.Module) -> str:
    tensor = next((t for t in [*unit.parameters(), *unit.buffers()] if t is not None), None)
    return "cpu" if tensor is None else str(tensor.device)
