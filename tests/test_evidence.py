"""bench/evidence: sets of a folder, runs on a random model, results that go on, verdicts that follow from them."""

import json
import math
from dataclasses import replace
from functools import cache

import pytest
import tokenizers
import torch
import transformers

from deftcore.methods.natural_galore.optimizer import NaturalGaLore

WORDS = ["[UNK]", "[PAD]", "[EOS]", "red", "blue", "is", "a", "colour", "."]
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def evidence():
    """The package, which no wheel holds."""
    from pathlib import Path

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1])
        from bench.evidence import cost, light_peft, measures, models, report, runs, sets, sides, spectral

        yield type("Evidence", (), {"cost": cost, "light_peft": light_peft, "measures": measures, "models": models,
                                    "report": report, "runs": runs, "sets": sets, "sides": sides,
                                    "spectral": spectral})  # fmt: skip


def tokenizer():
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]"
    )


def load_texts(classes):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=9, **SIZES)), tokenizer()


def load_classes(classes):
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=9, num_labels=classes or 2, pad_token_id=1, **SIZES)
    return transformers.BertForSequenceClassification(config), tokenizer()


@pytest.fixture
def data(evidence, tmp_path):
    """Sets by name: sentences with a class, and prompts with an answer."""
    rows = [{"mr": ["red", "blue"][i % 2], "ref": f"{['red', 'blue'][i % 2]} is a colour .", "label": i % 2,
             "sentence": f"{['red', 'blue'][i % 2]} is a colour ."} for i in range(24)]  # fmt: skip
    for name in ("texts", "classes", "qnli"):
        (tmp_path / name).mkdir()
        for part in ("train", "test", "validation"):
            (tmp_path / name / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Base, Spec = evidence.models.Base, evidence.sets.Spec
    texts = Base("texts", ("q_proj", "v_proj", "down_proj"), "CAUSAL_LM", cache(load_texts), frozen=True)
    classes = Base("classes", ("query", "value"), "SEQ_CLS", cache(load_classes), mixed_precision="bf16", frozen=True)
    few = {"batch_size": 4, "steps": 3, "tries": 1, "tuning": 4, "test": 6}
    specs = (
        Spec("texts", texts, "test", lambda row: (row["mr"], " " + row["ref"]), **few),
        Spec("classes", classes, "test", lambda row: (row["sentence"],), classes=2, **few),
    )
    return {spec.name: evidence.sets.Data(spec, tmp_path) for spec in specs}


def test_rates_are_chosen_by_rows_that_nothing_trains_or_is_reported_on(data):
    for each in data.values():
        assert (len(each.train), len(each.tuning), len(each.test)) == (20, 4, 6)
    file = data["texts"].folder / "texts" / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row | {"mr": ". . ."} if i >= 20 else row) + "\n" for i, row in enumerate(rows)))
    again = type(data["texts"])(data["texts"].spec, data["texts"].folder)
    marked = [example["input_ids"][:3] == [8, 8, 8] for example in (*again.train, *again.tuning)]
    assert marked == [False] * 20 + [True] * 4


def test_longer_texts_are_left_out_and_never_cut(data):
    short = replace(data["texts"].spec, longest=3)
    assert type(data["texts"])(short, data["texts"].folder).test == []
    assert all(len(example["input_ids"]) == 7 for example in data["texts"].test)


@pytest.mark.parametrize(
    ("name", "method", "options"),
    [("texts", "full", {}), ("texts", "natural-galore", {"rank": 2}), ("texts", "ba-lora", {"r": 2, "lora_alpha": 2}),
     ("texts", "peft", {"r": 2, "kasa_config": {"beta": 1e-4, "gamma": 1e-3}}), ("classes", "kasa", {"r": 2}),
     ("classes", "ba-lora", {"r": 2, "lora_alpha": 2})],
)  # fmt: skip
def test_a_run_trains_and_measures(evidence, data, name, method, options):
    each = data[name]
    side = evidence.sides.Side("side", evidence.sides.PEFT_KASA if method == "peft" else method, (1e-2,), options)
    entry = evidence.runs.run(side, each, 0, 1e-2, steps=3, whole=True)
    assert entry["kind"] == "run"
    assert [step for step, _ in entry["curve"]] == [3]
    assert math.isfinite(entry["loss"])
    assert min(entry["trained"], entry["state_bytes"]) > 0
    assert ("accuracy" in entry) == ("drift" in entry) == bool(each.spec.classes)
    assert json.loads(json.dumps(entry)) == entry
    again = evidence.runs.run(side, each, 0, 1e-2, steps=3, whole=True)
    assert again["loss"] == entry["loss"]  # one seed, one run
    assert evidence.runs.run(side, each, 1, 1e-2, steps=3, whole=True)["loss"] != entry["loss"]


def test_nothing_is_forgotten_without_training(evidence, data):
    for each, key in ((data["texts"], "forgot"), (data["classes"], "drift")):
        before = evidence.runs.before(each)
        assert evidence.measures.forgetting(before, evidence.measures.other_domain(each.model(), each))[key] == (
            pytest.approx(0, abs=1e-6)
        )


def test_only_targets_and_the_head_train(data):
    trained = {n.split(".")[-2] for n, p in data["texts"].model().named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "v_proj", "down_proj"}
    trained = {n.split(".")[-2] for n, p in data["classes"].model().named_parameters() if p.requires_grad}
    assert trained == {"query", "value", "classifier"}


def test_padding_does_not_reach_the_mean_of_a_text(evidence):
    import copy

    model, words = load_classes(2)
    model.bert.pooler = evidence.models.MeanPooler()
    model.bert.register_forward_pre_hook(evidence.models.tell_mask, with_kwargs=True)
    model = copy.deepcopy(model).eval()
    alone, *_ = (model(**words(text, return_tensors="pt")).logits for text in ("red is a .", "blue"))
    padded = model(**words(["red is a .", "red is a colour . . ."], return_tensors="pt", padding=True)).logits
    torch.testing.assert_close(padded[:1], alone)


def test_parts_share_the_jobs(evidence):
    spectral = evidence.spectral
    for job in spectral.jobs():
        (part,) = [part for part in range(3) if job.belongs(part, 3)]
        same_side = [other for other in spectral.jobs() if (other.set, other.side) == (job.set, job.side)]
        assert all(other.belongs(part, 3) for other in same_side if other.kind != "extra")


def test_state_is_counted_where_projectors_are_objects(evidence):
    class Projector:
        def __init__(self):
            self.matrix, self.parts = torch.zeros(3, 2), [torch.zeros(5, dtype=torch.bfloat16)]

    assert evidence.sides.held_bytes({"projector": Projector(), "step": torch.zeros(()), "rank": 2}) == 24 + 10
    weight = torch.nn.Parameter(torch.randn(6, 4))
    optimizer = NaturalGaLore([{"params": [weight], "rank": 2, "natural_history": 3}], lr=1e-2)
    weight.square().sum().backward()
    optimizer.step()
    counted = evidence.sides.held_bytes(list(optimizer.state.values()))
    assert counted == pytest.approx(optimizer.estimate_state_bytes().total, abs=64)


def test_results_go_on_behind_a_line_that_was_cut(evidence, tmp_path):
    results = evidence.runs.Results(tmp_path / "results.jsonl")
    assert results.entries() == []
    side = evidence.sides.Side("LoRA", "lora", (1e-3, 1e-2))
    for rate, loss in ((1e-3, 2.0), (1e-2, 1.0)):
        results.add({"kind": "try", "set": "texts", "side": "LoRA", "rate": rate, "tuning_loss": loss})
    with results.path.open("a") as file:
        file.write('{"kind": "try", "set": "texts", "side": "LoRA", "rate": 1, "tun')
    assert results.best_rate(side, "texts") == 1e-2
    results.add({"kind": "run", "set": "texts", "side": "LoRA"})
    results.add({"kind": "run", "set": "texts", "side": "KaSA"})
    assert [each["side"] for each in results.find(kind="run")] == ["LoRA", "KaSA"]
    with pytest.raises(ValueError, match="has no try on classes"):
        results.best_rate(side, "classes")


def test_the_jobs_are_those_of_the_plan(evidence):
    spectral = evidence.spectral
    jobs = list(spectral.jobs())
    assert len(set((job.kind, job.set, job.side and job.side.name, job.seed, job.rate) for job in jobs)) == len(jobs)
    for name, sides in spectral.SIDES.items():
        assert len({len(side.rates) for side in sides}) == 1  # the same number of tries for each
        for side in sides:
            seeds = [job.seed for job in jobs if (job.kind, job.set, job.side) == ("run", name, side)]
            assert seeds == list(spectral.SEEDS)


def test_the_page_is_what_the_results_make(evidence):
    from bench.evidence.__main__ import DOCS, OWN, page

    assert (DOCS / "evidence.md").read_text() == page(), "run python -m bench.evidence"
    for name, told in OWN.items():
        written = DOCS / f"{name}.md"
        assert (written.read_text() if written.exists() else "") == told.page(), "run python -m bench.evidence"


def test_a_verdict_needs_all_seeds(evidence):
    def runs(*losses):
        return [
            {"side": side, "seed": seed, "loss": loss, "accuracy": 1 - loss}
            for side, values in zip(("ours", "other"), losses, strict=True)
            for seed, loss in enumerate(values)
        ]

    verdict = evidence.report.verdict
    assert verdict("ours", "other", runs([0.1, 0.2], [0.3, 0.3]), ["loss", "accuracy"]) == [
        "loss -0.150 (better in all 2 seeds)", "accuracy +15.0% (better in all 2 seeds)",
    ]  # fmt: skip
    assert verdict("ours", "other", runs([0.1, 0.4], [0.3, 0.3]), ["loss"]) == ["loss -0.050 (seeds disagree)"]
    assert verdict("ours", "other", runs([0.3, 0.4], [0.3, 0.3]), ["loss"]) == ["loss +0.050 (seeds disagree)"]
    assert verdict("ours", "other", runs([0.1], [0.3]), ["loss"]) == []
    entries = [{"kind": "run", "set": "texts", **each} for each in runs([0.1, 0.2], [0.3, 0.3])]
    claim = evidence.report.Claim("Ours is better.", "ours", "other", "loss", {"texts": "better"})
    claim.check(entries)
    for verdicts in ({"texts": "worse"}, {"texts": "disagree"}, {"texts": "better", "classes": "better"}):
        with pytest.raises(ValueError, match=r"claim: 'Ours is better\.' needs"):
            replace(claim, verdicts=verdicts).check(entries)
    assert verdict("ours", "other", runs([0.5, 0.4], [0.3, 0.3]), ["loss"]) == ["loss +0.150 (worse in all 2 seeds)"]


@pytest.mark.parametrize(
    ("text", "number"),
    [("#### 12", "12"), ("3 + 4 = <<3+4=7>>7.", "7"), ("-1,200.50 dollars", "-1200.50"), ("none", None)],
)
def test_the_last_number_of_an_answer(evidence, text, number):
    assert evidence.measures.last_number(text) == number


def test_steps_are_timed_and_memory_watched(evidence, data, capsys):
    side = evidence.sides.Side("LoRA", "lora", (1e-3, 1e-2, 1e-1), {"r": 2})
    found = evidence.cost.steps([side], data["texts"])["LoRA"]
    assert 0 < found["seconds"] <= found["first"] * 100
    evidence.cost.print_peak(evidence.sides.Side("full", "full", (1e-3, 1e-2, 1e-1)), data["classes"])
    assert float(capsys.readouterr().out.splitlines()[-1]) > 10


@pytest.mark.parametrize("name", ["texts", "classes"])
def test_pruned_sides_run_in_two_phases(evidence, data, name):
    module, each = evidence.light_peft, data[name]
    each = replace(each, spec=replace(each.spec, steps=8))
    for side in module.SIDES:
        found, pruned = module.run(side, each, 0, 1e-2), side is not module.LORA
        assert math.isfinite(found["loss"])
        assert (found["base"] < found["base_whole"]) == pruned
        assert found["estimate_steps"] == 2 * pruned
        assert 0 <= found["first_phase_s"] < found["train_s"]
    assert module.run(side, each, 0, 1e-2)["loss"] == found["loss"]


def test_missing_runs_are_added_at_the_rate_that_lora_tried(evidence, data, tmp_path, monkeypatch):
    module, spec = evidence.light_peft, data["texts"].spec
    monkeypatch.setattr(module, "SETS", ("texts",))
    monkeypatch.setattr(module, "SIDES", module.SIDES[:2])
    monkeypatch.setitem(module.SPECS, "texts", spec)
    monkeypatch.setitem(module.TRIED, "texts", [evidence.sides.Side("LoRA", "lora", ())])
    results, tried = (evidence.runs.Results(tmp_path / f"{name}.jsonl") for name in ("light_peft", "spectral"))
    tried.add({"kind": "try", "set": "texts", "side": "LoRA", "rate": 0.02, "tuning_loss": 1.0})
    present = results.add({"kind": "run", "set": "texts", "side": "LoRA", "seed": 0})
    monkeypatch.setattr(module, "ELSEWHERE", ("texts", 0.05))
    module.run_all(tmp_path, tmp_path, ["texts"], math.inf)
    assert [(each["side"], each["rate"]) for each in results.find(kind="extra")] == [
        (side.name, 0.05) for side in module.SIDES
    ]
    runs = results.find(kind="run")
    assert runs[0] == present
    assert sorted((each["side"], each["seed"]) for each in runs) == sorted(
        (side.name, seed) for side in module.SIDES for seed in module.SEEDS
    )
    assert {each["rate"] for each in runs[1:]} == {0.02}
    assert [len(results.find(kind=kind)) for kind in ("about", "untrained")] == [1, 1]


@pytest.mark.parametrize("name", ["texts", "classes"])
def test_costs_of_pruned_sides_count_both_phases(evidence, data, name):
    module, each = evidence.light_peft, data[name]
    each = replace(each, spec=replace(each.spec, steps=8))
    sides = module.costed(each)
    times = module.inference(sides, each)
    whole = [side.name for side in sides if side.method is not module.ESTIMATING]
    assert {count: list(found) for count, found in times.items()} == {"1": whole, "32": whole}
    steps = {side.name: {"seconds": 3.0 if side.name == module.FIRST.name else 1.0} for side in sides}
    found = module.both_phases(sides, each, steps)
    assert found["LoRA"] == 8.0
    assert 8 + 2 * 3 < found["Light-PEFT, 1/3"] < 8 + 2 * 3 + 5  # and the cut
    assert evidence.cost.steps([sides[1]], each)[module.FIRST.name]["seconds"] > 0


def test_a_page_has_sizes_and_where_they_were_measured_costs(evidence, data, tmp_path, monkeypatch):
    report, module = evidence.report, evidence.light_peft
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setitem(report.SPECS, "texts", data["texts"].spec)
    experiment = report.Experiment(
        name="toy", sides={"texts": module.SIDES}, pairs=[("Light-PEFT, 1/3", "LoRA")], head="Head.",
        papers=[("Light-PEFT, 1/3", "LoRA", "smaller"), ("random, 1/3", "LoRA", "none")], limits="Limits.",
    )  # fmt: skip
    experiment.results.add({"kind": "about", "machine": "a machine", "versions": {}})
    for side, base, loss in (("LoRA", 4e6, 2.0), ("Light-PEFT, 1/3", 3e6, 1.5)):
        for seed in (0, 1):
            experiment.results.add({"kind": "run", "set": "texts", "side": side, "seed": seed, "rate": 1e-2,
                                    "trained": 1000, "base": base, "loss": loss})  # fmt: skip
    page = report.section(experiment)
    assert "| Light-PEFT, 1/3 | 2 | 0.01 | 0.00 M | 3.0 M | 1.500 (1.500 to 1.500) |" in page
    assert "| texts: loss -0.500 (better in all 2 seeds) | texts: base 0.75x |" in page
    assert "| random, 1/3 against LoRA | none | too few runs |  |" in page
    assert "Time and memory" not in page
    pairs = {"LoRA": 2.0, "Light-PEFT, 1/3": 1.0}
    step = {side: {"seconds": value, "spread": 0.1, "first": value} for side, value in pairs.items()}
    costs = {"about": {"machine": "a machine"}, "threads": 1, "step": {"texts": step}, "peak_mb": {"texts": pairs},
             "inference": {"texts": {"1": pairs}}, "training": {"texts": pairs}}  # fmt: skip
    (tmp_path / "toy_cost.json").write_text(json.dumps(costs))
    page = report.section(experiment)
    assert "base 0.75x, step 0.50x, inference of 1 0.50x, training 0.50x, peak 0.50x |" in page
    assert "| texts, 4 examples | step | inference of 1 | training | peak | quartiles of steps apart |" in page
    assert "| Light-PEFT, 1/3 | 1000 ms | 1000 ms | 1000 ms | 1 MB | 10% | 1.0 s |" in page
