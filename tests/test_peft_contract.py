"""What PEFT promises of any tuner type, for every type that deftcore registers."""

import copy
import io
import json
import warnings
from dataclasses import dataclass, field

import peft
import pytest
import torch
import transformers as t
from conftest import perturbed, recompute, tiny_batch, tiny_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper

from deftcore.methods.ba_lora.config import BaLoraConfig
from deftcore.methods.kasa.config import KasaFactoredConfig
from deftcore.methods.lora.bitfit import BitFitConfig
from deftcore.methods.lora.bottleneck import BottleneckConfig
from deftcore.methods.mamba.lora import MambaLoraConfig
from deftcore.methods.point_peft.config import PointPeftConfig
from deftcore.methods.s2ft.config import S2ftConfig
from deftcore.methods.tsvit.prompts import TSViTPromptConfig
from deftcore.methods.tsvit.tokens import TSViTTokenConfig


@dataclass
class Case:
    """One type in one form. S2FT lives in the weights, one adapter a model; bottlenecks do not merge."""

    config: type
    family: str
    options: dict = field(default_factory=dict)
    several: bool = True
    merges: bool = True
    layers: bool = True  # takes `layers_to_transform`

    def make(self, **more):
        return self.config(task_type="CAUSAL_LM", **(self.options | more))


KASA = {"r": 2, "target_modules": ["q_proj", "down_proj"]}
MAMBA = {"r": 2, "init_lora_weights": False}
CASES = {
    "bottleneck": Case(BottleneckConfig, "llama", {"reduction_factor": 4}, merges=False),
    "parallel": Case(BottleneckConfig, "opt", {"reduction_factor": 4, "parallel": True}, merges=False),
    "bitfit": Case(BitFitConfig, "opt"),
    "s2ft": Case(S2ftConfig, "llama", {"channel_ratio": 0.2, "targets": ["o", "down"]}, several=False, layers=False),
    "s2ft split": Case(
        S2ftConfig, "llama", {"channel_ratio": 0.2, "targets": ["o", "down"], "storage": "split"},
        several=False, layers=False,
    ),
    "ba-lora": Case(BaLoraConfig, "llama", KASA),
    "kasa": Case(KasaFactoredConfig, "llama", KASA),
    "mamba": Case(MambaLoraConfig, "mamba", MAMBA),
    "mamba split": Case(MambaLoraConfig, "mamba", MAMBA | {"split": True}),
    "mamba2": Case(MambaLoraConfig, "mamba2", MAMBA | {"split": True}),
}  # fmt: skip


def those(wanted):
    names = [name for name, case in CASES.items() if wanted(case)]
    return pytest.mark.parametrize("case", [CASES[name] for name in names], ids=names)


ALL, SEVERAL, ONE = those(lambda case: True), those(lambda case: case.several), those(lambda case: not case.several)
MERGES, NOT_MERGED = those(lambda case: case.merges), those(lambda case: not case.merges)
LAYERS = those(lambda case: case.layers)


def base(case, dtype=torch.float32):
    if case.family in ("llama", "opt"):
        return tiny_model(case.family).to(dtype).eval()
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 8, "use_cache": True}
    if case.family == "mamba":
        model = t.MambaForCausalLM(t.MambaConfig(**sizes, tie_word_embeddings=False))
    else:
        model = t.Mamba2ForCausalLM(
            t.Mamba2Config(**sizes, num_heads=4, head_dim=8, n_groups=1, expand=2, tie_word_embeddings=False)
        )
    return model.to(dtype).eval()


def adapted(case, dtype=torch.float32, seed=3, **more):
    return perturbed(peft.get_peft_model(base(case, dtype), case.make(**more)), seed).eval()


def logits(model, **changed):
    with torch.no_grad():
        return model(input_ids=tiny_batch("llama")["input_ids"], **changed).logits


def same(a, b, tolerance=1e-5):
    return (a - b).abs().max() <= tolerance * b.abs().max()


def tuner_layers(model):
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def test_every_type_of_ours_is_here():
    ours = {c for c in PEFT_TYPE_TO_CONFIG_MAPPING.values() if c.__module__.startswith("deftcore.")}
    # Of no language model; tests/test_point_peft.py and tests/test_tsvit_adapters.py hold them to the same.
    others = {PointPeftConfig, TSViTPromptConfig, TSViTTokenConfig}
    assert ours - others == {case.config for case in CASES.values()}


# ---------------------------------------------------------------------------- files


@ALL
@pytest.mark.parametrize("safe", [True, False])
def test_save_and_load(tmp_path, case, safe):
    model = adapted(case)
    model.save_pretrained(tmp_path, safe_serialization=safe)
    assert {file.name for file in tmp_path.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors" if safe else "adapter_model.bin",
    }  # fmt: skip
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["peft_type"] == case.make().peft_type
    assert stored["inference_mode"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapter keys.*")
        again = peft.PeftModel.from_pretrained(base(case), tmp_path)
    state = model.state_dict()
    found = again.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)
    assert same(logits(again), logits(model))
    assert not same(logits(model), logits(base(case)))
    assert not any(p.requires_grad for p in again.parameters())
    trainable = peft.PeftModel.from_pretrained(base(case), tmp_path, is_trainable=True)
    assert {n for n, p in trainable.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


@ALL
def test_keys(case):
    """Adapter weights carry the tuner's prefix; what is stored has no adapter name."""
    model = peft.get_peft_model(base(case), case.make(), adapter_name="one")
    stored = peft.get_peft_model_state_dict(model, adapter_name="one")
    assert stored
    assert all(key.startswith("base_model.model.") and ".one" not in key and model.prefix in key for key in stored)
    assert all(model.prefix in n and ".one" in n for n, p in model.named_parameters() if p.requires_grad)
    assert all(key.replace(f"{model.prefix}", "") for key in stored)


@ALL
def test_load_without_memory_for_the_initial_weights(tmp_path, case):
    model = adapted(case)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base(case), tmp_path, low_cpu_mem_usage=True)
    assert all(p.device.type == "cpu" for p in again.parameters())
    assert same(logits(again), logits(model))


@ALL
def test_load_with_a_config_and_by_auto_class(tmp_path, case):
    base(case).save_pretrained(tmp_path / "base")
    model = perturbed(peft.get_peft_model(type(base(case)).from_pretrained(tmp_path / "base"), case.make())).eval()
    model.save_pretrained(tmp_path / "adapter")
    stored = peft.PeftConfig.from_pretrained(tmp_path / "adapter")
    assert type(stored) is case.config
    again = peft.PeftModel.from_pretrained(base(case), tmp_path / "adapter", config=stored)
    assert again.peft_config["default"] is stored
    assert stored.inference_mode
    assert same(logits(again), logits(model))
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert same(logits(auto), logits(model))


@ALL
def test_of_another_model(tmp_path, case):
    adapted(case).save_pretrained(tmp_path)
    other = Case(case.config, "opt" if case.family == "llama" else "llama")
    with pytest.raises((ValueError, RuntimeError)):
        peft.PeftModel.from_pretrained(base(other), tmp_path)


@ALL
def test_injected_without_a_peft_model(case):
    model = peft.inject_adapter_in_model(case.make(), base(case))
    for p in model.parameters():
        p.requires_grad_(False)
    for layer in tuner_layers(model):
        layer.set_adapter("default")
    perturbed(model)
    stored = peft.get_peft_model_state_dict(model)
    other = peft.inject_adapter_in_model(case.make(), base(case))
    result = peft.set_peft_model_state_dict(other, stored)
    assert not result.unexpected_keys
    assert torch.equal(logits(other), logits(model))


# ---------------------------------------------------------------------------- several adapters


@SEVERAL
def test_several_adapters(tmp_path, case):
    model = adapted(case)
    first = logits(model)
    before = {n for n, p in model.named_parameters() if p.requires_grad}
    model.add_adapter("second", case.make())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == before
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert model.active_adapters == ["second"]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n.replace("default", "second") for n in before}
    second = logits(perturbed(model, 4))
    assert not same(first, second)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.base_model.set_adapter(["default", "second"])
    assert not same(logits(model), first)
    model.set_adapter("default", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())
    model.set_requires_grad("default")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == before
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base(case), tmp_path)
    result = again.load_adapter(tmp_path / "second", adapter_name="other")
    assert not result.unexpected_keys
    assert same(logits(again), first)
    again.set_adapter("other")
    assert same(logits(again), second)


@SEVERAL
def test_names_that_contain_each_other(tmp_path, case):
    model = adapted(case)
    want = peft.get_peft_model_state_dict(model)
    for name in ("default2", "other_default", "foodefault_bar", "efaul"):
        model.add_adapter(name, case.make())
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    again = peft.PeftModel.from_pretrained(base(case), tmp_path)
    found = peft.get_peft_model_state_dict(again)
    assert found.keys() == want.keys()
    assert all(torch.equal(found[key], want[key]) for key in want)
    assert list(again.peft_config) == ["default"]


@SEVERAL
@pytest.mark.parametrize("active", [True, False])
def test_delete_adapter(case, active):
    model = adapted(case)
    want = logits(model)
    model.add_adapter("gone", case.make())
    if active:
        model.set_adapter("gone")
    model.delete_adapter("gone")
    assert "gone" not in model.peft_config
    assert model.active_adapters == ["default"]
    assert not any("gone" in n for n, _ in model.named_modules())
    for layer in tuner_layers(model):
        for name in (*layer.adapter_layer_names, *layer.other_param_names):
            assert "gone" not in getattr(layer, name), name
    assert torch.equal(logits(model), want)
    model.delete_adapter("default")
    assert model.active_adapters == []
    assert same(logits(model.base_model), logits(base(case)))


@ALL
def test_delete_unknown_adapter(case):
    with pytest.raises(ValueError, match="Adapter unknown does not exist"):
        adapted(case).delete_adapter("unknown")


@ONE
def test_one_adapter_only(tmp_path, case):
    """What cannot be done is refused before anything changes."""
    model = adapted(case)
    want, names = logits(model), {n for n, p in model.named_parameters() if p.requires_grad}
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="one adapter at a time"):
        model.add_adapter("second", case.make())
    with pytest.raises(ValueError, match="one adapter at a time"):
        model.load_adapter(tmp_path, "second")
    with pytest.raises(ValueError, match=r"delete_adapter: .*unload"):
        model.delete_adapter("default")
    assert list(model.peft_config) == ["default"]
    assert model.active_adapters == ["default"]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == names
    assert torch.equal(logits(model), want)
    model.save_pretrained(tmp_path / "again")


# ---------------------------------------------------------------------------- merging, unloading


@MERGES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge(tmp_path, case, dtype):
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    model = adapted(case, dtype)
    want, before = logits(model), copy.deepcopy(model.state_dict())
    model.merge_adapter()
    assert same(logits(model), want, tolerance)
    with pytest.warns(UserWarning, match="already merged, nothing to do"):
        model.merge_adapter()
    assert same(logits(model), want, tolerance)
    off = copy.deepcopy(model)
    with off.disable_adapter():
        assert same(logits(off), logits(base(case, dtype)), tolerance)
    assert same(logits(off), want, tolerance)
    with pytest.raises(ValueError, match="merged" if case.several else "unload"):
        model.delete_adapter("default")
    model.unmerge_adapter()
    assert same(logits(model), want, tolerance)
    with pytest.warns(UserWarning, match="nmerged"):
        model.unmerge_adapter()
    if dtype == torch.float32:
        assert all(torch.allclose(value, before[key], atol=1e-6) for key, value in model.state_dict().items())
    merged = model.merge_and_unload()
    assert not tuner_layers(merged)
    assert not hasattr(merged, "peft_config")
    assert same(logits(merged), want, tolerance)
    assert merged.state_dict().keys() == base(case).state_dict().keys()
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[key], value) for key, value in merged.state_dict().items())


@MERGES
def test_merge_of_several(case):
    if not case.several:
        with pytest.raises(ValueError, match="adapter_names"):
            adapted(case).merge_adapter(adapter_names=["other"])
        return
    model = adapted(case)
    model.add_adapter("second", case.make())
    model.set_adapter("second")
    second = logits(perturbed(model, 4))
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    model.set_adapter("default")
    assert same(logits(copy.deepcopy(model).merge_and_unload(adapter_names=["second"])), second, 1e-4)
    assert same(logits(copy.deepcopy(model).merge_and_unload(adapter_names=["default", "second"])), both, 1e-4)


@MERGES
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_safe_merge_of_a_broken_adapter(case, wrong):
    model = adapted(case)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.view(-1)[0] = wrong
    layers = tuner_layers(model)
    before = [layer.get_base_layer().weight.detach().clone() for layer in layers]
    for layer, weight in zip(layers, before, strict=True):
        with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default seems to be"):
            layer.merge(safe_merge=True)
        assert not layer.merged
        assert torch.equal(layer.get_base_layer().weight.nan_to_num(7, 7), weight.nan_to_num(7, 7))


@ALL
def test_unload(case):
    plain, model = base(case), adapted(case)
    assert not same(logits(model), logits(plain))
    bare, want = model.unload(), plain.state_dict()
    assert not tuner_layers(bare)
    assert not hasattr(bare, "peft_config")
    found = bare.state_dict()
    assert found.keys() == want.keys()
    assert all(torch.equal(found[key], want[key]) for key in want)
    assert torch.equal(logits(bare), logits(plain))


@NOT_MERGED
def test_no_merge(case):
    model = adapted(case)
    want = logits(model)
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="cannot be merged"):
            call()
    assert torch.equal(logits(model), want)
    assert tuner_layers(model)


# ---------------------------------------------------------------------------- turned off


@ALL
def test_disable_adapter(case):
    model = adapted(case)
    plain, want = logits(base(case)), logits(model)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    with model.disable_adapter():
        assert same(logits(model), plain)
        assert not any(p.requires_grad for p in model.parameters())
        with model.disable_adapter():
            assert same(logits(model), plain)
    assert torch.equal(logits(model), want)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == names
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert torch.equal(logits(model), want)
    model.base_model.disable_adapter_layers()
    assert same(logits(model), plain)
    model.base_model.enable_adapter_layers()
    assert torch.equal(logits(model), want)


@ALL
def test_modules_to_save(tmp_path, case):
    model = adapted(case, modules_to_save=["lm_head"])
    wrapper = model.base_model.model.lm_head
    assert isinstance(wrapper, ModulesToSaveWrapper)
    plain, want = logits(base(case)), logits(model)
    model.train()
    model(**tiny_batch("llama")).loss.backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
    assert wrapper.modules_to_save["default"].weight.grad.any()
    model.eval()
    with model.disable_adapter():
        assert same(logits(model), plain)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base(case), tmp_path)
    assert same(logits(again), want)
    if case.merges:
        merged = again.merge_and_unload()
        assert type(merged.lm_head) is torch.nn.Linear
        assert same(logits(merged), want, 1e-4)
    assert type(model.unload().lm_head) is torch.nn.Linear


# ---------------------------------------------------------------------------- training and running


@ALL
@pytest.mark.parametrize("reentrant", [True, False])
def test_training_with_checkpointing(case, reentrant):
    model = adapted(case).train()
    batch = tiny_batch("llama")

    def gradients():
        model.zero_grad()
        model(**batch).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    want = gradients()
    assert want.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    model.enable_input_require_grads()
    recompute(model, reentrant)
    found = gradients()
    assert found.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(found[name], want[name], rtol=1e-4, atol=1e-6)


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate(case, dtype):
    model = adapted(case, dtype)
    ids = tiny_batch("llama")["input_ids"]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = model.generate(input_ids=ids, **options)
    assert torch.equal(model.generate(ids, **options), found)
    for i in range(4):
        if dtype == torch.float32:
            with torch.no_grad():
                assert torch.equal(model(input_ids=found[:, : 7 + i]).logits[:, -1].argmax(-1), found[:, 7 + i])


@ALL
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casting(case, dtype):
    model = adapted(case)
    want = logits(model)
    model.to(dtype)
    assert same(logits(model).float(), want, 1e-5 if dtype == torch.float64 else 0.1)
    model.float()
    assert same(logits(model), want, 1e-5 if dtype == torch.float64 else 0.1)


@ALL
@pytest.mark.parametrize("autocast", [True, False])
def test_dtype_of_an_adapter_on_half_weights(case, autocast):
    """PEFT trains in float32 unless told otherwise; S2FT has `master` for that."""
    more = {"master": "fp32" if autocast else "none"} if case.config is S2ftConfig else {}
    model = peft.get_peft_model(base(case, torch.bfloat16), case.make(**more), autocast_adapter_dtype=autocast)
    want = {torch.float32 if autocast else torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == want
    assert torch.isfinite(logits(model)).all()
    if case.several:
        model.add_adapter("added", case.make(), autocast_adapter_dtype=autocast)
        assert {p.dtype for n, p in model.named_parameters() if "added" in n} == want


@ALL
def test_copies(case):
    model = adapted(case)
    want = logits(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(logits(other), want)
        perturbed(other, 9)
        assert not same(logits(other), want)
        assert torch.equal(logits(model), want)


@ALL
def test_status_and_repr(case):
    model = adapted(case)
    status = model.get_model_status()
    assert status.enabled is True
    assert status.active_adapters == ["default"]
    assert status.available_adapters == ["default"]
    assert status.requires_grad == {"default": True}
    assert status.merged_adapters == []
    assert status.num_adapter_layers == len(tuner_layers(model))
    trained, total = model.get_nb_trainable_parameters()
    assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert status.trainable_params == trained
    assert status.total_params == total
    with model.disable_adapter():
        assert model.get_model_status().enabled is False
    assert "default" in repr(model)
    for layer in tuner_layers(model):
        assert repr(layer).split("(")[0].count(".") == 1  # tuner and class, as PEFT's
        assert "base_layer" in repr(layer)


@LAYERS
def test_layers_to_transform(tmp_path, case):
    model = adapted(case, layers_to_transform=[0])
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names
    assert all(".layers.0." in name for name in names)
    model.save_pretrained(tmp_path)
    assert same(logits(peft.PeftModel.from_pretrained(base(case), tmp_path)), logits(model))


@ALL
def test_hotswap(tmp_path, case):
    """PEFT swaps LoRA's weights only, and says so."""
    from peft.utils.hotswap import hotswap_adapter

    model = adapted(case)
    want = logits(model)
    adapted(case, seed=5).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="otswap"):
        hotswap_adapter(model, tmp_path, "default")
    assert torch.equal(logits(model), want)
