"""Point clouds through recipes: a backbone is made, adapted in several ways, stopped, gone on with, loaded, merged."""

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import Stopped
from peft import get_peft_model
from point_clouds import SHAPES, shape, tiny_mae, write_arrays, write_folders
from safetensors.torch import load_file

from deftcore import PointPeftConfig
from deftcore._files import write_json
from deftcore.cli import main
from deftcore.methods.point_peft.attention import attention_to_points
from deftcore.methods.point_peft.bank import MemoryBank
from deftcore.methods.point_peft.classifier import PointClassifier
from deftcore.methods.point_peft.predicting import CloudReader, Clouds
from deftcore.methods.point_peft.pretraining import PointMae
from deftcore.methods.point_peft.pretraining_task import NEW, PointPretrainingTask
from deftcore.methods.point_peft.task import LabelledPointData, PointTask
from deftcore.training.adapters import load_adapter
from deftcore.training.config import TrainingConfig
from deftcore.training.metrics import ConfusionCounts
from deftcore.training.recipe import load_recipe
from deftcore.training.registry import find
from deftcore.training.run import train_recipe
from deftcore.training.task import Batches

ADAPTERS = {
    "lora": {"r": 4, "target_modules": ["qkv", "projection", "fc1", "fc2"], "modules_to_save": ["head"]},
    "bitfit": {"modules_to_save": ["head"]},
    "bottleneck": {"r": 4, "parallel": True, "target_modules": ["mlp"], "modules_to_save": ["head"]},
    "point-peft": {"prompt_tokens": 4, "rank": 4, "prompt_blocks": 2, "exclude_self": True, "dropout": 0.1},
    "full": {},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model to pre-train, and clouds of three shapes."""
    folder = tmp_path_factory.mktemp("points")
    torch.manual_seed(0)
    tiny_mae().save_pretrained(folder / "mae")
    write_arrays(folder / "clouds.npz")
    return folder


def recipe(place, output, method="lora", *overrides, **changes):
    fields = {
        "model": str(place / "mae"), "output": str(output), "method": method, "task": "points",
        "adapter": ADAPTERS[method], "data": {"train": str(place / "clouds.npz"), "points": 64},
        "training": {
            "max_steps": 6, "batch_size": 7, "learning_rate": 0.01, "save_every": 2, "eval_every": 3, "log_every": 1,
            "best_by": "accuracy",
        },
    } | changes  # fmt: skip
    file = Path(output).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(fields))
    return load_recipe(file, overrides)


def classifier(place, folder):
    """What a run left, on a base of its own."""
    if (folder / "adapter_config.json").exists():
        return load_adapter(PointTask.base_of(place / "mae", folder), folder).eval()
    return PointClassifier.from_pretrained(folder)


@pytest.mark.parametrize("method", ADAPTERS)
def test_a_backbone_is_adapted(place, tmp_path, method, stopping):
    """The run goes on after a stop as if there had been none; its final folder tells what its last evaluation told."""
    result = train_recipe(recipe(place, tmp_path / "whole", method))
    stopping()
    with pytest.raises(Stopped):
        train_recipe(recipe(place, tmp_path / "parts", method))
    assert train_recipe(recipe(place, tmp_path / "parts", method)).train_loss == result.train_loss
    files = sorted(each.name for each in (tmp_path / "whole" / "final").glob("*.safetensors"))
    for name in files:
        ours, theirs = (load_file(tmp_path / run / "final" / name) for run in ("whole", "parts"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    model = classifier(place, tmp_path / "whole" / "final")
    task = PointTask(SHAPES)
    data = LabelledPointData(str(place / "clouds.npz"), points=64)
    task.prepare(tiny_mae(), data)
    (batch,) = Batches(task.held_out(data), 9, task.collate, shuffle=False, draw=task.draw).epoch(0)
    with torch.no_grad():
        output = task.output(model, batch)
    counts = task.counts(batch, output)
    assert float(output.loss) == pytest.approx(result.eval_loss, rel=1e-5)
    assert task.metrics(counts) == {"accuracy": result.accuracy, "mean_class_accuracy": result.mean_class_accuracy}
    shown = tmp_path / "whole" / "evaluation"
    names = [f"{what}-{label}.png" for what in ("cloud", "patches") for label in range(3)]
    assert sorted(each.name for each in shown.iterdir()) == sorted([*names, "confusion.json", "confusion.png"])
    kept = ConfusionCounts.from_dict(json.loads((shown / "confusion.json").read_text()))
    assert torch.equal(kept.counts, counts)
    assert kept.classes == list(SHAPES)


def test_only_what_a_method_trains_changes(place, tmp_path):
    """The frozen encoder's running statistics among what stays."""
    train_recipe(recipe(place, tmp_path / "run", "lora"))
    before = PointMae.from_pretrained(place / "mae").backbone.state_dict()
    model = classifier(place, tmp_path / "run" / "final")
    after = model.get_base_model().backbone.state_dict()
    stayed = [name.replace(".base_layer", "") for name in after if "lora_" not in name]
    assert set(stayed) == before.keys()
    for name in after:
        if "lora_" not in name:
            assert torch.equal(after[name], before[name.replace(".base_layer", "")]), name
    assert any(name.endswith("running_mean") for name in before)


def test_from_a_backbone_of_its_own_to_a_merged_classifier(place, tmp_path, capsys):
    """The commands that a newcomer types: pre-train, adapt, export; what was exported goes on being trained."""
    write_folders(tmp_path / "shapes", each=8)
    pre = [f"model={place / 'mae'}", f"data.train={tmp_path / 'shapes'}", f"output={tmp_path / 'pre'}"]
    short = ["data.points=64", "training.epochs=1", "training.batch_size=4"]
    assert main(["train", "point-mae", *pre, *short, "training.max_steps=3"]) == 0
    loss = json.loads((tmp_path / "pre" / "result.json").read_text())["eval_loss"]
    assert loss > 0
    base = tmp_path / "pre" / "final"
    options = ["method=lora", "adapter={r: 2, target_modules: [qkv], modules_to_save: [head]}"]
    paths = [f"model={base}", f"data.train={tmp_path / 'shapes'}", f"output={tmp_path / 'run'}"]
    assert main(["train", "point-peft", *paths, *options, *short]) == 0
    printed = capsys.readouterr().out
    assert "\naccuracy: " in printed
    assert re.search(r"best checkpoint at \S+ \(step \d+, accuracy [\d.]+, loss ", printed)
    merged = tmp_path / "merged"
    assert main(["export", str(base), str(merged), "--adapter", str(tmp_path / "run" / "final")]) == 0
    assert str(merged) in capsys.readouterr().out
    cloud = torch.randn(2, 64, 3)
    adapted = load_adapter(PointTask.base_of(base, tmp_path / "run" / "final"), tmp_path / "run" / "final").eval()
    plain = PointClassifier.from_pretrained(merged)
    torch.testing.assert_close(plain(cloud).logits, adapted(points=cloud).logits, rtol=1e-4, atol=1e-5)
    reader, same = PointTask.reader(merged), PointTask.reader(base, tmp_path / "run" / "final")
    assert (reader.clouds.classes, reader.clouds.points) == (tuple(sorted(SHAPES)), 64)
    file = tmp_path / "shapes" / "rod" / "test" / "7.npy"
    found = reader(file)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert sum(found.values()) == pytest.approx(1)
    assert found == pytest.approx(same(np.load(file)), rel=1e-3)
    with pytest.raises(ValueError, match="does not say which classes it tells"):
        PointTask.reader(base)
    known = json.loads((merged / "clouds.json").read_text())
    for change, message in (
        ({"classes": known["classes"][:-1]}, f"names {len(SHAPES) - 1} classes .*, the model tells {len(SHAPES)}"),
        ({"classes": "rod"}, "clouds.json is damaged: classes: must be a list"),
        ({"classes": ["rod"] * len(SHAPES)}, "clouds.json is damaged: classes: must be names, each class its own"),
        ({"points": True}, "clouds.json is damaged: points: must be a number, got True"),
        ({"normalise": True}, "clouds.json is damaged: normalise: unknown; did you mean normalize"),
    ):
        write_json(merged / "clouds.json", known | change)
        with pytest.raises(ValueError, match=message):
            PointTask.reader(merged)
        with pytest.raises(ValueError, match=message):
            PointTask.of_model(merged, PointTask.load_model(merged))
    write_json(merged / "clouds.json", known)
    paths = [f"model={merged}", f"data.train={tmp_path / 'shapes'}", f"output={tmp_path / 'again'}"]
    assert main(["train", "point-peft", *paths, "method=full", "adapter={}", *short]) == 0
    capsys.readouterr()
    for more, message in (
        ([str(merged)], "output: must be a new folder"),
        ([str(tmp_path / "new"), "--adapter", ""], r"adapter (--adapter): is needed"),
        ([str(tmp_path / "new"), "--quantize", "nf4"], "quantize: is not for a model of points, got 'nf4'"),
    ):
        assert main(["export", str(base), *more]) == 2
        assert message in capsys.readouterr().err


def test_what_is_not_linear_is_not_merged(place, tmp_path, capsys):
    train_recipe(recipe(place, tmp_path / "run", "bottleneck", "training.max_steps=1"))
    words = ["export", str(place / "mae"), str(tmp_path / "merged"), "--adapter", str(tmp_path / "run" / "final")]
    assert main(words) == 2
    assert "adapter: one of bottleneck cannot be merged; it stays in" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_pretraining_learns_and_goes_on(place, tmp_path, stopping):
    def run(name):
        return recipe(
            place, tmp_path / name, "full", "training.best_by=", "training.max_steps=20", "training.save_every=10",
            task="points-pretraining",
        )  # fmt: skip

    result = train_recipe(run("whole"))
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    losses = [line["eval_loss"] for line in log if "eval_loss" in line]
    assert losses[-1] < losses[0]
    stopping()
    with pytest.raises(Stopped):
        train_recipe(run("parts"))
    assert train_recipe(run("parts")).train_loss == result.train_loss
    assert PointMae.from_pretrained(tmp_path / "parts" / "final").config == tiny_mae().config


def test_the_example_for_newcomers(tmp_path, capsys):
    file = Path(__file__).parents[1] / "examples" / "point_clouds.py"
    example = runpy.run_path(str(file))
    example["main"](tmp_path, "training.max_steps=1", "training.batch_size=4")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "backbone", "classes", "a ball", "a cube", "a ring", "a rod", "a helix"
    ]  # fmt: skip
    assert (tmp_path / "classes" / "evaluation" / "confusion.png").exists()


def test_sizes_to_begin_with():
    small = PointPretrainingTask.load_model("point-mae-small")
    assert sum(p.numel() for p in small.backbone.parameters()) < 2e6
    assert small.config == NEW["point-mae-small"]
    assert NEW["point-mae"].width == 384
    with pytest.raises(FileNotFoundError, match="point-mae-big is no folder of a model"):
        PointPretrainingTask.load_model("point-mae-big")


def test_votes_are_means_over_views(place):
    """The first view is the plain one; others differ, and are the same in every evaluation."""
    task = PointTask()
    data = LabelledPointData(str(place / "clouds.npz"), points=64, votes=3)
    task.prepare(tiny_mae(), data)
    model = PointClassifier.on(tiny_mae().backbone, 3).eval()
    batches = Batches(task.held_out(data), 9, task.collate, shuffle=False, draw=task.draw)
    (batch,) = batches.epoch(0)
    (again,) = batches.epoch(0)
    assert torch.equal(batch["points"], again["points"])
    assert batch["points"].shape == (9, 3, 64, 3)
    one = PointTask()
    one.prepare(tiny_mae(), LabelledPointData(str(place / "clouds.npz"), points=64))
    plain = one.collate([one.draw(each, torch.Generator(), False) for each in one.held_out(one.data)])
    assert torch.equal(batch["points"][:, 0], plain["points"])
    assert (batch["points"][:, 1] - batch["points"][:, 2]).abs().max() > 0.01
    with torch.no_grad():
        logits = torch.stack([model(batch["points"][:, v]).logits for v in range(3)]).mean(0)
        torch.testing.assert_close(task.output(model, batch).logits, logits, rtol=1e-4, atol=1e-5)


def test_attention_is_laid_on_points():
    """All points of a patch have the patch's; the patches' share of the class token's attention is at most 1."""
    torch.manual_seed(1)
    model = PointClassifier.on(tiny_mae().backbone, 3)
    cloud = torch.from_numpy(shape("ball", 64, np.random.default_rng(0)))
    attention, logits = attention_to_points(model, cloud)
    assert model.training
    assert attention.shape == (64,)
    assert logits.shape == (3,)
    values = attention.unique()
    assert 2 <= len(values) <= 8
    assert 0 < values.sum() < 1


def test_attention_of_an_adapted_classifier():
    """Of its own tokens, also where the last block has prompts: as the plain one's while the adapter does nothing."""
    torch.manual_seed(1)
    model = PointClassifier.on(tiny_mae().backbone, 3).eval()
    cloud = torch.from_numpy(shape("ball", 64, np.random.default_rng(0)))
    want, _ = attention_to_points(model, cloud)
    bank = MemoryBank.build(model.backbone, [torch.randn(4, 64, 3)])
    adapted = get_peft_model(model, PointPeftConfig(prompts="gated", prompt_blocks=2, prompt_tokens=4, bank=bank))
    assert torch.equal(attention_to_points(adapted, cloud)[0], want)


def test_a_bank_that_a_recipe_names_is_of_its_backbone_and_clouds(place, tmp_path):
    task = PointTask(SHAPES)
    data = LabelledPointData(str(place / "clouds.npz"), points=64)
    backbone = PointMae.from_pretrained(place / "mae").backbone
    task.prepare(backbone, data)
    found = list(Batches(task.read(data.train, data), 4, task.collate, shuffle=False, draw=task.draw).epoch(0))
    for name, batches in (("own", found), ("other", found[:-1])):
        MemoryBank.build(backbone, batches).save(tmp_path / f"{name}.safetensors")
    few = ["training.max_steps=2", f"adapter.bank={tmp_path / 'own.safetensors'}"]
    train_recipe(recipe(place, tmp_path / "named", "point-peft", *few))
    train_recipe(recipe(place, tmp_path / "built", "point-peft", few[0]))
    ours, theirs = (load_file(tmp_path / run / "final" / "adapter_model.safetensors") for run in ("named", "built"))
    assert ours.keys() == theirs.keys()
    # Two steps of 0.0075. Banks are built twice, and libraries round by how memory is aligned; what stands before a
    # normalisation, as some biases do, has no gradient but rounding.
    for name in (n for n in theirs if not n.endswith("bias")):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=2e-3)
    with pytest.raises(ValueError, match="bank: it was built from other clouds"):
        train_recipe(recipe(place, tmp_path / "x", "point-peft", f"adapter.bank={tmp_path / 'other.safetensors'}"))
    with pytest.raises(FileNotFoundError, match="bank: no such file"):
        train_recipe(recipe(place, tmp_path / "y", "point-peft", "adapter.bank=none.safetensors"))


def test_the_recipe_as_it_is(place, tmp_path):
    """On a small backbone; what it leaves is read again, and is not merged."""
    base, final = str(place / "mae"), tmp_path / "run" / "final"
    paths = [f"model={base}", f"data.train={place / 'clouds.npz'}", f"output={final.parent}"]
    short = ["data.points=64", "training.max_steps=2", "training.batch_size=8"]
    assert main(["train", "point-peft", *paths, *short]) == 0
    assert sum(PointTask.reader(base, final)(shape("rod", 70, np.random.default_rng(0))).values()) == pytest.approx(1)
    assert main(["export", base, str(tmp_path / "merged"), "--adapter", str(final)]) == 2


def test_what_decays():
    """Weights of linear layers: no token, norm, gate or bias."""
    model = PointClassifier.on(tiny_mae().backbone, 3)
    model = get_peft_model(model, PointPeftConfig(prompts="gated", memory=False))
    decayed, spared = find("point-peft").optimizer(model, None, TrainingConfig(weight_decay=0.05)).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    assert all(names[id(p)].endswith("weight") and p.dim() == 2 for p in decayed["params"])
    assert any("prompts.tokens" in names[id(p)] for p in spared["params"])
    assert len(decayed["params"]) + len(spared["params"]) == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.points=4"], "data.points: must be at least 8, the model's patches"),
        (["data.scale=[2, 1]"], r"data.scale: must be the least and the largest factor, got \[2.0, 1.0\]"),
        (["adapter.modules_to_save=null"], r"adapter.modules_to_save: must hold head, which is new"),
        (["training.batch_size=1"], "training.batch_size: must be at least 2, got 1"),
        (["method=qlora"], "method: the weights of a point cloud's model are not kept in 4 bits"),
        (["data.train=nowhere"], "data.train: no such file or folder: nowhere"),
    ],
)
def test_what_does_not_fit(place, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        train_recipe(recipe(place, tmp_path / "run", "lora", *overrides))
    assert not (tmp_path / "run").exists()


def test_clouds_that_are_too_large_as_they_are(place, tmp_path):
    arrays = dict(np.load(write_arrays(tmp_path / "large.npz")))
    np.savez(tmp_path / "large.npz", **arrays | {"points": arrays["points"].astype(np.float64) * 1e200})
    large = [f"data.train={tmp_path / 'large.npz'}", "data.normalize=false"]
    told = r"data\.train: .*large\.npz, cloud 0: coordinates must be of size at most 1e\+18, got \d.*; data\.normalize"
    with pytest.raises(ValueError, match=told):
        train_recipe(recipe(place, tmp_path / "run", "lora", *large))
    with pytest.raises(ValueError, match="data: the array: coordinates must be of size at most"):
        CloudReader(None, Clouds(SHAPES, 8, False)).points(np.full((3, 3), 1e30))


def test_classes_that_do_not_fit(place, tmp_path):
    torch.manual_seed(0)
    PointClassifier.on(tiny_mae().backbone, 5).save_pretrained(tmp_path / "five")
    with pytest.raises(ValueError, match=r"the model tells other classes \(5\) than .* has \(ball, rod, sheet\)"):
        train_recipe(recipe(place, tmp_path / "run", "full", f"model={tmp_path / 'five'}"))
    write_folders(tmp_path / "more")
    (tmp_path / "more" / "ball").rename(tmp_path / "more" / "cone")
    with pytest.raises(ValueError, match="no cloud to train on has the class cone"):
        train_recipe(recipe(place, tmp_path / "run", "full", f"data.validation={tmp_path / 'more'}"))
    (tmp_path / "one").mkdir()
    (tmp_path / "more" / "rod").rename(tmp_path / "one" / "rod")
    with pytest.raises(ValueError, match=r"must have clouds of two classes or more, .* has 1"):
        train_recipe(recipe(place, tmp_path / "run", "full", f"data.train={tmp_path / 'one'}"))


def test_a_last_batch_of_one_cloud_is_left_out(place, tmp_path, caplog):
    """BatchNorm has no spread in it: 15 clouds in batches of 7."""
    result = train_recipe(recipe(place, tmp_path / "run", "full", "training.max_steps=0", "training.epochs=2"))
    assert result.steps == 4
    assert "the last 1 of an epoch's 15 are left out" in caplog.text
    assert "density" not in caplog.text  # which is of models of text
