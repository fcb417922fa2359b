"""FSDP2: adapters, updates and checkpoints of a sharded model are those of the whole one. Two processes over Gloo."""

from functools import partial

import peft
import pytest
import torch
from conftest import tiny_batch, tiny_model
from s2ft_models import scaled, train, trainable, wrap
from safetensors.torch import load_file
from two_processes import run_in_two

from deftcore.methods.ba_lora.config import BaLoraConfig
from deftcore.methods.kasa.config import KasaFactoredConfig
from deftcore.methods.lora.bottleneck import BottleneckConfig
from deftcore.methods.s2ft.delta import DeltaAdapter, extract_adapter
from deftcore.nn.sharding import whole
from deftcore.training.identity import digest_tensors
from deftcore.training.run_folder import load_parameters, save_parameters
from deftcore.training.saving import save_trained

S2FT = {"targets": ["o", "down", "up"], "storage": "split", "modules_to_save": ["lm_head"]}


def s2ft():
    return wrap(scaled("llama"), **S2FT)


def bottleneck():
    torch.manual_seed(0)
    config = BottleneckConfig(task_type="CAUSAL_LM", reduction_factor=4, modules_to_save=["lm_head"])
    model = peft.get_peft_model(tiny_model("llama"), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "bottleneck_up" in name:
                p.normal_(std=0.1)
    return model


def lora():
    torch.manual_seed(0)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=False, modules_to_save=["lm_head"]
    )
    return peft.get_peft_model(tiny_model("llama"), config)


def beside_a_pair(config):
    """KaSA or BA-LoRA, whose files hold a frozen pair too."""
    torch.manual_seed(0)
    options = {"r": 2, "target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]}
    model = peft.get_peft_model(tiny_model("llama"), config(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.add_(0.1 * torch.randn_like(p))
    return model


class NoTokenizer:
    def save_pretrained(self, folder):
        pass


MAKE = {
    "s2ft": s2ft, "bottleneck": bottleneck, "kasa": partial(beside_a_pair, KasaFactoredConfig),
    "ba-lora": partial(beside_a_pair, BaLoraConfig),
}  # fmt: skip
WHOLE = {
    "lora": lora,
    "kasa pipeline": MAKE["kasa"],
    "full": lambda: tiny_model("llama"),
}  # saved by the training pipeline


def even_batch():
    return {key: tiny_batch("llama")["input_ids"] for key in ("input_ids", "labels")}


def work(rank, port, folder):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))

    def shard(model):
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        for layer in base.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(base, mesh=mesh)
        return model

    def step(model, count):
        return train(model, {key: value[rank : rank + 1] for key, value in even_batch().items()}, count)

    for name, make in MAKE.items():
        model = step(shard(make()), 2)
        model.save_pretrained(folder / name, is_main_process=rank == 0)
        with model.disable_adapter():
            model.save_pretrained(folder / f"{name} off", is_main_process=rank == 0)
        state = {n: whole(p.detach()) for n, p in model.named_parameters() if p.requires_grad}
        if rank == 0:
            save_parameters(state, folder / name)
        dist.barrier()
        made = make()
        digest = digest_tensors(list(made.named_parameters()))
        again = shard(made)
        assert digest_tensors(list(again.named_parameters())) == digest
        load_parameters({n: p for n, p in again.named_parameters() if p.requires_grad}, folder / name)
        for ours, theirs in zip(trainable(again), trainable(model), strict=True):
            assert torch.equal(ours.full_tensor(), theirs.full_tensor())
        if name == "s2ft":
            adapter = extract_adapter(model)
            if rank == 0:
                adapter.save(folder / "delta.safetensors")
            with pytest.raises(ValueError, match="merge: the weights are sharded"):
                model.merge_adapter()
    for name, make in WHOLE.items():
        model = step(shard(make()), 2)
        save_trained(model, folder / (name if rank == 0 else f"unused {name}"), NoTokenizer())
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return run_in_two(work, tmp_path_factory.mktemp("sharded"))


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("off", ["", " off"])
def test_adapters_are_written_whole(folder, name, off):
    model = train(MAKE[name](), even_batch(), 2)
    want = peft.get_peft_model_state_dict(model)
    found = load_file(folder / f"{name}{off}" / "adapter_model.safetensors")
    assert found.keys() == want.keys()
    for key in want:
        torch.testing.assert_close(found[key], want[key], rtol=1e-4, atol=1e-5)
    again = peft.PeftModel.from_pretrained(
        scaled("llama") if name == "s2ft" else tiny_model("llama"), folder / f"{name}{off}"
    )
    torch.testing.assert_close(again(**even_batch()).logits, model(**even_batch()).logits, rtol=1e-3, atol=1e-3)


def test_the_pipeline_writes_whole_models(folder):
    import transformers as t

    for name, make in WHOLE.items():
        model = train(make(), even_batch(), 2)
        again = (
            peft.PeftModel.from_pretrained(tiny_model("llama"), folder / name)
            if name != "full"
            else t.LlamaForCausalLM.from_pretrained(folder / name)
        )
        found = again.state_dict()
        for key, value in model.state_dict().items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4)


def test_updates_are_taken_out_whole(folder):
    want = extract_adapter(train(s2ft(), even_batch(), 2))
    found = DeltaAdapter.load(folder / "delta.safetensors")
    assert found.deltas.keys() == want.deltas.keys()
    assert found.hashes == want.hashes
    for name, delta in want.deltas.items():
        assert torch.equal(found.deltas[name].indices, delta.indices)
        torch.testing.assert_close(found.deltas[name].block, delta.block, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MAKE)
def test_checkpoints_are_of_the_whole_model(folder, name):
    model = train(MAKE[name](), even_batch(), 2)
    state = load_file(folder / name / "trainable.safetensors")
    for key, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(state[key], p.detach(), rtol=1e-4, atol=1e-5)
