"""The recipes that come with deftcore, and how one is found and read: without PyTorch, so that a mistake shows at once.

What a recipe's fields mean, and whether they are right, `deftcore.training.recipe` knows.
"""

import re
from pathlib import Path
from typing import Any

from deftcore._names import near

_HERE = Path(__file__).parent


def bundled() -> dict[str, Path]:
    """The file of each recipe that comes with deftcore, by its name."""
    return {path.stem: path for path in sorted(_HERE.glob("*.yaml"))}


def summary(path: Path) -> str:
    """What a recipe says of itself: the first sentence behind the command that its first line is."""
    comments = re.match(r"#.*\n((?:#.*\n)*)", path.read_text(encoding="utf-8"))
    text = " ".join(line.lstrip("# ") for line in comments[1].splitlines()) if comments else ""
    return re.split(r"(?<=\.)\s", text, maxsplit=1)[0]


def find_recipe(recipe: str | Path) -> Path:
    """The file of a recipe: one that is there, or else a bundled one of that name.

    Args:
        recipe: a path, or such a name as `deft-lora`.

    Raises:
        FileNotFoundError: it is neither; with the bundled recipes that have a near name, or all of them.
    """
    path, known = Path(recipe), bundled()
    if path.is_file():
        return path
    if str(recipe) in known:
        return known[str(recipe)]
    if path.is_dir():
        raise FileNotFoundError(f"recipe: is a folder: {path}")
    what = "no such file" if path.suffix or len(path.parts) > 1 else "neither a file nor a recipe of deftcore"
    raise FileNotFoundError(f"recipe: {what}: {path}{near(path.stem, known)}")


def read_recipe(path: Path) -> dict[str, Any]:
    """The fields of a file as they stand there.

    Raises:
        ValueError: naming the file, when it is not text, not YAML or no mapping.
    """
    try:
        raw = read_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"recipe: {path}: {error}") from error
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise ValueError(f"recipe: {path}: must be a mapping, got {type(raw).__name__}")
    return raw


def read_yaml(text: str) -> Any:
    """The value that a text is in YAML.

    Raises:
        ValueError: saying where it is none.
    """
    import yaml  # here: names are listed where deftcore[train] is not installed

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark, what = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"is not YAML: {where}{what or str(error).splitlines()[0]}") from error
