"""`deftcore map`."""

import click

from deftcore.cli import shared


@shared.command(name="map", example="deftcore map runs/wheat-tsvit scenes/beqaa-2020 --output wheat-2020.tif")
@click.argument("model", metavar="MODEL_OR_RUN")
@click.argument("scene")
@click.option("--output", default="map.tif", help="GeoTIFF to write; a picture stands beside it.")
@click.option("--overlap", type=int, show_default="a third of a tile", help="Pixels that tiles share.")
@click.option("--batch-size", default=4, help="Tiles at a time.")
@shared.device_option()
def map_(
    model: str, scene: str, output: str, overlap: int | None, batch_size: int, device: str, as_json: bool
) -> None:  # fmt: skip
    """Map a scene: which class grows on each pixel.

    MODEL_OR_RUN is the folder of a run on the task `crops`, of its final/ or best/, or of a TSViT; SCENE an .npz or a
    folder of GeoTIFFs, a file per date.
    """
    shared.hush()
    from deftcore.methods.tsvit.map import write_map

    result = write_map(model, scene, output, overlap=overlap, batch_size=batch_size, device=device)
    share = 100 / (result["height"] * result["width"])
    lines = [f"{name}: {share * count:.1f} %" for name, count in result["pixels"].items()]
    if result["unseen"]:
        lines.append(f"without data: {share * result['unseen']:.1f} %")
    if "metrics" in result:
        names = ("accuracy", "mean_iou", "macro_f1")
        lines += [f"{name}: {value:.4f}" for name in names if (value := result["metrics"][name]) is not None]
    shared.show(as_json, result, [*lines, f"map: {result['output']}", f"picture: {result['picture']}"])
