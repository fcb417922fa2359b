"""`compile_decoder(activations="int8")`: the native steps against the definition of their rounding, and its error."""

import pytest
import test_decoder
import test_mamba_decoder
import torch
from conftest import assert_same_on_threads
from transformers import AutoModelForCausalLM, LlamaConfig

import deftcore
from deftcore.models.decoder_parts import read_stack
from deftcore.models.mamba_decoder import read_mamba
from deftcore.ops.decoder import decode_step, decode_step_ref
from deftcore.ops.decoder_matrix import Matrix
from deftcore.ops.ssm.decode import mamba_step, mamba_step_ref

FORMS = ("float32", "bfloat16", "nf4", "mixed")  # the first two: the head alone


def llama_steps(form, tokens):
    stack = read_stack(test_decoder.model_of("qwen3", form), 20)
    hidden = torch.randn(tokens, stack.norm.shape[0])
    starts = torch.zeros(tokens, dtype=torch.int64)

    def run(of, step, dtype=torch.float32):
        return step(hidden.to(dtype), of, *of.new_cache(tokens, dtype), starts, 4)

    return stack, lambda of: run(of, decode_step), lambda of: run(of, decode_step_ref, torch.float64)


def mamba_steps(kind, form, tokens):
    stack = read_mamba(test_mamba_decoder.model_of(kind, form), 20)
    hidden = torch.randn(tokens, stack.norm.shape[0])

    def run(of, step, dtype=torch.float32):
        return step(hidden.to(dtype), of, *of.new_state(tokens, dtype))

    return stack, lambda of: run(of, mamba_step), lambda of: run(of, mamba_step_ref, torch.float64)


@pytest.mark.parametrize("tokens", [1, 2, 3, 7])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["llama", "mamba", "mamba2"])
def test_a_rounded_step_is_its_definition(kind, form, tokens):
    """What float32 rounds to another step than float64 does is little beside what int8 changes."""
    torch.manual_seed(2)
    stack, native, reference = llama_steps(form, tokens) if kind == "llama" else mamba_steps(kind, form, tokens)
    rounded = stack.rounded()
    defined, exact = reference(rounded), reference(stack)
    found = native(rounded).double()
    change = (defined - exact).norm()
    assert 1e-4 * exact.norm() < change < 0.3 * exact.norm()
    assert (found - defined).norm() < 0.2 * change
    assert torch.equal(native(rounded), native(rounded))


@pytest.mark.parametrize("rows", [1, 3, 4, 13, 300])
@pytest.mark.parametrize("cols", [32, 64, 96, 160])
def test_rows_in_int8(rows, cols):
    torch.manual_seed(0)
    weight = torch.randn(rows, cols, dtype=torch.float64)
    weight[0] = 0
    matrix = Matrix(weight.float(), torch.randn(rows)).rounded()
    assert matrix.weight.dtype == torch.int8
    assert matrix.weight.abs().max() == (127 if rows > 1 else 0)
    steps = weight.abs().amax(1) / 127
    assert ((matrix.weight * matrix.scales.double().unsqueeze(1) - weight).abs() <= 0.51 * steps.unsqueeze(1)).all()
    assert matrix.rounded() is matrix
    narrow = Matrix(torch.randn(3, 33))
    assert narrow.rounded() is narrow


def test_errors_of_a_matrix():
    whole = torch.zeros(2, 32, dtype=torch.int8)
    with pytest.raises(ValueError, match="scales: are of a weight in int8"):
        Matrix(whole)
    with pytest.raises(ValueError, match="scales: are of a weight in int8"):
        Matrix(torch.zeros(2, 32), scales=torch.ones(2))
    with pytest.raises(ValueError, match="weight: rows in int8 must be whole blocks of 32, got 31"):
        Matrix(whole[:, :31].contiguous(), scales=torch.ones(2))
    with pytest.raises(ValueError, match="weight: in int8 must be contiguous"):
        Matrix(torch.zeros(2, 64, dtype=torch.int8)[:, :32], scales=torch.ones(2))
    with pytest.raises(ValueError, match=r"weight: in int8 must be in -127..127, got -128"):
        Matrix(torch.full((2, 32), -128, dtype=torch.int8), scales=torch.ones(2))
    with pytest.raises(ValueError, match="neuron_major: is of no weight in int8"):
        Matrix(whole, scales=torch.ones(32), neuron_major=True)
    with pytest.raises(ValueError, match="scales"):
        Matrix(whole, scales=torch.ones(3))
    with pytest.raises(TypeError, match="scales"):
        Matrix(whole, scales=torch.ones(2, dtype=torch.float64))
    with pytest.raises(TypeError, match="int8: is of weights in 4 bits"):
        Matrix(torch.zeros(2, 32), int8=True)


def test_a_decoder_in_int8():
    model, tokens = test_decoder.model_of("llama", "nf4"), test_decoder.prompts()
    options = {"max_new_tokens": 12, "do_sample": False}
    exact = deftcore.compile_decoder(model, max_length=32)
    decoder = deftcore.compile_decoder(model, max_length=32, activations="int8")
    assert exact.error == 0
    assert 1e-3 < decoder.error < 0.2
    found = decoder.generate(tokens, **options)
    assert torch.equal(found[:, :8], exact.generate(tokens, **options)[:, :8])  # the prompt is read exactly
    assert_same_on_threads(lambda: decoder.generate(tokens, **options))


def test_what_is_not_in_int8_says_so(caplog):
    model = test_decoder.model_of("llama", "nf4")
    decoder = deftcore.compile_decoder(model, max_length=32, activations="int8")
    assert "int8" not in caplog.text
    for _ in range(2):
        decoder.generate(test_decoder.prompts(), max_new_tokens=4, num_beams=2)
    assert caplog.text.count("Transformers decodes where there is beam_search, with exact activations") == 1
    config = test_decoder.SIZES | {"hidden_size": 48}
    plain = AutoModelForCausalLM.from_config(LlamaConfig(**config)).eval()  # 48 columns are no whole blocks of 32
    assert deftcore.compile_decoder(plain, max_length=32, activations="int8").error == 0
    assert "int8 rounds nothing" in caplog.text
    hooked = test_decoder.model_of("llama", "nf4")
    hooked.lm_head.register_forward_hook(lambda *_: None)
    assert deftcore.compile_decoder(hooked, max_length=32, activations="int8").reason
    assert "Transformers decodes this model, with exact activations: its last norm" in caplog.text


def test_nan_logits():
    model = test_decoder.model_of("llama", "nf4")
    decoder = deftcore.compile_decoder(model, max_length=32, activations="int8")
    model.model.norm.weight.data[5] = torch.nan
    decoder._steps.stack.norm.data[5] = torch.nan
    with pytest.raises(FloatingPointError, match="NaN"):
        decoder.generate(test_decoder.prompts(), max_new_tokens=4)
