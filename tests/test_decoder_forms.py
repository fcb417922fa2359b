"""`compile_decoder` over sparse MLPs and under LoRA, and what its proof finds."""

import dataclasses

import peft
import pytest
import torch
from conftest import on_threads
from test_decoder import SIZES, model_of, prompts, step_of
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config

import deftcore
from deftcore.models.decoder_parts import LlamaSteps, read_stack
from deftcore.models.decoder_steps import prove
from deftcore.ops.decoder import decode_step, decode_step_ref
from deftcore.ops.decoder_matrix import Matrix

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
GREEDY = {"max_new_tokens": 64, "do_sample": False, "no_repeat_ngram_size": 2}


def same_tokens(model, rows=1, **options):
    decoder = deftcore.compile_decoder(model, batch=16, max_length=96)
    assert decoder.reason == ""
    tokens, options = prompts(rows, 9), GREEDY | options
    if rows > 1:
        options["attention_mask"] = (torch.arange(9) >= (torch.arange(rows) % 5)[:, None]).long()
    found = decoder.generate(tokens, **options)
    assert torch.equal(found, model.generate(input_ids=tokens, **options))
    return decoder


def lora(model, targets=EVERY, rank=5, **options):
    config = peft.LoraConfig(r=rank, lora_alpha=3, target_modules=targets, task_type="CAUSAL_LM", **options)
    torch.manual_seed(2)
    model = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def relu(form="float32"):
    return model_of("llama-linear-relu", form)


# ---------------------------------------------------------------------------- sparse MLPs


@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("form", ["float32", "nf4"])
def test_sparse_tokens_are_those_of_transformers(form, rows):
    model = deftcore.sparsify(relu(form), skip=["model.layers.1.mlp"] if rows == 3 else ())
    decoder = same_tokens(model, rows)
    assert decoder._steps.stack.blocks[0].tau == 0
    assert (decoder._steps.stack.blocks[1].up is None) == (rows == 3)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tokens", [1, 2, 5, 16])
@pytest.mark.parametrize("form", ["float32", "bfloat16", "float16", "nf4"])
@pytest.mark.parametrize("kind", ["llama-linear-relu", "qwen3-window"])
def test_the_sparse_step_is_its_reference(kind, form, tokens, threads):
    model = deftcore.sparsify(model_of(kind, form))
    stack, hidden, keys, values = step_of(model, batch=16)
    hidden, starts = hidden[:tokens], torch.arange(tokens) % 3
    twins = [t.double() for t in (keys, values)]
    exact = decode_step_ref(hidden.double(), stack, *twins, starts, 9)
    with on_threads(threads):
        found = decode_step(hidden, stack, keys, values, starts, 9)
    bound = 1e-5 if stack.activation == "relu" else 1e-3  # neurons on the threshold count or not
    assert (found.double() - exact).abs().max() <= bound * exact.abs().max()


def test_the_threshold_counts():
    """What is not above it is zero, token by token, as in the module."""
    model = deftcore.sparsify(relu(), tau=0.3)
    stack, hidden, keys, values = step_of(model)
    starts = torch.zeros(3, dtype=torch.int64)
    found = decode_step(hidden, stack, keys, values, starts, 4)
    exact = decode_step_ref(hidden, stack, keys.clone(), values.clone(), starts, 4)
    assert (found - exact).abs().max() <= 1e-5 * exact.abs().max()
    dense = dataclasses.replace(stack, blocks=[dataclasses.replace(b, tau=0.0) for b in stack.blocks])
    assert (decode_step(hidden, dense, keys, values, starts, 4) - found).abs().max() > 1e-3 * exact.abs().max()
    same_tokens(model, 2)


def test_a_sparse_model_with_adapters_in_it():
    """`sparsify` leaves LoRA over 4 bits apart, and with merge=False over dense weights too."""
    for form in ("nf4", "float32"):
        model = deftcore.sparsify(lora(relu(form)), merge=False)
        decoder = same_tokens(model, 3)
        down = decoder._steps.stack.blocks[0].down
        assert down.neuron_major
        assert down.lora_b.shape == (64, 5)
        stack, hidden, keys, values = step_of(model, batch=5)
        starts, twins = torch.zeros(5, dtype=torch.int64), [t.double() for t in (keys, values)]
        exact = decode_step_ref(hidden.double(), stack, *twins, starts, 4)
        found = decode_step(hidden, stack, keys, values, starts, 4)
        assert (found.double() - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_what_a_stack_would_misread_is_refused():
    stack = step_of(deftcore.sparsify(relu()))[0]
    block, head = stack.blocks[0], stack.head
    int8 = Matrix(torch.ones(block.up.shape, dtype=torch.int8), scales=torch.ones(block.up.shape[0]))

    def with_block(**changes):
        return {"blocks": [dataclasses.replace(block, **changes)]}

    for error, changes, message in (
        (TypeError, with_block(mlp_norm=block.mlp_norm.bfloat16()), "blocks: mlp_norm of 0: dtype must be torch.float"),
        (ValueError, with_block(q_norm=torch.ones(3)), r"blocks: q_norm of 0: shape must be \(16,\)"),
        (ValueError, with_block(attention_norm=torch.ones(128)[::2]), "blocks: attention_norm of 0: must be contig"),
        (ValueError, with_block(up=int8), "blocks: up of 0 is in int8, of which all rows are read, and it has tau"),
        (ValueError, {"blocks": []}, "blocks: must be at least one"),
        (ValueError, {"norm": stack.norm[:5]}, "norm: shape"),
        (ValueError, {"sine": stack.sine[:5]}, "sine: shape"),
        (ValueError, {"head": Matrix(head.weight.t().contiguous(), neuron_major=True)}, "head: must not be neuron-maj"),
    ):
        with pytest.raises(error, match=message):
            dataclasses.replace(stack, **changes)


def test_all_blocks_skipped():
    model = relu()
    same_tokens(deftcore.sparsify(model, skip=["model.layers.0.mlp", "model.layers.1.mlp"]))


# ---------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize(("kind", "form"), [("llama", "float32"), ("qwen3", "nf4"), ("llama-linear-relu", "mixed")])
def test_lora_tokens_are_those_of_transformers(kind, form, patched):
    model = lora(model_of(kind, form))
    model = deftcore.patch(model) if patched else model
    decoder = same_tokens(model, 1 if patched else 5)
    assert decoder._steps.stack.head.lora_b is not None
    with model.disable_adapter():
        base = same_tokens(model)
    assert base._steps.stack.head.lora_b is None
    with pytest.raises(ValueError, match="compile_decoder again"):
        base.generate(prompts())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("form", ["float32", "bfloat16", "nf4"])
def test_the_step_under_lora_is_its_reference(form, threads):
    model = lora(model_of("llama", form), ["q_proj", "v_proj", "down_proj", "gate_proj"], rank=17)
    stack, hidden, keys, values = step_of(model, batch=5)
    starts, twins = torch.zeros(5, dtype=torch.int64), [t.double() for t in (keys, values)]
    exact = decode_step_ref(hidden.double(), stack, *twins, starts, 4)
    with on_threads(threads):
        found = decode_step(hidden, stack, keys, values, starts, 4)
    assert (found.double() - exact).abs().max() <= 1e-5 * exact.abs().max()
    without = [dataclasses.replace(b, q=dataclasses.replace(b.q, lora_scale=0.0)) for b in stack.blocks]
    changed = decode_step(hidden, dataclasses.replace(stack, blocks=without), keys, values, starts, 4)
    assert (changed - found).abs().max() > 1e-3 * exact.abs().max()


def test_weights_of_adapters_that_were_trained_on_are_noticed():
    model = lora(model_of("llama"))
    decoder = deftcore.compile_decoder(model, max_length=96)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-2)
    with pytest.raises(ValueError, match="model: its weights were written or replaced"):
        decoder.generate(prompts(), **GREEDY)
    decoder = deftcore.compile_decoder(model, max_length=96)
    assert torch.equal(decoder.generate(prompts(), **GREEDY), model.generate(input_ids=prompts(), **GREEDY))


def test_other_adapters_say_why():
    two = lora(model_of("llama"))
    two.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    two.base_model.set_adapter(["default", "other"])
    prompt = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    for model, reason in (
        (lora(model_of("llama"), use_dora=True), "_proj: DoraLinearVariant has no native step; merge the adapter"),
        (two, "q_proj: 2 active adapters"),
        (peft.get_peft_model(model_of("llama"), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])),
         "q_proj: Linear has no native step; merge the adapter"),
        (peft.get_peft_model(model_of("llama"), deftcore.BottleneckConfig(target_modules=["mlp"])),
         "mlp: .* has no native step; merge the adapter|hooks"),
        (peft.get_peft_model(model_of("llama"), prompt), "an adapter of prompts"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            read_stack(model, 32)
        decoder = deftcore.compile_decoder(model, max_length=32)
        assert decoder.reason
        assert decoder.generate(prompts(), max_new_tokens=3).shape[0] == 1


# ---------------------------------------------------------------------------- positions and the proof

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 10000.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip


@pytest.mark.parametrize("rope", [YARN, LLAMA3], ids=["yarn", "llama3"])
@pytest.mark.parametrize("config", [LlamaConfig, MistralConfig, Qwen3Config])
def test_scaled_rotations(config, rope):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config(**SIZES, rope_parameters=rope)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.dim() == 2 else parameter.add_(0.1 * torch.randn_like(parameter))
    same_tokens(model, 2)


@pytest.mark.parametrize("form", ["float32", "nf4"])
@pytest.mark.parametrize("change", [{"eps": 1e-5}, {"scale": 0.2501}, {"activation": "gelu"}])
def test_the_proof_sees_what_is_slightly_wrong(change, form):
    model = model_of("llama", form)
    stack = read_stack(model, 16)
    assert stack.eps == 1e-6
    prove(model, LlamaSteps(stack), 16)
    with pytest.raises(ValueError, match="logits differ"):
        prove(model, LlamaSteps(dataclasses.replace(stack, **change)), 16)


@pytest.mark.parametrize(("wrong", "refused"), [({3}, False), ({3, 6}, False), ({3, 6, 8}, True)])
def test_a_neuron_on_its_threshold_does_not_refuse_a_model(wrong, refused):
    """It may count for one side alone, and moves all that follows: on one prompt, not on every one."""

    class Flipping(LlamaSteps):
        calls = 0

        def step(self, *args):
            Flipping.calls += 1
            return super().step(*args) + (0.1 if Flipping.calls in wrong else 0.0)

    model = deftcore.sparsify(relu(), tau=0.3)
    steps = Flipping(read_stack(model, 16))
    if refused:
        with pytest.raises(ValueError, match="logits differ"):
            prove(model, steps, 16, thresholds=True)
    else:
        prove(model, steps, 16, thresholds=True)
    Flipping.calls = 0
    with pytest.raises(ValueError, match="logits differ"):
        prove(model, steps, 16)


def test_norms_that_compute_with_another_epsilon_are_refused():
    """Also where every vector is so large that no logit shows it, and in 16 bits."""
    for dtype in (torch.float32, torch.bfloat16):
        model = model_of("llama").to(dtype)
        norm = model.model.norm

        class Other(type(norm)):
            def forward(self, x):
                return nn.functional.rms_norm(x.float(), x.shape[-1:], self.weight.float(), 1e-5).to(x.dtype)

        norm.__class__ = Other
        with pytest.raises(ValueError, match="Other differs from a norm by the root of the mean square with eps=1e-06"):
            read_stack(model, 16)


def test_what_blocks_are_made_of():
    stack, hidden, keys, values = step_of(model_of("llama"))
    block = stack.blocks[1]

    def changed(**change):
        return dataclasses.replace(stack, blocks=[stack.blocks[0], dataclasses.replace(block, **change)])

    sizes = (32, 64), (32, 64), (64, 32)
    narrow = changed(**{k: Matrix(torch.zeros(s)) for k, s in zip(("gate", "up", "down"), sizes, strict=True)})
    with pytest.raises(ValueError, match="shape"):
        decode_step(hidden, narrow, keys, values, torch.zeros(3, dtype=torch.int64), 4)
    for change, name in (({"up": None}, "gate, up and down"), ({"tau": 0.0}, "neuron-major")):
        with pytest.raises(ValueError, match=f"blocks: .*{name}"):
            changed(**change)
    for change, name in (
        ({"lora_a": torch.zeros(2, 64)}, "lora_a"), ({"lora_b": torch.zeros(3, 2)}, "lora_a"),
        ({"lora_a": torch.zeros(2, 5), "lora_b": torch.zeros(3, 2)}, "lora_a"), ({"bias": torch.zeros(4)}, "bias"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            Matrix(torch.zeros(3, 64), **change)


@pytest.mark.parametrize("before", [True, False])
def test_hooks_that_collect_hidden_states_change_nothing(before):
    """Transformers leaves them in a model's layers once it was asked for hidden states."""
    model, options = model_of("llama"), {"max_new_tokens": 12, "do_sample": False}
    decoder = None if before else deftcore.compile_decoder(model, max_length=32)
    assert model(prompts(), output_hidden_states=True, output_attentions=True).hidden_states
    decoder = decoder or deftcore.compile_decoder(model, max_length=32)
    assert not decoder.reason
    assert decoder.generate(prompts(), **options).equal(model.generate(prompts(), **options))


def test_each_module_keeps_its_mode():
    model = model_of("llama").train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    deftcore.compile_decoder(model, max_length=32)
    assert [module.training for module in model.modules()] == before


def test_a_window_of_one_is_transformers_own():
    model = AutoModelForCausalLM.from_config(MistralConfig(**SIZES, sliding_window=1)).eval()
    assert "window is 1" in deftcore.compile_decoder(model, max_length=32).reason
