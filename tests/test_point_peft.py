"""Point-PEFT on a backbone: what it is at the start, what trains, what it keeps to itself (specification section 9)."""

import copy
from collections import OrderedDict

import pytest
import torch
from conftest import perturbed
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy

from deftcore import BitFitConfig, BottleneckConfig, MemoryBank, PointPeftConfig
from deftcore.methods.point_peft.blocks import BlockStack
from deftcore.methods.point_peft.checkpoints import load_classifier
from deftcore.methods.point_peft.classifier import PointClassifier, PointClassifierConfig
from deftcore.methods.point_peft.geometry import LocalMixing, Propagation, local_groups
from deftcore.methods.point_peft.layer import AdaptedBlock, PointPeftLayer
from deftcore.methods.point_peft.model import find_layer
from deftcore.methods.point_peft.patches import cut_patches
from deftcore.methods.point_peft.prompts import Prompts
from deftcore.training.adapters import load_adapter

SIZES = {"width": 24, "depth": 3, "heads": 3, "patches": 8, "patch_points": 4, "head_width": 16, "classes": 5}
SMALL = {
    "prompt_tokens": 5,
    "rank": 4,
    "prompt_rank": 4,
    "local_width": 6,
    "local_heads": 2,
    "dropout": 0.0,
    "prompt_dropout": 0.0,
}


def classifier(**options):
    torch.manual_seed(0)
    model = PointClassifier(PointClassifierConfig(**SIZES | {"drop_path": 0.0, "head_dropout": 0.0} | options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.state_dict().values():  # statistics too: nothing is at a value that hides a fault
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator).abs())
    return model.eval()


def clouds(count=6, points=20, seed=7):
    return torch.randn(count, points, 3, generator=torch.Generator().manual_seed(seed))


def config(**options):
    options = SMALL | options
    if options.get("memory", True) and options.get("prompts") != "none":
        options.setdefault("bank", MemoryBank.build(classifier().backbone, [clouds()]))
    return PointPeftConfig(**options)


def adapted(model=None, **options):
    return get_peft_model(classifier() if model is None else model, config(**options)).eval()


def logits(model, points=None):
    with torch.no_grad():
        return model(clouds() if points is None else points).logits


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def step(model, rate=0.1, **batch):
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=rate)
    points = clouds().to(next(model.parameters()).dtype)
    loss = model(points, labels=torch.arange(6) % 5, **batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


FORMS = {
    "token": {}, "gated": {"prompts": "gated"}, "none": {"prompts": "none"}, "without a bank": {"memory": False},
    "everywhere": {"prompt_blocks": 3, "pooling": "max+mean", "propagation_neighbours": 2, "local_scale": "head"},
    "frozen biases": {"tune_biases": False}, "without geometry": {"geometry": False},
    "reference": {"init": "reference"},
}  # fmt: skip
ALL = pytest.mark.parametrize("form", list(FORMS.values()), ids=list(FORMS))


# ---------------------------------------------------------------------------- at the start


@pytest.mark.parametrize("form", [{"prompts": "none"}, {"prompts": "gated"}, {"prompt_blocks": 0}], ids=str)
def test_without_tokens_it_starts_as_the_backbone_bit_for_bit(form):
    assert torch.equal(logits(adapted(**form)), logits(classifier()))


@pytest.mark.parametrize("form", [{"init": "reference", "prompts": "none"}, {"memory": False}], ids=str)
def test_the_reference_start_and_tokens_are_not_the_identity(form):
    assert not torch.equal(logits(adapted(**form)), logits(classifier()))


@ALL
def test_turned_off_and_unloaded_it_is_the_backbone_bit_for_bit(form):
    model, plain = perturbed(adapted(**form)), classifier()
    want, names = logits(model), trainable(model)
    assert not torch.equal(want, logits(plain))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(plain))
        assert not trainable(model)
    assert torch.equal(logits(model), want)
    assert trainable(model) == names
    backbone = model.unload().backbone
    assert type(backbone) is type(plain.backbone)
    state, own = backbone.state_dict(), plain.backbone.state_dict()
    assert state.keys() == own.keys()
    assert all(torch.equal(state[name], value) for name, value in own.items())


# ---------------------------------------------------------------------------- what trains


@ALL
def test_after_a_step_what_trains_has_changed_and_nothing_else(form):
    """Statistics of the frozen patch encoder's BatchNorms among the rest, byte for byte."""
    model = perturbed(adapted(**form)).double().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step(model)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    statistics = {
        name for name in before if name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        and ("point_peft_parts" in name or "modules_to_save" in name)
    }  # fmt: skip
    # What is the same for all groups goes through no BatchNorm in training: this gradient is rounding's.
    constant = {name for name in before if name.endswith("local.projection.bias")}
    assert changed | constant == trainable(model) | statistics | constant
    assert not any(".base_layer." in name for name in changed)


def test_what_it_trains():
    model = adapted(prompt_blocks=2)
    names = {name.rpartition("point_peft_parts.default.")[2] for name in trainable(model) if "point_peft" in name}
    networks = [f"{name}.{layer}.{part}" for name in ("behind_mlp", "last") for layer in ("down", "up")
                for part in ("weight", "bias")]  # fmt: skip
    biases = [f"biases.{name}" for name in ("norm1", "projection", "norm2", "fc1", "fc2")]
    prompts = ["prompts.tokens", *(f"prompts.enrich.{layer}.{part}" for layer in ("down", "up")
               for part in ("weight", "bias"))]  # fmt: skip
    block = [*networks, *biases, "propagation.norm.weight", "propagation.norm.bias", "propagation.gate"]
    want = {f"blocks.{i}.{name}" for i in range(3) for name in block}
    want |= {f"blocks.{i}.{name}" for i in range(2) for name in prompts}
    want |= {f"local.{name}" for name in ("norm.weight", "norm.bias", "qkv.weight", "projection.weight",
             "projection.bias")}  # fmt: skip
    assert names == want | {"class_token", "class_position", "norm.weight", "norm.bias"}
    heads = {name for name in trainable(model) if "point_peft" not in name}
    assert {name.rpartition(".modules_to_save.")[0] for name in heads} == {"base_model.model.head"}


def test_a_name_makes_nothing_train():
    """Parts are chosen by what they are: a frozen module may be called anything."""

    class Named(PointClassifier):
        def __init__(self, config):
            super().__init__(config)
            self.cp_adapter_prompt = nn.Linear(2, 2)
            self.point_peft_bias = nn.Linear(2, 2)

    model = get_peft_model(Named(PointClassifierConfig(**SIZES)), config(memory=False))
    assert not any("cp_adapter" in name or "point_peft_bias" in name for name in trainable(model))


def test_counts_of_the_paper():
    """0.71 million for Point-MAE and 15 classes, the head's among them (section 7)."""
    with torch.device("meta"):
        model = PointClassifier(PointClassifierConfig(patches=128, classes=15))
    assert sum(p.numel() for p in model.head.parameters()) == 267_535
    found = get_peft_model(model, PointPeftConfig(init="reference", bank_rows=11_392))
    assert found.get_nb_trainable_parameters()[0] == 710_719
    assert found.base_model.model.backbone.point_peft_parts["default"].rows.shape == (11_392, 384)


# ---------------------------------------------------------------------------- the block


def test_prompts_never_reach_the_next_block():
    """Every block gets and gives the backbone's tokens, and what a prompt changes it changes through attention."""
    model = perturbed(adapted(prompt_blocks=3))
    layer, shapes = find_layer(model), []
    for block in layer.base_layer.blocks:
        block.mlp.register_forward_hook(lambda _, given, made: shapes.append(given[0].shape[1]))
    with torch.no_grad():
        assert layer(clouds()).shape == (6, 9, 24)
    assert set(shapes[-3:]) == {9}


def test_a_prompt_token_is_one_more_key_in_one_softmax():
    """As when all of [class ; prompts ; patches] went through attention and the prompts were dropped behind it."""
    torch.manual_seed(2)
    attention = classifier().backbone.blocks[0].attention.double()
    prompts = Prompts(config(memory=False), 24, 3).double().eval()
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    tokens = prompts(None)
    joined = attention(torch.cat([x[:, :1], tokens.expand(2, -1, -1), x[:, 1:]], 1))
    want = torch.cat([joined[:, :1], joined[:, 6:]], 1)
    torch.testing.assert_close(attention.joined(prompts.attend(attention, x, tokens)), want)


def test_gated_prompts_have_a_softmax_of_their_own():
    torch.manual_seed(2)
    attention = classifier().backbone.blocks[0].attention.double()
    prompts = perturbed(Prompts(config(prompts="gated", memory=False), 24, 3)).double().eval()
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    query, key, value = attention.split(x)
    _, prompt_key, prompt_value = attention.split(prompts(None))

    def attend(key, value):
        return (query @ key.transpose(-1, -2) / 8**0.5).softmax(-1) @ value

    want = attend(key, value) + prompts.gate * attend(prompt_key, prompt_value)
    torch.testing.assert_close(prompts.attend(attention, x, prompts(None)), want)


# ---------------------------------------------------------------------------- geometry


def group_of(patches=8, batch=3, seed=5, **options):
    backbone = classifier(patches=patches).backbone
    return backbone.group(clouds(batch, 20, seed)), config(memory=False, **options)


def mixed(x, patches, settings, seed=4):
    torch.manual_seed(seed)
    local, last = LocalMixing(settings, 24).double(), perturbed(Propagation(settings, 24)).double().eval()
    groups = local_groups(patches, settings)
    groups = groups._replace(weights=groups.weights.double())
    return last(x, local(x, groups, lambda each: each), groups)


def test_geometry_mixes_neighbours():
    """Patches move with their order, and a cloud knows nothing of the others."""
    patches, settings = group_of()
    x = torch.randn(3, 8, 24, dtype=torch.float64)
    want = mixed(x, patches, settings)
    order = torch.cat([torch.tensor([0]), 1 + torch.randperm(7)])  # the first is where sampling starts
    turned = mixed(x[:, order], patches.chosen(order.expand(3, -1)), settings)
    torch.testing.assert_close(turned, want[:, order])
    other, changed = patches.centres.clone(), x.clone()
    other[0], changed[0] = other[0].flip(0) * 2, 1 - x[0]
    found = mixed(changed, patches._replace(centres=other), settings)
    assert torch.equal(found[1:], want[1:])
    assert not torch.equal(found[0], want[0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_centres_that_are_not_finite_are_named(value):
    patches, settings = group_of()
    with pytest.raises(ValueError, match=r"^centres: must be finite"):
        local_groups(patches._replace(centres=patches.centres + value), settings)


def test_local_groups_are_of_near_patches():
    patches, settings = group_of(local_centres=3, local_neighbours=4, propagation_neighbours=2)
    groups = local_groups(patches, settings)
    centres = patches.centres
    distances = torch.cdist(centres, centres)
    for cloud in range(3):
        for place, members in zip(groups.centres[cloud], groups.members[cloud], strict=True):
            assert members[0] == place
            assert set(members.tolist()) == set(distances[cloud, place].argsort()[:4].tolist())
        heard = distances[cloud][:, groups.centres[cloud]]
        assert torch.equal((groups.weights[cloud] > 0).sum(1), torch.full((8,), 2))
        assert torch.equal(groups.weights[cloud].argmax(1), heard.argmin(1))
    torch.testing.assert_close(groups.weights.sum(-1), torch.ones(3, 8))
    at_centres = groups.weights.gather(1, groups.centres.unsqueeze(-1).expand(-1, -1, 3))
    torch.testing.assert_close(at_centres, torch.eye(3).expand(3, -1, -1), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{"local_centres": 1}, {"local_neighbours": 1}, {"local_centres": 8, "local_neighbours": 8}], ids=str
)
@pytest.mark.parametrize("points", [clouds(), torch.ones(4, 20, 3), clouds(6, 8)], ids=["any", "equal", "N = G"])
def test_extremes_give_no_nan(options, points):
    model = perturbed(adapted(**options)).train()
    loss = model(points, labels=torch.arange(len(points)) % 5).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert model.eval()(points[:1]).logits.isfinite().all()


def test_what_batches_and_sizes_are_refused():
    model = adapted(local_centres=1)
    find_layer(model).train()
    with pytest.raises(ValueError, match="points: BatchNorm trains on the spread of a batch"):
        find_layer(model)(clouds(1))
    for name in ("local_centres", "local_neighbours"):
        with pytest.raises(ValueError, match=f"{name}: must be at most the 8 patches, got 9"):
            adapted(**{name: 9})(clouds())


# ---------------------------------------------------------------------------- the bank in the model


def test_the_bank_is_part_of_the_adapter(tmp_path):
    """A buffer: it moves, is saved, and is there again without its file."""
    bank = MemoryBank.build(classifier().backbone, [clouds()])
    bank.save(tmp_path / "bank.safetensors")
    given = config(bank=str(tmp_path / "bank.safetensors"))
    model = perturbed(get_peft_model(classifier(), given)).eval()
    rows = find_layer(model).point_peft_parts["default"].rows
    assert torch.equal(rows, bank.rows)
    assert given.bank_rows is None  # the config that was given goes on other bases too
    (tmp_path / "bank.safetensors").unlink()
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(classifier(), tmp_path / "adapter")
    assert torch.equal(find_layer(again).point_peft_parts["default"].rows, bank.rows)
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(load_adapter(classifier(), tmp_path / "adapter")), logits(model))
    with pytest.raises(ValueError, match="model: the adapter was made for other base weights"):
        PeftModel.from_pretrained(perturbed(classifier()), tmp_path / "adapter")


def test_the_query_is_the_frozen_backbones_feature_whatever_the_mode():
    """No stochastic depth, no trained bias in it, and no class token."""
    model = perturbed(adapted(classifier(drop_path=0.9), tune_biases=True)).train()
    layer, seen = find_layer(model), []
    parts = layer.point_peft_parts["default"]
    retrieve = parts.retrieve
    parts.retrieve = lambda query, index: seen.append(query) or retrieve(query, index)
    layer(clouds())
    torch.testing.assert_close(seen[0], classifier().backbone.features(clouds()))
    assert not seen[0].requires_grad


def test_the_row_of_a_cloud_is_hidden_from_it_in_training():
    model = adapted(exclude_self=True)
    layer, found = find_layer(model), []
    parts = layer.point_peft_parts["default"]
    retrieve = parts.retrieve
    parts.retrieve = lambda query, index: found.append(retrieve(query, index)) or found[-1]
    with torch.no_grad():
        layer.train()(clouds(), index=torch.arange(6))
        layer.eval()(clouds())
    own = parts.rows
    assert not any(torch.equal(found[0][i, 2], own[i]) for i in range(6))
    assert torch.equal(found[1][:, 2], own)
    with pytest.raises(ValueError, match="index: exclude_self needs each cloud's number"):
        layer.train()(clouds())


def test_a_bank_is_asked_for_and_checked():
    with pytest.raises(ValueError, match=r"bank: is needed, .*MemoryBank\.build makes one, memory=False goes without"):
        get_peft_model(classifier(), PointPeftConfig(**SMALL))
    other = MemoryBank.build(perturbed(classifier()).backbone, [clouds()])
    model = classifier()
    with pytest.raises(ValueError, match="bank: the adapter was made for other base weights"):
        get_peft_model(model, config(bank=other))
    assert not any(isinstance(module, PointPeftLayer) for module in model.modules())
    with pytest.raises(ValueError, match="bank: must have at least 8 rows that a cloud sees, got 6"):
        adapted(prompt_tokens=10)(clouds())


# ---------------------------------------------------------------------------- PEFT's promises


@ALL
def test_files(tmp_path, form):
    model = perturbed(adapted(**form)).train()
    step(model)
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(classifier(), tmp_path)
    state, found = model.state_dict(), again.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())
    assert torch.equal(logits(again), logits(model))
    assert not trainable(again)
    lean = PeftModel.from_pretrained(classifier(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(lean), logits(model))
    assert trainable(PeftModel.from_pretrained(classifier(), tmp_path, is_trainable=True)) == trainable(model)


def test_two_adapters():
    model = perturbed(adapted())
    first, names = logits(model), trainable(model)
    model.add_adapter("second", config(prompts="gated", prompt_blocks=1))
    assert torch.equal(logits(model), first)
    assert trainable(model) == names
    model.set_adapter("second")
    assert all("second" in name for name in trainable(model))
    second = logits(perturbed(model, 5))
    assert not torch.equal(second, first)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    with pytest.raises(ValueError, match="adapter_names: one Point-PEFT adapter is active at a time"):
        find_layer(model).set_adapter(["default", "second"])
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)


def test_it_is_not_merged():
    model = perturbed(adapted())
    want = logits(model)
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="cannot be merged"):
            call()
    assert torch.equal(logits(model), want)


def test_copies_and_casts():
    model = perturbed(adapted())
    want = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), want)
    torch.testing.assert_close(logits(model.double(), clouds().double()).float(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_cast_rounds_the_bank(dtype):
    """Rows that 16 bits hold equal would be looked up in another order."""
    model = adapted()
    rows = find_layer(model).point_peft_parts["default"].rows
    kept = find_layer(model.to(dtype)).point_peft_parts["default"].rows
    assert kept.dtype == torch.float32
    assert torch.equal(kept, rows)
    assert model(clouds()).logits.isfinite().all()


def test_half_weights_and_autocast():
    """Adapters over bfloat16 weights train in float32, as PEFT has it."""
    model = adapted(classifier().bfloat16(), memory=False)
    assert {p.dtype for name, p in model.named_parameters() if "point_peft_parts" in name} == {torch.float32}
    model.train()(clouds(), labels=torch.arange(6) % 5).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    model = perturbed(adapted()).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(clouds(), labels=torch.arange(6) % 5).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    torch.testing.assert_close(
        loss, perturbed(adapted()).train()(clouds(), labels=torch.arange(6) % 5).loss, rtol=0.1, atol=0
    )


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("form", [{}, {"prompts": "gated"}], ids=str)
def test_recomputed_activations_change_nothing(form, reentrant):
    """Gradients, and the statistics of the BatchNorms, which see a batch once."""
    plain, lean = (perturbed(adapted(**form)).train() for _ in range(2))
    lean.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert find_layer(lean).base_layer.blocks.recompute is not None
    for model in (plain, lean):
        torch.manual_seed(1)
        model(clouds(), labels=torch.arange(6) % 5).loss.backward()
    for (name, a), b in zip(plain.named_parameters(), lean.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-7, msg=name)
    for (name, a), b in zip(plain.named_buffers(), lean.buffers(), strict=True):
        assert torch.equal(a, b), name


@pytest.fixture
def group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@ALL
def test_every_parameter_has_a_gradient(form, group):
    """As processes need that share them: DDP refuses the second step otherwise."""
    model = nn.parallel.DistributedDataParallel(perturbed(adapted(**form)).train())
    for _ in range(2):
        model(clouds(), labels=torch.arange(6) % 5).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("form", [{}, {"prompts": "gated", "init": "reference"}], ids=str)
def test_gradients_are_those_of_finite_differences(form):
    model = perturbed(adapted(**form)).double().train()
    points, labels = clouds().double(), torch.arange(6) % 5
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(cross_entropy(model(points).logits, labels), parameters)
    for p, gradient in zip(parameters, gradients, strict=True):
        direction = torch.randn_like(p)
        with torch.no_grad():
            losses = []
            for sign in (1, -1):
                p.add_(sign * 1e-5 * direction)
                losses.append(cross_entropy(model(points).logits, labels))
                p.sub_(sign * 1e-5 * direction)
        found = (losses[0] - losses[1]) / 2e-5
        torch.testing.assert_close(found, (gradient * direction).sum(), rtol=1e-4, atol=1e-6)


def test_compiled():
    model = perturbed(adapted())
    whole = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(clouds()).logits, model(clouds()).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": "deep"}, "prompts: must be one of token, gated, none, got 'deep'"),
        ({"prompt_tokens": 2}, "prompt_tokens: must be at least 3 with a memory bank, got 2"),
        ({"rank": 0}, "rank: must be an integer of at least 1, got 0"),
        ({"prompt_blocks": -1}, "prompt_blocks: must be an integer of at least 0, got -1"),
        ({"dropout": 1.0}, r"dropout: must be in \[0, 1\), got 1.0"),
        ({"gamma_p": float("nan")}, "gamma_p: must be a finite number, got nan"),
        ({"local_width": 16}, "local_heads: must divide local_width 16, got 6"),
        ({"init": "zeros"}, "init: must be one of identity, reference, got 'zeros'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        PointPeftConfig(**options)
    with pytest.raises(TypeError, match="bank: must be a MemoryBank or its file, got int"):
        PointPeftConfig(bank=3)


def test_bad_models():
    with pytest.raises(ValueError, match="prompt_blocks: must be at most the backbone's 3 blocks, got 4"):
        adapted(prompt_blocks=4)
    for model in (classifier().backbone, nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="model: must be a module around one backbone as PointTransformer is"):
            get_peft_model(model, PointPeftConfig(memory=False))


class Other(nn.Module):
    """A backbone of another kind: ordinary BatchNorm in its encoder, no class of the room's but the stack of blocks."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 24))
        self.place = nn.Linear(3, 24)
        self.class_token, self.class_position = (nn.Parameter(torch.randn(1, 1, 24)) for _ in range(2))
        self.blocks, self.norm = BlockStack(2, 24, 3, 48, 0.1), nn.LayerNorm(24)

    def group(self, points):
        return cut_patches(points, 6, 5)

    def embed(self, patches):
        flat = patches.neighbourhoods.flatten(0, 2)
        return self.encoder(flat).unflatten(0, patches.members.shape).amax(2), self.place(patches.centres)

    def forward(self, points):
        patches = self.group(points)
        x, position = self.embed(patches)
        x, position = (
            torch.cat([first.expand(len(points), -1, -1), rest], 1)
            for first, rest in ((self.class_token, x), (self.class_position, position))
        )
        return self.norm(self.blocks(x, position))

    def features(self, points):
        patches = self.group(points)
        return self.norm(self.blocks(*self.embed(patches))).amax(1)


def test_a_backbone_of_another_kind():
    torch.manual_seed(0)
    parts = {"backbone": Other(), "flat": nn.Flatten(), "head": nn.Linear(7 * 24, 5)}
    base = nn.Sequential(OrderedDict(parts)).eval()
    want, kept = base(clouds()), copy.deepcopy(base.state_dict())
    bank = MemoryBank.build(base.backbone, [clouds()])
    model = get_peft_model(base, PointPeftConfig(**SMALL, prompts="gated", bank=bank))
    assert torch.equal(model(clouds()), want)
    cross_entropy(perturbed(model).train()(clouds()), torch.arange(6) % 5).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    backbone = model.unload().backbone.state_dict()
    assert all(torch.equal(value, kept[f"backbone.{name}"]) for name, value in backbone.items())


# ---------------------------------------------------------------------------- others on the same backbone


OTHERS = {
    "lora": LoraConfig(r=2, target_modules=["qkv", "projection", "fc1", "fc2"], modules_to_save=["head"]),
    "bitfit": BitFitConfig(modules_to_save=["head"]),
    "adaptformer": BottleneckConfig(parallel=True, r=4, scaling=0.1, target_modules=["mlp"], modules_to_save=["head"]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_methods_on_the_same_backbone(tmp_path, name):
    model = get_peft_model(classifier(), copy.deepcopy(OTHERS[name])).eval()
    assert torch.equal(logits(model), logits(classifier()))
    model.train()
    assert step(model) > step(model)
    statistics = classifier().backbone.encoder.point[1].running_mean
    encoder = model.base_model.model.backbone.encoder.point[1]
    if name != "bitfit":  # under which the norm's bias trains
        assert torch.equal(encoder.running_mean, statistics)
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(classifier(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    if name == "adaptformer":
        with pytest.raises(ValueError, match="cannot be merged"):
            model.merge_and_unload()
    else:
        want = logits(model)
        torch.testing.assert_close(logits(model.merge_and_unload()), want, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------- the authors' values

PARTS = {
    "prompts.tokens": "prompt_embeddings", "prompts.enrich.down": "cp_adapter.ln1", "prompts.enrich.up":
    "cp_adapter.ln2", "behind_mlp.down": "adapter.ln1", "behind_mlp.up": "adapter.ln2", "last.down": "adapter1.ln1",
    "last.up": "adapter1.ln2", "propagation.norm": "out_transform.0",
}  # fmt: skip
SHARED = {"local.norm": "norm3", "local.qkv": "attn1.qkv", "local.projection": "attn1.proj"}


def stored_state(stored, prefix, names):
    return {
        name.replace(f"{prefix}{theirs}", ours): torch.from_numpy(stored[f"w.{name}"])
        for ours, theirs in names.items()
        for name in (key.removeprefix("w.") for key in stored.files if key.startswith("w."))
        if name == f"{prefix}{theirs}" or name.startswith(f"{prefix}{theirs}.")
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("run", ["none", "tokens", "bank"])
def test_adapted_model_of_the_authors(run, dtype, parity, monkeypatch):
    stored = parity("pointpeft_adapted_small.npz")
    own = ("prompt_cor", "ad_gate", "norm3", "attn1.", *PARTS.values())
    tensors = {key.removeprefix("w."): torch.from_numpy(stored[key]) for key in stored.files if key.startswith("w.")}
    base = {name: each for name, each in tensors.items() if not any(part in name for part in own)}
    model = load_classifier(base, heads=6, patches=16, patch_points=8)
    options = {"rank": 4, "prompt_rank": 8, "prompt_blocks": 6, "init": "reference", "bank_rows": 40}
    options |= {"none": {"prompts": "none"}, "tokens": {"memory": False}, "bank": {}}[run]
    adapter = get_peft_model(model, PointPeftConfig(**options)).eval()
    layer, outputs = find_layer(adapter), []
    parts = layer.point_peft_parts["default"]
    state = stored_state(stored, "blocks.", SHARED)
    for number in range(len(parts.blocks)):
        found = stored_state(stored, f"blocks.blocks.{number}.", PARTS)
        state |= {f"blocks.{number}.{name}": each for name, each in found.items()}
    wanted = {name for name in parts.state_dict() if name.startswith(("local.", "blocks.")) and "biases" not in name}
    parts.load_state_dict({name: state[name] for name in wanted}, strict=False)
    adapter.to(dtype)
    if run == "bank":
        parts.rows = torch.from_numpy(stored["bank"]).to(dtype)
        monkeypatch.setattr(layer, "_query", lambda *_: torch.from_numpy(stored["query"]).to(dtype))
    second = AdaptedBlock.second_half
    monkeypatch.setattr(AdaptedBlock, "second_half", lambda *given: outputs.append(second(*given)) or outputs[-1])
    points = torch.from_numpy(stored["pts"]).to(dtype)
    groups = local_groups(layer.base_layer.group(points), parts.config)
    assert torch.equal(groups.centres, torch.from_numpy(stored["local_centre_idx"]).long())
    assert torch.equal(groups.members, torch.from_numpy(stored["local_knn_idx"]).long())
    found = {f"logits_{run}": adapter(points).logits, f"norm_out_{run}": layer(points)}
    if dtype == torch.float64:  # their entries go up to 60, and their rounding with them
        found |= {f"block{i}_out_{run}": each for i, each in enumerate(outputs[:7])}
    for name, each in found.items():
        error = (each.detach().double() - torch.from_numpy(stored[name])).abs().max()
        assert error < (1e-10 if dtype == torch.float64 else 2e-5), (name, error)
