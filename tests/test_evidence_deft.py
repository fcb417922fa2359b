"""bench/evidence/deft: every side trains a small encoder, thresholds leave out what is small, runs go on, a page."""

import json
import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from test_evidence import load_classes


@pytest.fixture(scope="module")
def deft():
    """The module, which no wheel holds."""
    from pathlib import Path

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1])
        from bench.evidence import deft

        yield deft


def load(classes):
    """With the pooler of the pre-trained one."""
    from bench.evidence.models import MeanPooler, tell_mask

    model, words = load_classes(classes)
    model.bert.pooler = MeanPooler()
    model.bert.register_forward_pre_hook(tell_mask, with_kwargs=True)
    return model, words


@pytest.fixture
def data(deft, tmp_path):
    from bench.evidence.models import Base
    from bench.evidence.sets import Data, Spec

    rows = [{"sentence": f"{['red', 'blue'][i % 2]} is a colour .", "label": i % 2} for i in range(24)]
    (tmp_path / "classes").mkdir()
    for part in ("train", "test"):
        (tmp_path / "classes" / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = Base("classes", (), "SEQ_CLS", cache(load), frozen=True)
    spec = Spec("classes", base, "test", lambda row: (row["sentence"],), classes=2, batch_size=4, steps=4, tuning=4,
                test=6)  # fmt: skip
    return Data(spec, tmp_path)


@pytest.mark.parametrize("index", range(15))
def test_every_side_trains_and_is_measured(deft, data, index):
    side = deft.SIDES[index]
    entry = deft.run(side, data, 0)
    assert json.loads(json.dumps(entry)) == entry
    assert all(
        math.isfinite(entry[key]) for key in ("loss", "accuracy", "matthews", "thresholded", "thresholded_coarse")
    )
    assert 0 <= entry["density_coarse"] <= entry["density"] <= 1
    assert entry["zeros"] == pytest.approx(1 - entry["density"])
    assert entry["zeros_before"] <= entry["zeros"]
    assert entry["energy"] == pytest.approx((1 + entry["density"]) / 2)
    assert ("gates" in entry) == side.name.endswith("ADA-DEFT")
    assert (entry["alpha"] > 0) == ("DEFT" in side.name)


def test_one_seed_is_one_run_and_the_loss_makes_it_sparser(deft, data):
    plain, dense = deft.SIDES[0], replace(deft.SIDES[1], alpha=20.0, rates=(1e-2,) * 3)
    data = replace(data, spec=replace(data.spec, steps=40))
    found = deft.run(dense, data, 0)
    again = deft.run(dense, data, 0)
    assert (found["loss"], found["density"]) == (again["loss"], again["density"])
    assert found["density_coarse"] < deft.run(plain, data, 0)["density_coarse"]


def test_a_threshold_leaves_out_what_is_small_and_goes_again(deft):
    model, words = load(2)
    model.eval()
    inputs = words(["red is a .", "blue"], return_tensors="pt", padding=True)
    seen = []
    handle = model.bert.encoder.layer[0].intermediate.register_forward_hook(lambda m, i, o: seen.append(o))
    before = model(**inputs).logits
    with deft.thresholded(model, 0.01) as (placed,):
        model(**inputs)
    after = model(**inputs).logits
    handle.remove()
    assert torch.equal(before, after)
    a, cut, _ = seen
    assert torch.equal(cut, torch.where(a.abs() > 0.01, a, torch.zeros_like(a)))
    kept = inputs["attention_mask"].bool()
    assert placed.seen == a[kept].numel()
    assert placed.active == int((a[kept].abs() > 0.01).sum())


def test_a_prefix_is_seen_by_the_encoder(deft, data):
    (side,) = (side for side in deft.SIDES if side.name == "prefix")
    model = side.make(data.model(), (), "SEQ_CLS").model.eval()
    batch = data.task.collate(data.test[:2])
    first = model(**batch).logits
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.mul_(5)
    assert not torch.allclose(first, model(**batch).logits)
    model(**batch).loss.backward()
    assert model.prompt_encoder["default"].embedding.weight.grad.abs().max() > 0


def test_missing_runs_are_added_and_a_part_can_be_chosen(deft, data, tmp_path, monkeypatch):
    from bench.evidence.runs import Results

    monkeypatch.setattr(deft, "SIDES", deft.SIDES[:2])
    monkeypatch.setattr(deft, "SWEPT", deft.SWEPT[:1])
    monkeypatch.setattr(deft, "data_of", lambda name, folder: data)
    monkeypatch.setattr(deft, "run", lambda side, data, seed: {"kind": "run", "set": data.spec.name, "side": side.name,
                                                               "seed": seed})  # fmt: skip
    results = Results(tmp_path / "deft.jsonl")
    present = results.add({"kind": "run", "set": "classes", "side": "LoRA", "seed": 1, "mark": 1})
    deft.run_all(results, tmp_path, ["classes"], [1], math.inf)
    assert [(each["side"], each["seed"]) for each in results.find(kind="run")] == [("LoRA", 1), ("LoRA + DEFT", 1)]
    assert results.find(kind="run")[0] == present
    assert not results.find(kind="sweep")
    deft.run_all(results, tmp_path, ["classes"], [0, 1], math.inf)
    assert len(results.find(kind="run")) == 4
    assert [each["side"] for each in results.find(kind="sweep")] == [deft.SWEPT[0].name]
    assert len(results.find(kind="about")) == 1


def test_a_page_says_what_was_reached(deft, tmp_path, monkeypatch):
    from bench.evidence import adapted, deft_page

    monkeypatch.setattr(adapted, "RESULTS", tmp_path)
    results = deft_page.DEFT.results
    results.add({"kind": "about", "machine": "a machine", "versions": {}})
    for side, density, accuracy in (("LoRA", 0.8, 0.9), ("LoRA + DEFT", 0.2, 0.895), ("LoRA + ADA-DEFT", 0.2, 0.88)):
        for seed in (0, 1):
            told = {"accuracy": accuracy, "thresholded": accuracy, "density": density, "trained": 1000, "train_s": 1.0,
                    "thresholded_coarse": accuracy - 0.01, "density_coarse": density / 2}  # fmt: skip
            results.add({"kind": "run", "set": "qnli", "side": side, "seed": seed, "rate": 1e-3, **told})
    page = deft_page.deft_section()
    assert "| LoRA + DEFT | +75.0% | +0.5% | yes | +75.0% | +1.5% | no |" in page
    assert "| LoRA + ADA-DEFT | +75.0% | +2.0% | no | +75.0% | +3.0% | no |" in page
    assert "evidence-deft-alpha.png" not in page
    for side in deft.SWEPT[:2]:
        told = {"density": 0.5, "thresholded": 0.9, "density_coarse": 0.2, "thresholded_coarse": 0.8}
        results.add({"kind": "sweep", "set": "qnli", "side": side.name, "seed": 0, **told})
    assert "evidence-deft-alpha.png" in deft_page.deft_section()
    deft_page.draw_sweep(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
