"""The evidence on crops: what it makes of its data sets' shapes, and its runs, on data that the test makes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from deftcore.methods.tsvit.scene import UNLABELLED


@pytest.fixture(scope="module")
def crops():
    """The script, which no wheel holds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1])
        from bench.evidence import crops

        yield crops


@pytest.fixture
def folder(crops, tmp_path):
    """Both sets as their folders hold them, small: three patches, the third on a coarser grid, and two years."""
    draw = np.random.default_rng(0)
    (tmp_path / "worldcereal_patches").mkdir()
    (tmp_path / "france_crop_series").mkdir()
    dates = np.array(["2018-08-02", "2018-08-22", "2018-10-01", "2019-05-07", "2019-05-20"])
    fine = ["B02", "B03", "B04", *crops._COMMON[:3], "B08", *crops._COMMON[3:]]
    for i, (name, bands, side) in enumerate(
        zip(crops._PATCHES, (fine, fine, crops._COMMON), (32, 32, 16), strict=True)
    ):
        codes = draw.choice([0, 1110, 1200, 9120, 5100], (32, 32))
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


def test_patches_come_onto_one_grid(crops, folder):
    """Bands in one order, months' means of clear frames, each coarse pixel over its four, halves that share nothing."""
    fine, coarse = crops.belgian(folder, 0), crops.belgian(folder, 2)
    for place in (fine, coarse):
        (scene,) = place.scenes
        assert (scene.height, scene.width, len(scene.bands), scene.doy) == (32, 32, 6, (227, 288, 135))
        assert len(place.learn) == len(place.test) == 2
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
    place = [blue["bands"].tolist().index(name) for name in crops._COMMON]
    assert np.array_equal(october.images[1][:, clear], blue["images"][2][place][:, clear].astype(np.float32))


def test_few_labels_are_few_of_each_class(crops, folder):
    learn = crops.belgian(folder, 1).learn
    found = crops.few_labels(learn, 3, seed=1)
    labels = torch.stack([each["labels"] for each in found])
    assert {int(k): int((labels == k).sum()) for k in range(4)} == dict.fromkeys(range(4), 3)
    everywhere = torch.stack([each["labels"] for each in crops.few_labels(learn, 10**6, seed=1)])
    assert torch.equal(everywhere, torch.stack([each["labels"] for each in learn]))
    again = torch.stack([each["labels"] for each in crops.few_labels(learn, 3, seed=1)])
    assert torch.equal(labels, again)
    assert (labels == UNLABELLED).any()


@pytest.mark.parametrize("name", ["belgium, patch 2", "france, 2022"])
def test_runs_are_added_once(crops, folder, tmp_path, name, monkeypatch, capsys):
    monkeypatch.setattr(crops, "STEPS", {"pre": 1, "adapt": 1})
    monkeypatch.setattr(crops, "SEEDS", (0,))
    monkeypatch.setattr(crops, "SIDES", {side: crops.SIDES[side] for side in ("scratch", "head", "LoRA, r = 4")})
    results = crops.Results(tmp_path / "crops.jsonl")
    threads = torch.get_num_threads()
    crops.run_all(results, folder, [name], 10)
    torch.set_num_threads(threads)
    runs = results.find(kind="run", set=name)
    assert len(runs) == 6
    assert {each["labels"] for each in runs} == {"few", "all"}
    by_side = {each["side"]: each for each in runs}
    assert by_side["head"]["trained"] < by_side["LoRA, r = 4"]["trained"] < by_side["scratch"]["trained"]
    assert len({sum(map(sum, each["counts"])) for each in runs}) == 1
    written = results.path.read_bytes()
    crops.run_all(results, folder, [name], 10)
    torch.set_num_threads(threads)
    assert results.path.read_bytes() == written
    crops.print_table(results)
    assert "LoRA, r = 4" in capsys.readouterr().out
