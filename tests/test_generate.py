"""`deftcore generate`: every form of a model that lies on disk, streaming, sampling, conversations."""

import io
import json
import shutil

import peft
import pytest
import torch
import transformers
from conftest import tiny_model
from test_package import save_base

import deftcore
from deftcore.cli import generation
from deftcore.cli.main import main
from deftcore.models import decoder_parts
from deftcore.models.checkpoints import load_model
from deftcore.ops.decoder import decode_step
from deftcore.training.adapters import load_adapter

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
PROMPT = "the quick"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, an adapter that changes its tokens, exports of both kinds, and a model with few positions."""
    root = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    for name in ("base", "t5", "short"):
        (root / name).mkdir()
    save_base(root / "base", intermediate_size=128)
    save_base(root / "t5", tiny_model("t5"))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "ffn_dim": 72, "num_attention_heads": 4}
    config = transformers.OPTConfig(vocab_size=64, word_embed_proj_dim=32, max_position_embeddings=20, **sizes)
    save_base(root / "short", transformers.OPTForCausalLM(config))
    options = {"r": 4, "lora_alpha": 64, "init_lora_weights": False, "target_modules": ["q_proj", "up_proj"]}
    adapted = peft.get_peft_model(load_model(root / "base"), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    adapted.save_pretrained(root / "adapter")
    adapter = ["--adapter", str(root / "adapter")]
    assert main(["export", str(root / "base"), str(root / "merged"), *adapter]) == 0
    assert main(["export", str(root / "base"), str(root / "packed"), *adapter, "--quantize", "nf4"]) == 0
    return root


def expected(model, place, new=8):
    """Greedy decoding by hand: the whole sequence through the model for each token."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "base")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    given = ids.shape[1]
    with torch.no_grad():
        for _ in range(new):
            ids = torch.cat([ids, model.eval()(ids).logits[:, -1:].argmax(-1)], 1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
    return tokenizer.decode(ids[0, given:], skip_special_tokens=True)


def test_every_form_of_a_model(place, capsys):
    base, adapter = str(place / "base"), str(place / "adapter")
    four = ["--quantize", "nf4"]
    forms = {
        "dense": ([base], load_model(base)),
        "adapter": ([base, "--adapter", adapter], load_adapter(load_model(base), adapter)),
        "4-bit": ([base, *four], deftcore.load_quantized(base)),
        "4-bit adapter": ([base, *four, "--adapter", adapter], load_adapter(deftcore.load_quantized(base), adapter)),
        "merged": ([str(place / "merged")], deftcore.load_sparse(place / "merged")),
        "packed": ([str(place / "packed")], deftcore.load_sparse(place / "packed")),
    }
    found = {}
    for name, ((model, *options), reference) in forms.items():
        arguments = ["generate", model, PROMPT, *options, "--max-new-tokens", "8"]
        capsys.readouterr()
        assert main(arguments) == 0
        streamed = capsys.readouterr().out
        assert main([*arguments, "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        found[name] = result["text"]
        assert streamed == result["text"] + "\n", name
        assert result["text"] == expected(reference, place), name
        assert 1 <= result["tokens"] <= 8
    assert found["adapter"] != found["dense"]
    assert found["merged"] == found["adapter"]
    assert main(["generate", str(place / "merged"), PROMPT, *four]) == 2
    assert "takes no further adapter and no quantize" in capsys.readouterr().err


@pytest.mark.parametrize("activations", ["exact", "int8"])
def test_tokens_come_from_the_decoder_however_long_the_text(place, monkeypatch, activations):
    """Its cache grows with the text; int8 stays int8."""
    stacks = []

    def step(hidden, stack, *rest):
        stacks.append(stack)
        return decode_step(hidden, stack, *rest)

    monkeypatch.setattr(decoder_parts, "decode_step", step)
    four = {} if activations == "exact" else {"quantize": {"quant_type": "nf4", "block_size": 32}}
    found = []
    for room in (4096, 8):
        monkeypatch.setattr(generation, "_ROOM", room)
        writer = generation.Writer(str(place / "base"), device="cpu", max_new_tokens=8, activations=activations, **four)
        assert writer.decoder.max_length == min(room, writer.model.config.max_position_embeddings)
        stacks.clear()
        found.append(writer.answer(PROMPT).text)
        assert writer.decoder.reason == ""
        given = len(writer.tokenizer(PROMPT).input_ids)
        assert writer.decoder.max_length >= given + 8
        rounded = [stack.head.scales is not None for stack in stacks]
        assert rounded[-7:] == [activations == "int8"] * 7
    assert found[0] == found[1]
    if activations == "exact":
        assert found[0] == expected(load_model(place / "base"), place)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_thresholds_that_lie_beside_an_adapter(place, tmp_path, quantize):
    """The model runs under them, exported or not, and an export of an export keeps them."""
    shutil.copytree(place / "adapter", tmp_path / "adapter")
    thresholds = deftcore.Thresholds("product", {f"model.layers.{i}.mlp": 0.02 for i in range(2)})
    thresholds.save(tmp_path / "adapter")
    base, adapter = str(place / "base"), str(tmp_path / "adapter")
    four = ["--quantize", quantize] if quantize else []
    assert main(["export", base, str(tmp_path / "out"), "--adapter", adapter, *four]) == 0
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "again")]) == 0
    options = {"quantize": {"quant_type": quantize}} if quantize else {}
    writers = [generation.Writer(base, device="cpu", adapter=adapter, max_new_tokens=8, **options)]
    writers += [generation.Writer(str(tmp_path / name), device="cpu", max_new_tokens=8) for name in ("out", "again")]
    for writer in writers:
        levels = [m.tau for m in writer.model.modules() if type(m).__name__ in ("SparseMLP", "SparseMLP4bit")]
        assert levels == [pytest.approx(0.02)] * 2
    assert len({writer.answer(PROMPT).text for writer in writers}) == 1


def test_encoder_decoder(place, capsys):
    assert main(["generate", str(place / "t5"), PROMPT, "--max-new-tokens", "5", "--json"]) == 0
    assert 1 <= json.loads(capsys.readouterr().out)["tokens"] <= 5
    assert main(["generate", str(place / "t5"), PROMPT, "--activations", "int8"]) == 2
    assert "activations: int8 is of models without an encoder" in capsys.readouterr().err


def test_text_streams(place, monkeypatch):
    """Words come one by one, not at the end."""
    written = []
    monkeypatch.setattr(
        transformers.TextStreamer, "on_finalized_text", lambda self, text, stream_end=False: written.append(text)
    )
    assert main(["generate", str(place / "base"), PROMPT, "--max-new-tokens", "20"]) == 0
    assert len(written) > 2


def test_sampling(place, capsys):
    """A seed gives the same text again; a tiny top-p leaves the likeliest token, as does temperature 0."""

    def text(*options):
        capsys.readouterr()
        assert main(["generate", str(place / "base"), PROMPT, "--max-new-tokens", "12", *options]) == 0
        return capsys.readouterr().out

    hot = ["--temperature", "3"]
    assert text(*hot, "--seed", "1") == text(*hot, "--seed", "1")
    assert len({text(*hot, "--seed", str(seed)) for seed in range(3)}) == 3
    assert text(*hot, "--top-p", "1e-6") == text()
    assert main(["generate", str(place / "base"), PROMPT, "--top-p", "0.9"]) == 2
    assert "top_p: is of the sampling, which needs a temperature above 0, got 0.9" in capsys.readouterr().err


def test_stop_strings(place):
    """They need the tokenizer, which Transformers gives no other loop than its own."""
    model = load_model(place / "base").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "base")
    decoder = deftcore.compile_decoder(model, max_length=64)
    ids, options = tokenizer(PROMPT, return_tensors="pt").input_ids, {"max_new_tokens": 8, "do_sample": False}
    free = decoder.generate(ids, **options)
    last = ids.shape[1] + 1
    word = tokenizer.decode(free[0, last])
    found = decoder.generate(ids, **options, stop_strings=[word], tokenizer=tokenizer)
    assert torch.equal(found, free[:, : last + 1])


@pytest.mark.parametrize(
    ("stdin", "message"),
    [(None, "prompt: is needed"), (io.StringIO("abc\udcff"), "prompt: standard input must be UTF-8")],
)
def test_standard_input_that_is_no_prompt(place, monkeypatch, capsys, stdin, message):
    monkeypatch.setattr("sys.stdin", stdin)
    assert main(["generate", str(place / "base")]) == 2
    assert message in capsys.readouterr().err


def test_prompts_from_outside(place, monkeypatch, capsys):
    """A pipe is read whole; a terminal line by line until its end."""
    arguments = ["generate", str(place / "base"), "--max-new-tokens", "4", "--json"]
    monkeypatch.setattr("sys.stdin", io.StringIO("the quick\nbrown fox\n"))
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "the quick\nbrown fox"
    monkeypatch.setattr("sys.stdin", Terminal("the quick\n\nbrown fox\n"))
    assert main(arguments) == 0
    decoder, text, prompts = json.JSONDecoder(), capsys.readouterr().out.replace("> ", ""), []
    while text.strip():
        value, end = decoder.raw_decode(text.lstrip())
        prompts.append(value["prompt"])
        text = text.lstrip()[end:]
    assert prompts == ["the quick", "brown fox"]


def test_chat(place, tmp_path, monkeypatch, capsys):
    """The second prompt comes after the first and its answer, in the model's template."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "base")
    tokenizer.chat_template = TEMPLATE
    load_model(place / "base").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    stored = tmp_path / "tokenizer_config.json"
    names = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}  # as some models' files say
    stored.write_text(json.dumps(json.loads(stored.read_text()) | names))
    seen, generate = [], transformers.LlamaForCausalLM.generate

    def watched(self, input_ids=None, **options):
        seen.append(tokenizer.decode(input_ids[0]))
        return generate(self, input_ids=input_ids, **options)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "generate", watched)
    monkeypatch.setattr("sys.stdin", Terminal("the quick\nbrown fox\n"))
    assert main(["generate", str(tmp_path), "--chat", "--max-new-tokens", "4"]) == 0
    answer = capsys.readouterr().out.split("> ")[1].removesuffix("\n")
    assert seen == ["<user>the quick<a>", f"<user>the quick<assistant>{answer}<user>brown fox<a>"]
    writer = generation.Writer(str(tmp_path), device="cpu", chat=True, max_new_tokens=4)

    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(writer.decoder, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.answer("the quick")
    assert writer.messages == []  # what had no answer is no part of the conversation


def test_what_does_not_fit(place, capsys):
    assert main(["generate", str(place / "short"), PROMPT]) == 2
    assert (
        "prompt and max_new_tokens: must be at most 20, the positions of model.decoder.embed_positions"
        in capsys.readouterr().err
    )
    assert main(["generate", str(place / "base"), ""]) == 2
    assert "prompt: must not be empty" in capsys.readouterr().err
