"""S2FT: selection, co-permutation, training in place, adapters."""

import copy
import io
import logging
import weakref

import peft
import pytest
import torch
from conftest import recompute, tiny_batch
from s2ft_models import ALL, FAMILIES, layers_of, scaled, state_of, train, trainable, wrap
from torch import nn

import deftcore
from deftcore import ops
from deftcore.methods.s2ft.config import S2ftConfig
from deftcore.methods.s2ft.delta import DeltaAdapter, DeltaHost, extract_adapter, fuse
from deftcore.methods.s2ft.gated_mlp import FusedGatedMlp
from deftcore.methods.s2ft.layer import S2ftLayer
from deftcore.methods.s2ft.selection import select_channels
from deftcore.methods.s2ft.serving import serve
from deftcore.models.coupled import find_coupled, permute, runs, selected_first
from deftcore.nn import Linear4bit
from deftcore.ops import LowRankDelta

# ---------------------------------------------------------------------------- permutation


@pytest.mark.parametrize("family", FAMILIES)
def test_permuted_model_is_the_same_function(family):
    model, batch = scaled(family, torch.float64), tiny_batch(family)
    before, logits = state_of(model), model(**batch).logits
    orders = []
    for coupled in find_coupled(model):
        groups = coupled.units // coupled.group
        inside = torch.stack([torch.randperm(coupled.group) for _ in range(groups)])
        order = (torch.randperm(groups).view(-1, 1) * coupled.group + inside).flatten()
        permute(model, coupled, order)
        orders.append((coupled, order))
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
    error = (model(**batch).logits - logits).abs().max() / logits.abs().max()
    assert error < 1e-12
    for coupled, order in orders:
        permute(model, coupled, torch.argsort(order))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_query_heads_stay_in_their_group():
    model = scaled("llama")
    attention = next(c for c in find_coupled(model) if c.group == 2)
    with pytest.raises(ValueError, match="may not leave"):
        permute(model, attention, torch.tensor([0, 2, 1, 3]))
    with pytest.raises(ValueError, match="must be a permutation"):
        permute(model, attention, torch.tensor([0, 0, 1, 3]))


def test_generation_with_a_cache_is_token_identical():
    model = scaled("llama")
    ids = tiny_batch("llama")["input_ids"][:1]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(ids, **options)
    wrapped = wrap(model, targets=ALL, head_granularity="head")
    assert torch.equal(wrapped.generate(input_ids=ids, **options), plain)


def test_unknown_family_is_refused():
    import transformers as t

    config = t.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4)
    with pytest.raises(ValueError, match=r"are known of llama, .*; got 'bloom'"):
        wrap(t.BloomForCausalLM(config))


def test_orders_and_runs():
    coupled = next(c for c in find_coupled(scaled("llama")) if c.group == 1)
    first, second = torch.tensor([1, 5, 9]), torch.tensor([5, 9, 70])
    order = selected_first(coupled, {"up": first, "down": second})
    assert order[:4].tolist() == [1, 5, 9, 70]
    assert runs(torch.tensor([0, 1, 4, 5, 6, 9])) == [(0, 2), (4, 3), (9, 1)]


# ---------------------------------------------------------------------------- training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", [None, ALL])
@pytest.mark.parametrize("family", FAMILIES)
def test_wrapping_changes_nothing_and_only_slices_train(family, targets, dtype):
    """Spec P1, P3, P12 and unloading: outside the slices every byte of the base stays."""
    model, batch = scaled(family, dtype), tiny_batch(family)
    before, logits = state_of(model), model(**batch).logits
    wrapped = wrap(model, family, targets=targets).eval()
    again = wrapped(**batch).logits
    near = 1e-6 if dtype == torch.float32 else 2.0**-6  # two roundings of 16 bits
    assert (again - logits).abs().max() <= near * logits.abs().max()
    train(wrapped, batch, steps=50, lr=3e-3)
    moved = wrapped(**batch).logits
    assert not torch.equal(moved, again)
    with wrapped.disable_adapter():
        assert torch.equal(wrapped(**batch).logits, again)
    assert torch.equal(wrapped(**batch).logits, moved)
    layers = layers_of(wrapped)
    adapter = extract_adapter(wrapped)
    merged = wrapped.merge_and_unload()
    assert (merged(**batch).logits - moved).abs().max() <= near * moved.abs().max()
    for key, value in merged.state_dict().items():
        delta = adapter.deltas.get(key.removesuffix(".weight"))
        if delta is None:
            assert torch.equal(value, before[key]), key
            continue
        axis = delta.axis if family != "gpt2" else 1 - delta.axis
        untouched = torch.ones(value.shape[axis], dtype=torch.bool)
        untouched[delta.indices.long()] = False
        assert torch.equal(value.movedim(axis, 0)[untouched], before[key].movedim(axis, 0)[untouched]), key
        assert not torch.equal(value, before[key])
    assert {name for name in layers} == set(adapter.deltas)
    assert not any(isinstance(m, (S2ftLayer, FusedGatedMlp)) for m in merged.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_unload_restores_every_byte(family):
    model, batch = scaled(family), tiny_batch(family)
    before = state_of(model)
    restored = train(wrap(model, family, targets=ALL), batch).unload()
    after = restored.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) and after[key].is_contiguous() for key in before)


KINDS = [{}, {"foreach": True}, {"fused": True}]
SHORT = [(f, d, kind, 4) for f in FAMILIES for d in (torch.float32, torch.bfloat16) for kind in KINDS]
LONG = [(f, torch.float64, kind, 50) for f, kind in zip(("opt", "gpt2", "llama"), KINDS, strict=True)]


@pytest.mark.parametrize(("family", "dtype", "kind", "steps"), [*SHORT, *LONG])
def test_equals_masked_full_fine_tuning(family, dtype, kind, steps):
    """Spec P3: the trajectory of full fine-tuning whose gradients are masked to the slices, accumulation 2, clipping,
    weight decay; with plain, foreach and fused AdamW. Adam would make full steps of the roundings of gradients about
    zero; eps is above them."""
    batch, options = tiny_batch(family), {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-3, **kind}
    wrapped = wrap(scaled(family, dtype), family, targets=["o", "down", "v"], master="none")
    adapter = extract_adapter(wrapped)
    full = scaled(family, dtype)
    for p in full.parameters():
        p.requires_grad_(False)
    masks = {}
    for name, delta in adapter.deltas.items():
        weight = full.get_submodule(name).weight.requires_grad_(True)
        axis = 1 - delta.axis if family == "gpt2" else delta.axis
        mask = torch.zeros(weight.shape[axis], dtype=torch.bool)
        mask[delta.indices.long()] = True
        masks[name] = mask.view(-1, 1) if axis == 0 else mask.view(1, -1)
    optimizer = torch.optim.AdamW(trainable(wrapped), **options)
    reference = torch.optim.AdamW(trainable(full), **options)
    start = {name: full.get_submodule(name).weight.detach().clone() for name in masks}
    for _ in range(steps):
        for _ in range(2):
            (wrapped(**batch).loss / 2).backward()
            (full(**batch).loss / 2).backward()
        for name, mask in masks.items():
            full.get_submodule(name).weight.grad.mul_(mask)
        norm = nn.utils.clip_grad_norm_(trainable(wrapped), 0.5)
        wanted = nn.utils.clip_grad_norm_(trainable(full), 0.5)
        assert abs(norm - wanted) <= (2e-2 if dtype == torch.bfloat16 else 1e-6) * wanted
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
        reference.zero_grad()
        for name, mask in masks.items():  # the reference's weight decay reaches the frozen part: undo it
            weight = full.get_submodule(name).weight
            weight.data = torch.where(mask, weight.data, start[name])
    merged = wrapped.merge_and_unload()
    for name in masks:
        ours, theirs = merged.get_submodule(name).weight, full.get_submodule(name).weight
        change = (theirs.double() - start[name].double()).abs().max()
        error = (ours.double() - theirs.double()).abs()
        if dtype == torch.bfloat16:
            assert error.mean() <= 0.01 * change, (name, error.mean() / change)
        else:
            assert error.max() <= (1e-6 if dtype == torch.float32 else 1e-12), (name, error.max())
            assert change > 1e-2


def test_gradients_equal_slices_of_the_full_gradient():
    model, batch = scaled("llama", torch.float64), tiny_batch("llama")
    wrapped = wrap(copy.deepcopy(model), targets=ALL, head_granularity="head")
    wrapped(**batch).loss.backward()
    model(**batch).loss.backward()
    for name, layer in layers_of(wrapped).items():
        full = model.get_submodule(name).weight.grad
        ours = torch.cat([p.grad for p in layer.slices])
        torch.testing.assert_close(ours, full.movedim(layer.dim, 0)[layer.indices.long()], rtol=1e-9, atol=1e-12)


def test_small_steps_survive_in_bfloat16():
    """Below half a spacing, steps vanish in bfloat16; the float32 master adds them up."""
    finals = {}
    for master in ("fp32", "none"):
        wrapped = wrap(scaled("llama", torch.bfloat16), master=master)
        layer = next(iter(layers_of(wrapped).values()))
        before = layer.trained().clone()
        optimizer = torch.optim.SGD(trainable(wrapped), lr=1e-5)
        for _ in range(300):
            for p in trainable(wrapped):
                p.grad = torch.full_like(p, 1.0)
            optimizer.step()
        finals[master] = (layer.trained().float() - before.float()).mean()
    assert abs(finals["fp32"] + 3e-3) < 1e-4
    assert abs(finals["none"]) < abs(finals["fp32"]) / 2


def test_sharing_survives_what_people_do():
    """Spec P5: wrap, .to, load, deepcopy, pickle, optimiser step; an untied module raises."""
    batch = tiny_batch("llama")

    def tied(model):
        for layer in layers_of(model).values():
            for part, block in zip(layer.slices, layer._blocks(), strict=True):
                assert part.data_ptr() == block.data_ptr()
                assert part.is_contiguous()
        train(model, batch, steps=1, fused=True)
        assert torch.isfinite(model(**batch).loss)
        return model

    model = tied(wrap(scaled("llama"), targets=["o", "down", "up"]))
    want = model(**batch).logits
    assert torch.equal(copy.deepcopy(model)(**batch).logits, want)
    tied(copy.deepcopy(model))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(loaded(**batch).logits, want)
    tied(loaded)
    other = wrap(scaled("llama"), targets=["o", "down", "up"])
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(**batch).logits, want)
    other.load_state_dict(state_of(model), assign=True)
    assert torch.equal(other(**batch).logits, want)
    tied(other)
    double = copy.deepcopy(model).double()
    tied(double)
    tied(model.bfloat16().float())
    part = next(iter(layers_of(model).values())).slices[0]
    part.data = part.data.clone()
    with pytest.raises(RuntimeError, match="no longer shares"):
        model(**batch)
    for layer in layers_of(model).values():
        layer.tie()
    tied(model)


def test_state_dict_holds_no_shared_memory(tmp_path):
    from safetensors.torch import save_file

    model = wrap(scaled("llama"))
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items() if "lm_head" not in k}, tmp_path / "all.safetensors"
    )


def test_stale_backward_raises():
    model, batch = wrap(scaled("llama")), tiny_batch("llama")
    model = model.to(torch.float64)  # slices are put back onto the weights
    loss = model(**batch).loss
    train(model, batch, steps=1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_lowest_block_skips_attention():
    """Spec P16: with down alone, nothing below the lowest MLP is differentiated; and what is saved is small."""
    model, batch = wrap(scaled("llama", torch.float32), targets=["down"]), tiny_batch("llama")
    calls = []
    for i, layer in enumerate(model.base_model.model.model.layers):
        layer.self_attn.register_full_backward_hook(lambda *_, i=i: calls.append(i))
    model(**batch).loss.backward()
    assert calls == [1]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("recompute", "kept_per_block"), [("none", 2), ("up", 1), ("gate_up", 0)])
def test_recompute_keeps_less_and_changes_nothing(recompute, kept_per_block, autocast):
    batch = tiny_batch("llama")
    kept, gradients = {}, {}
    for how in ("none", recompute):
        model = wrap(scaled("llama"), recompute=how)
        references = []
        for mlp in (m for m in model.modules() if isinstance(m, FusedGatedMlp)):
            for part in (mlp.gate_proj, mlp.up_proj):
                part.register_forward_hook(lambda m, a, y, r=references: r.append(weakref.ref(y)))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        kept[how] = sum(reference() is not None for reference in references)
        loss.backward()
        gradients[how] = [p.grad for p in trainable(model)]
    assert kept["none"] == 4
    assert kept[recompute] == 2 * kept_per_block
    assert all(torch.equal(a, b) for a, b in zip(gradients["none"], gradients[recompute], strict=True))


def test_fused_mlp_keeps_two_tensors_of_the_mlp_width():
    """Spec P4: no product of gate and up is kept; PyTorch's own keeps four."""
    batch = tiny_batch("llama")

    def wide_bytes(model):
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.update({t.untyped_storage().data_ptr(): t}) or t, lambda t: t
        ):
            model(**batch)
        return sum(t.untyped_storage().nbytes() for t in kept.values() if t.numel() == 2 * 7 * 72)

    one = 2 * 7 * 72 * 4
    assert wide_bytes(wrap(scaled("llama"))) == 2 * 2 * one
    full = scaled("llama")
    assert wide_bytes(full) >= 2 * 4 * one


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_gradient_checkpointing(family):
    batch = tiny_batch(family)
    plain, checkpointed = (wrap(scaled(family), family).train() for _ in range(2))
    recompute(checkpointed)
    plain(**batch).loss.backward()
    checkpointed(**batch).loss.backward()
    for a, b in zip(trainable(plain), trainable(checkpointed), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_autocast_trains_in_the_parameters_dtype():
    model, batch = wrap(scaled("llama")), tiny_batch("llama")
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and bool(p.grad.any()) for p in trainable(model))


def test_compile():
    model, batch = wrap(scaled("llama")), tiny_batch("llama")
    layer = next(iter(layers_of(model).values()))
    x = torch.randn(3, layer.base_layer.in_features)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    assert torch.isfinite(model(**batch).loss)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_split_storage_equals_shared(family):
    def model():
        return scaled(family, torch.float64)

    batch, near = tiny_batch(family), {"rtol": 1e-9, "atol": 1e-12}
    shared, split = (wrap(model(), family, targets=["o", "down", "v"], storage=s) for s in ("shared", "split"))
    assert torch.equal(split(**batch).logits, model()(**batch).logits)
    for wrapped in (shared, split):
        train(wrapped, batch, steps=5)
    torch.testing.assert_close(split(**batch).logits, shared(**batch).logits, **near)
    before = model().state_dict()
    assert all(torch.equal(v, before[k]) for k, v in copy.deepcopy(split).unload().state_dict().items())
    a, b = shared.merge_and_unload().state_dict(), split.merge_and_unload().state_dict()
    for key in a:
        torch.testing.assert_close(a[key], b[key], **near)


def test_quantised_base():
    """Spec P10: QS2FT untrained is the 4-bit model, bit for bit; its bytes never change; it learns, and merges."""
    model = deftcore.quantize(scaled("llama"), block_size=32)
    batch = tiny_batch("llama")
    want = model(**batch).logits
    packed = {n: m.weight.clone() for n, m in model.named_modules() if isinstance(m, Linear4bit)}
    wrapped = wrap(model, targets=["o", "down", "up"])
    assert torch.equal(wrapped(**batch).logits, want)
    first = wrapped(**batch).loss.item()
    train(wrapped, batch, steps=10)
    assert wrapped(**batch).loss.item() < first
    for name, layer in layers_of(wrapped).items():
        assert layer.split
        assert torch.equal(layer.base_layer.weight, packed[name])
    adapter = extract_adapter(wrapped)
    moved = wrapped(**batch).logits
    served = serve(deftcore.quantize(scaled("llama"), block_size=32), {"one": adapter})
    with served.rows(["one", "one"]) as host:
        torch.testing.assert_close(host(**batch).logits, moved, rtol=1e-5, atol=1e-5)
    merged = wrapped.merge_and_unload()
    assert merged(**batch).loss.item() < first
    with pytest.raises(ValueError, match="4-bit; serve"):
        DeltaHost(deftcore.quantize(scaled("llama"), block_size=32)).apply(adapter)


# ---------------------------------------------------------------------------- selection


def planted(family="llama"):
    """A model whose channels 3, 17, 40 and head 2 stand out in weights and activations."""
    model = scaled(family)
    with torch.no_grad():
        for coupled in find_coupled(model):
            units = torch.tensor([2]) if "attn" in coupled.name else torch.tensor([3, 17, 40])
            for axis in coupled.axes:
                if axis.role in ("o", "down", "up") and axis.tensor == "weight":
                    weight = model.get_submodule(axis.module).weight
                    lines = weight.t() if axis.dim == 1 else weight
                    index = (units.view(-1, 1) * axis.width + torch.arange(axis.width)).flatten()
                    lines[index] *= 30
    return model


@pytest.mark.parametrize("strategy", ["weight", "product", "gradient", "activation"])
def test_strategies_find_planted_units(strategy):
    model, batch = planted(), tiny_batch("llama")
    before = state_of(model)
    config = S2ftConfig(channel_ratio=3.5 / 72, head_ratio=0.25, targets=["down"], strategy=strategy)
    found = select_channels(model, config, [batch])
    for units in found.indices.values():
        assert units == [3, 17, 40]
    smallest = select_channels(model, S2ftConfig(
        channel_ratio=0.9, targets=["down"], strategy=strategy, order="smallest"), [batch])  # fmt: skip
    assert not {3, 17, 40} & set(next(iter(smallest.indices.values())))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    heads = S2ftConfig(head_ratio=0.25, targets=["o"], strategy="weight", head_granularity="head")
    assert all(units == [2] for units in select_channels(model, heads).indices.values())


def test_padding_does_not_count():
    model, batch = planted(), tiny_batch("llama")
    config = S2ftConfig(channel_ratio=0.3, targets=["down"], strategy="activation")
    noisy = dict(batch, input_ids=batch["input_ids"].clone())
    noisy["input_ids"][1, 5:] = 63
    assert select_channels(model, config, [batch]).indices == select_channels(model, config, [noisy]).indices


def test_decoders_scores_take_the_decoders_mask():
    """An encoder's mask says nothing of a decoder's tokens, be it of the same shape or of none."""
    model = scaled("t5").eval()
    batch = tiny_batch("t5")
    batch["decoder_input_ids"] = torch.randint(2, 64, (2, 7))
    batch["labels"][0, 1:] = batch["labels"][1, 3:] = -100
    inputs = {}
    for name, module in model.named_modules():
        if name.endswith(".wo"):
            module.register_forward_pre_hook(
                lambda m, args, name=name: inputs.update({name: args[0].detach().double()})
            )
    config = S2ftConfig(channel_ratio=0.3, targets=["down"], strategy="activation")
    for given in (batch["attention_mask"], torch.ones_like(batch["attention_mask"])):
        batch["attention_mask"] = given
        found = select_channels(model, config, [batch]).indices
        assert len(found) == len(inputs) == 4
        for name, x in inputs.items():
            mask = batch["labels"] != -100 if name.startswith("decoder") else given != 0
            score = x[mask].square().sum(0)
            assert found[name] == score.topk(int(0.3 * 72)).indices.sort().values.tolist(), name


def test_counts_budgets_and_seeds(caplog):
    model = scaled("opt")
    config = {"channel_ratio": 0.1, "head_ratio": 0.5, "targets": ["o", "down"]}
    chosen = select_channels(model, S2ftConfig(**config)).indices
    assert sorted(len(u) for u in chosen.values()) == [2, 2, 7, 7]
    assert chosen == select_channels(model, S2ftConfig(**config)).indices
    assert chosen != select_channels(model, S2ftConfig(**config, seed=1)).indices
    total = select_channels(model, S2ftConfig(**config, budget="global")).indices
    assert sum(len(u) for k, u in total.items() if "fc2" in k) == 14
    with caplog.at_level(logging.INFO, "deftcore"):
        rounded = select_channels(model, S2ftConfig(**config, round_to=8)).indices
    assert {len(u) for k, u in rounded.items() if "fc2" in k} == {8}
    assert "rounded up to 8" in caplog.text
    other = select_channels(model, S2ftConfig(**config, exclude=chosen)).indices
    assert all(not set(other[key]) & set(chosen[key]) for key in chosen)
    equal = select_channels(model, S2ftConfig(channel_ratio=0.2, targets=["o", "down"])).indices
    assert {len(u) for k, u in equal.items() if "out_proj" in k} == {2}  # 14 channels, heads of 8: the nearest is 2
    whole = select_channels(scaled("llama"), S2ftConfig(targets=["o"], head_ratio=0.5)).indices
    assert all(units in ([0, 1], [2, 3]) for units in whole.values())
    wrapped = wrap(scaled("opt"), "opt", **config)
    assert sum(p.numel() for p in trainable(wrapped)) == 2 * (7 * 32 + 2 * 8 * 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channel_ratio": 0.0}, "channel_ratio: must be above 0"),
        ({"channel_ratio": 1.0}, "channel_ratio: must be above 0 and below 1"),
        ({"head_ratio": 1.5}, "head_ratio: must be above 0"),
        ({"channel_ratio": 0.001}, "channel_ratio: 0.001 of 72 is less than one unit"),
        ({"strategy": "best"}, "strategy: must be one of"),
        ({"strategy": "activation"}, "strategy: 'activation' needs data"),
        ({"targets": ["everything"]}, "targets: must be among"),
        ({"targets": []}, "targets: must name at least one"),
        ({"budget": "all"}, "budget: must be one of"),
        ({"round_to": 0}, "round_to: must be"),
        ({"round_to": True}, "round_to: must be an integer of at least 1, got True"),
        ({"indices": {"model.layers.0.mlp.down_proj": [72]}}, r"indices: .* must be in 0\.\.71"),
        ({"indices": {"model.layers.9.mlp.down_proj": [1]}}, "indices: the model has no weight"),
        ({"indices": {"model.layers.0.mlp.down_proj": [1, 1]}}, "each once"),
        ({"exclude": {f"model.layers.{i}.mlp.down_proj": list(range(70)) for i in range(2)}}, "exclude: leaves fewer"),
    ],
)
def test_bad_configuration(options, message):
    with pytest.raises(ValueError, match=message):
        wrap(scaled("llama"), **options)


def test_refusals():
    wrapped = wrap(scaled("llama"))
    with pytest.raises(ValueError, match="one adapter at a time"):
        wrapped.add_adapter("second", S2ftConfig())
    with pytest.raises(ValueError, match="unload"):
        wrapped.delete_adapter("default")
    lora = peft.get_peft_model(scaled("llama"), peft.LoraConfig(target_modules=["down_proj"]))
    with pytest.raises(ValueError, match="must be a plain linear layer"):
        wrap(lora.base_model.model)
    with pytest.raises(ValueError, match="this model has"):
        wrap(scaled("opt"), targets=["gate"])
    with pytest.raises(ValueError, match="has no S2FT layer"):
        extract_adapter(scaled("llama"))
    assert "14 input channels in place" in repr(wrapped)


# ---------------------------------------------------------------------------- checkpoints and adapters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_checkpoint_round_trip(tmp_path, dtype):
    batch = tiny_batch("llama")
    wrapped = train(wrap(scaled("llama", dtype), targets=["o", "down"], head_granularity="head"), batch)
    wrapped.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(scaled("llama", dtype), tmp_path, is_trainable=True)
    assert torch.equal(again(**batch).logits, wrapped(**batch).logits)
    for a, b in zip(trainable(again), trainable(wrapped), strict=True):
        assert torch.equal(a, b)
    other = scaled("llama", dtype)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight += 0.01
    with pytest.raises(ValueError, match="made for other base weights"):
        peft.PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_extract_apply_remove(tmp_path, family, dtype):
    """Spec P7: applied to a fresh base, the trained weights bit for bit; removed, the base's bytes."""
    batch = {k: v for k, v in tiny_batch(family).items()}
    wrapped = wrap(scaled(family, dtype), family, targets=["o", "down", "v", "up"])
    for p in trainable(wrapped):
        p.data.add_(torch.randn_like(p) * 0.05)
    extract_adapter(wrapped).save(tmp_path / "delta.safetensors")
    adapter = DeltaAdapter.load(tmp_path / "delta.safetensors")
    fresh = scaled(family, dtype)
    before = state_of(fresh)
    trained = wrapped.merge_and_unload().state_dict()
    host = DeltaHost(fresh)
    host.apply(adapter)
    assert all(torch.equal(value, trained[key]) for key, value in fresh.state_dict().items())
    assert not torch.equal(fresh(**batch).logits, scaled(family, dtype)(**batch).logits)
    with pytest.raises(ValueError, match="another is applied"):
        host.apply(adapter)
    host.switch(adapter)
    host.remove()
    host.remove()
    assert all(torch.equal(value, before[key]) for key, value in fresh.state_dict().items())
    with torch.no_grad():
        fresh.get_submodule(next(iter(adapter.deltas))).weight.add_(1)
    with pytest.raises(ValueError, match="made for other base weights"):
        DeltaHost(fresh).apply(adapter)
    with pytest.raises(ValueError, match="made for other base weights"):
        serve(fresh, {"one": adapter})
    assert all(type(module).__name__ != "GroupedDeltaLinear" for module in fresh.modules())
    with pytest.raises(ValueError, match="another base"):
        DeltaHost(scaled("opt", dtype)).apply(adapter)


def test_a_refused_switch_keeps_what_is_applied():
    model, first, other = scaled("llama"), deltas_of(1), deltas_of(2)
    host = DeltaHost(model)
    host.apply(first)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    name = next(iter(other.deltas))
    other.hashes[name] = {dtype: "0" for dtype in other.hashes[name]}
    with pytest.raises(ValueError, match="made for other base weights"):
        host.switch(other)
    assert host.applied is first
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def deltas_of(seed, exclude=None, family="llama"):
    wrapped = wrap(scaled(family), family, targets=["down", "up"], seed=seed, exclude=exclude)
    torch.manual_seed(seed)
    for p in trainable(wrapped):
        p.data.add_(torch.randn_like(p) * 0.1)
    return extract_adapter(wrapped)


def test_fusing():
    """Spec P8: disjoint adapters commute and fuse exactly, overlaps are summed and counted."""
    first = deltas_of(1)
    second = deltas_of(2, exclude=first.details["indices"])
    fused, report = fuse([first, second])
    assert report.shared == 0
    swapped, _ = fuse([second, first])
    base, one, both = scaled("llama"), scaled("llama"), scaled("llama")
    DeltaHost(one).apply(fused)
    DeltaHost(both).apply(first)
    DeltaHost(both).apply(second)
    for key, value in one.state_dict().items():
        assert torch.equal(value, both.state_dict()[key])
    for name, delta in fused.deltas.items():
        assert torch.equal(delta.block, swapped.deltas[name].block)
    overlapping = deltas_of(3)
    total, report = fuse([first, overlapping], [0.5, 2.0])
    assert report.shared > 0
    assert "more than one adapter" in str(report)
    DeltaHost(base).apply(total)
    for name, delta in total.deltas.items():
        want = torch.zeros_like(base.get_submodule(name).weight, dtype=torch.float64)
        for adapter, weight in ((first, 0.5), (overlapping, 2.0)):
            d = adapter.deltas[name]
            want.movedim(d.axis, 0).index_add_(0, d.indices.long(), weight * d.block.double())
        got = torch.zeros_like(want)
        got.movedim(delta.axis, 0).index_add_(0, delta.indices.long(), delta.block.double())
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="weights: must be one per adapter"):
        fuse([first], [1.0, 2.0])


@pytest.mark.parametrize("content", [b"", b"not a tensor file", None])
def test_damaged_adapter_file(tmp_path, content):
    path = tmp_path / "delta.safetensors"
    with pytest.raises(FileNotFoundError, match="no such file"):
        DeltaAdapter.load(path)
    deltas_of(1).save(path)
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(ValueError, match="damaged"):
        DeltaAdapter.load(path)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_serving_a_mixed_batch(family):
    """Spec P9: each row equals the model with its adapter merged, in prefill and cached decoding."""
    adapters = {"one": deltas_of(1, family=family), "two": deltas_of(2, family=family)}
    rows = ["one", None, "two", "one"]
    ids = torch.randint(2, 64, (4, 6))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = []
    for i, name in enumerate(rows):
        model = scaled(family)
        if name:
            DeltaHost(model).apply(adapters[name])
        expected.append(model.generate(ids[i : i + 1], attention_mask=torch.ones(1, 6), **options))
    served = serve(scaled(family), adapters)
    with served.rows(rows) as model:
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(found, torch.cat(expected))
    plain = scaled(family)
    torch.testing.assert_close(served.model(ids).logits, plain(ids).logits)
    with pytest.raises(ValueError, match="served are one, two"), served.rows(["three"]):
        pass
    with pytest.raises(ValueError, match="batch has 4 rows"), served.rows(["one"]) as model:
        model(ids)
    with pytest.raises(ValueError, match="2 given, but the batch has 4 rows"), served.rows(["one", None]) as model:
        model(ids)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}])
@pytest.mark.parametrize("family", ["llama", "t5", "opt"])
def test_serving_with_beams(family, options):
    """Each row's beams are those of the model with its adapter merged, whatever places they take."""
    adapters = {"one": deltas_of(1, family=family), "two": deltas_of(2, family=family)}
    rows = ["one", None, "two"]
    ids = torch.randint(2, 64, (3, 6))
    options = options | {
        "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None,
        "return_dict_in_generate": True, "output_scores": True,
    }  # fmt: skip
    served = serve(scaled(family), adapters)
    with served.rows(rows) as model:
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        again = model(ids, **({"decoder_input_ids": ids} if family == "t5" else {})).logits
    count = options.get("num_return_sequences", 1)
    for i, name in enumerate(rows):
        model = scaled(family)
        if name:
            DeltaHost(model).apply(adapters[name])
        mine = slice(i * count, (i + 1) * count)
        want = model.generate(ids[i : i + 1], attention_mask=torch.ones(1, 6), **options)
        assert torch.equal(found.sequences[mine], want.sequences)
        torch.testing.assert_close(found.sequences_scores[mine], want.sequences_scores, rtol=1e-4, atol=1e-5)
        one = ids[i : i + 1]
        plain = model(one, **({"decoder_input_ids": one} if family == "t5" else {})).logits
        torch.testing.assert_close(again[i : i + 1], plain, rtol=1e-4, atol=1e-4)
    assert "_expand_inputs_for_generation" not in vars(served.model)
    with pytest.raises(ValueError, match="1 given, but the batch has"), served.rows(["one"]) as model:
        model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=3, pad_token_id=0)


def test_serving_lora_beside_slices():
    base = scaled("llama")
    name = "model.layers.1.mlp.down_proj"
    a, b = torch.randn(4, 72) * 0.1, torch.randn(32, 4) * 0.1
    merged, ids = scaled("llama"), torch.randint(2, 64, (2, 5))
    with torch.no_grad():
        merged.get_submodule(name).weight += 2.0 * b @ a
    served = serve(base, {"slices": deltas_of(1), "lora": {name: LowRankDelta(a, b, 2.0)}})
    with served.rows(["lora", "slices"]) as model:
        torch.testing.assert_close(model(ids).logits[:1], merged(ids[:1]).logits, rtol=1e-5, atol=1e-5)
    assert "2 adapters" in repr(model)
    assert "deftcore::add_deltas" in str(torch.ops.deftcore.add_deltas.default._schema)
    assert "grouped_delta_linear" in ops.__all__
