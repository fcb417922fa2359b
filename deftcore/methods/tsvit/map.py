"""`deftcore map`: what grows where, of a whole scene, as a GeoTIFF and a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import AfterValidator
from torch import Tensor

from deftcore._progress import tracked
from deftcore.methods.tsvit.geotiff import no_class, writing_map
from deftcore.methods.tsvit.losses import predicted_classes
from deftcore.methods.tsvit.model import TSViTConfig
from deftcore.methods.tsvit.predicting import load_trained, predict
from deftcore.methods.tsvit.reading import Reading
from deftcore.methods.tsvit.scene import UNLABELLED, Scene
from deftcore.methods.tsvit.series import read_scene
from deftcore.methods.tsvit.tiling import mosaic, starts
from deftcore.training.device import choose_device
from deftcore.training.fields import Count, Needed, OutputFolder, Text, Whole, checked, mistakes
from deftcore.training.metrics import ConfusionCounts
from deftcore.training.pictures import draw_confusion, draw_maps

_SHOWN = 1500  # pixels a side of the picture, at most


def _tif(path: str) -> str:
    if Path(path).suffix.lower() not in (".tif", ".tiff"):
        raise ValueError("a file that ends in .tif")
    return path


@checked
def write_map(
    model: Needed,
    scene: Needed,
    output: Annotated[Needed, AfterValidator(_tif)],
    *,
    overlap: Whole | None = None,
    batch_size: Count = 4,
    device: Text = "auto",
) -> dict[str, Any]:
    """Writes the classes of a scene's pixels as a GeoTIFF on the scene's grid, and a picture beside it (.png), where
    the scene has labels next to them, with a table of counts (.confusion.png). Rows of tiles are read and predicted one
    after another, so that a scene need not fit into memory if it lies in GeoTIFFs.

    Args:
        model: the folder of a run, of its final/ or best/, or of a whole model.
        scene: an .npz or a folder of GeoTIFFs, see `deftcore.methods.tsvit.series`.
        overlap: of the tiles, in pixels; where they do, logits are averaged. None: a third of the model's side.
        batch_size: tiles at a time.

    Returns:
        output and picture, the map's size, pixels of each class and of none, and where there are labels the metrics.

    Raises:
        FileNotFoundError, ValueError: naming the argument, before anything is predicted.
    """
    target = Path(output)
    _check_place(target, Path(scene))
    where = choose_device(device)
    trained, config, reading = load_trained(model)
    place = read_scene(scene)
    size, step = config.image_size, config.image_size // 3 if overlap is None else overlap
    reading.check(place, config.channels)
    if size > min(place.height, place.width):
        raise ValueError(
            f"scene: {scene} is {place.height} x {place.width} pixels, smaller than the {size} that the model reads"
        )
    strips = len(starts(place.height, size, step))
    labels = _labels(place, reading)
    names = dict(enumerate(reading.classes))
    nothing = no_class(len(names))
    found = np.full((place.height, place.width), nothing, np.uint16)
    target.parent.mkdir(parents=True, exist_ok=True)
    predictor = _Predictor(trained.to(where), config, reading, place, batch_size, where)
    with (
        torch.no_grad(),
        writing_map(target, place.height, place.width, place.grid, names) as write,
    ):
        rows = mosaic(predictor, place.height, place.width, size, step)
        for top, logits in tracked(rows, "mapping", strips):
            part = slice(top, top + logits.shape[1])
            classes = predicted_classes(logits.unsqueeze(0))[0].cpu().numpy()
            found[part] = np.where(predictor.seen[part], classes, nothing)
            write(top, found[part])
    return _described(place, labels, names, np.where(found == nothing, UNLABELLED, found.astype(np.int64)), target)


def _check_place(output: Path, scene: Path) -> None:
    """Raises ValueError for a file that would be, or take the place of, a frame of its own scene, or cannot be one."""
    folder = scene.resolve()
    if folder.is_dir() and output.resolve().is_relative_to(folder):
        raise ValueError(f"output (--output): must lie outside the scene's folder, {folder}, got {output}")
    if output.is_dir():
        raise ValueError(f"output (--output): must be a file, {output} is a folder")
    if found := mistakes("output (--output)", OutputFolder, output.parent):
        raise ValueError(found[0])


class _Predictor:
    """Logits of the tiles of one row of tiles.

    Args:
        scene: that they are of; `seen` [H, W] tells which of its pixels were ever usable, as far as it was read.
    """

    def __init__(
        self, model: Any, config: TSViTConfig, reading: Reading, scene: Scene, batch_size: int, device: torch.device
    ) -> None:
        self.model, self.config, self.reading, self.scene = model, config, reading, scene
        self.batch_size, self.device = batch_size, device
        self.seen = np.zeros((scene.height, scene.width), bool)

    def __call__(self, top: int, lefts: list[int]) -> Tensor:
        size, rows = self.config.image_size, slice(top, top + self.config.image_size)
        strip = self.reading.window(self.scene, rows)
        self.seen[rows] = strip.usable.any(0)
        usable = torch.from_numpy(strip.usable)
        x, doy = self.reading.numbers(torch.from_numpy(strip.images), usable), torch.tensor(self.scene.doy)
        found = []
        for i in range(0, len(lefts), self.batch_size):
            part = [slice(left, left + size) for left in lefts[i : i + self.batch_size]]
            batch = {
                "x": torch.stack([x[..., columns] for columns in part]),
                "usable": torch.stack([usable[..., columns] for columns in part]),
                "doy": doy.expand(len(part), -1),
            }
            batch = {name: value.to(self.device) for name, value in batch.items()}
            found.append(predict(self.model, batch, self.reading, self.config.patch_size).cpu())
        return torch.cat(found)


def _labels(scene: Scene, reading: Reading) -> np.ndarray | None:
    """Classes of the whole scene as it says them, int64 [H, W]; raises as `Reading.targets`."""
    codes = scene.pixels.labels(slice(0, scene.height), slice(0, scene.width))
    return None if codes is None else reading.targets(codes, scene.where)


def _described(
    scene: Scene, labels: np.ndarray | None, classes: Mapping[int, str], found: np.ndarray, output: Path
) -> dict[str, Any]:
    """The map's picture, and what the command tells of it.

    Args:
        labels, found: int64 [H, W], UNLABELLED where nothing is known or was seen.
    """
    picture, table = output.with_suffix(".png"), output.with_suffix(".confusion.png")
    names = list(classes.values())
    result: dict[str, Any] = {
        "output": str(output), "picture": str(picture), "height": scene.height, "width": scene.width,
        "pixels": {name: int((found == number).sum()) for number, name in enumerate(names)},
        "unseen": int((found == UNLABELLED).sum()),
    }  # fmt: skip
    maps = {"predicted": found}
    if labels is not None:
        known = torch.from_numpy((labels != UNLABELLED) & (found != UNLABELLED))
        counts = ConfusionCounts(names).add(torch.from_numpy(labels), torch.from_numpy(found), known)
        draw_confusion(counts, table)
        maps = {"labels": labels, **maps}
        result |= {"confusion": str(table), "metrics": counts.to_dict()}
    every = max(1, -(-max(found.shape) // _SHOWN))
    draw_maps({name: values[::every, ::every] for name, values in maps.items()}, picture, classes=names)
    return result
