"""The recipes that come with deftcore: found by name anywhere, packed, right; and what is said of other names."""

import fnmatch
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import deftcore
from deftcore.cli.main import main
from deftcore.recipes import bundled, find_recipe, summary
from deftcore.training import load_recipe

ROOT = Path(__file__).parents[1]
NEEDED = ["model=m", "output=o", "data.train=t"]


@pytest.mark.parametrize("name", bundled())
def test_each_is_found_by_its_name(name, tmp_path, monkeypatch):
    """Each is of the method whose name it has, or of the one that makes what it is named after."""
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(name, NEEDED)
    assert recipe.deft.enabled == name.startswith("deft-")
    others = {"point-mae": "full", "wheat-tsvit": "lora", "classifier": "lora", "thresholds": "lora"}
    bare = name.removeprefix("deft-")
    assert others.get(bare, bare) == recipe.method.replace("bottleneck", "adapter")


@pytest.mark.parametrize("name", bundled())
def test_each_starts_with_its_command_and_says_what_it_is(name):
    first = bundled()[name].read_text().splitlines()[0]
    command = shlex.split(first.removeprefix("# "))
    assert command[:3] == ["deftcore", "train", name]
    load_recipe(name, command[3:])
    assert re.fullmatch(r"\S.{20,200}\.", summary(bundled()[name]))


def test_they_are_packed():
    """As pyproject.toml says; .ci/run asks a wheel."""
    (line,) = re.findall(r"^deftcore = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    files = [path for path in (ROOT / "deftcore" / "recipes").iterdir() if path.suffix not in (".py", "")]
    assert {path.stem for path in files} == bundled().keys()
    for path in files:
        inside = path.relative_to(ROOT / "deftcore").as_posix()
        assert any(fnmatch.fnmatch(inside, pattern) for pattern in json.loads(line)), inside


def test_a_file_comes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("kasa").mkdir()  # as a run's folder may be called
    assert find_recipe("kasa") == bundled()["kasa"]
    Path("s2ft").write_text("{model: m, output: mine, data: {train: t}}")
    assert load_recipe("s2ft").output == "mine"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("deft-lor", "recipe: neither a file nor a recipe of deftcore: deft-lor; did you mean deft-lora or deft-qlora"),
        ("nonsense", f"recipe: neither a file nor a recipe of deftcore: nonsense; known: {', '.join(bundled())}"),
        ("recipes/kasa.yaml", "recipe: no such file: recipes/kasa.yaml; did you mean kasa?"),
        ("list.yaml", "recipe: list.yaml: must be a mapping, got list"),
        ("torn.yaml", "recipe: torn.yaml: is not YAML: line 1, column "),
        ("folder", "recipe: is a folder: folder"),
    ],
)
def test_a_wrong_file_shows_at_once(recipe, message, tmp_path, monkeypatch):
    """Before PyTorch is imported, which takes seconds."""
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("list.yaml").write_text("- 1")
    Path("torn.yaml").write_text("a: [")
    script = "import sys; from deftcore.cli import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    path = [str(Path(deftcore.__file__).parents[1])]
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {path}; {script}", "train", recipe, *NEEDED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.stdout == "2 False\n"
    assert done.stderr.startswith(f"deftcore: {message}")
    assert done.stderr.count("\n") == 1


def test_the_commands_name_them(capsys):
    assert main(["train", "--help"]) == 0
    assert ", ".join(bundled()) in " ".join(capsys.readouterr().out.split())
    assert main(["methods", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["recipes"]
    assert {each["name"]: Path(each["file"]) for each in listed} == bundled()
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.partition("\nrecipes:\n")[2].splitlines()
    assert [line.split()[0] for line in lines] == list(bundled())
