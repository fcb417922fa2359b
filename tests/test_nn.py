"""sparsify and SparseMLP: I7 and the refusal of what is not understood."""

import copy
import pickle

import peft
import pytest
import torch
from conftest import FAMILIES, tiny_batch, tiny_model
from torch import nn

import deftcore
from deftcore.nn import SparseMLP, find_mlp_blocks


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
    from deftcore.integrations.transformers import greedy_decode

    model = tiny_model("llama").eval()
    sparse = deftcore.sparsify(copy.deepcopy(model))
    dense_tokens, dense_logits = greedy_decode(model, torch.tensor([[1, 2, 3]]), 12)
    tokens, logits = greedy_decode(sparse, torch.tensor([[1, 2, 3]]), 12)
    assert torch.equal(tokens, dense_tokens)
    torch.testing.assert_close(logits, dense_logits, rtol=1e-4, atol=1e-5)


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
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj: must be torch\.nn\.Linear"):
        deftcore.sparsify(model)
    assert type(model.model.layers[0].mlp).__name__ == "LlamaMLP"
    with pytest.raises(ValueError, match="skip: no MLP block named nope"):
        deftcore.sparsify(tiny_model("llama"), skip=["nope"])
    with pytest.raises(ValueError, match="path:"):
        deftcore.sparsify(tiny_model("llama"), path="fast")
    with pytest.raises(ValueError, match="Conv1d has no MLP block"):
        deftcore.sparsify(nn.Conv1d(1, 1, 1))
