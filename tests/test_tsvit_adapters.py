"""Adapters on TSViT: how much of it each trains, that it starts as it was, and the authors' own numbers."""

import copy
import re
from functools import partial

import peft
import pytest
import torch
from torch import nn

from deftcore import BitFitConfig, BottleneckConfig, TSViT, TSViTPromptConfig, TSViTTokenConfig
from deftcore.methods.tsvit.adapting import adapt_classes
from deftcore.methods.tsvit.checkpoints import load_published, published_name
from deftcore.methods.tsvit.encoder import Attention
from deftcore.methods.tsvit.inputs import unpack
from deftcore.training.adapters import load_adapter

SMALL = {"num_classes": 3, "image_size": 8, "patch_size": 2, "channels": 4, "dim": 16, "heads": 2, "dim_head": 8,
         "temporal_depth": 2, "spatial_depth": 2}  # fmt: skip
HEAD, MIXER = ["head", "mixer"], ["mixer"]
LAYERS = r"(temporal|spatial)\.layers\.\d+\."
FULL = LAYERS + r".*|patch|dates|head\.pixels"
PARTIAL = LAYERS + r"(attention\.(norm|projection)|mlp\.(norm|fc1))|patch"
TIME_MLP, MLP = r"temporal\.layers\.\d+\.mlp", LAYERS + "mlp"


def lora(r, **options):
    return peft.LoraConfig(r=r, lora_alpha=1, target_modules="all-linear", modules_to_save=MIXER, **options)


def adaptformer(r, targets=MLP, **options):
    saved = [*HEAD, "class_tokens"]
    return BottleneckConfig(r=r, parallel=True, target_modules=targets, modules_to_save=saved, **options)


# What of `adapt_classes(model, 1)` each method trains, of PASTIS's sizes.
COUNTS = {
    "bitfit full": (11_544, lambda: BitFitConfig(target_modules=FULL, new_biases=["qkv"], modules_to_save=MIXER)),
    "bitfit partial": (7_316, lambda: BitFitConfig(target_modules=PARTIAL, modules_to_save=MIXER)),
    "adaptformer 8/0": (11_960, lambda: adaptformer(8, TIME_MLP)),
    "adaptformer 8/8": (20_696, lambda: adaptformer(8)),
    "lora 1": (17_198, lambda: lora(1)),
    "lora 4": (68_732, lambda: lora(4)),
    "prompts": (8_984, lambda: TSViTPromptConfig(temporal=8, spatial=8, modules_to_save=HEAD)),
}
METHODS = {
    name: make for name, (_, make) in COUNTS.items()
} | {
    "stochastic": lambda: adaptformer(4, stochastic=True),
    "on fc2": lambda: adaptformer(4, ["fc2"]),
    "inside": lambda: TSViTPromptConfig(temporal=2, spatial=3, place="inside", modules_to_save=HEAD),
    "shallow": lambda: TSViTPromptConfig(temporal=2, spatial=3, depth="shallow", modules_to_save=HEAD),
    "tokens": lambda: TSViTTokenConfig(modules_to_save=MIXER),
    "last token": lambda: TSViTTokenConfig(tokens=1, modules_to_save=MIXER),
}  # fmt: skip
PROMPTS = ("prompts", "inside", "shallow")
MERGING = ("bitfit full", "bitfit partial", "lora 1", "lora 4", "tokens", "last token")
ALL = pytest.mark.parametrize("name", METHODS)


def small(**options):
    torch.manual_seed(0)
    return adapt_classes(TSViT(**SMALL | options).eval(), 1)


def series(dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(2, 5, 4, 8, 8, dtype=dtype), torch.randint(1, 366, (2, 5))


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def moved(model, seed=2):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in trained(model).values():
            p.add_(torch.randn_like(p) / 4)
    return model.eval()


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# ---------------------------------------------------------------------------- counts


def of_pastis():
    with torch.device("meta"):
        return TSViT(num_classes=19, image_size=24, patch_size=2, channels=10)


@pytest.mark.parametrize("name", COUNTS)
def test_counts_of_the_table(name):
    count, make = COUNTS[name]
    with torch.device("meta"):
        model = peft.get_peft_model(adapt_classes(of_pastis(), 1), make())
    assert sum(p.numel() for p in trained(model).values()) == count


def test_counts_without_an_adapter():
    with torch.device("meta"):
        model = adapt_classes(of_pastis(), 1)
    assert sum(p.numel() for part in HEAD for p in model.get_submodule(part).parameters()) == 792
    assert sum(p.numel() for p in of_pastis().parameters()) == 1_657_476


def test_counts_of_tokens():
    with torch.device("meta"):
        model = peft.get_peft_model(of_pastis(), TSViTTokenConfig())
        assert sum(p.numel() for p in trained(model).values()) == 2_432
        model = peft.get_peft_model(adapt_classes(of_pastis(), 27, "extend"), TSViTTokenConfig(tokens=8))
    assert {name.rpartition(".")[0]: tuple(p.shape) for name, p in trained(model).items()} == {
        "base_model.model.class_tokens.tsvit_token_rows": (8, 128)
    }


# ---------------------------------------------------------------------------- the start, a step


@pytest.mark.parametrize("name", [name for name in METHODS if name not in PROMPTS])
def test_starts_as_the_backbone(name):
    model, batch = small(), series()
    before = model(*batch)
    assert torch.equal(peft.get_peft_model(model, METHODS[name]())(*batch), before)


def test_no_prompts_over_dates_change_nothing_there():
    model, batch = small(), series()
    before = model.encode_time(*batch)
    adapted = peft.get_peft_model(model, TSViTPromptConfig(temporal=0, spatial=3))
    assert torch.equal(model.encode_time(*batch), before)
    assert (model.encode_space(before) - copy.deepcopy(adapted).unload().encode_space(before)).abs().max() > 1e-3


def test_masked_prompts_change_nothing():
    torch.manual_seed(0)
    attention, x = Attention(16, 2, 8).double(), torch.randn(3, 5, 16, dtype=torch.float64)
    prompt = attention.keys_and_values(torch.randn(2, 16, dtype=torch.float64))
    mask = torch.ones(3, 7, dtype=torch.bool)
    assert (attention(x, mask, prompt=prompt) - attention(x)).abs().max() > 1e-3
    mask[:, 5:] = False
    close(attention(x, mask, prompt=prompt), attention(x), 1e-14)


@ALL
def test_a_step_changes_what_is_listed(name):
    """And gradients reach all of it, none what is frozen."""
    model = peft.get_peft_model(small(), METHODS[name]()).train()
    moved(model).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(trained(model).values(), lr=1.0)
    batch = series()
    for _ in range(8):  # of two down projections one is drawn
        model(*batch).square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == trained(model).keys()


def test_the_listed_parameters():
    """By name, of a module that holds adapters and copies."""
    model = peft.get_peft_model(small(), TSViTTokenConfig(tokens=1, modules_to_save=MIXER))
    names = {name.removeprefix("base_model.model.") for name in trained(model)}
    assert names == {"class_tokens.tsvit_token_rows.default", "mixer.modules_to_save.default.weight",
                     "mixer.modules_to_save.default.bias"}  # fmt: skip
    model = peft.get_peft_model(small(), TSViTPromptConfig(temporal=0, spatial=2, place="inside", depth="shallow"))
    assert {name.removeprefix("base_model.model.spatial.layers.0.attention.") for name in trained(model)} == {
        "tsvit_prompt_keys.default", "tsvit_prompt_values.default"
    }  # fmt: skip


@pytest.mark.parametrize(("place", "depth"), [("outside", "deep"), ("inside", "deep"), ("outside", "shallow")])
def test_lengths_inside(monkeypatch, place, depth):
    """K + T + m keys over dates and n^2 + m over patches; what comes out has neither m."""
    model = small()
    peft.get_peft_model(model, TSViTPromptConfig(temporal=2, spatial=5, place=place, depth=depth))
    lengths, attend = [], nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        nn.functional, "scaled_dot_product_attention",
        lambda q, k, v, **more: lengths.append((q.shape[2], k.shape[2])) or attend(q, k, v, **more),
    )  # fmt: skip
    time = model.encode_time(*series())
    assert (time.shape, model.encode_space(time).shape) == ((2, 16, 3, 16), (2, 3, 16, 16))
    deep = depth == "deep"
    assert lengths == [(8, 10), (3, 10 if deep else 8), (16, 21), (16, 21 if deep else 16)]


# ---------------------------------------------------------------------------- through PEFT


@ALL
def test_save_load_and_disable(tmp_path, name):
    base, batch = small(), series()
    model = moved(peft.get_peft_model(copy.deepcopy(base), METHODS[name]()))
    logits = model(*batch)
    assert (logits - base(*batch)).abs().max() > 1e-3
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)  # MKL rounds by how memory is aligned
    with model.disable_adapter():
        close(model(*batch), base(*batch))
    model.save_pretrained(tmp_path)
    again = load_adapter(copy.deepcopy(base), tmp_path).eval()
    for twin in (again, copy.deepcopy(model)):
        wanted, found = model.state_dict(), twin.state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        close(twin(*batch), logits)


@ALL
def test_a_second_adapter(name):
    model, batch = peft.get_peft_model(small(), METHODS[name]()), series()
    first = moved(model)(*batch)
    model.add_adapter("other", METHODS[name]())
    assert torch.equal(model(*batch), first)
    model.set_adapter("other")
    other = moved(model, seed=3)(*batch)
    assert (other - first).abs().max() > 1e-3
    model.set_adapter("default")
    assert torch.equal(model(*batch), first)
    model.delete_adapter("other")
    assert torch.equal(model(*batch), first)


@pytest.mark.parametrize("name", MERGING)
def test_merge(name):
    model, batch = moved(peft.get_peft_model(small(), METHODS[name]())), series()
    before, logits = copy.deepcopy(model), model(*batch)
    model.merge_adapter()
    close(model(*batch), logits)
    model.unmerge_adapter()
    for p, old in zip(model.parameters(), before.parameters(), strict=True):
        close(p, old, 1e-6 if "lora" in name else 0.0)
    merged = model.merge_and_unload()
    assert type(merged) is TSViT
    close(merged(*batch), logits)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in MERGING])
def test_no_merge(name):
    model, batch = moved(peft.get_peft_model(small(), METHODS[name]())), series()
    logits = model(*batch)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"merge: .* cannot be merged"):
            merge()
    assert torch.equal(model(*batch), logits)
    assert type(model.unload()) is TSViT


@ALL
def test_a_checkpoints_tensors_are_beneath_an_adapter(name):
    """Each by name and value, of a published file that was read, given a mixer and adapted; none is another's."""
    torch.manual_seed(3)
    stored = {published_name(key): p.detach() for key, p in TSViT(**SMALL).named_parameters()}
    base = adapt_classes(load_published(stored, heads=2), 1)
    mixer = {f"mixer.{key}": p.detach().clone() for key, p in base.mixer.named_parameters()}
    model, found = peft.get_peft_model(base, METHODS[name]()), {}
    for key, p in model.named_parameters():
        plain = key.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", "")
        if plain in mixer:
            assert torch.equal(p, mixer[plain])
        elif "modules_to_save" not in plain and not any(
            part in plain for part in ("lora_", "bitfit_", "bottleneck_", "tsvit_")
        ):
            found[published_name(plain)] = p
    assert found.keys() == stored.keys()
    assert all(torch.equal(p, stored[key]) for key, p in found.items())


@pytest.mark.parametrize("reentrant", [True, False])
@ALL
def test_recomputed_activations(name, reentrant):
    """Beneath which nothing trains: gradients are those of a run that keeps all, to the bit."""
    found = []
    for options in (None, {"use_reentrant": reentrant}):
        model = moved(peft.get_peft_model(small(), METHODS[name]())).train()
        if options:
            model.base_model.model.gradient_checkpointing_enable(options)
        torch.manual_seed(3)
        model(*series()).square().sum().backward()
        found.append({key: p.grad for key, p in trained(model).items()})
    assert all(torch.equal(grad, found[0][key]) for key, grad in found[1].items())


@pytest.mark.slow
@ALL
def test_compiled(name):
    """Whole, in training and else, with the draws of a plain run."""
    model, (x, doy), mask = peft.get_peft_model(small(), METHODS[name]()), series(), torch.rand(2, 5) < 0.7
    torch.compiler.reset()
    compiled = torch.compile(moved(model), fullgraph=True, backend="aot_eager")
    close(compiled(x, doy, mask), model(x, doy, mask))
    model.train()
    logits = []
    for run in (model, compiled):
        torch.manual_seed(3)
        logits.append(run(x, doy, mask))
    close(*logits)
    logits[1].sum().backward()
    assert all(p.grad is not None for p in trained(model).values())


@pytest.mark.parametrize("name", ["prompts", "inside", "last token", "adaptformer 8/8"])
def test_exported(name):
    """`torch.export`, for batches and series of any length."""
    model, (x, doy), mask = moved(peft.get_peft_model(small(), METHODS[name]())), series(), torch.rand(2, 5) < 0.7
    lengths = {0: torch.export.Dim("batch"), 1: torch.export.Dim("frames")}
    exported = torch.export.export(model.get_base_model(), (x, doy, mask), dynamic_shapes=(lengths,) * 3).module()
    for cut in ((slice(0, 2), slice(0, 5)), (slice(0, 1), slice(1, 4))):
        close(exported(x[cut], doy[cut], mask[cut]), model(x[cut], doy[cut], mask[cut]))


def test_prompts_add_up():
    """Of two active adapters the keys stand together, in whatever order: softmax has none."""
    model, batch = peft.get_peft_model(small(), TSViTPromptConfig()), series()
    model.add_adapter("other", TSViTPromptConfig(temporal=1, spatial=4, place="inside"))
    model.base_model.set_adapter(["default", "other"])
    both = model(*batch)
    model.base_model.set_adapter(["other", "default"])
    close(model(*batch), both)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: TSViTPromptConfig(temporal=-1), "temporal: must be an integer of at least 0, got -1"),
        (lambda: TSViTPromptConfig(spatial=True), "spatial: must be an integer of at least 0, got True"),
        (lambda: TSViTPromptConfig(temporal=0, spatial=0), "temporal: must be at least 1 where spatial is 0"),
        (lambda: TSViTPromptConfig(place="between"), "place: must be one of outside, inside, got 'between'"),
        (lambda: TSViTPromptConfig(depth="flat"), "depth: must be one of deep, shallow, got 'flat'"),
        (lambda: TSViTTokenConfig(tokens=0), "tokens: must be an integer of at least 1, got 0"),
        (lambda: peft.get_peft_model(small(), TSViTTokenConfig(tokens=4)), "tokens: must be at most the 3"),
        (lambda: peft.get_peft_model(nn.Linear(2, 2), TSViTPromptConfig()), "model: must be a TSViT, got Linear"),
    ],
)
def test_what_is_refused(make, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        make()


def test_one_adapters_tokens_at_a_time():
    model = peft.get_peft_model(small(), TSViTTokenConfig())
    model.add_adapter("other", TSViTTokenConfig())
    with pytest.raises(ValueError, match="adapter_names: one adapter's class tokens are active"):
        model.base_model.set_adapter(["default", "other"])


@pytest.mark.parametrize(
    "name", ["lora 1", "bitfit full", "adaptformer 8/8", "stochastic", "prompts", "inside", "tokens"]
)
def test_gradients_by_differences(name):
    model = moved(peft.get_peft_model(small(temporal_depth=1, spatial_depth=1).double(), METHODS[name]()))
    batch, seed = series(torch.float64), torch.randn(2, 1, 8, 8, dtype=torch.float64)
    (model(*batch) * seed).sum().backward()
    with torch.no_grad():
        for p in trained(model).values():
            direction = torch.randn_like(p)
            ends = []
            for step in (1e-6, -1e-6):
                p.add_(direction, alpha=step)
                ends.append((model(*batch) * seed).sum())
                p.sub_(direction, alpha=step)
            close((ends[0] - ends[1]) / 2e-6, (p.grad * direction).sum(), 1e-5)


# ---------------------------------------------------------------------------- the authors' code

ADAPTERS = {
    "wheat_bitfit_full": lambda: BitFitConfig(target_modules=FULL, new_biases=["qkv"], modules_to_save=MIXER),
    "wheat_bitfit_partial": lambda: BitFitConfig(target_modules=PARTIAL, modules_to_save=MIXER),
    "wheat_lora": lambda: lora(2, rank_pattern={r"temporal\..*": 3, r"spatial\..*": 1}),
    "wheat_adaptformer_4_3": lambda: adaptformer(4, rank_pattern={r"spatial\..*": 3}),
    "wheat_adaptformer_4_0": lambda: adaptformer(4, TIME_MLP),
    "wheat_adamix_test_4_3": lambda: adaptformer(4, rank_pattern={r"spatial\..*": 3}, stochastic=True),
    "wheat_prompt_outside_deep_2_3": lambda: TSViTPromptConfig(spatial=3, modules_to_save=HEAD),
    "wheat_prompt_outside_deep_0_2": lambda: TSViTPromptConfig(temporal=0, modules_to_save=HEAD),
    "wheat_prompt_outside_shallow_2_3": lambda: TSViTPromptConfig(spatial=3, depth="shallow", modules_to_save=HEAD),
    "wheat_prompt_inside_deep_2_3": lambda: TSViTPromptConfig(spatial=3, place="inside", modules_to_save=HEAD),
}
# Of ours what the authors call otherwise, behind the name of a layer.
PLACES = {
    "attention.tsvit_prompt_rows.default": "0.fn.prompt",
    "attention.tsvit_prompt_keys.default": "0.fn.prompt_k",
    "attention.tsvit_prompt_values.default": "0.fn.prompt_v",
    "mlp.bottleneck_down.default": "2.mlp_down",
    "mlp.bottleneck_up.default": "2.mlp_up",
}


def theirs(name):
    """What the authors call a parameter of an adapted TSViT."""
    name = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "").replace(".base_layer", "")
    for ours, their in PLACES.items():
        layer, found, rest = name.partition(ours)
        if found:
            start = published_name(layer + "mlp.fc1.bias").removesuffix("1.fn.net.0.bias")
            return start + their + re.sub(r"\.choices\.", ".", rest)
    for ours, their in {"bitfit_bias.default": "bias", "lora_A.default.weight": "lora_A",
                        "lora_B.default.weight": "lora_B"}.items():  # fmt: skip
        if name.endswith(ours):
            return published_name(name.removesuffix(ours) + "weight").removesuffix("weight") + their
    return published_name(name)


def tensors(values, start):
    """An archive's, by the names of its plain model: encoders under LoRA and AdaMix's projections have others."""
    again = {"_LoraTransformer": "_transformer", "space_Lora": "space_", ".2.down_layers.": ".2.mlp_down.",
             ".2.up_layer.": ".2.mlp_up.", ".mlp_layer.": "."}  # fmt: skip
    found = {}
    for key in values.files:
        if key.startswith(start):
            name = key.removeprefix(start)
            for one, other in again.items():
                name = name.replace(one, other)
            found[name] = torch.from_numpy(values[key]).double()
    return found


def adapted(name, base):
    """A TSViT as an archive has it: without an adapter all but the head and the mixer is frozen."""
    if name == "wheat_head":
        for part in base.children():
            part.requires_grad_(part in (base.head, base.mixer))
        base.positions.requires_grad_(False)
        return base
    if name == "wheat_bitfit_partial":  # qkv has a bias there, which does not train
        for attention in (each for each in base.modules() if isinstance(each, Attention)):
            attention.qkv.bias = nn.Parameter(torch.zeros(len(attention.qkv.weight), dtype=torch.float64))
    return peft.get_peft_model(base, ADAPTERS[name](), autocast_adapter_dtype=False)


@pytest.mark.parametrize("name", ["wheat_head", *ADAPTERS])
def test_parity(parity, name):
    """Logits, what trains and its gradients; the authors' start is random, so every tensor is theirs first."""
    values = parity(name + ".npz")
    given, used = tensors(values, "w."), set()
    base = adapt_classes(TSViT(**SMALL, legacy_layout=True).double(), 1)
    model = adapted(name, base).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "original_module" in key:
                continue
            p.copy_(given[theirs(key)].view_as(p))
            used.add(theirs(key))
    assert used == given.keys()
    x, doy = unpack(torch.from_numpy(values["x"]).double())
    assert torch.equal(doy, torch.from_numpy(values["date_row"]))
    time = base.encode_time(x, doy)
    close(time, torch.from_numpy(values["after_time"]).double(), 1e-6)
    close(base.encode_space(time), torch.from_numpy(values["after_space"]).double(), 1e-6)
    logits = model(x, doy)
    close(logits, torch.from_numpy(values["logits_legacy"]), 1e-10)
    if "trainable" in values.files:
        gradients = tensors(values, "g.")
        (logits * torch.from_numpy(values["grad_seed_r"])).sum().backward()
        assert {theirs(key) for key in trained(model)} == gradients.keys()
        for key, p in trained(model).items():
            expected = gradients[theirs(key)].view_as(p)
            close(p.grad, expected, 1e-4 * expected.abs().max().item())
    if name in ("wheat_lora", "wheat_bitfit_full", "wheat_bitfit_partial"):
        merged = model.merge_and_unload()
        close(merged(x, doy), torch.from_numpy(values["logits_legacy"]), 1e-10)
        ours = {published_name(own): p for own, p in merged.named_parameters() if "qkv.bias" not in own}
        for key, expected in tensors(values, "merged.").items():
            close(ours[key], expected, 1e-6)
