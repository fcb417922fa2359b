"""Weight decay: what shrinks, and what is spared."""

import peft
import pytest
import torch
from conftest import tiny_model

import deftcore
from deftcore.methods.point_peft.classifier import PointClassifier, PointClassifierConfig
from deftcore.training.config import TrainingConfig
from deftcore.training.decay import without_decay
from deftcore.training.loop import train
from deftcore.training.registry import find

EXAMPLES = [{"input_ids": list(range(2, 9))} for _ in range(4)]


def tsvit():
    sizes = {"num_classes": 3, "image_size": 4, "patch_size": 2, "channels": 2, "dim": 8, "heads": 2, "dim_head": 4}
    return deftcore.TSViT(**sizes, temporal_depth=1, spatial_depth=1, mixed_classes=2)


def classifier():
    sizes = {"width": 16, "depth": 1, "heads": 2, "patches": 4, "patch_points": 4}
    return PointClassifier(PointClassifierConfig(classes=3, **sizes))


@pytest.mark.parametrize(
    "make", [lambda: tiny_model("gpt2"), lambda: tiny_model("llama"), lambda: tiny_model("opt"), tsvit, classifier]
)
def test_biases_and_norms_are_spared(make):
    """Which of these models are their vectors, and no others."""
    model = make()
    spared = {id(p) for p in without_decay(model)}
    assert {name for name, p in model.named_parameters() if id(p) in spared} == {
        name for name, p in model.named_parameters() if p.dim() == 1
    }


def moves(model, tmp_path, **options):
    """By name, how far each trained parameter goes in two steps that a decay would make huge ones."""
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    config = TrainingConfig(max_steps=2, batch_size=2, learning_rate=1e-3, weight_decay=300.0, warmup_ratio=0.0)
    train(model, EXAMPLES, config, tmp_path, **options)
    return {name: float((model.get_parameter(name).detach() - p).abs().max()) for name, p in before.items()}


def test_bitfit_decays_nothing(tmp_path):
    model = tiny_model("gpt2")
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.fill_(0.5)
    model = peft.get_peft_model(model, deftcore.BitFitConfig())
    found = moves(model, tmp_path)
    assert max(found.values()) <= 0.0021  # AdamW's own steps; decay alone would take a third of what is there


@pytest.mark.parametrize("method", [None, "galore"])
def test_the_rest_shrinks(tmp_path, method):
    model, options = tiny_model("llama"), {}
    if method is not None:
        record = find(method)
        options["optimizer"] = lambda model: record.optimizer(
            model, record.config(rank=4), TrainingConfig(learning_rate=1e-3, weight_decay=300.0)
        )
    found = moves(model, tmp_path, **options)
    assert {name for name, moved in found.items() if moved <= 0.0021} == {name for name in found if "norm" in name}
