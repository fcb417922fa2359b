"""S2FT: what turning an adapter off, other optimisers, other dtypes and shards do to weights and files."""

import copy

import peft
import pytest
import torch
from conftest import tiny_batch
from s2ft_models import ALL, layers_of, scaled, train, trainable, wrap
from torch.optim.optimizer import _global_optimizer_post_hooks

from deftcore.methods.s2ft.config import S2ftConfig
from deftcore.methods.s2ft.delta import DeltaAdapter, DeltaHost, extract_adapter

STORAGE = pytest.mark.parametrize("storage", ["shared", "split"])


def weights_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


@STORAGE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_while_disabled_writes_the_trained_slices(tmp_path, storage, dtype):
    model = train(wrap(scaled("llama", dtype), storage=storage), tiny_batch("llama"))
    model.save_pretrained(tmp_path / "on")
    on = extract_adapter(model)
    with model.disable_adapter():
        model.save_pretrained(tmp_path / "off")
        off = extract_adapter(model)
    want, got = weights_of(tmp_path / "on"), weights_of(tmp_path / "off")
    assert want.keys() == got.keys()
    assert all(torch.equal(want[key], got[key]) for key in want)
    assert all(
        torch.equal(on.deltas[name].block, off.deltas[name].block) and on.deltas[name].block.any() for name in on.deltas
    )


def preference_loss(model, reference, batch):
    """DPO's form: the policy's log-probabilities against those of the untrained model."""

    def score(logits):
        return logits.log_softmax(-1).gather(-1, batch["labels"].clamp(min=0).unsqueeze(-1)).squeeze(-1).sum(-1)

    policy = score(model(**batch).logits)
    with torch.no_grad():
        base = score(reference().logits)
    return -torch.nn.functional.logsigmoid(policy - base)[0] + 0.3 * (policy - base)[1]


@STORAGE
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_backward_after_a_disabled_forward(storage, dtype):
    """Preference training: policy, reference (adapter off), backward; as with a second model for the reference."""
    batch = tiny_batch("llama")
    model = train(wrap(scaled("llama", dtype), targets=ALL, storage=storage), batch)
    other, base = copy.deepcopy(model), wrap(scaled("llama", dtype), targets=ALL, storage=storage)

    def disabled():
        with model.disable_adapter():
            return model(**batch)

    loss, want = preference_loss(model, disabled, batch), preference_loss(other, lambda: base(**batch), batch)
    assert torch.equal(loss, want)
    loss.backward()
    want.backward()
    for ours, theirs in zip(trainable(model), trainable(other), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
        assert ours.grad.any()


def test_gradient_with_the_adapter_off_is_the_base_models():
    """The input's gradient of a disabled forward is of the weights before training, also once it is on again."""
    batch = tiny_batch("llama")
    model = train(wrap(scaled("llama", torch.float64), targets=ALL), batch)
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach()
    inputs, plain = embedded.clone().requires_grad_(), embedded.clone().requires_grad_()
    with model.disable_adapter():
        loss = model(inputs_embeds=inputs, labels=batch["labels"]).loss
    loss.backward()
    scaled("llama", torch.float64)(inputs_embeds=plain, labels=batch["labels"]).loss.backward()
    torch.testing.assert_close(inputs.grad, plain.grad, rtol=1e-10, atol=1e-13)


@STORAGE
def test_disabled_while_merged_is_the_base(storage):
    batch = tiny_batch("llama")
    model = wrap(scaled("llama", torch.float64), targets=ALL, storage=storage)
    base = model(**batch).logits
    moved = train(model, batch)(**batch).logits
    model.merge_adapter()
    torch.testing.assert_close(model(**batch).logits, moved, rtol=1e-10, atol=1e-12)
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, base)
    torch.testing.assert_close(model(**batch).logits, moved, rtol=1e-10, atol=1e-12)
    model.base_model.set_adapter([])
    assert torch.equal(model(**batch).logits, base)


# ---------------------------------------------------------------------------- 16-bit weights and their masters


def test_no_optimiser_of_the_process_is_hooked():
    wrap(scaled("llama", torch.bfloat16))
    assert not _global_optimizer_post_hooks


def test_every_change_of_a_master_is_seen():
    """Optimisers of other libraries write through raw addresses or `.data`, without a mark and without hooks."""
    batch = tiny_batch("llama")
    model, marked = (wrap(scaled("llama", torch.bfloat16)) for _ in range(2))
    first = model(**batch).logits
    for ours, theirs in zip(trainable(model), trainable(marked), strict=True):
        ours.data.mul_(1.5)
        with torch.no_grad():
            theirs.mul_(1.5)
    assert torch.equal(model(**batch).logits, marked(**batch).logits)
    assert not torch.equal(model(**batch).logits, first)
    for part in trainable(model):
        part.data.mul_(2)
    model.merge_adapter()
    for layer in layers_of(model).values():
        assert torch.equal(torch.cat(layer._blocks()), torch.cat(list(layer.slices)).bfloat16())


def test_masters_under_compile_and_inference_mode():
    model = wrap(scaled("llama", torch.bfloat16))
    layer = next(iter(layers_of(model).values()))
    x = torch.randn(3, layer.base_layer.in_features, dtype=torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    first = layer(x)
    assert torch.equal(compiled(x), first)
    for part in layer.slices:
        part.data.mul_(2)
    second = compiled(x)
    assert not torch.equal(second, first)
    assert torch.equal(second, layer(x))
    with torch.inference_mode():
        for part in layer.slices:
            part.data.mul_(0.5)
        assert torch.equal(layer(x), first)
    layer.enable_adapters(False)
    torch.testing.assert_close(compiled(x), layer.base_layer(x), rtol=2**-6, atol=2**-9)


def test_forwards_before_the_first_backward():
    """Writing a master into its weight leaves the graphs of earlier forwards alone; a step after one does not."""
    batch = tiny_batch("llama")
    model = wrap(scaled("llama", torch.bfloat16))
    first, second = model(**batch).loss, model(**batch).loss
    first.backward()
    alone = [p.grad.clone() for p in trainable(model)]
    second.backward()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(trainable(model), alone, strict=True))
    stale = model(**batch).loss
    train(model, batch, steps=1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


# ---------------------------------------------------------------------------- the base in another dtype


@pytest.mark.parametrize(
    ("made_in", "loaded_in"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float32")]
)
def test_adapter_loads_over_its_base_in_another_dtype(tmp_path, made_in, loaded_in):
    """From one checkpoint, that Transformers was asked to load in either dtype."""
    batch, made, loaded = tiny_batch("llama"), getattr(torch, made_in), getattr(torch, loaded_in)
    stored = scaled("llama").to(min(made, loaded, key=lambda dtype: dtype.itemsize))
    model = train(wrap(copy.deepcopy(stored).to(made), targets=["o", "down", "up"]), batch)
    model.save_pretrained(tmp_path)
    extract_adapter(model).save(tmp_path / "delta.safetensors")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(stored).to(loaded), tmp_path)
    for name, layer in layers_of(again).items():
        assert torch.equal(layer.trained(), torch.cat(list(layers_of(model)[name].slices)).to(loaded))
    fresh = stored.to(loaded)
    DeltaHost(fresh).apply(DeltaAdapter.load(tmp_path / "delta.safetensors"))
    trained = model.merge_and_unload().state_dict()
    for key, value in fresh.state_dict().items():
        torch.testing.assert_close(value, trained[key].to(loaded), rtol=torch.finfo(loaded).eps, atol=1e-9)


def test_another_base_is_refused_in_every_dtype(tmp_path):
    model = wrap(scaled("llama", torch.bfloat16))
    adapter = extract_adapter(model)
    model.save_pretrained(tmp_path)
    other = scaled("llama")
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight += 0.01
    with pytest.raises(ValueError, match="made for other base weights"):
        peft.PeftModel.from_pretrained(copy.deepcopy(other), tmp_path)
    with pytest.raises(ValueError, match=r"mlp\.down_proj: .*made for other base weights"):
        DeltaHost(other).apply(adapter)
    with pytest.raises(ValueError, match=r"the adapter was made in bfloat16.*got float16"):
        peft.PeftModel.from_pretrained(scaled("llama", torch.float16), tmp_path)
    with pytest.raises(ValueError, match=r"the adapter was made in bfloat16.*got float16"):
        DeltaHost(scaled("llama", torch.float16)).apply(adapter)
    nearly = scaled("llama")
    wrap(scaled("llama")).save_pretrained(tmp_path / "wide")
    with torch.no_grad():  # a change that 16 bits do not see
        nearly.model.layers[0].mlp.down_proj.weight.mul_(1 + 2.0**-22)
    with pytest.raises(ValueError, match="made for other base weights"):
        peft.PeftModel.from_pretrained(nearly, tmp_path / "wide")


def test_host_wants_an_adapter():
    with pytest.raises(TypeError, match=r"adapter: must be a DeltaAdapter \(DeltaAdapter.load reads a file\), got str"):
        DeltaHost(torch.nn.Linear(2, 2)).switch("law.safetensors")


@pytest.mark.parametrize("strategy", ["random", "weight"])
def test_a_config_goes_on_several_bases(strategy):
    """Wrapping a model leaves the config that it is given as it was; each base has a selection of its own."""
    config = S2ftConfig(channel_ratio=0.2, task_type="CAUSAL_LM", strategy=strategy)
    before = config.to_dict()
    found = []
    for seed in (1, 2):
        base = scaled("llama")
        torch.manual_seed(seed)
        base.model.layers[0].mlp.down_proj.weight.data.normal_()
        found.append(peft.get_peft_model(base, config).peft_config["default"])
        assert config.to_dict() == before
    assert found[0].base_hash != found[1].base_hash
    assert (found[0].indices == found[1].indices) == (strategy == "random")
