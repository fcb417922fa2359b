"""Crops from satellite series, the whole way: `python examples/crop_maps.py [FOLDER]`, a minute on two cores.

Makes scenes of fields in which three crops green at different times of the year, pre-trains a small TSViT on all three
in one region, adapts it to wheat in another with LoRA, a year held out, and maps a scene that it has not seen. What it
wrote stays in FOLDER, or runs/crop-maps: the map is wheat-2020.tif, its picture wheat-2020.png.
"""

import json
import sys
from pathlib import Path

import numpy as np

import deftcore
from deftcore.cli.main import main as command

WHEAT, MAIZE, GRASS = 1, 2, 3
GREENING = {WHEAT: 120, MAIZE: 210, GRASS: 160}  # the day on which a crop is at its greenest
BANDS = ["B04", "B08", "B11"]


def scene(seed: int, later: int, side: int = 48) -> dict[str, np.ndarray]:
    """Fields with 12 monthly frames, some of them under clouds.

    Args:
        later: days by which the region's seasons are behind.
    """
    draw = np.random.default_rng(seed)
    labels = draw.choice([WHEAT, MAIZE, GRASS], (side // 6, side // 6)).repeat(6, 0).repeat(6, 1)
    doy = np.arange(15, 365, 30)[:12]
    peak = np.vectorize(GREENING.get)(labels) + later
    green = np.exp(-(((doy[:, None, None] - peak) / 45.0) ** 2))
    red, infrared, short = 1200 - 700 * green, 1800 + 2500 * green, 2200 - 900 * green
    images = np.stack([red, infrared, short], 1) + draw.normal(0, 250, (12, 3, side, side))
    cloud = (draw.random((12, side // 12, side // 12)) < 0.25).repeat(12, 1).repeat(12, 2)
    images = np.where(cloud[:, None], 9000, images).clip(0)
    place = {"crs": "EPSG:32636", "transform": np.array([10, 0, 7.5e5, 0, -10, 3.76e6])}
    return {"images": images.astype(np.uint16), "doy": doy, "cloud": cloud, "labels": labels, "bands": BANDS, **place}


def write(folder: Path, name: str, later: int, years: range) -> Path:
    """A list of scenes, a year each."""
    lines = []
    for year in years:
        np.savez(folder / f"{name}-{year}.npz", **scene(year + later, later))
        lines.append(json.dumps({"series": f"{name}-{year}.npz", "area": name, "year": year}))
    (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder / f"{name}.jsonl"


def run(*arguments: str) -> None:
    """One command of deftcore's."""
    print("$ deftcore", *arguments)
    if status := command(arguments):
        sys.exit(status)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"dim": 32, "heads": 2, "dim_head": 16, "temporal_depth": 1, "spatial_depth": 1}
    deftcore.TSViT(3, 12, 2, len(BANDS), **sizes).save_pretrained(folder / "new")
    there = write(folder, "there", 0, range(2016, 2019))
    here = write(folder, "here", 25, range(2018, 2021))
    shared = ["training.batch_size=8", "training.learning_rate=3e-3", f"data.bands={json.dumps(BANDS)}"]
    run(
        "train", "wheat-tsvit", f"model={folder / 'new'}", f"data.train={there}", f"output={folder / 'before'}",
        "method=full", "adapter={}", "data.head=", "data.classes={wheat: [1], maize: [2], grass: [3]}",
        "data.held_out_year=2018", "training.max_steps=150", "training.best_by=macro_f1", *shared,
    )  # fmt: skip
    run(
        "train", "wheat-tsvit", f"model={folder / 'before' / 'final'}", f"data.train={here}",
        f"output={folder / 'wheat'}", "data.classes={other: [2, 3], wheat: [1]}", "training.max_steps=60", *shared,
    )  # fmt: skip
    run("map", str(folder / "wheat"), str(folder / "here-2020.npz"), "--output", str(folder / "wheat-2020.tif"))


if __name__ == "__main__":
    main(Path(*sys.argv[1:] or ["runs/crop-maps"]))
