"""The tasks on an accelerator give what they give on the CPU; the accelerator is a stand-in."""

import json
from types import SimpleNamespace

import pytest
import torch
from second_device import DEVICE, second_device
from test_mamba import model_of
from test_package import save_base

from deftcore.cli import generation
from deftcore.cli.main import main
from deftcore.training.keeper import Keeper

METHODS = {
    "lora": (["adapter.r=4"], []),
    "qlora": (["adapter.r=4"], ["--quantize", "nf4"]),
    "s2ft": (["adapter={channel_ratio: 0.2, strategy: activation}"], []),
}


def test_the_stand_in_is_a_device_of_its_own():
    here = torch.ones(3)
    with second_device():
        there = here.to(DEVICE)
        assert (
            there.device == torch.zeros(1, device=DEVICE).device == torch.tensor([1.0], device=DEVICE).device == DEVICE
        )
        assert there[torch.tensor([0])].device == (there + torch.tensor(1.0)).device == DEVICE
        assert there.cpu().device == here.copy_(there).device == torch.device("cpu")
        for mixed in (lambda: there + here, lambda: torch.cat([here, there]), there.numpy):
            with pytest.raises(RuntimeError, match=r"on one device|not supported"):
                mixed()


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a command on the CPU or on the second device, which the machine takes for its accelerator; its result."""
    for name, model, sizes in (("base", None, {"intermediate_size": 128}), ("mamba", model_of("mamba"), {})):
        (tmp_path / name).mkdir()
        save_base(tmp_path / name, model, **sizes)
    (tmp_path / "r.yaml").write_text(
        "{model: base, output: run, data: {train: base/data.txt, max_length: 16}, "
        "deft: {enabled: true, adaptive: gate}, training: {max_steps: 2, batch_size: 2, save_every: 1}}"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("lazy"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    # What PyTorch has for every accelerator, but not for a stand-in: random state, autocast.
    monkeypatch.setattr(torch, "lazy", SimpleNamespace(device_count=lambda: 0), raising=False)
    start = torch.autocast.__init__
    monkeypatch.setattr(torch.autocast, "__init__", lambda self, device_type, *a, **k: start(self, "cpu", *a, **k))

    def run(device, *arguments):
        capsys.readouterr()
        with second_device() as operations:
            assert main(["--verbose", *arguments, "--device", device, "--json"]) == 0
        assert (operations.away > 100) == (device != "cpu")
        return json.loads(capsys.readouterr().out)

    return run


def close(found, wanted, rel=1e-3):
    """Equal up to the order of sums."""
    assert found.keys() == wanted.keys()
    for name in found.keys() - {"seconds"}:
        if isinstance(found[name], dict):
            close(found[name], wanted[name], rel)
        elif isinstance(wanted[name], float):
            assert found[name] == pytest.approx(wanted[name], rel=rel), name
        else:
            assert found[name] == wanted[name], name


@pytest.mark.parametrize("method", METHODS)
def test_train_density_export_generate(run, tmp_path, method):
    options, quantize = METHODS[method]
    options = ["train", "r.yaml", "data.validation=base/data.txt", f"method={method}", *options]
    trained = [run(device, *options, f"output={device}") for device in ("cpu", "auto")]
    close(trained[1], trained[0])
    adapted = ["--adapter", "cpu/final", *quantize]
    close(
        *(run(device, "density", "base", "base/data.txt", *adapted, "--max-length", "16") for device in ("auto", "cpu"))
    )
    files = []
    for device, out in (("cpu", "out"), (str(DEVICE), "out-away")):
        run(device, "export", "base", out, *adapted)
        files.append({path.name: path.read_bytes() for path in (tmp_path / out).rglob("*") if path.is_file()})
    assert files[0] == files[1]
    for given in (["out"], ["base", *adapted]):
        write = ["generate", *given, "hello", "--max-new-tokens", "5"]
        assert run("auto", *write)["text"] == run("cpu", *write)["text"]


class Stopped(Exception):
    """What ends a run before its end."""


def test_a_run_resumes_exactly(run, monkeypatch):
    """From files that know no device: also a run that began on another one goes on."""

    def stop(keeper, step):
        checkpoint(keeper, step)
        raise Stopped

    checkpoint = Keeper.checkpoint
    options = ["train", "r.yaml", "adapter={r: 4, lora_dropout: 0.1}", "training.max_steps=3"]
    whole = run("auto", *options, "output=whole") | {"seconds": 0}
    for first in ("auto", "cpu"):
        with monkeypatch.context() as patched:
            patched.setattr(Keeper, "checkpoint", stop)
            with pytest.raises(Stopped):
                run(first, *options, f"output={first}")
        found = run("auto", *options, f"output={first}") | {"seconds": 0}
        assert first == "cpu" or found == whole
        close(found, whole)


def test_layers_are_proved_where_they_run(run, monkeypatch):
    run("cpu", "train", "r.yaml")
    seen = []
    monkeypatch.setattr(generation, "patch", lambda model: seen.append({p.device for p in model.parameters()}))
    run("auto", "generate", "base", "hello", "--max-new-tokens", "2", "--adapter", "run/final")
    assert seen == [{DEVICE}]


def test_lyapunov(run):
    options = ["lyapunov", "mamba", "base/data.txt", "--steps", "0,2", "--precisions", "", "--max-length", "16"]
    found = [run(device, *options) for device in ("auto", "cpu")]
    before, after = zip(*(each["models"]["mamba"]["checkpoints"] for each in found), strict=True)
    close(*(each["lyapunov"] for each in before))
    close(*(each["lyapunov"] for each in after), rel=0.01)  # Adam's first steps are signs
    assert after[0]["lyapunov"] != before[0]["lyapunov"]
