"""How S2FT scores heads and channels: by their weights, activations or gradients (arXiv 2412.06289, section 4)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deftcore.models.coupled import CONSUMERS, Coupled
from deftcore.models.unit_norms import unit_norms
from deftcore.nn.linear import PackedModule
from deftcore.nn.tokens import token_masks

Scores = dict[str, Tensor]  # per Axis.key: one per unit


@torch.no_grad()
def activation_scores(
    model: Any, structures: list[Coupled], targets: list[str], batches: list[Mapping[str, Tensor]]
) -> Scores:
    """Norm over unmasked tokens of each unit's input to its consumer (o or down), [units], summed in float64.

    Raises:
        ValueError: a layer sees another number of tokens than the batch's mask has.
    """
    sums: dict[str, Tensor] = {}
    masks: dict[str, Tensor | None] = {}
    pair = bool(getattr(model.config, "is_encoder_decoder", False))
    handles = []

    def watch(name: str) -> Any:
        side = ("decoder" if ".decoder." in f".{name}" else "encoder") if pair else "model"

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x, mask = args[0].reshape(-1, args[0].shape[-1]), masks[side]  # some models (OPT) flatten already
            if mask is not None:
                if mask.numel() != x.shape[0]:
                    raise ValueError(f"batches: {name} sees {x.shape[0]} tokens, the mask has {mask.numel()}")
                x = x[mask.flatten().bool()]
            total = x.double().square().sum(0).cpu()
            sums[name] = sums[name] + total if name in sums else total

        return hook

    consumers = {c.name: [a for a in c.axes if a.role in CONSUMERS] for c in structures}
    training = model.training
    try:
        for axes in consumers.values():
            handles += [model.get_submodule(a.module).register_forward_pre_hook(watch(a.module)) for a in axes]
        model.eval()
        for batch in batches:
            masks.update(token_masks(batch, pair))
            model(**batch)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    found = {}
    for coupled in structures:
        per_unit = [sums[a.module].view(coupled.units, -1).sum(1) for a in consumers[coupled.name]]
        axes = coupled.weights(targets)
        for axis in axes:
            own = [i for i, a in enumerate(consumers[coupled.name]) if a.module == axis.module]
            squares = per_unit[own[0]] if own else torch.stack(per_unit).sum(0)
            found[axis.key] = (
                squares.view(coupled.units // coupled.group if axis.shared else coupled.units, -1).sum(1).sqrt()
            )
    return found


def gradient_scores(
    model: Any, structures: list[Coupled], targets: list[str], batches: list[Mapping[str, Tensor]]
) -> Scores:
    """Norm of each unit's loss gradient, averaged over the batches before the norm is taken, [units].

    Raises:
        ValueError: 4-bit weights, which have no gradient.
    """
    axes = [(coupled, axis) for coupled in structures for axis in coupled.weights(targets)]
    for _, axis in axes:
        if isinstance(model.get_submodule(axis.module), PackedModule):
            raise ValueError(f"strategy: 4-bit weights have no gradient ({axis.module}); use another strategy")
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    weights = {axis.module: model.get_submodule(axis.module).weight for _, axis in axes}
    training = model.training
    model.requires_grad_(False)
    try:
        model.eval()
        for weight in weights.values():
            weight.requires_grad_(True)
            weight.grad = None
        with torch.enable_grad():
            for batch in batches:
                (model(**batch).loss / len(batches)).backward()
        return {axis.key: unit_norms(model, coupled, axis, weights[axis.module].grad) for coupled, axis in axes}
    finally:
        model.train(training)
        for name, parameter in model.named_parameters():
            parameter.grad = None if name.removesuffix(".weight") in weights else parameter.grad
            parameter.requires_grad_(wanted[name])
