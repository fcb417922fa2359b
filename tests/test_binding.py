"""The compiled module's records: every field by name, and nothing else."""

import sys

import pytest

import deftcore
from deftcore.ops import kernels
from deftcore.ops.kernels import native

FIELDS = {"gate": 64, "up": 128, "a": 192, "rows": 1, "width": 8, "gate_stride": 8, "up_stride": 8, "dtype": 0,
          "activation": 4}  # fmt: skip


def test_fields_in_any_order():
    native.GatedAct(**FIELDS)
    assert native.GatedAct(**dict(reversed(FIELDS.items()))).up == 128
    record = native.GatedAct(**FIELDS)
    record.a = 2**63 + 1
    assert (record.gate, record.up, record.a) == (64, 128, 2**63 + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": None}, "rows cannot be None"),
        ({"rows": 1.5}, "rows cannot be 1.5"),
        ({"gate": -64}, "gate cannot be -64"),
        ({"gate": "64"}, "gate cannot be '64'"),
        ({"width": 2**64}, "width cannot be"),
    ],
)
def test_a_value_that_does_not_fit(change, message):
    with pytest.raises(TypeError, match=message):
        native.GatedAct(**(FIELDS | change))


def test_a_field_too_few_or_unknown():
    some = {name: value for name, value in FIELDS.items() if name != "width"}
    with pytest.raises(TypeError, match="takes its 9 fields by name"):
        native.GatedAct(**some)
    with pytest.raises(TypeError, match="needs width"):
        native.GatedAct(**some, widht=8)
    with pytest.raises(TypeError, match="9 by position"):
        native.GatedAct(*FIELDS.values())


def test_structs_inside():
    strides = (64, 1, 1, 1)
    conv = {"x": strides, "out": strides, "first": (0, 0, 0, 0), "weight": 64, "bias": 0, "sequence": 0, "batch": 0,
            "length": 1, "channels": 1, "width": 1, "dtype": 0, "silu": True}  # fmt: skip
    rest = {"grad_x": strides, "grad_first": strides, "grad_weight": 0, "grad_bias": 0}
    native.CausalConv1dBackward(forward=native.CausalConv1d(**conv), **rest)
    for wrong in (conv, native.GatedAct(**FIELDS)):
        with pytest.raises(TypeError, match="forward cannot be"):
            native.CausalConv1dBackward(forward=wrong, **rest)
    for wrong in ((64, 1, 1), [64, 1, 1, 1], (64, 1, 1, 1.5)):
        with pytest.raises(TypeError, match="out cannot be"):
            native.CausalConv1d(**(conv | {"out": wrong}))


def test_an_op_takes_its_own_record():
    with pytest.raises(TypeError, match="incompatible function arguments"):
        native.cpu.gated_act_backward(native.GatedAct(**FIELDS), 0)


def test_unbuilt_sources_are_named(tmp_path, monkeypatch):
    """Python takes a clone's sources before the installed package where it starts in the clone. A damaged module is not
    that."""
    package = tmp_path / "deftcore"
    package.mkdir()
    monkeypatch.setattr(kernels, "__file__", str(package / "ops" / "kernels.py"))
    monkeypatch.setitem(sys.modules, "deftcore._C", None)
    monkeypatch.delattr(deftcore, "_C")
    with pytest.raises(ImportError, match=r"_C is missing or unusable \(.*_C.*\); install the package again"):
        kernels._import_native()
    (tmp_path / "CMakeLists.txt").touch()
    found = f"_C is missing: Python found the source folder {package}"
    with pytest.raises(ImportError, match=rf"{found} on its path .*: pip install -e"):
        kernels._import_native()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImportError, match=rf"{found} in the current directory instead of an installed package\. Leave"):
        kernels._import_native()
    (package / "_C.cpython-311.so").touch()
    with pytest.raises(ImportError, match="is missing or unusable"):
        kernels._import_native()
