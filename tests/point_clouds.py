"""Small clouds of a few shapes, and models that fit them."""

import numpy as np

SHAPES = ("ball", "rod", "sheet")


def shape(kind, count, rng):
    """A noisy cloud [count, 3], anywhere in space and of any size."""
    points = rng.normal(size=(count, 3))
    if kind == "ball":
        points /= np.linalg.norm(points, axis=1, keepdims=True)
    else:
        points *= {"rod": (1.0, 0.05, 0.05), "sheet": (1.0, 1.0, 0.05)}[kind]
    return (rng.uniform(1, 30) * points + rng.normal(size=3)).astype(np.float32)


def write_arrays(path, each=8, count=80, tests=3, seed=0):
    """`each` clouds of each shape in a .npz, the last `tests` of each to test on."""
    rng = np.random.default_rng(seed)
    points = np.stack([shape(kind, count, rng) for kind in SHAPES for _ in range(each)])
    is_test = np.tile(np.arange(each) >= each - tests, len(SHAPES))
    labels = np.repeat(np.arange(len(SHAPES)), each)
    np.savez(path, points=points, labels=labels, classes=np.array(SHAPES), is_test=is_test)
    return path


def write_folders(path, each=4, count=50, seed=0):
    """<path>/<shape>/<train or test>/<number>.npy."""
    rng = np.random.default_rng(seed)
    for kind in SHAPES:
        for i in range(each):
            folder = path / kind / ("test" if i == each - 1 else "train")
            folder.mkdir(parents=True, exist_ok=True)
            np.save(folder / f"{i}.npy", shape(kind, count + i, rng))
    return path


def tiny_mae(**options):
    """A `PointMae` of small sizes."""
    from deftcore.methods.point_peft.pretraining import PointMae, PointMaeConfig

    sizes = {"width": 24, "depth": 2, "heads": 2, "patches": 8, "patch_points": 8}
    return PointMae(PointMaeConfig(**sizes, decoder_depth=1, decoder_heads=2, **options))
