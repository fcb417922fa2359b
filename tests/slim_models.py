"""Tiny models to slim, and what they must compute then."""

import copy

import torch
from conftest import tiny_batch, tiny_model

from deftcore.models.coupled import find_coupled
from deftcore.models.families import FAMILIES
from deftcore.models.kept import Kept

OWN = {  # activations of the real models, where it is not silu
    "gemma": "gelu_pytorch_tanh", "gemma2": "gelu_pytorch_tanh", "gemma3_text": "gelu_pytorch_tanh",
    "gpt2": "gelu_new", "gpt_neox": "gelu", "bert": "gelu", "roberta": "gelu", "t5": "gated-gelu", "mt5": "gated-gelu",
}  # fmt: skip
KINDS = [kind for kind, family in FAMILIES.items() if not family.buffers]


def model_of(kind):
    """A tiny model whose heads and channels weigh enough in its logits for a fault to show."""
    model = tiny_model(kind, OWN.get(kind, "silu")).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.2, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1, generator=generator)
    return model


def some_kept(model, *, seed=0, grouped=True, empty=()):
    """Different numbers in every structure; whole key-value groups, or (`grouped=False`) one query head of each."""
    generator = torch.Generator().manual_seed(seed)
    units = {}
    for i, each in enumerate(find_coupled(model)):
        if each.name in empty:
            units[each.name] = ()
        elif each.mlp is not None:
            order = torch.randperm(each.units, generator=generator)[: each.units - 5 - i]
            units[each.name] = tuple(sorted(order.tolist()))
        elif each.group == 1:
            order = torch.randperm(each.units, generator=generator)[: 2 + i % 2]
            units[each.name] = tuple(sorted(order.tolist()))
        elif grouped:
            group = i % (each.units // each.group)
            units[each.name] = tuple(range(group * each.group, (group + 1) * each.group))
        else:
            units[each.name] = tuple(g * each.group + i % each.group for g in range(each.units // each.group))
    return Kept(units)


def masked(model, kept, *, within=False):
    """A copy of the model (`within`: itself) with pruned units zero and others times the scales: what slimming must
    compute, by hooks on the inputs of what reads them."""
    model = model if within else copy.deepcopy(model)
    for each in find_coupled(model):
        if each.name not in kept.units:
            continue
        values = torch.zeros(each.units)
        places = list(kept.units[each.name])
        values[places] = torch.tensor(kept.scales.get(each.name) or [1.0] * len(places))
        for axis in each.weights(["o", "down"]):
            mask = values.repeat_interleave(axis.width)
            model.get_submodule(axis.module).register_forward_pre_hook(
                lambda _, args, mask=mask: (args[0] * mask.to(args[0].dtype),)
            )
    return model


def logits_of(model, kind):
    with torch.no_grad():
        return model(**tiny_batch(kind)).logits


def assert_same(found, expected, bound=1e-6):
    """Equal up to a share of the largest value."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= bound * expected.abs().max()
