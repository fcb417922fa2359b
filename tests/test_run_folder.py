"""One folder, one run: the same run continues or has finished; another is refused, naming what differs."""

import json
import logging

import peft
import pytest
import torch
import yaml
from conftest import tiny_model
from safetensors.torch import load_file
from test_data import make_tokenizer
from test_training import Stopped, assert_same_run, examples, run

from deftcore.methods.deft.objective import DensityLoss
from deftcore.training import TrainingConfig, load_recipe, train
from deftcore.training.run import train_recipe


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def lora(base=None, **options):
    torch.manual_seed(0)
    options = {"r": 4, "lora_dropout": 0.1, "target_modules": ["q_proj", "gate_proj"]} | options
    return peft.get_peft_model(base or tiny_model("llama"), peft.LoraConfig(task_type="CAUSAL_LM", **options))


def shifted_base():
    base = tiny_model("llama")
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-6  # one number of one frozen weight
    return base


@pytest.mark.parametrize("stop", [0, 3], ids=["finished", "interrupted"])
def test_another_run_is_refused(tmp_path, stop):
    """Each of these continued the old run, under its own schedule and optimizer, and wrote over its results."""
    if stop:
        with pytest.raises(Stopped):
            run(tmp_path, save_every=2, stop=stop)
    else:
        run(tmp_path, save_every=2)
    before = contents(tmp_path)
    data = examples()
    data[7]["input_ids"][0] += 1
    for changes, message in (
        ({"learning_rate": 2e-2}, r"training\.learning_rate: 0\.01 -> 0\.02"),
        ({"batch_size": 2}, r"training\.batch_size: 4 -> 2"),
        ({"gradient_accumulation_steps": 2}, r"training\.gradient_accumulation_steps: 1 -> 2"),
        ({"max_steps": 12}, r"steps: 8 -> 12"),
        ({"schedule": "cosine"}, r'training\.schedule: "linear" -> "cosine"'),
        ({"seed": 1}, r"training\.seed: 0 -> 1"),
        ({"data": data}, r'data\.train: "30 examples, \w+" -> "30 examples, \w+"'),
        ({"data": examples(29)}, r'data\.train: "30 examples, \w+" -> "29 examples'),
        ({"validation": False}, r'data\.validation: "9 examples, \w+" -> null'),
        ({"model": lora(r=2)}, r"adapter\.r: 4 -> 2"),
        ({"model": lora(lora_alpha=1)}, r"adapter\.lora_alpha: 8 -> 1"),
        ({"model": lora(target_modules=["k_proj"])}, r'target_modules: \["gate_proj", "q_proj"\] -> \["k_proj"\]'),
        ({"model": lora(tiny_model("llama").bfloat16())}, r"model\.frozen: "),
        ({"model": lora(shifted_base())}, r'model\.frozen: "\w+" -> "\w+"'),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message) as caught:
            run(tmp_path, save_every=2, **changes)
        assert "--restart" in str(caught.value)
    assert contents(tmp_path) == before
    run(tmp_path, save_every=2, learning_rate=2e-2, resume=False)
    run(tmp_path / "fresh", save_every=2, learning_rate=2e-2)
    assert_same_run(tmp_path, tmp_path / "fresh")


def test_the_objective_is_part_of_the_run(tmp_path):
    def density(**options):
        model = lora()
        objective = DensityLoss(model, **({"surrogate": "tanh", "alpha": 1.0} | options))
        return train(model, examples(), TrainingConfig(max_steps=2), tmp_path, objective=objective)

    density()
    for options, message in (
        ({"alpha": 2.0}, r"deft\.alpha: 1\.0 -> 2\.0"),
        ({"surrogate": "l0"}, r'deft\.surrogate: "tanh" -> "l0"'),
        ({"block_weights": [1, 3]}, r"deft\.block_weights: \[1\.0, 1\.0\] -> \[0\.5, 1\.5\]"),
        ({"ramp": 0.5}, r"deft\.ramp: 0\.0 -> 0\.5"),
    ):
        with pytest.raises(ValueError, match=message):
            density(**options)
    with pytest.raises(ValueError, match=r"note: not set -> 1"):
        train(lora(), examples(), TrainingConfig(max_steps=2), tmp_path, depends_on={"note": 1})


def test_what_a_run_does_not_depend_on_may_change(tmp_path):
    run(tmp_path / "whole", save_every=3, eval_every=4)
    with pytest.raises(Stopped):
        run(tmp_path / "parts", save_every=3, stop=5)
    run(tmp_path / "parts", save_every=2, eval_every=4, log_every=2, logger="tensorboard", gradient_checkpointing=True)
    for name, tensor in load_file(tmp_path / "whole" / "trained" / "trainable.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "parts" / "trained" / "trainable.safetensors")[name]), name


def test_a_finished_run_says_so_and_gives_its_model(tmp_path, caplog):
    first = lora()
    result = run(tmp_path, model=first)  # no checkpoints at all
    before = contents(tmp_path)
    again = lora()
    calls = []
    again.register_forward_pre_hook(lambda *_: calls.append(1))
    with caplog.at_level(logging.WARNING):
        assert run(tmp_path, model=again) == result
    assert not calls
    assert "already finished, in 8 steps" in "\n".join(caplog.messages)
    assert contents(tmp_path) == before
    for (name, a), (_, b) in zip(first.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_run_stopped_before_its_first_checkpoint_leaves_nothing(tmp_path):
    with pytest.raises(Stopped):
        run(tmp_path / "a", stop=2, eval_every=1)
    run(tmp_path / "a", learning_rate=2e-2, validation=False)
    run(tmp_path / "b", learning_rate=2e-2, validation=False)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "a" / "best").exists()


def test_runs_that_say_nothing_of_themselves_and_other_versions(tmp_path, caplog):
    with pytest.raises(Stopped):
        run(tmp_path, save_every=2, stop=3)
    file = tmp_path / "run.json"
    said = json.loads(file.read_text())
    said["versions"]["torch"] = "2.11.0"
    file.write_text(json.dumps(said))
    with caplog.at_level(logging.WARNING), pytest.raises(Stopped):
        run(tmp_path, save_every=2, stop=5)
    assert "continues under other versions (torch 2.11.0 -> " in "\n".join(caplog.messages)
    file.unlink()
    with pytest.raises(ValueError, match=r"holds a run without run\.json"):
        run(tmp_path, save_every=2)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("result.json", "{}", "steps: is needed"),
        ("result.json", '{"steps": "many", "train_loss": 1, "eval_loss": null}', "steps: must be a whole number"),
        ("result.json", '["steps"]', "must be a mapping, got"),
        ("result.json", "", "Expecting value"),
        ("run.json", '{"versions": {}}', "depends_on: is needed"),
        ("run.json", '{"depends_on": {', "Expecting property name"),
        ("log.jsonl", '{"loss": 1.0}\n', "step: is needed"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, text, message):
    with pytest.raises(Stopped):
        run(tmp_path, save_every=2, stop=3)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"output: .*{name} is damaged, .*{message}.*; train anew with --restart"):
        run(tmp_path, save_every=2)
    run(tmp_path, max_steps=1, resume=False)


def test_models_that_stand_in_the_folder_are_not_removed(tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "model.safetensors").write_bytes(b"somebody's")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"holds a run without run\.json"):
        run(tmp_path)
    assert contents(tmp_path) == before


def test_recipes(tmp_path):
    """The recipe of a refused run is not written beside the old run; a base model is known by its weights."""
    tokenizer = make_tokenizer()
    for name, base in (("model", tiny_model("llama")), ("same", tiny_model("llama")), ("other", shifted_base())):
        base.resize_token_embeddings(300)
        torch.manual_seed(1)
        torch.nn.init.normal_(base.get_input_embeddings().weight)
        torch.nn.init.normal_(base.lm_head.weight)
        base.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"prompt": "ab", "completion": c}) for c in "cdefgh"))
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump({
            "model": str(tmp_path / "model"), "output": str(tmp_path / "out"), "method": "full",
            "data": {"train": str(tmp_path / "train.jsonl"), "max_length": 16}, "training": {"batch_size": 2},
        })
    )  # fmt: skip

    def recipe(*overrides, resume=True):
        return train_recipe(load_recipe(tmp_path / "r.yaml", overrides), resume=resume)

    result = recipe()
    before = contents(tmp_path / "out")
    for override, message in (
        ("training.learning_rate=1e-3", r"training\.learning_rate: 0\.0003 -> 0\.001"),
        ("data.max_length=4", r"data\.max_length: 16 -> 4"),
        ("method=lora", r'holds another run, method: "full" -> "lora"; train anew with --restart \(.*another output$'),
        (f"model={tmp_path / 'other'}", r'model: "\w+" -> "\w+"'),
    ):
        with pytest.raises(ValueError, match=message):
            recipe(override)
    assert contents(tmp_path / "out") == before
    assert recipe(f"model={tmp_path / 'same'}", "training.log_every=1") == result
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == result.to_dict()
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["training"]["learning_rate"] == 3e-4
