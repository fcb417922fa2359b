"""lyapunov_exponents, and the stability protocol over Mamba models."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from test_mamba import FAMILIES, model_of
from test_package import save_base

import deftcore
from deftcore import ops
from deftcore.cli.main import main
from deftcore.methods.mamba import stability
from deftcore.training import TrainingConfig
from deftcore.training.task import Batches
from deftcore.training.text import TextTask
from deftcore.training.wrapping import add_adapter


def test_hand_made_systems():
    steady = ops.lyapunov_exponents(torch.full((2, 3, 7), 0.25), -torch.tensor([[1.0, 2.0], [4.0, 8.0], [3.0, 0.5]]))
    assert torch.equal(steady[1], -torch.tensor([[0.25, 0.5], [1.0, 2.0], [0.75, 0.125]]).double())
    alternating = torch.tensor([0.5, 1.5] * 4).expand(1, 1, 8)
    assert ops.lyapunov_exponents(alternating, torch.tensor([[-3.0]])).item() == -3.0
    nothing = ops.lyapunov_exponents(torch.zeros(1, 1, 5), torch.tensor([[-3.0]])).item()
    assert nothing == 0
    assert math.copysign(1, nothing) == -1
    heads = ops.lyapunov_exponents(torch.full((1, 2, 4), 0.5), torch.tensor([-1.0, -4.0]))
    assert heads.tolist() == [[-0.5, -2.0]]
    assert ops.lyapunov_exponents(torch.zeros(1, 2, 0), -torch.ones(2, 1)).isnan().all()


def test_masks_and_segments():
    delta, a = torch.rand(2, 3, 20), -torch.rand(3, 4)
    mask = torch.ones(2, 20)
    mask[0, :8] = 0
    mask[1] = 0
    found = ops.lyapunov_exponents(delta, a, mask=mask)
    torch.testing.assert_close(found[0], ops.lyapunov_exponents(delta[:1, :, 8:], a)[0])
    assert found[1].isnan().all()
    parts = [ops.lyapunov_exponents(delta[..., s], a) * n for s, n in ((slice(6), 6), (slice(6, 20), 14))]
    torch.testing.assert_close(sum(parts) / 20, ops.lyapunov_exponents(delta, a))


def test_equals_two_runs():
    """ln(|dh_T| / |dh_0|) / T of the scan itself, same inputs and a disturbed state."""
    u, delta = torch.randn(1, 4, 30).double(), torch.randn(1, 4, 30).double() - 2
    a, b, c = -torch.rand(4, 3).double(), torch.randn(1, 3, 30).double(), torch.randn(1, 3, 30).double()
    starts = (torch.zeros(1, 4, 3).double(), torch.ones(1, 4, 3).double())
    ends = [
        ops.selective_scan(u, delta, a, b, c, delta_softplus=True, return_last_state=True, initial_state=start)
        for start in starts
    ]
    measured = (ends[1][1] - ends[0][1]).abs().log() / 30
    exact = ops.lyapunov_exponents(torch.nn.functional.softplus(delta), a)
    torch.testing.assert_close(measured, exact, rtol=1e-9, atol=1e-12)
    assert bool((exact <= 0).all())


@pytest.mark.parametrize(
    ("delta", "a", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 1), r"delta: must be \[B, D, L\]"),
        (torch.zeros(1, 3, 4), torch.zeros(2, 1), "A: shape must be"),
        (-torch.ones(1, 3, 4), torch.zeros(3, 1), "delta: steps must not be negative"),
        (torch.full((1, 3, 4), math.nan), torch.zeros(3, 1), "delta: steps must not be negative"),
        (torch.ones(1, 3, 4).int(), torch.zeros(3, 1), "delta: dtype must be"),
    ],
)
def test_bad_input(delta, a, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ops.lyapunov_exponents(delta, a)


@pytest.mark.parametrize("family", FAMILIES)
def test_exponents_of_a_model(family):
    """Not above zero in any layer, the same in one batch or two, and divergence zero against itself."""
    model = deftcore.patch(model_of(family)).eval()
    ids = torch.randint(1, 64, (4, 21))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    batch["attention_mask"][0, :5] = 0
    report = stability.exponents(model, [batch])
    assert len(report) == 2
    for layer in report.values():
        assert layer["min"] <= layer["mean"] <= layer["max"] <= 0
        assert layer["steps"] == 4 * 21 - 5
        assert layer["memory"] > 0
    halves = stability.exponents(model, [{k: v[:2] for k, v in batch.items()}, {k: v[2:] for k, v in batch.items()}])
    for name, layer in report.items():
        assert halves[name] == pytest.approx(layer, rel=1e-5)
    same = stability.divergence(model, copy.deepcopy(model), [batch], "fp32")
    assert same["mean_abs_logit"] == 0
    assert abs(same["kl"]) < 1e-6
    low = stability.divergence(model, copy.deepcopy(model), [batch], "bf16")
    assert 0 < low["mean_abs_logit"] < 0.2
    with pytest.raises(ValueError, match="has no Mamba mixer"):
        stability.exponents(torch.nn.Linear(2, 2), [batch])


def test_command(tmp_path, capsys):
    folder, mamba = tmp_path / "llama", tmp_path / "mamba"
    for path, model in ((folder, None), (mamba, model_of("mamba"))):
        path.mkdir()
        save_base(path, model)
    data = tmp_path / "text.txt"
    data.write_text("a small text that is repeated many times over. " * 400)
    command = [
        "lyapunov", str(mamba), str(data), "--output", str(tmp_path / "out"), "--steps", "0,2",
        "--precisions", "bf16,fp16", "--max-length", "32", "--against", str(folder),
    ]  # fmt: skip
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "largest exponent -" in printed
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    both = report["models"]
    assert [both[str(p)]["mamba"] for p in (mamba, folder)] == [True, False]
    last = both[str(mamba)]["checkpoints"][-1]
    assert last["step"] == 2
    assert {run["precision"] for run in last["runs"]} == {"fp32", "bf16", "fp16"}
    assert all(layer["max"] <= 0 for layer in last["lyapunov"].values())
    assert (tmp_path / "out" / "lyapunov.png").stat().st_size > 1000
    assert main([*command[:3], "--steps", "-1"]) == 2
    assert "steps: must be" in capsys.readouterr().err
    assert main(["lyapunov", str(folder), str(data), "--output", str(tmp_path / "none"), "--steps", "0"]) == 2
    assert "is not a Mamba" in capsys.readouterr().err


def test_a_run_that_diverges_is_reported(tmp_path, monkeypatch):
    """The others go on, and what stood before the step is compared."""
    folder, data = tmp_path / "mamba", tmp_path / "text.txt"
    folder.mkdir()
    save_base(folder, model_of("mamba"))
    data.write_text("a small text that is repeated many times over. " * 400)
    plain, calls = TextTask.output, []

    def output(self, model, batch):
        result = plain(self, model, batch)
        if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.float16:
            calls.append(1)
            if len(calls) == 2:
                result.loss = result.loss * float("nan")
        return result

    monkeypatch.setattr(TextTask, "output", output)
    out = str(tmp_path / "out")
    report = stability.run(str(folder), str(data), out, precisions=["fp16", "bf16"], steps=[0, 1, 3], max_length=32)
    result = report["models"][str(folder)]
    assert result["diverged"] == [{"precision": "fp16", "seed": 0, "step": 2}]
    found = {entry["step"]: [run["precision"] for run in entry["runs"]] for entry in result["checkpoints"]}
    assert found == {0: ["fp16", "bf16", "fp32"], 1: ["fp16", "bf16", "fp32"], 3: ["bf16", "fp32"]}
    assert "  fp16 seed 0: diverged, no loss at step 2" in stability.lines(report)


def test_runs_share_data_and_beginning():
    """A step of the protocol is a step of plain AdamW on the same batches, written out here."""
    model, task = model_of("mamba"), TextTask()
    examples = [{"input_ids": torch.randint(1, 64, (n,)).tolist()} for n in (9, 7, 8, 6, 9)]
    config = TrainingConfig(
        max_steps=4, batch_size=2, learning_rate=1e-2, schedule="constant", warmup_ratio=0, max_grad_norm=0, seed=3
    )
    found, diverged = stability.trained_parts(copy.deepcopy(model), examples, config, [0, 2, 4], task, "here")
    assert diverged is None
    torch.manual_seed(3)
    plain = add_adapter(copy.deepcopy(model), "mamba-lora", {"r": 8, "lora_alpha": 16}).train()
    parameters = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.0)
    batches = Batches(examples, 2, task.collate, seed=3)
    order = [batch for epoch in range(2) for batch in batches.epoch(epoch)]
    for step in range(5):
        if step in found:
            for name, p in parameters.items():
                torch.testing.assert_close(found[step][name], p.detach(), rtol=1e-5, atol=1e-7)
        plain(**order[step]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert found.keys() == {0, 2, 4}
    assert stability.trained_parts(
        copy.deepcopy(model), examples, dataclasses.replace(config, max_steps=0), [0], 0, ""
    )[0][0]
