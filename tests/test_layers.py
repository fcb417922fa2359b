"""The house stands on its layers: no import up, none sideways between rooms, no circle, no private name from afar."""

import ast
from functools import cache
from pathlib import Path

import deftcore

PACKAGE = Path(deftcore.__file__).parent
# Lowest first: a file may import from its own layer and from those before it.
LAYERS = (
    "_C",
    "_versions",
    "_files",
    "_names",
    "_processes",
    "_progress",
    "recipes",
    "ops",
    "nn",
    "models",
    "training",
    "methods",
    "cli",
    "__main__",
)
COMMON_ROOM = "lora"  # which the other rooms of methods/ may use


@cache
def modules():
    """Every module of the package, by name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = ["deftcore", *path.relative_to(PACKAGE).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports():
    """(module, imported module, imported name or "", at import time) of every import, those inside functions too."""
    return list(found_imports(modules()))


def found_imports(known):
    for module, path in known.items():
        tree = ast.parse(path.read_text())
        deferred = {id(n) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.If)) for n in ast.walk(f)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "deftcore":
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    target, name = (full, "") if full in known else (node.module, alias.name)
                    yield module, target, name, id(node) not in deferred
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] == "deftcore":
                        yield module, alias.name, "", id(node) not in deferred


def layer_of(module):
    part = module.split(".")[1] if "." in module else ""
    return LAYERS.index(part) if part else -1


def room_of(module):
    parts = module.split(".")
    return parts[2] if parts[1:2] == ["methods"] and len(parts) > 2 else ""


def test_imports_point_down():
    """`deftcore/__init__.py` alone names what stands above it, and loads it on first use."""
    found = [(a, b) for a, b, _, _ in imports() if a != "deftcore" and layer_of(b) > layer_of(a)]
    assert not found


def test_no_import_between_rooms():
    found = [
        (a, b)
        for a, b, _, _ in imports()
        if room_of(a) and room_of(b) and room_of(a) != room_of(b) and room_of(b) != COMMON_ROOM
    ]
    assert not found


def test_no_circles():
    """Imports inside functions count: a circle that is opened late is a circle still."""
    known = modules()
    below = {module: set() for module in known}
    for a, b, _, _ in imports():
        if a != "deftcore" and b in known and a != b and not a.startswith(f"{b}."):
            below[a].add(b)
    while free := [module for module, others in below.items() if not others & below.keys()]:
        for module in free:
            del below[module]
    assert not below


def test_no_private_name_from_afar():
    """A leading underscore ends at its file, for a name, and at its package, for a module."""
    found = []
    for a, b, name, _ in imports():
        private = name.startswith("_") and not name.startswith("__") and name != "_C"
        parts = b.split(".")
        hidden = [i for i, part in enumerate(parts) if part.startswith("_") and part != "_C" and i > 1]
        if private or any(not a.startswith(".".join(parts[:i])) for i in hidden):
            found.append((a, b, name))
    assert not found
