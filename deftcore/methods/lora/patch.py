"""Native ops in place of other libraries' modules: shown to be equal first, in place, and back."""

import logging
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from importlib import import_module
from typing import Any, NamedTuple, Protocol

from torch import nn

from deftcore.nn.linear import Linear4bit, called_plainly
from deftcore.nn.verify import Case, Proofs

logger = logging.getLogger("deftcore")

Replacement = tuple[type, Callable[[], list[Case]]]  # the class to take the place of a module's, cases that prove it


class Replacements(Protocol):
    """A module that knows replacements of one kind; `register_replacements` names it."""

    def replacement(self, module: nn.Module, parent: nn.Module | None) -> Replacement | str:
        """What takes a module's place, or why nothing does ("": the module is no concern of this one)."""

    def unpatch_module(self, module: nn.Module) -> None:
        """Gives a module the class back that `patch` replaced, where it did."""


class _Registered(NamedTuple):
    home: str
    libraries: tuple[str, ...]
    beneath: bool


_REGISTERED: dict[str, _Registered] = {}


def register_replacements(kind: str, home: str, libraries: Collection[str], *, beneath: bool = True) -> None:
    """Makes `patch` and `unpatch` ask a room for its replacements.

    Args:
        kind: what they replace, as error messages name it: "Mamba mixer".
        home: name of a module that is `Replacements`; imported once it is needed.
        libraries: modules of which one has been imported by whoever has such layers. Until then `home` is not asked.
        beneath: whether it is asked about the parts of layers that another room knows, or that hold a base layer, too.
    """
    _REGISTERED[kind] = _Registered(home, tuple(libraries), beneath)


def _in_use(*, beneath: bool = False) -> list[Replacements]:
    """The registered homes whose libraries have been imported; of those asked about parts of others' layers only."""
    used = (each for each in _REGISTERED.values() if any(library in sys.modules for library in each.libraries))
    return [import_module(each.home) for each in used if each.beneath or not beneath]


def _answers(model: nn.Module) -> Iterator[tuple[str, Any, Replacement | str]]:
    """Each module with its name and what the room that knows it says, "" where none does."""
    modules, rooms, beneath = dict(model.named_modules()), _in_use(), _in_use(beneath=True)
    known: set[str] = set()  # layers of one room's, and what is beneath them
    for name, module in modules.items():
        above = name.rpartition(".")[0]
        inside = bool(name) and above in known
        parent = modules.get(above) if name else None
        answers = (room.replacement(module, parent) for room in (beneath if inside else rooms))
        found: Iterator[Replacement | str] = (answer for answer in answers if answer)
        answer = next(found, "")
        if inside or not isinstance(answer, str) or hasattr(type(module), "get_base_layer"):
            known.add(name)
        yield name, module, answer


def patch(model: nn.Module, *, verify: bool = True) -> nn.Module:
    """Runs PEFT's LoRA layers, bitsandbytes' 4-bit layers, Mamba mixers and, where it pays, linear layers in 16 bits on
    native ops, in place; returns the model.

    Bases may be `torch.nn.Linear`, deftcore's `Linear4bit` or bitsandbytes'. Layers it leaves alone are logged with the
    reason: other bases, DoRA and other variants, weights that bitsandbytes has repacked. Calls that the op does not
    cover (several active adapters, mixed batches, base weights that train, hooks on a layer's parts) go to PEFT's own
    forward; layers of which that holds already are named too. Mixers of Transformers' Mamba, Mamba-2 and FalconMamba
    become one fused op each, LoRA on any of their projections inside. On a CPU without instructions for 16-bit products
    other `torch.nn.Linear`s in 16 bits, frozen or trained, take deftcore's product; where PyTorch's is as fast they
    stay. Subclasses, and those with hooks, are left alone.

    Args:
        model: any module.
        verify: run one layer of every kind, configuration and dtype against what it replaces, on a small random input,
            before any of its kind is replaced: forward and backward, for mixers also a left-padded prefill and two
            cached steps. Where they differ beyond rounding the layer is left alone and named. Verdicts are kept in the
            cache folder; `deftcore info` lists them.

    Raises:
        ValueError: when the model has no such layer at all.
    """
    patched = 0
    left: dict[str, list[str]] = {}  # names by reason, as the next
    waiting: dict[str, list[str]] = {}
    refused: dict[str, list[str]] = {}
    proofs = Proofs() if verify else None
    for name, module, found in _answers(model):
        if isinstance(found, str):
            if found:
                left.setdefault(found, []).append(name)
            continue
        kind, cases = found
        if type(module) is not kind:
            if not called_plainly(module, hooks=False):
                left.setdefault("its forward was replaced, by Accelerate perhaps", []).append(name)
                continue
            refusal = proofs.refusal(type(module), kind, cases) if proofs else ""
            if refusal:
                refused.setdefault(refusal, []).append(name)
                continue
            module.__class__ = kind
        patched += 1
        reason = module.waits() if hasattr(module, "waits") else ""
        if reason:
            waiting.setdefault(reason, []).append(name)
    if proofs:
        proofs.keep()
    if not (patched or left or refused):
        if any(isinstance(module, Linear4bit) for module in model.modules()) or _is_at_its_best(model):
            return model  # native already, or nothing to gain
        *others, last = [f"no {kind}" for kind in _REGISTERED]
        raise ValueError(f"model: {type(model).__name__} has {', '.join(others)} and {last}; call get_peft_model first")
    logger.info("patch: %d layers on native ops", patched - sum(map(len, waiting.values())))
    for what, found_ones in (("left alone", left), ("PEFT's own forward runs for now", waiting), ("refused", refused)):
        if found_ones:
            logger.warning("patch: %s: %s", what, _by_reason(found_ones))
    if refused:
        warnings.warn(f"deftcore.patch: keep their own forward: {_by_reason(refused)}", stacklevel=2)
    return model


def _is_at_its_best(model: nn.Module) -> bool:
    return any(room.is_at_its_best(model) for room in _in_use() if hasattr(room, "is_at_its_best"))


def concerns(model: nn.Module) -> bool:
    """Whether there is a module in a model that `patch` would replace, has replaced, or would leave alone by name."""
    return any(found for _, _, found in _answers(model))


def unpatch(model: nn.Module) -> nn.Module:
    """Gives the layers their own classes back, in place; returns the model."""
    rooms = _in_use()
    for module in model.modules():
        for room in rooms:
            room.unpatch_module(module)
    return model


def _by_reason(names: dict[str, list[str]]) -> str:
    return "; ".join(f"{', '.join(names[reason])} ({reason})" for reason in names)
