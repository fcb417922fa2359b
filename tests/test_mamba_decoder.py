"""`compile_decoder` with Mamba and Mamba-2 against Transformers, and the native step against its reference."""

import copy
import dataclasses

import pytest
import torch
from conftest import on_threads, recompute
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, FalconMambaConfig, Mamba2Config, MambaConfig
from transformers.models.mamba.modeling_mamba import MambaRMSNorm

import deftcore
from deftcore import ops
from deftcore.models.mamba_decoder import read_mamba
from deftcore.ops.decoder_matrix import Matrix
from deftcore.ops.ssm.decode import MambaStack, mamba_step, mamba_step_ref

SIZES = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": None, "use_cache": True}  # fmt: skip
MODELS = {
    "mamba": MambaConfig(**SIZES, state_size=16, expand=2, conv_kernel=4, tie_word_embeddings=False),
    "mamba-bias": MambaConfig(**SIZES | {"hidden_size": 96}, state_size=5, conv_kernel=3, use_bias=True,
                              use_conv_bias=False, time_step_rank=32),
    "mamba2": Mamba2Config(**SIZES, state_size=24, head_dim=16, num_heads=8, n_groups=2, expand=2, chunk_size=16),
    "mamba2-bias": Mamba2Config(**SIZES | {"hidden_size": 96}, state_size=16, head_dim=24, num_heads=8, n_groups=1,
                                expand=2, chunk_size=8, conv_kernel=2, use_bias=True, tie_word_embeddings=True),
}  # fmt: skip
FORMS = ("float32", "bfloat16", "float16", "nf4", "mixed")


def model_of(kind, form="float32"):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(MODELS[kind]).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # far from ties, so that tokens vary
            if parameter.dim() == 2 and "A_log" not in name:
                parameter.mul_(3)
            elif name.endswith(("norm.weight", "norm_f.weight", "conv1d.bias", "proj.bias")):
                parameter.add_(0.1 * torch.randn_like(parameter))
    if form in ("nf4", "mixed"):
        dense = ["lm_head"] if form == "nf4" else ["lm_head", "out_proj"]
        biased = kind.endswith("bias")  # patch refuses a bias of in_proj, and Transformers' mixers packed bytes
        model = deftcore.quantize(model, block_size=32, skip=[*dense, "dt_proj"] if kind == "mamba-bias" else dense)
        model = model if biased else deftcore.patch(model)
    elif form != "float32":
        model = model.to(getattr(torch, form))
    return model


def prompts(rows=1, length=7, vocabulary=97):
    return torch.randint(2, vocabulary, (rows, length), generator=torch.Generator().manual_seed(3))


def step_of(model, batch=8):
    stack = read_mamba(model, 32)
    generator = torch.Generator().manual_seed(0)
    windows, states = (t.normal_(generator=generator) for t in stack.new_state(batch))
    return stack, torch.randn(batch, stack.width, generator=generator), windows, states


@pytest.mark.parametrize(
    ("kind", "form"), [*((k, f) for k in MODELS for f in ("float32", "nf4", "mixed")), ("mamba", "patched"),
                       ("mamba2", "patched")]
)  # fmt: skip
def test_tokens_are_those_of_transformers(kind, form):
    model = deftcore.patch(model_of(kind)) if form == "patched" else model_of(kind, form)
    decoder = deftcore.compile_decoder(model, max_length=96)
    assert decoder.reason == ""
    tokens = prompts()
    options = {"max_new_tokens": 64, "do_sample": False, "no_repeat_ngram_size": 2}
    expected = model.generate(tokens, **options)
    assert len(set(expected[0, 7:].tolist())) > 3
    assert torch.equal(decoder.generate(tokens, **options), expected)
    assert torch.equal(decoder.generate(tokens[:, :2], **options), model.generate(tokens[:, :2], **options))


@pytest.mark.parametrize("rows", [2, 16])
@pytest.mark.parametrize("kind", MODELS)
def test_a_batch_with_padding(kind, rows):
    model = model_of(kind)
    decoder = deftcore.compile_decoder(model, batch=16, max_length=64)
    tokens, mask = prompts(rows, 9), torch.ones(rows, 9, dtype=torch.int64)
    for row in range(rows):
        mask[row, : row % 5] = tokens[row, : row % 5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 30, "do_sample": False}
    assert torch.equal(decoder.generate(tokens, **options), model.generate(tokens, **options))


def test_sampling_and_what_transformers_alone_can_do():
    model = model_of("mamba")
    decoder = deftcore.compile_decoder(model, batch=2, max_length=64)
    options = {"max_new_tokens": 12, "do_sample": True, "top_p": 0.9, "temperature": 0.8}
    torch.manual_seed(5)
    expected = model.generate(prompts(2), **options)
    torch.manual_seed(5)
    assert torch.equal(decoder.generate(prompts(2), **options), expected)
    result = decoder.generate(prompts(), max_new_tokens=4, return_dict_in_generate=True, output_scores=True)
    assert len(result.scores) == 4
    with pytest.raises(ValueError, match="17 tokens"):
        deftcore.compile_decoder(model, max_length=16).generate(prompts(1, 17))


def test_what_is_refused_says_why():
    def reason(model):
        return deftcore.compile_decoder(model).reason

    falcon = AutoModelForCausalLM.from_config(FalconMambaConfig(**SIZES, state_size=16))
    assert "b_layernorm" in reason(falcon) or "norms the scan's inputs" in reason(falcon)
    config = MambaConfig(**SIZES, hidden_act="relu")
    assert "relu, not silu" in reason(AutoModelForCausalLM.from_config(config))
    limited = dataclasses.replace(MODELS["mamba2"], time_step_limit=(0.0, 0.2))
    assert "time_step_limit" in reason(AutoModelForCausalLM.from_config(limited))
    hooked = model_of("mamba")
    hooked.backbone.layers[1].mixer.conv1d.register_forward_hook(lambda *_: None)
    assert "hooks" in reason(hooked)
    packed = deftcore.quantize(model_of("mamba"), block_size=32, skip=["lm_head"])
    assert "deftcore.patch" in reason(packed)
    other = model_of("mamba2")
    other.backbone.layers[1].norm.variance_epsilon = 2e-3
    assert "several epsilons" in reason(other)
    wrong = deftcore.patch(model_of("mamba"))  # the proof finds what the parts do not tell
    wrong.backbone.layers[0].mixer.decay = lambda: -torch.ones(128, 16)
    assert "differ" in reason(wrong)


def test_the_proof_in_16_bits_is_not_about_roundings():
    """Logits that Transformers' own roundings spoil say nothing of the native step: its forward in float32 does."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(MambaConfig(**SIZES | {"num_hidden_layers": 8})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(3) if parameter.dim() == 2 and "A_log" not in name else None
    tokens, model = prompts(2, 5), model.bfloat16()
    with torch.no_grad():
        rounded, exact = model(tokens).logits, copy.deepcopy(model).float()(tokens).logits
    assert (rounded - exact).abs().max() > 0.1 * exact.abs().max()
    assert deftcore.compile_decoder(model).reason == ""
    model.backbone.layers[3].norm.__class__ = _Doubled
    assert "differ" in deftcore.compile_decoder(model).reason


class _Doubled(MambaRMSNorm):
    """What the parts do not tell."""

    def forward(self, hidden_states):
        return super().forward(hidden_states) + hidden_states.sign()


def test_adapters_are_merged_first():
    model = get_peft_model(model_of("mamba"), LoraConfig(r=2, target_modules=["x_proj"]))
    decoder = deftcore.compile_decoder(model)
    assert "merged first" in decoder.reason
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(decoder.generate(prompts(), **options), model.generate(input_ids=prompts(), **options))
    assert "x_proj" in deftcore.compile_decoder(model.get_base_model()).reason


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tokens", [1, 3, 7])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["mamba", "mamba-bias", "mamba2"])
def test_the_native_step_is_its_reference(kind, form, tokens, threads):
    stack, hidden, *state = step_of(model_of(kind, form))
    hidden, twins = hidden[:tokens], [t.double() for t in state]
    exact = mamba_step_ref(hidden.double(), stack, *twins)
    with on_threads(threads):
        found = mamba_step(hidden, stack, *state)
    for ours, theirs in ((found, exact), *zip(state, twins, strict=True)):
        assert (ours.double() - theirs).abs().max() <= 1e-5 * theirs.abs().max()
        assert ours.isfinite().all()


def test_opcheck():
    stack, hidden, windows, states = step_of(model_of("mamba"))
    args = (hidden, stack.number, windows, states, 97)
    torch.library.opcheck(torch.ops.deftcore.mamba_step.default, args)
    assert "mamba_step" in ops.op_names()


def test_the_steps_errors():
    stack, hidden, windows, states = step_of(model_of("mamba"))
    for change, name in (
        ({"hidden": hidden[:, :5]}, "hidden"), ({"hidden": hidden[:0]}, "hidden"),
        ({"windows": windows[:, :2]}, "windows"), ({"windows": windows[..., :3]}, "windows"),
        ({"states": states[:, :7]}, "states"), ({"states": states[0]}, "states"),
        ({"states": states.mT.contiguous().mT}, "states"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            mamba_step(stack=stack, **({"hidden": hidden, "windows": windows, "states": states} | change))
    with pytest.raises(ValueError, match="states"):
        mamba_step(hidden[:2], stack, windows, states[:, :7].contiguous())
    with pytest.raises(TypeError, match="windows"):
        mamba_step(hidden, stack, windows.double(), states)


@pytest.mark.parametrize(
    ("kind", "change", "name"),
    [
        ("mamba", {"taps": torch.ones(4, 127)}, "taps"), ("mamba", {"a": torch.ones(128)}, "a:"),
        ("mamba", {"d": torch.ones(3)}, "d:"), ("mamba", {"x_proj": None}, "x_proj"),
        ("mamba", {"out_proj": Matrix(torch.ones(64, 127))}, "out_proj"),
        ("mamba", {"gated_norm": torch.ones(128)}, "gated_norm"), ("mamba2", {"gated_norm": None}, "gated_norm"),
        ("mamba2", {"in_proj": Matrix(torch.ones(5, 64))}, "in_proj"),
        ("mamba2", {"dt_bias": torch.ones(3)}, "dt_bias"),
        ("mamba", {"out_proj": Matrix(torch.ones(64, 128), lora_a=torch.ones(2, 128), lora_b=torch.ones(64, 2))},
         "out_proj: must be without lora_a"),
        ("mamba", {"out_proj": Matrix(torch.ones(64, 128), neuron_major=True)}, "out_proj: must be without"),
    ],
)  # fmt: skip
def test_a_layer_that_does_not_fit(kind, change, name):
    stack = read_mamba(model_of(kind), 16)
    layers = [stack.layers[0], dataclasses.replace(stack.layers[1], **change)]
    rest = {"states": stack.states, "eps": stack.eps, "groups": stack.groups, "norm_groups": stack.norm_groups}
    with pytest.raises(ValueError, match=name):
        MambaStack(layers, stack.norm, stack.head, **rest)


def test_a_model_that_gives_no_cache_is_named():
    model = model_of("mamba")
    recompute(model)
    decoder = deftcore.compile_decoder(model.train(), max_length=64)
    ids = torch.randint(2, 97, (1, 20), generator=torch.Generator().manual_seed(3))
    with pytest.raises(ValueError, match=r"gives no cache, as under gradient checkpointing"):
        decoder.generate(ids, max_new_tokens=4, do_sample=False)
