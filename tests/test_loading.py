"""What PEFT or Transformers loads, `load_adapter` and `load_quantized` load to the same values, or refuse by name."""

import json

import peft
import pytest
import torch
import transformers
from conftest import tiny_batch, tiny_model
from safetensors.torch import load_file, save_file
from test_package import run_python

import deftcore
from deftcore.models.preflight import check_lengths
from deftcore.nn import Linear4bit
from deftcore.training.adapters import load_adapter

LORA = {"r": 2, "task_type": "CAUSAL_LM", "init_lora_weights": False}
QV = ["q_proj", "v_proj"]


def base(tied=False, vocabulary=None):
    model = tiny_model("llama").eval()
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    if vocabulary:
        torch.manual_seed(5)
        model.resize_token_embeddings(vocabulary)
    return model


def perturbed(model):
    """With every trained weight, and the embeddings, away from where it began."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad or "embed_tokens" in name or "lm_head" in name:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


CASES = {
    "resized vocabulary": (peft.LoraConfig(**LORA, target_modules=QV), {"vocabulary": 70}, True),
    "resized and tied": (peft.LoraConfig(**LORA, target_modules=QV), {"vocabulary": 70, "tied": True}, True),
    "LoRA on the embedding": (peft.LoraConfig(**LORA, target_modules=["embed_tokens", "q_proj"]), {}, "auto"),
    "embedding saved whole": (peft.LoraConfig(**LORA, target_modules=QV, modules_to_save=["embed_tokens"]), {}, False),
    "head saved whole, resized": (
        peft.LoraConfig(**LORA, target_modules=QV, modules_to_save=["lm_head"]), {"vocabulary": 70}, True,
    ),
    "tokens": (peft.LoraConfig(**LORA, target_modules=QV, trainable_token_indices=[1, 5]), {}, "auto"),
    "tokens, tied": (
        peft.LoraConfig(**LORA, target_modules=QV, trainable_token_indices=[1, 5]), {"tied": True}, "auto",
    ),
    "patterns": (
        peft.LoraConfig(**LORA, target_modules=QV, rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 5}), {}, "auto",
    ),
    "biases": (peft.LoraConfig(**LORA, target_modules=QV, bias="all"), {}, "auto"),
    "DoRA": (peft.LoraConfig(**LORA, target_modules=QV, use_dora=True), {}, "auto"),
    "IA3": (peft.IA3Config(task_type="CAUSAL_LM", target_modules=QV, feedforward_modules=[]), {}, "auto"),
    "prompt": (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), {}, "auto"),
    "bottleneck": (deftcore.BottleneckConfig(), {"vocabulary": 70}, True),
    "S2FT": (deftcore.S2ftConfig(channel_ratio=0.2), {"vocabulary": 70}, True),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_adapters_that_peft_loads(tmp_path, case):
    config, options, embeddings = CASES[case]
    perturbed(peft.get_peft_model(base(**options), config)).save_pretrained(tmp_path, save_embedding_layers=embeddings)
    ours, theirs = load_adapter(base(**options), tmp_path), peft.PeftModel.from_pretrained(base(**options), tmp_path)
    batch = tiny_batch("llama")
    logits = theirs(**batch).logits
    assert not torch.equal(logits, base(**options)(**batch).logits[:, -logits.shape[1] :])
    assert torch.equal(ours(**batch).logits, logits)
    state = theirs.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in ours.state_dict().items())


def test_a_fresh_process_knows_our_adapters(tmp_path):
    """`load_adapter` makes them known to PEFT itself; nobody has imported their room, and no installed metadata tell of
    it: a checkout, or one whose metadata are older."""
    peft.get_peft_model(base(), deftcore.BottleneckConfig()).save_pretrained(tmp_path / "adapter")
    base().save_pretrained(tmp_path / "base")
    run_python(
        "from deftcore.models.checkpoints import load_model\n"
        "from deftcore.training.adapters import load_adapter\n"
        "from deftcore.training import registry\n"
        "registry.entry_points = lambda group: []\n"
        f"load_adapter(load_model('{tmp_path}/base'), '{tmp_path}/adapter')\n"
        "assert {'lora', 's2ft', 'mamba-lora'} <= {each.name for each in registry.all_methods()}"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(next(k for k in w if "lora_B" in k)), r"missing \['base_model.*lora_B"),
        (lambda w: w.pop(next(k for k in w if "lm_head" in k)), r"of another model: .*lm_head"),
        (lambda w: w.update({"base_model.model.model.norm.weight": torch.ones(32)}), r"unexpected \['base_model.*norm"),
        (
            lambda w: w.update({"base_model.model.model.embed_tokens.weight": torch.ones(70, 32)}),
            r"size mismatch for .*embed_tokens",
        ),
    ],
)
def test_adapters_that_do_not_fit(tmp_path, change, message):
    """Most of these PEFT loads with a warning, or none."""
    peft.get_peft_model(
        base(), peft.LoraConfig(**LORA, target_modules=QV, modules_to_save=["lm_head"])
    ).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file)
    with pytest.raises(ValueError, match=message):
        load_adapter(base(), tmp_path)


def test_embeddings_that_the_base_ties(tmp_path):
    """Trained apart, loaded onto a base that ties them: one of the two would be lost without a word."""
    config = peft.LoraConfig(**LORA, target_modules=QV)
    perturbed(peft.get_peft_model(base(), config)).save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(ValueError, match=r"(embed_tokens|lm_head)\.weight did not reach the model"):
        load_adapter(base(tied=True), tmp_path)


# ---------------------------------------------------------------------------- into 4 bits


def rewrite(folder, change):
    file = folder / "model.safetensors"
    weights = load_file(file)
    save_file(change(weights), file, {"format": "pt"})


def bare(weights):
    return {key.removeprefix("transformer.").removeprefix("model."): value for key, value in weights.items()}


def with_inv_freq(weights):
    return weights | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in (0, 1)}


LEFT_OVERS = {
    "rotary tables": ("llama", with_inv_freq),
    "no prefix": ("llama", bare),
    "positions": ("bert", lambda w: w | {"bert.embeddings.position_ids": torch.arange(8)}),
}


@pytest.mark.parametrize("case", LEFT_OVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoints_that_transformers_loads(tmp_path, case, dtype):
    """Every weight has the value that Transformers gives it, the linear ones once quantised."""
    import transformers as t

    family, change = LEFT_OVERS[case]
    tiny_model(family).to(dtype).save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]  # as in checkpoints of some years ago: the weights tell
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs, info = t.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    ours = deftcore.load_quantized(tmp_path)
    assert {p.dtype for p in theirs.parameters()} == {dtype}
    wanted = deftcore.quantize(theirs).state_dict()
    found = ours.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[key]) and value.dtype == wanted[key].dtype for key, value in found.items())
    assert any(isinstance(module, Linear4bit) for module in ours.modules())
    batch = tiny_batch(family)
    assert torch.equal(ours(**batch).logits, theirs(**batch).logits)


HEADS = {
    "llama": ("model.embed_tokens.weight", "lm_head.weight"),
    "opt": ("model.decoder.embed_tokens.weight", "lm_head.weight"),
    "bert": ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
    "t5": ("shared.weight", "lm_head.weight"),
}


@pytest.mark.parametrize("family", HEADS)
@pytest.mark.parametrize("stored", ["the embedding", "the head", "both alike", "both unlike"])
def test_tied_embeddings(tmp_path, family, stored):
    """A configuration that ties them, over files that hold one of them, or both."""
    import transformers as t

    embedding, head = HEADS[family]
    model = tiny_model(family)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path)

    def change(weights):
        both = weights | {head: weights[embedding].clone() + (1 if stored == "both unlike" else 0)}
        left_out = {"the embedding": [head], "the head": [embedding]}.get(stored, [])
        return {key: value for key, value in both.items() if key not in left_out}

    rewrite(tmp_path, change)
    kind = t.AutoModelForSeq2SeqLM if family == "t5" else t.AutoModelForCausalLM
    theirs, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    ours = deftcore.load_quantized(tmp_path)
    for name in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(getattr(ours, name)().weight, getattr(theirs, name)().weight)
    heads = [model.get_output_embeddings().weight for model in (ours, theirs)]
    embeddings = [model.get_input_embeddings().weight for model in (ours, theirs)]
    assert (heads[0] is embeddings[0]) == (heads[1] is embeddings[1]) == (stored != "both unlike")
    batch = tiny_batch(family)
    wanted = deftcore.quantize(theirs, skip=[head.removesuffix(".weight")])
    assert torch.equal(ours(**batch).logits, wanted(**batch).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w | {"model.extra.weight": torch.ones(2)}, r"unexpected \['model\.extra\.weight'"),
        (lambda w: w | {"model.norm.weight": torch.ones(31)}, r"model\.norm\.weight: .*shape"),
        (lambda w: {k: v for k, v in w.items() if "norm" not in k}, r"missing \['model\.layers"),
    ],
)
def test_checkpoints_that_are_refused(tmp_path, change, message):
    tiny_model("llama").save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        deftcore.load_quantized(tmp_path)


def test_roberta_counts_its_positions_from_behind_the_padding():
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = transformers.RobertaConfig(**sizes, num_attention_heads=2, max_position_embeddings=20, is_decoder=True)
    model = transformers.RobertaForCausalLM(config).eval()
    check_lengths(model, [{"input_ids": [5] * 18}])
    model(input_ids=torch.full((1, 18), 5))
    with pytest.raises(
        ValueError, match=r"at most 18, the positions of roberta\.embeddings\.position_embeddings; an ex"
    ):
        check_lengths(model, [{"input_ids": [5] * 19}])
