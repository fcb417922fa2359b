"""The commands over slim models and tasks."""

import copy
import json

import pytest
import torch
import transformers
from slim_models import assert_same, bottleneck_of, logits_of, lora_of, model_of, save_task, some_kept
from test_package import save_base

import deftcore
from deftcore.cli.main import main
from deftcore.models.coupled import stored_sizes
from deftcore.models.slimming import cut


def test_the_commands(tmp_path, capsys):
    """A task is an adapter to `generate` and `export`, a slim model a model to both."""
    base_folder = tmp_path / "base"
    base_folder.mkdir()
    save_base(base_folder, intermediate_size=128)
    base = deftcore.load_model(base_folder)
    made = save_task(base, tmp_path / "task")

    def answer(model, *options):
        assert main(["generate", str(model), "the quick", "--max-new-tokens", "8", "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)["text"]

    expected = answer(base_folder, "--adapter", str(tmp_path / "task"))
    assert expected != answer(base_folder)
    deftcore.save_slim(made.merge_and_unload(), tmp_path / "slim")
    for file in base_folder.glob("tokenizer*"):
        (tmp_path / "slim" / file.name).write_bytes(file.read_bytes())
    assert answer(tmp_path / "slim") == expected
    for i, source in enumerate((["base", "--adapter", str(tmp_path / "task")], ["slim"])):
        place = tmp_path / f"export{i}"
        assert main(["export", str(tmp_path / source[0]), str(place), *source[1:]]) == 0
        capsys.readouterr()
        assert answer(place) == expected


@pytest.mark.parametrize(("kind", "wrap"), [("opt", bottleneck_of), ("llama", lora_of)])
def test_an_unmerged_task_is_exported(kind, wrap, tmp_path, capsys):
    """Bottlenecks on the outputs of attention and MLP, and LoRA over 4 bits, stay beside the slim model."""
    save_base(tmp_path, model_of(kind))
    base = deftcore.load_model(tmp_path, quantize={"block_size": 32} if kind == "llama" else None)
    if kind == "llama":
        base.save_pretrained(tmp_path)  # the base in 4 bits
    adapted = wrap(copy.deepcopy(base), kind)
    deftcore.slim(adapted, some_kept(base, round_to=32), requantize=True)
    deftcore.save_slim(adapted, tmp_path / "task")
    capsys.readouterr()
    words = [str(tmp_path), str(tmp_path / "out"), "--adapter", str(tmp_path / "task"), "--json"]
    assert main(["export", *words]) == 0
    assert json.loads(capsys.readouterr().out)["unmerged_adapter"]
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        found, expected = deftcore.load_sparse(tmp_path / "out")(input_ids=ids).logits, adapted(input_ids=ids).logits
    assert_same(found, expected, 1e-3)


@pytest.mark.parametrize("recipe", ["deft-lora", "deft-qlora", "s2ft"])
def test_training_on_a_slim_model(recipe, tmp_path, capsys):
    """Other methods train on it as on any model, in 4 bits too; what they wrote is exported."""
    base, run, out = tmp_path / "base", tmp_path / "run", tmp_path / "out"
    base.mkdir()
    model = model_of("llama", "relu")
    cut(model, some_kept(model, round_to=32))
    save_base(base, model)
    assert stored_sizes(deftcore.load_model(base).config)
    data = base / "data.txt"
    overrides = [f"model={base}", f"data.train={data}", f"data.validation={data}", f"output={run}",
                 "training.max_steps=3", "data.max_length=16"]  # fmt: skip
    overrides += ["adapter.channel_ratio=0.1"] if recipe == "s2ft" else []
    capsys.readouterr()
    assert main(["train", recipe, *overrides, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == 3
    adapter = ["--adapter", str(run / "final"), *(["--quantize", "nf4"] if "qlora" in recipe else [])]
    assert main(["density", str(base), str(data), "--max-length", "16", "--json", *adapter]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(result["eval_loss"], rel=0.02)
    if "qlora" in recipe:
        return  # channels that are no whole blocks of 64 have no sparse form in 4 bits
    assert main(["export", str(base), str(out), "--adapter", str(run / "final")]) == 0
    assert main(["generate", str(out), "the quick", "--max-new-tokens", "4"]) == 0


def test_uniform_layers_from_a_recipe(tmp_path, capsys):
    """The merged result loads in Transformers; a config that cannot say it is refused before anything trains."""
    for kind in ("llama", "opt"):
        (tmp_path / kind).mkdir()
        save_base(tmp_path / kind, model_of(kind))

    def run(kind, *more):
        base, output = tmp_path / kind, f"output={tmp_path / 'run' / kind}"
        words = [f"model={base}", f"data.train={base / 'data.txt'}", output, "data.max_length=12", "training.epochs=1",
                 "training.max_steps=2", "adapter.estimate_steps=4", "adapter.head_ratio=0.5",
                 "adapter.uniform=true", *more]  # fmt: skip
        return main(["train", "light-peft", *words])

    assert run("llama") == 0
    task = tmp_path / "run" / "llama" / "final"
    merged = deftcore.load_slim(deftcore.load_model(tmp_path / "llama"), task).merge_and_unload().eval()
    assert merged.config.num_attention_heads == 2
    assert merged.config.intermediate_size == 48
    merged.save_pretrained(tmp_path / "stock")
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    assert torch.equal(logits_of(stock, "llama"), logits_of(merged, "llama"))
    capsys.readouterr()
    assert run("opt") == 2
    assert "adapter: uniform: the config of opt has no field for the size of a head" in capsys.readouterr().err
    assert not (tmp_path / "run" / "opt").exists()
    assert run("opt", "adapter.head_ratio=0") == 0
