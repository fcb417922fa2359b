"""What a run says it trains, and the memory that this takes."""

import peft
import pytest
import torch
from conftest import tiny_model
from test_training import Stopped, stop_after

import deftcore
from deftcore.training import TrainingConfig, sizes, train


def adamw(model):
    return torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("bits", [32, 4])
def test_counts_of_lora(bits):
    """Parameters by hand from the shapes; a 4-bit matrix counts the weights that it stands for."""
    base = tiny_model("llama")
    before = sum(p.numel() for p in base.parameters())
    dense = deftcore.quantize(base) if bits == 4 else base
    config = peft.LoraConfig(r=4, target_modules=["up_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(dense, config)
    wide, narrow = (getattr(base.config, name) for name in ("intermediate_size", "hidden_size"))
    count = base.config.num_hidden_layers * 4 * (wide + narrow)
    first, second = sizes.describe(model, adamw(model))
    share = f"{100 * count / (before + count):.3g} %"
    assert first == f"trains {count:,} of {before + count:,} parameters ({share}, {4 * count / 1000:.3g} kB)"
    held = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    parts = f"{held / 1000:.3g} kB weights + {4 * count / 1000:.3g} kB gradients + {8 * count / 1000:.3g} kB"
    assert second.startswith(f"memory: {parts} optimizer state = {(held + 12 * count) / 1000:.3g} kB, ")
    assert (held < 4 * before / 2) == (bits == 4)


def test_state_of_another_optimizer_is_left_out():
    model = tiny_model("llama")
    line = sizes.describe(model, torch.optim.SGD(model.parameters()))[1]
    count = sum(p.numel() for p in model.parameters())
    assert line.endswith(f" = {8 * count / 1000:.3g} kB, and optimizer state and activations on top")


def test_slices_that_train_in_place_count_once():
    base = tiny_model("llama")
    before = sum(p.numel() for p in base.parameters())
    model = peft.get_peft_model(base, deftcore.S2ftConfig(channel_ratio=0.2, targets=["down"]))
    assert f" of {before:,} parameters" in sizes.describe(model, adamw(model))[0]


def test_said_before_training(tmp_path, capsys):
    examples = [{"input_ids": [2, 3, 4]}] * 4
    result = train(tiny_model("llama"), examples, TrainingConfig(max_steps=1), tmp_path, validation=examples)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("trains ")
    assert lines[1].startswith("memory: ")
    assert result.best_step == 1


def test_the_best_step_is_kept_over_an_interruption(tmp_path):
    """The model gets worse from its first evaluation on: what is best stays the first one's."""
    examples = [{"input_ids": [2, 3, 4]}] * 8
    other = [{"input_ids": [9, 8, 7]}] * 4
    options = {"max_steps": 6, "eval_every": 2, "save_every": 2, "log_every": 1, "batch_size": 2, "learning_rate": 1e-2}

    def run(folder, stop=0):
        torch.manual_seed(0)
        model = tiny_model("llama")
        if stop:
            stop_after(model, folder, stop)
        return train(model, examples, TrainingConfig(**options), folder, validation=other)

    whole = run(tmp_path / "whole")
    assert whole.best_step < 6
    with pytest.raises(Stopped):
        run(tmp_path / "parts", stop=5)
    assert run(tmp_path / "parts").best_step == whole.best_step
