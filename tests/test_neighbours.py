"""Neighbourhoods: farthest_point_sample, knn, ball_query, gather_points, interpolate."""

import itertools

import pytest
import torch
from conftest import assert_close_to_ref

from deftcore import ops
from deftcore.ops.neighbours import ball_query_ref, farthest_point_sample_ref, knn_ref, squared_distance
from deftcore.ops.neighbours_gather import gather_points_ref
from deftcore.ops.neighbours_interpolate import Interpolation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [(1, 1), (2, 3), (3, 17), (1, 64), (2, 130), (5, 33), (1, 1000)]
STRIDED = {
    "plain": lambda t: t,
    "turned": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "slice": lambda t: torch.nn.functional.pad(t, (1, 2))[..., 1:-2],
}


def grid(batch, points, side=4):
    """Points on a small grid of integers, many of them equal and nearly all distances tied."""
    return torch.randint(0, side, (batch, points, 3)).float()


def clouds(kind, batch, points):
    return grid(batch, points) if kind == "grid" else torch.randn(batch, points, 3)


def some_lengths(batch, points):
    lengths = torch.randint(1, points + 1, (batch,))
    lengths[0] = points
    return lengths


kinds = pytest.mark.parametrize("kind", ["random", "grid"])
sizes = pytest.mark.parametrize(("batch", "points"), SIZES)
padded = pytest.mark.parametrize("padded", [False, True])


# ---------------------------------------------------------------------------- as the definitions, bit by bit


@kinds
@sizes
@padded
@pytest.mark.parametrize("skip", [False, True])
def test_farthest_points_are_the_references(kind, batch, points, padded, skip):
    p, lengths = clouds(kind, batch, points), some_lengths(batch, points) if padded else None
    start = 0 if padded else points // 2
    for samples in {1, max(1, points // 3), points, points + 5}:
        found = ops.farthest_point_sample(p, samples, start=start, lengths=lengths, repeat=True, skip_near_origin=skip)
        assert torch.equal(found, farthest_point_sample_ref(p, samples, start, lengths, skip))


@kinds
@sizes
@padded
def test_neighbours_are_the_references(kind, batch, points, padded):
    p, q = clouds(kind, batch, points), clouds(kind, batch, 37)
    lengths = some_lengths(batch, points) if padded else None
    for k in {1, max(1, points // 4), points, points + 3}:
        found, ref = ops.knn(p, q, k, lengths=lengths), knn_ref(p, q, k, lengths)
        assert torch.equal(found[0], ref[0])
        assert torch.equal(found[1], ref[1])


@kinds
@sizes
@padded
@pytest.mark.parametrize("radius", [1e-3, 1.0, 2.0, 9.0])
def test_balls_are_the_references(kind, batch, points, padded, radius):
    p, q = clouds(kind, batch, points), clouds(kind, batch, 37)
    lengths = some_lengths(batch, points) if padded else None
    for k in {1, max(1, points // 4), points + 3}:
        found, ref = ops.ball_query(p, q, k, radius, lengths=lengths), ball_query_ref(p, q, k, radius, lengths)
        assert torch.equal(found[0], ref[0])
        assert torch.equal(found[1], ref[1])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("lay", STRIDED)
def test_dtypes_and_strides_change_no_index(dtype, lay):
    """Grid points are exact in every dtype, and so are their distances."""
    p, q = STRIDED[lay](grid(2, 70, 8).to(dtype)), STRIDED[lay](grid(2, 9, 8).to(dtype))
    assert torch.equal(ops.farthest_point_sample(p, 20), farthest_point_sample_ref(p.double(), 20))
    found, ref = ops.knn(p, q, 7), knn_ref(p.double(), q.double(), 7)
    assert found[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(found[0], ref[0])
    assert torch.equal(found[1].double(), ref[1])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.knn(p, q, 7)[1], found[1])
    balls, ref = ops.ball_query(p, q, 7, 3.0), ball_query_ref(p.double(), q.double(), 7, 3.0)
    assert torch.equal(balls[0], ref[0])
    assert torch.equal(balls[1], ref[1])


def test_no_queries_and_no_clouds():
    p = torch.randn(2, 9, 3)
    for batch, queries in ((2, 0), (0, 4)):
        few = p[:batch], torch.randn(batch, queries, 3)
        assert [tuple(t.shape) for t in ops.knn(*few, 3)] == [(batch, queries, 3)] * 2
        assert [tuple(t.shape) for t in ops.ball_query(*few, 3, 1.0)] == [(batch, queries, 3)] * 2
        assert ops.interpolate(*few, torch.randn(batch, 9, 5), 3).shape == (batch, queries, 5)
        assert ops.gather_points(torch.randn(batch, 9, 5), torch.zeros(batch, queries, 3).long()).shape == (
            batch, queries, 3, 5
        )  # fmt: skip
    assert ops.farthest_point_sample(p[:0], 3).shape == (0, 3)


def test_far_and_near_coordinates():
    """The largest that are allowed, and differences that the expanded form of the distance would lose."""
    p = torch.tensor([[[1e18, -1e18, 1e18], [-1e18, 1e18, -1e18], [0.0, 0, 0]]])
    distances = ops.knn(p, p, 3)[1]
    assert distances.isfinite().all()
    assert distances[0, 0, 2] > 1e37
    p = 1e4 + torch.arange(64).view(1, 64, 1) * torch.tensor([2.0**-9, 0, 0])
    indices, distances = ops.knn(p, p, 2)
    assert torch.equal(indices[0, :, 0], torch.arange(64))
    assert (distances[..., 1] == 2.0**-18).all()


# ---------------------------------------------------------------------------- what must hold


def test_more_picks_start_with_fewer():
    p = torch.randn(3, 200, 3)
    many = ops.farthest_point_sample(p, 60, start=5)
    assert (many[:, 0] == 5).all()
    for samples in (1, 2, 17, 59):
        assert torch.equal(ops.farthest_point_sample(p, samples, start=5), many[:, :samples])


def test_picks_cover_and_lie_apart():
    p = torch.randn(1, 300, 3, dtype=torch.float64).float()
    picks = ops.farthest_point_sample(p, 40)[0]
    between = squared_distance(p[0].unsqueeze(1), p[0].unsqueeze(0))
    radii = [between[picks[:n]].amin(0).max() for n in range(1, 41)]
    assert all(a >= b for a, b in itertools.pairwise(radii))
    apart = between[picks][:, picks].fill_diagonal_(torch.inf).min()
    assert apart >= radii[-1]


def test_order_and_pose_change_no_pick():
    p = torch.rand(1, 150, 3, dtype=torch.float64)
    picks = ops.farthest_point_sample(p, 30)
    order = torch.cat((torch.zeros(1).long(), 1 + torch.randperm(149)))
    assert torch.equal(order[ops.farthest_point_sample(p[:, order], 30)], picks)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    assert torch.equal(ops.farthest_point_sample(3 * p @ turn + 7, 30), picks)


def test_equal_points_follow_in_their_order():
    p = torch.tensor([[2.0, 0, 0], [0, 0, 0], [2, 0, 0], [0, 0, 0], [2, 0, 0]]).unsqueeze(0)
    assert ops.farthest_point_sample(p, 5, start=2).tolist() == [[2, 1, 0, 3, 4]]
    assert ops.farthest_point_sample(torch.ones(1, 20, 3), 20, start=7)[0].sort().values.tolist() == list(range(20))
    assert ops.farthest_point_sample(p, 7, start=2, repeat=True).tolist() == [[2, 1, 0, 3, 4, 2, 1]]


def test_all_neighbours_are_a_permutation():
    p, q = torch.randn(2, 90, 3), torch.randn(2, 11, 3)
    indices, distances = ops.knn(p, q, 90)
    assert torch.equal(indices.sort(-1).values, torch.arange(90).expand(2, 11, -1))
    assert (distances.diff(dim=-1) >= 0).all()
    own, zero = ops.knn(p, p, 1)
    assert torch.equal(own[..., 0], torch.arange(90).expand(2, -1))
    assert (zero == 0).all()


def test_agrees_with_a_kd_tree():
    spatial = pytest.importorskip("scipy.spatial")
    p, q = torch.randn(1, 400, 3), torch.randn(1, 50, 3)
    indices, distances = ops.knn(p, q, 12)
    expected, numbers = spatial.cKDTree(p[0].double().numpy()).query(q[0].double().numpy(), 12)
    torch.testing.assert_close(distances[0].sqrt().double(), torch.from_numpy(expected))
    assert torch.equal(indices[0].sort(-1).values, torch.from_numpy(numbers).sort(-1).values)


def test_slots_without_a_neighbour():
    p, q = torch.randn(2, 6, 3), torch.randn(2, 4, 3)
    indices, distances = ops.knn(p, q, 5, lengths=torch.tensor([6, 2], dtype=torch.int32))
    assert distances[0].isfinite().all()
    assert torch.equal(distances[1].isfinite(), torch.tensor([True, True, False, False, False]).expand(4, -1))
    assert torch.equal(indices[1, :, 2:], indices[1, :, :1].expand(-1, 3))
    p = torch.tensor([[[0.0, 0, 0], [10, 0, 0], [0.5, 0, 0], [0.2, 0, 0]]])
    indices, mask = ops.ball_query(p, torch.tensor([[[0.0, 0, 0], [5.1, 0, 0]]]), 3, 0.5)
    assert indices.tolist() == [[[0, 3, 0], [2, 2, 2]]] or indices.tolist() == [[[0, 3, 0], [1, 1, 1]]]
    assert mask.tolist() == [[[True, True, False], [False] * 3]]
    assert indices[0, 1, 0] == 2  # 4.6 away, against 4.9


def test_one_cloud_does_not_see_another():
    p, q = torch.randn(2, 50, 3), torch.randn(2, 8, 3)
    other = p.clone()
    other[0] += torch.randn(50, 3)
    assert torch.equal(ops.farthest_point_sample(p, 9)[1], ops.farthest_point_sample(other, 9)[1])
    assert torch.equal(ops.knn(p, q, 4)[0][1], ops.knn(other, q, 4)[0][1])


def test_small_and_equal_inputs():
    same = torch.ones(1, 4, 3)
    for points, queries in ((1, 1), (4, 1), (4, 4)):
        p = same[:, :points]
        values = torch.randn(1, points, 2)
        found = ops.interpolate(p, same[:, :queries], values)
        torch.testing.assert_close(found, values.mean(1, keepdim=True).expand_as(found))
        assert (ops.knn(p, p, 1)[1] == 0).all()
    value = torch.randn(1, 1, 7)
    assert torch.equal(ops.interpolate(same[:, :1], torch.randn(1, 5, 3), value, 3), value.expand(-1, 5, -1))


# ---------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 5, 16, 67, 384])
@pytest.mark.parametrize("lay", STRIDED)
def test_gather_moves_bits(dtype, width, lay):
    x = STRIDED[lay](torch.randn(3, 40, width).to(dtype)).requires_grad_()
    indices = torch.randint(0, 40, (3, 17, 6)).transpose(1, 2)
    y = ops.gather_points(x, indices)
    assert torch.equal(y, torch.stack([c[i] for c, i in zip(x, indices, strict=True)]))
    grad = torch.randn(y.shape).to(dtype)
    ours = torch.autograd.grad(y, x, grad)[0]
    x64 = x.detach().double().requires_grad_()
    y64, work = (torch.stack([c[i] for c, i in zip(x64, indices, strict=True)]) for _ in range(2))
    exact = torch.autograd.grad(y64, x64, grad.double())[0]
    work = torch.autograd.grad(work, x64, grad.double().abs())[0]
    plain = torch.autograd.grad(gather_points_ref(x, indices.reshape(3, -1, 1)), x, grad.reshape(3, -1, width))[0]
    assert_close_to_ref(ours, plain, exact, work)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "width"), [(1, 5), (3, 64), (4, 33), (9, 200)])
@pytest.mark.parametrize("lay", STRIDED)
def test_weighted_sums(dtype, k, width, lay):
    x = STRIDED[lay](torch.randn(2, 30, width).to(dtype)).requires_grad_()
    indices, weights = torch.randint(0, 30, (2, 41, k)), torch.randn(2, 41, k).requires_grad_()
    x64, w64 = x.detach().double().requires_grad_(), weights.detach().double().requires_grad_()
    y, plain, exact = (
        ops.gather_points(x, indices, weights), gather_points_ref(x, indices, weights),
        gather_points_ref(x64, indices, w64),
    )  # fmt: skip
    size = gather_points_ref(x64.abs(), indices, w64.abs())
    assert_close_to_ref(y, plain, exact.detach(), size.detach())
    grad = torch.randn(y.shape).to(dtype)
    ours, theirs = (torch.autograd.grad(t, (x, weights), grad) for t in (y, plain))
    refs = torch.autograd.grad(exact, (x64, w64), grad.double())
    works = torch.autograd.grad(size, (x64, w64), grad.double().abs())
    for found, other, ref, work in zip(ours, theirs, refs, works, strict=True):
        assert_close_to_ref(found, other, ref, work.abs())


@pytest.mark.parametrize("k", [1, 3, 16, 40, None])
def test_interpolation_weights(k):
    centres, queries, values = torch.randn(2, 16, 3), torch.randn(2, 50, 3), torch.randn(2, 16, 5)
    found = Interpolation.between(centres, queries, k)
    assert (found.weights >= 0).all()
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(2, 50), atol=1e-6, rtol=0)
    torch.testing.assert_close(ops.interpolate(centres, queries, torch.full((2, 16, 1), 3.0), k),
                               torch.full((2, 50, 1), 3.0))  # fmt: skip
    torch.testing.assert_close(ops.interpolate(centres, centres, values, k), values, atol=1e-4, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.interpolate(centres, queries, values, k), found(values))


def test_gradients():
    p, q = torch.randn(2, 9, 3, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
    v, indices = torch.randn(2, 9, 2, dtype=torch.float64), torch.randint(0, 9, (2, 4, 3))
    w = torch.randn(2, 4, 3, dtype=torch.float64)
    every = [t.requires_grad_() for t in (p, q, v, w)]
    lengths = torch.tensor([9, 2])
    check = torch.autograd.gradcheck
    assert check(lambda p, q: ops.knn(p, q, 4)[1], every[:2])
    assert check(lambda p, q: ops.knn(p, q, 4, lengths=lengths)[1].clamp(max=1e6), every[:2])
    assert check(lambda v: ops.gather_points(v, indices), every[2:3])
    assert check(lambda v, w: ops.gather_points(v, indices, w), every[2:])
    for k in (3, None):
        assert check(lambda p, q, v, k=k: ops.interpolate(p, q, v, k), every[:3])
    twice = torch.autograd.gradgradcheck
    assert twice(lambda p, q: ops.knn(p, q, 4, lengths=lengths)[1].clamp(max=1e6), every[:2])
    assert twice(lambda v: ops.gather_points(v, indices).square(), every[2:3])
    assert twice(lambda v, w: ops.gather_points(v, indices, w), every[2:])
    for k in (3, None):
        assert twice(lambda p, q, v, k=k: ops.interpolate(p, q, v, k), every[:3])
    assert not ops.farthest_point_sample(p, 3).requires_grad
    assert not ops.knn(p, q, 3)[0].requires_grad


def test_repeats_are_equal():
    x, indices = torch.randn(1, 50, 64, requires_grad=True), torch.randint(0, 50, (1, 4000))
    grads = [torch.autograd.grad(ops.gather_points(x, indices).square().sum(), x)[0] for _ in range(3)]
    assert all(torch.equal(g, grads[0]) for g in grads)


# ---------------------------------------------------------------------------- PyTorch


def test_opcheck():
    p, q = torch.randn(2, 20, 3, requires_grad=True), torch.randn(2, 5, 3, requires_grad=True)
    x, indices, weights = torch.randn(2, 20, 7).requires_grad_(), torch.randint(0, 20, (2, 6, 3)), torch.rand(2, 6, 3)
    lengths, deftcore = torch.tensor([20, 7]), torch.ops.deftcore
    torch.library.opcheck(deftcore.farthest_point_sample.default, (p.detach(), 7, 1, lengths, False, False))
    torch.library.opcheck(deftcore.knn.default, (p, q, 4, lengths))
    torch.library.opcheck(deftcore.ball_query.default, (p.detach(), q.detach(), 4, 0.5, None))
    torch.library.opcheck(deftcore.gather_points.default, (x, indices, weights.requires_grad_()))
    torch.library.opcheck(deftcore.gather_points.default, (x, indices[..., :1], None))
    grad = torch.randn(2, 6, 7, requires_grad=True)
    for w, f in ((weights, x), (weights, None), (weights.detach(), None)):
        torch.library.opcheck(deftcore.gather_points_grad.default, (grad, indices, w, f, 20))


def test_bad_arguments():
    p, q, nan = torch.randn(2, 8, 3), torch.randn(2, 5, 3), torch.randn(2, 8, 3)
    nan[1, 3, 0] = torch.nan
    x, indices = torch.randn(2, 8, 4), torch.zeros(2, 3).long()
    lengths = torch.tensor([8, 3])
    fps = ops.farthest_point_sample
    for message, call in {
        "points: must be finite": lambda: fps(nan, 2),
        "points: must be finite and": lambda: fps(p * torch.inf, 2),
        "points: must be finite and of": lambda: fps(p * 1e20, 2),
        "points: must be .B, N, 3.": lambda: fps(p[..., :2], 2),
        "points: must be .B, N, 3. with at least": lambda: fps(p[:, :0], 2),
        "samples: must be at most the 8 points without repeat=True, got 9": lambda: fps(p, 9),
        "samples: must be at most the 3 points": lambda: fps(p, 4, lengths=lengths),
        "samples: must be at most the 1 points that are not near": lambda: fps(p * 1e-3, 2, skip_near_origin=True),
        "samples: must be at least 1, got 0": lambda: fps(p, 0),
        "start: must be a point, 0..7, got 8": lambda: fps(p, 2, start=8),
        "start: must be a point of every cloud, 0..2, got 3": lambda: fps(p, 2, start=3, lengths=lengths),
        "lengths: must be in 1..8, got 0": lambda: ops.knn(p, q, 2, lengths=lengths * 0),
        "lengths: must be in 1..8, got 16": lambda: ops.knn(p, q, 2, lengths=lengths * 2),
        "lengths: shape must be": lambda: ops.knn(p, q, 2, lengths=lengths[:1]),
        "queries: must be finite": lambda: ops.knn(p, nan, 2),
        "queries: must be .2, Q, 3.": lambda: ops.knn(p, q[:1], 2),
        "queries: dtype must be": lambda: ops.knn(p, q.double(), 2),
        "k: must be at least 1": lambda: ops.knn(p, q, 0),
        "k: must be an integer": lambda: ops.ball_query(p, q, 2.0, 1.0),
        "radius: must be finite and above 0": lambda: ops.ball_query(p, q, 2, 0.0),
        "centres: must be finite": lambda: ops.interpolate(nan, q, x),
        "indices: must be in 0..7, got 8": lambda: ops.gather_points(x, indices + 8),
        "indices: must be in 0..7, got -1": lambda: ops.gather_points(x, indices - 1),
        "indices: must be an int64": lambda: ops.gather_points(x, indices.int()),
        "indices: must be .2, ....": lambda: ops.gather_points(x, indices[:1]),
        "weights: shape": lambda: ops.gather_points(x, indices, torch.ones(2, 4)),
        "weights: must be a torch.float32": lambda: ops.gather_points(x, indices, torch.ones(2, 3).double()),
        "values: must have 8 rows": lambda: ops.interpolate(p, q, x[:, :7]),
        "values: must have 8 rows, one": lambda: ops.interpolate(p, q, torch.cat([x, x], 1), 3),
        "values: must be .2, N, C.": lambda: ops.interpolate(p, q, x[:1], 3),
        "values: must be float64 where": lambda: ops.interpolate(p, q, x.double()),
        "values: must be float64 where the centres are": lambda: ops.interpolate(p.double(), q.double(), x, 3),
        "centres: must be": lambda: ops.interpolate(p[0], q, x),
        "must be finite": lambda: ops.interpolate(nan, q, x),
    }.items():
        with pytest.raises((ValueError, TypeError), match=message):
            call()


# ---------------------------------------------------------------------------- others' values


def test_picks_and_neighbours_of_others(parity):
    f = parity("fps_knn.npz")
    for name in ("cube512", "nearorigin300", "clusters1000"):
        p, q = (torch.from_numpy(f[f"{name}.{key}"]).unsqueeze(0) for key in ("points", "query"))
        for key, options in {
            "fps_start0": {}, "fps_start7": {"start": 7}, "fps_start0_skip_near_origin": {"skip_near_origin": True}
        }.items():  # fmt: skip
            picks = torch.from_numpy(f[f"{name}.{key}"])
            assert torch.equal(ops.farthest_point_sample(p, len(picks), **options)[0], picks)
        indices, distances = ops.knn(p, q, 16)
        assert torch.equal(indices[0], torch.from_numpy(f[f"{name}.knn_idx"]))
        torch.testing.assert_close(distances[0].double(), torch.from_numpy(f[f"{name}.knn_d2"]), rtol=1e-5, atol=1e-7)
    p = torch.from_numpy(f["grid64.points"]).unsqueeze(0)
    assert torch.equal(ops.farthest_point_sample(p, 16)[0], torch.from_numpy(f["grid64.fps_start0"]))
    assert torch.equal(ops.knn(p, p, 10)[0][0], torch.from_numpy(f["grid64.knn_idx"]))
    p = torch.from_numpy(f["dup20.points"]).unsqueeze(0)
    assert torch.equal(ops.farthest_point_sample(p, 16)[0], torch.from_numpy(f["dup20.fps_start0_G16"]))


def test_interpolation_and_balls_of_others(parity):
    f = parity("fps_knn.npz")
    p = torch.from_numpy(f["cube512.points"]).unsqueeze(0)
    centres = ops.gather_points(p, torch.from_numpy(f["cube512.fps_start0"]).unsqueeze(0))
    values = torch.from_numpy(f["cube512.interp_values"]).unsqueeze(0)
    for k in (3, 64):
        exact = torch.from_numpy(f[f"cube512.interp_k{k}"])
        found = ops.interpolate(centres.double(), p.double(), values.double(), k)[0]
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(ops.interpolate(centres, p, values, k)[0].double(), exact, rtol=1e-5, atol=1e-5)
    indices, mask = ops.ball_query(p, centres, 8, 0.45)
    assert torch.equal(indices[0], torch.from_numpy(f["cube512.ball_r0.45_k8_idx"]))
    assert torch.equal(mask[0].sum(1), torch.from_numpy(f["cube512.ball_count"]))
