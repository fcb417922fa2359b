"""A room of methods/ is a place to read: a page with paper, equations, example and limits, and small files.

The examples of the pages run in test_docs.py.
"""

import ast
import re
from pathlib import Path

import pytest

import deftcore

PACKAGE = Path(deftcore.__file__).parent
ROOMS = sorted(path.parent for path in PACKAGE.glob("methods/*/__init__.py"))


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_the_page_of_a_room(room):
    page = ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or ""
    assert re.search(r"arXiv\s\d{4}\.\d{5}", page)
    assert re.findall(r"^## (.*)", page, flags=re.MULTILINE) == [
        "Equations", "Example", "Where things are", "Costs and limits",
    ]  # fmt: skip
    assert "```python\n" in page
    named = re.findall(r"`([\w./-]+\.(?:py|cpp|cu)|[\w-]+/[\w./-]+)`", page.partition("## Where things are")[2])
    for path in named:
        assert (PACKAGE.parent / path if "/" in path else room / path).exists(), path
    own = {path.name for path in room.glob("*.py")} - {"__init__.py"}
    assert own <= set(named), "every file of the room has its line in the table"


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_files_of_a_room_are_short(room):
    long = [path.name for path in room.glob("*.py") if len(path.read_text().splitlines()) > 400]
    assert not long
