"""bench/evidence/thresholds: its sides on a small random model, the page and the picture of their runs."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import transformers
from test_evidence import SIZES, load_texts


@pytest.fixture(scope="module")
def evidence():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1])
        from bench.evidence import models, sets, thresholds, thresholds_page

        yield thresholds, thresholds_page, models, sets


@pytest.fixture
def data(evidence, tmp_path):
    _, _, models, sets = evidence
    rows = [{"mr": ["red", "blue"][i % 2], "ref": f"{['red', 'blue'][i % 2]} is a colour ."} for i in range(24)]
    (tmp_path / "texts").mkdir()
    for part in ("train", "test"):
        (tmp_path / "texts" / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    targets = ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
    base = models.Base("texts", targets, "CAUSAL_LM", cache(load_texts), frozen=True)
    spec = sets.Spec("texts", base, "test", lambda row: (row["mr"], " " + row["ref"]), batch_size=4, steps=2, tuning=4,
                     test=6)  # fmt: skip
    return sets.Data(spec, tmp_path)


def load_wide(classes):
    """Whose rows are whole blocks of 4 bits."""
    sizes = {"vocab_size": 9, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | sizes)).eval(), load_texts(None)[1]


def test_sides_run_and_the_page_tells(evidence, data, tmp_path, monkeypatch):
    thresholds, page, *_ = evidence
    assert page.section(tmp_path) == ""
    results = thresholds.Results(tmp_path / "thresholds.jsonl")
    results.add({"kind": "about", **thresholds.about()})
    results.add(thresholds.untrained(data))
    for side in thresholds.SIDES:
        entry = results.add(thresholds.run(side, data, 0))
        assert json.loads(json.dumps(entry)) == entry
        assert entry["tokens"] == 2 * 4 * 7
        assert (entry["zeros"] > 0.2) == side.name.startswith("ReLU")
        for point in entry["points"]:
            assert point["density"] <= point["target"] + 0.2
            if not side.name.startswith("ReLU"):  # whose gates may have more zeros than asked for
                assert point["density"] >= point["target"] - 0.2
    monkeypatch.setattr(page, "SETS", {"texts": data.spec})
    text = page.section(tmp_path)
    assert all(f"| {side.name} | 1 | " in text for side in thresholds.SIDES)
    assert "*untrained*" in text
    page.draw(tmp_path / "picture.png", tmp_path)
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_runs_go_on_where_they_stopped(evidence, data, tmp_path, monkeypatch):
    thresholds, *_ = evidence
    monkeypatch.setattr(thresholds, "SETS", {"texts": data.spec})
    monkeypatch.setattr(thresholds, "SEEDS", (0,))
    words = ["thresholds", "--data", str(tmp_path), "--results", str(tmp_path), "--side", "LoRA"]
    monkeypatch.setattr("sys.argv", words)
    thresholds.main()
    lines = (tmp_path / "thresholds.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["about", "untrained", "run"]
    thresholds.main()
    assert (tmp_path / "thresholds.jsonl").read_text().splitlines() == lines


def test_the_cost_of_decoding_and_what_it_can_gain(evidence, data, tmp_path):
    thresholds, page, *_ = evidence
    file = tmp_path / "thresholds_cost.json"
    spec = replace(data.spec, references=lambda rows: {"red": [rows[0]["ref"]]},
                   base=replace(data.spec.base, load=cache(load_wide)))  # fmt: skip
    thresholds.cost(replace(data, spec=spec), file, new=2)
    cost = json.loads(file.read_text())
    names = [name + end for end in ("", ", int8") for name in ("dense", *thresholds.DECODED, "no MLP")]
    assert list(cost["reasons"]) == names
    assert set(cost["reasons"].values()) == {""}
    assert list(cost["threads_1"]) == names
    cost["threads_1"] |= {"dense": 50.0, "gate 0.5": 60.0, "no MLP": 100.0}
    cost["densities"]["gate 0.5"] = 0.4
    row = next(line for line in page._cost(cost).splitlines() if line.startswith("| gate 0.5 |"))
    assert "| 60 |" in row
    assert "| 1.20x |" in row
    assert f"| {20 / (10 + 10 * (1 + 2 * 0.4) / 3):.2f}x |" in row  # 10 of 20 ms are the MLPs'
