"""Natural GaLore, KaSA and BA-LoRA under TRL's SFTTrainer."""

import runpy
from pathlib import Path

import peft
import pytest
import torch
from conftest import tiny_model
from test_data import make_tokenizer
from torch.nn import functional as F

import deftcore
from deftcore.methods.natural_galore.trainer import optimizer_of
from deftcore.training.trainer import ObjectiveTrainerMixin

trl = pytest.importorskip("trl", reason="TRL is not installed; it needs Python 3.11")
datasets = pytest.importorskip("datasets")
pytestmark = [
    pytest.mark.filterwarnings("ignore:NaturalGaLore. the state:UserWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing`:FutureWarning"),  # TRL's own use of Transformers
]
ADAPTER = {"r": 2, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
PENALTIES = {"kasa": (deftcore.KasaFactoredConfig, deftcore.KasaPenalty),
             "ba-lora": (deftcore.BaLoraConfig, deftcore.BaLoraPenalty)}  # fmt: skip


class SftWithObjective(ObjectiveTrainerMixin, trl.SFTTrainer):
    pass


def trainer_of(kind, folder, density=False, **options):
    arguments = trl.SFTConfig(
        str(folder), max_length=16, max_steps=4, save_steps=2, logging_steps=1, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True,
        **options,
    )  # fmt: skip
    rows = datasets.Dataset.from_list([{"input_ids": [(3 * i + j) % 60 + 4 for j in range(4 + i)]} for i in range(16)])
    common = {"args": arguments, "train_dataset": rows, "processing_class": make_tokenizer()}
    model = tiny_model("llama")
    if kind == "natural-galore":
        return trl.SFTTrainer(model=model, optimizers=(optimizer_of(arguments, model), None), **common)
    config, penalty = PENALTIES[kind]
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config(**ADAPTER))
    objectives = [penalty(model), *([deftcore.DensityLoss(model, surrogate="tanh")] if density else [])]
    return SftWithObjective(model=model, objective=objectives, **common)


def trained(trainer):
    return {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("kind", "logged"), [
    ("natural-galore", {"loss"}), ("kasa", {"kasa_l2", "density"}), ("ba-lora", {"ba_lora_diversity", "density"}),
])  # fmt: skip
def test_trains_and_resumes_bit_for_bit(tmp_path, kind, logged):
    """The adapters with DEFT's density loss beside their penalties."""
    galore = {"optim_args": "rank=4, update_proj_gap=2, natural_history=2"} if kind == "natural-galore" else {}
    whole, again = (trainer_of(kind, tmp_path, density=True, **galore) for _ in range(2))
    start = {name: p.detach().clone() for name, p in trained(whole).items()}
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, p in trained(whole).items():
        assert torch.equal(p, trained(again)[name]), name
        assert not torch.equal(p, start[name]), name
    assert sum(logged <= entry.keys() for entry in whole.state.log_history) == 4


@pytest.mark.parametrize("kind", PENALTIES)
def test_the_penalty_is_in_the_gradient(tmp_path, kind):
    """Of one micro-batch of two, beside the task's."""
    trainer = trainer_of(kind, tmp_path, optim="sgd")
    model, penalty = trainer.model.train(), trainer.objectives[0]
    with torch.no_grad():
        for p in trained(trainer).values():
            p.add_(0.1 * torch.randn_like(p))
    batches, items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, model.device)
    trainer.compute_loss(model, dict(batches[0]), num_items_in_batch=items).backward()
    found = {name: p.grad.clone() for name, p in trained(trainer).items()}
    model.zero_grad()
    output, labels = model(**batches[0]), batches[0]["labels"]
    task = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / items
    own = penalty.loss() if kind == "kasa" else penalty.loss(batches[0], output.logits)
    (task + own / 2).backward()
    for name, p in trained(trainer).items():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-6)
    model.zero_grad()
    task = F.cross_entropy(model(**batches[0]).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    (task / items).backward()
    assert any((found[name] - p.grad).abs().max() > 1e-5 for name, p in trained(trainer).items())


def test_the_example_learns_to_count(capsys):
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "trl_sft.py"), run_name="__main__")
    lines = [line for line in capsys.readouterr().out.splitlines() if "after 29 comes" in line]
    assert [line.partition(":")[0] for line in lines] == ["Natural GaLore", "KaSA", "BA-LoRA"]
    assert all(line.endswith(" 30") for line in lines), lines
