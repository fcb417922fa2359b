"""Finds the MLP blocks of a Transformers model by their structure, through PEFT's wrappers."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

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
class MlpBlock:
    """One MLP block: y = down(act(up(x))), or y = down(act(gate(x)) * up(x)) when `gate` is there."""

    name: str  # in the base model, whatever wraps it
    side: str  # "encoder" or "decoder" of an encoder-decoder model, "model" otherwise
    activation: Slot
    gate: Slot | None
    up: Slot
    down: Slot
    container: Slot | None  # the module that computes the whole block, where there is one

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
            x = scale * torch.randn((4, first.in_features), generator=generator)
            x = x.to(first.weight.device, _input_dtype(first, torch.float32)).requires_grad_()
            inner = up(x)
            if block.gate is not None:
                inner = activation(getattr(unit, block.gate.attribute)(x)) * inner
            else:
                inner = activation(inner)
            expected, found = (y.nan_to_num() for y in (down(inner.to(_input_dtype(last, inner.dtype))), unit(x)))
            if (found - expected).abs().max() > 8 * torch.finfo(found.dtype).eps * expected.abs().max():
                raise ValueError(
                    f"{block.name}: {type(holder).__name__} has the parts of an MLP but computes something else of them"
                )


def _input_dtype(layer: Any, otherwise: torch.dtype) -> torch.dtype:
    """What a linear layer takes; those in 4 bits take anything."""
    return layer.weight.dtype if layer.weight.is_floating_point() else otherwise


def find_mlp_blocks(model: nn.Module) -> list[MlpBlock]:
    """MLP blocks in forward order: Llama-like (Mistral, Qwen2, Gemma ...), OPT, BERT, RoBERTa, T5.

    Their names are those of the base model, so that they stay the same when an adapter is put on, merged or taken off.

    Raises:
        ValueError: naming the model's class, when it has none that is understood, or experts that would be left out.
    """
    base = base_of(model)
    experts = [name for name, module in base.named_modules() if "Experts" in type(module).__name__]
    if experts:
        raise ValueError(
            f"model: {type(base).__name__} is a mixture of experts, whose experts are not covered: {experts[0]} and "
            f"{len(experts) - 1} more. DensityLoss(modules=...) watches single activations by name"
        )
    blocks = list(_blocks(base))
    if not blocks:
        raise ValueError(
            f"model: {type(base).__name__} has no MLP block of a known family "
            "(Llama-like gate_proj/up_proj/down_proj, OPT fc1/fc2, BERT intermediate/output, T5 wi/wo)"
        )
    return blocks


def _blocks(model: nn.Module) -> Iterator[MlpBlock]:
    modules = dict(model.named_modules())
    for path, module in modules.items():
        container = None
        if "." in path:
            parent, attribute = path.rsplit(".", 1)
            container = Slot(modules[parent], attribute)
        name = path.replace(".base_layer", "")
        side = side_of(model, name)
        if _has(module, "gate_proj", "up_proj", "down_proj", "act_fn"):
            yield MlpBlock(name, side, *_slots(module, "act_fn", "gate_proj", "up_proj", "down_proj"), container)
        elif _has(module, "wi_0", "wi_1", "wo", "act"):
            yield MlpBlock(name, side, *_slots(module, "act", "wi_0", "wi_1", "wo"), container)
        elif _has(module, "wi", "wo", "act"):
            yield MlpBlock(name, side, *_slots(module, "act", None, "wi", "wo"), container)
        elif _has(module, "fc1", "fc2", "activation_fn"):
            act, gate, up, down = _slots(module, "activation_fn", None, "fc1", "fc2")
            yield MlpBlock(name, side, act, gate, up, beneath_adapters(down), None)
        elif _has(module, "intermediate", "output") and _has(module.intermediate, "dense", "intermediate_act_fn"):
            act, up = Slot(module.intermediate, "intermediate_act_fn"), Slot(module.intermediate, "dense")
            yield MlpBlock(name, side, act, None, up, beneath_adapters(Slot(module.output, "dense")), None)


def _slots(module: nn.Module, act: str, gate: str | None, up: str, down: str) -> tuple[Slot, Slot | None, Slot, Slot]:
    return Slot(module, act), Slot(module, gate) if gate else None, Slot(module, up), Slot(module, down)


def _has(module: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)


def side_of(model: nn.Module, name: str) -> str:
    """ "encoder" or "decoder" for a module of an encoder-decoder model, "model" for any other."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "model"
    return next((side for side in ("encoder", "decoder") if f".{side}." in f".{name}."), "model")
