"""Runs of the command that SIGKILL ends, and the same command again: one of each method on a spectrum."""

import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_package import save_base

import deftcore
from deftcore.cli.main import main

ADAPTERS = {
    "natural-galore": {"rank": 4, "update_proj_gap": 7, "natural_history": 3},
    "kasa": {"r": 2, "target_modules": ["q_proj", "down_proj"]},
    "ba-lora": {"r": 2, "target_modules": ["q_proj", "down_proj"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", ADAPTERS)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, method, capsys):
    """Trained, exported and loaded from the command line, with DEFT's density loss."""
    (tmp_path / "base").mkdir()
    save_base(tmp_path / "base", intermediate_size=128)
    training = {"max_steps": 80, "save_every": 5, "log_every": 1, "learning_rate": 1e-2, "batch_size": 2}
    recipe = {
        "model": str(tmp_path / "base"), "output": "", "method": method, "adapter": ADAPTERS[method], "deft": True,
        "data": {"train": str(tmp_path / "base" / "data.txt"), "max_length": 16}, "training": training,
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    start = ["train", str(tmp_path / "r.yaml")]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "deftcore", *start, f"output={killed}"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None and not list(killed.glob("checkpoints/step-*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert list(killed.glob("checkpoints/step-*"))
    assert not (killed / "final").exists()
    for folder in (killed, whole):
        assert main([*start, f"output={folder}"]) == 0, capsys.readouterr().err
    name = "model.safetensors" if method == "natural-galore" else "adapter_model.safetensors"
    first, second = (load_file(folder / "final" / name) for folder in (killed, whole))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    adapter = [] if method == "natural-galore" else ["--adapter", str(whole / "final")]
    model = str(whole / "final") if method == "natural-galore" else recipe["model"]
    assert main(["export", model, str(tmp_path / "out"), *adapter]) == 0, capsys.readouterr().err
    assert deftcore.load_sparse(tmp_path / "out")(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
