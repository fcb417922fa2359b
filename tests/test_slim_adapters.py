"""Slim adapters: base and adapters cut together, tasks on disk, one base for several of them."""

import copy

import pytest
import torch
from slim_models import KINDS, assert_same, bottleneck_of, filled, logits_of, lora_of, masked, model_of, some_kept

import deftcore
from deftcore.methods.light_peft.slimming import adapted_layers, parts_of
from deftcore.models.blocks import base_of
from deftcore.models.coupled import find_coupled
from deftcore.models.kept import Kept


def with_ranks(kept, adapted):
    """Every third adapter whole, the third without any rank, others with some."""
    ranks = {}
    for i, name in enumerate(adapted_layers(base_of(adapted))):
        if i % 3:
            ranks[name] = () if i == 2 else ((0, 2, 3), (1, 4))[i % 2]
    return Kept(kept.units, ranks, kept.scales)


def zeroed(adapted, kept):
    """The full model with zeros at pruned units and ranks."""
    model = copy.deepcopy(adapted)
    layers = adapted_layers(base_of(model))
    with torch.no_grad():
        for name, places in kept.ranks.items():
            for part in parts_of(layers[name])[1].values():
                gone = [k for k in range(part.weight.shape[1]) if k not in places]
                part.weight[:, gone] = 0
                if not places and part.bias is not None:
                    part.bias.zero_()
    masked(base_of(model), kept, within=True)
    return model


@pytest.mark.parametrize("wrap", [lora_of, bottleneck_of])
@pytest.mark.parametrize("kind", KINDS)
def test_slim_adapters_are_those_with_zeros(kind, wrap, tmp_path):
    """In memory, through PEFT's files on the original base, and expanded again."""
    base = model_of(kind)
    adapted = wrap(copy.deepcopy(base), kind)
    kept = with_ranks(some_kept(base), adapted)
    expected = logits_of(zeroed(adapted, kept).double(), kind)
    scalings = {n: dict(m.scaling) for n, m in adapted_layers(base_of(adapted)).items() if hasattr(m, "scaling")}
    deftcore.slim(adapted, kept)
    found = logits_of(adapted, kind)
    assert_same(logits_of(copy.deepcopy(adapted).double(), kind), expected, 1e-12)
    layers = adapted_layers(base_of(adapted))
    gone = {name for name, places in kept.ranks.items() if not places}
    assert gone
    assert not gone & layers.keys()
    for name, layer in layers.items():
        rows, columns = parts_of(layer)
        assert (
            rows["default"].weight.shape[0] == columns["default"].weight.shape[1] == len(kept.ranks.get(name, range(5)))
        )
    assert all(layer.scaling == scalings[name] for name, layer in layers.items() if hasattr(layer, "scaling"))

    deftcore.save_slim(adapted, tmp_path / "task")
    before = {name: value.clone() for name, value in base.state_dict().items()}
    again = deftcore.load_slim(base, tmp_path / "task").eval()
    assert torch.equal(logits_of(again, kind), found)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())

    full = deftcore.expand(base, tmp_path / "task").eval()
    for name, layer in adapted_layers(base_of(full)).items():
        assert parts_of(layer)[0]["default"].weight.shape[0] == 5
        if name in gone:
            assert not any(part["default"].weight.any() for part in parts_of(layer))
    deftcore.slim(full, kept)
    assert torch.equal(logits_of(full, kind), found)


def test_all_adapters_of_a_model_are_cut():
    """Each of two computes over the slim base what it computed over the masked one."""
    kept = some_kept(model_of("llama"))
    adapted = lora_of(model_of("llama"), "llama")
    adapted.add_adapter("second", copy.copy(adapted.peft_config["default"]))
    adapted = filled(adapted)
    expected = zeroed(adapted, kept)
    deftcore.slim(adapted, kept)
    for name in ("default", "second"):
        for each in (adapted, expected):
            each.set_adapter(name)
        assert_same(logits_of(adapted, "llama"), logits_of(expected, "llama"), 1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_fold_with_adapters(kind, tmp_path):
    """The masks of what stays go into the base's columns and of A; so is a base as a task is loaded."""
    base = model_of(kind)
    adapted = lora_of(copy.deepcopy(base), kind)
    units = some_kept(base).units
    scales = {name: tuple(0.8 + 0.01 * i for i in range(len(places))) for name, places in units.items()}
    kept = with_ranks(Kept(units, {}, scales), adapted)
    expected = logits_of(zeroed(adapted, kept), kind)
    deftcore.slim(adapted, kept)
    found = logits_of(adapted, kind)
    assert_same(found, expected, 1e-5)
    deftcore.save_slim(adapted, tmp_path)
    assert torch.equal(logits_of(deftcore.load_slim(base, tmp_path).eval(), kind), found)


@pytest.mark.parametrize("wrap", [lora_of, bottleneck_of])
@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_adapters_of_sub_layers_that_are_gone(kind, wrap, tmp_path):
    """They go too, from PEFT's files as well; LoRA there computed nothing any more."""
    base = model_of(kind)
    structures = find_coupled(base)
    empty = {next(each.name for each in structures if (each.mlp is None) == heads) for heads in (True, False)}
    kept = some_kept(base, empty=empty)
    adapted = wrap(copy.deepcopy(base), kind)
    expected = logits_of(zeroed(adapted, kept), kind)
    whole = adapted_layers(base_of(adapted)).keys()
    deftcore.slim(adapted, kept)
    found = logits_of(adapted, kind)
    if wrap is lora_of:
        assert_same(found, expected, 1e-5)
    gone = {axis.module for each in structures if each.name in empty for axis in each.axes}
    assert adapted_layers(base_of(adapted)).keys() == whole - gone != whole
    deftcore.save_slim(adapted, tmp_path)
    assert torch.equal(logits_of(deftcore.load_slim(base, tmp_path).eval(), kind), found)
    full = adapted_layers(base_of(deftcore.expand(base, tmp_path)))
    assert full.keys() == whole
    assert not any(part["default"].weight.any() for name in gone & whole for part in parts_of(full[name]))
