"""`deftcore map`: a scene's classes as a GeoTIFF on the scene's grid, and a picture beside its labels."""

import json

import numpy as np
import pytest
import torch
from test_tsvit_data import RECIPE, arrays_of, small, write_folder

from deftcore.cli.main import main
from deftcore.methods.tsvit.geotiff import read_folder, writing_map
from deftcore.methods.tsvit.map import write_map
from deftcore.methods.tsvit.model import TSViT
from deftcore.methods.tsvit.predicting import load_trained, outputs_of
from deftcore.methods.tsvit.reading import Reading
from deftcore.methods.tsvit.scene import Grid

rasterio = pytest.importorskip("rasterio")


@pytest.fixture
def place(tmp_path):
    """A model in a folder, and a scene of GeoTIFFs one corner of which no frame shows."""
    torch.manual_seed(0)
    small(num_classes=2).save_pretrained(tmp_path / "model")
    Reading(bands=("B03", "B02", "B08"), scale=1e-3, classes=("other", "wheat"), codes=((7,), (9,))).save(
        tmp_path / "model"
    )
    arrays = arrays_of()
    arrays["cloud"] = np.random.default_rng(1).random((5, 20, 17)) < 0.1
    arrays["cloud"][:, :3, :4] = True
    write_folder(
        tmp_path / "scene", arrays, ["2020-01", "2020-04", "2020-06", "2020-09", "2020-12"], names=["B02", "B03", "B08"]
    )
    return arrays


def seen(path):
    with rasterio.open(path) as raster:
        return raster.read(1), raster.profile, raster.tags(1), raster.colormap(1)


def test_a_map_is_what_the_model_says_of_each_pixel(place, tmp_path):
    """Tile by tile, averaged, in its place; on the scene's grid, with names; labels make metrics."""
    result = write_map(str(tmp_path / "model"), str(tmp_path / "scene"), str(tmp_path / "map.tif"), overlap=2)
    found, profile, tags, colours = seen(tmp_path / "map.tif")
    with rasterio.open(tmp_path / "scene" / "labels.tif") as labels:
        assert (profile["crs"], profile["transform"]) == (labels.crs, labels.transform)
    assert (profile["dtype"], profile["nodata"]) == ("uint8", 255)
    assert (tags["CLASS_0"], tags["CLASS_1"]) == ("other", "wheat")
    assert colours[0] != colours[1]
    assert (found[:3, :4] == 255).all()
    model = TSViT.from_pretrained(tmp_path / "model")
    x = torch.from_numpy(place["images"][:, [1, 0, 2]].astype(np.float32)) * 1e-3
    usable = torch.from_numpy(~place["cloud"])
    doy = torch.tensor([[15, 106, 167, 259, 350]])
    sums, count = torch.zeros(2, 20, 17), torch.zeros(20, 17)
    with torch.no_grad():
        for top in (0, 4, 8, 12, 14):
            for left in (0, 4, 8, 11):
                part = (..., slice(top, top + 6), slice(left, left + 6))
                patches = usable[part].unflatten(2, (3, 2)).unflatten(1, (3, 2)).all(4).all(2).flatten(1)
                sums[part] += model(x[part].unsqueeze(0), doy, patches.unsqueeze(0))[0]
                count[part[1:]] += 1
    margin = ((sums[0] - sums[1]) / count).abs().numpy() > 1e-5
    expected = np.where(usable.any(0), sums.argmax(0), 255)
    assert np.array_equal(found[margin], expected[margin])
    assert margin.mean() > 0.99
    known = (place["labels"] > 0) & (found != 255)
    right = (found == (place["labels"] == 9))[known].sum()
    assert sum(map(sum, result["metrics"]["counts"])) == known.sum()
    assert result["metrics"]["accuracy"] == pytest.approx(right / known.sum())
    assert result["pixels"] == {"other": int((found == 0).sum()), "wheat": int((found == 1).sum())}
    assert result["unseen"] == int((found == 255).sum()) >= 12
    assert {path.name for path in tmp_path.glob("map*")} == {"map.tif", "map.png", "map.confusion.png"}


def test_arrays_map_as_geotiffs_do(place, tmp_path):
    """Without a grid too; the batch of tiles makes no difference."""
    np.savez(tmp_path / "s.npz", **{**place, "doy": np.array([15, 106, 167, 259, 350])}, bands=["B02", "B03", "B08"])
    write_map(str(tmp_path / "model"), str(tmp_path / "scene"), str(tmp_path / "a.tif"), batch_size=1)
    del place["labels"]
    np.savez(tmp_path / "s.npz", **{**place, "doy": np.array([15, 106, 167, 259, 350])}, bands=["B02", "B03", "B08"])
    result = write_map(str(tmp_path / "model"), str(tmp_path / "s.npz"), str(tmp_path / "b.tif"), batch_size=7)
    (a, *_), (b, profile, *_) = seen(tmp_path / "a.tif"), seen(tmp_path / "b.tif")
    assert (a != b).mean() < 0.01
    assert profile["crs"] is None
    assert "metrics" not in result
    assert not (tmp_path / "b.confusion.png").exists()


def test_command(place, tmp_path, capsys):
    arguments = [str(tmp_path / "model"), str(tmp_path / "scene"), "--output", str(tmp_path / "m.tif")]
    assert main(["map", *arguments, "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["output"] == str(tmp_path / "m.tif")
    assert main(["map", *arguments]) == 0
    text = capsys.readouterr().out
    assert "wheat: " in text
    assert f"map: {tmp_path / 'm.tif'}" in text
    for change, message in (
        ({1: "nowhere"}, "no such file or folder: nowhere"),
        ({0: str(tmp_path / "scene")}, "is no folder of a model"),
        ({3: str(tmp_path / "m.png")}, "output: must be a file that ends in .tif"),
    ):
        changed = [change.get(i, each) for i, each in enumerate(arguments)]
        assert main(["map", *changed]) == 2
        assert message in capsys.readouterr().err
    assert main(["map", *arguments, "--overlap", "6"]) == 2
    assert "overlap: must be at least 0 and below the tiles' 6 pixels, got 6" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "head", "adapter", "outputs"),
    [
        ("lora", "head", "{r: 1, target_modules: all-linear, modules_to_save: [mixer, head]}", 1),
        ("bitfit", "token", "{modules_to_save: [class_tokens]}", 1),
        ("bottleneck", "extend", "{r: 2, target_modules: [fc2], modules_to_save: [class_tokens]}", 3),
        ("full", "head", "{}", 1),
    ],
)
def test_from_geotiffs_to_a_map(method, head, adapter, outputs, tmp_path, capsys):
    """By commands alone: the shipped recipe over a list of folders, a map of the run; every way to other classes."""
    small(num_classes=2).save_pretrained(tmp_path / "base")
    bands, codes = ["B02", "B03", "B08"], {"other": [7], "wheat": [9]} | ({"fallow": [0]} if outputs == 3 else {})
    for year in (2019, 2020):
        arrays = arrays_of(year, frames=2, height=12, width=12)
        arrays["cloud"] = np.random.default_rng(year).random((2, 12, 12)) < 0.1
        write_folder(tmp_path / str(year), arrays, [f"{year}-01", f"{year}-05-17"], names=bands)
    lines = [json.dumps({"series": str(year), "area": "a", "year": year}) for year in (2019, 2020)]
    (tmp_path / "scenes.jsonl").write_text("\n".join(lines))
    overrides = [
        f"model={tmp_path / 'base'}", f"data.train={tmp_path / 'scenes.jsonl'}", f"output={tmp_path / 'run'}",
        f"method={method}", f"adapter={adapter}", f"data.head={head}", f"data.bands={json.dumps(bands)}",
        f"data.classes={json.dumps(codes)}", "training.max_steps=2", "training.batch_size=2",
        "training.best_by=macro_f1",
    ]  # fmt: skip
    assert main(["train", RECIPE, *overrides, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert 0 <= result["macro_f1"] <= 1
    model, config, reading = load_trained(tmp_path / "run")
    assert outputs_of(config) == outputs
    assert reading.classes == tuple(codes)
    assert {name.partition(".")[0] for name, _ in model.named_parameters()} == (
        {"base_model"}
        if method != "full"
        else {name.partition(".")[0] for name, _ in small().named_parameters()} | {"mixer"}
    )
    output = tmp_path / "map.tif"
    assert (
        main(
            ["map", str(tmp_path / "run"), str(tmp_path / "2020"), "--output", str(output), "--overlap", "0", "--json"]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    metrics = json.loads((tmp_path / "run" / "evaluation" / "metrics.json").read_text())
    assert sum(map(sum, found["metrics"]["counts"])) <= sum(map(sum, metrics["counts"]))  # less what no frame shows
    if np.all(seen(output)[0] != 255):
        assert found["metrics"]["counts"] == metrics["counts"]


def test_a_map_is_no_frame(place, tmp_path, capsys):
    """Nothing is written into a scene's folder, by whatever way its path goes, and over no frame."""
    scene, model = tmp_path / "scene", str(tmp_path / "model")
    (tmp_path / "link").symlink_to(scene)
    before = {path: path.read_bytes() for path in scene.rglob("*") if path.is_file()}
    for output in (
        next(scene.glob("S2_*.tif")),
        scene / "map.tif",
        scene / "cloud" / "2020-01.tif",
        tmp_path / "link" / "labels.tif",
        tmp_path / "model" / ".." / "scene" / "new" / "map.tif",
    ):
        assert main(["map", model, str(scene), "--output", str(output)]) == 2
        assert "output (--output): must lie outside the scene's folder" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in scene.rglob("*") if path.is_file()} == before


def test_labels_that_the_model_does_not_know(place, tmp_path):
    """Are told before anything is predicted or written."""
    Reading(bands=("B03", "B02", "B08"), scale=1e-3, classes=("other", "wheat")).save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"labels: .*scene: must be classes from 0 to 1, got \[7, 9\]"):
        write_map(str(tmp_path / "model"), str(tmp_path / "scene"), str(tmp_path / "map.tif"))
    assert not list(tmp_path.glob("map*"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"images": np.ones((5, 3, 20, 4), np.uint16)}, "scene: .*s.npz is 20 x 4 pixels, smaller than the 6 that"),
        ({"crs": "EPSG:nonsense", "transform": np.array([10.0, 0, 0, 0, -10, 0])}, "crs: 'EPSG:nonsense' is no coord"),
        (
            {"crs": "EPSG:32631", "transform": np.array([np.nan, 0, 0, 0, -10, 0])},
            "transform: .*s.npz: must be six num",
        ),
    ],
)
def test_scenes_that_cannot_be_mapped(place, tmp_path, change, told):
    arrays = {"images": place["images"], "doy": place["doy"], "bands": ["B02", "B03", "B08"]}
    np.savez(tmp_path / "s.npz", **arrays | change)
    with pytest.raises(ValueError, match=told):
        write_map(str(tmp_path / "model"), str(tmp_path / "s.npz"), str(tmp_path / "map.tif"))
    assert not list(tmp_path.glob("*map*"))


def test_where_a_map_may_go(place, tmp_path):
    """A new folder is made; what is none, or a folder itself, is refused before anything is read."""
    model, scene, new = (str(tmp_path / each) for each in ("model", "scene", "new/maps/a.tif"))
    assert write_map(model, scene, new)["output"] == new
    assert seen(new)[0].shape == (20, 17)
    (tmp_path / "b.tif").mkdir()
    for output, told in (
        (tmp_path / "b.tif", "must be a file, .*b.tif is a folder"),
        (tmp_path / "new" / "maps" / "a.tif" / "c.tif", "must be a folder to write to, .*a.tif is a file"),
    ):
        with pytest.raises(ValueError, match=rf"output \(--output\): {told}"):
            write_map("nowhere", scene, str(output))


def test_a_map_that_fails_leaves_the_old_one(place, tmp_path, monkeypatch):
    (tmp_path / "map.tif").write_bytes(b"old")
    monkeypatch.setattr(TSViT, "forward", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_map(str(tmp_path / "model"), str(tmp_path / "scene"), str(tmp_path / "map.tif"))
    assert (tmp_path / "map.tif").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map.tif", "model", "scene"]


def test_many_classes_take_two_bytes(tmp_path):
    names = {i: f"c{i}" for i in range(300)}
    with writing_map(tmp_path / "m.tif", 3, 4, Grid("EPSG:32631", (10, 0, 5, 0, -10, 6)), names) as write:
        write(1, np.full((2, 4), 299))
        write(0, np.full((1, 4), 65535))
    with rasterio.open(tmp_path / "m.tif") as raster:
        assert raster.read(1).tolist() == [[65535] * 4, [299] * 4, [299] * 4]
        assert raster.nodata == 65535
        assert raster.tags(1)["CLASS_299"] == "c299"


def test_without_rasterio(place, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(ImportError, match=r"GeoTIFFs need rasterio: pip install 'deftcore\[maps\]'"):
        read_folder(tmp_path / "scene")
