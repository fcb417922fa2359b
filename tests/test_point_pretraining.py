"""Masked pre-training of a backbone of point clouds."""

import pytest
import torch

from deftcore.methods.point_peft.backbone import PointTransformer
from deftcore.methods.point_peft.classifier import PointClassifier
from deftcore.methods.point_peft.pretraining import PointMae, PointMaeConfig, chamfer

SIZES = {"width": 24, "depth": 2, "heads": 3, "patches": 8, "patch_points": 4, "decoder_depth": 2, "decoder_heads": 3}
HIDDEN = torch.tensor([[7, 0, 3, 4], [1, 2, 6, 5]])


def mae(**options):
    return PointMae(PointMaeConfig(**SIZES | options))


def clouds(count=2, points=40):
    return torch.randn(count, points, 3, generator=torch.Generator().manual_seed(7))


def test_chamfer_distance():
    a, b = torch.randn(3, 5, 3, dtype=torch.float64), torch.randn(3, 4, 3, dtype=torch.float64)
    squared = torch.tensor([[[((p - q) ** 2).sum() for q in b[i]] for p in a[i]] for i in range(3)])
    expected = squared.double().amin(2).mean() + squared.double().amin(1).mean()
    torch.testing.assert_close(chamfer(a, b), expected, rtol=1e-6, atol=0)
    assert chamfer(a, a[:, torch.randperm(5)]) == 0
    assert torch.autograd.gradcheck(chamfer, (a.requires_grad_(), b.requires_grad_()))


def test_the_objective():
    """By hand: tokens of the patches that are seen, mask tokens for the others, the others' points from these."""
    model, points = mae().eval(), clouds()
    given = model(points, masked=HIDDEN)
    patches, backbone = model.backbone.group(points), model.backbone
    tokens, position = backbone.embed(patches)
    told = []
    for b in range(2):
        seen = [g for g in range(8) if g not in HIDDEN[b]]
        x = tokens[b, seen].unsqueeze(0)
        for block in backbone.blocks:
            x = block(x + position[b, seen])
        x = torch.cat([backbone.norm(x), model.mask_token.expand(1, 4, -1)], 1)
        where = model.decoder_position(patches.centres[b, [*seen, *HIDDEN[b]]])
        for block in model.decoder:
            x = block(x + where)
        told.append(model.head(model.decoder_norm(x[0, -4:])).view(4, 4, 3))
    torch.testing.assert_close(given.predicted, torch.stack(told))
    assert torch.equal(given.target[1], patches.neighbourhoods[1, HIDDEN[1]])
    assert torch.equal(given.centres[0], patches.centres[0, HIDDEN[0]])
    expected = torch.stack([chamfer(given.predicted[b], given.target[b]) for b in range(2)]).mean()
    torch.testing.assert_close(given.loss, expected)


def test_hidden_patches_are_not_seen(monkeypatch):
    model = mae().eval()
    before = model(clouds(), masked=HIDDEN).predicted
    group = PointTransformer.group

    def other_points(backbone, points):
        patches = group(backbone, points)
        for b in range(2):
            patches.neighbourhoods[b, HIDDEN[b]] = torch.randn(4, 4, 3)
        return patches

    monkeypatch.setattr(PointTransformer, "group", other_points)
    assert torch.equal(model(clouds(), masked=HIDDEN).predicted, before)


@pytest.mark.parametrize(("ratio", "hidden"), [(0.6, 4), (0.125, 1), (0.9, 7)])
def test_drawn_masks(ratio, hidden, monkeypatch):
    model, seen = mae(mask_ratio=ratio), []
    chosen = type(model.backbone.group(clouds())).chosen
    monkeypatch.setattr(
        "deftcore.methods.point_peft.patches.Patches.chosen",
        lambda patches, numbers: seen.append(numbers) or chosen(patches, numbers),
    )
    for _ in range(2):
        assert model(clouds()).predicted.shape == (2, hidden, 4, 3)
    (visible, masked), (others, _) = (seen[:2], seen[2:])
    assert torch.equal(torch.cat([visible, masked], 1).sort(1).values, torch.arange(8).expand(2, -1))
    if hidden == 4:
        assert not torch.equal(visible.sort(1).values, others.sort(1).values)


def test_it_learns():
    torch.manual_seed(0)
    model, points = mae(drop_path=0.0), clouds(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(points, masked=HIDDEN.repeat(2, 1)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_all_but_the_class_token_trains(tmp_path):
    """Whatever trains has a gradient, as several processes ask for it; under a head the class token does too."""
    still = {"backbone.class_token", "backbone.class_position"}
    mae().save_pretrained(tmp_path)
    for model in (mae(), PointMae.from_pretrained(tmp_path)):
        model(clouds()).loss.backward()
        assert {name for name, p in model.named_parameters() if p.grad is None} == still
        assert {name for name, p in model.named_parameters() if not p.requires_grad} == still
        model.zero_grad()
        tuned = PointClassifier.on(model.backbone, classes=3)
        tuned(clouds(), labels=torch.tensor([0, 2])).loss.backward()
        assert all(parameter.grad is not None for parameter in tuned.parameters())


def test_what_is_kept(tmp_path):
    model = mae().eval()
    expected = model(clouds(), masked=HIDDEN)
    model.save_pretrained(tmp_path / "mae")
    loaded = PointMae.from_pretrained(tmp_path / "mae")
    assert torch.equal(loaded(clouds(), masked=HIDDEN).loss, expected.loss)
    loaded.backbone.save_pretrained(tmp_path / "backbone")
    kept = PointClassifier.on(PointTransformer.from_pretrained(tmp_path / "backbone"), classes=3).eval()
    assert torch.equal(kept.backbone.features(clouds()), model.backbone.features(clouds()))


@pytest.mark.parametrize("points", [torch.full((2, 40, 3), 0.5), clouds(1), clouds(2, 8)])
def test_no_nan(points):
    model = mae()
    model(points).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_lower_precision_and_recomputing():
    model = mae(drop_path=0.0)
    exact = model.eval()(clouds(), masked=HIDDEN).loss
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(clouds(), masked=HIDDEN)
    assert cast.loss.dtype == torch.float32
    torch.testing.assert_close(cast.loss, exact, rtol=0.02, atol=0)
    model.train().gradient_checkpointing_enable()
    model.bfloat16()(clouds(), masked=HIDDEN).loss.backward()
    assert model.mask_token.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"mask_ratio": 0.1}, "mask_ratio: must hide some of 8 patches, not all, got 0.1"),
        ({"mask_ratio": 1.0}, r"mask_ratio: must be in \[0, 1\), got 1.0"),
        ({"mask_ratio": float("nan")}, "mask_ratio: must be in"),
        ({"mask_ratio": None}, "mask_ratio: must be in"),
        ({"decoder_heads": 5}, "decoder_heads: must divide the width 24, got 5"),
        ({"decoder_depth": 0}, "decoder_depth: must be"),
    ],
)
def test_configs_that_it_does_not_take(options, told):
    with pytest.raises(ValueError, match=told):
        PointMaeConfig(**SIZES | options)


@pytest.mark.parametrize(
    ("masked", "told"),
    [
        (HIDDEN[:1], r"masked: must be int64 \[2, 4\], got torch.int64 \[1, 4\]"),
        (HIDDEN.int(), "got torch.int32"),
        (HIDDEN.clamp(max=3), "masked: names a patch twice"),
        (HIDDEN + 1, "masked: must be in 0..7, got 8"),
        (HIDDEN - 1, "masked: must be in 0..7, got -1"),
    ],
)
def test_masks_that_it_does_not_take(masked, told):
    with pytest.raises(ValueError, match=told):
        mae()(clouds(), masked=masked)
