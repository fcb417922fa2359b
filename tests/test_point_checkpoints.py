"""Published checkpoints of point-cloud transformers, by name; and the values of the authors' code."""

import pickle
import re
import zlib

import numpy as np
import pytest
import torch

from deftcore.methods.point_peft.backbone import PointConfig, PointTransformer
from deftcore.methods.point_peft.checkpoints import load_backbone, load_classifier
from deftcore.methods.point_peft.classifier import PointClassifier, PointClassifierConfig
from deftcore.methods.point_peft.patches import cut_patches
from deftcore.methods.point_peft.pretraining import PointMae
from deftcore.methods.point_peft.task import PointTask

SIZES = {"width": 24, "depth": 2, "heads": 3, "patches": 8, "patch_points": 4}
UNTOLD = {name: SIZES[name] for name in ("heads", "patches", "patch_points")}  # by the tensors
THEIRS = [
    ("encoder.point.", "encoder.first_conv."),
    ("encoder.token.0.", "encoder.second_conv.1."),
    ("encoder.token.2.", "encoder.second_conv.3."),
    ("reduce.", "reduce_dim."),
    ("position.", "pos_embed."),
    ("class_token", "cls_token"),
    ("class_position", "cls_pos"),
    ("blocks.", "blocks.blocks."),
    ("attention.qkv", "attn.qkv"),
    ("attention.projection", "attn.proj"),
    ("head.", "cls_head_finetune."),
    ("backbone.", ""),
]


def published(model):
    """A model's state as its authors' code writes it."""
    found, state = {}, {**model.state_dict()}
    for prefix in ("", "backbone."):
        if f"{prefix}encoder.own.weight" in state:
            both = [state.pop(f"{prefix}encoder.{part}.weight") for part in ("patch", "own")]
            found["encoder.second_conv.0.weight"] = torch.cat(both, 1).unsqueeze(-1)
            found["encoder.second_conv.0.bias"] = state.pop(f"{prefix}encoder.patch.bias")
    for name, tensor in state.items():
        if re.search(r"encoder\.(point|token)\.[023]\.weight", name) and tensor.dim() == 2:
            tensor = tensor.unsqueeze(-1)
        for ours, theirs in THEIRS:
            name = name.replace(ours, theirs)
        found[name] = tensor
    return found


def backbone(**options):
    return PointTransformer(PointConfig(**SIZES | options)).eval()


def classifier():
    return PointClassifier(PointClassifierConfig(**SIZES, classes=5)).eval()


def same(one, other):
    assert one.config == other.config
    for (name, a), (_, b) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


# ---------------------------------------------------------------------------- kinds of files


def test_a_fine_tuned_model(tmp_path):
    model, file = classifier(), tmp_path / "best.pth"
    tensors = {f"module.{name}": tensor for name, tensor in published(model).items()}
    assert "module.blocks.blocks.1.attn.proj.weight" in tensors
    torch.save({"base_model": tensors, "epoch": 3, "metrics": {"acc": np.float64(93.2)}, "best_metrics": {}}, file)
    loaded = load_classifier(file, **UNTOLD)
    same(loaded, model)
    assert not loaded.training
    same(load_backbone(file, **UNTOLD), model.backbone)
    other = load_classifier(published(model), **UNTOLD, width=24, classes=5)
    same(other, model)
    with torch.no_grad():
        other.backbone.norm.weight.mul_(2)  # its own: what was given stays
    same(loaded, model)


def test_a_pre_training_of_point_mae():
    """Which has no class token, and a decoder that is left out."""
    model = backbone(mlp_ratio=2.0)
    tensors = {f"MAE_encoder.{name}": each for name, each in published(model).items() if not name.startswith("cls")}
    others = {"mask_token": torch.ones(1, 1, 24), "MAE_decoder.blocks.0.norm1.weight": torch.ones(24)}
    torch.manual_seed(5)
    loaded = load_backbone(tensors | others, **UNTOLD)
    assert loaded.class_token.abs().sum() > 0
    model.class_token, model.class_position = loaded.class_token, loaded.class_position
    same(loaded, model)


def test_a_pre_training_of_point_bert():
    model = backbone(encoder_width=16)
    ours = {f"transformer_q.{name}": each for name, each in published(model).items()}
    assert "transformer_q.reduce_dim.weight" in ours
    others = ["transformer_q.cls_head.0.weight", "transformer_q.lm_head.bias", "transformer_q.mask_token"]
    others += ["transformer_k.cls_token", "dvae.encoder.first_conv.0.weight", "queue"]
    same(load_backbone(ours | dict.fromkeys(others, torch.ones(3)), **UNTOLD), model)


# ---------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop("norm.weight"), "missing tensors backbone.norm.weight"),
        (lambda t: t.pop("blocks.blocks.0.attn.qkv.weight"), "missing tensors backbone.blocks.0.attention.qkv.weight$"),
        (lambda t: t.pop("encoder.second_conv.0.weight"), "encoder.patch.weight, backbone.encoder.own.weight"),
        (lambda t: t.pop("cls_head_finetune.8.weight"), "missing tensors head.8.weight"),
        (
            lambda t: t.update({"blocks.blocks.0.ad_gate": torch.ones(1)}),
            "unexpected tensors .*blocks.0.ad_gate",
        ),
        (
            lambda t: t.update({"blocks.attn1.qkv.weight": torch.ones(1)}),
            "unexpected tensors .*blocks.attn1.qkv",
        ),
        (
            lambda t: t.update({"pos_embed.0.weight": torch.ones(3, 128)}),
            r"other shapes backbone.position.0.weight \[3, 128\] for \[128, 3\]",
        ),
        (
            lambda t: t.update({"encoder.second_conv.0.weight": torch.ones(512, 256, 1)}),
            "unexpected tensors backbone.encoder.second_conv.0.weight",
        ),
    ],
)
def test_what_does_not_fit(change, told):
    tensors = published(classifier())
    change(tensors)
    sizes = {"width": 24, "classes": 5} | UNTOLD
    with pytest.raises(ValueError, match=f"the mapping does not hold a PointClassifier of this config: .*{told}"):
        load_classifier(tensors, **sizes)


def test_sizes_that_are_given_are_held_to():
    with pytest.raises(ValueError, match=r"other shapes .*blocks.0.norm1.weight \[24\] for \[48\]"):
        load_backbone({k: v for k, v in published(backbone()).items() if "blocks" in k}, **UNTOLD | {"width": 48})
    with pytest.raises(ValueError, match=r"missing tensors blocks.2.norm1.weight"):
        load_backbone(published(backbone()), **UNTOLD, depth=3)
    with pytest.raises(ValueError, match=r"missing tensors head.0.weight"):
        load_classifier(published(backbone()), **UNTOLD)


class Dangerous:
    def __reduce__(self):
        return print, ("run",)


def test_files_that_are_no_checkpoints(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        load_backbone(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("hello")
    torch.save({"base_model": {"x": torch.ones(1)}, "config": Dangerous()}, tmp_path / "code.pth")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Dangerous(), protocol=2))
    (tmp_path / "empty.pth").write_bytes(b"")
    for name in ("text.pth", "code.pth", "pickle.pth", "empty.pth"):
        with pytest.raises(ValueError, match=rf"source: .*{name} is no checkpoint that PyTorch reads safely: \w"):
            load_backbone(tmp_path / name)
    assert capsys.readouterr().out == ""
    for value in ({}, [torch.ones(1)], {"epoch": 3}):
        torch.save(value, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=r"source: .*other\.pth holds no tensors by name"):
            load_backbone(tmp_path / "other.pth")


@pytest.mark.parametrize(("kind", "reader"), [(PointTransformer, load_backbone), (PointClassifier, load_classifier)])
def test_a_file_of_the_authors_in_a_models_place(tmp_path, kind, reader):
    model = backbone() if kind is PointTransformer else classifier()
    torch.save(published(model), tmp_path / "best.pth")
    call = f"{reader.__module__}.{reader.__name__}(FILE).save_pretrained(FOLDER)"
    for load in (kind.from_pretrained, PointTask.load_model):
        with pytest.raises(FileNotFoundError, match=r"best\.pth is a file; ") as raised:
            load(tmp_path / "best.pth")
        assert call in str(raised.value)
    with pytest.raises(FileNotFoundError, match=r"best\.pth is a file$"):  # which no file of theirs makes
        PointMae.from_pretrained(tmp_path / "best.pth")


# ---------------------------------------------------------------------------- values of the authors' code


def weights(stored):
    """Those that a file holds, or says how to draw (README of the values)."""
    if "tensor_names" not in stored:
        return {name[2:]: torch.from_numpy(stored[name]) for name in stored.files if name.startswith("w.")}
    drawn = {}
    for name, shape, checks in zip(
        stored["tensor_names"], stored["tensor_shapes"], stored["tensor_checks"], strict=True
    ):
        sizes = tuple(int(size) for size in re.findall(r"\d+", str(shape)))
        z = np.random.Generator(np.random.PCG64(zlib.crc32(str(name).encode()))).standard_normal(sizes)
        last = str(name).rsplit(".", 1)[-1]
        if last == "running_var":
            z = 0.4 + abs(z)
        elif last == "weight":
            z = 1 + 0.2 * z if len(sizes) == 1 else z / np.sqrt(np.prod(sizes[1:]))
        else:
            z = {"running_mean": 0.2, "bias": 0.1}.get(last, 0.5) * z
        value = z.astype(np.float32)
        wide = value.astype(np.float64).ravel()
        np.testing.assert_allclose([wide.sum(), abs(wide).sum(), wide[0], wide[-1]], checks, rtol=1e-9, atol=1e-9)
        drawn[str(name)] = torch.from_numpy(value)
    return drawn


def sizes_of(stored):
    told = dict(re.findall(r"(\w+)=(\d+)", str(stored["config"])))
    return {ours: int(told[theirs]) for ours, theirs in (("heads", "heads"), ("patches", "G"), ("patch_points", "S"))}


def close(ours, stored, name):
    """As close as its README says: float64 to 1e-10, what is stored in float32 to 1e-6."""
    expected = torch.from_numpy(stored[name])
    exact = 1e-10 if expected.dtype == torch.float64 else 1e-6
    bound = exact if ours.dtype == torch.float64 else 2e-5
    error = (ours.double() - expected.double()).abs().max().item()
    assert error <= bound, f"{name}: {error:.2e}"


CLASSIFIERS = ["pointmae_cls_small", "pointmae_cls_default_modelnet40", "pointmae_cls_default_scan"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_of_the_authors(name, dtype, parity):
    stored = parity(f"{name}.npz")
    tensors = weights(stored)
    for batches in [each for each in published(classifier()) if each.endswith("num_batches_tracked")]:
        tensors.setdefault(batches, torch.tensor(0))
    model = load_classifier(tensors, **sizes_of(stored)).to(dtype)
    points, outputs = torch.from_numpy(stored["pts"]).to(dtype), {}
    for number, block in enumerate(model.backbone.blocks):
        block.register_forward_hook(
            lambda _, given, made, n=number: outputs.update({f"block{n}_in": given[0], f"block{n}_out": made})
        )
    patches = model.backbone.group(points)
    tokens, position = model.backbone.embed(patches)
    outputs |= {"enc_tokens": tokens, "pos": position, "norm_out": model.backbone(points)}
    model.head.register_forward_pre_hook(lambda _, given: outputs.update(head_in=given[0]))
    outputs["logits"] = model(points).logits
    assert np.array_equal(patches.members, stored["knn_idx"])
    assert torch.equal(patches.centres, points.gather(1, picks(stored).unsqueeze(-1).expand(-1, -1, 3)))
    if "neighborhood" in stored:
        close(patches.neighbourhoods, stored, "neighborhood")
    compared = [each for each in outputs if each in stored]
    assert len(compared) == (11 if "block0_in" in stored else 8)
    for each in compared:
        close(outputs[each], stored, each)


def picks(stored):
    return torch.from_numpy(stored["fps_idx"].astype(np.int64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_features_of_the_authors(dtype, parity):
    stored = parity("pointmae_bank_feature_small.npz")
    model = load_backbone(weights(stored), **sizes_of(stored)).to(dtype)
    points = torch.from_numpy(stored["pts"]).to(dtype)
    patches = model.group(points)
    tokens, position = model.embed(patches)
    close(tokens, stored, "enc_tokens")
    close(model.norm(model.blocks(tokens, position)), stored, "norm_out")
    close(model.features(points), stored, "feature")
    assert torch.equal(cut_patches(points, 16, 8).centres, points.gather(1, picks(stored)[..., None].expand(-1, -1, 3)))
