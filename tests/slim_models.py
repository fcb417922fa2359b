"""Tiny models to slim, and what they must compute then."""

import copy

import peft
import torch
from conftest import task_type, tiny_batch, tiny_model

import deftcore
from deftcore.methods.light_peft.slimming import adapted_layers, parts_of
from deftcore.models.blocks import base_of
from deftcore.models.coupled import find_coupled
from deftcore.models.families import FAMILIES
from deftcore.models.kept import Kept

OWN = {  # activations of the real models, where it is not silu
    "gemma": "gelu_pytorch_tanh", "gemma2": "gelu_pytorch_tanh", "gemma3_text": "gelu_pytorch_tanh",
    "gpt2": "gelu_new", "gpt_neox": "gelu", "bert": "gelu", "roberta": "gelu", "t5": "gated-gelu", "mt5": "gated-gelu",
}  # fmt: skip
KINDS = [kind for kind, family in FAMILIES.items() if not family.buffers]


@torch.no_grad()
def weighty(model, generator):
    """The model, its matrices and biases drawn so large that each matters."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=0.2, generator=generator)
        elif name.endswith("bias"):
            parameter.normal_(std=0.1, generator=generator)
    return model


def model_of(kind, activation=None):
    """A tiny model whose heads and channels weigh enough in its logits for a fault to show."""
    model = tiny_model(kind, activation or OWN.get(kind, "silu")).eval()
    return weighty(model, torch.Generator().manual_seed(3))


def some_kept(model, *, seed=0, grouped=True, empty=(), round_to=1):
    """Different numbers in every structure; whole key-value groups, or (`grouped=False`) one query head of each."""
    generator = torch.Generator().manual_seed(seed)
    units = {}
    for i, each in enumerate(find_coupled(model)):
        if each.name in empty:
            units[each.name] = ()
        elif each.mlp is not None:
            count = max((each.units - 5 - i) // round_to - i // 2, 1) * round_to
            order = torch.randperm(each.units, generator=generator)[:count]
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


def lora_of(model, kind, **options):
    """LoRA on every matrix that heads and channels touch, B no longer zero, at a scaling that is no power of 2."""
    given = {"r": 5, "lora_alpha": 16, "target_modules": FAMILIES[kind].lora_targets, "task_type": task_type(kind)}
    given["fan_in_fan_out"] = kind == "gpt2"
    return filled(peft.get_peft_model(model, peft.LoraConfig(**(given | options))))


def bottleneck_of(model, kind, **options):
    attention, mlps = FAMILIES[kind].attention, FAMILIES[kind].mlps
    config = deftcore.BottleneckConfig(
        r=5, target_modules=[attention.o, *(mlp.down for mlp in mlps)], task_type=task_type(kind), **options
    )
    return filled(peft.get_peft_model(model, config))


def filled(adapted):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in adapted_layers(base_of(adapted)).values():
            for parts in parts_of(layer):
                for part in parts.values():
                    for parameter in part.parameters():
                        parameter.normal_(std=0.2, generator=generator)
    return adapted.eval()


def save_task(base, folder, *, seed=0, kind="llama", wrap=lora_of, **options):
    """A slim model on a copy of the base, written as a task."""
    adapted = wrap(copy.deepcopy(base), kind, **options)
    names = list(adapted_layers(base_of(adapted)))
    kept = some_kept(base, seed=seed)
    deftcore.slim(adapted, Kept(kept.units, {names[0]: (0, 3), names[1]: ()}))
    deftcore.save_slim(adapted, folder)
    return adapted
