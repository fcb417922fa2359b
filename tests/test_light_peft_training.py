"""Light-PEFT from a recipe: both phases, exact resume in each and between, two processes, the Trainer, checkpoints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import Stopped, tiny_model
from safetensors.torch import load_file
from test_light_peft import adapted, batches
from test_package import save_base

import deftcore
from deftcore.cli.main import main
from deftcore.methods.light_peft.adapters import add_adapters, sites
from deftcore.methods.light_peft.config import LightPeftConfig
from deftcore.methods.light_peft.estimation import Estimation
from deftcore.methods.light_peft.selection import select
from deftcore.models.checkpoints import load_model
from deftcore.training import TrainingConfig, load_recipe, train
from deftcore.training.run import train_recipe
from deftcore.training.trainer import ObjectiveTrainerMixin
from deftcore.training.wrapping import add_adapter

RECIPE = "light-peft"
TWO_PROCESSES = """
import atexit, os, pathlib, sys

atexit.register(lambda: os._exit(0))
sys.path.insert(0, {tests!r})
from deftcore.training import load_recipe
from deftcore.training.run import train_recipe

train_recipe(load_recipe({recipe!r}, sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    save_base(folder)
    return folder


def words(base, output, *more):
    return [
        f"model={base}", f"data.train={base / 'data.txt'}", f"output={output}", "data.max_length=12",
        "adapter.estimate_steps=6", "adapter.head_ratio=0.5", "adapter.r=4", "training.max_steps=4",
        "training.save_every=2", "training.log_every=1", "training.batch_size=4", "training.learning_rate=1e-2", *more,
    ]  # fmt: skip


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def kept_of(folder):
    return json.loads((folder / "final" / "deftcore_slim.json").read_text())["kept"]


def test_both_phases(base, tmp_path, capsys):
    """One command; the second phase starts with the first one's adapters, cut, with fresh schedule and optimizer."""
    assert main(["train", RECIPE, *words(base, tmp_path / "run"), "--json"]) == 0
    first, second = log_of(tmp_path / "run" / "estimate"), log_of(tmp_path / "run")
    assert [line["step"] for line in first] == list(range(1, 7))
    assert [line["step"] for line in second] == list(range(1, 5))
    assert second[0]["learning_rate"] == first[0]["learning_rate"] == 1e-2
    assert first[0]["mask_loss"] == pytest.approx(1e-4 * (2 * 4 + 2 * 72))
    assert "mask_min" not in first[4]
    assert first[5]["mask_min"] < 1 < first[5]["mask_max"]
    capsys.readouterr()

    kept = kept_of(tmp_path / "run")
    assert [len(places) for name, places in kept["units"].items() if "attn" in name] == [2, 2]
    assert sum(len(places) for name, places in kept["units"].items() if "mlp" in name) == 96
    assert sum(bool(places) for places in kept["ranks"].values()) <= 14 - 10
    assert sum(map(len, kept["ranks"].values())) == 8  # half of the ranks of 4 adapters
    plain = load_model(base)
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    slim = deftcore.load_slim(plain, tmp_path / "run" / "final")
    ids = torch.tensor([[3, 4, 5, 6]])
    assert slim.eval()(ids).logits.isfinite().all()
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())

    state = load_file(tmp_path / "run" / "estimate" / "trained" / "trainable.safetensors")
    stored = load_file(tmp_path / "run" / "final" / "adapter_model.safetensors")
    assert {"objective.steps", "objective.modules_sum", "objective.ranks_sum", "objective.masks.0"} < state.keys()
    assert float(state["objective.steps"]) == 3
    assert 0 < len(stored) < sum("lora_" in name for name in state)
    for name, places in kept["ranks"].items():
        if places and not name.endswith(("o_proj", "down_proj")):  # whose A loses columns too
            before = state[f"base_model.model.{name}.lora_A.default.weight"][places]
            after = stored[f"base_model.model.{name}.lora_A.weight"]
            assert 0 < (after - before).abs().max() < 0.05  # moved by four steps, from where the first phase ended


@pytest.mark.parametrize("adapter", ["lora", "bottleneck"])
def test_resume_is_exact(base, tmp_path, stopping, adapter):
    """Inside the first phase, between the two, inside the second: the same model in the end."""
    more = (f"adapter.adapter={adapter}", "adapter.estimate_steps=4")
    whole = train_recipe(load_recipe(RECIPE, words(base, tmp_path / "whole", *more)))
    recipe = load_recipe(RECIPE, words(base, tmp_path / "parts", *more))
    for place in ("estimate", ""):
        stopping()
        with pytest.raises(Stopped):
            train_recipe(recipe)
        assert [each.name for each in (tmp_path / "parts" / place / "checkpoints").iterdir()] == ["step-00000002"]
    assert (tmp_path / "parts" / "estimate" / "result.json").exists()
    assert train_recipe(recipe).train_loss == whole.train_loss
    ended, again = (load_file(tmp_path / name / "final" / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert ended.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in ended.items())
    assert kept_of(tmp_path / "whole") == kept_of(tmp_path / "parts")
    for name in ("", "estimate"):
        assert log_of(tmp_path / "whole" / name) == log_of(tmp_path / "parts" / name)
    with pytest.raises(ValueError, match=r"adapter\.head_ratio: 0\.5 -> 0\.0"):
        train_recipe(load_recipe(RECIPE, words(base, tmp_path / "parts", *more, "adapter.head_ratio=0.0")))


def test_a_second_half_that_was_interrupted(base, tmp_path, monkeypatch):
    """The sums of the steps before a checkpoint are kept in it."""
    from deftcore.training.keeper import Keeper

    train_recipe(load_recipe(RECIPE, words(base, tmp_path / "whole")))
    original = Keeper.checkpoint

    def checkpoint(keeper, step):
        original(keeper, step)
        if step == 4:
            raise Stopped

    recipe = load_recipe(RECIPE, words(base, tmp_path / "parts"))
    monkeypatch.setattr(Keeper, "checkpoint", checkpoint)
    with pytest.raises(Stopped):
        train_recipe(recipe)
    monkeypatch.setattr(Keeper, "checkpoint", original)
    train_recipe(recipe)
    whole, parts = (
        load_file(tmp_path / name / "estimate" / "trained" / "trainable.safetensors") for name in ("whole", "parts")
    )
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


@pytest.mark.parametrize("importance", ["random", "magnitude"])
def test_baselines_train_alike(base, tmp_path, importance):
    """As much goes, by another measure; masks take no part."""
    train_recipe(load_recipe(RECIPE, words(base, tmp_path / "run", f"adapter.importance={importance}")))
    kept = kept_of(tmp_path / "run")
    assert sum(map(len, kept["units"].values())) == 2 * 2 + 96
    assert "mask_loss" not in log_of(tmp_path / "run" / "estimate")[0]


def test_over_4_bits(base, tmp_path, capsys):
    """Cuts through blocks are refused before anything trains, unless weights may be rounded again."""
    more = ("method=qlight-peft", "quantize.block_size=32", "quantize.skip=[lm_head]")
    assert main(["train", RECIPE, *words(base, tmp_path / "refused", *more)]) == 2
    assert "would cut through blocks of 32 weights in 4 bits; pass requantize=True" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()
    for name, change in (("whole", "adapter.ffn_ratio=0"), ("again", "adapter.requantize=true")):
        folder = tmp_path / name
        assert main(["train", RECIPE, *words(base, folder, *more, change, "adapter.head_ratio=0.0")]) == 0
        assert log_of(folder)[-1]["step"] == 4
        assert any("mlp" in each for each in kept_of(folder)["units"]) == (name == "again")


@pytest.mark.slow
def test_two_processes_keep_the_same(base, tmp_path):
    """`accelerate launch` with two CPU processes, half of each batch in each: one selection, and the same losses."""
    script = tmp_path / "run.py"
    script.write_text(TWO_PROCESSES.format(tests=str(Path(__file__).parent), recipe=RECIPE))
    more = ("adapter.dropout=0.0", "adapter.module_ratio=0.5")
    train_recipe(load_recipe(RECIPE, words(base, tmp_path / "one", *more)))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
               "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
               str(script), *words(base, tmp_path / "two", *more, "training.batch_size=2")]  # fmt: skip
    hidden = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | hidden
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    states = [load_file(tmp_path / name / "estimate" / "trained" / "trainable.safetensors") for name in ("one", "two")]
    for name in ("objective.modules_sum", "objective.ranks_sum", "objective.masks.0", "objective.masks.3"):
        torch.testing.assert_close(states[1][name], states[0][name], rtol=1e-3, atol=1e-6)
    assert kept_of(tmp_path / "one") == kept_of(tmp_path / "two")
    for part in ("estimate", ""):
        for one, two in zip(log_of(tmp_path / "one" / part), log_of(tmp_path / "two" / part), strict=True):
            assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_accumulation_and_precision(tmp_path, precision):
    """Four micro-batches of one give what one batch of four gives, whatever autocast computes in."""
    found = []
    for size, parts in ((4, 1), (1, 4)):
        model, config = adapted()
        estimation = Estimation(model, config)
        data = [{"input_ids": [2 + (5 * i + 3 * j) % 60 for j in range(4 + i % 3)]} for i in range(16)]
        training = TrainingConfig(
            max_steps=4, batch_size=size, gradient_accumulation_steps=parts, mixed_precision=precision,
            warmup_ratio=0.0, learning_rate=1e-3,
        )  # fmt: skip
        train(model, data, training, tmp_path / f"{size}", objective=estimation)
        assert float(estimation.steps) == 2
        found.append(estimation.scores())
    bound = 1e-4 if precision == "no" else 0.1
    for name in found[0].modules:
        torch.testing.assert_close(found[1].modules[name], found[0].modules[name], rtol=bound, atol=0)
        if precision != "bf16":  # in which means of products cancel to little
            torch.testing.assert_close(found[1].ranks[name], found[0].ranks[name], rtol=bound, atol=bound * 1e-3)
    for name in found[0].units:
        torch.testing.assert_close(found[1].units[name], found[0].units[name], rtol=0, atol=bound / 10)


def test_under_the_trainer(tmp_path):
    """The same objective: its masks train at their own rates, and its sums are of the second half."""

    class LightTrainer(ObjectiveTrainerMixin, transformers.Trainer):
        pass

    model, config = adapted(mask_lr_mult_heads=10)
    estimation = Estimation(model, config)
    rows = [
        {name: row for name, row in zip(batch, values, strict=True)}
        for batch in batches(8)
        for values in zip(*batch.values(), strict=True)
    ]
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-3,
        report_to=[], use_cpu=True, lr_scheduler_type="constant", save_strategy="no", logging_steps=1,
    )  # fmt: skip
    trainer = LightTrainer(model=model, args=arguments, train_dataset=rows, objective=estimation)
    trainer.train()
    groups = {id(p): group for group in trainer.optimizer.param_groups for p in group["params"]}
    rates = [groups[id(mask)]["lr"] for mask in estimation.masks]
    assert sorted(set(rates)) == [pytest.approx(1e-3), pytest.approx(1e-2)]
    assert float(estimation.steps) == 2
    assert all(bool((mask != 1).all()) for mask in estimation.masks)
    assert trainer.state.log_history[3]["mask_max"] > 1
    estimation.detach()
    kept = select(estimation.structures, estimation.scores(), config)
    assert len(kept.units) == 4


@pytest.mark.cuda
def test_the_same_on_a_gpu():
    """One seed, one selection."""
    found = []
    for device in ("cpu", "cuda"):
        model, config = adapted()
        model.to(device)
        estimation = Estimation(model, config)
        optimizer = torch.optim.AdamW([*estimation.groups(1e-3), {"params": [s.first for s in sites(model)]}], lr=1e-3)
        window = [{name: value.to(device) for name, value in batch.items()} for batch in batches(6)]
        for number, batch in enumerate(window):
            estimation.begin([batch], number, 6, torch.device(device))
            (model(**batch).loss + estimation.share(batch, None)).backward()
            estimation.end()
            optimizer.step()
            optimizer.zero_grad()
            model.zero_grad()
        found.append(select(estimation.structures, estimation.scores(), config))
    assert found[0] == found[1]


def test_it_needs_a_recipe_for_its_phases():
    with pytest.raises(RuntimeError, match="phase: the method trains something before the main run; start it from a"):
        add_adapter(tiny_model("llama"), "light-peft", {"head_ratio": 0.5})
    assert not any(m._forward_pre_hooks for m in add_adapters(tiny_model("llama"), LightPeftConfig()).modules())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.head_ratio=1", "adapter: head_ratio: must be below 1"),
        ("adapter.head_ratio=0.3", "adapter: head_ratio: 0.3 of 2 query heads of a group of model.layers.0.self_attn"),
        ("adapter.dropout=1.5", "adapter.dropout: must be"),
        ("adapter.target_modules=[q_prox]", "adapter.target_modules: no module named 'q_prox'; did you mean q_proj"),
        ("adapter.estimate_step=5", "adapter.estimate_step: unknown; did you mean estimate_steps"),
        ("adapter.adapter=prompt", "adapter: adapter: must be one of 'lora', 'bottleneck', got 'prompt'"),
    ],
)
def test_mistakes_show_before_weights_are_read(base, tmp_path, capsys, override, message):
    assert main(["train", RECIPE, *words(base, tmp_path / "run", override)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
