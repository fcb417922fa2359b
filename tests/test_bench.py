"""Benchmarks run, and their tables have a row for each of their figures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("only", "asked"),
    [
        ("spectral", ("Natural GaLore", "a new subspace", "a KaSA layer", "`minor_subspace`", "BA-LoRA")),
        ("light_peft", ("Light-PEFT", "a step of Light-PEFT's estimation")),
        ("tsvit", ("TSViT",)),
        ("neighbours", ("`farthest_point_sample`", "`knn`")),
    ],
)
def test_families_of_methods(tmp_path, monkeypatch, only, asked):
    """At sizes for tests; which figures are short there says nothing."""
    out = tmp_path / "cpu.json"
    command = [sys.executable, "-m", "bench", "--only", only, "--quick", "--output", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(out.read_text())
    monkeypatch.syspath_prepend(ROOT)
    from bench import spectral, tables
    from bench.targets import AVX512, standing

    for family in spectral.FAMILIES if only == "spectral" else [only]:
        (table,) = (make for make in tables.FAMILIES.values() if make.__name__ == family)
        assert results[family]
        assert sum(block.count("\n") - 1 for block in table(results, AVX512)) == len(results[family])
    measured = {what for what, _, _, state in standing(results, AVX512) if state != "not measured"}
    assert all(any(what.startswith(name) for what in measured) for name in asked)
