"""The loop and recipes: exact resume, two processes, mistakes reported."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import accelerate
import peft
import pytest
import torch
from accelerate.utils import LoggerType
from conftest import tiny_model
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import deftcore
from deftcore.methods.deft.objective import DensityLoss
from deftcore.methods.s2ft.config import S2ftConfig
from deftcore.training import TrainingConfig, load_recipe, train
from deftcore.training import config as recipes
from deftcore.training.task import Batches
from deftcore.training.text import TextTask
from deftcore.training.wrapping import add_adapter

SCRIPT = """
import sys, time, torch
sys.path.insert(0, {tests!r})
from test_training import run

run({folder!r}, max_steps={steps}, save_every=2, pause={pause})
"""

# What is registered first runs last, just before the interpreter finalises: a thread of Gloo's might abort that.
TWO_PROCESSES = """
import atexit, os, pathlib, sys


def of_gloo():
    return [file for file in pathlib.Path("/proc/self/task").glob("*/comm") if "gloo" in file.read_text()]


atexit.register(lambda: of_gloo() and os._exit(3))
sys.path.insert(0, {tests!r})
from test_training import run_plain

for method in sys.argv[2:]:
    run_plain(pathlib.Path(sys.argv[1]) / method, 2, method)
assert of_gloo()
"""


def examples(count=30):
    generator = torch.Generator().manual_seed(4)
    lengths = torch.randint(3, 9, (count,), generator=generator).tolist()
    return [{"input_ids": torch.randint(2, 64, (n,), generator=generator).tolist()} for n in lengths]


class Stopped(Exception):
    """What ends a run before its end."""


def stop_after(model, folder, steps):
    """The run stops in the forward that follows the log line of a step."""

    def stop(*_):
        log = Path(folder) / "log.jsonl"
        if log.exists() and any(json.loads(line)["step"] >= steps for line in log.read_text().splitlines()):
            raise Stopped

    model.register_forward_pre_hook(stop)


def run(folder, *, pause=0.0, validation=True, model=None, resume=True, stop=0, data=None, **options):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "gate_proj"], task_type="CAUSAL_LM")
    model = model or peft.get_peft_model(tiny_model("llama"), config)
    objective = DensityLoss(model, surrogate="tanh", adaptive="gate", gamma=0.1)
    if pause:
        model.register_forward_hook(lambda *_: time.sleep(pause))
    if stop:
        stop_after(model, folder, stop)
    options = {"max_steps": 8, "batch_size": 4, "learning_rate": 1e-2, "log_every": 1} | options
    return train(
        model, data or examples(), TrainingConfig(**options), folder, objective=objective, resume=resume,
        validation=examples(9) if validation else None, save_model=lambda m, where: m.save_pretrained(where),
    )  # fmt: skip


def adapter_of(folder):
    return load_file(Path(folder) / "final" / "adapter_model.safetensors")


def assert_same_run(a, b):
    for name, tensor in adapter_of(a).items():
        assert torch.equal(tensor, adapter_of(b)[name]), name
    gates = [load_file(Path(f) / "final" / "density_gates.safetensors")["theta"] for f in (a, b)]
    assert torch.equal(*gates)
    assert (Path(a) / "log.jsonl").read_text() == (Path(b) / "log.jsonl").read_text()


def test_learns_and_reports(tmp_path):
    result = run(tmp_path, max_steps=40, eval_every=20)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    assert {"density", "density_loss", "learning_rate", "step"} <= lines[0].keys()
    assert result.steps == 40
    assert 0 < result.density < 1
    assert result.best_eval_loss <= result.eval_loss
    assert len(result.density_blocks) == 2
    assert (tmp_path / "best" / "adapter_model.safetensors").exists()
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".")]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_resume_is_exact(tmp_path, accumulation):
    options = {"save_every": 3, "eval_every": 4, "gradient_accumulation_steps": accumulation}
    run(tmp_path / "whole", **options)
    # The second run stops after step 3's checkpoint, has logged further, and continues.
    with pytest.raises(Stopped):
        run(tmp_path / "parts", stop=5, **options)
    with (tmp_path / "parts" / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    run(tmp_path / "parts", **options)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_starting_over_forgets_the_earlier_run(tmp_path):
    """A later checkpoint of the earlier run must not be what an interrupted new one continues from."""
    run(tmp_path / "fresh", max_steps=4, save_every=2)
    run(tmp_path / "again", max_steps=8, save_every=2)
    run(tmp_path / "again", max_steps=4, save_every=2, resume=False)
    assert {p.name for p in (tmp_path / "again").iterdir()} == {p.name for p in (tmp_path / "fresh").iterdir()}
    assert_same_run(tmp_path / "fresh", tmp_path / "again")
    assert {p.name for p in (tmp_path / "again" / "checkpoints").iterdir()} == {
        p.name for p in (tmp_path / "fresh" / "checkpoints").iterdir()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_of_slices_is_exact(tmp_path, dtype):
    """S2FT, in place and through float32 masters: the run that stopped ends where the whole one ends."""

    def model():
        config = S2ftConfig(channel_ratio=0.2, targets=["o", "down", "up"], task_type="CAUSAL_LM")
        return peft.get_peft_model(tiny_model("llama").to(dtype), config)

    run(tmp_path / "whole", model=model(), save_every=3)
    with pytest.raises(Stopped):
        run(tmp_path / "parts", model=model(), save_every=3, stop=5)
    run(tmp_path / "parts", model=model(), save_every=3)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_killed_run_resumes_exactly(tmp_path):
    """SIGKILL in mid-run, then the same command again."""
    run(tmp_path / "whole", max_steps=10, save_every=2)
    script = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "killed"), steps=10, pause=0.3)
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    deadline = time.time() + 60
    while time.time() < deadline and not list((tmp_path / "killed").glob("checkpoints/step-*")):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list((tmp_path / "killed").glob("checkpoints/step-*"))
    assert not (tmp_path / "killed" / "final").exists()
    run(tmp_path / "killed", max_steps=10, save_every=2)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_accumulation_equals_a_larger_batch(tmp_path):
    """Losses and densities are those of the global batch, however it is split; unequal lengths and masks included."""
    logs = []
    for size, accumulation in ((6, 1), (2, 3)):
        folder = tmp_path / str(size)
        torch.manual_seed(0)
        model = peft.get_peft_model(
            tiny_model("llama"), peft.LoraConfig(r=4, target_modules=["gate_proj"], task_type="CAUSAL_LM")
        )
        objective = DensityLoss(model, surrogate="tanh", adaptive="gate", gamma=0.5)
        config = TrainingConfig(
            max_steps=4, batch_size=size, gradient_accumulation_steps=accumulation, learning_rate=1e-2, log_every=1
        )
        train(model, examples(), config, folder, objective=objective)
        logs.append([json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()])
    for one, other in zip(*logs, strict=True):
        for key in ("loss", "density", "density_loss"):
            assert one[key] == pytest.approx(other[key], rel=2e-4), key


PARALLEL = ("lora", "qlora", "s2ft")


@pytest.fixture(scope="module")
def in_two_processes(tmp_path_factory):
    """The folder of a run per method, of `accelerate launch` with two CPU processes (`--multi_gpu` is its torchrun
    mode), half the batch each."""
    folder = tmp_path_factory.mktemp("two")
    script = folder / "run.py"
    script.write_text(TWO_PROCESSES.format(tests=str(Path(__file__).parent)))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
               "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
               str(script), str(folder), *PARALLEL]  # fmt: skip
    hidden = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | hidden
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("method", PARALLEL)
def test_two_processes_give_the_single_process_result(in_two_processes, tmp_path, method):
    """P11."""
    run_plain(tmp_path, 4, method)
    logs = [
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (tmp_path, in_two_processes / method)
    ]
    for one, two in zip(*logs, strict=True):
        assert one.keys() == two.keys()
        for key in ("loss", "density", "density_loss", "eval_loss", "eval_density"):
            if key in one:
                assert one[key] == pytest.approx(two[key], rel=1e-4), (key, one, two)


def run_plain(folder, batch_size, method):
    """Short and long examples with unlike losses: a mean of the processes' means is far from the mean over tokens."""
    torch.manual_seed(0)
    base = tiny_model("llama")
    with torch.no_grad():
        base.lm_head.weight *= 30
    generator = torch.Generator().manual_seed(4)
    lengths = torch.randint(2, 20, (32,), generator=generator).tolist()
    data = [{"input_ids": torch.randint(2, 64, (n,), generator=generator).tolist()} for n in lengths]
    if method == "qlora":
        deftcore.quantize(base, block_size=32)
    options = {"r": 4, "target_modules": ["gate_proj", "q_proj"]}
    if method == "s2ft":
        options = {"channel_ratio": 0.2, "targets": ["o", "down", "up"]}
    model = add_adapter(base, method, options)
    config = TrainingConfig(max_steps=4, batch_size=batch_size, learning_rate=1e-2, log_every=1)
    objective = DensityLoss(model, surrogate="tanh")
    train(model, data[:23], config, folder, objective=objective, validation=data[24:31])


@pytest.mark.parametrize("family", ["t5", "opt"])
def test_other_families_and_options(family, tmp_path):
    rows = [{**e, "labels": e["input_ids"]} for e in examples(12)]
    config = TrainingConfig(
        epochs=1,
        batch_size=4,
        mixed_precision="bf16",
        gradient_checkpointing=True,
        schedule="cosine",
        logger="tensorboard",
    )
    model = peft.get_peft_model(
        tiny_model(family), peft.LoraConfig(task_type="SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM")
    )
    result = train(model, rows, config, tmp_path, objective=DensityLoss(model))
    assert result.steps == 3
    assert result.density > 0
    events = EventAccumulator(str(tmp_path / "tensorboard" / "deftcore")).Reload()
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for name, value in logged[-1].items():
        if name != "step":
            assert [(e.step, e.value) for e in events.Scalars(name)][-1] == (3, pytest.approx(value, rel=1e-6))


@pytest.mark.parametrize(
    ("schedule", "after"),
    [
        ("linear", [1 - k / 6 for k in range(6)]),
        ("cosine", [math.cos(math.pi * k / 12) ** 2 for k in range(6)]),
        ("constant", [1.0] * 6),
        ("inverse_sqrt", [math.sqrt(2 / step) for step in range(2, 8)]),
    ],
)
def test_schedules(tmp_path, schedule, after):
    """A quarter of eight steps warms up from nothing; then the schedule begins at the full rate."""
    run(tmp_path, schedule=schedule, warmup_ratio=0.25, validation=False)
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([1e-2 * share for share in [0, 0.5, *after]], rel=1e-9)


def test_a_single_step_has_a_rate(tmp_path):
    """Warm-up begins at 0: a run that is nothing else trained nothing, and said so nowhere."""
    with pytest.raises(ValueError, match=r"training\.warmup_ratio: .*at a rate of 0, got 1"):
        run(tmp_path, max_steps=1, warmup_ratio=1.0)
    assert not list(tmp_path.iterdir())
    run(tmp_path, max_steps=1, warmup_ratio=0.5)
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])["learning_rate"] == 1e-2


def test_float16_on_a_cpu(tmp_path):
    """Products are in float16, losses are scaled, and a resumed run is the same."""
    model, seen = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(task_type="CAUSAL_LM")), set()
    model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").register_forward_hook(
        lambda module, inputs, output: seen.add(output.dtype)
    )
    train(model, examples(8), TrainingConfig(max_steps=1, mixed_precision="fp16"), tmp_path / "seen")
    assert seen == {torch.float16}
    options = {"save_every": 3, "mixed_precision": "fp16", "validation": False}
    run(tmp_path / "whole", **options)
    with pytest.raises(Stopped):
        run(tmp_path / "parts", stop=5, **options)
    scaler = torch.load(tmp_path / "parts" / "checkpoints" / "step-00000003" / "scaler.pt")
    assert scaler["scale"] > 1
    run(tmp_path / "parts", **options)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_several_trackers(tmp_path, monkeypatch):
    """Weights & Biases, by a stand-in for its package, beside TensorBoard and the log."""
    (tmp_path / "wandb.py").write_text(
        "calls = []\n"
        "class Run:\n"
        "    def log(self, values, step): calls.append((step, values))\n"
        "    def finish(self): calls.append('finish')\n"
        "def init(**about):\n"
        "    calls.append(about)\n"
        "    return Run()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.WANDB, LoggerType.TENSORBOARD])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    run(tmp_path / "out", logger=["wandb", "tensorboard"], log_every=4, validation=False)
    calls = sys.modules.pop("wandb").calls
    logged = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert calls[0]["project"] == "deftcore"
    assert calls[0]["config"]["max_steps"] == 8
    assert [{"step": step, **values} for step, values in calls[1:-1]] == logged
    assert calls[-1] == "finish"
    assert list((tmp_path / "out" / "tensorboard" / "deftcore").iterdir())


def test_a_missing_tracker_is_a_mistake_in_the_recipe(tmp_path, monkeypatch):
    path = tmp_path / "r.yaml"
    path.write_text("{model: m, output: o, data: {train: t}, training: {logger: jsonl}}")
    monkeypatch.setattr(recipes, "find_spec", lambda name: None)
    assert load_recipe(path).training.logger == ["jsonl"]
    for name in ("wandb", "tensorboard"):
        with pytest.raises(ValueError, match=f"training.logger: {name} is not installed: pip install {name}"):
            load_recipe(path, [f"training.logger=[jsonl, {name}]"])


def test_the_model_computes_in_its_own_dtype_afterwards(tmp_path):
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(task_type="CAUSAL_LM"))
    ids = torch.tensor([[3, 4, 5]])
    with torch.autocast("cpu", torch.bfloat16):
        lowered = model(ids).logits
    train(model, examples(8), TrainingConfig(max_steps=1, mixed_precision="bf16", learning_rate=1e-12), tmp_path)
    assert "autocast" not in repr(model.forward)
    with torch.no_grad():
        logits = model.eval()(ids).logits
        exact = model.double()(ids).logits
    assert (logits - exact).abs().max() < 0.1 * (lowered - exact).abs().max()


def test_qlora_with_deft_equals_lora_on_the_decoded_base(tmp_path):
    """Same seeds, same data: every step's loss and density, on 4-bit and on decoded weights.

    At ten times this learning rate a factor that starts one unit in the last place off ends as far away as another
    seed does, so that two right kernels differ too; here rounding stays rounding over the whole run.
    """
    from test_quantize import dequantised

    config = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    packed = deftcore.quantize(tiny_model("llama"), block_size=32)
    found, logs = {}, {}
    for name, base in (("decoded", dequantised(packed)), ("packed", packed)):
        torch.manual_seed(0)
        model = deftcore.patch(peft.get_peft_model(base, config))
        options = TrainingConfig(max_steps=40, batch_size=8, learning_rate=2e-3, log_every=1)
        found[name] = train(
            model, examples(), options, tmp_path / name, validation=examples(9),
            objective=DensityLoss(model, surrogate="tanh", alpha=1.0),
        )  # fmt: skip
        logs[name] = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
    assert len(logs["packed"]) == 41
    for packed_entry, decoded in zip(logs["packed"], logs["decoded"], strict=True):
        for key in decoded:
            near = {"abs": 1e-3} if "density" in key else {"rel": 1e-5}
            assert packed_entry[key] == pytest.approx(decoded[key], **near), (key, decoded)
    assert found["packed"].density < 0.3  # DEFT did its part: a random ReLU block is half active


def test_examples_are_needed(tmp_path):
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="examples"):
        train(model, [], TrainingConfig(), tmp_path)


def test_validation_that_measures_nothing_is_refused(tmp_path):
    """It gave a loss of 0, which no later one is below."""
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(task_type="CAUSAL_LM"))
    example = {"input_ids": [5, 6, 7]}
    with pytest.raises(ValueError, match="validation: none of 1 has anything to predict"):
        train(model, [example], TrainingConfig(), tmp_path, validation=[example | {"labels": [5, -100, -100]}])


def test_a_loss_that_is_no_number_stops_before_the_step(tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[9] = torch.nan
    before = model.lm_head.weight.clone()
    with pytest.raises(RuntimeError, match="the loss is nan at step 1"):
        train(model, [{"input_ids": [5, 9, 7]}], TrainingConfig(), tmp_path)
    assert torch.equal(model.lm_head.weight, before)


def test_batches_share_and_return():
    rows = [{"input_ids": [i, i]} for i in range(11)]
    collate = TextTask().collate
    whole = list(Batches(rows, 4, collate).epoch(3))
    assert sorted(i for b in whole for i in b["input_ids"][:, 0].tolist()) == list(range(11))
    assert [b["input_ids"].tolist() for b in Batches(rows, 4, collate).epoch(3, start=1)] == [
        b["input_ids"].tolist() for b in whole[1:]
    ]
    shares = [list(Batches(rows, 2, collate, process=p, processes=2).epoch(3)) for p in (0, 1)]
    for one, two, both in zip(*shares, whole, strict=True):
        assert one["input_ids"].tolist() + two["input_ids"].tolist() == both["input_ids"].tolist()
    assert [len(b["input_ids"]) for b in shares[0]] == [2, 2, 1]  # and two in the other process
    few = [Batches(rows[:9], 2, collate, process=p, processes=2) for p in (0, 1)]
    assert [(len(b), len(list(b.epoch(0))), b.left_out) for b in few] == [(2, 2, 1)] * 2


# ---------------------------------------------------------------------------- recipes


def test_recipe_overrides(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: m\noutput: o\ndeft: true\ndata:\n  train: t.txt\ntraining:\n  learning_rate: 3e-4\n")
    recipe = load_recipe(path, ["training.max_steps=7", "adapter.r=2", "deft.alpha=0.5"][:2])
    assert recipe.deft.enabled
    assert (recipe.training.max_steps, recipe.training.learning_rate, recipe.adapter) == (7, 3e-4, {"r": 2})


def test_recipe_reports_every_mistake_at_once(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("modle: m\ntraining:\n  batch_size: many\n  learning_rte: 1\ndeft: 3\n")
    with pytest.raises(ValueError, match="recipe") as caught:
        load_recipe(path, ["nonsense"])
    message = str(caught.value)
    for part in (
        "modle: unknown; did you mean model",
        "training.batch_size: must be a whole number, got 'many'",
        "training.learning_rte: unknown; did you mean learning_rate",
        "deft:",
        "'nonsense'",
    ):
        assert part in message
    path.write_text("training: {batch_size: 0, schedule: zigzag}\nmethod: magic\n")
    with pytest.raises(ValueError, match="model: is needed") as caught:
        load_recipe(path)
    for part in ("output", "data.train", "batch_size", "zigzag", "magic"):
        assert part in str(caught.value)
    for text, match in (("- 1", "mapping"), ("a: [", "not YAML")):
        path.write_text(text)
        with pytest.raises(ValueError, match=match):
            load_recipe(path)
    with pytest.raises(FileNotFoundError):
        load_recipe(tmp_path / "none.yaml")


MISTAKES = [
    ("adapter.rr=3", "adapter.rr: unknown; did you mean r"),
    ("adapter.target_modules=[q_proj", "adapter.target_modules: '[q_proj' is not YAML: line 1, column 8"),
    ("adapter.target_modules=3", "adapter.target_modules: must be a list or text, got 3"),
    ("adapter.r=true", "adapter.r: must be a number, got True"),
    ("adapter.layers_to_transform=true", "adapter.layers_to_transform: must be a list or a number, got True"),
    ("adapter.r=0", "adapter.r: must be at least 1, got 0"),
    ("adapter.lora_dropout=1.5", "adapter.lora_dropout: must be at most 1, got 1.5"),
    ("adapter.lora_dropout=.nan", "adapter.lora_dropout: must be a finite number, got nan"),
    ("adapter.task_type=CAUSAL_LM", "adapter.task_type: unknown; known: r, target_modules"),
    ("training.max_steps=.inf", "training.max_steps: must be a finite number, got inf"),
    ("training.max_steps=1.5", "training.max_steps: must be a whole number, got 1.5"),
    ("training.max_steps=-1", "training.max_steps: must be at least 0, got -1"),
    ("training.learning_rate=.nan", "training.learning_rate: must be a finite number, got nan"),
    ("training.learning_rate=0", "training.learning_rate: must be above 0, got 0"),
    ("training.learning_rate=", "training.learning_rate: must be a number, got ''"),
    ("training.learning_rte=1", "training.learning_rte: unknown; did you mean learning_rate"),
    ("training.warmup_ratio=2", "training.warmup_ratio: must be at most 1, got 2"),
    ("training.seed=4294967296", "training.seed: must be below 4294967296, got 4294967296"),
    ("training.gradient_checkpointing=maybe", "training.gradient_checkpointing: must be true or false, got 'maybe'"),
    ("training.schedule=zigzag", "training.schedule: must be one of linear, cosine, constant, inverse_sqrt, got"),
    ("training.logger=[tensorboard, paper]", "training.logger: must be one of jsonl, tensorboard, wandb, got 'paper'"),
    ("training=3", "training: must be a mapping, got 3"),
    ("training.batch_size.x=3", "training.batch_size.x: batch_size holds no fields, got 3"),
    ("data.max_length=1", "data.max_length: must be at least 2, got 1"),
    ("data.train=", "data.train: is needed"),
    ("model=", "model: is needed"),
    ("method=loora", "method: no method 'loora'; did you mean lora or qlora or ba-lora?"),
    ("method=full", "adapter: method full has no adapter, got r"),
    ("deft=3", "deft: must be a mapping, got 3"),
    ("deft.surrogate=l3", "deft.surrogate: must be one of l0, tanh, l1, got 'l3'"),
    ("quantize.block_size=33", "quantize.block_size: must be one of 32, 64"),
    ("quantize.block_size=32", "quantize: goes with method qlora, qba-lora, qkasa, qlight-peft or qs2ft, got 'lora'"),
    ("nonsense", "override: must be key=value, got 'nonsense'"),
]


@pytest.mark.parametrize(("override", "message"), MISTAKES, ids=[override for override, _ in MISTAKES])
def test_a_mistake_is_one_line_that_names_the_field(tmp_path, override, message):
    path = tmp_path / "r.yaml"
    path.write_text("{model: m, output: o, data: {train: t}, adapter: {r: 4}, training: {batch_size: 3}}")
    assert load_recipe(path).adapter == {"r": 4}
    with pytest.raises(ValueError, match="recipe") as caught:
        load_recipe(path, [override])
    assert f"r.yaml: {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_values_as_yaml_reads_them(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("{model: m, output: 7, data: {train: t, validation: }, training: {mixed_precision: no}, deft: on}")
    overrides = ["training.batch_size=4.0", "adapter.lora_dropout=1e-1", "deft.alpha=2", "deft.adaptive="]
    recipe = load_recipe(path, overrides)
    assert (recipe.output, recipe.data.validation, recipe.training.mixed_precision) == ("7", "", "no")
    assert (recipe.training.batch_size, recipe.adapter["lora_dropout"]) == (4, 0.1)
    assert (recipe.deft.enabled, recipe.deft.alpha, recipe.deft.adaptive) == (True, 2.0, "")
    with pytest.raises(ValueError, match="batch_size"):
        TrainingConfig(batch_size=0)
