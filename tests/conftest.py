"""Shared helpers. The compiled module must be installed: tests never import a source tree that is not built."""

import contextlib
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DEFTCORE_CUDA_KERNELS", "all")  # the tests compare by themselves; test_proof.py sets it

import numpy as np
import pytest
import torch

# Over the emulated CUDA kernels (tests/emulator) these are not run: they are about the CPU kernels alone.
CPU_KERNELS_ONLY = {
    "test_threads.py": "bits that OpenMP's threads must not change; CUDA kernels leave larger products to PyTorch",
}
FAMILIES = ("llama", "opt", "bert", "roberta", "t5")
EPS = {torch.float32: 1.2e-7, torch.float16: 9.8e-4, torch.bfloat16: 7.8e-3}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Cost models and quickstart bases go to a folder of the test session, not the user's."""
    monkeypatch.setenv("DEFTCORE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_lucky_memory(request):
    """To tests of the ops new memory is NaN, or the largest integer: what a kernel did not write shows."""
    filled = hasattr(request.module, "ops")
    torch.use_deterministic_algorithms(filled, warn_only=True)  # of which only the filling matters
    yield
    torch.use_deterministic_algorithms(False)


def pytest_addoption(parser):
    parser.addoption("--parity", metavar="FOLDER", help="values of the authors' own code (.npz), to compare with")


class Stopped(Exception):
    """What ends a run before its end."""


@pytest.fixture
def stopping(monkeypatch):
    """The next run ends behind its first checkpoint."""

    from deftcore.training.keeper import Keeper

    def checkpoint(keeper, step):
        monkeypatch.setattr(Keeper, "checkpoint", original)
        original(keeper, step)
        raise Stopped

    original = Keeper.checkpoint
    return lambda: monkeypatch.setattr(Keeper, "checkpoint", checkpoint)


@pytest.fixture
def parity(request):
    """Reads a file of the folder that `--parity` names; without one the test is skipped."""
    folder = request.config.getoption("--parity")
    if not folder:
        pytest.skip("compares with the values of others; --parity names their folder")
    return lambda name: np.load(Path(folder) / name)


def pytest_collection_modifyitems(items):
    if os.environ.get("DEFTCORE_EMULATE") == "1":
        for item in items:
            if item.path.name in CPU_KERNELS_ONLY:
                item.add_marker(pytest.mark.skip(reason=CPU_KERNELS_ONLY[item.path.name]))
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA GPU; run bench/gpu_check.sh on one")
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(skip)


def assert_close_to_ref(ours, plain, ref64, reduction=None):
    """ours is as close to the float64 reference as the plain PyTorch expression in the same dtype, twice over.

    Args:
        reduction: sum |x||w| behind each element, where the element is a sum of float32 products.
    """
    assert ours.dtype == plain.dtype
    assert ours.shape == ref64.shape
    ours64, plain64 = ours.detach().double(), plain.detach().double()
    finite = ref64.isfinite()
    assert torch.equal(ours64.isnan(), ref64.isnan()), "NaN in other places than the reference"
    infinite = ref64.isinf()
    assert torch.equal(ours64[infinite], ref64[infinite]), "infinities differ from the reference"
    allowed = 2 * (plain64 - ref64)[finite].abs().max() if finite.any() else torch.zeros(())
    allowed = allowed + EPS[ours.dtype] * ref64[finite].abs()
    if reduction is not None:
        allowed = allowed + 8 * EPS[torch.float32] * reduction.double()[finite]
    error = (ours64 - ref64)[finite].abs()
    worst = (error - allowed).max() if error.numel() else torch.zeros(())
    assert worst <= 0, f"error {error.max():.3e} exceeds the allowed by {worst:.3e}"


@contextlib.contextmanager
def on_threads(count):
    """PyTorch and the kernels have so many threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_same_on_threads(run, counts=(1, 2, 3)):
    """The tensor, or the tensors, that run() returns have the same bits on any number of threads."""
    found = []
    for count in counts:
        with on_threads(count):
            result = run()
        found.append([result] if isinstance(result, torch.Tensor) else list(result))
    for count, tensors in zip(counts[1:], found[1:], strict=True):
        for i, (one, other) in enumerate(zip(found[0], tensors, strict=True)):
            assert torch.equal(one, other), f"tensor {i} differs on {count} threads from {counts[0]}"


def tiny_model(family: str, activation: str = "relu"):
    """A small model of a family, dropout off, from a config."""
    import transformers as t

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "num_attention_heads": 4}
    wide = {"hidden_size": 32, "num_hidden_layers": 2}
    if family in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "gpt_neox"):
        act = "hidden_activation" if family in ("gemma2", "gemma3_text") else "hidden_act"
        options = {"intermediate_size": 72, act: activation}
        if family != "gpt_neox":
            options["num_key_value_heads"] = 2
        if family != "llama":
            options |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
        if family in ("qwen3", "gemma", "gemma2", "gemma3_text"):
            options["head_dim"] = 8
        return t.AutoModelForCausalLM.from_config(t.AutoConfig.for_model(family, **sizes, **wide, **options))
    if family in ("mamba", "falcon_mamba", "mamba2"):
        options = {"state_size": 8, "pad_token_id": 0}
        if family == "mamba2":
            options |= {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8}
        return t.AutoModelForCausalLM.from_config(t.AutoConfig.for_model(family, vocab_size=64, **wide, **options))
    if family == "gpt2":
        rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        options = {"bos_token_id": 0, "eos_token_id": 1, "activation_function": activation}
        return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, **options, **rates))
    if family == "opt":
        return t.OPTForCausalLM(
            t.OPTConfig(
                **sizes, **wide, ffn_dim=72, word_embed_proj_dim=32, dropout=0.0, activation_function=activation
            )
        )
    if family in ("bert", "roberta"):
        config, model = {
            "bert": (t.BertConfig, t.BertForMaskedLM), "roberta": (t.RobertaConfig, t.RobertaForMaskedLM)
        }[family]  # fmt: skip
        rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return model(config(**sizes, **wide, **rates, intermediate_size=72, hidden_act=activation))
    options = {"dropout_rate": 0.0, "decoder_start_token_id": 0, "feed_forward_proj": activation}
    config = t.AutoConfig.for_model(
        family, vocab_size=64, d_model=32, d_ff=72, d_kv=8, num_layers=2, num_heads=4, **options
    )
    return t.AutoModelForSeq2SeqLM.from_config(config)


def tiny_base(packed: bool):
    """A small Llama to wrap, dense or in 4 bits."""
    import deftcore

    model = tiny_model("llama").eval()
    return deftcore.quantize(model) if packed else model


def tiny_batch(family: str):
    """Two sequences, the second padded by two."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 64, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    labels = ids.clone()
    labels[1, 5:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def perturbed(model, seed: int = 3):
    """Moves everything that trains, so that no adapter is without effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p.dtype))
    return model


def recompute(model, reentrant: bool = False) -> None:
    """Activation checkpointing under the name that the installed Transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def task_type(family: str) -> str | None:
    return {"bert": None, "roberta": None, "t5": "SEQ_2_SEQ_LM", "mt5": "SEQ_2_SEQ_LM"}.get(family, "CAUSAL_LM")
