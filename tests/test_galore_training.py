"""NaturalGaLore in training: recipes, Transformers' Trainer, data parallelism, FSDP2."""

import atexit
import copy
from contextlib import nullcontext

import pytest
import torch
import yaml
from conftest import Stopped, tiny_model
from safetensors.torch import load_file
from test_integrations import Rows
from test_package import save_base
from torch import nn
from transformers import Trainer, TrainingArguments
from two_processes import run_in_two

import deftcore
from deftcore.cli.main import main
from deftcore.methods.natural_galore.optimizer import NaturalGaLore
from deftcore.methods.natural_galore.trainer import optimizer_of
from deftcore.nn.sharding import whole
from deftcore.training import sizes

pytestmark = pytest.mark.filterwarnings("ignore:NaturalGaLore. the state:UserWarning")


# ---------------------------------------------------------------------------- recipes


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "base").mkdir()
    save_base(tmp_path / "base", intermediate_size=128)
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump({
            "model": str(tmp_path / "base"), "output": "", "method": "natural-galore",
            "adapter": {"rank": 4, "update_proj_gap": 3, "natural_history": 2},
            "data": {"train": str(tmp_path / "base" / "data.txt"), "max_length": 16},
            "training": {"max_steps": 8, "save_every": 4, "log_every": 1, "learning_rate": 1e-2, "batch_size": 2},
        })
    )  # fmt: skip
    return str(tmp_path / "r.yaml")


@pytest.mark.parametrize("method", ["natural-galore", "galore"])
def test_a_recipe_that_is_killed_goes_on_bit_for_bit(recipe, tmp_path, method, stopping):
    """Between checkpoint and end there are a new subspace and a full window."""
    adapter = ["adapter={rank: 4, update_proj_gap: 3}"] if method == "galore" else []
    start = ["train", recipe, f"method={method}", *adapter]
    assert main([*start, f"output={tmp_path / 'whole'}"]) == 0
    stopping()
    with pytest.raises(Stopped):
        main([*start, f"output={tmp_path / 'parts'}"])
    assert main([*start, f"output={tmp_path / 'parts'}"]) == 0
    whole_, parts, base = (
        load_file(tmp_path / name / "model.safetensors") for name in ("whole/final", "parts/final", "base")
    )
    assert all(torch.equal(whole_[name], parts[name]) for name in whole_)
    changed = {name for name in whole_ if not torch.equal(whole_[name], base[name])}
    assert changed == whole_.keys(), "every weight trains"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.rank=0", "adapter.rank: must be at least 1"),
        ("adapter.damping=0", "damping: must be finite and above 0"),
        ("adapter.history_dtype=fp8", "history_dtype: must be None, 'float32' or 'bfloat16'"),
        ("adapter.target_modules=[q_porj]", "target_modules: no module named 'q_porj'; did you mean q_proj"),
        ("method=galore", "method galore does not take natural_history"),
    ],
)
def test_mistakes_in_a_recipe_are_named(recipe, tmp_path, capsys, override, message):
    assert main(["train", recipe, f"output={tmp_path / 'x'}", override]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_what_a_run_says_of_its_memory():
    model = tiny_model("llama")
    optimizer = NaturalGaLore(deftcore.galore_param_groups(model, rank=4))
    line = sizes.describe(model, optimizer)[1]
    assert f"{optimizer.estimate_state_bytes().total / 1000:.3g} kB optimizer state" in line
    assert line.endswith("and activations on top")


# ---------------------------------------------------------------------------- Transformers' Trainer


def arguments(folder, **options):
    return TrainingArguments(
        str(folder), per_device_train_batch_size=4, max_steps=6, save_steps=3, learning_rate=1e-2, weight_decay=0.1,
        report_to=[], use_cpu=True, seed=1, disable_tqdm=True, **options,
    )  # fmt: skip


def trained(folder, resume=False, in_backward=False, **options):
    model = tiny_model("llama")
    args = arguments(folder, optim_args="rank=4, update_proj_gap=2, scale=0.5, natural_history=2", **options)
    optimizer = optimizer_of(args, model)
    trainer = Trainer(model, args, train_dataset=Rows("llama"), optimizers=(optimizer, None))
    with optimizer.step_in_backward() if in_backward else nullcontext():
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
    return model, optimizer


def test_under_the_trainer_and_resumed(tmp_path):
    """From the arguments by which users ask for GaLore, whatever `optim` says."""
    options = {"optim_target_modules": ["attn", "mlp"], "optim": "galore_adamw"}
    model, optimizer = trained(tmp_path, **options)
    again, _ = trained(tmp_path, resume=True, **options)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    projected, matrices, vectors = optimizer.param_groups
    assert (projected["rank"], projected["scale"], projected["natural_history"]) == (4, 0.5, 2)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]
    assert len(projected["params"]) == 14
    assert {p.dim() for p in matrices["params"]} == {2}
    assert {p.dim() for p in vectors["params"]} == {1}
    assert not torch.equal(model.lm_head.weight, tiny_model("llama").lm_head.weight)


def test_layer_by_layer_under_the_trainer(tmp_path):
    """With its schedule; it clips nothing, as no gradient is left to clip."""
    model, _ = trained(tmp_path / "a", max_grad_norm=0.0)
    again, _ = trained(tmp_path / "b", in_backward=True)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_the_trainer_makes_it_of_class_and_groups(tmp_path):
    model = tiny_model("llama")
    made = (NaturalGaLore, {"params": deftcore.galore_param_groups(model, rank=4), "lr": 1e-2})
    trainer = Trainer(model, arguments(tmp_path), train_dataset=Rows("llama"), optimizer_cls_and_kwargs=made)
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] > 0
    assert {group["rank"] for group in trainer.optimizer.param_groups} == {4, None}


@pytest.mark.parametrize(
    ("text", "message"),
    [("rnk=4", "optim_args: no option 'rnk'; did you mean rank"), ("rank=four", "optim_args: rank cannot be 'four'")],
)
def test_mistakes_in_the_trainers_arguments(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        optimizer_of(arguments(tmp_path, optim_args=text), tiny_model("llama"))


# ---------------------------------------------------------------------------- several processes


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 12, bias=False), nn.Linear(12, 6)

    def forward(self, x):
        return (self.down(torch.relu(self.up(x))) - x).square().mean()


OPTIONS = {"rank": 3, "update_proj_gap": 3, "natural_history": 3}


def optimizer_for(model):
    return NaturalGaLore(deftcore.galore_param_groups(model, **OPTIONS), lr=1e-2, weight_decay=0.1)


def data(step):
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(step))


def reference():
    model = Small()
    optimizer = optimizer_for(model)
    for step in range(7):
        optimizer.zero_grad()
        model(data(step)).backward()
        optimizer.step()
    return model, optimizer


def work(rank, port, folder):
    atexit.register((folder / f"finalised{rank}").touch)
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    half = slice(2 * rank, 2 * rank + 2)

    model = nn.parallel.DistributedDataParallel(Small())
    optimizer = optimizer_for(model)
    for step in range(7):
        optimizer.zero_grad()
        model(data(step)[half]).backward()
        optimizer.step()
    torch.save([model.module.state_dict(), optimizer.state_dict()], folder / f"ddp{rank}")
    with pytest.raises(RuntimeError, match="accumulate_in_subspace: is for one process, there are 2"):
        optimizer.accumulate_in_subspace()

    with optimizer.step_in_backward():
        model(data(7)[half]).backward()
        with pytest.raises(RuntimeError, match="step: 3 parameters have gradients, though they step in the backward"):
            optimizer.step()

    model = Small()
    optimizer = optimizer_for(model)
    with optimizer.step_in_backward():
        for step in range(7):
            model(data(step)[half]).backward()
    torch.save([model.state_dict(), optimizer.state_dict()], folder / f"backward{rank}")

    model = Small()
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    fully_shard(model, mesh=mesh)
    optimizer = optimizer_for(model)
    for step in range(7):
        if step == 2:  # from a file of each process
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = optimizer_for(model)
            optimizer.load_state_dict(state)
        if step == 4:  # as PyTorch's distributed checkpoints do
            state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
            optimizer = optimizer_for(model)
            set_optimizer_state_dict(model, optimizer, state)
        optimizer.zero_grad()
        model(data(step)[half]).backward()
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"step_in_backward: parameter 0 \(12, 6\) is sharded"):
        optimizer.step_in_backward()
    weights = {name: whole(p.detach()) for name, p in model.named_parameters()}
    states = [
        {n: whole(x) if isinstance(x, torch.Tensor) else x for n, x in s.items()} for s in optimizer.state.values()
    ]
    torch.save([weights, {"state": dict(enumerate(states))}], folder / f"fsdp{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return run_in_two(work, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("name", ["ddp", "backward", "fsdp"])
def test_two_processes_are_one(folder, name):
    """The state is the same on both, bit for bit; weights are those of one process with the whole batch."""
    (weights, state), (others, other) = (torch.load(folder / f"{name}{rank}", weights_only=True) for rank in (0, 1))
    for number, values in state["state"].items():
        for key, value in values.items():
            same = other["state"][number][key]
            assert torch.equal(value, same) if isinstance(value, torch.Tensor) else value == same, key
    model, optimizer = reference()
    for key, value in model.state_dict().items():
        assert torch.equal(weights[key], others[key])
        torch.testing.assert_close(weights[key], value, rtol=1e-4, atol=1e-5)
    assert [s["step"] for s in state["state"].values()] == [s["step"] for s in optimizer.state.values()] == [7] * 3


def test_processes_end_without_finalising(folder):
    """Gloo's threads may abort that."""
    assert not list(folder.glob("finalised*"))
