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


def test_costs_are_of_steps_and_then_of_peaks(evidence, folder, tmp_path, monkeypatch):
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


def test_pages_tell_what_the_runs_say(evidence, tmp_path, monkeypatch):
    s2ft, _, qlora = evidence
    from bench.evidence import qlora_page, report, s2ft_page

    for module in (report, qlora_page, s2ft_page):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "_claims", dict)
    assert s2ft_page.page() == qlora_page.page() == ""
    results = s2ft.Results(tmp_path / "s2ft.jsonl")
    results.add({"kind": "about", "machine": "a machine", "versions": {}})
    for name in s2ft.SETS:
        results.add({"kind": "untrained", "set": name, "loss": 3.0})
        for seed in (0, 1):
            for side, loss in (("S2FT", 1.5), ("LoRA", 2.0)):
                told = {"loss": loss + seed, "forgot": 0.1, "forgot_reviews": 0.2, "forgot_task": 0.3, "trained": 1000}
                results.add({"kind": "run", "set": name, "side": side, "seed": seed, "rate": 1e-3, **told})
    other = s2ft.Results(tmp_path / "spectral.jsonl")
    for side in ("LoRA", "full", "KaSA"):  # those of LoRA are here
        other.add({"kind": "run", "set": "gsm8k", "side": side, "seed": 0, "rate": 1e-4, "loss": 1.75})
    forms = {form: {"gsm8k": {"loss": loss, "exact": 0.5}, "e2e_nlg": {"loss": loss, "bleu": 40.0}}
             for form, loss in (("alone", 1.0), ("fused", 1.25), ("mixture", 1.0))}  # fmt: skip
    results.add({"kind": "fused", "set": "both", "side": "S2FT", "seed": 0, "channels": 8, "shared": 2, **forms})
    step = {"1": {"S2FT": {"seconds": 0.5, "spread": 0.1}, "LoRA": {"seconds": 0.75, "spread": 0.1}}}
    cost = {"about": {"machine": "a machine"}, "threads": 1, "step": step, "peak_mb": {"1": {"S2FT": 5.0, "LoRA": 6.0}}}
    (tmp_path / "s2ft_batches.json").write_text(json.dumps(cost))
    compared = {"ours": "S2FT", "other": "LoRA", "measure": "loss"}
    for said, right in (("better", True), ("worse", False)):
        claim = {"text": "S2FT is ahead.", **compared, "verdicts": {"gsm8k": said}}
        monkeypatch.setattr(report, "_claims", lambda claim=claim: {"s2ft": [claim]})
        if right:
            assert "- S2FT is ahead." in s2ft_page.page()
        else:
            with pytest.raises(ValueError, match=r"claim: 'S2FT is ahead\.' needs 'worse' on gsm8k"):
                s2ft_page.page()
    monkeypatch.setattr(report, "_claims", dict)
    page = s2ft_page.page()
    assert "- S2FT against LoRA: loss -0.500 (better in all 2 seeds)" in page
    assert "| S2FT | 1 | 1.000 | +0.250 | +0.000 | 1.000 | +0.250 | +0.000 | 25% |" in page
    assert "| S2FT | 50% | 50% | 50% | 40.0 | 40.0 | 40.0 |" in page
    assert "| full | 1 | 0.0001 |  | 1.750 |" in page
    assert "KaSA" not in page
    assert "1.750 (" not in page
    assert "| LoRA | 750 ms | 10% | 6 MB |" in page
    results = qlora.Results(tmp_path / "qlora.jsonl")
    results.add({"kind": "about", "machine": "a machine", "versions": {}})
    for form, loss, size in (("float32", 2.0, 4e8), ("FP4", 2.5, 1e8)):
        results.add({"kind": "base", "set": "e2e_nlg", "side": form, "loss": loss, "bytes": size})
    for seed in (0, 1):
        losses = {"loss": 1.0, "sixteen": 1.0 + seed, "four": 1.5, "original": 1.25, "kept": 0.5}
        sizes = {"bytes": 1e8, "sixteen_bytes": 2e8, "four_bytes": 1e8}
        results.add({"kind": "run", "set": "e2e_nlg", "side": "NF4, double", "seed": seed, **losses, **sizes})
    page = qlora_page.page()
    assert "| FP4 | 2.500 (+25.0%) |  | 100 MB |" in page
    assert "| NF4, double | 2 | 1.000 (1.000 to 1.000) | 1.500 (1.000 to 2.000) | 1.500 (1.500 to 1.500) |" in page
    assert "| NF4, double | 100 MB | 200 MB | 100 MB |" in page
    for module in (s2ft_page, qlora_page):
        module.draw(tmp_path / "picture.png")
        assert (tmp_path / "picture.png").stat().st_size > 1000
        (tmp_path / "picture.png").unlink()
