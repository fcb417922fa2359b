"""A room of methods/ is a place to read: a page with paper, equations, example and limits, and small files.

And a room plugs into the common one, which does not know it. The examples of the pages run in test_docs.py.
"""

import ast
import re
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import deftcore
from deftcore.methods.lora import patch as patching
from deftcore.nn.verify import Case, run_linear
from deftcore.nn.verify import test_bed as bed

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


# ---------------------------------------------------------------------------- a room's way in


class Plain(nn.Linear):
    """Some library's layer."""

    def forward(self, x):
        return super().forward(x)


class Fused(Plain):
    """A room's replacement."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


class Wrong(Plain):
    """One that a proof refuses."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("fused", [Fused, Wrong])
def test_a_room_registers_its_replacements(fused, monkeypatch, tmp_path):
    """Asked once its library is in use, never before, and proved as any other."""

    def replacement(module, parent):
        if type(module) not in (Plain, fused):
            return ""
        return fused, lambda: [Case("toy", module, partial(bed, module), torch.float32, run_linear)]

    def unpatch_module(module):
        module.__class__ = Plain if type(module) is fused else type(module)

    monkeypatch.setenv("DEFTCORE_CACHE", str(tmp_path))
    monkeypatch.setattr(patching, "_REGISTERED", dict(patching._REGISTERED))
    home = ModuleType("toy_room")
    home.replacement, home.unpatch_module = replacement, unpatch_module
    monkeypatch.setitem(sys.modules, "toy_room", home)
    patching.register_replacements("toy layer", "toy_room", ["toy_library"])
    model = nn.Sequential(Plain(8, 4))
    with pytest.raises(ValueError, match="no Mamba mixer and no toy layer"):
        deftcore.patch(model)
    monkeypatch.setitem(sys.modules, "toy_library", home)
    if fused is Wrong:
        with pytest.warns(UserWarning, match="keep their own forward: 0 .*differs by"):
            deftcore.patch(model)
        assert type(model[0]) is Plain
        return
    assert type(deftcore.patch(model)[0]) is Fused
    assert type(deftcore.unpatch(model)[0]) is Plain


class Tuned(nn.Module):
    """A room's layer over a 4-bit one, as `merge` asks for it."""

    merged = False

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.update = torch.randn(4, 64)

    def get_base_layer(self):
        return self.base_layer

    def dense_update(self):
        return self.update


def test_a_layer_says_its_update_to_merge():
    torch.manual_seed(0)
    model = deftcore.quantize(nn.Sequential(nn.Linear(64, 4)), skip=())
    decoded = model[0].quantized.dequantize()
    model[0] = tuned = Tuned(model[0])
    model.merge_and_unload = lambda: model
    tuned.merged = True
    with pytest.raises(ValueError, match="0: is merged already; unmerge first"):
        deftcore.merge(model)
    tuned.merged = False
    deftcore.merge(model)
    assert torch.equal(model[0].weight, decoded + tuned.update)
    assert list(model.deftcore_merge) == ["0"]
