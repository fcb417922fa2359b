"""bench/evidence/s2ft and qlora: their sides on small random models, adapters fused and served, pages."""

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from test_evidence import load_texts

COLOURS = ("red", "blue")


@pytest.fixture(scope="module")
def evidence():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1])
        from bench.evidence import fused, qlora, s2ft

        yield s2ft, fused, qlora


@pytest.fixture
def folder(evidence, tmp_path, monkeypatch):
    """Two sets in the place of the real ones, and a rate for each side."""
    s2ft, fused, _ = evidence
    from bench.evidence import measures
    from bench.evidence.models import Base
    from bench.evidence.runs import Results
    from bench.evidence.sets import Spec

    targets = ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
    base = Base("texts", targets, "CAUSAL_LM", cache(load_texts), frozen=True)
    for name in (*s2ft.SETS, "mr_sentiment", "qnli"):
        (tmp_path / name).mkdir()
        rows = [{"mr": COLOURS[i % 2], "ref": f"{COLOURS[(i + (name == 'gsm8k')) % 2]} is a colour .",
                 "sentence": f"{COLOURS[i % 2]} is ."} for i in range(24)]  # fmt: skip
        for part in ("train", "test", "validation"):
            (tmp_path / name / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        spec = Spec(
            name, base, "test", lambda row: (row["mr"], " " + row["ref"]), batch_size=4, steps=2, tries=1, tuning=4,
            test=6, generated=(2, 3), references=lambda rows: {"red": ["7"], "blue": ["8"]},
        )  # fmt: skip
        monkeypatch.setitem(s2ft.SPECS, name, spec)
    for module in (measures, fused):  # BLEU is a package of its own
        monkeypatch.setattr(module, "graded", lambda data, texts: {"exact": float(len(texts))})
    for name in ("S2FT", "SAME"):
        side = getattr(s2ft, name)
        monkeypatch.setattr(s2ft, name, replace(side, options=side.options | {"channel_ratio": 0.25}))
    monkeypatch.setattr(s2ft, "FUSED", (s2ft.S2FT, s2ft.SAME, s2ft.LORA_SIDE))
    monkeypatch.setattr(s2ft, "SEEDS", (0,))
    tried = Results(tmp_path / "spectral.jsonl")
    for name in ("LoRA", "full"):
        tried.add({"kind": "try", "set": "e2e_nlg", "side": name, "rate": 1e-2, "tuning_loss": 1.0})
    return tmp_path


def data_of(module, folder):
    from bench.evidence.sets import Data

    return {name: Data(module.SPECS[name], folder) for name in module.SETS}


def test_all_runs_come_once_and_tasks_have_channels_of_their_own(evidence, folder):
    s2ft, *_ = evidence
    s2ft.run_all(folder, folder, s2ft.SETS, [0], math.inf)
    results = s2ft.Results(folder / "s2ft.jsonl")
    entries = results.entries()
    found = sorted((e["kind"], e.get("set"), e.get("side")) for e in entries if e["kind"] in ("run", "fused"))
    assert found == sorted(
        [("run", name, side) for name in s2ft.SETS for side in ("S2FT", "LoRA", "full", "DoRA")]
        + [("run", "e2e_nlg", "S2FT, same channels")]
        + [("fused", "both", side.name) for side in s2ft.FUSED]
    )
    for entry in results.find(kind="run"):
        assert all(math.isfinite(entry[key]) for key in ("loss", "forgot", "forgot_reviews", "forgot_task"))
    apart, same, lora = (results.find(kind="fused", side=side.name)[0] for side in s2ft.FUSED)
    assert (apart["shared"], same["shared"], "shared" in lora) == (0, same["channels"], False)
    assert apart["channels"] == 2 * same["channels"]
    for each in (apart, same, lora):
        assert {name: each["mixture"][name]["exact"] for name in s2ft.SETS} == dict.fromkeys(s2ft.SETS, 2)
        for name in s2ft.SETS:
            assert each["mixture"][name]["loss"] == pytest.approx(each["alone"][name]["loss"], rel=0.02)
            assert set(each["mixture"][name]) == set(each["fused"][name]) == set(each["alone"][name])
    s2ft.run_all(folder, folder, s2ft.SETS, [0], math.inf)
    assert results.entries() == entries


def test_adapters_of_an_earlier_call_are_made_again(evidence, folder):
    s2ft, *_ = evidence
    data = data_of(s2ft, folder)
    results, tried = (s2ft.Results(folder / f"{name}.jsonl") for name in ("s2ft", "spectral"))
    results.add({"kind": "try", "set": "e2e_nlg", "side": "S2FT", "rate": 1e-2, "tuning_loss": 1.0})
    grids = [s2ft.Grid(results, tried, data, {}) for _ in range(2)]
    for name in data:
        results.add(grids[0].untrained(name))
        grids[0].run(s2ft.with_channels(s2ft.S2FT, data[name], 0), data[name], 0)
    job = s2ft.Job("fused", "both", s2ft.S2FT, 0)
    kept, again = ({k: v for k, v in grid.fuse(job).items() if k != "seconds"} for grid in grids)
    assert kept == again


def test_rows_of_a_mixture_use_their_own_adapter(evidence, folder):
    """Against each task's adapter added to the weights of a float64 copy."""
    s2ft, fused, _ = evidence
    data = data_of(s2ft, folder)
    torch.manual_seed(0)
    adapters = {
        name: {
            f"model.layers.0.self_attn.{part}_proj": fused.LowRankDelta(torch.randn(2, 16), torch.randn(16, 2), 0.5)
            for part in ("q", "o")
        }
        for name in data
    }
    served = fused.serve(data["gsm8k"].model().eval(), adapters)
    found = fused.mixed_losses(served, data, rows=3)
    for name, each in data.items():
        model = fused.put_on(each.model().double(), adapters[name])
        assert found[name] == pytest.approx(fused.score(model, each, each.test)["loss"], rel=1e-5)


def test_costs_are_of_a_batch_size_a_call(evidence, folder, tmp_path, monkeypatch):
    s2ft, *_ = evidence
    monkeypatch.setattr(s2ft, "BATCHES", (1,))
    monkeypatch.setattr(s2ft, "COSTED", (s2ft.S2FT, s2ft.LORA_SIDE))
    s2ft.measure(folder, tmp_path / "cost.json")
    found = json.loads((tmp_path / "cost.json").read_text())
    assert found["step"]["1"]["S2FT"]["seconds"] > 0
    assert not found["peak_mb"]
    monkeypatch.setattr(s2ft.cost, "peaks", lambda module, pairs, folder: {"1": {side: 1.0 for _, side in pairs}})
    s2ft.measure(folder, tmp_path / "cost.json")
    assert json.loads((tmp_path / "cost.json").read_text())["peak_mb"] == {"1": {"S2FT": 1.0, "LoRA": 1.0}}


def test_every_form_of_a_quantised_base_is_measured(evidence, folder, monkeypatch):
    *_, qlora = evidence
    monkeypatch.setattr(qlora, "BASES", {name: qlora.BASES[name] for name in ("float32", "NF4, double", "FP4")})
    qlora.run_all(folder, folder, ["e2e_nlg"], [0], math.inf)
    results = qlora.Results(folder / "qlora.jsonl")
    bases = {each["side"]: each for each in results.find(kind="base")}
    numbers = sum(p.numel() for p in load_texts(0)[0].parameters())  # a tied head counts once
    assert bases["float32"]["bytes"] == 4 * numbers
    assert len({each["loss"] for each in bases.values()}) == 3
    runs = {each["side"]: each for each in results.find(kind="run")}
    assert list(runs) == ["float32", "NF4, double", "NF4"]
    for name, each in runs.items():
        assert all(math.isfinite(each[key]) for key in ("loss", "sixteen", "four"))
        assert each["sixteen_bytes"] == 2 * numbers
        assert ("kept" in each) == ("original" in each) == (name != "float32")
    qlora.run_all(folder, folder, ["e2e_nlg"], [0], math.inf)
    assert len(results.entries()) == 1 + 3 + 3
