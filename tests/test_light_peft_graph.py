"""What the estimation of Light-PEFT keeps for the backward, and that it goes through the activations."""

import peft
import pytest
import torch
from conftest import FAMILIES as TINY
from conftest import tiny_batch, tiny_model

import deftcore
from deftcore.methods.light_peft.estimation import Estimation
from deftcore.models.coupled import CONSUMERS, find_coupled
from deftcore.models.families import FAMILIES
from deftcore.ops.masks import mask_units_ref


def adapted(family, activation="silu"):
    model = tiny_model(family, "gelu" if family in ("bert", "roberta") else activation)
    config = peft.LoraConfig(target_modules=FAMILIES[family].lora_targets, init_lora_weights=False)
    return peft.get_peft_model(model, config)


def loss_of(model, family):
    return model(**tiny_batch(family)).loss


def kept_bytes(run, spared):
    """Of what the graph of `run` holds alive beside parameters and tensors below `spared` bytes, each storage once."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = run()
    del loss
    return sum(size for size in storages.values() if size >= spared)


@pytest.mark.parametrize("family", TINY)
def test_channels_keep_no_tensor_more(family):
    """Heads' masks off: what they mask, attention may have kept or not."""
    model = adapted(family)
    tokens = tiny_batch(family)["input_ids"].numel()
    plain = kept_bytes(lambda: loss_of(model, family), 4 * tokens * 8)
    estimation = Estimation(model, deftcore.LightPeftConfig(head_ratio=0.0))
    assert kept_bytes(lambda: loss_of(model, family), 4 * tokens * 8) <= plain
    estimation.detach()


@pytest.mark.parametrize("family", TINY)
def test_gradients_are_those_of_masks_before_the_output_projections(family):
    model = adapted(family)
    estimation = Estimation(model, deftcore.LightPeftConfig(head_ratio=0.5, ffn_ratio=0.5))
    with torch.no_grad():
        for mask in estimation.masks:
            mask.copy_(1 + 0.1 * torch.randn_like(mask))
    ours = loss_of(model, family)
    grads = torch.autograd.grad(ours, list(estimation.masks))
    estimation.detach()
    base, hooks = model.get_base_model(), []
    for coupled, mask in zip(find_coupled(base), estimation.masks, strict=True):
        for axis in coupled.weights(CONSUMERS):
            hooks.append(
                base.get_submodule(axis.module).register_forward_pre_hook(
                    lambda _, args, m=mask, w=axis.width: mask_units_ref(args[0], m, w)
                )
            )
    plain = loss_of(model, family)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(grads, torch.autograd.grad(plain, list(estimation.masks)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("density_first", [False, True])
def test_masks_act_under_a_density_loss(density_first):
    """It puts modules of its own where the activations are, before or after, and takes them away again."""
    model, batch = adapted("llama"), tiny_batch("llama")
    config = deftcore.LightPeftConfig(head_ratio=0.5, ffn_ratio=0.5)
    density = deftcore.DensityLoss(model) if density_first else None
    estimation = Estimation(model, config)
    alone = torch.autograd.grad(loss_of(model, "llama"), list(estimation.masks))
    density = density or deftcore.DensityLoss(model)
    density.begin([batch], 0, 4)
    output = model(**batch)
    torch.testing.assert_close(torch.autograd.grad(output.loss, list(estimation.masks)), alone)
    density.detach()
    torch.testing.assert_close(torch.autograd.grad(loss_of(model, "llama"), list(estimation.masks)), alone)
