"""The evidence on crops: what it makes of its data sets' shapes, and its runs, on data that the test makes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import on_threads

from deftcore.methods.tsvit.scene import UNLABELLED


@pytest.fixture(scope="module")
def crops():
    """The script, which no wheel holds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1])
        from bench.evidence import crops

        yield crops


@pytest.fixture(scope="module")
def crops_data(crops):
    """What reads its data."""
    from bench.evidence import crops_data

    return crops_data


@pytest.fixture
def folder(crops_data, tmp_path):
    """Both sets as their folders hold them, small: three patches, the third on a coarser grid, and two years."""
    draw = np.random.default_rng(0)
    (tmp_path / "worldcereal_patches").mkdir()
    (tmp_path / "france_crop_series").mkdir()
    dates = np.array(["2018-08-02", "2018-08-22", "2018-10-01", "2019-05-07", "2019-05-20"])
    fine = ["B02", "B03", "B04", *crops_data.COMMON[:3], "B08", *crops_data.COMMON[3:]]
    for i, (name, bands, side) in enumerate(
        zip(crops_data.PATCHES, (fine, fine, crops_data.COMMON), (64, 64, 32), strict=True)
    ):
        codes = draw.choice([0, 1110, 1200, 9120, 5100], (64, 64))
        suffix = "_10m" if i == 2 else ""
        np.savez(
            tmp_path / "worldcereal_patches" / f"{name}.npz", dates=dates, bands=bands, **{f"ct{suffix}": codes},
            images=draw.integers(1, 9000, (5, len(bands), side, side)).astype(np.uint16),
            cloud=draw.random((5, side, side)) < 0.3,
        )  # fmt: skip
    for name, frames, classes in (("dekad_2023", 6, 4), ("month_2022", 4, 3)):
        series = draw.integers(1, 9000, (40, frames, 11)).astype(np.uint16)
        series[3, 1] = 65535
        np.savez(
            tmp_path / "france_crop_series" / f"{name}.npz", series=series, doy=np.arange(20, 20 + 30 * frames, 30),
            label=draw.integers(0, classes, 40).astype(np.int16), classes=[f"c{i}" for i in range(classes)],
        )  # fmt: skip
    return tmp_path


def test_patches_come_onto_one_grid(crops_data, folder):
    """Bands in one order, months' means of clear frames, each coarse pixel over its four, halves that share nothing."""
    fine, coarse = crops_data.belgian(folder, 0), crops_data.belgian(folder, 2)
    for place in (fine, coarse):
        (scene,) = place.scenes
        assert (scene.height, scene.width, len(scene.bands), scene.doy) == (64, 64, 6, (227, 288, 135))
        assert len(place.learn) == len(place.test) == 8
    stored = np.load(folder / "worldcereal_patches" / "patch2_20m.npz")
    whole = coarse.scenes[0].read()
    clear = ~stored["cloud"][:2]
    count = clear.sum(0)
    average = (stored["images"][:2] * clear[:, None]).sum(0) / np.maximum(count, 1)
    seen = (count > 0).repeat(2, 0).repeat(2, 1)
    assert np.array_equal(whole.usable[0], seen)
    expected = average.repeat(2, 1).repeat(2, 2)
    np.testing.assert_allclose(whole.images[0][:, seen], expected[:, seen], rtol=1e-6)
    blue = np.load(folder / "worldcereal_patches" / "patch0_10m.npz")
    october = fine.scenes[0].read()
    clear = ~blue["cloud"][2]
    place = [blue["bands"].tolist().index(name) for name in crops_data.COMMON]
    assert np.array_equal(october.images[1][:, clear], blue["images"][2][place][:, clear].astype(np.float32))


def test_few_labels_are_few_of_each_class(crops_data, folder):
    learn = crops_data.belgian(folder, 1).learn
    found = crops_data.few_labels(learn, 3, seed=1)
    labels = torch.stack([each["labels"] for each in found])
    assert {int(k): int((labels == k).sum()) for k in range(4)} == dict.fromkeys(range(4), 3)
    everywhere = torch.stack([each["labels"] for each in crops_data.few_labels(learn, 10**6, seed=1)])
    assert torch.equal(everywhere, torch.stack([each["labels"] for each in learn]))
    again = torch.stack([each["labels"] for each in crops_data.few_labels(learn, 3, seed=1)])
    assert torch.equal(labels, again)
    assert (labels == UNLABELLED).any()


@pytest.fixture
def short(crops, monkeypatch):
    """One step of everything, one seed, one thread."""
    monkeypatch.setattr(crops, "STEPS", {"pre": 1, "adapt": 1})
    monkeypatch.setattr(crops, "SEEDS", (0,))
    with on_threads(1):
        yield crops


@pytest.mark.parametrize("name", ["belgium, patch 2", "france, 2022"])
def test_runs_are_added_once(short, folder, tmp_path, name, monkeypatch):
    kept = ("scratch", "head", "LoRA, r = 4")
    monkeypatch.setattr(short, "SIDES", [side for side in short.SIDES if side.name in kept])
    results = short.Results(tmp_path / "crops.jsonl")
    short.run_all(results, folder, [name], 10)
    runs = results.find(kind="run")
    assert len(runs) == 6
    assert len(results.find(kind="try")) == 12
    assert {each["set"] for each in runs} == {f"{name}, few labels", f"{name}, all labels"}
    by_side = {each["side"]: each for each in runs}
    assert by_side["head"]["trained"] < by_side["LoRA, r = 4"]["trained"] < by_side["scratch"]["trained"]
    assert len({sum(map(sum, each["counts"])) for each in runs}) == 1
    written = results.path.read_bytes()
    short.run_all(results, folder, [name], 10)
    assert results.path.read_bytes() == written


def test_costs_are_of_every_side(short, folder, tmp_path, monkeypatch):
    name = "france, 2022"
    monkeypatch.setattr(short, "SETS", (name,))
    monkeypatch.setattr(short.cost, "peaks", lambda module, pairs, folder: {name: {side: 1.0 for _, side in pairs}})
    short.measure(folder, tmp_path / "cost.json")
    found = json.loads((tmp_path / "cost.json").read_text())
    assert set(found["step"][name]) == set(found["peak_mb"][name]) == {side.name for side in short.SIDES}
    assert all(each["seconds"] > 0 for each in found["step"][name].values())
    assert short.peak(short.PROBE, name, folder) > 0
