"""bench/evidence/mamba: models learn small texts, tune in three precisions, answer behind examples; runs go on."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

VALUES = {
    "name": ["Aromi", "Cotto", "Ranch"],
    "food": ["French", "Italian", "Chinese"],
    "priceRange": ["cheap", "high", "moderate"],
    "area": ["riverside", "city centre"],
    "near": ["Burger King", "Clare Hall"],
    "familyFriendly": ["yes", "no"],
}


@pytest.fixture(scope="module")
def evidence():
    """The modules, which no wheel holds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1])
        from bench.evidence import mamba, mamba_models, mamba_page, mamba_shots
        from deftcore.cli.quickstart import base_model

        topics = ("The import statement finds a module. " * 90, "The del statement. " * 40)  # all would take seconds
        for module in (mamba_models, base_model):
            patch.setattr(module, "reference_text", lambda: topics)
        yield mamba, mamba_models, mamba_page, mamba_shots


@pytest.fixture(scope="module")
def texts(evidence, tmp_path_factory):
    """Of a folder with a few restaurants and problems; models of two blocks at most a thousandth of the real ones."""
    folder, draw = tmp_path_factory.mktemp("sets"), random.Random(0)
    for name, parts in (("e2e_nlg", ("train", "validation", "test")), ("gsm8k", ("train", "test"))):
        (folder / name).mkdir()
        for part in parts:
            rows = []
            for i in range(24):
                one = {key: draw.choice(values) for key, values in VALUES.items()}
                mr = ", ".join(f"{key}[{value}]" for key, value in one.items())
                if name == "e2e_nlg":
                    rows += [{"mr": mr, "ref": f"{one['name']} serves {one['food']} food."}] * 2
                else:
                    rows.append({"question": f"What is {i} + 1?", "answer": f"#### {i + 1}", "final": str(i + 1)})
            (folder / name / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = evidence[1]
    sizes = models.Pretraining(
        vocab_size=400, width=64, length=32, batch_size=2, steps=4, documentation=4000, measured=2
    )
    return models.Texts(folder, sizes)


@pytest.fixture(scope="module")
def cache(evidence, texts, tmp_path_factory):
    """The models, pre-trained."""
    folder = tmp_path_factory.mktemp("cache")
    for kind in evidence[1].KINDS:
        evidence[1].pretrain(kind, texts, folder)
    return folder


@pytest.fixture
def data(evidence, texts):
    tuning = evidence[0].Tuning(steps=3, batch_size=2, test=6, fixed=16, generated=(3, 4))
    return evidence[0].Descriptions(texts, tuning)


def test_nothing_is_tuned_or_measured_on_that_a_model_was_pre_trained_on(texts):
    before, after = texts.halves("e2e_nlg")
    assert len(before) + len(after) == 48
    assert min(len(before), len(after)) >= 23
    assert before[-1]["mr"] != after[0]["mr"]
    for name, rows in (("e2e_nlg", after), ("gsm8k", texts.halves("gsm8k")[1])):
        text = texts.parts[name][0]
        assert not any(f"{row.get('ref', '')}\n\nQuestion: {row.get('question')}" in text for row in rows)
    assert text.count("Question:") == 12


def test_documentation_has_training_and_held_out_modules(evidence):
    for characters in (2000, 120_000):
        train, other = evidence[1].docstrings(characters)
        assert characters * 0.9 < len(train) + len(other) <= characters * 1.1
        assert bool(other) == (characters > 2000)
    assert "abc" in train.lower()


def test_models_are_of_equal_size(evidence):
    models = evidence[1]
    counts = [sum(p.numel() for p in kind.make(models.Pretraining()).parameters()) for kind in models.KINDS]
    assert 3e6 < min(counts) < max(counts) < 1.06 * min(counts)


def test_pre_training_is_done_once_and_is_of_the_sizes_asked_for(evidence, texts, cache):
    models = evidence[1]
    kind = models.KINDS[0]
    file = cache / "mamba" / models.LEARNT
    before = file.stat().st_mtime_ns
    learnt = models.pretrain(kind, texts, cache)
    assert file.stat().st_mtime_ns == before
    assert learnt["tokens"] == 4 * 2 * 32
    assert set(learnt["bits_per_byte"]) == {"documentation", "e2e_nlg", "gsm8k"}
    assert all(0 < value < 10 for value in learnt["bits_per_byte"].values())
    other = models.Texts(texts.folder, replace(texts.sizes, steps=5))
    with pytest.raises(ValueError, match=r"cache: .* other sizes"):
        models.pretrain(kind, other, cache)
    with pytest.raises(FileNotFoundError, match=r"cache: .* holds no Mamba"):
        models.load(kind, cache / "nowhere")


def test_training_lowers_the_loss_of_its_text(evidence, texts, cache):
    models = evidence[1]
    blocks = texts.training()[:6]
    for kind in models.KINDS:
        torch.manual_seed(0)
        fresh = models.native(kind.make(texts.sizes))
        assert models.loss_of(models.native(models.load(kind, cache)), blocks) < models.loss_of(fresh, blocks)


@pytest.mark.parametrize("model", ["Mamba", "Mamba-2", "Llama"])
def test_whole_models_and_adapters_train_in_every_precision(evidence, data, cache, model):
    mamba, models, *_ = evidence
    kind = next(kind for kind in models.KINDS if kind.name == model)
    for side in mamba.SIDES[model][:: len(mamba.SIDES[model]) - 1]:
        found = {p: mamba.run(kind, side, data, 0, p, cache) for p in mamba.PRECISIONS}
        assert json.loads(json.dumps(found)) == found
        for precision, entry in found.items():
            assert math.isfinite(entry["loss"])
            assert ("kl" in entry) == (precision != "no")
            assert ("exponents" in entry) == (model != "Llama")
            assert all(value <= 0 for value in entry.get("exponents", []))
        assert found["fp16"]["kl"] < found["bf16"]["kl"] < 0.1
        whole = sum(p.numel() for p in models.load(kind, cache).parameters())
        assert (found["no"]["trained"] == whole) == (side.name == "full")
    entry = mamba.untrained(kind, data, "bf16", cache)
    assert 0 < entry["kl"] < 0.1
    other_seed = mamba.run(kind, side, data, 1, "no", cache)
    assert other_seed["kl"] > 0  # against seed 0
    same = mamba.in_float32(kind, side, 1, cache)
    assert models.loss_of(same, data.test) == pytest.approx(other_seed["loss"], rel=1e-6)


def test_a_run_that_diverges_is_told(evidence, data, cache):
    mamba, models, *_ = evidence
    entry = mamba.run(models.KINDS[2], mamba.Side("full", 1e30), data, 0, "no", cache)
    assert entry["diverged"] > 0
    assert "loss" not in entry


def test_questions_have_one_answer_and_examples_of_the_same_property(evidence, texts):
    shots = evidence[3]
    for wanted in shots.TESTED:
        for count in shots.SHOTS:
            for prompt, answer, values in shots.questions(texts, wanted, count, 5):
                *examples, asked = prompt.split("\n\n")
                assert len(examples) == count
                title = f"\n{wanted[0].upper()}{wanted[1:]}:"
                assert asked.endswith(title)
                assert f"{wanted}[{answer.strip()}]" in asked
                assert answer.strip() in values
                assert len(set(values)) == 3
                for each in examples:
                    shown, said = each.split(title + " ")
                    assert f"{wanted}[{said}]" in shown
    taught = [texts.tokenizer.decode(each["input_ids"]) for each in shots.instructions(texts, 0, 40)]
    assert not any(f"\n{name[0].upper()}{name[1:]}:" in each for each in taught for name in shots.TESTED)
    assert {each.split(":")[0] for each in taught} == {"Restaurant", "Question"}


def test_answers_are_counted(evidence, texts):
    """By a model that always copies the first value, and one that never names any."""
    shots = evidence[3]
    asked = shots.questions(texts, "food", 1, 12)
    size = len(texts.tokenizer)

    class Copies(torch.nn.Module):
        first: int = 0

        def forward(self, input_ids, attention_mask):
            logits = torch.zeros(*input_ids.shape, size)
            for row, ids in zip(logits, input_ids, strict=True):
                asked = texts.tokenizer.decode(ids).split("\n\n")[-1]
                row[-1, texts.tokenizer(" " + asked.split("[")[1].split("]")[0])["input_ids"][0]] = 1
                row[-1, 0] = self.first
            return type("Output", (), {"logits": logits})

    share = sum(values[0] == answer.strip() for _, answer, values in asked) / 12
    model = Copies()
    assert shots.accuracy(model, texts, asked, 5) == {"chosen": share, "free": share}
    model.first = 2
    assert shots.accuracy(model, texts, asked, 5) == {"chosen": share, "free": 0}


def test_all_adapters_are_of_buffers_that_there_are(evidence, cache):
    mamba, models, *_ = evidence
    for kind in models.KINDS:
        sizes = []
        for side in mamba.SIDES[kind.name]:
            model = side.make(models.load(kind, cache))
            sizes.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
            placed = {
                name.split(".lora_A")[0].split(".")[-1]
                for name, p in model.named_parameters()
                if "lora_A" in name and p.requires_grad
            }
            assert placed == set(side.targets)
        assert len(set(sizes)) == len(sizes)


def made_up(job):
    """A line that a job might leave."""
    seed, precision = job.get("seed", 0), job.get("precision", "no")
    figures = {"loss": 2.0 + 0.1 * seed, "bleu": 20.0 + seed, "trained": 1000, "deviation": [0.1], "slope": -0.1}
    figures |= {} if precision == "no" and not seed else {"kl": {"no": 0.5, "bf16": 0.25, "fp16": 0.125}[precision]}
    figures |= {} if job["model"] == "Llama" else {"exponents": [-0.5, -0.25], "mean_exponents": [-1.0, -1.0]}
    rising = {str(shots): {"chosen": 0.25 + 0.1 * shots * job.get("tuned", 0), "free": 0.0} for shots in (0, 1, 3, 5)}
    bits = dict.fromkeys(("documentation", "e2e_nlg", "gsm8k"), 1.5)
    return job | {
        "pretrained": {"sizes": {"steps": 7, "batch_size": 2, "length": 32, "rate": 1e-3}, "parameters": 3_000_000,
                       "tokens": 448, "cpu_s": 60.0, "bits_per_byte": bits},
        "shots": {"accuracy": dict.fromkeys(("food", "priceRange", "area"), rising)},
    }.get(job["kind"], figures)  # fmt: skip


def test_missing_lines_are_added_and_the_page_tells(evidence, texts, data, cache, tmp_path, monkeypatch):
    mamba, models, page, _ = evidence
    monkeypatch.setattr(mamba, "do", lambda job, *_: made_up(job))
    assert page.page(tmp_path) == ""
    results = mamba.Results(tmp_path / "mamba.jsonl")
    everything = {"only": mamba.PARTS, "models": [k.name for k in models.KINDS], "minutes": math.inf}
    mamba.run_all(results, texts, data, cache, **everything | {"minutes": 0}, seeds=[0])
    assert [each["kind"] for each in results.entries()] == ["about"]
    mamba.run_all(results, texts, data, cache, **everything | {"only": ["shots"]}, seeds=[0])
    assert len(results.find(kind="shots")) == len(results.entries()) - 1 == 6
    mamba.run_all(results, texts, data, cache, **everything, seeds=[0, 1])
    lines = results.entries()
    kinds = {kind: len(results.find(kind=kind)) for kind in ("pretrained", "untrained", "shots", "run")}
    assert kinds == {"pretrained": 3, "untrained": 9, "shots": 9, "run": 2 * 3 * sum(map(len, mamba.SIDES.values()))}
    mamba.run_all(results, texts, data, cache, **everything, seeds=[0, 1])
    assert results.entries() == lines
    results.add({"kind": "run", "model": "Mamba", "side": "full", "precision": "fp16", "seed": 2, "diverged": 3})
    text = page.page(tmp_path)
    assert "the same 7 steps of 2 x 32 tokens" in " ".join(text.split())
    full = "| full | 1,000 | 2 | 2.050 (2.000 to 2.100) | 20.5 | 0.0000 | 0.0 | 2.5e-01 | 0 of 2 | "
    yardstick = "| 0.1000 | 1.0 | 5.0e-01 |"
    assert f"{full}0.0000 | 0.0 | 1.2e-01 | 1 of 3 {yardstick}" in text
    assert f"| LoRA attention {full.removeprefix('| full ')}0.0000 | 0.0 | 1.2e-01 | 0 of 2 {yardstick}" in text
    assert "| Mamba-2 | -2.50e-01 | 4 | -2.50e-01 to -2.50e-01 | 24 |" in text
    assert "| Llama | after instructions | 25% (25% to 25%) | 35% (35% to 35%) |" in text
    assert "Holds: -2.5e-01 at most" in text
    page.draw(tmp_path / "picture.png", tmp_path)
    assert (tmp_path / "picture.png").stat().st_size > 1000
