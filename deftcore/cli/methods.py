"""`deftcore methods`."""

from typing import Any

from deftcore.cli import shared
from deftcore.recipes import bundled, summary


@shared.command(example="deftcore methods --json")
def methods(as_json: bool) -> None:
    """List the methods that a recipe can name.

    Each comes with its paper and what it needs. Below them stand the losses that a recipe adds to any method by a
    section of its own, as `deft: true`, the kinds of data, as `task: text`, and the recipes that come with deftcore,
    which `deftcore train` takes by name.
    """
    shared.hush()
    from deftcore.training.registry import all_methods, all_sections, all_tasks

    fields = ("name", "summary", "paper", "needs")
    tables: dict[str, list[dict[str, Any]]] = {
        title: [{name: getattr(record, name) for name in fields if hasattr(record, name)} for record in records]
        for title, records in (("methods", all_methods()), ("sections", all_sections()), ("tasks", all_tasks()))
    }
    tables["recipes"] = [
        {"name": name, "summary": summary(path), "file": str(path)} for name, path in bundled().items()
    ]
    width = max(len(entry["name"]) for table in tables.values() for entry in table)
    lines = []
    for title, table in tables.items():
        lines += [f"{title}:"] if table else []
        for entry in table:
            lines.append(f"  {entry['name']:{width}}  {entry['summary']}")
            lines += [f"  {'':{width}}  {name}: {entry[name]}" for name in ("paper", "needs") if entry.get(name)]
    shared.show(as_json, tables, lines)
