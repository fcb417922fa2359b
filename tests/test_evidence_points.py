"""The evidence on clouds: its rates are chosen by clouds that nothing else sees, and runs are added once."""

from pathlib import Path

import numpy as np
import pytest
import torch

from deftcore.methods.point_peft.pretraining import PointMaeConfig


@pytest.fixture(scope="module")
def points():
    """The script, which no wheel holds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1])
        from bench.evidence import points

        yield points


@pytest.fixture
def data(points, tmp_path, monkeypatch):
    """The set as its folder holds it, small: 20 clouds to train on and 6 to test, of two classes."""
    draw = np.random.default_rng(0)
    (tmp_path / "ldraw_points").mkdir()
    np.savez(
        tmp_path / "ldraw_points" / "ldraw_points.npz", points=draw.normal(size=(26, 32, 3)).astype(np.float16),
        label=np.arange(26, dtype=np.int16) % 2, is_test=(np.arange(26) >= 20).astype(np.uint8), classes=["a", "b"],
        radius=np.ones(26, np.float32),
    )  # fmt: skip
    sizes = {"width": 24, "depth": 2, "heads": 2, "patches": 8, "patch_points": 4}
    monkeypatch.setattr(points, "SIZES", PointMaeConfig(**sizes, decoder_depth=1, decoder_heads=2))
    monkeypatch.setattr(points, "STEPS", {"pre": 1, "adapt": 1})
    monkeypatch.setattr(points, "SEEDS", (0,))
    (tmp_path / "kept").mkdir()
    return points.Data(tmp_path, tmp_path / "kept")


def test_rates_are_chosen_by_clouds_of_every_class_that_tries_do_not_learn_from(data):
    learn, tuning, test = ({each["points"].numpy().tobytes() for each in part}
                           for part in (data.learn, data.tuning, data.test))  # fmt: skip
    assert (len(learn), len(tuning), len(test)) == (16, 4, 6)
    assert not learn & tuning | learn & test | tuning & test
    assert [each["labels"] for each in data.tuning] == [0, 1, 0, 1]


def test_runs_are_added_once(points, data, tmp_path):
    results = points.Results(tmp_path / "points.jsonl")
    points.run_all(results, data, 10)
    assert len(results.find(kind="try")) == 3 * len(points.SIDES)
    runs = {each["side"]: each for each in results.find(kind="run")}
    assert set(runs) == {side.name for side in points.SIDES}
    assert all(np.sum(each["counts"]) == 6 for each in runs.values())
    assert len({each["head"] for each in runs.values()}) == 1
    assert all(runs["head alone"]["trained"] < runs[name]["trained"] < runs["full tuning"]["trained"]
               for name in ("LoRA, r = 8", "BitFit", "AdaptFormer, 16"))  # fmt: skip
    assert runs["head alone"]["trained"] == runs["head alone"]["head"]
    written = results.path.read_bytes()
    points.run_all(results, data, 10)
    assert results.path.read_bytes() == written


def test_only_a_side_from_nothing_starts_elsewhere(points, data):
    scratch, full = (data.begin(side, 1, data.train)[0] for side in (points.SCRATCH, points.FULL))
    before = points.load_own(data.pretrained, (points.PointMae,)).backbone.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in full.backbone.state_dict().items())
    assert not torch.equal(scratch.backbone.position[0].weight, before["position.0.weight"])
