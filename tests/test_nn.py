"""sparsify and SparseMLP: I7 and the refusal of what is not understood."""

import copy
import pickle

import peft
import pytest
import torch
import transformers
from conftest import FAMILIES, tiny_batch, tiny_model
from torch import nn

import deftcore
from deftcore.methods.lora.bottleneck import BottleneckConfig
from deftcore.models.blocks import find_mlp_blocks
from deftcore.nn import SparseMLP, SparseMLP4bit


@pytest.mark.parametrize("path", ["sparse", "dense"])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_function(family, path):
    model = tiny_model(family).eval()
    batch = tiny_batch(family)
    with torch.no_grad():
        ref = model(**batch).logits
        sparse = deftcore.sparsify(copy.deepcopy(model), path=path)
        torch.testing.assert_close(sparse(**batch).logits, ref, rtol=1e-4, atol=1e-5)
    assert [b.neurons for b in sparse.deftcore_blocks] == [72] * len(find_mlp_blocks(model))
    assert not any(p.requires_grad for m in sparse.modules() if isinstance(m, SparseMLP) for p in m.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_and_unmerged_lora(family):
    """I7, with LoRA on every projection, biases included."""
    config = peft.LoraConfig(r=5, lora_alpha=7, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(tiny_model(family), config).eval()
    batch = tiny_batch(family)
    with torch.no_grad():
        ref = model(**batch).logits
        for merge in (True, False):
            sparse = deftcore.sparsify(copy.deepcopy(model), merge=merge, path="sparse")
            torch.testing.assert_close(sparse(**batch).logits, ref, rtol=1e-3, atol=1e-4)


def test_gated_t5_and_smooth_activations():
    for family, activation in (("t5", "gated-gelu"), ("llama", "silu"), ("bert", "gelu")):
        model = tiny_model(family, activation).eval()
        with torch.no_grad():
            ref = model(**tiny_batch(family)).logits
            sparse = deftcore.sparsify(copy.deepcopy(model), tau=0.0)
            torch.testing.assert_close(sparse(**tiny_batch(family)).logits, ref, rtol=1e-4, atol=1e-5)


def test_cached_decoding_matches():
    model = tiny_model("llama").eval()
    sparse = deftcore.sparsify(copy.deepcopy(model))
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    dense, found = (each.generate(torch.tensor([[1, 2, 3]]), **options) for each in (model, sparse))
    assert torch.equal(found.sequences, dense.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(dense.logits), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = tiny_model("llama").to(dtype).eval()
    sparse = deftcore.sparsify(copy.deepcopy(model), path="sparse")
    with torch.no_grad():
        ref = model.float()(**tiny_batch("llama")).logits
        ours = sparse(**tiny_batch("llama")).logits.float()
    assert (ours - ref).abs().max() < 0.05 * ref.abs().max()


def test_module_survives_copies():
    model = deftcore.sparsify(tiny_model("llama"))
    mlp = model.model.layers[0].mlp
    x = torch.randn(2, 32)
    again = pickle.loads(pickle.dumps(mlp))
    other = SparseMLP(*(torch.zeros(72, 32), torch.zeros(72, 32), torch.zeros(32, 72)), activation="relu")
    other.load_state_dict(mlp.state_dict())
    for copied in (again, other, copy.deepcopy(mlp)):
        assert torch.equal(copied(x), mlp(x))
    assert "neurons=72" in repr(mlp)
    assert "gated" in repr(mlp)


def test_refusals_name_the_layer_and_change_nothing():
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj = nn.Sequential(nn.Linear(72, 32))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj: must be torch\.nn\.Linear, Linear4bit"):
        deftcore.sparsify(model)
    assert type(model.model.layers[0].mlp).__name__ == "LlamaMLP"
    with pytest.raises(ValueError, match="skip: no MLP block named nope"):
        deftcore.sparsify(tiny_model("llama"), skip=["nope"])
    with pytest.raises(ValueError, match="path:"):
        deftcore.sparsify(tiny_model("llama"), path="fast")
    for tau in (-1.0, float("nan"), {"model.layers.0.mlp": float("inf")}):
        with pytest.raises(ValueError, match="tau: must be finite and at least 0"):
            deftcore.sparsify(tiny_model("llama"), tau=tau)
    with pytest.raises(ValueError, match="Conv1d has no MLP block"):
        deftcore.sparsify(nn.Conv1d(1, 1, 1))


def whole_blocks(family):
    """A tiny model whose down projections are whole blocks of 32."""
    model = tiny_model(family)
    config = copy.deepcopy(model.config)
    name = {"opt": "ffn_dim", "t5": "d_ff"}.get(family, "intermediate_size")
    setattr(config, name, 96)
    torch.manual_seed(0)
    return type(model)(config).eval()


@pytest.mark.parametrize("path", ["sparse", "dense", "auto"])
@pytest.mark.parametrize("family", FAMILIES)
def test_4bit_same_function(family, path, caplog):
    """The quantised model and its sparse form, plain and with unmerged LoRA on every projection."""
    model = deftcore.quantize(whole_blocks(family), block_size=32)
    config = peft.LoraConfig(r=5, lora_alpha=7, target_modules="all-linear", init_lora_weights=False)
    batch = tiny_batch(family)
    for adapted in (model, deftcore.patch(peft.get_peft_model(copy.deepcopy(model), config).eval())):
        with torch.no_grad():
            ref = adapted(**batch).logits
            sparse = deftcore.sparsify(copy.deepcopy(adapted), path=path)
            torch.testing.assert_close(sparse(**batch).logits, ref, rtol=1e-3, atol=1e-4)
        kinds = [type(m) for m in sparse.modules() if isinstance(m, (SparseMLP, SparseMLP4bit))]
        assert set(kinds) == {SparseMLP if family == "t5" else SparseMLP4bit}
        assert len(kinds) == len(find_mlp_blocks(model))
    if family == "t5":  # Transformers keeps wo in float32
        assert "is 4-bit in part; its packed projections were decoded" in caplog.text


def test_4bit_bitsandbytes(tmp_path):
    """A model that Transformers quantised with bitsandbytes, patched, then sparse."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        hidden_act="relu",
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    options = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=options)
    with pytest.raises(ValueError, match=r"mlp\.up_proj: must be .*, a patched bitsandbytes layer"):
        deftcore.sparsify(model)
    deftcore.patch(model)
    batch = tiny_batch("llama")
    with torch.no_grad():
        ref = model(**batch).logits
        sparse = deftcore.sparsify(model)
        assert isinstance(sparse.model.layers[0].mlp, SparseMLP4bit)
        torch.testing.assert_close(sparse(**batch).logits, ref, rtol=1e-3, atol=1e-4)


def test_4bit_module_survives_copies():
    model = deftcore.quantize(whole_blocks("llama"), block_size=32)
    config = peft.LoraConfig(r=2, target_modules=["gate_proj", "down_proj"], init_lora_weights=False)
    mlp = deftcore.sparsify(peft.get_peft_model(model, config)).base_model.model.model.layers[0].mlp
    x = torch.randn(3, 32)
    other = copy.deepcopy(mlp)
    for parameter in other.lora.values():
        parameter.data.zero_()
    assert not torch.equal(other(x), mlp(x))
    other.load_state_dict(mlp.state_dict())
    for copied in (pickle.loads(pickle.dumps(mlp)), other, copy.deepcopy(mlp)):
        assert torch.equal(copied(x), mlp(x))
    half = copy.deepcopy(mlp).to(torch.bfloat16)
    assert half.down.absmax.dtype == torch.float32
    error = (half(x.bfloat16()).float() - mlp(x)).norm() / mlp(x).norm()
    assert error < 0.05
    assert "neurons=96, gated" in repr(mlp)
    ragged = deftcore.quantize(tiny_model("llama"), block_size=64)  # 72 neurons: rows of down are not whole blocks
    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp\.down_proj: needs a matrix whose rows are whole blocks of 64"
    ):
        deftcore.sparsify(ragged)


def test_gates_fold_into_4bit():
    from deftcore import DensityLoss

    model = deftcore.quantize(whole_blocks("llama"), block_size=32)
    objective = DensityLoss(model, adaptive="gate")
    with torch.no_grad():
        objective.gates.theta.copy_(torch.tensor([0.3, -1.2]))
        expected = model(**tiny_batch("llama")).logits
        objective.fold_gates()
        torch.testing.assert_close(model(**tiny_batch("llama")).logits, expected, rtol=1e-4, atol=1e-5)


def gated_lora(*targets):
    """A Llama with LoRA and adaptive gates, its objective, and a batch."""
    config = peft.LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False)
    model = peft.get_peft_model(tiny_model("llama"), config).eval()
    return model, deftcore.DensityLoss(model, adaptive="gate"), tiny_batch("llama")


def test_skippable_names_fit_an_adapted_model():
    """Blocks have the base model's names, so that they survive the merge; a skipped block gives zero."""
    model, objective, batch = gated_lora("gate_proj", "down_proj")
    with torch.no_grad():
        objective.gates.theta.copy_(torch.tensor([1.0, -9.0]))
        assert objective.skippable() == ["model.layers.1.mlp"]
        reference = copy.deepcopy(model)
        down = reference.base_model.model.model.layers[1].mlp.down_proj
        down.base_layer.weight.zero_()
        down.lora_B["default"].weight.zero_()
        sparse = deftcore.sparsify(model, skip=objective.skippable())
        torch.testing.assert_close(sparse(**batch).logits, reference(**batch).logits, rtol=1e-4, atol=1e-5)


def test_sparsify_checks_before_it_merges():
    """What is refused leaves adapter, gates and weights alone."""
    model, objective, batch = gated_lora("q_proj", "down_proj")
    with torch.no_grad():
        before = model(**batch).logits
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for wrong in ({"skip": ["nope"]}, {"tau": {"nope": 0.1}}, {"path": "fast"}):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                deftcore.sparsify(model, **wrong)
        last = model.base_model.model.model.layers[1].mlp
        last.up_proj = nn.Sequential(last.up_proj)
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: must be"):
            deftcore.sparsify(model)
        last.up_proj = last.up_proj[0]
        last.act_fn = nn.Tanh()
        objective.detach()
        with pytest.raises(ValueError, match="Tanh has no kernel"):
            deftcore.sparsify(model)
        last.act_fn = nn.ReLU()
        assert torch.equal(model(**batch).logits, before)
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        bottleneck = peft.get_peft_model(tiny_model("llama"), BottleneckConfig())
        with pytest.raises(ValueError, match="merge: a bottleneck adapter is not linear"):
            deftcore.sparsify(bottleneck, merge=True)


@pytest.mark.parametrize("method", ["none", "lora", "bottleneck"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_sparse_form_is_not_saved_as_if_it_were_dense(family, method, tmp_path):
    """Its names are not Transformers': loading would fill the MLPs with random numbers."""
    model = tiny_model(family)
    if method != "none":
        config = peft.LoraConfig(r=2) if method == "lora" else BottleneckConfig()
        model = peft.get_peft_model(model, config)
    sparse = deftcore.sparsify(model, merge=False)
    for saved in (sparse, sparse.base_model, sparse if method == "none" else sparse.get_base_model()):
        with pytest.raises(ValueError, match=r"save_pretrained: the model is in its sparse form.*save_sparse"):
            saved.save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="in its sparse form already"):
        deftcore.sparsify(sparse)
    with pytest.raises(ValueError, match="in its sparse form already"):
        deftcore.save_sparse(sparse, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    pickle.loads(pickle.dumps(sparse))


@pytest.mark.parametrize("family", ["opt", "bert"])
def test_unmerged_lora_keeps_its_bias(family):
    """PEFT's `lora_bias` adds scaling * B.bias."""
    config = peft.LoraConfig(r=4, lora_alpha=7, lora_bias=True, target_modules=r".*(fc1|fc2|dense)")
    model = peft.get_peft_model(tiny_model(family), config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(p, std=0.2)
        ref = model(**tiny_batch(family)).logits
        sparse = deftcore.sparsify(model, merge=False)
        torch.testing.assert_close(sparse(**tiny_batch(family)).logits, ref, rtol=1e-4, atol=1e-5)


def test_merge_after_sparsify_is_refused():
    """Over 4-bit bases sparsify keeps LoRA unmerged beside the sparse blocks."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        hidden_act="relu",
    )  # fmt: skip
    model = deftcore.quantize(transformers.LlamaForCausalLM(config), block_size=32)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    deftcore.sparsify(deftcore.patch(model))
    with pytest.raises(ValueError, match="model: is in its sparse form already"):
        deftcore.merge(model)
