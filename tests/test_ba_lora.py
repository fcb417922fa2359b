"""BA-LoRA: every numbered property of its specification, values of the authors' code and of float64, and the edges."""

import json
import math
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from conftest import perturbed, tiny_base, tiny_batch, tiny_model
from recipe_runs import check_recipe
from torch import nn

import deftcore
from deftcore.methods.ba_lora.layer import BaLoraLinear, principal
from deftcore.methods.ba_lora.penalty import BaLoraPenalty
from deftcore.methods.ba_lora.schedules import adaptive_factor, consistency_factor, rising_factor
from deftcore.ops import class_penalties, logit_penalties, mean_entropy, spectrum
from deftcore.ops.logits import logit_penalties_ref
from deftcore.training.adapters import load_adapter

TARGETS = ["q_proj", "v_proj", "down_proj"]
ZERO = {"consistency": 0.0, "diversity": 0.0, "spectral": 0.0}


def llama(dtype=torch.float32, model=None, **options):
    config = deftcore.BaLoraConfig(
        **({"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | options)
    )
    return peft.get_peft_model(model or tiny_model("llama").to(dtype).eval(), config)


def logits(model, **more):
    with torch.no_grad():
        return model(input_ids=tiny_batch("llama")["input_ids"], **more).logits


def layer_of(model):
    return next(module for module in model.modules() if isinstance(module, BaLoraLinear))


def random(*shape, scale=2.0):
    return scale * torch.randn(*shape, dtype=torch.float64)


# ---------------------------------------------------------------------------- start


@pytest.mark.parametrize("mode", ["factored", "pissa"])
@pytest.mark.parametrize(("rank", "alpha"), [(4, 4), (4, 6), (1, 2)])
def test_the_start(mode, rank, alpha):
    """Property 1."""
    before = dict(tiny_model("llama").named_modules())["model.layers.0.self_attn.q_proj"].weight.detach()
    model = llama(base_mode=mode, r=rank, lora_alpha=alpha, svd_niter=None)
    layer = layer_of(model)
    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    scaling, values = alpha / rank, torch.linalg.svdvals(before)
    residual = layer.base_layer.weight.detach() if mode == "pissa" else before - scaling * b @ a
    assert torch.allclose(residual + scaling * b @ a, before, rtol=1e-5, atol=1e-7)
    for gram in (b.t() @ b, a @ a.t()):
        assert torch.allclose(gram, (values[:rank] / scaling).diag(), rtol=1e-4, atol=1e-6)
    assert torch.allclose(torch.linalg.matrix_norm(residual, 2), values[rank], rtol=1e-4)
    if mode == "factored":
        assert torch.equal(layer.base_layer.weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [False, True])
def test_step_zero_is_the_pretrained_model_exactly(dtype, packed):
    """Property 2."""
    base = tiny_model("llama").to(dtype).eval()
    if packed:
        base = deftcore.quantize(base)
    before = logits(base)
    model = llama(model=base)
    assert torch.equal(logits(model), before)
    batch = tiny_batch("llama")
    penalty = BaLoraPenalty(model, model.peft_config["default"])
    output = model(**batch)
    teacher = penalty.teacher(batch)
    assert torch.equal(teacher, output.logits)
    found = logit_penalties(output.logits, teacher, mask=penalty.tokens(batch), consistency=1.0)
    found.total.backward()
    assert float(found.total.detach()) == pytest.approx(0.0, abs=1e-9)
    assert all(p.grad is None or float(p.grad.abs().max()) < 1e-6 for p in model.parameters())


@pytest.mark.parametrize("mode", ["factored", "pissa"])
def test_the_teacher_is_the_base_model(mode):
    """Property 2: after training too, and leaves the model as it was."""
    model = perturbed(llama(base_mode=mode)).train()
    model.base_model.model.lm_head.eval()
    states = [module.training for module in model.modules()]
    batch = tiny_batch("llama")
    teacher = BaLoraPenalty(model).teacher(batch)
    separate = tiny_model("llama").eval()
    with torch.no_grad():
        expected = separate(**{name: value for name, value in batch.items() if name != "labels"}).logits
    assert torch.equal(teacher, expected) if mode == "factored" else torch.allclose(teacher, expected, atol=1e-5)
    assert [module.training for module in model.modules()] == states
    assert not layer_of(model).disable_adapters


def test_the_randomised_start_is_near_the_exact_one():
    torch.manual_seed(3)
    weight = torch.randn(60, 40) @ torch.diag(torch.logspace(0, -2, 40)) @ torch.randn(40, 50)
    exact, fast = principal(weight, 5, None), principal(weight, 5, 16)
    assert torch.allclose(exact[1], fast[1], rtol=1e-4)
    torch.manual_seed(9)
    assert all(map(torch.equal, principal(weight, 5, 16), fast))  # whatever the seed, and that is left alone
    state = torch.get_rng_state()
    principal(weight, 5, 16)
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------------------- schedules


def test_schedules():
    """Property 10."""
    steps = 40
    times = [0, 8, 9, 10, 40]
    assert [rising_factor("two_phase", t, steps) for t in times] == [0, 0, 0.5, 1, 1]
    assert [rising_factor("linear_warmup", t, steps) for t in (0, 4, 8, 40)] == [0, 0.5, 1, 1]
    assert [rising_factor("quadratic_warmup", t, steps) for t in (0, 4, 8, 40)] == [0, 0.25, 1, 1]
    assert consistency_factor("cosine", 0, steps) == 1
    assert consistency_factor("cosine", steps, steps) == pytest.approx(0.1)
    assert rising_factor("two_phase", 1, 3) == 1.0  # a ramp is at least a step
    assert adaptive_factor(0.0, 50) == 1
    assert adaptive_factor(math.log(50), 50) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="schedule"):
        rising_factor("cosine", 0, 1)


def test_the_objective_follows_its_schedules():
    penalty = BaLoraPenalty(llama())
    window = [{}]
    found = {}
    for step in (0, 8, 9, 10, 40):
        penalty.begin(window, step, 40)
        found[step] = penalty.factors()
    assert [found[step][1] for step in found] == pytest.approx([0, 0, 0.0025, 0.005, 0.005])
    assert found[0][0] == 0.025
    assert found[40][0] == pytest.approx(0.0025)


# ---------------------------------------------------------------------------- the objective


@pytest.mark.parametrize("shift", [True, False])
def test_which_tokens_count(shift):
    penalty = BaLoraPenalty(llama(shift=shift))
    labels = torch.tensor([[-100, -100, 5, 6, 7, -100]])
    expected = [False, True, True, True, False, False] if shift else [False, False, True, True, True, False]
    assert penalty.tokens({"labels": labels}).tolist() == [expected]
    with pytest.raises(ValueError, match="batch: labels"):
        penalty.tokens({})


@pytest.mark.parametrize("variant", ["v6", "v5"])
def test_the_loss_is_the_sum_of_its_terms(variant):
    model = perturbed(llama(variant=variant, consistency=0.5, diversity=0.25, spectral=0.125))
    penalty, batch = BaLoraPenalty(model), tiny_batch("llama")
    z, t = model(**batch).logits, penalty.teacher(batch)
    mask = penalty.tokens(batch)
    if variant == "v6":
        terms = logit_penalties_ref(z[mask], t[mask], 2.0, 20, 10)
    else:
        consistency, diversity, _ = logit_penalties_ref(z[mask], t[mask], 1.0, 0, 1)
        values = torch.linalg.svdvals((z * mask.unsqueeze(-1)).flatten(1))
        terms = consistency, diversity, -values[:3].sum() / values.sum()
    expected = sum(weight * term for weight, term in zip((0.5, 0.25, 0.125), terms, strict=True))
    assert torch.allclose(penalty.loss(batch, z), expected, rtol=1e-5)
    report = penalty.summary(penalty.report())
    assert report["ba_lora_diversity"] == pytest.approx(float(terms[1].detach()), rel=1e-5)
    penalty.begin([batch, batch], 0, 0)
    assert torch.allclose(2 * penalty.share(batch, SimpleNamespace(logits=z)), expected, rtol=1e-5)


def test_an_adaptive_consistency():
    model = perturbed(llama(consistency_schedule="adaptive", consistency=1.0, diversity=0.0, spectral=0.0))
    penalty, batch = BaLoraPenalty(model), tiny_batch("llama")
    z, t = model(**batch).logits, penalty.teacher(batch)
    mask = penalty.tokens(batch)
    entropy = torch.distributions.Categorical(logits=t[mask] / 2).entropy().mean()
    assert torch.allclose(mean_entropy(t, mask=mask, temperature=2.0), entropy, rtol=1e-5)
    expected = logit_penalties_ref(z[mask].double(), t[mask].double(), 2.0, 20, 10)[0]
    assert torch.allclose(penalty.loss(batch, z).double(), adaptive_factor(float(entropy), 64) * expected, rtol=1e-5)


def test_without_weights_it_is_pissa(monkeypatch):
    """Property 11: bit for bit, and the teacher is not asked."""
    from deftcore.training.registry import find

    config = deftcore.BaLoraConfig(target_modules=TARGETS, **ZERO)
    assert find("ba-lora").objective(llama(**ZERO), config) is None
    model = perturbed(llama(**ZERO))
    penalty = BaLoraPenalty(model)
    monkeypatch.setattr(penalty, "teacher", lambda _: pytest.fail("the teacher was asked"))
    batch = tiny_batch("llama")
    assert float(penalty.loss(batch, model(**batch).logits)) == 0


def test_pissa_form_trains_as_pefts_pissa():
    """Property 11: the weights after a step are those of PEFT's own, up to rounding."""
    batch, found = tiny_batch("llama"), []
    options = {"r": 4, "lora_alpha": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    theirs = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(**options, init_lora_weights="pissa"))
    for model in (llama(**options, **ZERO, base_mode="pissa", svd_niter=None), theirs):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.5)
        model(**batch).loss.backward()
        optimizer.step()
        found.append(logits(model.eval()))
    assert torch.allclose(*found, rtol=1e-4, atol=1e-5)


def test_classifiers():
    import transformers as t

    options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = t.BertForSequenceClassification(t.BertConfig(vocab_size=64, num_labels=4, **options, **rates))
    model = peft.get_peft_model(model, deftcore.BaLoraConfig(r=2, task_type="SEQ_CLS", k=2))
    config = model.peft_config["default"]
    assert config.of_classes
    assert config.weights() == (0.15, 0.03, 0.03)
    batch = {"input_ids": torch.randint(0, 64, (6, 5)), "labels": torch.tensor([0, 1, 2, 3, 0, 1])}
    penalty = BaLoraPenalty(model)
    output = perturbed(model)(**batch)
    expected = class_penalties(
        output.logits, penalty.teacher(batch), consistency=0.15, diversity=0.03, spectral=0.03, k=2
    )
    assert torch.equal(penalty.loss(batch, output.logits), expected.total)
    (output.loss + expected.total).backward()
    with pytest.raises(ValueError, match=r"logits: must be \[N, D\]"):
        penalty.loss(batch, torch.zeros(2, 3, 4))


def test_inert_terms_are_warned_of_once():
    penalty = BaLoraPenalty(llama(form="nlu", consistency=0.0))
    with pytest.warns(UserWarning, match="spectral: k = 5 is at least min"):
        penalty.loss({}, torch.randn(8, 3, requires_grad=True))
    with pytest.warns(UserWarning, match="one output"):
        penalty.loss({}, torch.randn(8, 1, requires_grad=True))
    with pytest.warns(UserWarning, match="one example has no covariance"):
        penalty.loss({}, torch.randn(1, 3, requires_grad=True))
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        penalty.loss({}, torch.randn(8, 3, requires_grad=True))


def test_encoder_decoder_models():
    """Labels are the decoder's own: nothing is shifted, and the teacher reads the same tokens."""
    options = {"r": 2, "target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}
    model = peft.get_peft_model(tiny_model("t5").eval(), deftcore.BaLoraConfig(**options))
    batch = tiny_batch("t5")
    penalty = BaLoraPenalty(model)
    assert torch.equal(penalty.tokens(batch), batch["labels"] != -100)
    assert torch.allclose(penalty.teacher(batch), model(**batch).logits, atol=1e-6)


def test_the_objective_refuses():
    with pytest.raises(ValueError, match="model: must be a PEFT model"):
        BaLoraPenalty(tiny_model("llama"))
    plain = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="config: must be a BaLoraConfig"):
        BaLoraPenalty(plain)
    BaLoraPenalty(plain, deftcore.BaLoraConfig())  # the penalties go with any adapter


# ---------------------------------------------------------------------------- merging, files


@pytest.mark.parametrize("mode", ["factored", "pissa"])
def test_merged_unmerged_and_exported_agree(tmp_path, mode):
    """Property 13."""
    model = perturbed(llama(base_mode=mode))
    y = logits(model)
    deftcore.export_lora(model, tmp_path)
    plain = peft.PeftModel.from_pretrained(tiny_model("llama").eval(), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 8
    assert torch.allclose(logits(plain), y, rtol=1e-4, atol=1e-5)
    weight = layer_of(model).base_layer.weight.detach().clone()
    model.merge_adapter()
    assert torch.allclose(logits(model), y, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(layer_of(model).base_layer.weight, weight)
    assert torch.allclose(logits(model.merge_and_unload()), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["factored", "pissa"])
def test_unloading_gives_the_base_back(mode):
    model = perturbed(llama(base_mode=mode))
    assert torch.allclose(logits(model.unload()), logits(tiny_model("llama").eval()), atol=1e-5)


@pytest.mark.parametrize("mode", ["factored", "pissa"])
def test_deleted_and_added_again(tmp_path, mode):
    """A new adapter begins from the pre-trained weights, whatever the one of its name came from."""
    perturbed(llama(base_mode=mode)).save_pretrained(tmp_path)
    model, before = peft.PeftModel.from_pretrained(tiny_model("llama").eval(), tmp_path), tiny_model("llama").eval()
    model.delete_adapter("default")
    layer, x = layer_of(model), torch.randn(3, 32)
    for off in (False, True):
        layer.enable_adapters(not off)
        assert torch.allclose(layer(x), before.model.layers[0].self_attn.q_proj(x), atol=1e-5)
    layer.enable_adapters(True)
    options = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "task_type": "CAUSAL_LM", "base_mode": mode}
    model.add_adapter("default", deftcore.BaLoraConfig(**options))
    model.set_adapter("default")
    fresh = layer_of(llama(base_mode=mode))
    product = fresh.lora_B["default"].weight @ fresh.lora_A["default"].weight
    again = layer_of(model)
    assert torch.allclose(again.lora_B["default"].weight @ again.lora_A["default"].weight, product, atol=1e-5)
    assert torch.allclose(logits(model), logits(before), atol=1e-5)
    assert not torch.allclose(logits(perturbed(model)), logits(before), atol=1e-3)
    with model.disable_adapter():
        assert torch.allclose(logits(model), logits(before), atol=1e-5)
    model.delete_adapter("default")
    assert torch.allclose(logits(model.unload()), logits(before), atol=1e-5)


@pytest.mark.parametrize("mode", ["factored", "pissa"])
@pytest.mark.parametrize("packed", [False, True])
def test_save_and_load(tmp_path, monkeypatch, mode, packed):
    """Bit for bit; nothing is decomposed again."""
    model = perturbed(llama(model=tiny_base(packed), base_mode=mode))
    y = logits(model)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("deftcore.methods.ba_lora.layer.principal", lambda *_: pytest.fail("decomposed again"))
    assert torch.equal(logits(peft.PeftModel.from_pretrained(tiny_base(packed), tmp_path)), y)
    assert torch.equal(logits(load_adapter(tiny_base(packed), tmp_path)), y)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(tiny_base(packed), tmp_path, low_cpu_mem_usage=True)), y)


@pytest.mark.parametrize("mode", ["factored", "pissa"])
def test_a_wrong_base_is_refused(tmp_path, mode):
    model = llama(base_mode=mode)
    model.save_pretrained(tmp_path)
    wrong = tiny_model("llama")
    wrong.model.layers[1].self_attn.v_proj.weight.data[0, 0] += 1e-4
    with pytest.raises(ValueError, match="made for other base weights"):
        peft.PeftModel.from_pretrained(wrong, tmp_path)


def test_several_adapters():
    """Factored ones add up, each from its own start; the other form is one a model."""
    model = perturbed(llama())
    model.add_adapter("other", deftcore.BaLoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM"))
    model.set_adapter("other")
    perturbed(model, seed=4)
    layer = layer_of(model)
    model.base_model.set_adapter(["default", "other"])
    x = torch.randn(3, 32)
    total = layer.base_layer(x) + sum(x @ layer.dense_update([name]).t() for name in ("default", "other"))
    assert torch.allclose(layer(x), total, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="base_mode: only factored adapters stand beside others"):
        llama(base_mode="pissa").add_adapter(
            "other", deftcore.BaLoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM", base_mode="pissa")
        )


def test_mixed_batches():
    ids = tiny_batch("llama")["input_ids"][:1].repeat(2, 1)
    model = perturbed(llama()).eval()
    with torch.no_grad():
        rows = model(input_ids=ids, adapter_names=["default", "__base__"]).logits
        assert torch.allclose(rows[0], model(input_ids=ids[:1]).logits[0], atol=1e-5)
        assert torch.allclose(rows[1], tiny_model("llama").eval()(input_ids=ids[:1]).logits[0], atol=1e-6)
        with pytest.raises(ValueError, match="adapter_names: '__base__'"):
            llama(base_mode="pissa").eval()(input_ids=ids, adapter_names=["default", "__base__"])


def test_conv1d():
    options = {"r": 3, "target_modules": ["c_attn", "c_proj"], "task_type": "CAUSAL_LM"}
    for mode in ("factored", "pissa"):
        base = tiny_model("gpt2").eval()
        before = logits(base)
        model = peft.get_peft_model(base, deftcore.BaLoraConfig(**options, base_mode=mode))
        assert torch.allclose(logits(model), before, atol=1e-5)
        y = logits(perturbed(model))
        assert not torch.allclose(y, before, atol=1e-3)
        assert torch.allclose(logits(model.merge_and_unload()), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout: must be 0"), ({"base_mode": "x"}, "base_mode"), ({"r": 0}, "r: must"),
        ({"variant": "v7"}, "variant"), ({"form": "x"}, "form"), ({"consistency": -1}, "consistency"),
        ({"temperature": 0}, "temperature"), ({"k": 0}, "k: must"), ({"top_k": -1}, "top_k"),
        ({"svd_niter": -1}, "svd_niter"), ({"schedule": "cosine"}, "schedule"), ({"warmup_ratio": 2}, "warmup_ratio"),
        ({"consistency_schedule": "two_phase"}, "consistency_schedule"), ({"use_dora": True}, "use_dora"),
        ({"spectral": math.inf}, "spectral"), ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ],
)  # fmt: skip
def test_config_refuses(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        deftcore.BaLoraConfig(**options)


@pytest.mark.parametrize("targets", [["v_proj"], "all-linear"])
def test_too_high_a_rank_is_an_error(targets):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="r: must be at most 16, the shorter side"):
        peft.get_peft_model(model, deftcore.BaLoraConfig(r=17, target_modules=targets))
    assert type(model.model.layers[0].self_attn.v_proj) is nn.Linear


def test_published_weights():
    assert deftcore.BaLoraConfig().weights() == (0.025, 0.005, 0.005)
    assert deftcore.BaLoraConfig(variant="v5").weights() == (1e-4, 3e-4, 1e-4)
    assert [deftcore.BaLoraConfig(variant=v, form=f).largest() for v in ("v6", "v5") for f in ("nlg", "nlu")] == [
        10, 5, 3, 3,
    ]  # fmt: skip
    assert deftcore.BaLoraConfig(consistency=0.5, k=2).weights() == (0.5, 0.005, 0.005)


# ---------------------------------------------------------------------------- values of others


def near(ours, theirs, tolerance):
    ours, theirs = torch.as_tensor(ours, dtype=torch.float64).detach(), torch.from_numpy(np.asarray(theirs)).double()
    scale = float(theirs.abs().max())
    assert float((ours - theirs).abs().max()) <= tolerance * max(scale, 1e-300), (ours, theirs)


def token_terms():
    found = {"CR_T1": {"consistency": 1.0, "temperature": 1.0}, "CR_T2": {"consistency": 1.0, "temperature": 2.0}}
    found |= {f"DR_K{k}": {"diversity": 1.0, "top_k": k} for k in (0, 1, 20, 100)}
    for norm, name in (("frobenius", "frob"), ("nuclear", "nuclear")):
        found |= {f"SVDR_{name}_k{k}": {"spectral": 1.0, "k": k, "norm": norm} for k in (1, 5, 10)}
    return found


@pytest.mark.parametrize("term", token_terms())
@pytest.mark.parametrize(
    ("source", "mask"), [("code_f64", "same"), ("code_f32", "same"), ("oracle.same", "same"), ("oracle.shift", "shift")]
)
def test_values_of_the_authors_tokens(parity, source, mask, term):
    data = parity("ba_lora_nlg.npz")
    dtype = torch.float32 if source == "code_f32" else torch.float64
    z = torch.from_numpy(data["student_logits"]).to(dtype).requires_grad_()
    t = torch.from_numpy(data["teacher_logits"]).to(dtype)
    valid = torch.from_numpy(data[f"mask_{mask}"])
    if mask == "shift":
        penalty = BaLoraPenalty(llama())
        assert torch.equal(penalty.tokens({"labels": torch.from_numpy(data["labels"])}), valid)
    found = logit_penalties(z, t, mask=valid, **token_terms()[term]).total
    found.backward()
    spectral = term.startswith("SVDR")
    tolerance = {"code_f64": (1e-6, 5e-6) if spectral else (1e-12, 1e-12), "code_f32": (2e-6, 5e-6)}
    value, gradient = tolerance.get(source, (1e-11, 1e-11))
    if float(np.abs(data[f"{source}.{term}"])) < 1e-12:  # one logit has no entropy
        assert float(found.detach()) == pytest.approx(0, abs=1e-7)
        return
    near(found, data[f"{source}.{term}"], value)
    near(z.grad, data[f"{source}.{term}_grad"], gradient)


@pytest.mark.parametrize(("source", "shift"), [("code_f64", False), ("oracle.shift", True)])
def test_totals_of_the_authors(parity, source, shift):
    data = parity("ba_lora_nlg.npz")
    penalty = BaLoraPenalty(llama(shift=shift))
    penalty.teacher = lambda _: torch.from_numpy(data["teacher_logits"]).double()
    z = torch.from_numpy(data["student_logits"]).double().requires_grad_()
    batch = {"labels": torch.from_numpy(data["labels"])}
    penalty.begin([batch], 9, 40)
    found = penalty.loss(batch, z)
    found.backward()
    near(found, data[f"{source}.total_step9_of_40"], 1e-6 if source == "code_f64" else 1e-11)
    near(z.grad, data[f"{source}.total_step9_of_40_grad"], 5e-6 if source == "code_f64" else 1e-11)


def test_adaptive_weight_of_the_authors(parity):
    data = parity("ba_lora_nlg.npz")
    t, mask = torch.from_numpy(data["teacher_logits"]).double(), torch.from_numpy(data["mask_same"])
    entropy = mean_entropy(t, mask=mask, temperature=2.0)
    near(entropy, data["oracle.same.teacher_entropy_T2"], 1e-11)
    near(0.025 * adaptive_factor(float(entropy), 50), data["code_f64.adaptive_lambda1"], 1e-12)


@pytest.mark.parametrize("steps", [40, 33])
def test_schedules_of_the_authors(parity, steps):
    data = parity("ba_lora_nlg.npz")
    times = range(steps + 1)
    near([0.025 * consistency_factor("cosine", t, steps) for t in times],
         data[f"code_schedule.{steps}.lambda1_cosine"], 1e-15)  # fmt: skip
    for ours, theirs in (("two_phase", "two_phase"), ("linear_warmup", "linear"), ("quadratic_warmup", "quadratic")):
        factors = [rising_factor(ours, t, steps) for t in times]
        near(factors, data[f"oracle_schedule.{steps}.factor_{theirs}"], 1e-15)
        for number, weight in ((2, 0.005), (3, 0.004)):
            near([weight * f for f in factors], data[f"code_schedule.{steps}.lambda{number}_{theirs}"], 1e-15)


@pytest.mark.parametrize("k", [3, 5])
def test_randomised_values_of_the_authors(parity, monkeypatch, k):
    data = parity("ba_lora_nlg.npz")
    z = torch.from_numpy(data["rand.student_logits_f16"]).float()
    exact = float(data[f"rand.oracle.SVDR_frob_k{k}_exact"])
    assert float(logit_penalties(z, spectral=1.0, k=k).total) == pytest.approx(exact, rel=1e-5)
    monkeypatch.setattr(spectrum, "_FEW", 0)
    found = float(logit_penalties(z, spectral=1.0, k=k).total)
    assert found == pytest.approx(exact, rel=1e-2)
    assert found == pytest.approx(float(data[f"rand.code_f32.SVDR_k{k}_8seeds"].mean()), rel=1e-2)


@pytest.mark.parametrize("case", ["n8d4", "n8d3", "n5d2", "n3d4"])
def test_values_of_classes(parity, case):
    data = parity("ba_lora_nlu.npz")
    terms = {"CR_T1": {"consistency": 1.0, "temperature": 1.0}, "CR_T2": {"consistency": 1.0, "temperature": 2.0},
             "DR": {"diversity": 1.0}, "v5_consistency": {"consistency": 1.0, "normalized": True}}  # fmt: skip
    terms |= {f"SVDR_k{k}": {"spectral": 1.0, "k": k} for k in (1, 2, 3, 5)}
    t = torch.from_numpy(data[f"{case}.teacher_logits"]).double()
    for name, options in terms.items():
        z = torch.from_numpy(data[f"{case}.student_logits"]).double().requires_grad_()
        found = class_penalties(z, t, **options).total
        found.backward()
        near(found, data[f"{case}.oracle.{name}"], 1e-11)
        expected = torch.from_numpy(data[f"{case}.oracle.{name}_grad"])
        assert float((z.grad - expected).abs().max()) <= 1e-11 * max(float(expected.abs().max()), 1.0), name
    near(class_penalties(z, t, consistency=1.0, normalized=True).total, data[f"{case}.v5code_f64.consistency"], 1e-11)
    near(class_penalties(z, t, diversity=1.0).total, data[f"{case}.v5code_f64.diversity"], 1e-11)


# ---------------------------------------------------------------------------- recipes, the Trainer


@pytest.mark.parametrize("method", ["ba-lora", "qba-lora"])
def test_a_recipe_trains_resumes_and_is_exported(tmp_path, stopping, capsys, method):
    """Schedules, too, go on where they were."""
    options = ["adapter.lora_alpha=4", "training.max_steps=6", "training.log_every=1", "training.batch_size=2",
               "training.gradient_accumulation_steps=2", "training.learning_rate=1e-3"]  # fmt: skip
    log = check_recipe(tmp_path, stopping, capsys, "ba-lora", method, *options)
    assert [entry["step"] for entry in log] == list(range(1, 7))
    assert log[0]["ba_lora_consistency"] == pytest.approx(0, abs=1e-6)  # the start is the pre-trained model
    assert log[-1]["ba_lora_consistency"] > 0


@pytest.mark.parametrize("kind", ["kasa", "ba-lora"])
def test_under_the_trainer(tmp_path, kind):
    """Resumed from a checkpoint bit for bit; the terms are logged."""
    import transformers as t

    from deftcore.training.trainer import ObjectiveTrainerMixin

    class OurTrainer(ObjectiveTrainerMixin, t.Trainer):
        pass

    def trainer():
        torch.manual_seed(0)
        options = {"r": 2, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
        if kind == "kasa":
            model = peft.get_peft_model(tiny_model("llama"), deftcore.KasaFactoredConfig(**options))
            objective = deftcore.KasaPenalty(model)
        else:
            model = peft.get_peft_model(tiny_model("llama"), deftcore.BaLoraConfig(**options))
            objective = deftcore.BaLoraPenalty(model)
        ids = torch.randint(2, 64, (16, 6), generator=torch.Generator().manual_seed(0))
        arguments = t.TrainingArguments(
            output_dir=str(tmp_path / kind), max_steps=4, per_device_train_batch_size=2, logging_steps=1, save_steps=2,
            gradient_accumulation_steps=2, weight_decay=0.1, learning_rate=1e-2, report_to=[], use_cpu=True,
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in ids]
        return OurTrainer(model=model, args=arguments, train_dataset=rows, objective=objective)

    whole = trainer()
    whole.train()
    names = {"kasa": "kasa_l2", "ba-lora": "ba_lora_diversity"}
    assert sum(names[kind] in entry for entry in whole.state.log_history) == 4
    if kind == "kasa":
        sparing = [g["weight_decay"] for g in whole.optimizer.param_groups for p in g["params"] if p.dim() == 1]
        assert sparing == [0.0] * 6
    again = trainer()
    again.train(resume_from_checkpoint=str(tmp_path / kind / "checkpoint-2"))
    first, second = (peft.get_peft_model_state_dict(each.model) for each in (whole, again))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_teacher_is_not_observed():
    """DEFT's density is the student's alone, and its loss can be taken before or after."""
    batch, found = tiny_batch("llama"), {}
    for asked in (False, True):
        torch.manual_seed(0)
        model = perturbed(llama()).train()
        density = deftcore.DensityLoss(model)
        penalty = BaLoraPenalty(model)
        output = model(**batch)
        if asked:
            penalty.loss(batch, output.logits)
        found[asked] = float(density.loss().detach()), density.report()["density"]
    assert found[True] == found[False]


def test_over_bitsandbytes():
    """KaSA and BA-LoRA on the layers of others, native after `patch`."""
    bnb = pytest.importorskip("bitsandbytes")
    for config in (deftcore.KasaFactoredConfig, deftcore.BaLoraConfig):
        torch.manual_seed(0)
        plain = nn.Sequential()
        plain.layer = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
        plain = plain.to("cpu")
        x = torch.randn(8, 64)
        plain.layer(x)
        decoded = bnb.functional.dequantize_4bit(plain.layer.weight.data, plain.layer.weight.quant_state).float()
        model = perturbed(peft.get_peft_model(plain, config(r=3, target_modules=["layer"])))
        layer = model.base_model.model.layer
        expected = x @ (decoded + layer.dense_update().detach()).t() + layer.base_layer.bias
        assert torch.allclose(model(x), expected, rtol=1e-3, atol=1e-4)
        deftcore.patch(model, verify=False)
        assert not layer.waits()
        assert torch.allclose(model(x), expected, rtol=1e-3, atol=1e-4)
        with pytest.raises(ValueError, match="cannot be changed in place"):
            model.merge_adapter()


@pytest.mark.parametrize("mode", ["factored", "pissa"])
def test_scaled_adapters(mode):
    """What was taken out of the weight does not scale with the adapter."""
    model = perturbed(llama(base_mode=mode))
    layer, x = layer_of(model), torch.randn(3, 32)
    for each in model.modules():
        if isinstance(each, BaLoraLinear):
            each.set_scale("default", 0.5)
    weight = layer.base_layer.weight
    assert torch.allclose(layer(x), x @ (weight + layer.dense_update()).t(), rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        before = tiny_model("llama").model.layers[0].self_attn.q_proj.weight
        assert torch.allclose(layer(x), x @ before.t(), atol=1e-5)


def test_batches_without_a_spectrum_are_counted():
    penalty = BaLoraPenalty(llama(consistency=0.0))
    batch = tiny_batch("llama")
    for labels in (batch["labels"], torch.full_like(batch["labels"], -100)):
        penalty.loss({"labels": labels}, torch.randn(2, 7, 64, requires_grad=True))
    assert penalty.report()["ba_lora_skipped"] == 1


@pytest.mark.parametrize("config", [deftcore.KasaFactoredConfig, deftcore.BaLoraConfig])
def test_under_autocast(config):
    model = perturbed(peft.get_peft_model(tiny_model("llama"), config(r=4, target_modules=TARGETS)))
    exact = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = logits(model)
    assert (rounded.float() - exact).abs().max() <= 0.03 * exact.abs().max()


@pytest.mark.parametrize("config", [deftcore.KasaFactoredConfig, deftcore.BaLoraConfig])
def test_compiled_without_a_break(config):
    plain = nn.Sequential(nn.Linear(12, 9))
    model = perturbed(peft.get_peft_model(plain, config(r=3, target_modules=["0"])))
    layer, x = model.base_model.model[0], torch.randn(4, 12)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), layer(x), rtol=1e-5, atol=1e-6)
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("kind", [deftcore.KasaFactoredConfig, deftcore.BaLoraConfig])
def test_a_config_that_was_used_before(tmp_path, kind, held, dtype):
    """The one that a model holds knows its base; an adapter that no file fills still begins from the weights."""
    config = kind(r=2, target_modules=TARGETS, task_type="CAUSAL_LM", init_lora_weights=True)
    for name in ("first", "second"):
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny_model("llama").to(dtype), config)
        model.save_pretrained(tmp_path / name)
        config = model.peft_config["default"] if held else config
    base = lambda: tiny_model("llama").to(dtype).eval()  # noqa: E731
    found = [peft.PeftModel.from_pretrained(base(), tmp_path / name) for name in ("first", "second")]
    assert model.peft_config["default"].base_hash
    states = [peft.get_peft_model_state_dict(model) for model in found]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert any("minus" in key and value.any() for key, value in states[0].items())


@pytest.mark.parametrize("targets", [TARGETS, "all-linear"])
@pytest.mark.parametrize("kind", [deftcore.KasaFactoredConfig, deftcore.BaLoraConfig])
def test_a_config_goes_on_several_bases(kind, targets):
    """Wrapping a model leaves the config that it is given as it was."""
    config = kind(r=2, target_modules=targets, task_type="CAUSAL_LM")
    before = config.to_dict()
    for seed in (1, 2):
        base = tiny_model("llama")
        torch.manual_seed(seed)
        base.model.layers[0].mlp.down_proj.weight.data.normal_()
        peft.get_peft_model(base, config)
        assert base.model.layers[0].mlp.down_proj.lora_minus_A["default"].any()
        assert config.to_dict() == before


@pytest.mark.parametrize("to", ["16bit", "4bit"])
@pytest.mark.parametrize("kind", [deftcore.KasaFactoredConfig, deftcore.BaLoraConfig])
def test_merge_where_another_adapter_is_active(kind, to):
    """A layer whose adapter is not the active one is as without."""
    base = deftcore.quantize(tiny_model("llama").eval())
    model = peft.get_peft_model(base, kind(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"), adapter_name="a")
    model.add_adapter("b", kind(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    y = logits(perturbed(model))
    merged = deftcore.merge(model, to=to)
    assert [name.rpartition(".")[2] for name in merged.deftcore_merge] == ["q_proj"] * 2
    assert torch.allclose(logits(merged), y, rtol=1e-4, atol=1e-5) or to == "4bit"
    plain = deftcore.quantize(tiny_model("llama").eval()).model.layers[1].self_attn.v_proj
    theirs, x = merged.model.layers[1].self_attn.v_proj, torch.randn(3, 32)
    assert torch.allclose(theirs(x), plain(x), atol=1e-6)


def test_the_teacher_leaves_what_was_frozen():
    model = llama()
    frozen = [p for name, p in model.named_parameters() if "lora_A" in name]
    for p in frozen:
        p.requires_grad_(False)
    penalty, batch = BaLoraPenalty(model), tiny_batch("llama")
    penalty.teacher(batch)
    assert not any(p.requires_grad for p in frozen)
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_B" in name)


def test_the_teacher_keeps_no_cache():
    model, seen = llama(), []
    model.config.use_cache = True
    model.base_model.model.register_forward_hook(lambda *given: seen.append(given[-1].get("past_key_values")))
    BaLoraPenalty(model).teacher(tiny_batch("llama"))
    assert seen == [None]


@pytest.mark.parametrize("options", [
    {"kind": deftcore.KasaFactoredConfig}, {"kind": deftcore.KasaFactoredConfig, "base_mode": "destructive"},
    {"kind": deftcore.BaLoraConfig}, {"kind": deftcore.BaLoraConfig, "base_mode": "pissa"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_adaptive_gates_fold_into_the_layers(options, merged, packed):
    """DEFT's gates scale what a down projection returns: weight, update and what is taken away."""
    options = dict(options)
    kind = options.pop("kind")
    base = tiny_model("llama").eval()
    base = deftcore.quantize(base) if packed else base
    model = perturbed(peft.get_peft_model(base, kind(r=3, target_modules=["down_proj"], **options)))
    if merged:
        model.merge_adapter()
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    x = torch.randn(5, 72)
    with torch.no_grad():
        y = layer(x)
        layer.scale_output_(0.25)
        assert torch.allclose(layer(x), 0.25 * y, rtol=1e-4, atol=1e-6)
        if merged:
            model.unmerge_adapter()
            model.merge_adapter()
            assert torch.allclose(layer(x), 0.25 * y, rtol=1e-3, atol=0.05 if packed else 1e-5)
