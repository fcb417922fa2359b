"""`deftcore train`."""

from pathlib import Path

import click

from deftcore._processes import is_first_process
from deftcore.cli import shared
from deftcore.recipes import bundled, find_recipe, read_recipe


@shared.command(
    example="deftcore train deft-lora model=./my-llama data.train=train.jsonl output=runs/deft-lora "
    "training.max_steps=100",
    below=f"Recipes: {', '.join(bundled())}.",
)
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--restart", is_flag=True, help="Forget the run that the output folder holds.")
@shared.device_option("", shown="the recipe's")
def train(recipe: str, overrides: tuple[str, ...], restart: bool, device: str, as_json: bool) -> None:
    """Train from a recipe.

    RECIPE is a YAML file, or the name of a recipe that comes with deftcore; KEY=VALUE sets one of its fields. A run
    that was interrupted continues from its newest checkpoint.
    """
    file = find_recipe(recipe)
    read_recipe(file)  # what is wrong with the file itself shows before the imports, which take seconds
    shared.hush()
    from deftcore.training.recipe import load_recipe
    from deftcore.training.run import train_recipe

    loaded = load_recipe(file, [*overrides, *([f"device={device}"] if device else [])])
    try:
        result = train_recipe(loaded, resume=not restart)
    except KeyboardInterrupt as stop:
        raise click.Abort(*stop.args) from stop
    if not is_first_process():
        return
    value = result.to_dict()
    shown = {k: v for k, v in value.items() if isinstance(v, int | float) and k not in ("best_step", "best_metric")}
    over = "the last step's training tokens" if result.eval_loss is None else "the validation data"
    lines = [f"recipe: {file}"]  # of two that a name may mean, the one that was taken
    lines += [f"{k}: {v:.6g}" + (f" (over {over})" if k == "density" else "") for k, v in shown.items()]
    folder = Path(loaded.output)
    if result.best_step is not None:
        by = f"{loaded.training.best_by} {result.best_metric:.4g}, " if result.best_metric is not None else ""
        best = f"step {result.best_step}, {by}loss {result.best_eval_loss:.4g}"
        lines.append(f"best checkpoint at {folder / 'best'} ({best})")
    shared.show(as_json, value, [*lines, f"final: {folder / 'final'}"])
