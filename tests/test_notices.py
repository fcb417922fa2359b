"""What commands say while they work, and of what came out."""

import io
import logging
import re
from pathlib import Path

import pytest
from conftest import tiny_model
from rich.console import Console
from rich.progress import Progress
from test_package import save_base

from deftcore import _progress
from deftcore._progress import steps_bar
from deftcore.cli.main import main


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models and a text."""
    root = tmp_path_factory.mktemp("notices")
    for activation in ("relu", "silu"):
        (root / activation).mkdir()
        save_base(root / activation, tiny_model("llama", activation))
    return root


def train(base, output, *words, recipe="deft-lora"):
    return main(["train", recipe, f"model={base}", f"data.train={base / 'data.txt'}",
                 f"output={output}", "training.max_steps=2", "data.max_length=16", "device=cpu", *words])  # fmt: skip


# ---------------------------------------------------------------------------- activations without zeros


@pytest.mark.parametrize(
    ("activation", "recipe", "words", "told"),
    [
        ("silu", "deft-lora", (), True),
        ("silu", "deft-lora", ("deft=false",), False),
        ("silu", "deft-lora", ("swap=true",), False),
        ("silu", "deft-thresholds", (), False),
        ("relu", "deft-lora", (), False),
    ],
)
def test_the_density_loss_on_an_activation_without_zeros(place, tmp_path, caplog, activation, recipe, words, told):
    with caplog.at_level(logging.WARNING, logger="deftcore"):
        assert train(place / activation, tmp_path / "run", *words, recipe=recipe) == 0
    said = [message for message in caplog.messages if "is never exactly 0" in message]
    assert len(said) == told
    if told:
        assert said[0].startswith("deft: silu is never exactly 0: density counts what is above tau = 0.00032")
        assert "deftcore sparsify" in said[0]
        assert "deft-thresholds" in said[0]


def test_an_export_that_skips_nothing(place, tmp_path, caplog):
    data = str(place / "silu" / "data.txt")
    with caplog.at_level(logging.WARNING, logger="deftcore"):
        assert main(["export", str(place / "relu"), str(tmp_path / "relu")]) == 0
        sparsify = ["sparsify", str(place / "silu"), "--data", data, "--max-length", "24", "--device", "cpu"]
        assert main([*sparsify, "-o", str(tmp_path / "thresholds")]) == 0
        assert not [message for message in caplog.messages if "is never exactly 0" in message]
        assert main(["export", str(place / "silu"), str(tmp_path / "silu")]) == 0
    said = [message for message in caplog.messages if "few neurons may be skipped" in message]
    assert len(said) == 1
    assert "silu is never exactly 0" in said[0]
    assert "deftcore sparsify" in said[0]


# ---------------------------------------------------------------------------- a run that stopped


def interrupted_after(monkeypatch, steps):
    """The next run is stopped by Ctrl-C once it has made so many steps."""
    from deftcore.training.loop import _Run

    original, made = _Run._step, []

    def step(run, window):
        made.append(window)
        if len(made) > steps:
            monkeypatch.setattr(_Run, "_step", original)
            raise KeyboardInterrupt
        return original(run, window)

    monkeypatch.setattr(_Run, "_step", step)


def test_a_run_that_goes_on_says_so(place, tmp_path, monkeypatch, capsys, caplog):
    words = ("training.max_steps=4", "training.batch_size=2")
    interrupted_after(monkeypatch, 1)
    assert train(place / "relu", tmp_path / "run", "training.save_every=2", *words) == 130
    assert capsys.readouterr().err.endswith(
        "deftcore: stopped; no checkpoint was there yet (training.save_every): the same command begins lora again\n"
    )
    interrupted_after(monkeypatch, 3)
    assert train(place / "relu", tmp_path / "run", "training.save_every=2", *words) == 130
    error = capsys.readouterr().err
    assert error.endswith("deftcore: stopped; the same command, without --restart, continues from step 2\n")
    with caplog.at_level(logging.WARNING, logger="deftcore"):
        assert "continues from" not in caplog.text
        assert train(place / "relu", tmp_path / "run", *words) == 0
        assert f"{tmp_path / 'run'}: continues from step 2 of 4" in caplog.messages
        assert train(place / "relu", tmp_path / "run", *words) == 0
    assert "already finished, in 4 steps; nothing was trained. Train anew with --restart" in caplog.messages[-1]
    capsys.readouterr()
    assert train(place / "relu", tmp_path / "run", "training.max_steps=5", "training.batch_size=2") == 2
    error = capsys.readouterr().err
    assert "  steps: 4 -> 5 (training.max_steps, or epochs)\n" in error
    assert "train anew with --restart (in Python resume=False)" in error


# ---------------------------------------------------------------------------- progress


@pytest.mark.parametrize("width", [60, 80, 120])
def test_counts_and_times_stay_whole(width):
    console = Console(file=io.StringIO(), width=width)
    bar = steps_bar(console)
    bar.add_task("kasa", total=500, completed=75, note="loss 3.123  kasa_l2 0.123  kasa_l3 0.123  density 0.994")
    console.print(bar.get_renderable())
    (line,) = console.file.getvalue().splitlines()
    assert " 75/500 0:00:00 -:--:-- loss 3" in line
    assert line.endswith("density 0.994" if width == 120 else "…")


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_are_for_terminals(monkeypatch, terminal):
    """They leave nothing behind, and where nobody looks nothing at all."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=80)
    monkeypatch.setattr(_progress, "Console", lambda stderr: console)
    with _progress.working("reading weights"):
        pass
    assert list(_progress.tracked(range(3), "density")) == [0, 1, 2]
    assert ("reading weights" in file.getvalue()) == ("density" in file.getvalue()) == terminal
    file.truncate(0)
    list(_progress.tracked(range(3), "density", quick=True))
    monkeypatch.setenv("RANK", "1")
    list(_progress.tracked(range(3), "density"))
    with _progress.working("reading weights"):
        pass
    assert not file.getvalue().strip("\0")


def test_commands_that_take_long_show_how_far_they_are(place, tmp_path, monkeypatch):
    shown = []
    original = Progress.add_task

    def add_task(progress, label, *args, **kwargs):
        shown.append(label)
        return original(progress, label, *args, **kwargs)

    monkeypatch.setattr(Progress, "add_task", add_task)
    data = str(place / "relu" / "data.txt")
    assert main(["export", str(place / "relu"), str(tmp_path / "out")]) == 0
    assert shown == ["reading weights", "writing"]
    assert main(["density", str(place / "relu"), data, "--max-length", "24"]) == 0
    assert shown[2:] == ["reading weights", "density"]
    assert (
        main(["sparsify", str(place / "relu"), "--data", data, "-o", str(tmp_path / "less"), "--max-length", "24"]) == 0
    )
    assert shown[4:] == ["reading weights", "thresholds", "dense", "sparse", "writing"]


# ---------------------------------------------------------------------------- data, densities, adapters


def test_text_that_is_no_json(place, tmp_path, capsys):
    """And which file it was."""
    for name, text, hint in (
        ("a.jsonl", "the quick brown fox", "; a file of plain text must end in .txt"),
        ("b.jsonl", '{"text": "ab", }', ""),
    ):
        (tmp_path / name).write_text(text)
        for field in ("data.train", "data.validation"):
            assert train(place / "relu", tmp_path / "run", f"{field}={tmp_path / name}") == 2
            error = capsys.readouterr().err
            assert error.startswith(f"deftcore: {field}: {tmp_path / name}:1 is not JSON: ")
            assert error.endswith(f"{hint}\n")
            assert ("plain text" in error) == bool(hint)


@pytest.mark.parametrize("validated", [False, True])
def test_over_what_a_density_is(place, tmp_path, capsys, validated):
    data = place / "relu" / "data.txt"
    assert train(place / "relu", tmp_path / "run", *([f"data.validation={data}"] if validated else [])) == 0
    over = "the validation data" if validated else "the last step's training tokens"
    assert re.search(rf"^density: 0\.\d+ \(over {over}\)$", capsys.readouterr().out, flags=re.MULTILINE)
    assert main(["density", str(place / "silu"), str(data), "--max-length", "24"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"data: {data}" in lines
    assert "tau: 0.0003162" in lines
    for name in ("density", "loss", "model.layers.0.mlp"):
        assert [line for line in lines if re.fullmatch(rf"{re.escape(name)}: \d\.\d{{4}}", line)], name
    assert main(["density", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "tau is 0 where the activation has exact zeros (ReLU)" in text
    assert "exclude_padding" in text


def test_plain_lora_is_no_other(place, tmp_path, capsys):
    assert train(place / "relu", tmp_path / "run") == 0
    words = ["export", str(place / "relu"), str(tmp_path / "out"), "--adapter", str(tmp_path / "run" / "final")]
    assert main([*words, "--lora"]) == 2
    assert "is PEFT's own LoRA already, which loads without deftcore" in capsys.readouterr().err


def test_the_page_lists_what_a_run_writes(place, tmp_path):
    data = place / "relu" / "data.txt"
    assert train(place / "relu", tmp_path / "run", f"data.validation={data}", "training.save_every=1") == 0
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    section = page.partition("## What a run writes")[2].partition("\n## ")[0]
    for path in (tmp_path / "run").iterdir():
        assert f"`{path.name}{'/' if path.is_dir() else ''}`" in section, path.name
    assert (tmp_path / "run" / "checkpoints").is_dir()  # until --restart, as it says there
