"""Neighbourhoods of points against plain PyTorch, and a kd-tree where SciPy is installed.

How near the kernels come to their bound, the arithmetic of distances, `bench_neighbours` measures in C++.
"""

import torch
from rich.progress import track

from bench.harness import allocator_peak_mb, alternate, console, optional
from deftcore import ops

SHAPES = {  # clouds, points, picks and queries, neighbours
    "ModelNet40": (8, 1024, 64, 32),
    "ScanObjectNN": (8, 2048, 128, 32),
    "a scene": (1, 65536, 1024, 16),
}
_GATHERED = 16  # neighbours among the centres


def plain_farthest(points, samples):
    """The loop that most code has."""
    cloud = torch.arange(points.shape[0], device=points.device)
    picks = torch.zeros(points.shape[0], samples, dtype=torch.int64, device=points.device)
    least = torch.full(points.shape[:2], torch.inf, device=points.device)
    pick = torch.zeros_like(cloud)
    for i in range(samples):
        picks[:, i] = pick
        least = torch.minimum(least, (points - points[cloud, pick].unsqueeze(1)).square().sum(-1))
        pick = least.argmax(-1)
    return picks


def plain_nearest(points, queries, k):
    return torch.cdist(queries, points).topk(k, largest=False)


def plain_ball(points, queries, k, radius):
    number = torch.arange(points.shape[1], device=points.device)
    inside = torch.cdist(queries, points) < radius
    return torch.where(inside, number, points.shape[1]).topk(k, largest=False).indices


def plain_gather(features, indices):
    width = features.shape[-1]
    flat = indices.flatten(1).unsqueeze(-1).expand(-1, -1, width)
    return features.gather(1, flat).reshape(*indices.shape, width)


def tree_search(points, queries, k):
    """A kd-tree per cloud, made and asked by all cores; None without SciPy."""
    tree = optional("scipy.spatial", "cKDTree")
    if tree is None or points.device.type != "cpu":
        return None
    clouds = [(p.numpy(), q.numpy()) for p, q in zip(points, queries, strict=True)]
    return lambda: [tree(p).query(q, k, workers=-1) for p, q in clouds]


def bench_neighbours(device, quick):
    """A row per op and shape, and one for the way back through a gather."""
    torch.manual_seed(0)
    rows = []
    shapes = dict(list(SHAPES.items())[:2]) if quick else SHAPES
    for name, (clouds, size, count, k) in track(shapes.items(), "neighbours", console=console):
        points = torch.rand(clouds, size, 3, device=device)
        queries = ops.gather_points(points, ops.farthest_point_sample(points, count))
        # Between the centres of patches, as Point-PEFT gathers them.
        features = torch.randn(clouds, count, 384, device=device, requires_grad=True)
        near = ops.knn(queries, queries, _GATHERED)[0]
        grad = torch.randn(*near.shape, 384, device=device)
        sides = {
            "farthest_point_sample": (
                lambda p=points, n=count: ops.farthest_point_sample(p, n),
                lambda p=points, n=count: plain_farthest(p, n), None, clouds * size * count,
            ),
            "knn": (
                lambda p=points, q=queries, k=k: ops.knn(p, q, k),
                lambda p=points, q=queries, k=k: plain_nearest(p, q, k),
                tree_search(points, queries, k), clouds * size * count,
            ),
            "ball_query": (
                lambda p=points, q=queries, k=k: ops.ball_query(p, q, k, 0.2),
                lambda p=points, q=queries, k=k: plain_ball(p, q, k, 0.2), None, clouds * size * count,
            ),
            "gather_points": (
                lambda x=features, i=near, g=grad: torch.autograd.grad(ops.gather_points(x, i), x, g),
                lambda x=features, i=near, g=grad: torch.autograd.grad(plain_gather(x, i), x, g), None, 0,
            ),
        }  # fmt: skip
        for op, (ours, plain, tree, pairs) in sides.items():
            runs = {"ours": ours, "plain": plain} | ({"tree": tree} if tree is not None else {})
            times = alternate(runs, 5 if quick else 9, device, graph=False)
            seconds = times["ours"]["seconds"]
            rows.append(
                {
                    "op": op, "data": name, "shape": f"{clouds}x{size}x{count}",
                    "k": _GATHERED if op == "gather_points" else k, "dtype": "float32",
                    "ours_ms": seconds * 1e3, "plain_ms": times["plain"]["seconds"] * 1e3,
                    "ratio": times["plain"]["seconds"] / seconds,
                    "over_tree": times["tree"]["seconds"] / seconds if tree is not None else None,
                    "g_per_s": pairs / seconds / 1e9 or None, "ours_peak_mb": allocator_peak_mb(device, ours),
                    "plain_peak_mb": allocator_peak_mb(device, plain), "spread": times["ours"]["spread"],
                }
            )  # fmt: skip
    return rows
