"""Slimming: heads and channels cut for real, in every family of the table; the function is that of the masked model."""

import copy
import json

import pytest
import torch
from conftest import tiny_batch, tiny_model
from slim_models import KINDS, assert_same, logits_of, masked, model_of, some_kept

import deftcore
from deftcore.models.checkpoints import load_model
from deftcore.models.coupled import find_coupled, stored_sizes
from deftcore.models.families import FAMILIES
from deftcore.models.kept import Kept
from deftcore.models.preflight import empty_model
from deftcore.models.slimming import cut


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_slim_is_the_masked_model(kind, attention):
    model = model_of(kind)
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip("Transformers has no such path for it")
    for grouped in (True, False):
        kept = some_kept(model, grouped=grouped)
        expected = masked(model, kept)
        slim = copy.deepcopy(model)
        for each in (expected, slim):
            each.set_attn_implementation(attention)
        report = cut(slim, kept)
        assert_same(logits_of(slim, kind), logits_of(expected, kind))
        assert_same(logits_of(slim.double(), kind), logits_of(expected.double(), kind), 1e-12)
        assert report.after == sum(p.numel() for p in slim.parameters()) < report.before
        again = {each.name: each.units for each in find_coupled(slim)}
        assert again == {name: len(places) for name, places in kept.units.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_fold_is_the_masked_model(kind):
    """Factors go into the columns that read what stays, whether anything is cut beside them or not."""
    model = model_of(kind).double()
    for units in (some_kept(model).units, {each.name: tuple(range(each.units)) for each in find_coupled(model)}):
        generator = torch.Generator().manual_seed(2)
        scales = {
            name: tuple((0.9 + 0.2 * torch.rand(len(places), generator=generator)).tolist())
            for name, places in units.items()
        }
        kept = Kept(units, {}, scales)
        slim = copy.deepcopy(model)
        cut(slim, kept)
        assert_same(logits_of(slim, kind), logits_of(masked(model, kept), kind), 1e-7)  # hooks mask in float32


@pytest.mark.parametrize("kind", KINDS)
def test_empty_sub_layers(kind, tmp_path):
    """One attention and one MLP are gone but for the bias of their output; caches and files go on."""
    model = model_of(kind)
    structures = find_coupled(model)
    attention = next(each.name for each in structures if each.mlp is None)
    mlp = [each.name for each in structures if each.mlp is not None][-1]
    kept = some_kept(model, empty=(attention, mlp))
    expected = masked(model, kept)
    cut(model, kept)
    assert_same(logits_of(model, kind), logits_of(expected, kind))
    assert not {attention, mlp} & {each.name for each in find_coupled(model)}
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(load_model(tmp_path), kind), logits_of(model, kind))
    if model.can_generate():
        check_generation(model, kind)


@pytest.mark.parametrize("part", ["attention", "MLP"])
@pytest.mark.parametrize("kind", KINDS)
def test_stock_transformers_refuses_empty_sub_layers(kind, part, tmp_path):
    """Where nothing else is cut too, it would make random weights of those that the files lack."""
    model = model_of(kind)
    name = next(each.name for each in find_coupled(model) if (each.mlp is None) == (part == "attention"))
    cut(model, Kept({name: ()}))
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatch"):
        type(model).from_pretrained(tmp_path)
    assert torch.equal(logits_of(load_model(tmp_path), kind), logits_of(model, kind))


def check_generation(model, kind, **options):
    """Greedy answers with caches are those without."""
    inputs = {name: tiny_batch(kind)[name][:1] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0} | options
    without = model.generate(**inputs, **(options | {"use_cache": False, "cache_implementation": None}))
    assert torch.equal(model.generate(**inputs, **options), without)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if tiny_model(kind).can_generate()])
def test_generation_with_layers_of_different_sizes(kind):
    model = model_of(kind)
    cut(model, some_kept(model, grouped=False))
    check_generation(model, kind)
    if kind == "llama":
        check_generation(model, kind, cache_implementation="static")


@pytest.mark.parametrize("kind", KINDS)
def test_a_slim_model_stands_alone(kind, tmp_path):
    """Files with the sizes of single layers in the config: deftcore's loader reads them, and builds them empty; stock
    Transformers cannot. Everything that is not cut is what it was, byte for byte."""
    model = model_of(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kept = some_kept(model)
    touched = {f"{axis.module}.{axis.tensor}" for each in find_coupled(model) for axis in each.axes}
    cut(model, kept)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - touched)
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert type(again) is type(model)
    assert stored_sizes(again.config) == stored_sizes(model.config)
    assert torch.equal(logits_of(again, kind), logits_of(model, kind))
    assert {n: p.shape for n, p in empty_model(tmp_path).named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    with pytest.raises(RuntimeError, match="mismatch"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_uniform_sizes_load_in_transformers(kind, tmp_path):
    """As many heads and channels in every layer, other ones in each; heads where the config has their size."""
    model = model_of(kind)
    units = {}
    for i, each in enumerate(find_coupled(model)):
        if each.mlp is not None:
            units[each.name] = tuple(range(i, i + 48))
        elif FAMILIES[kind].head_size_field:
            first = i % 2 * each.group
            units[each.name] = tuple(range(first, first + 2))
    cut(model, Kept(units))
    assert not stored_sizes(model.config)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits_of(again, kind), logits_of(model, kind))
    assert {each.name: each.units for each in find_coupled(again)} == {
        each.name: each.units for each in find_coupled(model)
    }


@pytest.mark.parametrize(
    ("kind", "name", "places", "rows"),
    [  # heads of 8; channels of 72
        ("gpt2", "transformer.h.0.attn", (1, 3), [*range(8, 16), *range(24, 32), *range(40, 48), *range(56, 64),
                                                  *range(72, 80), *range(88, 96)]),
        ("gpt_neox", "gpt_neox.layers.0.attention", (0, 2), [*range(24), *range(48, 72)]),
        ("phi3", "model.layers.0.self_attn", (2, 3), [*range(16, 32), *range(40, 48), *range(56, 64)]),
        ("phi3", "model.layers.0.self_attn", (1, 2), [*range(8, 24), *range(32, 64)]),
        ("phi3", "model.layers.0.mlp", (0, 71), [0, 71, 72, 143]),
    ],
)  # fmt: skip
def test_lines_of_fused_matrices(kind, name, places, rows):
    """Every row of the fused matrix, and of its bias, holds its own number: those of the units that stay are left."""
    model = model_of(kind)
    form = FAMILIES[kind].mlps[0] if name.endswith("mlp") else FAMILIES[kind].attention
    fused = model.get_submodule(f"{name}.{form.up if name.endswith('mlp') else form.q}")
    turned = kind == "gpt2"  # [in, out]
    with torch.no_grad():
        numbers = torch.arange(fused.weight.shape[1 if turned else 0], dtype=torch.float32)
        fused.weight.copy_(numbers.view(1, -1) if turned else numbers.view(-1, 1))
        if fused.bias is not None:
            fused.bias.copy_(numbers)
    last = model.get_submodule(f"{name}.{form.down if name.endswith('mlp') else form.o}").weight.detach().clone()
    cut(model, Kept({name: places}))
    found = fused.weight.t() if turned else fused.weight
    assert found.tolist() == [[row] * found.shape[1] for row in rows]
    assert fused.bias is None or fused.bias.tolist() == rows
    width = 1 if name.endswith("mlp") else 8
    columns = [place * width + i for place in places for i in range(width)]
    now = model.get_submodule(f"{name}.{form.down if name.endswith('mlp') else form.o}").weight
    assert torch.equal(now, last[columns] if turned else last[:, columns])


def test_counts_are_as_predicted():
    """Of the spec's arithmetic: a head costs its rows of q, k, v and its columns of o, a channel those of the MLP."""
    model = model_of("opt")
    before = sum(p.numel() for p in model.parameters())
    report = cut(model, Kept({"model.decoder.layers.0.self_attn": (0, 2)}))
    assert report.before == before
    assert report.after == sum(p.numel() for p in model.parameters()) == before - 2 * 8 * (3 * (32 + 1) + 32)


def test_twice():
    """A slim model is slimmed further, as a model of its own."""
    model = model_of("phi3")
    once = some_kept(model, grouped=False)
    cut(model, once)
    twice = some_kept(model, seed=1, grouped=False)
    expected = masked(model, twice)
    cut(model, twice)
    assert_same(logits_of(model, "phi3"), logits_of(expected, "phi3"))
    copied = copy.deepcopy(model)
    copied.set_attn_implementation("eager")
    assert_same(logits_of(copied, "phi3"), logits_of(model, "phi3"))


def test_heads_in_the_config_follow_it():
    """Phi-3's layers read numbers of heads from their config: it is the model's but for them."""
    model = model_of("phi3")
    cut(model, some_kept(model))
    layer = model.model.layers[0].self_attn
    assert layer.config.num_attention_heads == 2 != model.config.num_attention_heads
    model.set_attn_implementation("eager")
    assert layer.config._attn_implementation == "eager"
    assert copy.deepcopy(layer).config.num_attention_heads == 2


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ({"model.layers.9.mlp": (0,)}, r"units: the model has no 'model\.layers\.9\.mlp'"),
        ({"model.layers.0.mlp": (0, 72)}, r"units\['model\.layers\.0\.mlp'\]: must be below 72, got 72"),
        ({"model.layers.0.self_attn": (0, 1, 2)}, "key-value groups must keep equally many"),
    ],
)
def test_bad_places_change_nothing(units, message):
    model = model_of("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        cut(model, Kept(units))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_models_that_cannot_be_cut():
    sparse = deftcore.sparsify(model_of("llama"))
    with pytest.raises(ValueError, match="sparse form; slim it before"):
        cut(sparse, Kept())
    model = model_of("llama")
    model.model.layers[1].mlp.up_proj = torch.nn.utils.parametrizations.weight_norm(model.model.layers[1].mlp.up_proj)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: a .*ParametrizedLinear cannot be cut"):
        cut(model, Kept({"model.layers.1.mlp": (0, 1)}))
    with pytest.raises(ValueError, match="it is made of Mamba mixers"):
        cut(tiny_model("mamba"), Kept())


def test_a_config_that_names_no_class(tmp_path):
    model = model_of("llama")
    cut(model, some_kept(model))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"architectures": ["NoSuchModel"]}, "no known class, got 'NoSuchModel'"),
        ({"deftcore_slim": {"model.layers.7.mlp": {"intermediate_size": 3}}}, "a size of 'model.layers.7.mlp'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path)
