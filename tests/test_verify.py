"""Proof before use: `patch` refuses what differs from the original, by name, and changes nothing while it looks."""

import copy
import functools
import logging
import warnings

import peft
import pytest
import torch
import transformers
from conftest import tiny_batch, tiny_model
from torch import nn
from transformers.models.mamba import modeling_mamba

import deftcore
from deftcore._files import add_to_table, cache_folder, read_table
from deftcore.methods.lora import layer as lora_layer
from deftcore.methods.lora import linear16, proof
from deftcore.methods.lora.layer import FusedLoraLinear
from deftcore.methods.mamba import mixers
from deftcore.methods.mamba.lora import MambaLoraConfig
from deftcore.methods.s2ft.config import S2ftConfig
from deftcore.methods.s2ft.gated_mlp import FusedGatedMlp
from deftcore.models.blocks import check_function, find_mlp_blocks
from deftcore.nn import verify
from deftcore.nn.mamba import MambaBlock
from deftcore.nn.mamba2 import Mamba2Block
from deftcore.training.wrapping import add_adapter

MIXERS = ("mamba", "falcon_mamba", "mamba2")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _no_verdicts_yet(tmp_path, monkeypatch):
    monkeypatch.setenv("DEFTCORE_CACHE", str(tmp_path / "cache"))


def lora(model, **options):
    options = {"r": 4, "target_modules": ["q_proj", "down_proj"]} | options
    return peft.get_peft_model(model, peft.LoraConfig(**options)).eval()


def mamba_model(family, dtype=torch.float32):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2}
    if family == "mamba2":
        sizes |= {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4}
    kind = {"mamba": "Mamba", "falcon_mamba": "FalconMamba", "mamba2": "Mamba2"}[family]
    config = getattr(transformers, f"{kind}Config")(**sizes)
    return getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype).eval()


def bnb_layer(dtype=torch.float32, bias=True):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(64, 64, bias=bias, quant_type="nf4", compute_dtype=dtype)
    layer.load_state_dict(nn.Linear(64, 64, bias=bias).state_dict())
    return nn.Sequential(nn.Identity(), layer.to(dtype).to("cpu"))


def negated(function):
    return lambda *args, **kwargs: -function(*args, **kwargs)


def wrong_sign(monkeypatch, module, name):
    """`scaling` of a fused LoRA product turned round."""
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, scaling, **rest: right(*args, scaling=-scaling, **rest))


def refused(model, *names):
    with pytest.warns(UserWarning, match="keep their own forward") as caught:
        deftcore.patch(model)
    text = str(caught[0].message)
    assert all(name in text for name in names), text
    assert "is rounding" in text
    return text


# ---------------------------------------------------------------------------- refused


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [False, True])
def test_a_lora_layer_of_the_wrong_sign_is_refused(packed, dtype, monkeypatch, caplog):
    """Also with lora_B at zero, where the model itself cannot show it."""
    base = tiny_model("llama").to(dtype)
    model = lora(deftcore.quantize(base, block_size=32) if packed else base)
    expected = model(**tiny_batch("llama")).logits
    wrong_sign(monkeypatch, lora_layer, "lora_linear")
    refused(model, "layers.0.self_attn.q_proj", "layers.1.mlp.down_proj", "forward differs by")
    assert "patch: refused: base_model.model.model.layers.0.self_attn.q_proj" in caplog.text
    assert not any(isinstance(m, FusedLoraLinear) for m in model.modules())
    assert torch.equal(model(**tiny_batch("llama")).logits, expected)
    assert any(isinstance(m, FusedLoraLinear) for m in deftcore.patch(model, verify=False).modules())


@pytest.mark.parametrize("bias", [True, False])
def test_a_bitsandbytes_layer_of_the_wrong_sign_is_refused(bias, monkeypatch):
    model, x = bnb_layer(bias=bias).train(), torch.randn(3, 64)
    from deftcore.methods.lora import bitsandbytes

    expected = model(x)
    monkeypatch.setattr(bitsandbytes, "linear_packed", negated(bitsandbytes.linear_packed))
    refused(model, "1 (", "forward differs by")
    assert torch.equal(model(x), expected)
    monkeypatch.undo()


def test_lora_over_bitsandbytes_of_the_wrong_sign_is_refused(monkeypatch):
    model = bnb_layer()
    model.is_loaded_in_4bit = True
    model, x = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["1"])).train(), torch.randn(3, 64)
    expected = model(x)
    wrong_sign(monkeypatch, lora_layer, "lora_linear")
    refused(model, "base_model.model.1 (", "forward differs by")
    torch.testing.assert_close(model(x), expected)  # the layer below it is fused, and proved


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", MIXERS)
@pytest.mark.parametrize("what", ["decay", "step"])
def test_a_mixer_of_the_wrong_sign_is_refused(family, what, dtype, monkeypatch):
    """Everywhere, or in the cached steps only."""
    model = mamba_model(family, dtype)
    ids = torch.randint(1, 64, (2, 9))
    expected = model(ids).logits
    block = Mamba2Block if family == "mamba2" else MambaBlock
    monkeypatch.setattr(block, what, negated(getattr(block, what)))
    refused(model, "layers.0.mixer, backbone.layers.1.mixer (" + {"decay": "f", "step": "cached call 2"}[what])
    assert torch.equal(model(ids).logits, expected)


def test_a_wrong_gradient_is_refused(monkeypatch):
    right = lora_layer.lora_linear

    def reversed_gradient(*args, **kwargs):
        y = right(*args, **kwargs)
        return 2 * y.detach() - y

    monkeypatch.setattr(lora_layer, "lora_linear", reversed_gradient)
    refused(lora(tiny_model("llama")), "q_proj", "gradient of x differs")


def test_dropout_on_the_wrong_side_is_refused(monkeypatch):
    right = lora_layer.lora_linear
    monkeypatch.setattr(lora_layer, "lora_linear", lambda *args, dropped_x, **rest: right(*args, **rest))
    refused(lora(tiny_model("llama"), lora_dropout=0.5), "q_proj")
    deftcore.patch(model := lora(tiny_model("llama")))
    assert any(isinstance(m, FusedLoraLinear) for m in model.modules())  # without dropout it is right


def test_an_argument_that_the_original_gains_is_refused(monkeypatch):
    """Whether the replacement would raise (bitsandbytes) or its block would use it (Mamba)."""
    bnb = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(bnb.nn.Linear4bit, "forward", lambda self, x, scale=2.0: scale * nn.functional.linear(x, x))
    with pytest.warns(UserWarning, match=r"1 \(Linear4bit.forward takes scale, which FusedBnbLinear does not know"):
        deftcore.patch(bnb_layer())

    class Mixer(modeling_mamba.MambaMixer):
        def forward(self, hidden_states, cache=None, attention_mask=None, gain=1.0, **kwargs):
            return gain * super().forward(hidden_states, cache, attention_mask, **kwargs)

    model = mamba_model("mamba")
    fused = mixers._FUSED[modeling_mamba.MambaMixer]
    monkeypatch.setitem(mixers._FUSED, Mixer, fused)
    for layer in model.backbone.layers:
        layer.mixer.__class__ = Mixer
    with pytest.warns(UserWarning, match=r"layers.0.mixer.*Mixer.forward takes gain, which FusedMambaMixer does not"):
        deftcore.patch(model)
    assert type(model.backbone.layers[0].mixer) is Mixer


def test_an_argument_that_a_block_renames_is_refused(monkeypatch):
    """The mixer is called as its own block calls it."""
    right = modeling_mamba.MambaBlock.forward

    def renamed(self, hidden_states, cache=None, attention_mask=None, **kwargs):
        return hidden_states + self.mixer(self.norm(hidden_states), state=cache, attention_mask=attention_mask)

    def takes_state(self, hidden_states, cache=None, attention_mask=None, **kwargs):
        return self.plain(hidden_states, kwargs.get("state", cache), attention_mask)

    model = mamba_model("mamba")
    monkeypatch.setattr(modeling_mamba.MambaMixer, "plain", modeling_mamba.MambaMixer.forward, raising=False)
    monkeypatch.setattr(modeling_mamba.MambaMixer, "forward", takes_state)
    monkeypatch.setattr(modeling_mamba.MambaBlock, "forward", renamed)
    with pytest.warns(UserWarning, match="FusedMambaMixer failed, TypeError"):
        deftcore.patch(model)
    assert right is not renamed
    assert type(model.backbone.layers[0].mixer) is modeling_mamba.MambaMixer


# ---------------------------------------------------------------------------- accepted, and unchanged


def everything_of(model):
    """All that a proof must leave alone."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = {name: (t.data_ptr(), t.clone(), t.requires_grad, t.grad) for name, t in tensors.items()}
    modules = {
        name: (m.training, {k: v for k, v in vars(m).items() if k[0] != "_"}) for name, m in model.named_modules()
    }
    return state, modules, torch.get_rng_state()


@pytest.mark.parametrize("kind", ["lora", "merged", "4bit", "bitsandbytes", *MIXERS, "mamba-lora"])
@pytest.mark.parametrize("train", [True, False])
def test_a_proof_changes_nothing(kind, train):
    if kind in MIXERS:
        model = mamba_model(kind)
    elif kind == "mamba-lora":
        config = MambaLoraConfig(r=4, target_modules=["x_proj", "dt_proj", "out_proj"], lora_dropout=0.1)
        model = peft.get_peft_model(mamba_model("mamba"), config)
    elif kind == "bitsandbytes":
        model = bnb_layer(torch.bfloat16)
    else:
        base = tiny_model("llama")
        model = lora(deftcore.quantize(base, block_size=32) if kind == "4bit" else base, init_lora_weights=False)
        if kind == "merged":
            model.merge_adapter()
            model.base_model.disable_adapter_layers()
    model.train(train)
    calls = []
    handles = [m.register_forward_hook(lambda *_: calls.append(1)) for m in model.modules()]
    handles += [p.register_hook(lambda g: calls.append(1)) for p in model.parameters() if p.requires_grad]
    before = everything_of(model)
    with torch.inference_mode():
        deftcore.patch(model)
    after = everything_of(model)
    assert not calls
    assert torch.equal(before[2], after[2])
    for name, (address, value, requires, grad) in before[0].items():
        now = after[0][name]
        assert (address, requires, grad) == (now[0], now[2], now[3]), name
        assert torch.equal(value, now[1]), name
    assert str(before[1]) == str(after[1])
    assert len(verify.verdicts()["proved"]) >= 1
    assert not verify.verdicts()["refused"]
    for handle in handles:
        handle.remove()


def test_a_proof_runs_in_full_precision(monkeypatch):
    """And in no autocast: neither is what the model was patched under."""
    seen = []
    run = proof.run_linear

    def watched(unit, dtype):
        seen.append((torch.backends.mkldnn.matmul.fp32_precision, torch.is_autocast_enabled("cpu")))
        yield from run(unit, dtype)

    monkeypatch.setattr(proof, "run_linear", watched)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            deftcore.patch(lora(tiny_model("llama")))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {("ieee", False)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", MIXERS)
def test_mixers_with_adapters_and_4bit_projections_are_proved(family, dtype):
    """LoRA on dt_proj is not seen by Transformers' mixer, and 4-bit weights are not what it reads: both are proved."""
    targets = ["in_proj", "out_proj"] if family == "mamba2" else ["x_proj", "dt_proj", "out_proj"]
    for packed, split in ((False, False), (True, False), (False, True)):
        base = mamba_model(family, dtype)
        if packed:
            deftcore.quantize(base, block_size=32)
        config = MambaLoraConfig(r=4, target_modules=targets, init_lora_weights=False, split=split)
        model = peft.get_peft_model(base, config)
        deftcore.patch(model)
        assert not verify.verdicts()["refused"]
        assert "Fused" in type(model.base_model.model.backbone.layers[0].mixer).__name__


def test_verdicts_are_kept(monkeypatch):
    """One proof for each configuration; another version, a damaged file, or another function: again."""
    made = []
    compare = verify._compare
    monkeypatch.setattr(verify, "_compare", lambda case, fused: made.append(case.label) or compare(case, fused))
    monkeypatch.setattr(linear16, "ours_pays", lambda dtype: False)  # of some processors it is true
    deftcore.patch(lora(tiny_model("llama")))
    assert made == ["LoRA over Linear (float32), rank 4 float32"]  # four layers, two shapes
    deftcore.patch(lora(tiny_model("llama")))
    assert len(made) == 1
    deftcore.patch(lora(tiny_model("llama"), r=3))
    deftcore.patch(lora(tiny_model("llama").bfloat16()))
    assert len(made) == 3
    monkeypatch.setattr(verify, "_versions", lambda: "peft 99.0")
    deftcore.patch(lora(tiny_model("llama")))
    assert len(made) == 4
    (cache_folder() / "verified.json").write_text('{"a": 3')
    deftcore.patch(lora(tiny_model("llama")))
    assert len(made) == 5
    add_to_table("verified.json", {key: {"what": 1} for key in read_table("verified.json")})
    deftcore.patch(lora(tiny_model("llama")))
    assert len(made) == 6
    for change in ({"difference": "0.0"}, {"reason": None}, {"what": 1}):
        add_to_table("verified.json", {key: entry | change for key, entry in read_table("verified.json").items()})
        assert verify.verdicts() == {"proved": [], "refused": []}
        deftcore.patch(lora(tiny_model("llama")))
    assert len(made) == 9
    assert {path.name for path in cache_folder().iterdir()} == {"verified.json", "verified.json.lock"}


def halved(forward):
    @functools.wraps(forward)
    def inner(self, *args, **kwargs):
        return 0.5 * forward(self, *args, **kwargs)

    return inner


def test_a_verdict_is_of_the_code_that_was_there(monkeypatch):
    """A wrapper around the original's forward asks for a proof of its own."""
    kind = modeling_mamba.MambaMixer
    deftcore.patch(mamba_model("mamba"))
    monkeypatch.setattr(kind, "forward", halved(kind.forward))
    refused(mamba_model("mamba"), "layers.0.mixer")


def test_a_verdict_is_of_the_constants_too():
    made = []
    for number in (1.0, 2.0):
        space = {}
        exec(f"def forward(self, x):\n    return {number} * x", space)
        made.append(verify._code(type("Same", (nn.Module,), space)))
    assert made[0] != made[1]


def test_a_refusal_is_kept_and_listed(monkeypatch, capsys):
    from deftcore.cli.main import main

    wrong_sign(monkeypatch, lora_layer, "lora_linear")
    refused(lora(tiny_model("llama")), "q_proj")
    assert main(["info"]) == 0
    start = "patch, refused: LoRA over Linear (float32), rank 4 float32: "
    assert any(line.startswith(start) for line in capsys.readouterr().out.splitlines())


def test_verdicts_of_another_build_are_not_listed(monkeypatch):
    deftcore.patch(lora(tiny_model("llama")))
    assert verify.verdicts()["proved"]
    for name in ("_build", "_versions"):
        with monkeypatch.context() as other:
            other.setattr(verify, name, lambda: "other")
            assert verify.verdicts() == {"proved": [], "refused": []}


def test_our_own_warnings_are_heard(monkeypatch):
    """Those that are given once, as of a kernel that has to fall back: a proof may not use them up in silence."""
    right = lora_layer.lora_linear

    def warns(*args, **kwargs):
        warnings.warn("deftcore.lora_linear: falls back", stacklevel=2)
        return right(*args, **kwargs)

    monkeypatch.setattr(lora_layer, "lora_linear", warns)
    with pytest.warns(UserWarning, match="falls back"):
        deftcore.patch(lora(tiny_model("llama")))


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DEFTCORE_CACHE", str(tmp_path / "file"))
    model = deftcore.patch(lora(tiny_model("llama")))
    assert any(isinstance(m, FusedLoraLinear) for m in model.modules())


# ---------------------------------------------------------------------------- what the fused path must hand over


def pair(model):
    return model, deftcore.patch(copy.deepcopy(model))


def values_and_gradients(model):
    torch.manual_seed(0)
    output = model(**tiny_batch("llama"))
    output.loss.backward()
    return output.logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize("kind", ["dense", "4bit", "bitsandbytes"])
def test_biases_that_train_get_their_gradient(kind, bias):
    torch.manual_seed(0)
    x = torch.randn(5, 64)
    if kind == "bitsandbytes":
        base = bnb_layer()
        base.is_loaded_in_4bit = True
    else:
        base = nn.Sequential(nn.Identity(), nn.Linear(64, 64))
        base = deftcore.quantize(base) if kind == "4bit" else base
    plain = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["1"], bias=bias, init_lora_weights=False))
    grads = []
    for model in (plain.train(), deftcore.patch(plain)):
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert "base_model.model.1.base_layer.bias" in grads[0]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "trained"),
    [(family, part) for family in MIXERS for part in ("bias", "A_log", "D", "conv1d.weight", "proj.weight")]
    + [("mamba2", "norm.weight")],
)
def test_whatever_trains_in_a_mixer_gets_its_gradient(family, trained):
    """Beside LoRA, set before `patch` and after it: the fused op takes all of these for constants."""
    config = MambaLoraConfig(r=4, target_modules=["out_proj"], init_lora_weights=False)
    plain = peft.get_peft_model(mamba_model(family), config).train()
    later = deftcore.patch(copy.deepcopy(plain))
    for model in (plain, later):
        for name, parameter in model.named_parameters():
            if ".mixer." in name and name.endswith(trained):
                parameter.requires_grad_()
    ids = torch.randint(1, 64, (2, 9))
    found = []
    for model in (plain, later, deftcore.patch(copy.deepcopy(plain))):
        model(ids).logits.square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert sum(name.endswith(trained) for name in found[0]) >= 2
    for grads in found[1:]:
        torch.testing.assert_close(grads, found[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_float32_factors_over_a_16bit_base_are_fused(dtype, dropout, monkeypatch):
    """PEFT's own default: as close to float64 as PEFT's forward and backward, twice over."""
    plain, patched = pair(lora(tiny_model("llama").to(dtype), init_lora_weights=False, lora_dropout=dropout).train())
    layer = patched.base_model.model.model.layers[0].mlp.down_proj
    assert layer.lora_A["default"].weight.dtype == torch.float32
    calls = []
    right = lora_layer.lora_linear
    monkeypatch.setattr(lora_layer, "lora_linear", lambda *a, **k: calls.append(1) or right(*a, **k))
    results = []
    for model in (plain, patched, copy.deepcopy(plain).double()):
        part = model.base_model.model.model.layers[0].mlp.down_proj
        torch.manual_seed(3)
        part.lora_dropout["default"] = proof.Dropped() if dropout else nn.Identity()
        x = torch.randn(3, 72).to(dtype).to(part.base_layer.weight.dtype).requires_grad_()
        y = part(x)
        y.backward(torch.randn(3, 32).to(dtype).to(y.dtype))
        results.append((y, x.grad, *(p.grad for p in (part.lora_A["default"].weight, part.lora_B["default"].weight))))
    assert len(calls) == 1
    for theirs, ours, exact in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        own = (theirs.double() - exact).norm()
        assert (ours.double() - exact).norm() <= 2 * own + torch.finfo(dtype).eps * exact.norm() / 4


def test_patch_says_what_does_not_run_natively_yet(caplog):
    for options, change, reason in (
        ({"lora_bias": True}, None, "lora_bias"),
        ({}, lambda m: m.merge_adapter(), "merged"),
        ({}, lambda m: m.base_model.model.model.layers[0].mlp.down_proj.base_layer.requires_grad_(True), "trains"),
        ({}, lambda m: m.base_model.model.model.layers[0].mlp.down_proj.float(), ""),
    ):
        targets = {"target_modules": ["fc1"]} if options else {}
        model = lora(tiny_model("opt" if options else "llama"), **options, **targets)
        if change:
            change(model)
        caplog.clear()
        with caplog.at_level(logging.INFO, "deftcore"):
            deftcore.patch(model)
        assert ("PEFT's own forward runs for now" in caplog.text) == bool(reason)
        assert reason in caplog.text


@pytest.mark.parametrize("where", ["base_layer", "lora_A", "lora_B"])
def test_hooks_on_the_parts_run(where):
    plain, patched = pair(lora(tiny_model("llama"), init_lora_weights=False))
    outputs = []
    for model in (plain, patched):
        layer = model.base_model.model.model.layers[0].mlp.down_proj
        part = layer.base_layer if where == "base_layer" else getattr(layer, where)["default"]
        part.register_forward_hook(lambda module, args, output: 2 * output)
        outputs.append(model(**tiny_batch("llama")).logits)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("first", ["patch", "offload"])
@pytest.mark.parametrize("family", ["llama", *MIXERS])
def test_offloaded_weights(family, first):
    """Accelerate keeps weights elsewhere and brings them in as each module is called."""
    from accelerate import cpu_offload

    if family == "llama":
        model = lora(tiny_model("llama"), init_lora_weights=False)
    else:
        targets = ["in_proj", "out_proj"] if family == "mamba2" else ["x_proj", "out_proj"]
        config = MambaLoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        model = peft.get_peft_model(mamba_model(family), config).eval()
    ids = tiny_batch("llama")["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits
        if first == "patch":
            deftcore.patch(model)
        cpu_offload(model, torch.device("cpu"), offload_buffers=True)
        if first == "offload":
            with pytest.warns(UserWarning, match="cannot be verified: .* its weights are on the meta device"):
                deftcore.patch(model)
        torch.testing.assert_close(model(ids).logits, expected)


@pytest.mark.parametrize(
    ("targets", "what"), [("up", "activation"), ("up", "projection"), ("down", "activation"), ("down", "projection"),
                          ("up", "trained weight")],
)  # fmt: skip
def test_a_fused_gated_mlp_hands_over(targets, what):
    """Against the class it replaced: hooks run, and a down projection that trains gets its gradient."""
    model = peft.get_peft_model(tiny_model("llama"), S2ftConfig(channel_ratio=0.2, targets=[targets])).train()
    mlp = model.base_model.model.model.layers[0].mlp
    assert isinstance(mlp, FusedGatedMlp)
    if what == "trained weight":
        mlp.down_proj.weight.requires_grad_()
    else:
        part = mlp.act_fn if what == "activation" else mlp.down_proj
        part.register_forward_hook(lambda module, args, output: 2 * output)
    found = values_and_gradients(model)
    for parameter in model.parameters():
        parameter.grad = None
    mlp.__class__ = mlp.unfused_class
    torch.testing.assert_close(found, values_and_gradients(model))


def test_a_gated_mlp_whose_activation_has_no_kernel_stays_as_it_is():
    plain = tiny_model("llama", "tanh").eval()
    expected = plain(**tiny_batch("llama")).logits
    model = peft.get_peft_model(plain, S2ftConfig(channel_ratio=0.2, targets=["down"]))
    assert not any(isinstance(module, FusedGatedMlp) for module in model.modules())
    torch.testing.assert_close(model(**tiny_batch("llama")).logits, expected)


# ---------------------------------------------------------------------------- sparse blocks


def llama_with(forward):
    """A tiny Llama whose MLPs compute something of their own."""
    model = tiny_model("llama", "silu").eval()
    for layer in model.model.layers:
        layer.mlp.__class__ = type("OwnMLP", (type(layer.mlp),), {"forward": forward})
    return model


def limited(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=7.0)) * self.up_proj(x))


def scaled(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x) * 0.5) * self.up_proj(x))


def normed(self, x):
    inner = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
    return self.down_proj(nn.functional.rms_norm(inner, inner.shape[-1:]))


def wrong_order(self, x):
    return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


def slightly(self, x):
    return 0.88 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def test_sparsify_refuses_a_small_multiplier_in_bfloat16():
    with pytest.raises(ValueError, match="OwnMLP has the parts of an MLP but computes something else"):
        deftcore.sparsify(llama_with(slightly).bfloat16())


@pytest.mark.parametrize("forward", [limited, scaled, normed, wrong_order])
@pytest.mark.parametrize("adapter", [False, True])
def test_sparsify_refuses_a_block_that_computes_something_else(forward, adapter):
    """As DeepSeek's limits, FalconH1's multipliers and BitNet's norm: the parts of a gated MLP are all there."""
    model = llama_with(forward)
    model = lora(model) if adapter else model
    expected = model(**tiny_batch("llama")).logits
    with pytest.raises(ValueError, match=r"layers.0.mlp: OwnMLP has the parts of an MLP but computes something else"):
        deftcore.sparsify(model)
    assert torch.equal(model(**tiny_batch("llama")).logits, expected)


def rearranged(self, x):
    gated = self.up_proj(x) * self.act_fn(self.gate_proj(x))
    return self.down_proj(nn.functional.dropout(gated, 0.3, self.training))


@pytest.mark.parametrize("kind", ["dense", "bfloat16", "4bit", "disabled"])
def test_sparsify_takes_a_block_that_computes_the_same_in_other_words(kind):
    model = llama_with(rearranged)
    if kind == "bfloat16":
        model = model.bfloat16()
    if kind == "4bit":
        deftcore.quantize(model, block_size=32, skip=["lm_head", "down_proj"])
    if kind == "disabled":
        model = lora(model, init_lora_weights=False)
        model.merge_adapter()
        model.base_model.disable_adapter_layers()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for block in find_mlp_blocks(model):
        check_function(block)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    expected = model(**tiny_batch("llama")).logits
    if kind != "disabled":  # here PEFT has just taken the update out again
        near = {"rtol": 0.05, "atol": 0.05} if kind == "bfloat16" else {"rtol": 1e-3, "atol": 1e-4}
        torch.testing.assert_close(deftcore.sparsify(model)(**tiny_batch("llama")).logits, expected, **near)


def test_training_in_full_patches_what_has_a_replacement():
    """Without a name of a family: whatever a room has registered."""
    for model, fused in ((tiny_model("llama"), False), (mamba_model("mamba"), True)):
        trained = add_adapter(model, "full", {})
        assert trained is model
        assert any(isinstance(module, MambaBlock) for module in trained.modules()) == fused
