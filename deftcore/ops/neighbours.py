"""Neighbourhoods in clouds of points: farthest point sampling, nearest neighbours, balls.

All devices give equal indices, because all compute a squared distance as (dx dx + dy dy) + dz dz, each operation
rounded to float32, and a tie goes to the lower index. The expanded |a|^2 + |b|^2 - 2ab loses digits where points are
close, can be negative, and swaps near-equal neighbours; it is used nowhere.
"""

from typing import Any

import torch
from torch import Tensor

from deftcore.ops._library import define
from deftcore.ops.checks import check_float, check_integers, check_like, check_number
from deftcore.ops.kernels import address, backend, capturing, give_workspace, native, stream
from deftcore.ops.neighbours_gather import gather_points, gather_points_grad

_MOST = 1e18  # of a coordinate: the square of a difference is a float32 then
_NEAR_ORIGIN = 1e-3  # squared norm, of the pointnet2 kernel
_BLOCK = 1 << 22  # distances that a reference keeps at a time


def farthest_point_sample(
    points: Tensor,
    samples: int,
    *,
    start: int = 0,
    lengths: Tensor | None = None,
    repeat: bool = False,
    skip_near_origin: bool = False,
) -> Tensor:
    """Numbers of points far from one another: each pick is the point farthest from all picks before (PointNet++).

    Of equally far points the lowest is picked. Once all that are left lie on picks, these follow in their order, so
    that picks are distinct.

    Args:
        points: [B, N, 3], finite, of size at most 1e18; distances are in float32 (float64 for float64).
        samples: picks a cloud, at least 1.
        start: the first pick.
        lengths: [B] int32 or int64, how many of a cloud's points are points; the rest is padding. None: all.
        repeat: a cloud of fewer points gives its picks again in their order; otherwise that is an error.
        skip_near_origin: leave out points with a squared norm of at most 1e-3, as the kernel that is widely used with
            PointNet++ does, to match published numbers.

    Returns:
        [B, samples] int64, without a gradient.

    Raises:
        TypeError, ValueError: naming the argument; in a CUDA graph values are not looked at.

    >>> farthest_point_sample(torch.tensor([[[0.0, 0, 0], [1, 0, 0], [3, 0, 0], [2, 0, 0]]]), 3).tolist()
    [[0, 2, 1]]
    """
    points = check_points("points", points)
    samples = _at_least("samples", samples, 1)
    start = _at_least("start", start, 0)
    if start >= points.shape[1]:
        raise ValueError(f"start: must be a point, 0..{points.shape[1] - 1}, got {start}")
    if samples > points.shape[1] and not repeat:
        raise ValueError(f"samples: must be at most the {points.shape[1]} points without repeat=True, got {samples}")
    _check_lengths(lengths, points)
    return _farthest_point_sample(points, samples, start, lengths, bool(repeat), bool(skip_near_origin))


def knn(points: Tensor, queries: Tensor, k: int, *, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k points nearest to each query, nearest first, the lower index first where they are equally near.

    Args:
        points: [B, N, 3], as for `farthest_point_sample`.
        queries: [B, Q, 3], in the points' dtype.
        k: neighbours, at least 1.
        lengths: [B] int32 or int64, how many of a cloud's points are points. None: all.

    Returns:
        indices [B, Q, k] int64, squared distances [B, Q, k] float32 (float64 for float64), which have a gradient. Where
        a cloud has fewer than k points the nearest is repeated, and its distance there is infinity: `isfinite` of the
        distances is the mask of valid neighbours.

    Raises:
        TypeError, ValueError: naming the argument; in a CUDA graph values are not looked at.

    >>> knn(torch.tensor([[[0.0, 0, 0], [1, 0, 0], [3, 0, 0]]]), torch.tensor([[[2.0, 0, 0]]]), 2)
    (tensor([[[1, 2]]]), tensor([[[1., 1.]]]))
    """
    points, queries = _check_search(points, queries, lengths)
    distances, indices = _knn(points, queries, _at_least("k", k, 1), lengths)
    return indices, distances


def ball_query(
    points: Tensor, queries: Tensor, k: int, radius: float, *, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The first k points, in the order of their indices, whose squared distance to a query is below radius^2.

    Args:
        points, queries, lengths: as for `knn`.
        k: points, at least 1.
        radius: above 0; its square is rounded to the distances' dtype.

    Returns:
        indices [B, Q, k] int64, mask [B, Q, k] bool: whether the slot holds a point of the ball. Where the ball has
        fewer than k the first is repeated; where it has none, the nearest point, and the mask is False everywhere.

    Raises:
        TypeError, ValueError: naming the argument; in a CUDA graph values are not looked at.

    >>> ball_query(torch.tensor([[[0.0, 0, 0], [1, 0, 0], [3, 0, 0]]]), torch.tensor([[[0.5, 0, 0]]]), 3, 1.0)
    (tensor([[[0, 1, 0]]]), tensor([[[ True,  True, False]]]))
    """
    points, queries = _check_search(points, queries, lengths)
    radius = check_number("radius", radius, minimum=0.0, strict=True)
    return _ball_query(points, queries, _at_least("k", k, 1), radius, lengths)


# ---------------------------------------------------------------------------- checks


def check_points(name: str, x: Any) -> Tensor:
    """x in the dtype that distances are computed in."""
    check_float(name, x)
    if x.dim() != 3 or x.shape[2] != 3 or x.shape[1] == 0:
        raise ValueError(f"{name}: must be [B, N, 3] with at least one point, got shape {tuple(x.shape)}")
    return x if x.dtype == torch.float64 else x.float()


def _check_search(points: Any, queries: Any, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    wide = check_points("points", points)
    check_like("queries", queries, "points", points)
    if queries.dim() != 3 or queries.shape[0] != wide.shape[0] or queries.shape[2] != 3:
        raise ValueError(f"queries: must be [{wide.shape[0]}, Q, 3] as points, got shape {tuple(queries.shape)}")
    _check_lengths(lengths, wide)
    return wide, queries.to(wide.dtype)


def _check_lengths(lengths: Any, points: Tensor) -> None:
    if lengths is not None:
        check_integers("lengths", lengths, (points.shape[0],), "one per cloud", "points", points)


def _at_least(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: must be at least {least}, got {value}")
    return value


def check_values(lengths: Tensor | None, **clouds: Tensor) -> None:
    """Raises unless all coordinates are finite and all lengths are some."""
    for name, x in clouds.items():
        if x.numel() == 0 or capturing(x.device):
            continue
        low, high = (float(v) for v in x.detach().aminmax())
        if not (low >= -_MOST and high <= _MOST):  # NaN too
            raise ValueError(f"{name}: must be finite and of size at most {_MOST:g}, got values in {low}..{high}")
    if lengths is not None and lengths.numel() and not capturing(lengths.device):
        fewest, most, size = int(lengths.min()), int(lengths.max()), clouds["points"].shape[1]
        if fewest < 1 or most > size:
            raise ValueError(f"lengths: must be in 1..{size}, got {fewest if fewest < 1 else most}")


def _sizes(lengths: Tensor | None) -> Tensor | None:
    """As the kernels read them."""
    return None if lengths is None else lengths.long().contiguous()


# ---------------------------------------------------------------------------- farthest_point_sample


def _farthest_point_sample_impl(
    points: Tensor, samples: int, start: int, lengths: Tensor | None, repeat: bool, skip_near_origin: bool
) -> Tensor:
    check_values(lengths, points=points)
    if not capturing(points.device) and points.shape[0]:
        _check_samples(points, samples, start, lengths, repeat, skip_near_origin)
    kernels = backend("farthest_point_sample", points)
    if kernels is None:
        return farthest_point_sample_ref(points, samples, start, lengths, skip_near_origin)
    points, sizes = points.contiguous(), _sizes(lengths)
    picks = torch.empty(points.shape[0], samples, dtype=torch.int64, device=points.device)
    args = native.FarthestPointSample(
        points=address(points), lengths=address(sizes), picks=address(picks), workspace=0, clouds=points.shape[0],
        size=points.shape[1], samples=samples, start=start, skip_near_origin=skip_near_origin,
    )  # fmt: skip
    _held = give_workspace(args, kernels.farthest_point_sample_workspace(args), points)
    kernels.farthest_point_sample(args, stream(points))
    return picks


def _check_samples(
    points: Tensor, samples: int, start: int, lengths: Tensor | None, repeat: bool, skip_near_origin: bool
) -> None:
    if lengths is not None and start >= (fewest := int(lengths.min())):
        raise ValueError(f"start: must be a point of every cloud, 0..{fewest - 1}, got {start}")
    if repeat or (lengths is None and not skip_near_origin):
        return
    fewest = int(_candidates(points, start, lengths, skip_near_origin).sum(1).min())
    if samples > fewest:
        left = " that are not near the origin" if skip_near_origin else ""
        raise ValueError(f"samples: must be at most the {fewest} points{left} without repeat=True, got {samples}")


def _farthest_point_sample_fake(points: Tensor, samples: int, *_: Any) -> Tensor:
    return points.new_empty(points.shape[0], samples, dtype=torch.int64)


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Of points [..., 3], in the order of operations that all kernels have."""
    dx, dy, dz = (a - b).unbind(-1)
    return dx * dx + dy * dy + dz * dz


def _valid(points: Tensor, lengths: Tensor | None) -> Tensor:
    """[B, N]: which points are no padding."""
    number = torch.arange(points.shape[1], device=points.device).expand(points.shape[0], -1)
    return number >= 0 if lengths is None else number < lengths.unsqueeze(1)


def _candidates(points: Tensor, start: int, lengths: Tensor | None, skip_near_origin: bool) -> Tensor:
    """[B, N]: which points can be picked."""
    candidates = _valid(points, lengths)
    if skip_near_origin:
        candidates = candidates & (squared_distance(points, torch.zeros_like(points)).double() > _NEAR_ORIGIN)
        candidates[:, start] = True
    return candidates


def farthest_point_sample_ref(
    points: Tensor, samples: int, start: int = 0, lengths: Tensor | None = None, skip_near_origin: bool = False
) -> Tensor:
    """`farthest_point_sample` in PyTorch operations; picks are repeated where there are no more points."""
    candidates = _candidates(points, start, lengths, skip_near_origin)
    # The squared distance to the nearest pick; -1 where nothing is to be picked (any more).
    least = torch.where(candidates, torch.inf, -1.0).to(points.dtype)
    cloud = torch.arange(points.shape[0], device=points.device)
    pick, picks = torch.full_like(cloud, start), []
    for _ in range(min(samples, points.shape[1])):
        picks.append(pick)
        least[cloud, pick] = -1.0
        least = torch.minimum(least, squared_distance(points, points[cloud, pick].unsqueeze(1)))
        pick = least.argmax(1)
    order = torch.arange(samples, device=points.device) % candidates.sum(1, keepdim=True)
    return torch.stack(picks, 1).gather(1, order)


# ---------------------------------------------------------------------------- knn


def _knn_impl(points: Tensor, queries: Tensor, k: int, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    check_values(lengths, points=points, queries=queries)
    kernels = backend("knn", points)
    if kernels is None:
        indices, distances = knn_ref(points, queries, k, lengths)
        return distances, indices
    points, queries, sizes = points.contiguous(), queries.contiguous(), _sizes(lengths)
    distances, indices = _knn_fake(points, queries, k, lengths)
    args = native.Knn(
        points=address(points), queries=address(queries), lengths=address(sizes), indices=address(indices),
        distances=address(distances), workspace=0, clouds=points.shape[0], size=points.shape[1],
        count=queries.shape[1], k=k,
    )  # fmt: skip
    _held = give_workspace(args, kernels.knn_workspace(args), points)
    kernels.knn(args, stream(points))
    return distances, indices


def _knn_fake(points: Tensor, queries: Tensor, k: int, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = (*queries.shape[:2], k)
    return queries.new_empty(shape), queries.new_empty(shape, dtype=torch.int64)


def _knn_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    points, queries, _, _ = inputs
    ctx.save_for_backward(points, queries, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _knn_backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple:
    """The gradient of |q - p|^2 is 2 (q - p) in q and the opposite in p; repeated slots have none."""
    if grad is None:
        return None, None, None, None
    points, queries, distances, indices = ctx.saved_tensors
    slope = torch.where(distances.isfinite(), 2 * grad, 0.0)
    grads = slope.unsqueeze(-1) * (queries.unsqueeze(2) - gather_points(points, indices))
    grad_points, _ = gather_points_grad(
        grads.flatten(1, 2), indices.flatten(1).unsqueeze(-1), None, None, points.shape[1]
    )
    return grad_points.neg(), grads.sum(2), None, None


def _blocks(queries: Tensor, points: Tensor) -> list[Tensor]:
    """Queries by parts that have _BLOCK distances or fewer."""
    return list(queries.split(max(1, _BLOCK // max(1, points.shape[0] * points.shape[1])), 1))


def _distances(points: Tensor, queries: Tensor, lengths: Tensor | None) -> Tensor:
    """[B, Q, N]; infinity for padding."""
    distances = squared_distance(queries.unsqueeze(2), points.unsqueeze(1))
    return distances.masked_fill_(~_valid(points, lengths).unsqueeze(1), torch.inf)


def knn_ref(points: Tensor, queries: Tensor, k: int, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`knn` in PyTorch operations; any floating dtype."""
    kept, found = min(k, points.shape[1]), []
    for block in _blocks(queries, points):
        distances, indices = _distances(points, block, lengths).sort(dim=-1, stable=True)
        distances, indices = distances[..., :kept], indices[..., :kept]
        distances = torch.nn.functional.pad(distances, (0, k - kept), value=torch.inf)
        indices = torch.nn.functional.pad(indices, (0, k - kept))
        found.append((torch.where(distances.isfinite(), indices, indices[..., :1]), distances))
    indices, distances = (torch.cat(parts, 1).contiguous() for parts in zip(*found, strict=True))
    return indices, distances


# ---------------------------------------------------------------------------- ball_query


def _ball_query_impl(
    points: Tensor, queries: Tensor, k: int, radius: float, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    check_values(lengths, points=points, queries=queries)
    kernels = backend("ball_query", points)
    if kernels is None:
        return ball_query_ref(points, queries, k, radius, lengths)
    points, queries, sizes = points.contiguous(), queries.contiguous(), _sizes(lengths)
    indices, mask = _ball_query_fake(points, queries, k, radius, lengths)
    args = native.BallQuery(
        points=address(points), queries=address(queries), lengths=address(sizes), indices=address(indices),
        mask=address(mask), workspace=0, clouds=points.shape[0], size=points.shape[1], count=queries.shape[1], k=k,
        square=float(_square(radius, points)),
    )  # fmt: skip
    _held = give_workspace(args, kernels.ball_query_workspace(args), points)
    kernels.ball_query(args, stream(points))
    return indices, mask


def _ball_query_fake(
    points: Tensor, queries: Tensor, k: int, radius: float, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    shape = (*queries.shape[:2], k)
    return queries.new_empty(shape, dtype=torch.int64), queries.new_empty(shape, dtype=torch.bool)


def _square(radius: float, points: Tensor) -> Tensor:
    return torch.tensor(radius * radius, dtype=torch.float64).to(points.dtype)


def ball_query_ref(
    points: Tensor, queries: Tensor, k: int, radius: float, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`ball_query` in PyTorch operations; any floating dtype."""
    size = points.shape[1]
    kept, found = min(k, size), []
    square = _square(radius, points).to(points.device)
    number = torch.arange(size, device=points.device)
    for block in _blocks(queries, points):
        distances = _distances(points, block, lengths)
        hits = torch.where(distances < square, number, size).sort(-1).values[..., :kept]
        hits = torch.nn.functional.pad(hits, (0, k - kept), value=size)
        mask = hits < size
        first = torch.where(mask[..., :1], hits[..., :1], distances.argmin(-1, keepdim=True))
        found.append((torch.where(mask, hits, first), mask))
    indices, mask = (torch.cat(parts, 1).contiguous() for parts in zip(*found, strict=True))
    return indices, mask


_farthest_point_sample = define(
    "farthest_point_sample(Tensor points, int samples, int start, Tensor? lengths, bool repeat, bool skip_near_origin)"
    " -> Tensor",
    _farthest_point_sample_impl,
    _farthest_point_sample_fake,
)
_knn = define(
    "knn(Tensor points, Tensor queries, int k, Tensor? lengths) -> (Tensor, Tensor)",
    _knn_impl,
    _knn_fake,
    setup_context=_knn_setup,
    backward=_knn_backward,
)
_ball_query = define(
    "ball_query(Tensor points, Tensor queries, int k, float radius, Tensor? lengths) -> (Tensor, Tensor)",
    _ball_query_impl,
    _ball_query_fake,
)
