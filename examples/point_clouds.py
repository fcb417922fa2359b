"""Point clouds from nothing to a classifier: `python examples/point_clouds.py [FOLDER]`, a minute on two cores.

Makes clouds of five shapes, pre-trains a small backbone on them without their classes, adapts it by Point-PEFT with the
classes, and asks it what a cloud is. What it wrote stays in FOLDER, or runs/point-clouds: pictures are in
classes/evaluation/. Your own clouds go the same way: a .npz, or a folder for each class with .npy, .txt, .off or .ply.
"""

import sys
from pathlib import Path

import numpy as np

from deftcore.methods.point_peft.task import PointTask
from deftcore.training.recipe import load_recipe
from deftcore.training.run import train_recipe

SHAPES = ("ball", "cube", "ring", "rod", "helix")


def shape(kind: str, points: int, rng: np.random.Generator) -> np.ndarray:
    """A cloud on the surface of a shape, turned about y, with noise: [points, 3]."""
    u, v = rng.uniform(0, 2 * np.pi, points), rng.uniform(-1, 1, points)
    if kind == "cube":
        cloud = rng.uniform(-1, 1, (points, 3))
        cloud[np.arange(points), rng.integers(0, 3, points)] = rng.choice([-1.0, 1.0], points)
    else:
        cloud = {
            "ball": np.stack([np.sqrt(1 - v**2) * np.cos(u), v, np.sqrt(1 - v**2) * np.sin(u)], 1),
            "ring": np.stack([np.cos(u) * (1 + 0.2 * v), 0.2 * np.sqrt(1 - v**2), np.sin(u) * (1 + 0.2 * v)], 1),
            "rod": np.stack([0.1 * np.cos(u), v, 0.1 * np.sin(u)], 1),
            "helix": np.stack([np.cos(6 * v), v, np.sin(6 * v)], 1),
        }[kind]
    turn = rng.uniform(0, 2 * np.pi)
    c, s = np.cos(turn), np.sin(turn)
    return cloud @ np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]]) + 0.02 * rng.normal(size=(points, 3))


def main(folder: Path, *overrides: str) -> None:
    """Overrides are of both recipes."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    each = 24
    np.savez(
        folder / "clouds.npz",
        points=np.stack([shape(kind, 512, rng) for kind in SHAPES for _ in range(each)]).astype(np.float32),
        labels=np.repeat(np.arange(len(SHAPES)), each),
        classes=np.array(SHAPES),
        is_test=np.tile(np.arange(each) % 4 == 0, len(SHAPES)),
    )
    shared = [
        f"data.train={folder / 'clouds.npz'}", "data.points=256", "data.scale=[0.9, 1.1]", "training.batch_size=15",
        "training.eval_every=0", "training.save_every=100",
    ]  # fmt: skip

    def run(recipe: str, model: object, output: str, epochs: int, rate: float) -> Path:
        own = [f"model={model}", f"output={folder / output}", f"training.epochs={epochs}"]
        own.append(f"training.learning_rate={rate}")
        result = train_recipe(load_recipe(recipe, [*shared, *own, *overrides]))
        print(f"{output}: {result.to_dict()}")
        return folder / output / "final"

    backbone = run("point-mae", "point-mae-small", "backbone", 10, 1e-3)
    trained = run("point-peft", backbone, "classes", 40, 5e-3)
    reader = PointTask.reader(backbone, trained)
    for kind in SHAPES:
        told = ", ".join(f"{name} {share:.0%}" for name, share in list(reader(shape(kind, 300, rng)).items())[:3])
        print(f"a {kind}: {told}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/point-clouds"), *sys.argv[2:])
