"""Bottleneck adapters as a PEFT method: registration, checkpoints, several adapters, placement."""

import copy

import peft
import pytest
import torch
from conftest import FAMILIES, recompute, task_type, tiny_batch, tiny_model
from torch import nn

import deftcore
from deftcore.methods.lora.bottleneck import BottleneckConfig, BottleneckLayer, BottleneckModel, DrawnLinear
from deftcore.training.adapters import register_with_peft


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


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_over_4_bits(family, parallel):
    """The adapter computes in the dtype that was quantised; over the decoded base it gives the same."""
    from test_nn import whole_blocks
    from test_quantize import dequantised

    outputs = []
    packed = deftcore.quantize(whole_blocks(family), block_size=32)
    for base in (dequantised(packed), packed):
        torch.manual_seed(0)
        config = BottleneckConfig(task_type=task_type(family), reduction_factor=4, parallel=parallel)
        model = randomised(peft.get_peft_model(base, config))
        assert {p.dtype for name, p in model.named_parameters() if "bottleneck_" in name} == {torch.float32}
        output = model(**tiny_batch(family))
        output.loss.backward()
        grads = [p.grad for name, p in model.named_parameters() if "bottleneck_" in name]
        outputs.append((output.logits, *grads))
    for ours, reference in zip(outputs[1], outputs[0], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        sparse = deftcore.sparsify(model)
        torch.testing.assert_close(sparse(**tiny_batch(family)).logits, outputs[0][0], rtol=1e-3, atol=1e-4)


def test_over_bitsandbytes(tmp_path):
    import transformers

    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    sizes = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128}  # whole blocks: bitsandbytes needs them
    config = transformers.OPTConfig(vocab_size=64, num_hidden_layers=2, num_attention_heads=4, **sizes)
    transformers.OPTForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    options = transformers.BitsAndBytesConfig(load_in_4bit=True)
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=options, dtype=torch.bfloat16
    )
    model = peft.get_peft_model(base, BottleneckConfig(), autocast_adapter_dtype=False)
    assert {p.dtype for name, p in model.named_parameters() if "bottleneck_" in name} == {torch.bfloat16}
    deftcore.patch(model)(**tiny_batch("opt")).loss.backward()


def test_widths_of_their_own(tmp_path):
    """`r` in place of a factor, other widths by name, without biases, from a normal start; a file brings all of it."""
    config = BottleneckConfig(
        r=4, rank_pattern={"h.1.mlp.c_proj": 2}, bottleneck_bias=False, init_std=0.5, target_modules=["c_proj"]
    )
    model = peft.get_peft_model(tiny_model("gpt2"), config).eval()
    layers = [m for m in model.modules() if isinstance(m, BottleneckLayer)]
    assert [layer.bottleneck_down["default"].weight.shape[0] for layer in layers] == [4, 4, 4, 2]
    assert [layer.bottleneck_up["default"].weight.shape[1] for layer in layers] == [4, 4, 4, 2]
    for layer in layers:
        for part in (layer.bottleneck_down["default"], layer.bottleneck_up["default"]):
            assert part.bias is None
            assert 0.35 < float(part.weight.detach().std()) < 0.65
    with torch.no_grad():
        adapted = model(**tiny_batch("gpt2")).logits
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(tiny_model("gpt2"), tmp_path).eval()
        assert torch.equal(again(**tiny_batch("gpt2")).logits, adapted)


def test_only_the_adapter_trains():
    model = peft.get_peft_model(tiny_model("opt"), BottleneckConfig())
    assert all("bottleneck_" in n for n, p in model.named_parameters() if p.requires_grad)


# ---------------------------------------------------------------------------- two projections, one drawn


def drawn_of(layer, x, calls=24):
    """Which projection each call in training ran; it runs one of them whole, bit for bit."""
    choices = [choice(x) for choice in layer.choices]
    found = []
    for _ in range(calls):
        y = layer(x)
        (number,) = (i for i, each in enumerate(choices) if torch.equal(y, each))
        found.append(number)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_projection_is_drawn(dtype, bias):
    """By the generator alone, each call anew; the other gets no gradient; else both are one, of their mean."""
    torch.manual_seed(0)
    layer, x = DrawnLinear(6, 4, bias=bias).to(dtype), torch.randn(3, 5, 6, dtype=dtype)
    torch.manual_seed(1)
    found = drawn_of(layer, x)
    assert 6 < sum(found) < 18
    torch.manual_seed(1)
    assert drawn_of(layer, x) == found
    torch.manual_seed(1)
    layer(x).sum().backward()
    for number, choice in enumerate(layer.choices):
        assert all(bool(p.grad.any()) == (number == found[0]) for p in choice.parameters())
    layer.eval()
    mean = copy.deepcopy(layer.choices[0])
    for p, other in zip(mean.parameters(), layer.choices[1].parameters(), strict=True):
        p.data = (p.data.double() + other.data.double()).div(2).to(dtype)
    assert torch.equal(layer(x), mean(x))
    state = torch.get_rng_state()
    assert torch.equal(layer(x), mean(x))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_draw_is_no_break_in_a_graph():
    torch.manual_seed(0)
    layer, x = DrawnLinear(6, 4), torch.randn(3, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    found = drawn_of(layer, x, calls=12)
    torch.manual_seed(1)
    assert [int(torch.equal(compiled(x), layer.choices[1](x))) for _ in range(12)] == found


def test_what_is_recomputed_draws_again_what_it_drew():
    """Gradients are those of a run that keeps its activations, in whatever dtype."""
    for dtype in (torch.float32, torch.bfloat16):
        found = []
        for recomputed in (False, True):
            model = tiny_model("llama").to(dtype)
            if recomputed:
                recompute(model)
            config = BottleneckConfig(target_modules=["mlp"], stochastic=True, init_std=0.3)
            torch.manual_seed(2)
            adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=False).train()
            torch.manual_seed(4)
            adapted(**tiny_batch("llama")).loss.backward()
            found.append([p.grad for p in adapted.parameters() if p.requires_grad])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        assert 0 < sum(bool(g.any()) for g in found[0]) < len(found[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction_factor": 0}, "reduction_factor"),
        ({"non_linearity": "x"}, "non_linearity"),
        ({"dropout": 1.0}, "dropout"),
        ({"r": 0}, "r: must be an integer of at least 1, got 0"),
        ({"rank_pattern": {"mlp": 0}}, "rank_pattern: must be an integer of at least 1, got 0"),
        ({"init_std": -1.0}, r"init_std: must be finite and at least 0\.0, got -1\.0"),
        ({"init_std": float("nan")}, r"init_std: must be finite and at least 0\.0, got nan"),
        ({"scaling": float("nan")}, "scaling: must be finite, got nan"),
        ({"scaling": -float("inf")}, "scaling: must be finite, got -inf"),
        ({"reduction_factor": True}, "reduction_factor: must be an integer of at least 1, got True"),
        ({"r": True}, "r: must be an integer of at least 1, got True"),
        ({"rank_pattern": {"mlp": True}}, "rank_pattern: must be an integer of at least 1, got True"),
        ({"stochastic": "false"}, "stochastic: must be true or false, got 'false'"),
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


@pytest.mark.parametrize(("options", "message"), [
    ({"target_modules": ["mlp", "norm"]}, "LlamaRMSNorm is neither"),
    ({"target_modules": ["down_proj"], "parallel": True}, r"layers\.0\.mlp\.down_proj is a linear layer whose MLP"),
])  # fmt: skip
def test_bad_targets_leave_the_model_alone(options, message):
    model = tiny_model("llama")
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(model, BottleneckConfig(**options))
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_registration_guards_names():
    register_with_peft("BOTTLENECK", BottleneckConfig, BottleneckModel)  # again: no harm
    with pytest.raises(ValueError, match="LORA"):
        register_with_peft(peft.PeftType.LORA, BottleneckConfig, BottleneckModel)
