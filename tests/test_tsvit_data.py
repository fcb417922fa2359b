"""Satellite series: from arrays and GeoTIFFs to windows, what is refused, splits, tiles, and the task on them."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import Stopped
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import deftcore
from deftcore.cli.main import main
from deftcore.methods.tsvit.losses import predicted_classes
from deftcore.methods.tsvit.predicting import load_trained
from deftcore.methods.tsvit.reading import Reading, statistics, usable_patches, windows
from deftcore.methods.tsvit.scene import UNLABELLED, day_of
from deftcore.methods.tsvit.series import read_scene, read_scenes, scene_of
from deftcore.methods.tsvit.splits import hold_out, leave_one_out
from deftcore.methods.tsvit.task import CropTask
from deftcore.methods.tsvit.tiling import mosaic, starts, tiles
from deftcore.training.recipe import load_recipe
from deftcore.training.run import train_recipe
from deftcore.training.task import Batches

RECIPE = "wheat-tsvit"


def arrays_of(seed=0, frames=5, channels=3, height=20, width=17, dtype=np.uint16):
    """A year of fields: two crops whose bands rise and fall at different times, codes 7 and 9, 0 between them."""
    draw = np.random.default_rng(seed)
    codes = draw.choice([0, 7, 9], (height // 4 + 1, width // 4 + 1), p=[0.1, 0.5, 0.4]).repeat(4, 0).repeat(4, 1)
    codes = codes[:height, :width]
    doy = np.linspace(20, 340, frames).astype(int)
    season = np.where(codes[None] == 7, np.cos(doy / 58)[:, None, None], np.sin(doy / 58)[:, None, None])
    images = 1000 + 800 * season[:, None] * np.arange(1, channels + 1)[:, None, None] / channels
    images = images + draw.normal(0, 20, (frames, channels, height, width))
    return {"images": images.clip(0).astype(dtype), "doy": doy, "labels": codes}


def write_folder(folder, arrays, dates, *, names=None, crs="EPSG:32631", nodata=None):
    """The same as GeoTIFFs."""
    import rasterio

    (folder / "cloud").mkdir(parents=True)
    place = {"crs": crs, "transform": rasterio.Affine(10, 0, 500000, 0, -10, 4600000), "driver": "GTiff"}

    def write(file, values, **more):
        count, height, width = values.shape
        with rasterio.open(
            file, "w", count=count, height=height, width=width, dtype=values.dtype, **place, **more
        ) as f:
            f.write(values)
            if names and count == len(names):
                f.descriptions = names

    for date, image, cloud in zip(dates, arrays["images"], arrays["cloud"], strict=True):
        write(folder / f"S2_{date}.tif", image, nodata=nodata)
        write(folder / "cloud" / f"{date}.tif", cloud[None].astype(np.uint8))
    write(folder / "labels.tif", arrays["labels"][None].astype(np.uint8), nodata=255)


# ---------------------------------------------------------------------------- series


def test_days():
    """Real dates, leap years among them; a month is its 15th."""
    assert [day_of(date) for date in ("2019-12-31", "2020-12-31", "2020-02-29", "2020-03")] == [365, 366, 60, 75]
    images = np.zeros((9, 1, 4, 4), np.uint16)
    wheat = scene_of({"images": images, "months": np.array([11, 12, 1, 2, 3, 4, 5, 6, 7])})  # of the Beqaa
    assert wheat.doy == (319, 349, 15, 46, 74, 105, 135, 166, 196)
    for unit, days in (("ns", (138, 169)), ("s", (138, 169)), ("D", (138, 169)), ("M", (136, 167))):  # as of xarray
        dates = np.array(["2020-05-17", "2020-06-17"], dtype="datetime64[D]").astype(f"datetime64[{unit}]")
        assert scene_of({"images": images[:2], "dates": dates}).doy == days
    with pytest.raises(ValueError, match=r"dates: series: must be a day as 2020-05-17 .* got 'NaT'"):
        scene_of({"images": images[:1], "dates": np.array(["NaT"], dtype="datetime64[ns]")})
    for date in ("2021-02-29", "2021-13", "17.5.2020", "2020"):
        with pytest.raises(ValueError, match="must be a day as 2020-05-17 or a month"):
            day_of(date)


def test_geotiffs_hold_what_arrays_hold(tmp_path):
    """Frame by frame in the order of dates, whatever the order of names; bands, clouds, nodata, labels, grid."""
    arrays = arrays_of()
    arrays["cloud"] = np.random.default_rng(1).random((5, 20, 17)) < 0.2
    arrays["images"][2, 1, 3, 4] = 9999
    arrays["labels"][5, 5] = 255
    dates = ["20200120", "2020-04", "2020-06-28", "2020-09-16", "2020-12-05"]
    write_folder(tmp_path, arrays, dates, names=["B02", "B03", "B08"], nodata=9999)
    scene = read_scene(tmp_path)
    assert (scene.doy, scene.bands) == ((20, 106, 180, 260, 340), ("B02", "B03", "B08"))
    assert (scene.height, scene.width, scene.nodata, scene.labelled) == (20, 17, 9999, True)
    assert scene.grid.transform == (10, 0, 500000, 0, -10, 4600000)
    assert 'ID["EPSG",32631]' in scene.grid.crs or '"EPSG","32631"' in scene.grid.crs
    whole = scene.read()
    usable = ~arrays["cloud"]
    usable[2, 3, 4] = False
    assert np.array_equal(whole.images, arrays["images"])
    assert np.array_equal(whole.usable, usable)
    assert np.array_equal(whole.labels, np.where(arrays["labels"] == 255, UNLABELLED, arrays["labels"]))
    part = scene.read(slice(2, 9), slice(3, 17), bands=["B08", 1])
    assert np.array_equal(part.images, arrays["images"][:, [2, 0], 2:9, 3:17])
    assert np.array_equal(part.usable, usable[:, 2:9, 3:17])
    np.savez(tmp_path / "same.npz", **arrays, bands=["B02", "B03", "B08"], nodata=9999)
    stored = read_scene(tmp_path / "same.npz").read(slice(2, 9), slice(3, 17), bands=["B08", 1])
    assert np.array_equal(stored.images, part.images)
    assert np.array_equal(stored.usable, part.usable)


def test_folders_that_are_refused(tmp_path):
    arrays = arrays_of(frames=2)
    arrays["cloud"] = np.zeros((2, 20, 17), bool)
    dates = ["2020-01", "2020-05-17"]

    def spoilt(change):
        folder = tmp_path / "scene"
        shutil.rmtree(folder, ignore_errors=True)
        write_folder(folder, arrays, dates)
        change(folder)
        return folder

    def other(folder):
        write_folder(folder / "x", {**arrays, "images": arrays["images"][:, :2]}, dates)
        shutil.move(folder / "x" / "S2_2020-01.tif", folder / "S2_2020-01.tif")

    def moved(folder):
        write_folder(folder / "x", arrays, dates, crs="EPSG:32632")
        shutil.move(folder / "x" / "labels.tif", folder / "labels.tif")

    for change, message in (
        (lambda f: (f / "S2_2020-01.tif").rename(f / "S2_first.tif"), "has no date in its name"),
        (lambda f: (f / "S2_2020-01.tif").rename(f / "S2_2020-13-01.tif"), "date in its name must be a day"),
        (lambda f: shutil.copy(f / "S2_2020-01.tif", f / "X_2020-01.tif"), "are of one date"),
        (lambda f: (f / "cloud" / "2020-01.tif").unlink(), "a file for each date of the frames"),
        (lambda f: (f / "S2_2020-01.tif").write_bytes(b"II*"), "is no raster that can be opened"),
        (other, "bands: .*has "),
        (moved, "lies on another grid"),
        (lambda f: [file.unlink() for file in f.glob("S2*")], "has no GeoTIFF with a date"),
    ):
        with pytest.raises(ValueError, match=message):
            read_scene(spoilt(change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"doy": np.array([20, 100, 180, 367, 340])}, "doy: .*days of the year are 1 to 366, got 367"),
        ({"doy": np.array([0, 100, 180, 300, 340])}, "days of the year are 1 to 366, got 0"),
        ({"months": np.arange(5)}, "must be one of dates, doy and months"),
        ({"doy": np.arange(1, 4)}, r"must be one of dates, doy and months, \[5\], got doy \(3,\)"),
        ({"doy": np.linspace(1, 300, 5)}, "must be whole numbers, got float64"),
        ({"clouds": np.zeros(5, bool)}, "no array 'clouds' is known; did you mean cloud?"),
        ({"cloud": np.zeros((5, 20, 18), bool)}, "cloud: .*must be true or false"),
        ({"cloud": np.zeros((5, 20, 17))}, "cloud: .*must be true or false"),
        ({"labels": np.zeros((20, 16), int)}, "labels: .*must be whole numbers"),
        ({"labels": np.zeros((20, 17))}, "labels: .*must be whole numbers .*got float64"),
        ({"bands": np.array(["B02"])}, "bands: .*must be 3 names"),
        ({"bands": np.array(["B02", "B03", "B02"])}, "bands: .*must be 3 names, each band its own"),
        ({"bands": np.array("B02")}, "bands: .*must be 3 names"),
        ({"nodata": np.zeros(3)}, r"nodata: .*must be one number, got float64 \(3,\)"),
        ({"nodata": "none"}, "nodata: .*must be one number"),
        ({"crs": "EPSG:32631"}, "transform: .*six numbers"),
        ({"crs": ["a", "b"], "transform": np.ones(6)}, "transform: .*six numbers, beside one crs"),
        ({"images": np.zeros((5, 3, 20))}, r"images: .*must be numbers \[T, C, H, W\]"),
        ({"images": np.zeros((0, 3, 20, 17))}, "images: .*must not be empty"),
    ],
)
def test_arrays_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        scene_of({**arrays_of(), **change})


def test_names_and_dates_may_be_bytes():
    arrays = {**arrays_of(), "bands": np.array([b"B02", b"B03", b"B04"])}
    arrays["dates"] = np.array([f"2020-0{i}-10".encode() for i in range(1, 6)])
    del arrays["doy"]
    scene = scene_of(arrays)
    assert scene.bands == ("B02", "B03", "B04")
    assert scene.doy[:2] == (10, 41)


def test_the_other_order_of_bytes():
    """As NetCDF has it, and PyTorch does not."""
    arrays = arrays_of()
    swapped = {name: value.astype(value.dtype.newbyteorder()) for name, value in arrays.items()}
    task = task_of(small(), codes=((0,), (7,), (9,)))
    for one, other in zip(*(windows(scene_of(a), task.reading, 6) for a in (arrays, swapped)), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_archive_whose_content_is_damaged(tmp_path):
    np.savez_compressed(tmp_path / "scene.npz", **arrays_of())
    data = bytearray((tmp_path / "scene.npz").read_bytes())
    data[60:100] = b"\xff" * 40
    (tmp_path / "scene.npz").write_bytes(data)
    with pytest.raises(ValueError, match=r"data: .*scene\.npz"):
        read_scene(tmp_path / "scene.npz")


@pytest.mark.parametrize("content", ["{", "[]"])
def test_an_adapter_that_is_damaged(tmp_path, content):
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"model: .*adapter_config\.json is damaged"):
        load_trained(tmp_path)


def test_nan_must_be_masked():
    arrays = arrays_of(dtype=np.float32)
    arrays["images"][1, 2, 3, 4] = np.nan
    arrays["images"][3, 0, 6, 6] = np.inf
    with pytest.raises(ValueError, match=r"has NaN or infinity at 2 pixels .* first in frame 1 at row 3, column 4"):
        scene_of(arrays).read()
    with pytest.raises(ValueError, match=r"at 1 pixels .* in frame 3 at row 6, column 6"):
        scene_of(arrays).read(slice(5, 9), slice(0, 9))
    scene_of(arrays).read(slice(8, 20))
    cloud = ~np.isfinite(arrays["images"]).all(1)
    window = scene_of({**arrays, "cloud": cloud}).read()
    assert np.array_equal(window.usable, ~cloud)
    x = Reading(scale=2.0).numbers(torch.from_numpy(window.images), torch.from_numpy(window.usable))
    assert x.isfinite().all()
    assert x[1, 2, 3, 4] == 0
    assert x[0, 0, 0, 0] == 2 * arrays["images"][0, 0, 0, 0]
    arrays["images"][3, 0, 6, 6] = np.nan
    assert np.array_equal(scene_of({**arrays, "nodata": np.nan}).read().usable, ~cloud)
    assert np.array_equal(scene_of(arrays).read(nodata=np.nan).usable, ~cloud)


def test_a_cloud_over_a_whole_frame():
    cloud = np.array([False, True, False, False, True])
    usable = scene_of({**arrays_of(), "cloud": cloud}).read().usable
    assert np.array_equal(usable, np.broadcast_to(~cloud[:, None, None], usable.shape))


def test_bands_by_name_and_number():
    scene = scene_of({**arrays_of(), "bands": np.array(["B02", "B03", "B8A"])})
    assert scene.picked(["B8A", 1]) == [2, 0]
    assert scene.picked([]) == [0, 1, 2]
    for bands, message in (
        (["B8B"], "has no band 'B8B'; did you mean B8A"),
        ([4], "has bands 1 to 3, got 4"),
        ([True], "has no band True; known: B02, B03, B8A"),
    ):
        with pytest.raises(ValueError, match=message):
            scene.picked(bands)
    with pytest.raises(ValueError, match=r"the model takes 10, got 2 .B03, B8A."):
        Reading(bands=("B03", "B8A")).check(scene, 10)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("bands", [True], "bands: must be a number or text, got True"),
        ("bands", "B02", "bands: must be a list, got 'B02'"),
        ("scale", 0, "scale: must be above 0, got 0"),
        ("scale", float("nan"), "scale: must be a finite number, got nan"),
        ("classes", ["a", "a"], "classes: each must have a name of its own"),
        ("codes", [[7]], "codes: must be those of 2 classes, got 1"),
        ("codes", [[7], 9], "codes: must be a list, got 9"),
        ("unlabelled", [0.5], "unlabelled: must be a whole number, got 0.5"),
        ("masked", "perhaps", "masked: must be true or false, got 'perhaps'"),
        ("mean", [1.0, 2.0], "std: must be as many as mean's 2, got 0"),
        ("std", [0.0], "std: must be above 0, got 0.0"),
        ("head", "tokens", "head: must be one of nothing, head, token, extend, got 'tokens'"),
        ("glasses", 1, "glasses: unknown"),
    ],
)
def test_a_reading_that_is_none(tmp_path, field, value, told):
    """By a file that somebody changed, and by a call."""
    reading = Reading(classes=("a", "b"), nodata=float("nan"))
    reading.save(tmp_path)
    assert repr(Reading.load(tmp_path)) == repr(reading)
    file = tmp_path / "series.json"
    values = json.loads(file.read_text()) | {field: value}
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"^model: {re.escape(str(file))} is damaged: .*{re.escape(told)}"):
        Reading.load(tmp_path)
    with pytest.raises(ValueError, match=field):
        Reading(**values)


def test_labels_become_classes():
    codes = np.array([[0, 7], [9, 8]])
    named = Reading(classes=("other", "wheat"), codes=((7, 8), (9,)))
    assert named.targets(codes).tolist() == [[UNLABELLED, 0], [1, 0]]
    numbered = Reading(classes=tuple("abcdefgh"), unlabelled=(9,))
    with pytest.raises(ValueError, match=r"must be classes from 0 to 7, got \[8\]"):
        numbered.targets(codes)
    assert numbered.targets(codes - np.array([[0, 0], [0, 1]])).tolist() == [[0, 7], [UNLABELLED, 7]]


def test_statistics_are_of_usable_pixels():
    scenes = []
    for seed in range(3):
        arrays = arrays_of(seed, frames=3 + seed)
        arrays["cloud"] = np.random.default_rng(seed).random(arrays["images"][:, 0].shape) < 0.3
        scenes.append(scene_of(arrays))
    mean, std = statistics(scenes, Reading(scale=1e-4))
    values = [s.read().images.swapaxes(0, 1)[:, s.read().usable] for s in scenes]
    together = np.concatenate(values, 1).astype(np.float64) * 1e-4
    np.testing.assert_allclose(mean, together.mean(1), rtol=1e-12)
    np.testing.assert_allclose(std, together.std(1), rtol=1e-12)
    images = np.zeros((1, 2, 4, 4))
    for cloud, message in ((True, "no pixel of the scenes is usable"), (False, "band 1 is the same everywhere")):
        scene = scene_of({"images": images, "doy": np.array([3]), "cloud": np.array([cloud])})
        with pytest.raises(ValueError, match=message):
            statistics([scene], Reading())


def test_usable_patches():
    """In the order of the model's patches, row by row; a patch needs all of its pixels."""
    usable = torch.ones(2, 6, 9, dtype=torch.bool)
    usable[0, 4, 7] = False
    assert usable_patches(usable, 3).tolist() == [[True] * 5 + [False], [True] * 6]


# ---------------------------------------------------------------------------- windows, tiles, splits


def test_windows_share_and_cover():
    arrays = arrays_of()
    reading = Reading(classes=("a", "b"), codes=((7,), (9,)))
    scene = scene_of(arrays)
    found = windows(scene, reading, 6)
    assert len(found) == 4 * 3
    assert {each["images"].untyped_storage().data_ptr() for each in found} == {
        found[0]["images"].untyped_storage().data_ptr()
    }
    assert found[0]["images"].data_ptr() == arrays["images"].ctypes.data  # all bands in their order: no copy
    assert torch.equal(found[4]["images"], torch.from_numpy(arrays["images"][:, :, 6:12, 6:12]))
    assert torch.equal(found[-1]["labels"], torch.from_numpy(reading.targets(arrays["labels"])[14:, 11:]))
    once = windows(scene, reading, 6, once=True)
    labelled = sum(int((each["labels"] != UNLABELLED).sum()) for each in once)
    assert labelled == int((reading.targets(arrays["labels"]) != UNLABELLED).sum())
    assert sum(int((each["labels"] != UNLABELLED).sum()) for each in found) > labelled
    with pytest.raises(ValueError, match="is 20 x 17 pixels, smaller than windows of 18"):
        windows(scene, reading, 18)
    with pytest.raises(ValueError, match="labels: series has none"):
        windows(scene_of({name: arrays[name] for name in ("images", "doy")}), reading, 6)


@given(st.data())
def test_tiles_cover_every_pixel(data):
    height, width, size = (data.draw(st.integers(1, 40)) for _ in range(3))
    overlap = data.draw(st.integers(0, 12))
    if size > min(height, width) or overlap >= size:
        with pytest.raises(ValueError, match=r"size|overlap"):
            tiles(height, width, size, overlap)
        return
    seen = np.zeros((height, width), int)
    for top, left in tiles(height, width, size, overlap):
        assert seen[top : top + size, left : left + size].shape == (size, size)
        seen[top : top + size, left : left + size] += 1
    assert seen.all()
    if not overlap and height % size == width % size == 0:
        assert seen.max() == 1


@pytest.mark.parametrize(
    ("height", "width", "size", "overlap"), [(20, 17, 6, 0), (20, 17, 6, 4), (7, 9, 7, 6), (24, 24, 6, 2), (5, 5, 5, 0)]
)
def test_reassembly(height, width, size, overlap):
    """Tiles of one picture give the picture, bit for bit, each row once and in its place; where tiles differ, the mean
    of all that saw a pixel."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    picture = torch.stack([rows, columns]).float()
    noise = torch.randn(len(starts(height, size, overlap)), len(starts(width, size, overlap)), 1, 1, 1).double()

    def assemble(tile):
        parts = list(
            mosaic(lambda top, lefts: torch.stack([tile(top, left) for left in lefts]), height, width, size, overlap)
        )
        assert [top for top, _ in parts] == np.cumsum([0, *(part.shape[1] for _, part in parts[:-1])]).tolist()
        assert all(part.shape[1] <= size for _, part in parts)
        return torch.cat([part for _, part in parts], 1)

    assert torch.equal(assemble(lambda top, left: picture[:, top : top + size, left : left + size]), picture)
    sums, seen = torch.zeros(2, height, width).double(), torch.zeros(height, width).double()
    tops, lefts = starts(height, size, overlap), starts(width, size, overlap)

    def noisy(top, left):
        return picture[:, top : top + size, left : left + size] + noise[tops.index(top), lefts.index(left)]

    for top, left in tiles(height, width, size, overlap):
        sums[:, top : top + size, left : left + size] += noisy(top, left)
        seen[top : top + size, left : left + size] += 1
    torch.testing.assert_close(assemble(noisy).double(), sums / seen, rtol=1e-6, atol=1e-5)


def write_list(folder, years=(2018, 2019, 2020), areas=("north", "south"), **sizes):
    """Scenes of years and areas, as a list."""
    lines = []
    for i, (year, area) in enumerate((y, a) for y in years for a in areas):
        np.savez(folder / f"{i}.npz", **arrays_of(i, frames=5 + i % 2, **sizes))
        lines.append({"series": f"{i}.npz", "year": year, "area": area})
    (folder / "scenes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "scenes.jsonl"


def test_years_and_areas_are_held_out(tmp_path):
    scenes = read_scenes(write_list(tmp_path))
    found = list(leave_one_out(scenes, "year"))
    assert [value for value, _, _ in found] == [2018, 2019, 2020]
    for value, train, test in found:
        assert {scene.year for scene in test} == {value}
        assert value not in {scene.year for scene in train}
        assert [*train, *test] == sorted(scenes, key=lambda scene: scene.year == value)
    assert [value for value, _, _ in leave_one_out(scenes, "area")] == ["north", "south"]
    assert [(len(a), len(b)) for _, a, b in leave_one_out(scenes, "area")] == [(3, 3)] * 2
    with pytest.raises(ValueError, match=r"year: must be one of several that the scenes have, \[2018, .*got 2021"):
        hold_out(scenes, "year", 2021)
    with pytest.raises(ValueError, match="year: must be one of several"):
        hold_out(scenes[:2], "year", 2018)
    (tmp_path / "scenes.jsonl").write_text('{"series": "0.npz"}\n{"series": "1.npz", "year": 2019}\n')
    with pytest.raises(ValueError, match=r"every scene must say its year in the list, .*0.npz does not"):
        hold_out(read_scenes(tmp_path / "scenes.jsonl"), "year", 2019)


def test_lists_and_files_that_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", **arrays_of())
    (tmp_path / "bad.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:500])
    for name, text, message in (
        ("a.jsonl", '{"series": "a.npz", "yaer": 3}\n', "a.jsonl:1: no field 'yaer'; did you mean year"),
        ("a.jsonl", '{"series": "a.npz"}\n{"year": 2020}\n', "a.jsonl:2: must be a path `series`"),
        ("a.jsonl", '{"series": "a.npz", "year": "2020"}\n', "a.jsonl:1: must be a path"),
        ("a.jsonl", '{"series": "bad.npz"}\n', "bad.npz is no .npz of plain arrays"),
        ("a.txt", "", "must be an .npz or a folder of GeoTIFFs, or to train on a list"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            read_scenes(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*b.npz"):
        read_scenes(tmp_path / "b.npz")


# ---------------------------------------------------------------------------- the task


def small(**changes):
    sizes = {"num_classes": 3, "image_size": 6, "patch_size": 2, "channels": 3, "dim": 16, "heads": 2, "dim_head": 8}
    return deftcore.TSViT(**sizes | {"temporal_depth": 1, "spatial_depth": 1} | changes)


def task_of(model, **reading):
    return CropTask(model, Reading(classes=("a", "b", "c"), **reading))


def test_batches_pad_and_mask():
    """Frames that a scene has not, and patches under clouds, do not show in the logits."""
    torch.manual_seed(1)
    model = small().eval()
    task = task_of(model, codes=((0,), (7,), (9,)))
    cloudy = arrays_of(1, frames=3)
    cloudy["cloud"] = np.random.default_rng(5).random((3, 20, 17)) < 0.05
    short, long = (windows(scene_of(arrays), task.reading, 6) for arrays in (cloudy, arrays_of(2, frames=7)))
    batch = task.collate([short[0], long[0]])
    assert batch["x"].shape == (2, 7, 3, 6, 6)
    assert batch["doy"][0].tolist() == [20, 180, 340, 0, 0, 0, 0]
    alone = task.output(model, task.collate([short[0]])).logits
    torch.testing.assert_close(task.output(model, batch).logits[:1], alone)
    changed = dict(short[0], images=torch.where(short[0]["usable"][:, None], short[0]["images"].float(), 5e4))
    assert not short[0]["usable"].all()
    patches = usable_patches(short[0]["usable"], 2)
    assert patches.any()
    torch.testing.assert_close(task.output(model, task.collate([changed])).logits, alone)
    open_sky = task_of(model, codes=((0,), (7,), (9,)), masked=False)
    assert not torch.allclose(open_sky.output(model, open_sky.collate([changed])).logits, alone)


def test_unmasked_series_are_the_same_beside_longer_ones():
    torch.manual_seed(1)
    model = small().eval()
    task = task_of(model, codes=((0,), (7,), (9,)), masked=False)
    short, long = (windows(scene_of(arrays_of(1, frames=n)), task.reading, 6)[0] for n in (3, 7))
    alone = task.output(model, task.collate([short])).logits
    torch.testing.assert_close(task.output(model, task.collate([short, long])).logits[:1], alone)


def test_a_batch_without_labels_has_no_gradient():
    model = small()
    task = task_of(model, codes=((0,), (7,), (9,)))
    (example, *_) = windows(scene_of(arrays_of()), task.reading, 6)
    batch = task.collate([dict(example, labels=torch.full((6, 6), UNLABELLED))])
    loss = task.output(model, batch).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert task.predictions(batch) == 0


def test_one_logit_is_of_the_second_class():
    logits = torch.tensor([[[[0.1, -0.1], [0.6, 0.0]]]])
    assert predicted_classes(logits).tolist() == [[[1, 0], [1, 0]]]
    model = small(num_classes=1)
    task = CropTask(model, Reading(classes=("other", "wheat"), codes=((7,), (9,))))
    batch = task.collate(windows(scene_of(arrays_of()), task.reading, 6)[:3])
    output = task.output(model, batch)
    known = batch["labels"] != UNLABELLED
    wheat = (batch["labels"] == 1)[known].float()
    p = output.logits[:, 0][known].sigmoid()
    torch.testing.assert_close(output.loss, -(wheat * p.log() + (1 - wheat) * (1 - p).log()).mean())
    assert task.metric_names == ("accuracy", "mean_iou", "macro_f1", "f1", "iou")


def test_metrics_are_of_pooled_counts():
    """However examples are batched; F1 as its definition has it, and one that is not defined is NaN."""
    torch.manual_seed(3)
    model = small(num_classes=2).eval()
    task = CropTask(model, Reading(classes=("other", "wheat"), codes=((7,), (9,))))
    examples = windows(scene_of(arrays_of()), task.reading, 6, once=True)
    found = []
    for size in (1, 3, 5, len(examples)):
        counts = torch.zeros(2, 2, dtype=torch.int64)
        for batch in Batches(examples, size, task.collate, shuffle=False).epoch(0):
            counts += task.counts(batch, task.output(model, batch))
        found.append(counts)
    assert all(torch.equal(counts, found[0]) for counts in found)
    (_, fp), (fn, tp) = found[0].tolist()
    metrics = task.metrics(found[0])
    assert metrics["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert metrics["iou"] == pytest.approx(tp / (tp + fp + fn))
    assert np.isnan(task.metrics(torch.tensor([[5, 0], [0, 0]]))["f1"])


def test_mirrors_go_with_pixels():
    """Images, masks and labels alike; drawn from the generator alone, and never in evaluations."""
    model = small()
    task = task_of(model, codes=((0,), (7,), (9,)))
    task.flips = True
    (example, *_) = windows(scene_of({**arrays_of(), "cloud": np.random.rand(5, 20, 17) < 0.3}), task.reading, 6)
    seen = set()
    for seed in range(12):
        drawn = task.draw(example, torch.Generator().manual_seed(seed), True)
        again = task.draw(example, torch.Generator().manual_seed(seed), True)
        assert all(torch.equal(drawn[name], again[name]) for name in example)
        sides = next(
            s
            for s in ((), (0,), (1,), (0, 1))
            if torch.equal(example["labels"].flip(s) if s else example["labels"], drawn["labels"])
        )
        seen.add(sides)
        moved = [side - 2 for side in sides]
        for name in ("images", "usable"):
            assert np.array_equal(
                drawn[name].numpy(), np.flip(example[name].numpy(), moved) if moved else example[name].numpy()
            )
        assert torch.equal(drawn["doy"], example["doy"])
    assert len(seen) == 4
    assert task.draw(example, torch.Generator(), False) is example


# ---------------------------------------------------------------------------- recipes


@pytest.fixture
def recipe(tmp_path):
    """The shipped one over small scenes of two years, four steps; the base was trained on other classes."""
    small(num_classes=4).save_pretrained(tmp_path / "base")
    scenes = write_list(tmp_path, years=(2019, 2020), areas=("north",), height=12, width=14)
    fixed = [
        f"model={tmp_path / 'base'}", f"data.train={scenes}", "data.held_out_year=2020", "data.bands=[]",
        "data.classes={other: [7], wheat: [9]}", "training.max_steps=4", "training.batch_size=3", "device=cpu",
        "training.log_every=1", "training.save_every=2", "training.eval_every=2",
    ]  # fmt: skip
    return lambda name, *more: load_recipe(RECIPE, [*fixed, f"output={tmp_path / name}", *more])


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_recipe_from_end_to_end(recipe, tmp_path, stopping):
    """Trains, measures, draws; interrupted it ends with the same bits."""
    result = train_recipe(recipe("whole"))
    assert 0 <= result.accuracy <= 1
    assert result.f1 == pytest.approx(log_of(tmp_path / "whole")[-1]["eval_f1"])
    for name in ("confusion.png", "map.png", "metrics.json"):
        assert (tmp_path / "whole" / "evaluation" / name).stat().st_size
    pixels = sum(map(sum, json.loads((tmp_path / "whole" / "evaluation" / "metrics.json").read_text())["counts"]))
    held = np.load(tmp_path / "1.npz")["labels"]
    assert pixels == int((held > 0).sum())  # each once, though windows of 6 overlap in 14 columns
    stopping()
    with pytest.raises(Stopped):
        train_recipe(recipe("parts"))
    assert train_recipe(recipe("parts")).train_loss == result.train_loss
    a, b = (load_file(tmp_path / name / "final" / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [line["loss"] for line in log_of(tmp_path / "parts") if "loss" in line] == [
        line["loss"] for line in log_of(tmp_path / "whole") if "loss" in line
    ]


FIVE = "data.classes={a: [7], b: [9], c: [1], d: [2], e: [3]}"  # of a base of four


@pytest.mark.parametrize(
    ("change", "rows", "kept"),
    [
        (["data.head=token"], 1, 0),
        (["data.head=extend", FIVE, "adapter={tokens: 1}"], 1, 4),
        (["data.head=extend", FIVE, "adapter={tokens: 2}"], 2, 3),
        (["data.head=extend", FIVE], 5, 0),
    ],
)
def test_new_tokens_alone_train(recipe, tmp_path, stopping, change, rows, kept):
    """By a recipe, interrupted too; the adapter holds all that is new, so that a merged folder has the trained tokens
    behind those of the base."""
    more = ["method=tsvit-tokens", "adapter={}", "training.best_by=macro_f1", *change]
    train_recipe(recipe("whole", *more))
    stopping()
    with pytest.raises(Stopped):
        train_recipe(recipe("parts", *more))
    train_recipe(recipe("parts", *more))
    (whole,), (parts,) = (
        load_file(tmp_path / run / "final" / "adapter_model.safetensors").values() for run in ("whole", "parts")
    )
    assert len(whole) == rows
    assert torch.equal(whole, parts)
    base, final, merged = (str(tmp_path / each) for each in ("base", "whole/final", "merged"))
    assert main(["export", base, merged, "--adapter", final]) == 0
    tokens = deftcore.TSViT.from_pretrained(merged).class_tokens.weight
    assert torch.equal(tokens, torch.cat([deftcore.TSViT.from_pretrained(base).class_tokens.weight[:kept], whole]))


def test_nan_may_stand_for_no_data(recipe, tmp_path, stopping):
    """Of files that do not say so; a run that is continued is the same though NaN is not NaN."""
    for i in range(2):
        with np.load(tmp_path / f"{i}.npz") as stored:
            arrays = dict(stored)
        arrays["images"] = arrays["images"].astype(np.float32)
        arrays["images"][0, :, :3] = np.nan
        np.savez(tmp_path / f"{i}.npz", **arrays)
    with pytest.raises(ValueError, match=r"has NaN or infinity .* give `cloud`, or nodata"):
        train_recipe(recipe("run"))
    stopping()
    with pytest.raises(Stopped):
        train_recipe(recipe("run", "data.nodata=nan"))
    assert train_recipe(recipe("run", "data.nodata=nan")).steps == 4
    assert np.isnan(load_trained(tmp_path / "run")[2].nodata)


def test_draws_go_on_where_they_stopped(recipe, tmp_path, stopping):
    """Of two projections each call draws one: an interrupted run draws what a whole one does."""
    options = "{r: 2, parallel: true, stochastic: true, target_modules: [mlp], modules_to_save: [mixer]}"
    more = ["method=bottleneck", f"adapter={options}", "training.gradient_checkpointing=true"]
    train_recipe(recipe("whole", *more))
    stopping()
    with pytest.raises(Stopped):
        train_recipe(recipe("parts", *more))
    torch.manual_seed(99)
    train_recipe(recipe("parts", *more))
    whole, parts = (load_file(tmp_path / run / "final" / "adapter_model.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["data.head="], "data.classes: the model has 4 outputs, the data 2 classes; data.head .head, token, extend."),
        (["data.head=token", "adapter={target_modules: all-linear}"], r"adapter.modules_to_save=\['class_tokens'\]"),
        # An adapter on a layer that is new and frozen: another run's would be random in another way.
        (["adapter={target_modules: all-linear}"], r"adapter.modules_to_save=\['mixer'\]"),
        (["method=bitfit", "adapter={}"], r"adapter.modules_to_save=\['mixer'\]"),
        (
            [
                "method=tsvit-tokens",
                "data.head=extend",
                FIVE.replace("}", ", f: [0]}"),
                "adapter={tokens: 1}",
                "training.best_by=accuracy",
            ],
            "adapter.tokens: must be at least 2, the new tokens of data.head extend, or empty for all, got 1",
        ),
        (["method=tsvit-tokens", "adapter={}"], r"adapter.modules_to_save=\['mixer'\]"),
        (["method=qlora"], "are not kept in 4 bits"),
        (["method=prompt", "adapter={}"], "adapter: model: must be a language model of Transformers, got TSViT"),
        (["method=prefix", "adapter={}"], "adapter: model: must be a language model of Transformers, got TSViT"),
        (
            ["method=ba-lora", "adapter={target_modules: [qkv]}"],
            "adapter: model: TSViT takes no labels",
        ),
        ([f"model={__file__}"], r"model: must be a folder, .* is a file; .*load_published\(FILE\)\.save_p"),
        (["data.bands=[1, 2]"], "bands: .*0.npz: the model takes 3, got 2 .1, 2."),
        (["data.bands=[B02]"], "has no band 'B02'"),
        (
            ["data.classes={other: [7], wheat: [7]}"],
            "data.classes: must be two or more, with codes that are no other's",
        ),
        (["data.classes={other: [1], wheat: [2]}"], "no pixel has a label of other, wheat"),
        (["data.unlabelled=[0]"], "data.unlabelled: is for data without classes"),
        (["data.mean=[1, 2, 3]"], "data.mean: mean and std must be given both"),
        (["data.held_out_area=north"], "data.validation, held_out_year, held_out_area: must be one of them alone, got"),
        (["data.held_out_year=2021"], "year: must be one of several"),
        (["data.overlap=6"], "overlap: must be at least 0 and below the tiles' 6 pixels"),
    ],
)
def test_what_a_recipe_is_refused_for(recipe, change, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train_recipe(recipe("refused", *change))
    assert not (tmp_path / "refused").exists()


def test_pre_training_then_adapting(recipe, tmp_path):
    """All weights on one area; the model that it gives knows its bands and classes, and an adapter keeps them."""
    all_weights = ("method=full", "adapter={}", "data.head=")
    four = "data.classes={a: [7], b: [9], c: [1], d: [2]}"
    train_recipe(recipe("pre", *all_weights, four, "training.best_by=macro_f1"))
    pre = deftcore.TSViT.from_pretrained(tmp_path / "pre" / "final")
    stored = Reading.load(tmp_path / "pre" / "final")
    assert stored.classes == ("a", "b", "c", "d")
    mean, std = statistics([read_scene(tmp_path / "0.npz")], Reading())
    torch.testing.assert_close(pre.band_mean, torch.tensor(mean))
    torch.testing.assert_close(pre.band_std, torch.tensor(std))
    train_recipe(recipe("run", f"model={tmp_path / 'pre' / 'final'}"))
    model, config, reading = load_trained(tmp_path / "run")
    assert (config.mixed_classes, reading.classes, reading.head) == (1, ("other", "wheat"), "head")
    assert torch.equal(model.band_mean, pre.band_mean)
    batch = CropTask(pre, reading).collate(windows(read_scene(tmp_path / "1.npz"), reading, 6)[:2])
    with torch.no_grad():
        logits = model(batch["x"], batch["doy"])
    assert logits.shape == (2, 1, 6, 6)
    again, *_ = load_trained(tmp_path / "run" / "final")
    assert torch.equal(again(batch["x"], batch["doy"]), logits)
    final = str(tmp_path / "run" / "final")
    assert main(["export", str(tmp_path / "pre" / "final"), str(tmp_path / "merged"), "--adapter", final]) == 0
    merged, merged_config, merged_reading = load_trained(tmp_path / "merged")
    assert type(merged) is deftcore.TSViT
    assert merged_config == config
    torch.testing.assert_close(merged(batch["x"], batch["doy"]), logits, rtol=1e-5, atol=1e-5)
    assert merged_reading.codes == ((7,), (9,))
    (tmp_path / "pre").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"is an adapter on the model in .*pre/final', which is not there"):
        load_trained(tmp_path / "run")


def test_endings_in_capitals_and_a_frame_that_is_cut_off(tmp_path):
    """Endings however they are spelt; what is damaged is named."""
    dates = [f"2020-0{i}-10" for i in range(1, 6)]
    cloud = np.zeros((5, 20, 17), bool)
    cloud[1, 4:9] = True
    write_folder(tmp_path, {**arrays_of(), "cloud": cloud}, dates)
    before = read_scene(tmp_path).read()
    for file in (tmp_path / f"S2_{dates[1]}.tif", tmp_path / "labels.tif", tmp_path / "cloud" / f"{dates[1]}.tif"):
        file.replace(file.with_suffix(".TIF"))
    after = read_scene(tmp_path).read()
    assert np.array_equal(after.images, before.images)
    assert np.array_equal(after.labels, before.labels)
    assert np.array_equal(after.usable, before.usable)
    file = tmp_path / f"S2_{dates[2]}.tif"
    file.write_bytes(file.read_bytes()[:-1500])
    with pytest.raises(ValueError, match=rf"data: .*{file.name} "):
        read_scene(tmp_path).read()
