"""BitFit: which biases train, that nothing else does, and that a merge is exact."""

import copy

import peft
import pytest
import torch
from conftest import tiny_batch, tiny_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

import deftcore
from deftcore import BitFitConfig
from deftcore.models.tied import merge_and_unload
from deftcore.training.registry import find
from deftcore.training.wrapping import add_adapter, check_adapter


class Encoder(nn.Module):
    """Two blocks in which every kind of module with a bias stands, and one linear layer without."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(6)
        self.bias = nn.Parameter(torch.ones(6))  # of a module with children

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.norm(x) + self.bias


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(6), nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.conv, self.batch = nn.Conv1d(6, 6, 1), nn.BatchNorm1d(6)

    def forward(self, x):
        y = self.out(self.qkv(self.norm(x)))
        return x + self.batch(self.conv(y.transpose(1, 2))).transpose(1, 2)


def encoder(dtype=torch.float32):
    torch.manual_seed(0)
    return Encoder().to(dtype).eval()


def moved(model):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape).to(p.dtype))
    return model.eval()


def chosen(model):
    kept = (name for name, p in model.named_parameters() if p.requires_grad)
    return {name.removeprefix("base_model.model.").removesuffix(".bitfit_bias.default") for name in kept}


X = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1))
BLOCK = ("norm", "out", "conv", "batch")
IN_BLOCKS = {f"blocks.{i}.{name}" for i in range(2) for name in BLOCK}


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({}, IN_BLOCKS | {"norm"}),
        ({"exclude_modules": ["blocks.0.norm", "conv"]}, {"norm", "blocks.1.norm"} | {
            f"blocks.{i}.{name}" for i in range(2) for name in ("out", "batch")}),
        ({"target_modules": ["out", "conv"]}, {f"blocks.{i}.{name}" for i in range(2) for name in ("out", "conv")}),
        ({"target_modules": r"blocks\..*"}, IN_BLOCKS),
        ({"new_biases": ["qkv"]}, IN_BLOCKS | {"norm", "blocks.0.qkv", "blocks.1.qkv"}),
        ({"target_modules": ["blocks.1.out"], "new_biases": r".*\.0\.qkv"}, {"blocks.1.out", "blocks.0.qkv"}),
    ],
)  # fmt: skip
def test_what_trains(options, want):
    """After a step exactly those biases, and the count is their sizes' sum."""
    plain = encoder()
    model = peft.get_peft_model(encoder(), BitFitConfig(**options)).train()
    assert chosen(model) == want
    assert model.get_nb_trainable_parameters()[0] == 6 * len(want)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0)
    # A constant shift goes through no BatchNorm in training: those before one have no gradient but rounding's.
    model.eval()(X).square().sum().backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}
    bare = model.unload().state_dict()
    assert bare.keys() == plain.state_dict().keys()
    assert all(torch.equal(bare[name], value) for name, value in plain.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_the_start_the_model_is_the_base_bit_for_bit(dtype):
    model = peft.get_peft_model(encoder(dtype), BitFitConfig(new_biases=["qkv"]))
    assert torch.equal(model(X.to(dtype)), encoder(dtype)(X.to(dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_merge_and_unmerge_are_exact(dtype):
    x = X.to(dtype)
    model = moved(peft.get_peft_model(encoder(dtype), BitFitConfig()))
    want, before = model(x), copy.deepcopy(model.state_dict())
    assert not torch.equal(want, encoder(dtype)(x))
    model.merge_adapter()
    assert torch.equal(model(x), want)
    model.unmerge_adapter()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    merged = model.merge_and_unload()
    assert torch.equal(merged(x), want)
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())


def test_a_new_bias_is_the_layers_own_after_a_merge():
    model = moved(peft.get_peft_model(encoder(), BitFitConfig(target_modules=["out"], new_biases=["qkv"])))
    want = model(X)
    model.merge_adapter()
    torch.testing.assert_close(model(X), want)
    model.unmerge_adapter()
    assert torch.equal(model(X), want)
    assert model.base_model.model.blocks[0].qkv.base_layer.bias is None
    merged = model.merge_and_unload()
    assert merged.blocks[0].qkv.bias.shape == (6,)
    torch.testing.assert_close(merged(X), want)


def test_an_adapter_added_to_a_merged_model_starts_from_the_base():
    model = moved(peft.get_peft_model(encoder(), BitFitConfig(new_biases=["qkv"])))
    model.merge_adapter()
    model.add_adapter("second", BitFitConfig(new_biases=["qkv"]))
    model.set_adapter("second")  # which unmerges
    assert torch.equal(model(X), encoder()(X))


def test_several_active_adapters_add_up():
    model = moved(peft.get_peft_model(encoder(), BitFitConfig(target_modules=["norm"])))
    model.add_adapter("second", BitFitConfig(target_modules=["out"]))
    model.set_adapter("second")
    moved(model)
    model.base_model.set_adapter(["default", "second"])
    plain, layers = encoder(), dict(model.base_model.model.named_modules())
    with torch.no_grad():
        for name, module in plain.named_modules():
            if type(layers[name]).__name__ == "BitFitLayer":
                module.bias.copy_(next(iter(layers[name].bitfit_bias.values())))
    assert torch.equal(model(X), plain(X))
    torch.testing.assert_close(model.merge_and_unload()(X), plain(X))


def test_code_that_reads_the_bias_gets_the_trained_one():
    """PyTorch's attention computes with its output projection's bias itself."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=True)
    model = moved(peft.get_peft_model(nn.Sequential(layer), BitFitConfig())).train()
    want = model(X)
    want.sum().backward()
    assert model.base_model.model[0].self_attn.out_proj.bitfit_bias["default"].grad.any()
    torch.testing.assert_close(model.merge_and_unload()(X), want)


def test_over_four_bits():
    base = deftcore.quantize(tiny_model("opt").eval())
    model = moved(peft.get_peft_model(copy.deepcopy(base), BitFitConfig(task_type="CAUSAL_LM")))
    ids = tiny_batch("opt")["input_ids"]
    want = model(input_ids=ids).logits
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)
    assert torch.equal(model.merge_and_unload()(input_ids=ids).logits, want)


def test_biases_of_a_model_without_any():
    config = BitFitConfig(new_biases=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_model("llama"), config)
    assert model.get_nb_trainable_parameters()[0] == 2 * 32
    model(**tiny_batch("llama")).loss.backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


def test_merging_leaves_tied_embeddings_tied():
    model = moved(peft.get_peft_model(tiny_model("bert"), BitFitConfig()))
    merged = merge_and_unload(model)
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert merged.config.tie_word_embeddings


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", {}, "model: LlamaForCausalLM has no module with a bias; new_biases names linear layers"),
        ("opt", {"target_modules": ["embed_tokens"]}, r"target_modules: .*embed_tokens has no bias; .*new_biases"),
        ("opt", {"new_biases": ["embed_tokens"]}, r"new_biases: .*embed_tokens must be a linear layer, got Embedding"),
        ("llama", {"new_biases": ["q_prj"]}, "new_biases: no module named 'q_prj'; did you mean q_proj"),
    ],
)
def test_bad_choices(family, options, message):
    model = tiny_model(family)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(model, BitFitConfig(task_type="CAUSAL_LM", **options))
    assert [name for name, _ in model.named_modules()] == names


def test_as_a_method():
    model = add_adapter(tiny_model("opt"), "bitfit", {"target_modules": ["fc1"]})
    assert all(name.endswith("fc1") for name in chosen(model))
    check_adapter(tiny_model("opt").to("meta"), find("bitfit"), {})
    with pytest.raises(ValueError, match=r"adapter: model: .* has no module with a bias"):
        check_adapter(tiny_model("llama").to("meta"), find("bitfit"), {})


def test_compiled():
    model = moved(peft.get_peft_model(encoder(), BitFitConfig(new_biases=["qkv"])))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), model(X))
