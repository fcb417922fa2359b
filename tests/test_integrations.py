"""patch/unpatch on PEFT's LoRA, the Trainer, sparse models on disk."""

import copy
import json
import logging
import pickle

import peft
import pytest
import torch
from conftest import FAMILIES, task_type, tiny_batch, tiny_model
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import deftcore
from deftcore.methods.deft.objective import DensityLoss
from deftcore.methods.lora.bottleneck import BottleneckConfig
from deftcore.methods.lora.layer import FusedLoraLinear
from deftcore.methods.s2ft.config import S2ftConfig
from deftcore.training.objective import Objective
from deftcore.training.trainer import ObjectiveTrainerMixin


def lora_model(family="llama", **options):
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type=task_type(family), r=4, init_lora_weights=False, **options)
    return peft.get_peft_model(tiny_model(family), config)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_patched_equals_unpatched(family, dropout):
    """Logits and gradients to 1e-5 in float32, the same random numbers drawn."""
    plain = lora_model(family, lora_dropout=dropout, target_modules="all-linear").train()
    patched = deftcore.patch(copy.deepcopy(plain))
    assert any(isinstance(m, FusedLoraLinear) for m in patched.modules())
    outputs = []
    for model in (plain, patched):
        torch.manual_seed(7)
        output = model(**tiny_batch(family))
        output.loss.backward()
        outputs.append(output.logits)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    for (name, p), q in zip(plain.named_parameters(), patched.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-5, msg=name)


def test_saves_the_same_bytes_and_loads_in_plain_peft(tmp_path):
    plain = lora_model()
    plain.save_pretrained(tmp_path / "plain")
    # One model before and after: PEFT writes target_modules in a set's order, which a copy need not share.
    patched = deftcore.patch(plain)
    patched.save_pretrained(tmp_path / "patched")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "patched" / name).read_bytes()
    again = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "patched").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**tiny_batch("llama")).logits, patched.eval()(**tiny_batch("llama")).logits)


def test_unpatch_merge_and_unusual_calls():
    model = lora_model().eval()
    batch = tiny_batch("llama")
    with torch.no_grad():
        ref = model(**batch).logits
        deftcore.patch(model)
        deftcore.patch(model)  # twice: no harm
        assert "Fused" in type(next(m for m in model.modules() if isinstance(m, FusedLoraLinear))).__name__
        pickle.loads(pickle.dumps(model))
        with model.disable_adapter():
            torch.testing.assert_close(model(**batch).logits, tiny_model("llama").eval()(**batch).logits)
        model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
        model.base_model.set_adapter(["default", "other"])
        torch.testing.assert_close(model(**batch).logits, ref, rtol=1e-4, atol=1e-5)
        model.set_adapter("default")
        model.merge_adapter()
        torch.testing.assert_close(model(**batch).logits, ref, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        deftcore.unpatch(model)
        assert not any(isinstance(m, FusedLoraLinear) for m in model.modules())
        torch.testing.assert_close(model(**batch).logits, ref, rtol=1e-4, atol=1e-5)


def test_autocast_and_bf16():
    for dtype, autocast in ((torch.float32, True), (torch.bfloat16, False)):
        plain = lora_model().to(dtype)
        patched = deftcore.patch(copy.deepcopy(plain))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            a, b = plain(**tiny_batch("llama")), patched(**tiny_batch("llama"))
        b.loss.backward()
        torch.testing.assert_close(a.logits.float(), b.logits.float(), rtol=0.05, atol=0.05)


def test_says_what_it_leaves_alone(caplog):
    kinds = "no PEFT LoRA, no bitsandbytes 4-bit layer, no 16-bit linear layer and no Mamba mixer"
    with pytest.raises(ValueError, match=kinds):
        deftcore.patch(tiny_model("llama"))
    model = lora_model(use_dora=True)
    with caplog.at_level(logging.WARNING, logger="deftcore"):
        deftcore.patch(model)
    assert "left alone" in caplog.text
    assert "q_proj" in caplog.text


# ---------------------------------------------------------------------------- Trainer


class Rows(Dataset):
    def __init__(self, family):
        torch.manual_seed(2)
        ids = torch.randint(2, 64, (24, 6))
        self.rows = [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": i} for i in ids]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


class DeftTrainer(ObjectiveTrainerMixin, Trainer):
    pass


def trainer_for(family, method, folder, adaptive=None, **options):
    torch.manual_seed(0)
    task = {"task_type": task_type(family)}
    config = {
        "lora": peft.LoraConfig(**task, r=4, lora_dropout=0.1),
        "bottleneck": BottleneckConfig(**task, reduction_factor=4),
        "s2ft": S2ftConfig(**task, channel_ratio=0.2, head_ratio=0.5, targets=["o", "down"]),
    }[method]
    model = peft.get_peft_model(tiny_model(family), config)
    if method == "lora":
        deftcore.patch(model)
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=4, max_steps=6, save_steps=3, learning_rate=1e-2, logging_steps=2,
        report_to=[], use_cpu=True, seed=1, disable_tqdm=True, **options,
    )  # fmt: skip
    density = DensityLoss(model, surrogate="tanh", adaptive=adaptive)
    return DeftTrainer(model, arguments, train_dataset=Rows(family), objective=density)


@pytest.mark.parametrize("method", ["lora", "bottleneck", "s2ft"])
@pytest.mark.parametrize("family", FAMILIES)
def test_trainer_trains_and_resumes_exactly(family, method, tmp_path):
    """The real Trainer: density is logged, and a run resumed from its middle ends where the whole run ended."""
    whole = trainer_for(family, method, tmp_path / "a")
    whole.train()
    assert any("density" in entry for entry in whole.state.log_history)
    resumed = trainer_for(family, method, tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    for (name, p), q in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    again = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path / "a" / "checkpoint-6").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**tiny_batch(family)).logits, whole.model.eval()(**tiny_batch(family)).logits)


def test_trainer_accumulation_keeps_the_scale(tmp_path):
    """The density loss of an optimizer step does not grow with the number of accumulation steps."""
    losses = []
    for accumulation in (1, 2):
        trainer = trainer_for("llama", "lora", tmp_path / str(accumulation), gradient_accumulation_steps=accumulation)
        trainer.args.max_steps = 1
        trainer.args.per_device_train_batch_size = 8 // accumulation
        trainer.args.logging_steps = 1
        trainer._train_batch_size = 8 // accumulation
        trainer.train()
        losses.append(next(e["loss"] for e in trainer.state.log_history if "loss" in e))
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


class Ragged(Rows):
    """Rows of unequal length: ten, so that windows of two micro-batches of two leave a short last one."""

    def __init__(self, family):
        super().__init__(family)
        self.rows = [{name: value.clone() for name, value in row.items()} for row in self.rows[:10]]
        for i, row in enumerate(self.rows):
            length = (6, 2, 3, 6, 1, 6, 2, 2, 5, 1)[i]
            row["attention_mask"][length:] = 0
            row["labels"][7 - length :] = -100
            if family == "t5":  # what its collator makes of the labels
                row["decoder_input_ids"] = torch.cat(
                    (torch.zeros(1, dtype=torch.int64), row["labels"][:-1].clamp(min=0))
                )


class NoTask(Trainer):
    """The density loss alone is left, and what the Trainer was given is kept."""

    def get_batch_samples(self, *args):
        samples, items = super().get_batch_samples(*args)
        self.windows = [*getattr(self, "windows", []), samples]
        return samples, items

    def compute_loss(self, *args, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(*args, return_outputs=True, **kwargs)
        return (loss * 0, outputs) if return_outputs else loss * 0


class DensityOnlyTrainer(ObjectiveTrainerMixin, NoTask):
    pass


class WithoutOutputs(Trainer):
    """As some of TRL's, it gives no outputs."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:
            raise ValueError("The WithoutOutputs does not support returning outputs")
        return super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)


class LogitNorm(Objective):
    """A loss on the logits."""

    needs_output = True

    def share(self, batch, output):
        return output.logits.square().mean()


class Labels(Objective):
    """Sees whether there are labels."""

    def share(self, batch, output):
        self.seen = set(batch)
        return torch.zeros(())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_an_objective_sees_the_whole_batch(tmp_path, smoothing):
    """Labels too, which the Trainer takes out where it smooths them."""
    model, inputs = tiny_model("llama").train(), tiny_batch("llama")
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, label_smoothing_factor=smoothing)
    trainer = DeftTrainer(model, arguments, objective=Labels())
    trainer.compute_loss(model, dict(inputs))
    assert trainer.objectives[0].seen == inputs.keys()


class Fused(WithoutOutputs):
    """As TRL's, its forward gives a loss without logits."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        plain = model.forward
        model.forward = lambda **batch: {"loss": plain(**batch).loss}
        try:
            return model(**inputs)["loss"]
        finally:
            del model.forward


@pytest.mark.parametrize("base", [Trainer, WithoutOutputs, Fused])
def test_outputs_for_objectives_that_need_them(tmp_path, base):
    """From every Trainer, in the graph, whatever it returns; the others are not asked."""
    trainer_class = type("Ours", (ObjectiveTrainerMixin, base), {})
    model, inputs = tiny_model("llama").train(), tiny_batch("llama")
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, max_steps=2, save_steps=9, logging_steps=1)
    density = DensityLoss(model, surrogate="tanh")
    trainer = trainer_class(model, arguments, train_dataset=Rows("llama"), objective=density)
    trainer.train()
    assert 0 < trainer.state.log_history[0]["density"] < 1
    density.detach()
    model.zero_grad()
    trainer_class(model, arguments, objective=LogitNorm()).compute_loss(model, dict(inputs)).backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    output = model(**inputs)
    (output.loss + output.logits.square().mean()).backward()
    for ours, p in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad)
    assert not model._forward_hooks


@pytest.mark.parametrize(("config", "penalty", "logged"), [
    (deftcore.KasaFactoredConfig, deftcore.KasaPenalty, "kasa_l2"),
    (deftcore.BaLoraConfig, deftcore.BaLoraPenalty, "ba_lora_consistency"),
])  # fmt: skip
def test_density_beside_a_penalty(tmp_path, config, penalty, logged):
    """Both are in the gradient, and in the log; of one name there can be one."""
    options = {"r": 2, "target_modules": ["q_proj", "gate_proj", "up_proj"], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(tiny_model("llama"), config(**options)).train()
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, max_steps=2, logging_steps=1)
    objectives = [penalty(model), DensityLoss(model, surrogate="tanh")]
    trainer = DeftTrainer(model, arguments, train_dataset=Rows("llama"), objective=objectives)
    inputs, trained = tiny_batch("llama"), [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trained:
            p.add_(0.1 * torch.randn_like(p))

    def gradients(loss):
        return torch.autograd.grad(loss, trained)

    found = gradients(trainer.compute_loss(model, dict(inputs)))
    output = model(**inputs)
    density = objectives[1].loss()
    own = objectives[0].loss() if penalty is deftcore.KasaPenalty else objectives[0].loss(inputs, output.logits)
    for ours, expected in zip(found, gradients(output.loss + own + density), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
    trainer.train()
    assert all({logged, "density"} <= entry.keys() for entry in trainer.state.log_history[:2])
    with pytest.raises(ValueError, match="objective: each must have a name of its own"):
        DeftTrainer(model, arguments, objective=objectives[:1] * 2)


@pytest.mark.parametrize(("config", "penalty", "logged"), [
    (deftcore.KasaFactoredConfig, deftcore.KasaPenalty, "kasa_l2"),
    (deftcore.BaLoraConfig, deftcore.BaLoraPenalty, "ba_lora_diversity"),
])  # fmt: skip
def test_penalties_on_classifiers(tmp_path, config, penalty, logged):
    """Head and adapter train, are evaluated, and go on from a checkpoint bit for bit."""

    def trainer():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = BertForSequenceClassification(BertConfig(vocab_size=64, num_labels=7, **sizes, **rates))
        model = peft.get_peft_model(model, config(r=2, target_modules=["query", "value"], task_type="SEQ_CLS"))
        rows = [{"input_ids": row["input_ids"], "labels": i % 7} for i, row in enumerate(Rows("bert").rows)]
        arguments = TrainingArguments(
            str(tmp_path), report_to=[], use_cpu=True, max_steps=4, save_steps=2, logging_steps=1, learning_rate=1e-2
        )
        return DeftTrainer(model, arguments, train_dataset=rows, eval_dataset=rows, objective=penalty(model))

    whole, again = trainer(), trainer()
    start = {name: p.clone() for name, p in whole.model.named_parameters() if p.requires_grad}
    whole.train()
    assert sum(logged in entry for entry in whole.state.log_history) == 4
    assert whole.evaluate()["eval_loss"] > 0
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    others = dict(again.model.named_parameters())
    assert any("classifier" in name for name in start)
    for name, p in whole.model.named_parameters():
        assert torch.equal(p, others[name]), name
        assert name not in start or not torch.equal(p, start[name]), name


@pytest.mark.parametrize(("smoothing", "shares"), [(0.0, True), (0.1, True), (0.0, False)])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_trainer_takes_the_ratio_of_the_windows_sums(family, smoothing, shares, tmp_path):
    """Unequal padding and a short last window, against sums in float64; also where label smoothing takes the labels
    away before the model sees them, and where the model's losses are means that the Trainer divides."""
    model = tiny_model(family)
    reference = copy.deepcopy(model).double().train()
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=1, optim="sgd",
        learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0, report_to=[], use_cpu=True, save_steps=100,
        disable_tqdm=True, label_smoothing_factor=smoothing,
    )  # fmt: skip
    trainer = DensityOnlyTrainer(
        model, arguments, train_dataset=Ragged(family), objective=DensityLoss(model, surrogate="tanh")
    )
    trainer.model_accepts_loss_kwargs = shares
    trainer.train()
    assert [len(window) for window in trainer.windows] == [2, 2, 1]
    seen = []
    for name, module in reference.named_modules():
        if name.endswith((".act_fn", ".DenseReluDense.act")):
            side = name.split(".")[0]
            module.register_forward_hook(lambda m, x, a, side=side: seen.append((side, a)))
    for window in trainer.windows:
        blocks, tokens = {}, {"model": 0.0, "encoder": 0.0, "decoder": 0.0}
        for batch in window:
            masks = {"model": batch["attention_mask"] != 0, "encoder": batch["attention_mask"] != 0}
            masks["decoder"] = batch["labels"] != -100
            for side in tokens:
                tokens[side] += masks[side].sum()
            seen.clear()
            reference(**{name: value for name, value in batch.items() if name != "decoder_input_ids"})
            for i, (side, a) in enumerate(seen):
                blocks[side, i] = blocks.get((side, i), 0) + torch.tanh(20 * a.abs())[masks[side]].sum()
        loss = sum(total / (tokens[side] * 72) / 2 for (side, _), total in blocks.items())
        assert len(blocks) == (4 if family == "t5" else 2)
        reference.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in reference.parameters():
                if p.grad is not None:
                    p -= 0.1 * p.grad
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.detach().double(), q.detach(), rtol=1e-5, atol=1e-6, msg=name)


# ---------------------------------------------------------------------------- sparse models on disk


def test_save_and_load_sparse(tmp_path):
    model = tiny_model("llama").eval()
    batch = tiny_batch("llama")
    with torch.no_grad():
        ref = model(**batch).logits
        deftcore.save_sparse(model, tmp_path / "whole")
        torch.testing.assert_close(deftcore.load_sparse(tmp_path / "whole")(**batch).logits, ref, rtol=1e-4, atol=1e-5)
        name = "model.layers.1.mlp"
        deftcore.save_sparse(model, tmp_path / "skipped", skip=[name], tau={"model.layers.0.mlp": 0.01})
        small = deftcore.load_sparse(tmp_path / "skipped")
        torch.testing.assert_close(
            small(**batch).logits,
            deftcore.sparsify(model, skip=[name], tau={"model.layers.0.mlp": 0.01})(**batch).logits,
        )
    sizes = [(tmp_path / d / "model.safetensors").stat().st_size for d in ("whole", "skipped")]
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize("whole", [True, False])
def test_unmerged_models_are_not_written(tmp_path, whole):
    """Their names are PEFT's: the folder would hold the adapter alone, or weights that nothing finds."""
    model = lora_model("llama", target_modules=["gate_proj", "q_proj"])
    with pytest.raises(ValueError, match=r"model: has an adapter.*merge"):
        deftcore.save_sparse(model if whole else model.get_base_model(), tmp_path / "m")
    prompted = peft.get_peft_model(
        tiny_model("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    if whole:
        with pytest.raises(ValueError, match="model: has an adapter"):
            deftcore.save_sparse(prompted, tmp_path / "m")
    assert not list(tmp_path.iterdir())
    deftcore.load_sparse(deftcore.save_sparse(deftcore.merge(model), tmp_path / "m"))


def test_damaged_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="deftcore_sparse"):
        deftcore.load_sparse(tmp_path)
    folder = deftcore.save_sparse(tiny_model("llama"), tmp_path / "m")
    with pytest.raises(FileExistsError):
        deftcore.save_sparse(tiny_model("llama"), folder)
    model = tiny_model("llama")
    write, busy = model.save_pretrained, tmp_path / "busy"
    busy.mkdir()
    model.save_pretrained = lambda *args, **options: (write(*args, **options), (busy / "theirs").write_text("kept"))
    with pytest.raises(OSError, match="not empty"):  # somebody filled it meanwhile
        deftcore.save_sparse(model, busy)
    assert [file.name for file in busy.iterdir()] == ["theirs"]
    with pytest.raises(ValueError, match="no MLP block named x"):
        deftcore.save_sparse(tiny_model("llama"), tmp_path / "n", skip=["x"])
    settings = folder / "deftcore_sparse.json"
    good = settings.read_text()
    for bad in ("{", "[]", json.dumps({"tau": 3})):
        settings.write_text(bad)
        with pytest.raises(ValueError, match="damaged"):
            deftcore.load_sparse(folder)
    settings.write_text(good)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(Exception, match=r"(?i)safetensor|header|incomplete|invalid"):
        deftcore.load_sparse(folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["busy", "m"]  # no temporary folders are left
