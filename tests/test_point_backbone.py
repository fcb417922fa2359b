"""The backbone of point clouds and the classifier on it (specification sections 3 and 9)."""

import copy
import pickle

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.func import functional_call
from torch.nn.functional import cross_entropy, linear
from transformers import Trainer, TrainingArguments

from deftcore.methods.point_peft import blocks
from deftcore.methods.point_peft.backbone import BatchNorm, PatchEncoder, PointConfig, PointTransformer
from deftcore.methods.point_peft.blocks import BlockStack, DropPath
from deftcore.methods.point_peft.classifier import PointClassifier, PointClassifierConfig
from deftcore.methods.point_peft.patches import cut_patches

SIZES = {"width": 24, "depth": 3, "heads": 3, "patches": 8, "patch_points": 4, "head_width": 16, "classes": 5}


def classifier(**options):
    return PointClassifier(PointClassifierConfig(**SIZES | options))


def clouds(count=2, points=40):
    return torch.randn(count, points, 3, generator=torch.Generator().manual_seed(7))


# ---------------------------------------------------------------------------- what it computes


def test_tokens_and_positions_through_the_blocks():
    """The position is added at the input of every block, not once."""
    backbone, seen = classifier().backbone.eval(), []
    for block in backbone.blocks:
        block.register_forward_hook(lambda block, given, made: seen.append((given[0], made)))
    tokens = backbone(clouds())
    patches = backbone.group(clouds())
    x, position = backbone.embed(patches)
    x = torch.cat([backbone.class_token.expand(2, 1, -1), x], 1)
    position = torch.cat([backbone.class_position.expand(2, 1, -1), position], 1)
    for given, made in seen:
        torch.testing.assert_close(given, x + position, rtol=0, atol=0)
        x = made
    assert len(seen) == 3
    assert tokens.shape == (2, 9, 24)
    torch.testing.assert_close(tokens, backbone.norm(x), rtol=0, atol=0)


def test_logits_are_of_the_class_token_and_the_largest_patch():
    model = classifier().eval()
    tokens, labels = model.backbone(clouds()), torch.tensor([4, 0])
    expected = model.head(torch.cat([tokens[:, 0], tokens[:, 1:].amax(1)], 1))
    given = model(clouds(), labels=labels)
    torch.testing.assert_close(given.logits, expected)
    torch.testing.assert_close(given.loss, cross_entropy(expected, labels))
    assert model(clouds()).loss is None


def test_features_are_of_the_patches_without_a_class_token():
    backbone = classifier().backbone.eval()
    patches = backbone.group(clouds())
    x, position = backbone.embed(patches)
    for block in backbone.blocks:
        x = block(x + position)
    torch.testing.assert_close(backbone.features(clouds()), backbone.norm(x).amax(1))


@pytest.mark.parametrize("training", [False, True])
def test_the_patch_encoder_is_that_over_joined_features(training):
    """[largest of the patch ; own] through one layer, as published."""
    encoder, x = PatchEncoder(12).double().train(training), torch.randn(2, 3, 5, 3, dtype=torch.float64)
    own = copy.deepcopy(encoder.point)(x)
    joined = torch.cat([own.amax(2, keepdim=True).expand_as(own), own], -1)
    weight = torch.cat([encoder.patch.weight, encoder.own.weight], 1)
    expected = copy.deepcopy(encoder.token)(linear(joined, weight, encoder.patch.bias)).amax(2)
    torch.testing.assert_close(encoder(x), expected, rtol=0, atol=1e-12)


def test_patches_of_a_cloud():
    points = clouds()
    patches = cut_patches(points, 8, 4)
    distances = torch.cdist(patches.centres.double(), points.double())
    assert torch.equal(patches.members, distances.topk(4, largest=False).indices)
    assert torch.equal(patches.centres[:, 0], points[:, 0])
    for b in range(2):
        torch.testing.assert_close(
            patches.neighbourhoods[b] + patches.centres[b].unsqueeze(1), points[b][patches.members[b]]
        )
    chosen = patches.chosen(torch.tensor([[3, 1], [0, 7]]))
    assert torch.equal(chosen.members[1], patches.members[1, [0, 7]])
    assert torch.equal(chosen.neighbourhoods[0], patches.neighbourhoods[0, [3, 1]])


def test_the_patch_that_a_point_is_of():
    patches = cut_patches(clouds(), 8, 4)
    found = patches.of_points()
    for b in range(2):
        for i, number in enumerate(found[b].tolist()):
            its = [g for g in range(8) if i in patches.members[b, g].tolist()]
            near = (patches.points[b, i] - patches.centres[b]).norm(dim=1)
            assert number == min(its, key=near.__getitem__, default=-1)
    assert (found == -1).any()


def test_centres_near_the_origin():
    points = clouds() + 2
    points[:, 9] = 0.0  # far from all others
    model = classifier().backbone
    assert (model.group(points).centres == 0).all(-1).any(1).all()
    model.config.skip_near_origin = True
    assert (model.group(points).centres != 0).all()


def test_sizes_of_the_papers():
    """22.1 M parameters, 267 535 of them the head's for 15 classes."""
    with torch.device("meta"):
        model = PointClassifier(PointClassifierConfig(classes=15, patches=128))
    assert sum(parameter.numel() for parameter in model.head.parameters()) == 267_535
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == 22.1


def test_clouds_do_not_see_each_other():
    model, points = classifier().eval(), clouds(3)
    before = model(points).logits
    points[0] = torch.randn(40, 3)
    torch.testing.assert_close(model(points).logits[1:], before[1:])
    torch.testing.assert_close(model(points[2:]).logits, before[2:])


def test_the_order_of_the_other_points_does_not_matter():
    model, points = classifier().eval(), clouds()
    order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(39)])
    torch.testing.assert_close(model(points[:, order]).logits, model(points).logits)


def test_drop_path():
    stack = BlockStack(depth=5, width=4, heads=2, hidden=8, drop_path=0.2)
    assert [block.drop_path.rate for block in stack] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert BlockStack(depth=1, width=4, heads=2, hidden=8, drop_path=0.2)[0].drop_path.rate == 0
    drop, x = DropPath(0.25), torch.ones(4000, 2, 3)
    dropped = drop(x)
    rows = dropped.flatten(1)
    assert torch.equal(rows, rows[:, :1].expand_as(rows))
    torch.testing.assert_close(rows[:, 0].unique(), torch.tensor([0, 4 / 3]))
    assert abs(dropped.mean() - 1) < 0.05
    assert drop.eval()(x) is x
    assert drop.train()(x.bfloat16()).dtype == torch.bfloat16


def test_gradients_are_those_of_finite_differences():
    model = classifier(depth=1).double().eval()
    names = ["backbone.class_token", "backbone.position.2.bias", "backbone.encoder.token.2.bias", "head.0.bias"]
    start = [model.get_parameter(name).detach().clone().requires_grad_() for name in names]

    def loss(*parameters):
        options = {"labels": torch.tensor([0, 3])}
        return functional_call(model, dict(zip(names, parameters, strict=True)), clouds().double(), options).loss

    assert torch.autograd.gradcheck(loss, start, fast_mode=True)


# ---------------------------------------------------------------------------- inputs that hurt


@pytest.mark.parametrize(
    ("options", "points"),
    [
        ({}, clouds(1)),
        ({}, torch.full((2, 40, 3), 0.5)),
        ({"patches": 40}, clouds()),
        ({"patch_points": 40}, clouds()),
        ({"patch_points": 1}, clouds()),
        ({"patches": 1, "patch_points": 1}, clouds(2, 1)),
        ({"depth": 1, "heads": 24}, clouds()),
    ],
    ids=["one cloud", "equal points", "N = G", "N = S", "S = 1", "G = S = N = 1", "one block"],
)
def test_no_nan(options, points):
    model = classifier(**options)
    assert model.eval()(points).logits.isfinite().all()
    if len(points) > 1:
        model.train()(points, labels=torch.tensor([0, 1])).loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_one_cloud_alone_cannot_train_a_head():
    model = classifier()
    with pytest.raises(ValueError, match=r"points: BatchNorm trains on .*, and this one has a single cloud"):
        model(clouds(1), labels=torch.tensor([0]))
    model.head.requires_grad_(False)
    model(clouds(1), labels=torch.tensor([0])).loss.backward()


@pytest.mark.parametrize(
    ("points", "told"),
    [
        ([1.0], "points: must be a floating Tensor, got list"),
        (np.ones((2, 40, 3), np.float32), "points: must be a floating Tensor, got ndarray"),
        (torch.ones(2, 40, 3, dtype=torch.int64), "points: must be a floating Tensor, got torch.int64"),
        (torch.ones(40, 3), r"points: must be \[B, N, 3\], got shape \(40, 3\)"),
        (torch.ones(2, 40, 4), r"points: must be \[B, N, 3\], got shape \(2, 40, 4\)"),
        (torch.ones(2, 7, 3), "points: 8 patches of 4 points need as many in a cloud, got 7"),
        (torch.full((2, 40, 3), torch.nan), "points: must be finite"),
        (torch.full((2, 40, 3), -torch.inf, dtype=torch.float64), "points: must be finite"),
    ],
)
def test_points_that_it_does_not_take(points, told):
    with pytest.raises((TypeError, ValueError), match=told):
        classifier()(points)


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (torch.tensor([0, 5]), r"labels: must be in 0\.\.4, got values in 0\.\.5"),
        (torch.tensor([-1, 0]), r"labels: must be in 0\.\.4, got values in -1\.\.0"),
        (torch.zeros(2), "labels: must be an int32 or int64 tensor, got torch.float32"),
        ([0, 1], "labels: must be an int32 or int64 tensor, got <class 'list'>"),
        (torch.zeros(3, dtype=torch.int64), r"labels: shape must be \(2,\) \(one of each cloud\), got \(3,\)"),
    ],
)
def test_labels_that_it_does_not_take(labels, told):
    model = classifier().eval()
    assert model(clouds(), labels=torch.tensor([0, 4], dtype=torch.int32)).loss.isfinite()
    with pytest.raises((TypeError, ValueError), match=told):
        model(clouds(), labels=labels)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"width": 0}, "width: must be an integer of at least 1, got 0"),
        ({"depth": 2.0}, "depth: must be an integer"),
        ({"heads": 5}, "heads: must divide the width 24, got 5"),
        ({"patches": True}, "patches: must be an integer"),
        ({"patch_points": -1}, "patch_points: must be"),
        ({"encoder_width": 0}, "encoder_width: must be"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio: must be a number above 0"),
        ({"mlp_ratio": 0.01}, "mlp_ratio: must be"),
        ({"drop_path": 1.0}, r"drop_path: must be in \[0, 1\)"),
        ({"classes": 0}, "classes: must be"),
        ({"head_dropout": "0.5"}, "head_dropout: must be"),
    ],
)
def test_configs_that_it_does_not_take(options, told):
    with pytest.raises(ValueError, match=told):
        PointClassifierConfig(**SIZES | options)


# ---------------------------------------------------------------------------- in training


def statistics(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def test_a_frozen_encoder_keeps_its_statistics():
    """Also in a model in training, whose mode it takes over; and it computes with them."""
    model = classifier()
    model(clouds())
    model.backbone.encoder.requires_grad_(False)
    before, tokens = statistics(model), model.eval().backbone.embed(model.backbone.group(clouds()))[0]
    torch.testing.assert_close(model.train().backbone.embed(model.backbone.group(clouds()))[0], tokens)
    model(3 * clouds(), labels=torch.tensor([0, 1])).loss.backward()
    after = statistics(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("head")}
    model.backbone.encoder.requires_grad_(True)
    model(clouds())
    assert not torch.equal(statistics(model)["backbone.encoder.token.0.running_mean"], before[
        "backbone.encoder.token.0.running_mean"
    ])  # fmt: skip


def test_recomputed_activations(monkeypatch):
    model, runs = classifier(drop_path=0.4), []
    monkeypatch.setattr(blocks.Attention, "forward", counted(blocks.Attention.forward, runs))
    grads = []
    with pytest.raises(ValueError, match="every_n_layers, offload: must be 1 and False, got 2 and False"):
        model.activation_checkpointing_enable(every_n_layers=2)
    for enable in (model.activation_checkpointing_disable, model.gradient_checkpointing_enable):
        enable()
        model.zero_grad()
        torch.manual_seed(3)
        model(clouds(), labels=torch.tensor([0, 1])).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert len(runs) == 3 + 6  # with recomputing each runs twice
    for kept, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, kept)
    model.eval()(clouds())
    assert len(runs) == 12


def counted(forward, runs):
    def count(self, x):
        runs.append(x.shape)
        return forward(self, x)

    return count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision(dtype):
    """Weights in the dtype, or autocast: patches are cut in float32 all the same."""
    model = classifier().eval()
    exact = model(clouds()).logits
    with torch.autocast("cpu", dtype):
        cast = model(clouds(), labels=torch.tensor([0, 1]))
    low = copy.deepcopy(model).to(dtype)
    narrow = low(clouds()).logits
    assert torch.equal(low.backbone.group(clouds()).members, model.backbone.group(clouds()).members)
    assert narrow.dtype == dtype
    assert cast.loss.dtype == torch.float32
    for logits in (cast.logits, narrow):
        assert (logits - exact).abs().max() < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_stay_exact(dtype):
    """A mean that is large beside its deviation, in 16 bits: as in float64 of the same rows, which statistics in these
    bits would miss by more than a deviation; and in training they gather in float32."""
    torch.manual_seed(0)
    norm = BatchNorm(8).to(dtype)
    rows = (torch.randn(4, 16, 8) / 4 + 33).to(dtype)
    for _ in range(200):
        norm.train()(rows)
    mean, var = rows.double().flatten(0, 1).mean(0), rows.double().flatten(0, 1).var(0)
    torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-5, atol=0)
    torch.testing.assert_close(norm.running_var.double(), var, rtol=1e-4, atol=0)
    wanted = (rows.double() - mean) / (var + norm.eps).sqrt()
    assert norm.eval()(rows).dtype == dtype
    assert (norm(rows).double() - wanted).abs().max() < 0.02
    norm.weight.requires_grad_(False)
    assert (norm.train()(rows).double() - wanted).abs().max() < 0.02
    assert norm.num_batches_tracked == 200


def test_low_precision_trains():
    model = classifier().bfloat16()
    model(clouds(), labels=torch.tensor([0, 1])).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.slow
def test_compiled():
    """Whole, without a break in the graph; in training, with its statistics."""
    model = classifier(depth=1, drop_path=0.0, head_dropout=0.0)
    results = []
    for each in (copy.deepcopy(model), torch.compile(model, backend="aot_eager", fullgraph=True)):
        made = each(clouds(), labels=torch.tensor([0, 1]))
        made.loss.backward()
        results.append([made.logits, *(p.grad for p in each.parameters()), *each.buffers()])
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------- as others use it


def test_it_travels(tmp_path):
    model = classifier(encoder_width=16).eval()
    expected = model(clouds()).logits
    assert torch.equal(pickle.loads(pickle.dumps(model))(clouds()).logits, expected)
    assert torch.equal(copy.deepcopy(model)(clouds()).logits, expected)
    assert "rate=0.1" in repr(model)
    model.save_pretrained(tmp_path / "classifier")
    assert torch.equal(PointClassifier.from_pretrained(tmp_path / "classifier")(clouds()).logits, expected)
    model.backbone.save_pretrained(tmp_path / "backbone")
    backbone = PointTransformer.from_pretrained(tmp_path / "backbone")
    assert backbone.config == PointConfig(**{k: v for k, v in SIZES.items() if k not in ("head_width", "classes")},
                                          encoder_width=16)  # fmt: skip
    assert torch.equal(backbone.features(clouds()), model.backbone.features(clouds()))
    with pytest.raises(ValueError, match="model_type: must be 'point_classifier', got 'point_transformer'"):
        PointClassifier.from_pretrained(tmp_path / "backbone")


def test_a_new_head_on_a_backbone():
    backbone = classifier().backbone
    model = PointClassifier.on(backbone, classes=7, head_width=10)
    assert model.backbone is backbone
    assert model(clouds()).logits.shape == (2, 7)
    assert model.config.backbone == backbone.config
    assert model.head[0].out_features == 10


def test_the_trainer_of_transformers(tmp_path):
    """Steps with recomputed activations, an evaluation, a picture of the config for TensorBoard, and a resume."""
    data = [{"points": cloud, "labels": i % 5} for i, cloud in enumerate(clouds(8))]
    tuned = get_peft_model(classifier(), LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["head"]))
    now = "activation_checkpointing" in TrainingArguments.__dataclass_fields__  # since Transformers 5.23
    recomputing = {f"{'activation' if now else 'gradient'}_checkpointing": True}
    for steps in (2, 3):
        args = TrainingArguments(
            str(tmp_path), max_steps=steps, save_steps=2, per_device_train_batch_size=4, report_to=["tensorboard"],
            use_cpu=True, disable_tqdm=True, **recomputing,
        )  # fmt: skip
        trainer = Trainer(model=tuned, args=args, train_dataset=data, eval_dataset=data)
        trainer.train(resume_from_checkpoint=steps == 3)
        assert trainer.state.global_step == steps
        assert trainer.evaluate()["eval_loss"] > 0
    assert tuned.get_base_model().backbone.blocks.recompute == {"use_reentrant": False}


def test_lora_through_peft(tmp_path):
    model = classifier().train()
    model(clouds())
    before = copy.deepcopy(model.state_dict())
    config = LoraConfig(r=2, target_modules=["qkv", "fc1"], modules_to_save=["head"], init_lora_weights=False)
    tuned = get_peft_model(model, config)
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    tuned(clouds(), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    for name, tensor in tuned.get_base_model().state_dict().items():
        if "lora_" not in name and "modules_to_save" not in name:
            assert torch.equal(tensor, before[name.replace(".base_layer", "").replace(".original_module", "")]), name
    tuned.save_pretrained(tmp_path)
    fresh = classifier()
    fresh.load_state_dict(before)
    loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    expected = tuned.eval()(clouds()).logits
    torch.testing.assert_close(loaded(clouds()).logits, expected)
    torch.testing.assert_close(loaded.merge_and_unload()(clouds()).logits, expected)
