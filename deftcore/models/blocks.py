"""Finds the MLP blocks of a Transformers model by their structure, through PEFT's wrappers."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deftcore.models.families import MLP_FORMS, Mlp, family_of
from deftcore.nn.constant import Constant
from deftcore.nn.linear import shape_of
from deftcore.nn.shadow import shadow


@dataclass(frozen=True)
class Slot:
    """A named child of a module, so that it can be read and replaced."""

    holder: nn.Module
    attribute: str

    def get(self) -> nn.Module:
        return getattr(self.holder, self.attribute)

    def set(self, module: nn.Module) -> None:
        setattr(self.holder, self.attribute, module)


@dataclass(frozen=True)
class ActivationSite:
    """An activation in a model."""

    name: str  # in the base model, whatever wraps it
    side: str  # "encoder" or "decoder" of an encoder-decoder model, "model" otherwise
    activation: Slot


@dataclass(frozen=True)
class MlpBlock(ActivationSite):
    """One MLP block: y = down(act(up(x))), or y = down(act(gate(x)) * up(x)) when `gate` is there."""

    gate: Slot | None
    up: Slot
    down: Slot
    container: Slot | None  # the module that computes the whole block, where there is one
    form: Mlp

    @property
    def output(self) -> Slot:
        """The slot whose module returns the block's output, beneath adapters that add to it."""
        return beneath_adapters(self.container or self.down)


def base_of(model: Any) -> nn.Module:
    """The model beneath PEFT's wrapper, where there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def beneath_adapters(slot: Slot) -> Slot:
    """The slot of the block's own module, beneath adapters that add to the block's output (bottlenecks)."""
    while getattr(slot.get(), "adds_to_block", False):
        slot = Slot(slot.get(), "base_layer")
    return slot


def check_function(block: MlpBlock) -> None:
    """Raises ValueError, naming the class, where a block has the parts of an MLP and computes something else of them:
    with multipliers, limits, or a norm between. The module and its parts run on a few random numbers, on a shadow.
    """
    holder = block.up.holder
    if block.container is None or any(t.device.type == "meta" for t in [*holder.parameters(), *holder.buffers()]):
        return
    unit: Any = shadow(holder).eval()
    activation = nn.SiLU()  # any serves, and the module's own may be observed
    setattr(unit, block.activation.attribute, activation)
    up, down = getattr(unit, block.up.attribute), getattr(unit, block.down.attribute)
    first, last = (part.get_base_layer() if hasattr(part, "get_base_layer") else part for part in (up, down))
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.enable_grad():  # without gradients, bitsandbytes would repack its weights
        for scale in (1.0, 1000.0):
            x = scale * torch.randn((4, shape_of(first)[1]), generator=generator)
            x = x.to(first.weight.device, _input_dtype(first, torch.float32)).requires_grad_()
            if block.gate is None:
                inner = activation(up(x))
            elif block.form.fused:
                gate, inner = up(x).chunk(2, -1)
                inner = activation(gate) * inner
            else:
                inner = activation(getattr(unit, block.gate.attribute)(x)) * up(x)
            expected, found = (y.nan_to_num() for y in (down(inner.to(_input_dtype(last, inner.dtype))), unit(x)))
            if (found - expected).abs().max() > 8 * torch.finfo(found.dtype).eps * expected.abs().max():
                raise ValueError(
                    f"{block.name}: {type(holder).__name__} has the parts of an MLP but computes something else of them"
                )


def _input_dtype(layer: Any, otherwise: torch.dtype) -> torch.dtype:
    """What a linear layer takes; those in 4 bits take anything."""
    return layer.weight.dtype if layer.weight.is_floating_point() else otherwise


def find_mlp_blocks(model: nn.Module) -> list[MlpBlock]:
    """MLP blocks in forward order, of an architecture that `families` lists, or of a form that it knows.

    Their names are those of the base model, so that they stay the same when an adapter is put on, merged or taken off.

    Raises:
        ValueError: naming the model's class, when it has none that is understood, or experts that would be left out.
    """
    base = base_of(model)
    family = family_of(base)
    if family is not None and not family.mlps:
        raise ValueError(f"model: {type(base).__name__}: {family.lacks('MLP')}")
    experts = [name for name, module in base.named_modules() if "Experts" in type(module).__name__]
    if experts:
        raise ValueError(
            f"model: {type(base).__name__} is a mixture of experts, whose experts are not covered: {experts[0]} and "
            f"{len(experts) - 1} more. DensityLoss(modules=...) watches single activations by name"
        )
    blocks = list(_blocks(base))
    if not blocks:
        forms = ", ".join("/".join(form.projections) for form in MLP_FORMS)
        raise ValueError(f"model: {type(base).__name__} has no MLP block of a known family ({forms})")
    return blocks


def _blocks(model: nn.Module) -> Iterator[MlpBlock]:
    family = family_of(model)
    forms = MLP_FORMS if family is None else family.mlps
    modules = dict(model.named_modules())
    for path, module in modules.items():
        form = next((form for form in forms if has_parts(module, (form.act, *form.projections))), None)
        if form is None:
            continue
        container, down = None, _slot(module, form.down)
        if not form.whole:
            down = beneath_adapters(down)
        elif path:
            parent, _, attribute = path.rpartition(".")
            container = Slot(modules[parent], attribute)
        name = path.replace(".base_layer", "")
        gate = _slot(module, form.gate) if form.gate else None
        act, up = _slot(module, form.act), _slot(module, form.up)
        yield MlpBlock(name, side_of(model, name), act, gate, up, down, container, form)


def _slot(module: nn.Module, path: str) -> Slot:
    holder, _, attribute = path.rpartition(".")
    return Slot(module.get_submodule(holder), attribute)


def has_parts(module: nn.Module, paths: Iterable[str]) -> bool:
    """Whether there is a module at each of some paths below another, and none of them a mere constant."""
    return all(_part(module, path) is not None for path in paths)


def _part(module: Any, path: str) -> nn.Module | None:
    for name in path.split("."):
        module = getattr(module, name, None)
        if not isinstance(module, nn.Module) or isinstance(module, Constant):
            return None
    return module


def side_of(model: nn.Module, name: str) -> str:
    """ "encoder" or "decoder" for a module of an encoder-decoder model, "model" for any other."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "model"
    return next((side for side in ("encoder", "decoder") if f".{side}." in f".{name}."), "model")
