"""Merging an adapter into a weight that two modules share."""

import copy

import peft
import pytest
import torch
import transformers
from conftest import task_type, tiny_batch, tiny_model
from test_package import save_base

import deftcore
from deftcore.methods.deft.export import export
from deftcore.models.tied import merge_and_unload

ENDS = {
    "llama": ("embed_tokens", "lm_head"), "opt": ("embed_tokens", "lm_head"), "gpt2": ("wte", "lm_head"),
    "bert": ("word_embeddings", "decoder"), "mamba": ("embeddings", "lm_head"), "t5": ("shared", "lm_head"),
}  # fmt: skip


def tied_model(family):
    if family == "mamba":
        torch.manual_seed(0)
        config = transformers.MambaConfig(vocab_size=64, hidden_size=32, state_size=8, num_hidden_layers=1)
        return transformers.MambaForCausalLM(config)
    model = tiny_model(family)
    if family == "llama":
        model.config.tie_word_embeddings = True
        model.tie_weights()
    return model


def adapted(model, family, targets, **options):
    config = peft.LoraConfig(
        r=2, target_modules=list(targets), init_lora_weights=False, task_type=task_type(family), **options
    )
    return peft.get_peft_model(model, config).eval()


def batch_of(family):
    batch = tiny_batch(family)
    return {"input_ids": batch["input_ids"]} if family == "mamba" else batch


@pytest.mark.parametrize("which", ["input", "output", "both", "saved"])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "bert", "mamba"])
def test_a_merge_moves_the_tuned_module_only(family, which, tmp_path):
    """The merged model is the adapted one, in memory and from its files, and so is its configuration."""
    start, end = ENDS[family]
    targets = {"input": [start], "output": [end], "both": [start, end], "saved": ["lm_head"]}[which]
    options = {}
    if which == "saved":
        targets, options = [start], {"modules_to_save": [end]}
    model = adapted(tied_model(family), family, targets, **options)
    if which == "saved":
        part = next(m for n, m in model.named_modules() if n.endswith(f"{end}.modules_to_save.default"))
        part.weight.data.normal_()
    with torch.no_grad():
        expected = model(**batch_of(family)).logits
        merged = deftcore.merge(copy.deepcopy(model))
        torch.testing.assert_close(merged(**batch_of(family)).logits, expected, rtol=1e-4, atol=1e-5)
        assert merged.config.tie_word_embeddings is False
        merged.save_pretrained(tmp_path)
        again = type(merged).from_pretrained(tmp_path).eval()
        torch.testing.assert_close(again(**batch_of(family)).logits, expected, rtol=1e-4, atol=1e-5)


def test_untouched_ties_stay():
    model = merge_and_unload(adapted(tied_model("llama"), "llama", ["q_proj"]))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True


@pytest.mark.parametrize("to", ["16bit", "4bit"])
def test_over_a_4bit_base(to):
    """The tied head is dense there: its update is merged exactly in either case."""
    base = deftcore.quantize(tied_model("llama"), block_size=32)
    model = deftcore.patch(adapted(base, "llama", ["lm_head"]))
    batch = batch_of("llama")
    with torch.no_grad():
        expected = model(**batch).logits
        merged = deftcore.merge(model, to=to)
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-5)


def test_sparsify_and_save_sparse(tmp_path):
    model = adapted(tied_model("llama"), "llama", ["lm_head"])
    batch = batch_of("llama")
    with torch.no_grad():
        expected = model(**batch).logits
        deftcore.save_sparse(merge_and_unload(copy.deepcopy(model)), tmp_path / "out")
        torch.testing.assert_close(
            deftcore.load_sparse(tmp_path / "out")(**batch).logits, expected, rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(deftcore.sparsify(model)(**batch).logits, expected, rtol=1e-4, atol=1e-5)


def test_export(tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    save_base(tmp_path / "base", tied_model("llama"))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = adapted(base, "llama", ["lm_head"])
    model.save_pretrained(tmp_path / "adapter")
    export(str(tmp_path / "base"), str(tmp_path / "out"), adapter=str(tmp_path / "adapter"))
    with torch.no_grad():
        expected, batch = model(**batch_of("llama")).logits, batch_of("llama")
        found = deftcore.load_sparse(tmp_path / "out")(**batch).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", _fail)
    with pytest.raises(OSError, match="disk full"):
        export(str(tmp_path / "base"), str(tmp_path / "half"))
    assert not (tmp_path / "half").exists()  # the folder appears whole, its tokenizer with it


def _fail(*_, **__):
    raise OSError("disk full")


@pytest.mark.parametrize("use", [deftcore.merge, deftcore.sparsify])
@pytest.mark.parametrize(("target", "partners"), [("lm_head", "shared"), ("shared", "lm_head")])
def test_refused_where_files_cannot_hold_them_apart(target, partners, use):
    """T5's configuration ties its embeddings whatever it says."""
    model = adapted(tied_model("t5"), "t5", [target])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"{target}: shares its weight with .*{partners}"):
        use(model)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
