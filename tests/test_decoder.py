"""`compile_decoder` against Transformers' `generate`, and the native step against its reference."""

import copy
import pickle

import pytest
import torch
from conftest import on_threads
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
    StoppingCriteria,
)

import deftcore
from deftcore import ops
from deftcore.models.decoder_parts import read_stack
from deftcore.ops.decoder import decode_step, decode_step_ref
from deftcore.ops.decoder_matrix import Matrix

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip
SCALED = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
MODELS = {
    "llama": LlamaConfig(**SIZES),
    "llama-linear-relu": LlamaConfig(**SIZES, hidden_act="relu", rope_parameters=SCALED, attention_bias=True),
    "smollm": LlamaConfig(**SIZES | {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96},
                          tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, sliding_window=None, head_dim=24),
    "mistral-window": MistralConfig(**SIZES, sliding_window=5),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
    "qwen3-window": Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "gemma": GemmaConfig(**SIZES, head_dim=16),
}  # fmt: skip
FORMS = ("float32", "bfloat16", "float16", "nf4", "mixed")


def model_of(kind, form="float32"):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(MODELS[kind]).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # far from ties, so that tokens vary
            parameter.mul_(3) if parameter.dim() == 2 else parameter.add_(0.1 * torch.randn_like(parameter))
    if form in ("nf4", "mixed"):
        dense = ["lm_head"] if form == "nf4" else ["lm_head", "k_proj", "v_proj", "o_proj", "gate_proj"]
        model = deftcore.quantize(model, block_size=32, skip=dense)
    elif form != "float32":
        model = model.to(getattr(torch, form))
    return model


def prompts(rows=1, length=7, vocabulary=97):
    return torch.randint(2, vocabulary, (rows, length), generator=torch.Generator().manual_seed(3))


def step_of(model, batch=3, length=20):
    stack = read_stack(model, length)
    keys, values = stack.new_cache(batch)
    generator = torch.Generator().manual_seed(0)
    keys.normal_(generator=generator)
    values.normal_(generator=generator)
    return stack, torch.randn(batch, stack.norm.shape[0], generator=generator), keys, values


@pytest.mark.parametrize("form", ["float32", "nf4", "mixed"])
@pytest.mark.parametrize("kind", MODELS)
def test_tokens_are_those_of_transformers(kind, form):
    model = model_of(kind, form)
    decoder = deftcore.compile_decoder(model, max_length=96)
    assert decoder.reason == ""
    tokens = prompts()
    options = {"max_new_tokens": 64, "do_sample": False, "no_repeat_ngram_size": 2}  # tied heads like to repeat
    expected = model.generate(tokens, **options)
    assert len(set(expected[0, 7:].tolist())) > 3
    assert torch.equal(decoder.generate(tokens, **options), expected)
    assert torch.equal(decoder.generate(tokens[:, :3], **options), model.generate(tokens[:, :3], **options))


@pytest.mark.parametrize("rows", [2, 5, 16])
@pytest.mark.parametrize("kind", ["llama", "mistral-window", "qwen3-window"])
def test_a_batch_with_padding(kind, rows):
    model = model_of(kind)
    decoder = deftcore.compile_decoder(model, batch=16, max_length=64)
    tokens, mask = prompts(rows, 9), torch.ones(rows, 9, dtype=torch.int64)
    for row in range(rows):
        mask[row, : row % 5] = tokens[row, : row % 5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False}
    assert torch.equal(decoder.generate(tokens, **options), model.generate(tokens, **options))


def test_end_tokens_stop_and_pad():
    model = model_of("llama")
    decoder = deftcore.compile_decoder(model, batch=4, max_length=64)
    tokens = prompts(4)
    free = model.generate(tokens, max_new_tokens=30, do_sample=False)
    end = int(free[0, 12])
    config = GenerationConfig(max_new_tokens=30, do_sample=False, eos_token_id=end, pad_token_id=0)
    expected = model.generate(tokens, generation_config=config)
    assert torch.equal(decoder.generate(tokens, generation_config=config), expected)
    alone = decoder.generate(tokens[:1], generation_config=config)
    assert int(alone[0, -1]) == end
    assert alone.shape[1] < 37


def test_sampling_streaming_and_processors():
    class Kept:
        def __init__(self):
            self.parts, self.ended = [], 0

        def put(self, value):
            self.parts.append(value)

        def end(self):
            self.ended += 1

    model = model_of("qwen2")
    decoder = deftcore.compile_decoder(model, batch=3, max_length=64)
    options = {"max_new_tokens": 20, "do_sample": True, "top_p": 0.9, "temperature": 0.8, "repetition_penalty": 1.3}
    torch.manual_seed(5)
    expected = model.generate(prompts(), **options)
    torch.manual_seed(5)
    streamer = Kept()
    found = decoder.generate(prompts(), streamer=streamer, **options)
    assert torch.equal(found, expected)
    assert streamer.ended == 1
    assert torch.equal(torch.cat([part.flatten() for part in streamer.parts]), found[0])
    torch.manual_seed(5)
    several = decoder.generate(prompts(), num_return_sequences=3, **options)
    torch.manual_seed(5)
    assert torch.equal(several, model.generate(prompts(), num_return_sequences=3, **options))


def test_what_transformers_alone_can_do(caplog):
    """A log line says so, once each."""
    model = model_of("llama")
    decoder = deftcore.compile_decoder(model, batch=2, max_length=64)
    options = {"max_new_tokens": 10, "do_sample": False, "num_beams": 2}
    assert torch.equal(decoder.generate(prompts(), **options), model.generate(prompts(), **options))
    result = decoder.generate(prompts(), max_new_tokens=4, return_dict_in_generate=True, output_scores=True)
    assert len(result.scores) == 4
    for length in (7, 30):  # read natively, and by the model into its own cache
        static = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
        tokens = prompts(1, length)
        assert torch.equal(decoder.generate(tokens, **static), model.generate(tokens, **static))
    chunks = {"max_new_tokens": 4, "do_sample": False, "prefill_chunk_size": 3}
    assert torch.equal(decoder.generate(prompts(), **chunks), model.generate(prompts(), **chunks))
    assert [record.getMessage() for record in caplog.records if record.name == "deftcore"] == [
        f"Decoder: Transformers decodes where there is {what}"
        for what in ("beam_search", "return_dict_in_generate", "cache_implementation='static'", "prefill_chunk_size")
    ]


def test_the_models_own_configuration_fills_up_a_given_one():
    """As in Transformers: here it asks for beams."""
    model = model_of("llama")
    model.generation_config.num_beams = 2
    decoder = deftcore.compile_decoder(model, batch=2, max_length=64)
    config = GenerationConfig(max_new_tokens=8, do_sample=False)
    expected = model.generate(prompts(), generation_config=config)
    assert expected.shape == (1, 15)
    assert torch.equal(decoder.generate(prompts(), generation_config=config), expected)


def test_what_stops_without_an_end_token_is_not_padded():
    class First(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return torch.tensor([input_ids.shape[1] >= 9, False])

    model = model_of("llama")
    decoder = deftcore.compile_decoder(model, batch=2, max_length=64)
    options = {"max_new_tokens": 12, "do_sample": False, "stopping_criteria": [First()]}
    expected = model.generate(prompts(2), **options)
    assert (expected[0, 9:] != 0).all()
    assert torch.equal(decoder.generate(prompts(2), **options), expected)


def test_an_unsupported_model_says_why_and_generates(caplog):
    config = OPTConfig(vocab_size=97, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2,
                       max_position_embeddings=64, word_embed_proj_dim=32, eos_token_id=None)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    decoder = deftcore.compile_decoder(model)
    assert "opt" in decoder.reason or "OPT" in decoder.reason
    assert decoder.reason in caplog.text
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(decoder.generate(prompts(), **options), model.generate(prompts(), **options))


def test_norms_that_differ_are_refused():
    """One epsilon serves all; what the proof's tokens would not show."""
    for module in ("input_layernorm", "self_attn.q_norm"):
        model = model_of("qwen3")
        model.model.layers[1].get_submodule(module).variance_epsilon = 2e-6
        with pytest.raises(ValueError, match="its norms have several epsilons: 1e-06, 2e-06"):
            read_stack(model, 16)


def test_rotations_that_change_and_other_forwards_are_refused():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    changing = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, rope_parameters=rope))
    assert "dynamic" in deftcore.compile_decoder(changing).reason
    hooked = model_of("llama")
    hooked.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert "hooks" in deftcore.compile_decoder(hooked).reason
    other = model_of("llama")
    other.model.layers[1].self_attn.scaling = 0.7  # the proof finds what the parts do not tell
    assert "differ" in deftcore.compile_decoder(other).reason


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"batch": 0}, ValueError, "batch"),
        ({"batch": 17}, ValueError, "batch"),
        ({"batch": 1.5}, TypeError, "batch"),
        ({"max_length": 0}, ValueError, "max_length"),
        ({"activations": "int4"}, ValueError, "activations"),
    ],
)
def test_bad_options(change, error, name):
    with pytest.raises(error, match=name):
        deftcore.compile_decoder(model_of("llama"), **change)


def test_bad_prompts():
    decoder = deftcore.compile_decoder(model_of("llama"), batch=2, max_length=16)
    with pytest.raises(ValueError, match="input_ids"):
        decoder.generate(prompts(1, 0))
    for token in (-1, 97):
        with pytest.raises(ValueError, match=f"input_ids: must be in 0..96, got {token}"):
            decoder.generate(torch.tensor([[5, token, 7]]))
    with pytest.raises(ValueError, match="input_ids: must be 1 to 2"):
        decoder.generate(prompts(3))
    with pytest.raises(ValueError, match="input_ids: must be 1 to 2"):
        decoder.generate(prompts(0))
    with pytest.raises(ValueError, match="17 tokens"):
        decoder.generate(prompts(1, 17))
    with pytest.raises(ValueError, match="max_new_tokens"):
        decoder.generate(prompts(1, 7), max_new_tokens=10)
    assert decoder.generate(prompts(1, 7), max_new_tokens=9).shape == (1, 16)
    with pytest.raises(TypeError, match="input_ids"):
        decoder.generate([[1, 2]])
    mask = torch.ones(1, 7, dtype=torch.int64)
    mask[0, 3] = 0
    with pytest.raises(ValueError, match="attention_mask"):
        decoder.generate(prompts(), attention_mask=mask)
    with pytest.raises(ValueError, match="attention_mask: must be 0 at padding and 1"):
        decoder.generate(prompts(), attention_mask=torch.full((1, 7), 0.5))
    with pytest.raises(TypeError, match="generation_config"):
        decoder.generate(prompts(), generation_config={"do_sample": False})
    with pytest.raises(ValueError, match="num_return_sequences"):
        decoder.generate(prompts(), num_return_sequences=3, do_sample=True)
    with pytest.raises(ValueError, match="colour"):
        decoder.generate(prompts(), colour="red")


def test_weights_that_change_are_noticed():
    """Some are read where they lie and some were copied: neither the old model's tokens nor a mixture."""
    model = model_of("llama", "bfloat16")
    norm, gate = model.model.norm, model.model.layers[0].mlp.gate_proj
    changes = [
        lambda: norm.weight.detach().mul_(2), lambda: setattr(gate, "weight", torch.nn.Parameter(-gate.weight)),
        lambda: deftcore.quantize(model, block_size=32),
    ]  # fmt: skip
    for change in changes:
        decoder = deftcore.compile_decoder(model, max_length=32)
        decoder.generate(prompts(), max_new_tokens=2)
        change()
        with pytest.raises(ValueError, match="model: its weights were written or replaced"):
            decoder.generate(prompts(), max_new_tokens=2)


def test_hooks_and_thresholds_that_come_later_are_noticed():
    model = deftcore.sparsify(model_of("llama-linear-relu"))
    mlp = model.model.layers[1].mlp
    for change in (lambda: setattr(mlp, "tau", 0.5), lambda: mlp.register_forward_hook(lambda *_: None)):
        decoder = deftcore.compile_decoder(model, max_length=32)
        decoder.generate(prompts(), max_new_tokens=2)
        change()
        with pytest.raises(ValueError, match="model: its modules got hooks or other thresholds"):
            decoder.generate(prompts(), max_new_tokens=2)


def test_hooks_on_the_head_are_refused():
    model = model_of("llama")
    model.lm_head.register_forward_hook(lambda *_: None)
    assert "head has hooks" in deftcore.compile_decoder(model).reason


def test_nan_logits():
    model = model_of("llama")
    decoder = deftcore.compile_decoder(model, max_length=32)
    model.lm_head.weight.data[5, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="NaN"):
        decoder.generate(prompts(), max_new_tokens=4)


@pytest.mark.parametrize("form", ["float32", "bfloat16", "nf4"])
@pytest.mark.parametrize("name", ["model.norm", "model.layers.1.input_layernorm", "lm_head"])
def test_a_model_that_is_nan_is_called_so(name, form):
    model = model_of("llama", form)
    weight = model.get_submodule(name).weight.data
    weight.view(-1)[3] = torch.nan
    assert "NaN" in deftcore.compile_decoder(model, max_length=32).reason


@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_copies_decode_with_weights_of_their_own(way):
    model = model_of("llama", "nf4")
    decoder = deftcore.compile_decoder(model, batch=2, max_length=32, activations="int8")
    wanted = decoder.generate(prompts(), max_new_tokens=4)
    other = pickle.loads(pickle.dumps(decoder)) if way == "pickle" else copy.deepcopy(decoder)
    assert (other.reason, other.batch, other.max_length, other.activations) == ("", 2, 32, "int8")
    assert other.model is not model
    model.lm_head.weight.data.zero_()
    assert torch.equal(other.generate(prompts(), max_new_tokens=4), wanted)
    with pytest.raises(TypeError, match="DecoderStack: holds addresses"):
        copy.deepcopy(decoder._steps)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tokens", [1, 2, 3, 7])
@pytest.mark.parametrize("form", FORMS)
def test_the_native_step_is_its_reference(form, tokens, threads):
    model = model_of("qwen3-window", form)
    stack, hidden, keys, values = step_of(model, batch=8)
    hidden, starts = hidden[:tokens], torch.arange(tokens) % 3
    twins = [t.double() for t in (keys, values)]
    exact = decode_step_ref(hidden.double(), stack, *twins, starts, 9)
    with on_threads(threads):
        found = decode_step(hidden, stack, keys, values, starts, 9)
    scale = exact.abs().max()
    assert (found.double() - exact).abs().max() <= 1e-5 * scale
    for ours, theirs in zip((keys, values), twins, strict=True):
        assert (ours.double() - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("kind", ["llama", "smollm", "qwen3-window"])
@pytest.mark.parametrize("form", ["float32", "bfloat16", "nf4"])
@pytest.mark.parametrize(("sequences", "steps"), [(1, 1), (1, 7), (2, 5), (3, 16)])
def test_several_positions_at_once(kind, form, sequences, steps):
    """A prompt, part of it padding, behind two positions that were read before."""
    stack, _, keys, values = step_of(model_of(kind, form), batch=4)
    hidden = torch.randn(sequences, steps, stack.norm.shape[0])
    starts = torch.tensor([0, 4, 2])[:sequences].clamp(max=1 + steps)
    twins = [t.double() for t in (keys, values)]
    exact = decode_step_ref(hidden.double(), stack, *twins, starts, 2)
    found = decode_step(hidden, stack, keys, values, starts, 2)
    assert (found.double() - exact).abs().max() <= 1e-5 * exact.abs().max()
    for ours, theirs in zip((keys, values), twins, strict=True):
        for row, start in enumerate(starts.tolist()):  # of padding nothing is read
            seen = slice(max(start, 2), None)
            difference = (ours[:, row, :, seen].double() - theirs[:, row, :, seen]).abs().max()
            assert difference <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("length", [1, 8, 9, 16, 17, 40])  # read natively up to 16 tokens
@pytest.mark.parametrize("rows", [1, 2])
def test_prompts_of_any_length(length, rows):
    model = model_of("mistral-window")
    decoder = deftcore.compile_decoder(model, batch=3, max_length=80)
    tokens, mask = prompts(rows, length), torch.ones(rows, length, dtype=torch.int64)
    for row in range(1, rows):
        mask[row, : length - 1] = tokens[row, : length - 1] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(decoder.generate(tokens, **options), model.generate(tokens, **options))


def test_opcheck():
    stack, hidden, keys, values = step_of(model_of("llama"))
    args = (hidden.unsqueeze(1), stack.number, keys, values, torch.tensor([0, 1, 2]), 4, 97)
    torch.library.opcheck(torch.ops.deftcore.decode_step.default, args)
    assert "decode_step" in ops.op_names()


def test_the_steps_errors():
    stack, hidden, keys, values = step_of(model_of("llama"))
    starts = torch.zeros(3, dtype=torch.int64)
    for change, name in (
        ({"hidden": hidden[:, :5]}, "hidden"), ({"hidden": hidden[:0]}, "hidden"), ({"keys": keys[:, :2]}, "keys"),
        ({"values": values[..., :3]}, "values"), ({"starts": starts + 5}, "starts"), ({"starts": starts[:2]}, "starts"),
        ({"position": 20}, "position"), ({"position": -1}, "position"), ({"position": True}, "position"),
    ):  # fmt: skip
        good = {"hidden": hidden, "keys": keys, "values": values, "starts": starts, "position": 4}
        with pytest.raises(ValueError, match=name):
            decode_step(stack=stack, **(good | change))
    with pytest.raises(ValueError, match="whole blocks"):
        Matrix(ops.quantize_4bit(torch.randn(3, 40), block_size=32))
