"""Clouds from files, and what a model sees of them."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from point_clouds import SHAPES, shape, write_arrays, write_folders

from deftcore.methods.point_peft import formats
from deftcore.methods.point_peft.augment import augment, choose_points
from deftcore.methods.point_peft.data import class_names, farthest_first, has_test, read_clouds, unit_ball

CLOUD = shape("ball", 20, np.random.default_rng(0))
CUBE = """OFF
8 6 0
0 0 0
1 0 0
1 1 0
0 1 0
0 0 1
1 0 1
1 1 1
0 1 1
4 0 1 2 3
4 4 5 6 7
4 0 1 5 4
4 2 3 7 6
4 0 3 7 4
4 1 2 6 5
"""


def as_ply(points):
    header = f"ply\nformat ascii 1.0\nelement vertex {len(points)}\n"
    header += "".join(f"property float {axis}\n" for axis in "xyz") + "end_header\n"
    return header + "".join(f"{x} {y} {z}\n" for x, y, z in points.tolist())


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.npy", lambda path: np.save(path, CLOUD)),
        ("a.txt", lambda path: np.savetxt(path, CLOUD, delimiter=",")),
        ("a.xyz", lambda path: np.savetxt(path, np.c_[CLOUD, CLOUD], header="x y z and normals")),
        ("a.pts", lambda path: path.write_text(f"{len(CLOUD)}\n" + "\n".join(" ".join(map(str, p)) for p in CLOUD))),
        ("a.PLY", lambda path: path.write_text(as_ply(CLOUD))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_points_of_a_file_are_taken_as_they_are(tmp_path, name, write):
    write(tmp_path / name)
    np.testing.assert_allclose(formats.read_cloud(tmp_path / name, 7), CLOUD, rtol=1e-6)


@pytest.mark.parametrize("text", [CUBE, CUBE.replace("OFF\n", "OFF")], ids=["", "as ModelNet's"])
def test_a_mesh_is_sampled_on_its_surface(tmp_path, text):
    """Always the same points, spread over all six sides."""
    (tmp_path / "cube.off").write_text(text)
    points = formats.read_cloud(tmp_path / "cube.off", 600)
    assert points.shape == (600, 3)
    on_side = np.isclose(points, 0) | np.isclose(points, 1)
    assert on_side.any(1).all()
    sides = [np.isclose(points[:, axis], end).mean() for axis in range(3) for end in (0, 1)]
    assert min(sides) > 0.1
    assert np.array_equal(points, formats.read_cloud(tmp_path / "cube.off", 600))


def test_arrays_and_folders_say_the_same(tmp_path):
    rng = np.random.default_rng(3)
    clouds = {kind: [shape(kind, 30, rng) for _ in range(3)] for kind in SHAPES}
    for kind, each in clouds.items():
        for i, cloud in enumerate(each):
            folder = tmp_path / "folders" / ("test" if i == 2 else "train") / kind
            folder.mkdir(parents=True, exist_ok=True)
            np.save(folder / f"{i}.npy", cloud)
    points = np.stack([cloud for each in clouds.values() for cloud in each])
    labels = np.repeat(np.arange(3), 3)
    words = np.tile(["train", "train", "test"], 3)
    np.savez(tmp_path / "a.npz", points=points, label=labels, classes=np.array(SHAPES), split=words)
    np.savez(
        tmp_path / "b.npz", data=points, labels=labels[:, None], class_names=np.array(SHAPES), is_test=words == "test"
    )
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["data"], file["label"], file["is_test"] = points, labels, words == "test"
        file["classes"] = [kind.encode() for kind in SHAPES]
    places = [tmp_path / name for name in ("folders", "a.npz", "b.npz", "c.h5")]
    for part, count in (("train", 6), ("test", 3)):
        found = [read_clouds(place, part) for place in places]
        for each in found:
            assert each.classes == list(SHAPES)
            assert each.labels == found[0].labels
            assert len(each.points) == len(each.places) == count
            assert all(np.array_equal(a, b) for a, b in zip(each.points, found[0].points, strict=True))
    for place in places:
        assert has_test(place)
        assert class_names(place) == list(SHAPES)


def test_a_set_that_is_not_divided_is_read_whole(tmp_path):
    np.save(tmp_path / "many.npy", np.stack([CLOUD, CLOUD]))
    found = read_clouds(tmp_path / "many.npy", "test")
    assert (len(found.points), found.labels, found.classes) == (2, None, [])
    assert not has_test(tmp_path / "many.npy")
    np.savez(tmp_path / "numbers.npz", points=np.stack([CLOUD] * 3), labels=[2, 0, 2])
    assert read_clouds(tmp_path / "numbers.npz").classes == ["0", "1", "2"]
    write_folders(tmp_path / "divided")
    assert len(read_clouds(tmp_path / "divided").points) == 9
    (tmp_path / "flat").mkdir()
    np.save(tmp_path / "flat" / "a.npy", CLOUD)
    assert read_clouds(tmp_path / "flat").labels is None


BAD = {
    "nan.npy": (lambda path: np.save(path, np.where(np.arange(60).reshape(20, 3) == 16, np.nan, CLOUD)),
                r"nan\.npy: point 5 is not finite"),
    "wide.npy": (lambda path: np.save(path, np.zeros((5, 4))),
                 r"wide\.npy: points must be numbers \[N, 3\], got .* \[5, 4\]"),
    "none.txt": (lambda path: path.write_text("# nothing\n"), r"none\.txt has no points"),
    "words.txt": (lambda path: path.write_text("1 2 3\n1 two 3\n"), r"words\.txt cannot be read: .*'two'"),
    "short.xyz": (lambda path: path.write_text("1 2\n"), r"short\.xyz cannot be read: "),
    "torn.off": (lambda path: path.write_text("OFF\n8 6 0\n0 0 0\n"), r"torn\.off cannot be read: "),
    "flat.off": (lambda path: path.write_text("OFF\n3 1 0\n0 0 0\n1 0 0\n2 0 0\n3 0 1 2\n"),
                 r"flat\.off cannot be read: the mesh has no surface"),
    "torn.npy": (lambda path: path.write_bytes(b"\x93NUMPY"), r"torn\.npy cannot be read: "),
    "objects.npy": (lambda path: np.save(path, np.array([{}, 1]), allow_pickle=True), r"objects\.npy cannot be read: "),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_files_that_hold_no_cloud(tmp_path, name):
    write, message = BAD[name]
    write(tmp_path / name)
    with pytest.raises(ValueError, match=f"data: .*{message}"):
        formats.read_cloud(tmp_path / name, 10)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": [0, 1]}, "has no array `points`; it has labels"),
        ({"points": np.zeros((2, 5))}, r"`points` must be numbers \[M, N, 3\], got float64 \[2, 5\]"),
        ({"points": np.zeros((2, 0, 3))}, "cloud 0 has no points"),
        ({"points": np.full((2, 4, 3), np.inf)}, "cloud 0: point 0 is not finite"),
        ({"labels": [0]}, r"`labels` must be \[2\], one of each cloud, got \[1\]"),
        ({"labels": [0.0, 1.0]}, "`labels` must be whole numbers, got float64"),
        ({"labels": [0, 2], "classes": ["a", "b"]}, "`labels` must be from 0 to 1, got 2 for cloud 1"),
        ({"labels": [0, -1]}, "`labels` must be from 0 to 0, got -1 for cloud 1"),
        ({"split": ["train", "later"]}, "`split` must be train or test, got 'later'"),
        ({"is_test": [1, 1]}, "has no clouds to train on"),
        ({"is_test": ["False", "True"]}, "`is_test` must be true or false, got <U5"),
        ({"is_test": [0, 2]}, "`is_test` must be true or false, got int64"),
        ({"labels": [0, 1], "classes": ["a", "a"]}, "`classes` must be names, each class its own"),
        ({"points": np.float32(3), "labels": [0]}, r"`points` must be numbers \[M, N, 3\], got float32 \[\]"),
    ],
)
def test_arrays_that_are_no_set(tmp_path, arrays, message):
    if list(arrays) != ["labels"] or "no array" not in message:
        arrays = {"points": np.zeros((2, 4, 3)), **arrays}
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(ValueError, match=r"data: .*set\.npz.*" + message):
        read_clouds(tmp_path / "set.npz")


@pytest.mark.parametrize("content", ["nothing", "an archive"])
def test_an_array_file_that_is_none(tmp_path, content):
    file = tmp_path / "set.npy"
    file.write_bytes(b"")
    if content == "an archive":
        np.savez(tmp_path / "set.npz", points=np.zeros((2, 4, 3)))
        (tmp_path / "set.npz").replace(file)
    with pytest.raises(ValueError, match=r"data: .*set\.npy"):
        read_clouds(file)


def test_names_may_be_bytes(tmp_path):
    """As HDF5 and C have them."""
    points, split = np.zeros((2, 4, 3)), np.array([b"train", b"test"])
    np.savez(tmp_path / "set.npz", points=points, labels=[0, 1], classes=np.array([b"cup", b"bowl"]), split=split)
    assert class_names(tmp_path / "set.npz") == ["cup", "bowl"]
    assert read_clouds(tmp_path / "set.npz", "test").labels == [1]


def test_folders_that_are_no_set(tmp_path):
    for function in (class_names, has_test):
        with pytest.raises(FileNotFoundError, match="data: no such file"):
            function(tmp_path / "missing")
        with pytest.raises(ValueError, match="must be a folder, or end in"):
            function(__file__)
    with pytest.raises(FileNotFoundError, match="data: no such file"):
        read_clouds(tmp_path / "nowhere")
    (tmp_path / "notes.md").write_text("")
    with pytest.raises(ValueError, match=r"holds no file that ends in \.npy"):
        read_clouds(tmp_path)
    with pytest.raises(ValueError, match=r"notes\.md must be a folder, or end in \.npz"):
        read_clouds(tmp_path / "notes.md")
    write_folders(tmp_path / "set")
    np.save(tmp_path / "set" / "rod" / "stray.npy", CLOUD)
    with pytest.raises(ValueError, match=r"divided into train and test, but .*stray\.npy is in neither"):
        read_clouds(tmp_path / "set")
    (tmp_path / "set" / "rod" / "stray.npy").rename(tmp_path / "set" / "stray.npy")
    (tmp_path / "other" / "rod").mkdir(parents=True)
    np.save(tmp_path / "other" / "rod" / "a.npy", CLOUD)
    np.save(tmp_path / "other" / "b.npy", CLOUD)
    with pytest.raises(ValueError, match=r"clouds in folders of their classes \(rod, ...\), and others in none"):
        read_clouds(tmp_path / "other")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "trimesh", None)
    (tmp_path / "cube.off").write_text(CUBE)
    with pytest.raises(ImportError, match=r"data: trimesh is needed .*: pip install 'deftcore\[points\]'"):
        formats.read_cloud(tmp_path / "cube.off", 10)


# ---------------------------------------------------------------------------- made ready


def test_clouds_fill_the_unit_ball():
    ball = unit_ball(CLOUD)
    np.testing.assert_allclose(ball.mean(0), 0, atol=1e-6)
    assert np.linalg.norm(ball, axis=1).max() == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(unit_ball(7 * CLOUD - 3), ball, atol=1e-5)
    assert not unit_ball(np.full((4, 3), 5.0)).any()  # all points equal
    for size in (1e-200, 1e200, 5e306):  # whose squares, and the last one's sum, are no float64
        np.testing.assert_array_equal(unit_ball(size * CLOUD.astype(np.float64)).round(5), ball.round(5))


def test_the_first_points_are_those_far_apart():
    """Of any number: sampling fewer gives the beginning of sampling more. Clouds of a batch have their own lengths."""
    clouds = [unit_ball(shape("ball", n, np.random.default_rng(n))) for n in (9, 30, 17, 18)]
    found = farthest_first(clouds, 16)
    assert [len(each) for each in found] == [9, 19, 17, 18]
    assert torch.equal(found[0], torch.from_numpy(clouds[0]))  # seen whole
    for cloud, each in zip(clouds[1:], found[1:], strict=True):
        assert torch.equal(each[0], torch.from_numpy(cloud[0]))
        assert len({tuple(point) for point in each.tolist()}) == len(each)
        nearest = [(each[:i] - each[i]).square().sum(-1).min() for i in range(1, len(each))]
        assert all(a >= b - 1e-6 for a, b in pairwise(nearest))
        assert torch.equal(farthest_first([cloud], 5)[0], each[:6])


def test_points_are_chosen():
    cloud = torch.arange(30.0).view(10, 3)
    assert torch.equal(choose_points(cloud, 4), cloud[:4])
    assert torch.equal(choose_points(cloud, 23)[:20], torch.cat([cloud, cloud]))  # again from the beginning
    generator = torch.Generator().manual_seed(0)
    chosen = choose_points(cloud, 10, generator)
    assert not torch.equal(chosen, cloud)
    assert torch.equal(chosen.sort(0).values, cloud)


def test_augmentation_stays_within_its_bounds():
    cloud = torch.randn(50, 3)
    generator = torch.Generator().manual_seed(0)
    factors, steps = [], []
    for _ in range(300):
        moved = augment(cloud, generator, scale=(0.5, 2.0), shift=0.2)
        factor = (moved[0] - moved[1]) / (cloud[0] - cloud[1])
        torch.testing.assert_close(moved, cloud * factor + (moved[0] - cloud[0] * factor), rtol=1e-3, atol=1e-4)
        factors.append(factor)
        steps.append(moved[0] - cloud[0] * factor)
    factors, steps = torch.stack(factors), torch.stack(steps)
    assert 0.5 <= factors.min() < 0.55
    assert 1.95 < factors.max() <= 2.001
    assert -0.2001 <= steps.min() < -0.18
    assert 0.18 < steps.max() <= 0.2001
    assert torch.corrcoef(factors.T).triu(1).abs().max() < 0.2  # each axis for itself
    turned = augment(cloud, generator, rotate=True)
    torch.testing.assert_close(turned[:, 1], cloud[:, 1])
    torch.testing.assert_close(turned.norm(dim=1), cloud.norm(dim=1))
    assert (turned[:, 0] - cloud[:, 0]).abs().max() > 0.01
    torch.testing.assert_close(augment(cloud, generator), cloud)
    again = [augment(cloud, torch.Generator().manual_seed(5), rotate=True, shift=1) for _ in range(2)]
    assert torch.equal(*again)


def test_arrays_are_read_in_their_parts(tmp_path):
    write_arrays(tmp_path / "set.npz", each=5, tests=2)
    assert [len(read_clouds(tmp_path / "set.npz", part).points) for part in ("train", "test")] == [9, 6]
