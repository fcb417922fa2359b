"""Adaptive gates: where they stand, folding into every kind of layer, files, the Trainer, several processes."""

import copy
import pickle

import peft
import pytest
import torch
import transformers
from conftest import FAMILIES, task_type, tiny_batch, tiny_model
from safetensors.torch import load_file
from test_integrations import DeftTrainer, Ragged, trainer_for
from test_nn import whole_blocks
from test_package import save_base
from torch.utils.data import SequentialSampler
from transformers import TrainingArguments
from two_processes import as_launched, run_in_two

import deftcore
from deftcore.methods.deft.export import export
from deftcore.methods.deft.measure import measure_density
from deftcore.methods.deft.objective import DensityLoss
from deftcore.methods.lora.bottleneck import BottleneckConfig
from deftcore.methods.s2ft.config import S2ftConfig
from deftcore.methods.s2ft.delta import extract_adapter
from deftcore.models.checkpoints import load_model, load_tokenizer
from deftcore.training import TrainingConfig, encode, read_records, train
from deftcore.training.adapters import load_adapter
from deftcore.training.wrapping import add_adapter

THETA = (0.3, -1.2, 1.0, -0.4)


def gated(model):
    """An objective whose gates differ from block to block."""
    objective = DensityLoss(model, adaptive="gate")
    with torch.no_grad():
        (theta,) = objective.parameters()
        theta.copy_(torch.tensor(THETA[: len(theta)]))
    return objective


def downs(base, family):
    """The down projections of a bare model, in forward order; written out here, not taken from the library."""
    if family == "t5":
        return [
            (*stack.block[i].layer,)[-1].DenseReluDense.wo for stack in (base.encoder, base.decoder) for i in (0, 1)
        ]
    if family in ("bert", "roberta"):
        return [layer.output.dense for layer in getattr(base, family).encoder.layer]
    layers = base.model.decoder.layers if family == "opt" else base.model.layers
    return [layer.fc2 if family == "opt" else layer.mlp.down_proj for layer in layers]


def perturbed(model):
    """Every trained tensor moved away from where it starts."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model.eval()


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gates_stand_beneath_bottlenecks(family, parallel):
    """Y = w * MLP(X) before the adapter: the model with gates is the one whose down projections are scaled."""
    config = BottleneckConfig(task_type=task_type(family), reduction_factor=4, parallel=parallel)
    plain = tiny_model(family)
    for down in downs(plain, family):
        if down.bias is not None:
            torch.nn.init.normal_(down.bias)
    reference = copy.deepcopy(plain)
    with torch.no_grad():
        for down, theta in zip(downs(reference, family), THETA, strict=False):
            for p in down.parameters():
                p.mul_(torch.sigmoid(torch.tensor(theta)))
        models = []
        for base in (reference, plain):
            torch.manual_seed(0)
            models.append(perturbed(peft.get_peft_model(base, copy.deepcopy(config))))
        reference, model = models
        objective = gated(model)
        expected = reference(**tiny_batch(family)).logits
        torch.testing.assert_close(model(**tiny_batch(family)).logits, expected, rtol=1e-4, atol=1e-5)
        objective.fold_gates()
        torch.testing.assert_close(model(**tiny_batch(family)).logits, expected, rtol=1e-4, atol=1e-5)
        objective.detach()
        sparse = deftcore.sparsify(model, path="sparse")  # the bottlenecks stay, over the sparse blocks
        torch.testing.assert_close(sparse(**tiny_batch(family)).logits, expected, rtol=1e-4, atol=1e-5)


def adapted(method, family):
    base = whole_blocks(family) if method.startswith("q") else tiny_model(family)
    if method.startswith("q"):
        deftcore.quantize(base, block_size=32)
    task = {"task_type": task_type(family)}
    if "lora" in method:
        biased = {"lora_bias": True, "target_modules": ["fc1", "fc2", "q_proj"] if family == "opt" else r".*dense"}
        options = biased if method == "lora_bias" else {"target_modules": "all-linear"}
        return peft.get_peft_model(base, peft.LoraConfig(**task, r=4, **options))
    options = {"storage": "split"} if method == "s2ft_split" else {}
    base = base.bfloat16() if method == "s2ft_bf16" else base
    return peft.get_peft_model(
        base, S2ftConfig(**task, channel_ratio=0.3, head_ratio=0.5, targets=["o", "down"], **options)
    )


@pytest.mark.parametrize(
    ("method", "family"),
    [("lora", f) for f in FAMILIES] + [("lora_bias", "opt"), ("lora_bias", "bert")]
    + [("qlora", "llama"), ("qlora", "opt")]
    + [(m, f) for m in ("s2ft", "s2ft_split", "s2ft_bf16", "qs2ft") for f in ("llama", "opt", "t5")],
)  # fmt: skip
def test_folding_changes_nothing(method, family):
    """Into LoRA with biases, S2FT in place, beside the weight and over 4 bits, and float32 masters; then merged."""
    model = perturbed(adapted(method, family))
    objective = gated(model)
    batch = tiny_batch(family)
    bounds = {"rtol": 0.05, "atol": 0.05} if method == "s2ft_bf16" else {"rtol": 1e-4, "atol": 1e-5}
    with torch.no_grad():
        expected = model(**batch).logits
        with model.disable_adapter():
            frozen = model(**batch).logits
        assert (frozen - expected).abs().max() > 4 * bounds["atol"]
        sparse = copy.deepcopy(model) if "q" not in method else None
        objective.fold_gates()
        torch.testing.assert_close(model(**batch).logits, expected, **bounds)
        with model.disable_adapter():  # the gates are the base's too
            torch.testing.assert_close(model(**batch).logits, frozen, **bounds)
        torch.testing.assert_close(model(**batch).logits, expected, **bounds)
        if sparse is not None:  # gates that nobody folded
            torch.testing.assert_close(deftcore.sparsify(sparse)(**batch).logits, expected, **bounds)
            model = model.merge_and_unload()
        else:
            model = deftcore.merge(model)
        torch.testing.assert_close(
            model(**batch).logits, expected, **(bounds if "q" not in method else {"rtol": 1e-3, "atol": 1e-4})
        )


def test_float32_masters_keep_their_precision():
    """A fold multiplies the float32 master, not the rounded weight that stands for it."""
    model = perturbed(adapted("s2ft_bf16", "llama"))
    objective = gated(model)
    name = "base_model.model.model.layers.1.mlp.down_proj"
    layer = model.get_submodule(name)
    (master,) = layer.slices
    before = master.detach().clone()
    objective.fold_gates()
    torch.testing.assert_close(master.detach(), before * torch.sigmoid(torch.tensor(THETA[1])), rtol=1e-6, atol=0)
    assert torch.equal(layer.trained(), master.detach().bfloat16())


def test_gates_fold_into_bitsandbytes(tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    sizes = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128}  # whole blocks: bitsandbytes needs them
    config = transformers.OPTConfig(vocab_size=64, num_hidden_layers=2, num_attention_heads=4, **sizes)
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path)
    batch = tiny_batch("opt")
    for nested in (False, True):
        options = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=nested)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=options)
        with pytest.raises(ValueError, match=r"layers\.0\.fc2: gates fold into .*patched bitsandbytes layers"):
            gated(model)
        deftcore.patch(model)
        objective = gated(model)
        with torch.no_grad():
            expected = model(**batch).logits
            objective.fold_gates()
            torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_folded_is_refused_before_training():
    """By name, with the model as it was."""
    dora = peft.get_peft_model(tiny_model("opt"), peft.LoraConfig(target_modules=["fc2"], use_dora=True))
    inside = peft.get_peft_model(tiny_model("llama"), BottleneckConfig(target_modules=["down_proj"]))
    for model, message in (
        (dora, r"layers\.0\.fc2: .*DoRA"),
        (inside, r"layers\.0\.mlp\.down_proj: .*BottleneckLayer"),
    ):
        with pytest.raises(ValueError, match=message):
            DensityLoss(model, adaptive="gate")
        assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match="modules: adaptive gates"):
        DensityLoss(tiny_model("llama"), adaptive="gate", modules=["model.layers.0.mlp.act_fn"])


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_gates_follow_the_model(family):
    """Copies have gates of their own; wrapping, merging and `detach` leave the gates where they belong."""
    model = tiny_model(family).eval()
    objective = gated(model)
    batch = tiny_batch(family)
    with torch.no_grad():
        expected = model(**batch).logits
        other = copy.deepcopy(model)
        torch.testing.assert_close(pickle.loads(pickle.dumps(other))(**batch).logits, expected)
        config = peft.LoraConfig(target_modules=["fc2" if family == "opt" else "down_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config)
        torch.testing.assert_close(model(**batch).logits, expected)
        perturbed(model)
        tuned = model(**batch).logits
        model = model.merge_and_unload()
        torch.testing.assert_close(model(**batch).logits, tuned, rtol=1e-4, atol=1e-5)
        objective.detach()
        torch.testing.assert_close(model(**batch).logits, tuned, rtol=1e-4, atol=1e-5)
        for p in objective.parameters():
            p.fill_(0.0)
        assert (model(**batch).logits - tuned).abs().max() > 1e-3
        torch.testing.assert_close(other(**batch).logits, expected)


def test_a_delta_of_a_gated_model_is_refused():
    model = perturbed(adapted("s2ft", "llama"))
    gated(model)
    with pytest.raises(ValueError, match="adaptive gates, which a delta adapter does not hold"):
        extract_adapter(model)


def test_files(tmp_path):
    """Gates beside an adapter are part of what `load_adapter` loads; another model's are refused, damaged ones too."""
    config = peft.LoraConfig(target_modules=["gate_proj"], task_type="CAUSAL_LM")
    model = perturbed(peft.get_peft_model(tiny_model("llama"), config))
    objective = gated(model)
    model.save_pretrained(tmp_path)
    objective.gates.save(tmp_path)
    batch = tiny_batch("llama")
    with torch.no_grad():
        again = load_adapter(tiny_model("llama"), tmp_path).eval()
        assert torch.equal(again(**batch).logits, model(**batch).logits)
        taken_over = DensityLoss(again, adaptive="gate")
        assert taken_over.gate_values() == objective.gate_values()
    with pytest.raises(ValueError, match=r"adaptive gates.*fold"):
        deftcore.save_sparse(again.get_base_model(), tmp_path / "sparse")
    with pytest.raises(FileNotFoundError, match="density_gates"):
        objective.gates.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="another model: blocks"):
        DensityLoss(tiny_model("opt"), adaptive="gate").gates.load(tmp_path)
    (tmp_path / "density_gates.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"density_gates\.safetensors is damaged"):
        load_adapter(tiny_model("llama"), tmp_path)


def test_trainer_saves_and_resumes_gates(tmp_path):
    """Resumed from the middle, the gates end where the whole run's end."""
    whole = trainer_for("llama", "lora", tmp_path / "a", adaptive="gate")
    whole.train()
    (theta,) = whole.objectives[0].parameters()
    assert (theta != 4).all()
    assert torch.equal(load_file(tmp_path / "a" / "checkpoint-6" / "density_gates.safetensors")["theta"], theta)
    resumed = trainer_for("llama", "lora", tmp_path / "b", adaptive="gate")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert torch.equal(next(resumed.objectives[0].parameters()), theta)
    resumed.state.best_model_checkpoint = str(tmp_path / "a" / "checkpoint-3")
    resumed._load_best_model()
    stored = load_file(tmp_path / "a" / "checkpoint-3" / "density_gates.safetensors")["theta"]
    assert torch.equal(next(resumed.objectives[0].parameters()), stored)


@pytest.mark.parametrize("quantize", [None, {"block_size": 32}])
@pytest.mark.parametrize("method", ["lora", "bottleneck", "prompt"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_density_and_export_know_the_gates(family, method, quantize, tmp_path):
    """`deftcore density --adapter` and `deftcore export` compute what was trained; skipped blocks keep adapters."""
    save_base(tmp_path / "base", whole_blocks(family))
    base = load_model(str(tmp_path / "base"), quantize=quantize)
    options = {"lora": {"target_modules": ["fc1", "up_proj", "fc2", "down_proj"]}, "prompt": {"num_virtual_tokens": 3}}
    model = perturbed(add_adapter(base, method, options.get(method, {})))
    objective = gated(model)
    model.save_pretrained(tmp_path / "adapter")
    objective.gates.save(tmp_path / "adapter")
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad():
        expected = model(ids).logits
        report = measure_density(
            str(tmp_path / "base"), str(tmp_path / "base" / "data.txt"), adapter=str(tmp_path / "adapter"),
            max_length=16, quantize=quantize,
        )  # fmt: skip
        objective.reset()
        inputs = {"max_length": 16, "is_encoder_decoder": False}
        tokenizer = load_tokenizer(tmp_path / "base")
        for example in encode(read_records(tmp_path / "base" / "data.txt"), tokenizer, **inputs):
            model(input_ids=torch.tensor([example["input_ids"]]))
        assert report["blocks"] == pytest.approx(objective.report()["blocks"], rel=1e-3)
        export(str(tmp_path / "base"), str(tmp_path / "out"), adapter=str(tmp_path / "adapter"), quantize=quantize)
        sparse = deftcore.load_sparse(tmp_path / "out")
        torch.testing.assert_close(sparse(ids).logits, expected, rtol=1e-3, atol=1e-4)
        last = list(objective.gate_values())[1]
        arguments = {"adapter": str(tmp_path / "adapter"), "skip": (last,), "quantize": quantize}
        export(str(tmp_path / "base"), str(tmp_path / "skipped"), **arguments)
        objective.gates.theta[1] = -1e4
        torch.testing.assert_close(
            deftcore.load_sparse(tmp_path / "skipped")(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-4
        )


# ---------------------------------------------------------------------------- several processes


class InOrder(DeftTrainer):
    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)


def train_in_processes(folder, batch_size):
    """What each process of the test below runs: the Trainer, bare losses, deftcore's own loop."""
    arguments = TrainingArguments(
        str(folder / "trainer"), per_device_train_batch_size=batch_size, gradient_accumulation_steps=2, max_steps=3,
        learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True, max_grad_norm=0.0,
        save_steps=100, logging_steps=1,
    )  # fmt: skip
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["gate_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_model("llama"), config)
    density = DensityLoss(model, surrogate="tanh", adaptive="gate", gamma=0.5)
    trainer = InOrder(model, arguments, train_dataset=Ragged("llama"), objective=density)
    trainer.train()
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    found = {"trainer": trained, "trainer's gates": density.gates.theta.detach().clone()}

    found["density"] = torch.tensor([entry["density"] for entry in trainer.state.log_history if "density" in entry])
    assert len(found["density"]) == 3
    rank, world = trainer.args.process_index, trainer.args.world_size
    rows = Ragged("llama").rows[:2]
    local = rows[rank::world]
    density.gates.zero_grad()
    model.zero_grad()
    model.train()
    model(**{name: torch.stack([row[name] for row in local]) for name in ("input_ids", "attention_mask")})
    density.loss().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    for grad in grads if world > 1 else []:  # as DistributedDataParallel does
        torch.distributed.all_reduce(grad)
        grad /= world
    found["loss"] = grads

    model = peft.get_peft_model(tiny_model("llama"), config)
    objective = DensityLoss(model, surrogate="tanh", adaptive="gate", gamma=0.5)
    examples = [
        {"input_ids": row["input_ids"][: int(row["attention_mask"].sum()) + 1].tolist()} for row in Ragged("llama").rows
    ]
    options = TrainingConfig(max_steps=3, batch_size=batch_size, learning_rate=1e-2, gradient_accumulation_steps=2)
    train(model, examples[:8], options, folder / f"loop{world}", objective=objective)
    found["loop's gates"] = objective.gates.theta.detach().clone()
    torch.save(found, folder / f"{world}-{rank}.pt")


def work(rank, port, folder):
    as_launched(rank, port)
    train_in_processes(folder, 1)


def test_two_processes_train_as_one(tmp_path):
    """Gates and window ratios under DistributedDataParallel, in the Trainer and in deftcore's loop; masks unequal."""
    train_in_processes(tmp_path, 2)
    run_in_two(work, tmp_path)
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for key, expected in one.items():
        torch.testing.assert_close(first[key], expected, rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
        torch.testing.assert_close(second[key], first[key], rtol=0, atol=0, msg=lambda m, key=key: f"{key}: {m}")
