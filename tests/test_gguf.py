"""GGUF files as models: weights, tokenizer and text of the folder they came from, and what is wrong with one."""

import json
import sys

import pytest
import torch
import transformers
from conftest import tiny_model
from test_package import save_base

import deftcore
from deftcore.cli.main import main
from deftcore.models import gguf_files
from deftcore.models.checkpoints import load_tokenizer
from deftcore.models.preflight import empty_model

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed (pip install gguf)")

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
PROMPT = "the quick"


def interleaved(weight, heads):
    """Rows of a head in llama.cpp's order: rotary pairs are neighbours there, halves of a head in Transformers."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(path, model, tokenizer, *, architecture="llama", quantized=False, leave_out=(), extra=()):
    """A Llama and its byte-level tokenizer, as llama.cpp's converter would write them."""
    config, names = model.config, gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_bos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(TEMPLATE)
    for name, weight in model.state_dict().items():
        if name in leave_out or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                weight = interleaved(weight, heads)
        stem, suffix = name.rsplit(".", 1)
        packed = quantized and weight.dim() == 2 and weight.shape[1] % 32 == 0
        kind = gguf.GGMLQuantizationType.Q8_0 if packed else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", gguf.quantize(weight.numpy(), kind), raw_dtype=kind)
    for name, value in dict(extra).items():
        writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A Llama as a folder, and as files of whole and of rounded numbers."""
    root = tmp_path_factory.mktemp("gguf")
    torch.manual_seed(0)
    (root / "base").mkdir()
    model = tiny_model("llama", "silu")
    for config in (model.config, model.generation_config):
        config.bos_token_id = config.eos_token_id = config.pad_token_id = 0  # as the tokenizer has them
    save_base(root / "base", model)
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "base")
    write_gguf(root / "whole.gguf", model, tokenizer)
    write_gguf(root / "rounded.gguf", model, tokenizer, quantized=True)
    return root


def test_weights_and_tokens(place):
    """Every weight of whole numbers is the folder's; the tokenizer gives its tokens."""
    ours, theirs = deftcore.load_model(place / "whole.gguf"), deftcore.load_model(place / "base")
    assert ours.dtype == torch.float32
    assert not hasattr(ours.config, "quantization_config")
    state = theirs.state_dict()
    assert ours.state_dict().keys() == state.keys()
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, state[name]), name
    assert ours.name_or_path == str(place / "whole.gguf")
    tokenizer, other = load_tokenizer(place / "whole.gguf"), load_tokenizer(place / "base")
    assert tokenizer(PROMPT).input_ids == other(PROMPT).input_ids
    assert tokenizer.chat_template == TEMPLATE
    assert deftcore.load_model(place / "whole.gguf", dtype=torch.bfloat16).dtype == torch.bfloat16
    rounded = deftcore.load_model(place / "rounded.gguf").state_dict()
    for name, weight in rounded.items():  # 8 bits, scales in float16
        assert (weight - state[name]).abs().max() <= 1.2 * state[name].abs().max() / 254, name


def test_empty_model_reads_no_weights(place, monkeypatch):
    monkeypatch.setattr(gguf, "dequantize", None)
    empty = empty_model(place / "rounded.gguf")
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert empty.config.hidden_size == empty_model(place / "base").config.hidden_size


def test_commands(place, tmp_path, capsys):
    """generate, density, train and export take a file where they take a folder, and give the same."""
    base, file, data = str(place / "base"), str(place / "whole.gguf"), str(place / "base" / "data.txt")

    def result(*arguments):
        capsys.readouterr()
        assert main([*arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    for options in ([], ["--quantize", "nf4"]):
        found = [result("generate", model, PROMPT, "--max-new-tokens", "6", *options) for model in (base, file)]
        assert found[0]["text"] == found[1]["text"]
    losses = [result("density", model, data, "--max-length", "16")["loss"] for model in (base, file)]
    assert losses[0] == losses[1]
    for name, model in (("folder", base), ("file", file)):
        overrides = [f"model={model}", f"data.train={data}", f"output={tmp_path / name}", "training.max_steps=2",
                     "data.max_length=16"]  # fmt: skip
        losses[name == "file"] = result("train", "deft-lora", *overrides)["train_loss"]
        arguments = ["export", model, str(tmp_path / f"{name}-sparse"), "--adapter", str(tmp_path / name / "final")]
        assert result(*arguments)["merged_adapter"]
    assert losses[0] == losses[1]
    ours, theirs = (deftcore.load_sparse(tmp_path / f"{name}-sparse").state_dict() for name in ("file", "folder"))
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name


def test_what_is_wrong_is_said(place, tmp_path, capsys, monkeypatch):
    whole = (place / "whole.gguf").read_bytes()
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "base")
    write_gguf(tmp_path / "other.gguf", model, tokenizer, architecture="llamalike")
    write_gguf(tmp_path / "lacking.gguf", model, tokenizer, leave_out=["model.layers.0.mlp.up_proj.weight"])
    for name, content in (("empty", b""), ("text", b"no model"), ("mark", whole[:4]), ("header", whole[:300]),
                          ("cut", whole[:-100]), ("version", whole[:4] + b"\xff\xff\0\0" + whole[8:]),
                          ("counts", whole[:8] + b"\xff" * 16 + whole[24:])):  # fmt: skip
        (tmp_path / f"{name}.gguf").write_bytes(content)
        for check in (deftcore.load_model, empty_model, load_tokenizer, deftcore.load_quantized):
            with pytest.raises(ValueError, match=rf"^model: \S*{name}\.gguf (is no GGUF file|cannot be read as GGUF)"):
                check(tmp_path / f"{name}.gguf")
    with pytest.raises(ValueError, match=r"cannot be read as GGUF, .*architecture llamalike is not supported"):
        empty_model(tmp_path / "other.gguf")
    with pytest.raises(ValueError, match=r"lacking\.gguf lacks weights: model\.layers\.0\.mlp\.up_proj\.weight"):
        deftcore.load_model(tmp_path / "lacking.gguf")
    assert main(["generate", str(tmp_path / "cut.gguf"), PROMPT]) == 2
    assert "cut.gguf cannot be read as GGUF" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(gguf_files, "find_spec", lambda name: None)
    gguf_files._config.cache_clear()
    assert main(["generate", str(place / "whole.gguf"), PROMPT]) == 2
    assert "pip install gguf" in capsys.readouterr().err


def test_scaled_positions_are_told(place, tmp_path, caplog):
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "base")
    write_gguf(tmp_path / "scaled.gguf", model, tokenizer, extra={"rope_freqs.weight": torch.ones(4)})
    with caplog.at_level("WARNING", logger="deftcore"):
        empty_model(tmp_path / "scaled.gguf")
    assert "scales its rotary positions" in caplog.text
