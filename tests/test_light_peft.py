"""Light-PEFT's first phase: masks and importance, against what they say in words and against the published code."""

import copy

import peft
import pytest
import torch
import transformers
from conftest import recompute, tiny_batch, tiny_model
from slim_models import KINDS, weighty

import deftcore
from deftcore.methods.light_peft.adapters import add_adapters, sites
from deftcore.methods.light_peft.config import LightPeftConfig
from deftcore.methods.light_peft.estimation import Estimation
from deftcore.methods.light_peft.selection import select
from deftcore.methods.light_peft.slimming import slim
from deftcore.methods.lora.bottleneck import BottleneckConfig
from deftcore.models.coupled import find_coupled
from deftcore.models.kept import Kept
from deftcore.training.objective import Objective

PARTS = {"heads": False, "ffn": True}


def adapted(kind="llama", dtype=torch.float32, **options):
    """A tiny model with adapters that matter, and the config: without dropout, and heads in groups of two."""
    config = LightPeftConfig(**({"r": 3, "dropout": 0.0, "head_ratio": 0.5} | options))
    model = tiny_model(kind, "gated-gelu" if kind in ("t5", "mt5") else "silu").to(dtype)
    generator = torch.Generator().manual_seed(5)
    weighty(model, generator)
    with torch.no_grad():
        model = add_adapters(model, config).to(dtype)
        for site in sites(model):
            site.second.normal_(std=0.3, generator=generator)
    return model, config


def masks_of(estimation, part):
    return [
        mask
        for each, mask in zip(estimation.structures, estimation.masks, strict=True)
        if (each.mlp is not None) == PARTS[part]
    ]


def batches(count, kind="llama"):
    """Batches of two sequences, the second padded."""
    found = []
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        batch = tiny_batch(kind)
        batch["input_ids"] = torch.randint(2, 64, (2, 7), generator=generator)
        batch["labels"] = torch.where(batch["labels"] == -100, -100, batch["input_ids"])
        found.append(batch)
    return found


def exact_norms(model, monkeypatch):
    """Norms that compute in float64, where Transformers' go through float32."""
    for kind in {type(module) for module in model.modules() if hasattr(module, "variance_epsilon")}:
        monkeypatch.setattr(
            kind, "forward",
            lambda self, x: self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt(),
        )  # fmt: skip


def step(model, estimation, window, number=0, steps=1):
    """One step's backward, each micro-batch's share of the loss as the loop takes it; the loss."""
    model.zero_grad()
    estimation.zero_grad()
    estimation.begin(window, number, steps)
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in window]
    total = 0.0
    for batch, count in zip(window, counts, strict=True):
        output = model(**batch)
        loss = output.loss * count / sum(counts) + estimation.share(batch, output)
        loss.backward()
        total += float(loss.detach())
    estimation.end()
    return total


# ---------------------------------------------------------------------------- masks


@pytest.mark.parametrize("adapter", ["lora", "bottleneck"])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_ones_change_no_bit(kind, adapter):
    """Nor does what else the estimation hooks in; and afterwards nothing is left of it. Every mask has a gradient."""
    model, config = adapted(kind, adapter=adapter, head_granularity="head" if kind == "phi3" else None)
    batch = tiny_batch(kind)
    structure = {name: type(module) for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    logits = model(**batch).logits
    estimation = Estimation(model, config)
    estimation.begin([batch], 0, 1)
    output = model(**batch)
    assert torch.equal(output.logits, logits)
    (output.loss + estimation.share(batch, output)).backward()
    estimation.end()
    assert all(bool(mask.grad.abs().min() > 0) for mask in estimation.masks)
    found = estimation.scores()
    assert all(0 < float(score) < 10 for score in found.modules.values())
    assert all(bool((score >= 0).all() and (score > 0).any()) for score in found.ranks.values())
    estimation.detach()
    assert {name: type(module) for name, module in model.named_modules()} == structure
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    kept = select(estimation.structures, found, config)
    kept.check(find_coupled(model.get_base_model()), {site.name: 3 for site in sites(model)})
    assert kept.units.keys() == {each.name for each in estimation.structures}


@pytest.mark.parametrize("kind", ["llama", "bert", "t5", "phi3", "gpt2"])
def test_gradients_of_masks(kind, monkeypatch):
    """Finite differences in float64, l1 with its sign among them; 0 at 0."""
    model, config = adapted(kind, torch.float64, l1_heads=0.01, l1_ffn=0.03)
    exact_norms(model, monkeypatch)
    estimation = Estimation(model, config)
    batch = tiny_batch(kind)
    with torch.no_grad():
        for mask in estimation.masks:
            mask.uniform_(-1.2, 1.2)

    def loss():
        output = model(**batch)  # whose own loss is in float32
        return output.logits.sin().sum() + estimation.share(batch, output)

    loss().backward()
    h = 1e-5
    with torch.no_grad():
        for mask in estimation.masks:
            for i in (0, mask.numel() - 1):
                old, sides = float(mask[i]), []
                for moved in (old + h, old - h):
                    mask[i] = moved
                    sides.append(float(loss().detach()))
                mask[i] = old
                assert float(mask.grad[i]) == pytest.approx((sides[0] - sides[1]) / (2 * h), rel=1e-6, abs=1e-7)
        for mask in estimation.masks:
            mask.zero_()
    found = []
    for amount in (0.0, 0.5):
        estimation.config.l1_heads = estimation.config.l1_ffn = amount
        step(model, estimation, [batch])
        found.append([mask.grad.clone() for mask in estimation.masks])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_masked_head_is_a_head_with_masked_probabilities(monkeypatch):
    """As the published code masks, in outputs and all gradients, grouped queries among them."""
    from transformers.models.llama import modeling_llama

    model, config = adapted("llama", torch.float64, ffn_ratio=0)
    exact_norms(model, monkeypatch)
    model.get_base_model().set_attn_implementation("eager")
    plain = copy.deepcopy(model)
    estimation = Estimation(model, config)
    values = [torch.rand(4, dtype=torch.float64) for _ in estimation.masks]
    with torch.no_grad():
        for mask, value in zip(estimation.masks, values, strict=True):
            mask.copy_(value)
    batch = tiny_batch("llama")
    masked = model(**batch)
    masked.loss.backward()
    own = [value.clone().requires_grad_() for value in values]

    def attention(module, query, key, value, attention_mask, scaling, **_):
        key, value = (modeling_llama.repeat_kv(x, module.num_key_value_groups) for x in (key, value))
        scores = query @ key.transpose(2, 3) * scaling + attention_mask
        probabilities = scores.softmax(-1, dtype=torch.float32).to(query.dtype) * own[module.layer_idx].view(
            1, -1, 1, 1
        )
        return (probabilities @ value).transpose(1, 2).contiguous(), probabilities

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", attention)
    output = plain(**batch)
    output.loss.backward()
    torch.testing.assert_close(masked.logits, output.logits, rtol=1e-12, atol=1e-12)
    for mask, other in zip(estimation.masks, own, strict=True):
        torch.testing.assert_close(mask.grad, other.grad, rtol=1e-10, atol=1e-14)
    for a, b in zip(sites(model), sites(plain), strict=True):
        torch.testing.assert_close(a.first.grad, b.first.grad, rtol=1e-10, atol=1e-14)


def test_a_ratio_of_zero_leaves_a_part_alone():
    model, config = adapted(head_ratio=0, ffn_ratio=0, module_ratio=0, rank_ratio=0)
    estimation = Estimation(model, config)
    assert estimation.groups(1.0) == []
    assert not any(module._forward_pre_hooks for name, module in model.named_modules() if "layers" in name)
    batch = batches(1)[0]
    loss = step(model, estimation, [batch])
    assert loss == float(model(**batch).loss)
    assert select(estimation.structures, estimation.scores(), config) == Kept()
    for part, options in (("heads", {"ffn_ratio": 0}), ("ffn", {"head_ratio": 0})):
        model, config = adapted(**options)
        estimation = Estimation(model, config)
        assert len(estimation.masks) == 2
        kept = select(estimation.structures, estimation.scores(), config).units
        assert all((each.mlp is not None) == PARTS[part] for each in estimation.structures if each.name in kept)


def test_rates_of_masks():
    """Groups of their own, without weight decay, at a multiple of the run's rate."""
    model, config = adapted(mask_lr_mult_heads=100, mask_lr_mult_ffn=50)
    estimation = Estimation(model, config)
    groups = estimation.groups(3e-4)
    assert [group["lr"] for group in groups] == [pytest.approx(3e-2), pytest.approx(1.5e-2)]
    assert all(group["weight_decay"] == 0 for group in groups)
    for group, part in zip(groups, ("heads", "ffn"), strict=True):
        assert {id(mask) for mask in group["params"]} == {id(mask) for mask in masks_of(estimation, part)}


# ---------------------------------------------------------------------------- importance


def stored_importance(model, window):
    """Of adapters and ranks, straight from tensors that plain hooks store."""
    seen, handles = {}, []
    for site in sites(model):
        layer, name = site.layer, site.name
        inner = layer.lora_B if hasattr(layer, "lora_B") else layer.bottleneck_up
        factor = layer.scaling["default"] if hasattr(layer, "lora_B") else layer.configs["default"].scaling
        for part, module, scale in (("y", layer.base_layer, 1.0), ("dy", inner["default"], factor)):

            def hook(_, __, output, key=(name, part), scale=scale):
                seen.setdefault(key, []).append(output.detach() * scale)

            handles.append(module.register_forward_hook(hook))
    masks = [batch["attention_mask"].bool() for batch in window]
    model.zero_grad()
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in window]
    for batch, count in zip(window, counts, strict=True):
        (model(**batch).loss * count / sum(counts)).backward()
    for handle in handles:
        handle.remove()
    modules, ranks = {}, {}
    for site in sites(model):
        ratios = [
            (dy.norm(dim=-1) / y.norm(dim=-1)).view(mask.shape)[mask]
            for dy, y, mask in zip(seen[site.name, "dy"], seen[site.name, "y"], masks, strict=True)
        ]
        modules[site.name] = torch.cat(ratios).mean()
        a, b = site.first, site.second
        ranks[site.name] = torch.stack(
            [(a[k] * a.grad[k]).mean().abs() + (b[:, k] * b.grad[:, k]).mean().abs() for k in range(len(a))]
        )
    return modules, ranks


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [("llama", {}), ("gpt2", {}), ("bert", {"adapter": "bottleneck", "scaling": 0.7}),
     ("opt", {"adapter": "bottleneck", "parallel": True, "target_modules": ["fc2"]})],
)  # fmt: skip
def test_importance_is_that_of_stored_tensors(kind, options, checkpointing):
    """Padding left out, in one piece or in four, whether activations are computed once or twice."""
    model, config = adapted(kind, torch.float64, l1=0.0, **options)
    window = batches(4, kind)
    modules, ranks = stored_importance(model, window)
    joined = [{name: torch.cat([batch[name] for batch in window]) for name in window[0]}]
    if checkpointing:
        recompute(model.get_base_model())
        model.train()
    for parts in (window, joined):
        estimation = Estimation(model, config)
        step(model, estimation, parts)
        found = estimation.scores()
        estimation.detach()
        for name in modules:
            torch.testing.assert_close(found.modules[name], modules[name], rtol=1e-10, atol=0)
            torch.testing.assert_close(found.ranks[name], ranks[name].detach(), rtol=1e-9, atol=1e-16)


def test_importance_with_dropout_is_that_of_its_draw():
    """dY of the forward that learns, whose fused op stays in use."""
    model, config = adapted(dropout=0.4)
    model.train()
    window = batches(1)
    torch.manual_seed(3)
    modules, _ = stored_importance(model, window)  # whose hooks turn the op off
    estimation = Estimation(model, config)
    assert all(site.layer.waits() == "" for site in sites(model))
    torch.manual_seed(3)
    step(model, estimation, window)
    found = estimation.scores().modules
    for name, expected in modules.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=0)
    torch.manual_seed(4)
    assert stored_importance(model, window)[0] != modules


def test_the_second_half_counts():
    """Of five steps the last three; what is no number counts as 0, in the mean."""
    model, config = adapted()
    estimation = Estimation(model, config)
    expected = []
    for number, batch in enumerate(batches(5)):
        name = sites(model)[0].name
        step(model, estimation, [batch], number, 5)
        single = Estimation(model, config)
        step(model, single, [batch])
        expected.append(single.scores().modules[name])
        single.detach()
    torch.testing.assert_close(estimation.scores().modules[name], torch.stack(expected[2:]).mean())
    assert float(estimation.steps) == 3
    with torch.no_grad():
        estimation.modules_sum.zero_()
        estimation.ranks_sum.zero_()
        estimation.steps.zero_()
    estimation.begin([], 0, 1)
    estimation._tally[0], estimation._tally[1] = 1.0, 0.0
    sites(model)[0].first.grad = torch.full_like(sites(model)[0].first, float("nan"))
    estimation.end()
    step(model, estimation, [batch])
    found = estimation.scores()
    torch.testing.assert_close(found.modules[name], expected[4] / 2)
    assert all(bool(score.isfinite().all()) for score in found.ranks.values())


def test_scores_leave_out_the_scaler():
    """Gradients under float16 hold its factor until they are clipped."""
    model, config = adapted()
    estimation = Estimation(model, config)
    batch = batches(1)[0]
    step(model, estimation, [batch])
    plain = estimation.scores().ranks
    estimation.ranks_sum.zero_()
    estimation.steps.zero_()
    estimation.begin([batch], 0, 1)
    output = model(**batch)
    model.zero_grad()
    (1024 * output.loss).backward()
    estimation.end(1024.0)
    for name, score in estimation.scores().ranks.items():
        torch.testing.assert_close(score, plain[name], rtol=1e-5, atol=1e-12)


def test_cross_attention_reads_the_encoder():
    """Keys and values of T5's cross-attention are of the encoder's tokens, whose padding is another."""
    model, config = adapted("t5", torch.float64)
    generator = torch.Generator().manual_seed(1)
    batch = {
        "input_ids": torch.randint(2, 64, (2, 9), generator=generator),
        "labels": torch.tensor([[4, 5, 6], [7, 8, -100]]),
    }
    batch["attention_mask"] = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    site = next(site for site in sites(model) if site.name.endswith("EncDecAttention.k"))
    seen = []
    handle = site.layer.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    estimation = Estimation(model, config)
    estimation.begin([batch], 0, 1)
    model(**batch).loss.backward()
    handle.remove()
    estimation.end()
    (x, output) = seen[0]
    base = site.layer.base_layer(x)
    ratios = (output - base).norm(dim=-1) / base.norm(dim=-1)
    expected = ratios[batch["attention_mask"].bool()].mean()
    torch.testing.assert_close(estimation.scores().modules[site.name], expected.detach(), rtol=1e-9, atol=0)


def test_over_4_bits():
    """Masks and importance of a packed base are those of the decoded one."""
    from test_quantize import dequantised

    packed = deftcore.quantize(tiny_model("llama", "silu"), block_size=32)
    results = []
    for base in (dequantised(packed), packed):
        torch.manual_seed(0)
        config = LightPeftConfig(r=3, dropout=0.0, head_ratio=0.5)
        model = add_adapters(base, config)
        with torch.no_grad():
            for site in sites(model):
                site.second.normal_(std=0.3)
        estimation = Estimation(model, config)
        step(model, estimation, batches(1))
        found = estimation.scores()
        results.append([*(mask.grad for mask in estimation.masks), *found.modules.values(), *found.ranks.values()])
    for ours, reference in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, reference, rtol=2e-3, atol=1e-6)


# ---------------------------------------------------------------------------- what masks learn


def test_noise_gets_the_lower_masks():
    """Half of the channels of each layer only disturb; the labels are what the others say."""
    model = tiny_model("llama", "silu")
    good = {}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
        for each in find_coupled(model):
            if each.mlp is not None:
                good[each.name] = torch.randperm(each.units)[: each.units // 2]
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for name, places in good.items():
            kept = torch.zeros(72, dtype=torch.bool)
            kept[places] = True
            teacher.get_submodule(f"{name}.down_proj").weight[:, ~kept] = 0
    config = LightPeftConfig(head_ratio=0, ffn_ratio=0.5, module_ratio=0, rank_ratio=0, r=1)
    student = add_adapters(model, config)
    estimation = Estimation(student, config)
    optimizer = torch.optim.AdamW(estimation.groups(0.02))
    steps = 60
    for number in range(steps):
        ids = torch.randint(2, 64, (8, 12))
        with torch.no_grad():
            wanted = teacher(ids).logits
        estimation.begin([{}], number, steps)
        output = student(input_ids=ids)
        loss = (wanted.softmax(-1) * (wanted.log_softmax(-1) - output.logits.log_softmax(-1))).mean()
        (loss + estimation.share({}, output)).backward()
        estimation.end()
        optimizer.step()
        optimizer.zero_grad()
    assert estimation.report()["mask_min"] < 0.8 < 1 < estimation.report()["mask_max"] * 1.2
    units = select(estimation.structures, estimation.scores(), config).units
    hits = sum(len(set(units[name]) & set(places.tolist())) for name, places in good.items())
    assert hits >= 0.9 * sum(map(len, units.values()))


def test_report_of_the_last_step():
    """Range of the masks, and what of the selection the last tenth of the steps decided."""
    model, config = adapted(head_ratio=0.5, ffn_ratio=0)
    estimation = Estimation(model, config)
    batch = batches(1)[0]
    for number in range(10):
        step(model, estimation, [batch], number, 10)
        with torch.no_grad():
            for mask in estimation.masks:
                mask[:2] -= 0.01 if number < 9 else -0.2
                mask[2:] -= 0.0 if number < 9 else 0.2
        assert bool(estimation.report()) == (number == 9)
    report = estimation.summary(estimation.report())
    assert report == {
        "mask_min": pytest.approx(0.8), "mask_max": pytest.approx(1.11), "mask_decided_late": 1.0,
    }  # fmt: skip


# ---------------------------------------------------------------------------- the published code


def published(values, kind):
    """The authors' model with our adapters, and the estimation over it."""
    sizes = dict(zip(values["config_names"].tolist(), values["config"].tolist(), strict=True))
    state = {
        key.removeprefix("base.base_model.model."): torch.tensor(values[key])
        for key in values
        if key.startswith("base.")
    }
    config = transformers.RobertaConfig(
        vocab_size=sizes["vocab"], hidden_size=sizes["hidden"], num_hidden_layers=sizes["layers"], type_vocab_size=1,
        num_attention_heads=sizes["heads"], intermediate_size=sizes["ffn"], num_labels=3, hidden_dropout_prob=0.0,
        max_position_embeddings=len(state["roberta.embeddings.position_embeddings.weight"]), layer_norm_eps=1e-5,
        attention_probs_dropout_prob=0.0, pad_token_id=1,
    )  # fmt: skip
    dtype = torch.float64 if kind == "lora" else torch.float32
    base = transformers.RobertaForSequenceClassification(config).to(dtype)
    base.load_state_dict(state)
    options = LightPeftConfig(
        adapter=kind, r=3, lora_alpha=6, dropout=0.0, l1=float(values["l1_coef"]), rule="quantile",
        head_ratio=0.333333333, ffn_ratio=0.333333333,
    )  # fmt: skip
    model = add_adapters(base, options).to(dtype).train()
    names = [site.name for site in sites(model)]
    assert names == [name.removeprefix("base_model.model.") for name in values["module_names"]]
    return model, Estimation(model, options), options


@torch.no_grad()
def load_step(values, number, model, estimation):
    for j, site in enumerate(sites(model)):
        site.first.copy_(torch.tensor(values[f"step{number}.mod{j}.down"]))
        site.second.copy_(torch.tensor(values[f"step{number}.mod{j}.up"]))
    for part in PARTS:
        for i, mask in enumerate(masks_of(estimation, part)):
            mask.copy_(torch.tensor(values[f"step{number}.layer{i}.mask_{part}"]))
    return {name: torch.tensor(values[f"step{number}.{name}"]) for name in ("input_ids", "attention_mask", "labels")}


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_the_published_estimation(parity, kind):
    """Losses, gradients of adapters and masks, importance step by step, and its mean."""
    values = parity(f"light_peft_{kind}.npz")
    model, estimation, _ = published(values, kind)
    relative, absolute = (1e-10, 1e-14) if kind == "lora" else (5e-6, 1e-6)

    def same(found, name):
        wanted = torch.tensor(values[name])
        torch.testing.assert_close(
            found.detach().to(wanted.dtype), wanted, rtol=0, atol=absolute + relative * float(wanted.abs().max())
        )

    for number in range(6):
        batch = load_step(values, number, model, estimation)
        model.zero_grad()
        estimation.zero_grad()
        estimation.begin([batch], number, 6)
        output = model(**batch)
        loss = output.loss + estimation.share(batch, output)
        loss.backward()
        before = estimation.modules_sum.clone(), estimation.ranks_sum.clone()
        estimation.end()
        same(loss, f"step{number}.loss_with_l1")
        for j, site in enumerate(sites(model)):
            same(site.first.grad, f"step{number}.mod{j}.grad_down")
            same(site.second.grad, f"step{number}.mod{j}.grad_up")
            if number >= 3:
                same(estimation.modules_sum[j] - before[0][j], f"step{number}.mod{j}.imp_module")
                same((estimation.ranks_sum - before[1])[3 * j : 3 * j + 3], f"step{number}.mod{j}.imp_rank")
        for part in PARTS:
            for i, mask in enumerate(masks_of(estimation, part)):
                same(mask.grad, f"step{number}.layer{i}.grad_mask_{part}")
    found = estimation.scores()
    same(torch.stack([*found.modules.values()]), "I_module")
    same(torch.stack([*found.ranks.values()]), "I_rank")


def test_the_published_pruning(parity):
    """Which heads, channels, modules and ranks, from the records that the authors' code kept."""
    values = parity("light_peft_lora.npz")
    _, estimation, options = published(values, "lora")
    with torch.no_grad():
        for part, name in (("heads", "attn"), ("ffn", "ffn")):
            for i, mask in enumerate(masks_of(estimation, part)):
                mask.copy_(torch.tensor(values[f"prune.{name}_record_f32"][i, -1]))
    estimation.modules_sum.copy_(torch.tensor(values["I_module"]))
    estimation.ranks_sum.copy_(torch.tensor(values["I_rank"]).flatten())
    for scope, label in (("global", "global"), ("layer", "layerwise")):
        options.module_ratio, options.rank_ratio, options.rank_scope = 0.5, 0.5, scope
        kept = select(estimation.structures, estimation.scores(), options)
        for part in PARTS:
            own = [each for each in estimation.structures if (each.mlp is not None) == PARTS[part]]
            for i, each in enumerate(own):
                pruned = values[f"prune.{part}_pruned"][i].nonzero()[0].tolist()
                assert sorted(set(range(each.units)) - set(kept.units[each.name])) == pruned
        present = values[f"slim_{label}.modules_present"]
        for j, (ranks, flags) in enumerate(zip(kept.ranks.values(), values[f"slim_{label}.ranks_kept"], strict=True)):
            assert bool(ranks) == bool(present[j])
            assert list(ranks) == (flags.nonzero()[0].tolist() if present[j] else [])
    for ratio in (0.75, 0.5):
        options.module_ratio, options.rank_ratio = ratio, 0.0
        gone = select(estimation.structures, estimation.scores(), options).ranks
        flags = values[f"prune.modules_kept_q{ratio}"]
        names = [name.removeprefix("base_model.model.") for name in values["module_names"]]
        assert [name not in gone for name in names] == flags.tolist()


# ---------------------------------------------------------------------------- bad input


def test_what_does_not_fit_is_refused():
    config = LightPeftConfig(r=2, head_ratio=0.5)
    with pytest.raises(ValueError, match="has neither LoRA nor bottleneck adapters"):
        Estimation(tiny_model("llama"), config)
    model, _ = adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"the adapter of model\.layers\.0\.self_attn\.q_proj is merged; unmerge"):
        Estimation(model, config)
    model, _ = adapted()
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"q_proj must have one active adapter, got 2"):
        Estimation(model, config)
    unknown = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4)
    )
    with pytest.raises(ValueError, match=r"heads and channels that belong together are known of .*; got 'bloom'"):
        add_adapters(unknown, config)
    with pytest.raises(ValueError, match="mamba: it is made of Mamba mixers and has no MLP"):
        add_adapters(tiny_model("mamba"), config)
    with pytest.raises(ValueError, match="prunes plain LoRA and bottlenecks on linear layers"):
        add_adapters(tiny_model("llama"), LightPeftConfig(adapter="bottleneck", target_modules=["mlp"]))
    drawn = peft.get_peft_model(tiny_model("llama"), BottleneckConfig(target_modules=["down_proj"], stochastic=True))
    for use in (lambda: Estimation(drawn, config), lambda: slim(drawn, Kept())):
        with pytest.raises(ValueError, match=r"model: model\.layers\.0\.mlp\.down_proj: .* no stochastic ones"):
            use()
    with pytest.raises(
        ValueError, match=r"head_ratio: 0\.333333 of 2 query heads of a group of model\.layers\.0\.self_attn"
    ):
        Estimation(add_adapters(tiny_model("llama"), LightPeftConfig()), LightPeftConfig())


def test_it_is_an_objective_that_is_saved_whole(tmp_path):
    """What checkpoints keep is masks and sums alone."""
    model, config = adapted()
    estimation = Estimation(model, config)
    assert isinstance(estimation, Objective)
    masks = [f"masks.{i}" for i in range(4)]
    assert [*estimation.state_dict()] == ["modules_sum", "ranks_sum", "steps", "settled", *masks]
    assert estimation.settings()["l1"] == 1e-4
