"""What the site (mkdocs.yml) makes from the code: a page a method, recipes, commands; and examples in docstrings."""

import ast
import dataclasses
import importlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]*)(#[^)]*)?\)")


def rooms() -> dict[str, str]:
    """The docstring of each room of deftcore/methods, by the room's name."""
    found = {}
    for path in sorted((ROOT / "deftcore/methods").glob("*/__init__.py")):
        found[path.parent.name] = ast.get_docstring(ast.parse(path.read_text())) or ""
    return found


def method_page(room: str, text: str) -> str:
    """A room's docstring under its title, which is what stands before the first colon."""
    title, _, rest = text.partition(":")
    return f"# {title}\n\n{rest.strip().capitalize()[:1]}{rest.strip()[1:]}\n\nCode: `deftcore/methods/{room}/`.\n"


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def families() -> str:
    """The table of architectures, as `deftcore.models.families` has it, and which methods serve each."""
    from deftcore.models.families import describe
    from deftcore.training.registry import uses

    def cell(row: dict[str, Any], use: str) -> str:
        if use in row["refused"]:
            return f"no: {row['refused'][use]}"
        return f"yes; {row['remarks'][use]}" if use in row["remarks"] else "yes"

    columns = uses()

    return "\n\n".join([
        "# Architectures",
        "By Transformers' `model_type`. Where a method does not serve an architecture, the reason stands there. MLPs "
        "of an architecture that is not listed are found by their form. `deftcore info --models` prints the table with "
        "the names of all parts.",
        table(["", *columns], ([row["model_type"], *(cell(row, use) for use in columns)] for row in describe(columns))),
    ])  # fmt: skip


def recipes() -> str:
    from deftcore.recipes import bundled
    from deftcore.training.registry import all_methods, all_sections

    records = [*all_methods(), *all_sections()]
    lines = [
        "# Recipes",
        "What `method:` may name, and the sections that add a loss to any of them:",
        table(["", "", "source", "needs"], ([f"`{r.name}`", r.summary, r.paper, r.needs] for r in records)),
        "Those that come with deftcore, by their names: each starts with the command that runs it. `KEY=VALUE` behind "
        "it changes any field, `training.max_steps=100` for example; your own file needs only the fields that differ "
        "from the defaults.",
    ]
    for name, path in bundled().items():
        lines += [f"## {name}", f"```yaml\n{path.read_text().strip()}\n```"]
    return "\n\n".join(lines)


def commands() -> str:
    """The help of `deftcore` and of each of its commands."""
    import click

    from deftcore.cli.main import app

    top = click.Context(app, info_name="deftcore", **app.context_settings)
    lines = ["# Command line", f"```text\n{app.get_help(top)}\n```"]
    for name in app.list_commands(top):
        command = app.commands[name]
        with click.Context(command, info_name=name, parent=top, **command.context_settings) as context:
            lines += [f"## deftcore {name}", f"```text\n{command.get_help(context)}\n```"]
    return "\n\n".join(lines)


def names_of(match: re.Match[str]) -> str:
    """An entry for each public name of a module, where it is defined."""
    module = importlib.import_module(match[1])
    objects = {name: getattr(module, name) for name in sorted(module.__all__, key=str.lower)}
    options = "\n    options: {show_root_heading: true, show_root_full_path: false}"
    return "\n\n".join(f"::: {it.__module__}.{name}{options}\n\n{fields_of(it)}" for name, it in objects.items())


def fields_of(config: Any) -> str:
    """A table of a PEFT config's own fields; their meaning stands in their metadata."""
    if not (dataclasses.is_dataclass(config) and any("help" in each.metadata for each in dataclasses.fields(config))):
        return ""
    own = [each for each in dataclasses.fields(config) if each.name in vars(config)["__annotations__"] and each.init]
    rows = ([f"`{f.name}`", f"`{f.default!r}`" if f.default is not dataclasses.MISSING else "",
             str(f.metadata.get("help", ""))] for f in own)  # fmt: skip
    return table(["field", "default", ""], rows)


# ---------------------------------------------------------------------------- MkDocs' hooks


def on_config(config: MkDocsConfig) -> None:
    (methods,) = (entry for entry in config.nav or [] if "Methods" in entry)
    methods["Methods"] = [f"methods/{room}.md" for room in rooms()]


def on_files(files: Files, config: MkDocsConfig) -> None:
    pages = {f"methods/{room}.md": method_page(room, text) for room, text in rooms().items()}
    pages |= {
        "recipes.md": recipes(),
        "families.md": families(),
        "commands.md": commands(),
        "index.md": (ROOT / "README.md").read_text(),
    }
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    for picture in (ROOT / "bench/results").glob("*.png"):
        files.append(File.generated(config, f"pictures/{picture.name}", abs_src_path=str(picture)))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of the repository as links of the site, or, to what is no part of it, as paths."""
    here = Path(page.file.src_path).parent
    folder = ROOT if page.file.src_path == "index.md" else ROOT / "docs" / here
    if page.file.src_path.startswith("methods/"):
        folder = ROOT / "deftcore" / Path(page.file.src_path).with_suffix("")

    def link(match: re.Match[str]) -> str:
        picture, text, target, anchor = match.groups()
        if not target or "://" in target:
            return match.group()
        full = Path(os.path.normpath(folder / target)).relative_to(ROOT)
        match full.parts:
            case ("docs", *rest):
                to = Path(*rest)
            case ("bench", "results", name) if full.suffix == ".png":
                to = Path("pictures", name)
            case ("deftcore", "methods", room, "__init__.py"):
                to = Path("methods", f"{room}.md")
            case ("deftcore", "models", "families.py"):
                to = Path("families.md")
            case ("deftcore", "recipes", _) if full.suffix == ".yaml":
                to, anchor = Path("recipes.md"), f"#{full.stem}"
            case _:
                return f"`{full}`" if text.strip("`") in (target, full.stem) else f"{text} (`{full}`)"
        return f"{picture}[{text}]({os.path.relpath(to, here)}{anchor or ''})"

    return LINK.sub(link, re.sub(r"^::: names of (\S+)$", names_of, markdown, flags=re.MULTILINE))


# ---------------------------------------------------------------------------- docstrings


class Examples(griffe.Extension):
    """Doctests in docstrings as code: from `>>>` to the next empty line."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            found = re.compile(r"^>>> .*?(?=\n\n|\Z)", re.MULTILINE | re.DOTALL)
            obj.docstring.value = found.sub(lambda m: f"```pycon\n{m.group()}\n```", obj.docstring.value)
