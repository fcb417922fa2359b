"""No forward of ours swallows an argument that it does not know: it hands it on, or it raises."""

import importlib
import inspect
import pkgutil
from types import SimpleNamespace

import peft
import pytest
import torch
from conftest import tiny_model
from torch import nn

import deftcore
from deftcore.methods.lora.bitfit import BitFitConfig
from deftcore.methods.lora.bottleneck import BottleneckConfig
from deftcore.methods.lora.paired import PairedLora
from deftcore.methods.mamba import kernel_aliases
from deftcore.training.trainer import ObjectiveTrainerMixin

VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def layer_of(model, kind):
    return next(m for m in model.modules() if type(m).__name__ == kind)


def fused_lora():
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    return layer_of(deftcore.patch(model), "FusedLoraLinear")


def fused_bnb_lora():
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(nn.Identity(), bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")).to("cpu")
    model.is_loaded_in_4bit = True
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["1"]))
    return layer_of(deftcore.patch(model), "FusedBnbLora")


def bottleneck():
    return layer_of(peft.get_peft_model(tiny_model("llama"), BottleneckConfig()), "BottleneckLayer")


def bitfit():
    return layer_of(peft.get_peft_model(tiny_model("opt"), BitFitConfig()), "BitFitLayer")


def paired(config):
    model = peft.get_peft_model(tiny_model("llama"), config(r=2, lora_alpha=2, target_modules=["q_proj"]))
    return next(m for m in model.modules() if isinstance(m, PairedLora))


# Those whose forward takes arguments of any name, and how to make one.
OPEN = {
    "FusedLoraLinear": fused_lora, "FusedBnbLora": fused_bnb_lora, "BottleneckLayer": bottleneck,
    "BitFitLayer": bitfit,
    "KasaLinear": lambda: paired(deftcore.KasaFactoredConfig), "BaLoraLinear": lambda: paired(deftcore.BaLoraConfig),
}  # fmt: skip


def classes_with_a_forward():
    for info in pkgutil.walk_packages(deftcore.__path__, "deftcore."):
        name = info.name.rsplit(".", 1)[-1]
        if name == "bitsandbytes":
            pytest.importorskip("bitsandbytes")
        if name not in ("__main__", "_C"):
            importlib.import_module(info.name)
    found, open_ends = {}, [nn.Module]
    while open_ends:
        children = open_ends.pop().__subclasses__()
        open_ends += children
        for cls in children:
            forward = inspect.getattr_static(cls, "forward", None)
            if (getattr(forward, "__module__", None) or "").startswith("deftcore"):
                found[cls.__name__] = forward
    return found


def test_every_forward_refuses_an_unknown_keyword():
    """By its signature, where that names all it takes; the others are called below."""
    found = classes_with_a_forward()
    assert {"FusedMambaMixer", "FusedMamba2Mixer", "S2ftLayer", "FusedGatedMlp", "SparseMLP4bit"} <= set(found)
    ends = {name for name, f in found.items() if any(p.kind in VARIABLE for p in signature(f).values())}
    assert ends == set(OPEN) | {"PairedLora"}  # the ground of the last two


@pytest.mark.parametrize("state", ["training", "evaluation", "disabled", "merged"])
@pytest.mark.parametrize("kind", list(OPEN))
def test_unknown_keyword_reaches_the_original_forward_or_raises(kind, state):
    layer = OPEN[kind]().train(state == "training")
    if state == "disabled":
        layer.enable_adapters(False)
    if state == "merged" and kind != "BottleneckLayer":
        layer.merge()
    x = torch.randn(2, 3, getattr(layer, "in_features", 32))
    layer(x)
    with pytest.raises(TypeError, match="unknown_keyword"):
        layer(x, unknown_keyword=1)


def test_norms_in_float32_hand_everything_on():
    model = deftcore.prepare_for_training(tiny_model("llama").to(torch.bfloat16), gradient_checkpointing=False)
    norm = layer_of(model, "LlamaRMSNorm")
    assert norm(torch.ones(1, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="unknown_keyword"):
        norm(torch.ones(1, 32), unknown_keyword=1)


@pytest.mark.parametrize("place", ["mamba", "falcon_mamba", "mamba2"])
def test_a_patched_mixer_names_what_it_does_not_know(place):
    import transformers

    kind = {"mamba": "Mamba", "falcon_mamba": "FalconMamba", "mamba2": "Mamba2"}[place]
    extra = {"num_heads": 8, "head_dim": 8, "n_groups": 2} if place == "mamba2" else {}
    config = getattr(transformers, f"{kind}Config")(vocab_size=64, hidden_size=32, num_hidden_layers=1, **extra)
    model = deftcore.patch(getattr(transformers, f"{kind}ForCausalLM")(config))
    mixer = model.backbone.layers[0].mixer
    with pytest.raises(TypeError, match="unknown_keyword"):
        mixer(torch.randn(1, 3, 32), unknown_keyword=1)


def signature(function):
    return inspect.signature(function).parameters


def test_kernel_aliases_take_what_they_name():
    for names in kernel_aliases._NAMES.values():
        for function in names.values():
            if callable(function):
                assert not any(p.kind in VARIABLE for p in signature(function).values()), function


@pytest.mark.parametrize("method", ["compute_loss", "create_optimizer", "evaluate", "log"])
def test_the_trainer_mixin_hands_everything_on(method):
    seen = {}

    class Base:
        args = SimpleNamespace(learning_rate=0.1)
        accelerator = SimpleNamespace(num_processes=1, device=torch.device("cpu"), reduce=lambda x, how: x)

    def record(self, *args, **kwargs):
        seen.update(kwargs)
        return torch.optim.SGD([nn.Parameter(torch.zeros(1))]) if method == "create_optimizer" else torch.zeros(())

    setattr(Base, method, record)
    trainer = type("Trainer", (ObjectiveTrainerMixin, Base), {})(
        objective=deftcore.DensityLoss(tiny_model("llama"), alpha=0.1)
    )
    given = {"compute_loss": (nn.Identity().eval(), {}), "log": ({},)}.get(method, ())
    getattr(trainer, method)(*given, unknown_keyword=1)
    assert seen["unknown_keyword"] == 1
