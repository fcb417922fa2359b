"""Bottleneck adapters as a PEFT method: registration, checkpoints, several adapters, placement."""

import peft
import pytest
import torch
from conftest import FAMILIES, task_type, tiny_batch, tiny_model
from torch import nn

import deftcore  # noqa: F401
from deftcore.adapters import BottleneckConfig
from deftcore.adapters._register import register_with_peft
from deftcore.adapters.bottleneck import BottleneckLayer, BottleneckModel


def randomised(model):
    torch.manual_seed(3)
    for name, p in model.named_parameters():
        if "bottleneck_" in name:
            nn.init.normal_(p, std=0.3)
    return model.eval()


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_second_adapter_and_unload(family, parallel, tmp_path):
    config = BottleneckConfig(task_type=task_type(family), reduction_factor=4, parallel=parallel)
    model = peft.get_peft_model(tiny_model(family), config)
    batch = tiny_batch(family)
    with torch.no_grad():
        base = tiny_model(family).eval()(**batch).logits
        torch.testing.assert_close(model.eval()(**batch).logits, base)  # `up` starts at zero
        adapted = randomised(model)(**batch).logits
        assert (adapted - base).abs().max() > 1e-3
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path).eval()
        assert torch.equal(again(**batch).logits, adapted)
        again.add_adapter("second", BottleneckConfig(task_type=task_type(family), parallel=parallel))
        again.set_adapter("second")
        torch.testing.assert_close(again(**batch).logits, base)
        again.set_adapter("default")
        assert torch.equal(again(**batch).logits, adapted)
        with again.disable_adapter():
            torch.testing.assert_close(again(**batch).logits, base)
        with pytest.raises(ValueError, match="cannot be merged"):
            again.merge_and_unload()
        torch.testing.assert_close(again.unload()(**batch).logits, base)


def test_formula():
    """y + s up(relu(down(y))) after the MLP; y + s up(relu(down(x))) beside it."""
    for parallel in (False, True):
        config = BottleneckConfig(reduction_factor=4, parallel=parallel, scaling=0.1, target_modules=["mlp"])
        model = randomised(peft.get_peft_model(tiny_model("llama"), config))
        layer = next(m for m in model.modules() if isinstance(m, BottleneckLayer))
        x = torch.randn(2, 5, 32)
        y = layer.base_layer(x)
        source = x if parallel else y
        down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
        torch.testing.assert_close(layer(x), y + 0.1 * up(torch.relu(down(source))))
        assert down.out_features == 8
        assert "bottleneck" in repr(layer)


def test_only_the_adapter_trains():
    model = peft.get_peft_model(tiny_model("opt"), BottleneckConfig())
    assert all("bottleneck_" in n for n, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction_factor": 0}, "reduction_factor"),
        ({"non_linearity": "x"}, "non_linearity"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_bad_configuration(change, message):
    with pytest.raises(ValueError, match=message):
        BottleneckConfig(**change)


def test_bad_targets():
    with pytest.raises(ValueError, match="Embedding is neither"):
        peft.get_peft_model(tiny_model("llama"), BottleneckConfig(target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match="not found"):
        peft.get_peft_model(tiny_model("llama"), BottleneckConfig(target_modules=["nothing"]))


def test_registration_guards_names():
    register_with_peft("BOTTLENECK", BottleneckConfig, BottleneckModel)  # again: no harm
    with pytest.raises(ValueError, match="LORA"):
        register_with_peft(peft.PeftType.LORA, BottleneckConfig, BottleneckModel)
