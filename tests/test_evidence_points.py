"""The evidence on clouds: its rates are chosen by clouds that nothing else sees, and runs are added once."""

import json
from dataclasses import replace
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
    monkeypatch.setattr(points, "STEPS", {"pre": 1, "try": 1, "adapt": 1})
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
    assert len(results.find(kind="try")) == sum(len(side.rates) for side in points.SIDES)
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


def test_costs_are_of_every_side(points, data, tmp_path, monkeypatch):
    monkeypatch.setattr(points.cost, "peaks", lambda module, pairs, folder: {points.SET: {n: 1.0 for _, n in pairs}})
    points.measure(data, tmp_path, tmp_path / "cost.json")
    found = json.loads((tmp_path / "cost.json").read_text())
    assert set(found["step"][points.SET]) == set(found["peak_mb"][points.SET]) == {side.name for side in points.SIDES}
    assert all(each["seconds"] > 0 for each in found["step"][points.SET].values())
    assert points.peak(points.PROBE, data) > 0


def test_a_section_tells_what_the_runs_say(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1])
        from bench.evidence import adapted, crops_page, points_page, report

    monkeypatch.setattr(adapted, "RESULTS", tmp_path)
    for told in (points_page.POINTS, crops_page.CROPS):
        told.results.add({"kind": "about", "machine": "a machine", "versions": {"torch": "2"}})
        names = [side.name for side in told.sides]
        for seed in range(2):
            for i, side in enumerate(names):
                figures = {key: 0.5 + 0.01 * i for key in told.measures}
                told.results.add({"kind": "run", "set": "a set", "side": side, "seed": seed, "rate": 1,
                                  "trained": 1000 + i, "train_s": 2.0, **figures})  # fmt: skip
        told = replace(told, claims=())
        page = adapted.adapted_section(told)
        assert all(f"| {side} | 2 | 1 | {1000 + i:,} | 2 s |" in page for i, side in enumerate(names))
        ours, other = told.pairs[-1]
        assert f"- {ours} against {other}: accuracy " in page
        better = "better" if names.index(ours) > names.index(other) else "worse"
        adapted.adapted_section(replace(told, claims=[report.Claim("So.", ours, other, "accuracy", {"a set": better})]))
        wrong = replace(told, claims=[report.Claim("So.", ours, other, "accuracy", {"a set": "disagree"})])
        with pytest.raises(ValueError, match="needs 'disagree'"):
            adapted.adapted_section(wrong)
        costs = {"about": {"machine": "another"}, "threads": 1,
                 "step": {told.costs_of("a set"): {side: {"seconds": 0.25} for side in names}},
                 "peak_mb": {told.costs_of("a set"): dict.fromkeys(names, 7)}}  # fmt: skip
        (tmp_path / f"{told.name}_cost.json").write_text(json.dumps(costs))
        assert "peak" not in page
        assert adapted.adapted_section(told).count(" 7 MB |") == len(told.sides)
        assert "Steps and peaks: another, 1 thread, " in adapted.adapted_section(told)
        adapted.shares(told, tmp_path / "runs.png")
        assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")
