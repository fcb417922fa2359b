"""DensityLoss: spec deft.md section 10, P6-P8, P10, P12, over families and PEFT methods."""

import copy
import itertools
import pickle

import peft
import pytest
import torch
import transformers
from conftest import FAMILIES, recompute, task_type, tiny_batch, tiny_model

import deftcore
from deftcore.methods.deft.objective import DensityLoss
from deftcore.methods.lora.bottleneck import BottleneckConfig
from deftcore.models.blocks import find_mlp_blocks

# PEFT 0.21 passes prefixes to the model under the cache's old name.
OLD_CACHE_NAME = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
METHODS = {
    "lora": lambda task: peft.LoraConfig(task_type=task),
    "bottleneck": lambda task: BottleneckConfig(task_type=task),
    "parallel": lambda task: BottleneckConfig(task_type=task, parallel=True, scaling=0.1),
    "prompt": lambda task: peft.PromptTuningConfig(task_type=task or "FEATURE_EXTRACTION", num_virtual_tokens=3),
    "prefix": lambda task: peft.PrefixTuningConfig(task_type=task or "FEATURE_EXTRACTION", num_virtual_tokens=3),
}


def adapted(family, method, activation="relu"):
    model = peft.get_peft_model(tiny_model(family, activation), METHODS[method](task_type(family)))
    return deftcore.patch(model) if method == "lora" else model


def batch_for(family, method):
    batch = tiny_batch(family)
    if family in ("bert", "roberta") and method == "prompt":  # virtual tokens lengthen the logits, not the labels
        del batch["labels"]
    return batch


@OLD_CACHE_NAME
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_five_methods_on_every_family(family, method):
    """Gradients reach the adapter, from the density loss alone; frozen weights get none; the padding is not counted."""
    model = adapted(family, method).train()
    objective = DensityLoss(model, surrogate="tanh")
    output = model(**batch_for(family, method))
    assert "labels" not in batch_for(family, method) or output.loss.isfinite()
    objective.loss().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert grads
    assert any(g.abs().sum() > 0 for g in grads.values())
    assert all(p.requires_grad for n, p in model.named_parameters() if n in grads)
    report = objective.report()
    virtual = 2 * 3 if method == "prompt" else 0
    assert report["tokens"] == 12 + virtual
    assert 0 < report["density"] <= (2 if family == "t5" else 1)
    assert len(report["blocks"]) == (4 if family == "t5" else 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_value(family):
    """P8: mean over blocks of mean(s(a)); encoder and decoder are added. Computed anew from captured activations."""
    model = tiny_model(family, "gelu" if family == "bert" else "relu").train()
    objective = DensityLoss(model, mask_policy="count_padding")
    captured = []
    for activation in objective._observed:
        activation.register_forward_hook(lambda m, args, out: captured.append(out.detach().double()))
    model(**tiny_batch(family))
    means = [(a.square() / (a.square() + 1e-7)).mean().item() for a in captured]
    expected = sum(means[:2]) / 2 + (sum(means[2:]) / 2 if family == "t5" else 0)
    assert objective.loss().item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_alpha_zero_changes_no_bit(family):
    """P7."""
    plain, watched = tiny_model(family, "gelu" if family != "opt" else "relu"), None
    watched = copy.deepcopy(plain)
    objective = DensityLoss(watched, alpha=0.0)
    for model in (plain, watched):
        model.train()
        loss = model(**tiny_batch(family)).loss
        if model is watched:
            loss = loss + objective.loss()
        loss.backward()
    for (name, p), q in zip(plain.named_parameters(), watched.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name
    assert objective.report()["density"] > 0


def test_empty_mask_and_padding():
    """P6, P4: a batch of padding gives 0 and no NaN; what stands under the padding does not matter."""
    model = adapted("llama", "lora").train()
    objective = DensityLoss(model)
    batch = tiny_batch("llama")
    model(input_ids=batch["input_ids"], attention_mask=torch.zeros_like(batch["input_ids"]))
    loss = objective.loss()
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    values = []
    for filler in (3, 9):
        batch["input_ids"][1, 5:] = filler
        model(**batch)
        values.append(objective.loss().item())
    assert values[0] == pytest.approx(values[1], rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "opt", "t5"])
def test_checkpointing_counts_once(family):
    """P10: the same loss and gradients with activation checkpointing; recomputation is not counted."""
    results = []
    for checkpointing in (False, True):
        model = adapted(family, "lora").train()
        torch.manual_seed(5)
        for p in model.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p, std=0.1)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            recompute(model)
            model.enable_input_require_grads()
        objective = DensityLoss(model, surrogate="tanh")
        loss = model(**tiny_batch(family)).loss + objective.loss()
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and "lora" in n}
        results.append((loss.item(), objective.report()["tokens"], grads))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert results[0][1] == results[1][1]
    for name, grad in results[0][2].items():
        torch.testing.assert_close(grad, results[1][2][name], rtol=1e-4, atol=1e-6)


def test_reentrant_checkpointing_is_refused():
    model = adapted("llama", "lora").train()
    recompute(model, reentrant=True)
    model.enable_input_require_grads()
    objective = DensityLoss(model)
    model(**tiny_batch("llama"))
    with pytest.raises(RuntimeError, match="use_reentrant"):
        objective.loss()


def test_repeated_forwards_and_generate():
    """P10: a forward replaces the one before; nothing is kept in evaluation; generate counts new positions."""
    model = adapted("llama", "lora").train()
    objective = DensityLoss(model)
    batch = tiny_batch("llama")
    model(**batch)
    model(**batch)
    twice = objective.loss()
    model(**batch)
    assert objective.loss().item() == pytest.approx(twice.item(), rel=1e-6)
    with pytest.raises(RuntimeError, match="no training forward"):
        objective.loss()
    model.eval()
    objective.reset()
    with torch.no_grad():
        model.generate(
            input_ids=batch["input_ids"][:1], max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0
        )
    assert objective.report()["tokens"] == 7 + 3
    assert all(not a.tally.sums for a in objective._observed)


def test_accumulation_equals_one_batch():
    """P5: shares of micro-batches, with `tokens`, sum to the whole batch's loss."""
    model = adapted("llama", "lora").train()
    objective = DensityLoss(model)
    batch = tiny_batch("llama")
    model(**batch)
    whole = objective.loss().item()
    counts = [objective.count_tokens({k: v[i : i + 1] for k, v in batch.items()}) for i in range(2)]
    total = {"model": counts[0]["model"] + counts[1]["model"]}
    assert total == {"model": 12.0}
    parts = 0.0
    for i in range(2):
        model(**{k: v[i : i + 1] for k, v in batch.items()})
        parts += objective.loss(tokens=total).item()
    assert parts == pytest.approx(whole, rel=1e-5)


def test_density_falls_with_alpha():
    """P12: toy training; density falls monotonically in alpha, within noise."""
    densities = []
    for alpha in (0.0, 0.1, 1.0, 10.0):
        torch.manual_seed(0)
        model = tiny_model("llama")
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=["gate_proj", "q_proj"]))
        model.train()
        objective = DensityLoss(model, alpha=alpha, surrogate="tanh")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(60):
            loss = model(**tiny_batch("llama")).loss + objective.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        objective.reset()
        model.eval()
        with torch.no_grad():
            model(**tiny_batch("llama"))
        densities.append(objective.report()["density"])
    assert all(later <= earlier + 0.02 for earlier, later in itertools.pairwise(densities)), densities
    assert densities[-1] < 0.5 * densities[0]


def test_gates():
    """Adaptive gates: w = sigmoid(4) at first, trained, folded into the weights with equal outputs, blocks skipped."""
    for family in FAMILIES:
        model = tiny_model(family).train()
        objective = DensityLoss(model, adaptive="gate", gamma=0.5)
        (model(**tiny_batch(family)).loss + objective.loss()).backward()
        assert (objective.gates.theta.grad != 0).all()
        with torch.no_grad():
            objective.gates.theta[1] = -6.0
        model.eval()
        batch = tiny_batch(family)
        with torch.no_grad():
            gated = model(**batch).logits
            names = list(objective.gate_values())
            assert objective.skippable() == [names[1]]
            assert objective.skippable(max_skip=0) == []
            assert objective.skippable(evaluate=lambda skip: float(len(skip)), margin=0.5) == []
            objective.fold_gates()
            torch.testing.assert_close(model(**batch).logits, gated, rtol=1e-4, atol=1e-5)
            objective.detach()
            dropped = copy.deepcopy(model)
            for p in find_mlp_blocks(dropped)[1].down.get().parameters():
                p.zero_()
            without_second = dropped(**batch).logits
            sparse = deftcore.sparsify(model, skip=[names[1]])
            torch.testing.assert_close(sparse(**batch).logits, without_second, rtol=1e-4, atol=1e-5)
            assert sparse.deftcore_blocks[1].kind == "skipped"


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_weights_ramp_and_gamma(gamma):
    """alpha(progress) * sum_b w_b D_b / sum_b w_b + gamma * mean gate, against captured activations in float64."""
    model = tiny_model("llama").train()
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight.mul_(0.1)
    options = {"adaptive": "gate", "gamma": gamma} if gamma else {}
    objective = DensityLoss(model, alpha=3.0, surrogate="tanh", block_weights=[1.0, 4.0], ramp=0.4, **options)
    captured = []
    for activation in objective._observed:
        activation.register_forward_hook(lambda m, args, out: captured.append(out.detach().double()))
    batch = tiny_batch("llama")
    for progress, share in ((0.0, 0.0), (0.1, 0.25), (0.3, 0.75), (0.4, 1.0), (0.9, 1.0)):
        objective.set_progress(progress)
        captured.clear()
        model(**batch)
        first, second = ((20 * a[batch["attention_mask"] != 0]).abs().tanh().mean().item() for a in captured)
        assert first < 0.8 * second
        expected = 3.0 * share * (first + 4 * second) / 5 + gamma * torch.sigmoid(torch.tensor(4.0)).item()
        assert objective.loss().item() == pytest.approx(expected, rel=1e-5, abs=1e-9)


@OLD_CACHE_NAME
@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"])
def test_tokens_of_a_batch_are_those_that_the_loss_counts(kind, family):
    """Virtual tokens stand before the input alone, whatever kind of prompt they come from."""
    config = getattr(peft, kind)(task_type=task_type(family), num_virtual_tokens=3)
    model = peft.get_peft_model(tiny_model(family), config).train()
    objective = DensityLoss(model, surrogate="tanh")
    batch = tiny_batch(family)
    virtual = 0 if kind == "PrefixTuningConfig" else 2 * 3
    counts = objective.count_tokens(batch)
    assert counts == ({"encoder": 12 + virtual, "decoder": 12} if family == "t5" else {"model": 12 + virtual})
    assert objective.window_tokens([batch, batch]) == {side: 2 * count for side, count in counts.items()}
    model(**batch)
    share = objective.loss(tokens=counts).item()
    model(**batch)
    assert share == pytest.approx(objective.loss().item(), rel=1e-6)
    bare = {"input_ids": batch["input_ids"], "decoder_input_ids": batch["input_ids"][:, :4]}
    counts = objective.count_tokens(bare)
    assert counts == ({"encoder": 14 + virtual, "decoder": 8} if family == "t5" else {"model": 14 + virtual})
    with pytest.raises(ValueError, match="batch: must have one of input_ids, inputs_embeds, got labels"):
        objective.count_tokens({"labels": batch["labels"]})


def test_experts_are_refused_by_name():
    """A mixture of experts would get a density of its shared experts alone."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32, "num_experts": 4}
    config = transformers.Qwen2MoeConfig(
        vocab_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_experts_per_tok=2,
        shared_expert_intermediate_size=32, **sizes,
    )  # fmt: skip
    model = transformers.Qwen2MoeForCausalLM(config).train()
    for use in (DensityLoss, deftcore.sparsify):
        with pytest.raises(ValueError, match=r"mixture of experts, .*: model\.layers\.0\.mlp\.experts and 1 more"):
            use(model)
    with pytest.raises(ValueError, match=r"modules: model\.layers\.0\.mlp\.experts\.act_fn is inside experts"):
        DensityLoss(model, modules=["model.layers.0.mlp.experts.act_fn"])
    objective = DensityLoss(model, modules=["model.layers.0.mlp.shared_expert.act_fn"])
    model(**tiny_batch("llama"))
    assert objective.report()["tokens"] == 12


def test_detach_restores_and_state_is_untouched():
    model = tiny_model("llama")
    keys = list(model.state_dict())
    before = {n: type(m) for n, m in model.named_modules()}
    objective = DensityLoss(model)
    assert list(model.state_dict()) == keys
    assert list(objective.parameters()) == []
    copy.deepcopy(model)
    objective.detach()
    assert {n: type(m) for n, m in model.named_modules()} == before
    pickle.dumps(model)
    assert "alpha=1.0" in repr(objective)


def test_named_modules():
    model = tiny_model("llama").train()
    objective = DensityLoss(model, modules=["model.layers.1.mlp.act_fn"])
    model(**tiny_batch("llama"))
    assert objective.loss().item() > 0
    assert list(objective.report()["blocks"]) == ["model.layers.1.mlp.act_fn"]
    with pytest.raises(ValueError, match=r"no module 'model\.layers\.7\.mlp\.act_fn'"):
        DensityLoss(tiny_model("llama"), modules=["model.layers.7.mlp.act_fn"])


def test_a_later_loss_outlives_the_earlier_one():
    model, batch = tiny_model("llama").train(), tiny_batch("llama")
    before = {name: type(m) for name, m in model.named_modules()}
    earlier, later = DensityLoss(model), DensityLoss(model)
    earlier.detach()
    model(**batch)
    assert later.loss().item() > 0
    assert later.report()["tokens"] == 12
    later.detach()
    assert {name: type(m) for name, m in model.named_modules()} == before


def test_named_modules_of_an_encoder_decoder_count_their_own_side():
    model, batch = tiny_model("t5").train(), tiny_batch("t5")
    every = DensityLoss(model)
    model(**batch)
    expected, whole = every.report(), every.loss()
    names = [f"{block}.act" for block in expected["blocks"]]
    every.detach()
    objective = DensityLoss(model, modules=names)
    model(**batch)
    found = objective.report()
    assert [found[side] for side in ("encoder", "decoder")] == [expected[side] for side in ("encoder", "decoder")]
    assert found["tokens"] == expected["tokens"]
    torch.testing.assert_close(objective.loss(tokens=objective.window_tokens([batch])), whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": -1}, "alpha"), ({"surrogate": "l3"}, "surrogate"), ({"eps": 0}, "eps"), ({"beta": 0}, "beta"),
        ({"mask_policy": "none"}, "mask_policy"), ({"adaptive": "x"}, "adaptive"),
        ({"block_weights": [1.0]}, "block_weights"),
        ({"modules": []}, "modules"), ({"gamma": -0.1}, "gamma"),
    ],
)  # fmt: skip
def test_bad_configuration(change, message):
    with pytest.raises(ValueError, match=message):
        DensityLoss(tiny_model("llama"), **change)


def test_unknown_model_is_refused_by_name():
    with pytest.raises(ValueError, match="Linear has no MLP block"):
        DensityLoss(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Tanh has no kernel"):
        DensityLoss(tiny_model("llama", "tanh"))
