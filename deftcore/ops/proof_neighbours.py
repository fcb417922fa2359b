"""What proves the kernels of neighbourhoods; see `proof_cases`. Points lie on a grid, where every distance is exact and
many are equal, so that indices must be the reference's."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from deftcore import ops
from deftcore.ops.proof_case import Case, Numbers

# Clouds, points, queries: less than a warp, more than a block, many clouds, one that shared memory does not hold.
_SIZES = ((1, 1, 1), (2, 17, 5), (3, 300, 40), (40, 64, 3), (1, 5000, 70), (2, 20000, 9))


def _cloud(draw: Numbers, *shape: int) -> Tensor:
    return draw.below(24, *shape, 3).float()


def _farthest_point_sample(draw: Numbers) -> Iterator[Case]:
    for clouds, points, samples in _SIZES:
        for skip in (False, True):
            lengths = 1 + draw.below(points, clouds)
            for sizes in (None, lengths):
                yield Case(
                    f"{clouds} x {points}, {samples} picks{', padded' if sizes is not None else ''}",
                    lambda p, n=samples, s=skip, sizes=sizes: ops.farthest_point_sample(
                        p, n + 2, lengths=sizes, repeat=True, skip_near_origin=s
                    ),
                    [_cloud(draw, clouds, points)],
                )


def _knn(draw: Numbers) -> Iterator[Case]:
    def run(points: Tensor, queries: Tensor, k: int, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        indices, distances = ops.knn(points, queries, k, lengths=lengths)
        return indices, distances.clamp(max=1e6)  # infinite where there is no neighbour

    for clouds, points, queries in _SIZES:
        for k in (1, 8, 32, 150):
            sizes = None if k == 8 else 1 + draw.below(points, clouds)
            yield Case(
                f"{clouds} x {points}, {queries} queries, k {k}", lambda p, q, k=k, s=sizes: run(p, q, k, s),
                [_cloud(draw, clouds, points), _cloud(draw, clouds, queries)],
            )  # fmt: skip


def _ball_query(draw: Numbers) -> Iterator[Case]:
    for clouds, points, queries in _SIZES:
        for k, radius in ((1, 0.5), (8, 3.0), (70, 9.0)):
            sizes = None if k == 8 else 1 + draw.below(points, clouds)
            yield Case(
                f"{clouds} x {points}, {queries} queries, {k} within {radius}",
                lambda p, q, k=k, r=radius, s=sizes: ops.ball_query(p, q, k, r, lengths=s),
                [_cloud(draw, clouds, points), _cloud(draw, clouds, queries)],
            )


def _gather_points(draw: Numbers) -> Iterator[Case]:
    def weighted(x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        return ops.gather_points(x, indices, weights.to(torch.promote_types(x.dtype, torch.float32)))

    for clouds, points, rows in _SIZES[:5]:
        for width, k in ((5, 1), (64, 3), (384, 16), (130, 70)):
            indices = draw.below(points, clouds, rows, k)
            label = f"{clouds} x {points} x {width}, {rows} of {k}"
            features = draw.normal(clouds, points, width)
            yield Case(label, lambda x, i=indices: ops.gather_points(x, i), [features], gradients=True)
            yield Case(
                f"{label}, weighted", lambda x, w, i=indices: weighted(x, w, i),
                [features, draw.normal(clouds, rows, k)], gradients=True,
            )  # fmt: skip


NEIGHBOUR_CASES: dict[str, Callable[[Numbers], Iterator[Case]]] = {
    "farthest_point_sample": _farthest_point_sample, "knn": _knn, "ball_query": _ball_query,
    "gather_points": _gather_points,
}  # fmt: skip
