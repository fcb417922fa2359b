"""What the documentation says holds: links lead somewhere, commands and examples run, tables are up to date."""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import tiny_batch, tiny_model
from test_mamba import model_of
from test_package import save_base

from deftcore._versions import TESTED
from deftcore.cli.main import app, main

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted(ROOT.glob("deftcore/methods/*/__init__.py")),
]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# What a command is given beside its words in a page, so that it takes a second or two; those not here are long.
TINY = {
    "train": ["training.max_steps=2", "data.max_length=16"],
    "density": ["--max-length", "16"],
    "export": [],
    "lyapunov": ["--steps", "0,1", "--max-length", "16"],
    "info": [],
    "methods": [],
}


def name_of(page):
    return str(page.relative_to(ROOT))


def text_of(page):
    """A page; of a room, its docstring."""
    text = page.read_text()
    return text if page.suffix == ".md" else ast.get_docstring(ast.parse(text)) or ""


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", text_of(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short():
    assert len(text_of(ROOT / "README.md").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            found = (page.parent / path) if path else page
            assert found.exists(), target
            assert not anchor or anchor in anchors(found), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_exist(page):
    """Those of the repository, and in a room's docstring files that stand there by their names alone."""
    text = text_of(page)
    named = re.findall(r"`((?:deftcore|csrc|tests|bench|examples|docs)/[\w./-]*)`", text)
    missing = [path for path in named if not (ROOT / path).exists()]
    if page.suffix == ".py":
        missing += [path for path in re.findall(r"`(\w+\.py)`", text) if not (page.parent / path).exists()]
    assert not missing


@pytest.mark.parametrize("room", [page for page in PAGES if page.suffix == ".py"], ids=name_of)
def test_a_room_has_its_page(room):
    """Title, source, equations, an example, where things are."""
    text = text_of(room)
    assert re.match(r"[\w ,0-9-]+: ", text)
    assert "arXiv" in text
    assert {"equations", "example", "where-things-are", "costs-and-limits"} <= anchors(room)
    assert "python" in [language for language, _ in FENCE.findall(text)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The models and data that the pages speak of."""
    root = tmp_path_factory.mktemp("docs")
    for name, model in (
        ("my-llama", tiny_model("llama")),
        ("my-mamba", model_of("mamba")),
        ("my-t5", tiny_model("t5")),
    ):
        (root / name).mkdir()
        save_base(root / name, model, **({"intermediate_size": 128} if name == "my-llama" else {}))
    for name in ("train", "test"):
        lines = [json.dumps({"text": "the quick brown fox jumps over the lazy dog. " * 8}) for _ in range(8)]
        (root / f"{name}.jsonl").write_text("\n".join(lines))
    return root


@pytest.mark.parametrize("page", [page for page in PAGES if FENCE.search(text_of(page))], ids=name_of)
def test_commands_and_examples_run(page, bases, tmp_path, monkeypatch):
    """In their order, in a folder of the page's own. `model`, `loader` and `batches` are the reader's."""
    monkeypatch.chdir(tmp_path)
    for path in bases.iterdir():
        (tmp_path / path.name).symlink_to(path)
    model, batches = (model_of("mamba") if "mamba" in name_of(page) else tiny_model("llama")), [tiny_batch("llama")] * 2
    names = {"torch": torch, "model": model, "batches": batches, "loader": batches}
    for language, block in FENCE.findall(text_of(page)):
        if language == "python":
            exec(compile(block, name_of(page), "exec"), names)
        elif language == "console":
            for line in re.findall(r"^\$ (.*)$", block, flags=re.MULTILINE):
                run(line)


def run(line):
    program, command, *words = shlex.split(line)
    assert program == "deftcore", line
    if command in TINY:
        assert main([command, *words, *TINY[command]]) == 0, line
    else:
        app.commands[command].make_context(command, words)  # which raises for words that it does not take


def test_install_commands_name_extras_that_there_are():
    table = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = re.findall(r"^(\w+) = ", table, flags=re.MULTILINE)
    for page in PAGES:
        for named in re.findall(r"pip install (?:-e )?'\.\[(\w+)\]'", text_of(page)):
            assert named in extras, f"{name_of(page)}: {named}"


def test_versions_and_environment_variables_are_those_of_the_code():
    text = text_of(ROOT / "docs" / "install.md")
    for name, tested in TESTED.items():
        ends = " to ".join(dict.fromkeys((tested.oldest, tested.newest)))
        assert f"| {name} | {tested.allowed} | {ends} |" in text
    read = re.compile(r"(?:environ\S*?|getenv|ENV)[(\[{]+\"?(DEFTCORE_\w+)")
    places = [
        *ROOT.glob("deftcore/**/*.py"),
        *ROOT.glob("csrc/*/*.cpp"),
        *ROOT.glob("tests/*.py"),
        *ROOT.glob("tests/emulator/*.cpp"),
        ROOT / "CMakeLists.txt",
    ]
    used = {name for path in places for name in read.findall(path.read_text())}
    assert used == set(
        re.findall(r"`(DEFTCORE_\w+)`", text.partition("## Environment variables")[2].partition("\n\n`torch")[0])
    )


def test_the_benchmarks_page_is_what_the_result_files_make(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from bench import tables

    assert tables.PAGE.read_text() == tables.page(), "run python -m bench.tables"


def test_what_misses_its_target_is_marked(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from bench.targets import AVX2, AVX512, standing

    rows = [{"activation": "relu", "dtype": dtype, "time_over_plain": time} for dtype, time in
            (("float32", 1.05), ("bfloat16", 1.2))]  # fmt: skip
    found = {what: state for what, _, _, state in standing({"act_density": rows}, AVX512)}
    (density,) = (state for what, state in found.items() if what.startswith("`act_density`"))
    assert density == "**short** in 1 of 2"
    assert {state for what, state in found.items() if not what.startswith("`act_density`")} == {"not measured"}
    assert [state for *_, state in standing({"act_density": rows[:1]}, AVX512)].count("met") == 1
    assert len(list(standing({}, AVX2))) != len(found)  # each kind of machine has its own
