"""4-bit models: the module, quantising in memory and from files, patching bitsandbytes and PEFT, merging."""

import copy
import filecmp
import gc
import io
import json
import logging
import pickle
import subprocess
import sys

import peft
import pytest
import torch
import transformers
from conftest import FAMILIES, task_type, tiny_batch, tiny_model
from safetensors.torch import load_file, save_file
from torch import nn

import deftcore
from deftcore.nn.linear import Linear4bit
from deftcore.nn.merging import merged_4bit, merged_16bit
from deftcore.nn.quantization import linears_to_quantize
from deftcore.ops import quantize_4bit

LORA = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}
TARGETS = {
    "llama": ["q_proj", "v_proj", "gate_proj", "down_proj"], "opt": ["q_proj", "fc1"], "bert": ["query", "dense"],
    "roberta": ["query"], "t5": ["q", "wi"],
}  # fmt: skip


def lora(model, family, **options):
    config = peft.LoraConfig(target_modules=TARGETS[family], task_type=task_type(family), **LORA | options)
    return peft.get_peft_model(model, config)


def dequantised(model):
    """The same model with every 4-bit layer decoded to a plain one."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            dense = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            dense.weight.data = module.quantized.dequantize(torch.float32)
            dense.weight.requires_grad_(False)
            if module.bias is not None:
                dense.bias = nn.Parameter(module.bias.detach().clone(), requires_grad=False)
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, dense)
    return model


@pytest.fixture
def bnb():
    return pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")


def whole_blocks():
    """A tiny Llama whose rows are whole blocks of 64: where they are not, bitsandbytes' AVX-512 decoder is wrong."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                                 num_attention_heads=4, num_key_value_heads=4)
    )  # fmt: skip


def bnb_model(folder, bnb, dtype=torch.float32, **options):
    """A tiny Llama that Transformers quantised with bitsandbytes; the dense one stands in folder/dense."""
    whole_blocks().to(dtype).save_pretrained(folder / "dense")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
        **options,
    )  # fmt: skip
    kind = transformers.AutoModelForCausalLM
    return kind.from_pretrained(folder / "dense", quantization_config=config, dtype=dtype)


# ---------------------------------------------------------------------------- Linear4bit


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_module(dtype, bias):
    layer = Linear4bit.from_linear(nn.Linear(128, 96, bias=bias), block_size=32)
    plain = nn.functional.linear
    w = layer.quantized.dequantize(torch.float64)
    for shape in ((3, 128), (2, 5, 128), (128,), (0, 128)):
        x = torch.randn(shape).to(dtype)
        y = layer(x)
        assert y.dtype == dtype
        expected = plain(x.double(), w, None if not bias else layer.bias.double())
        torch.testing.assert_close(y.double(), expected, rtol=2e-2 if dtype != torch.float32 else 1e-5, atol=1e-2)
    assert "in_features=128, out_features=96" in repr(layer)
    assert not any(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize(("change", "error", "message"), [
    (lambda w: w.data.view(-1)[7:8].fill_(float("nan")), ValueError, "not finite"),
    (lambda w: setattr(w, "data", w.data.double()), TypeError, r"got torch\.float64"),
])  # fmt: skip
def test_quantize_checks_every_layer_before_the_first(change, error, message):
    model = tiny_model("llama")
    last = model.model.layers[1].mlp.down_proj
    change(last.weight)
    with pytest.raises(error, match=r"layers\.1\.mlp\.down_proj: .*" + message):
        deftcore.quantize(model, block_size=32)
    assert not any(isinstance(module, Linear4bit) for module in model.modules())


def test_compute_dtype():
    layer = Linear4bit.from_linear(nn.Linear(64, 32), compute_dtype=torch.float32)
    x = torch.randn(4, 64)
    half = layer(x.half())
    assert half.dtype == torch.float16
    assert torch.equal(half, layer(x.half().float()).half())  # computed in float32, rounded once
    w = layer.quantized.dequantize(torch.float64)
    reference = nn.functional.linear(x.double(), w, layer.bias.double())
    for compute_dtype in (torch.float32, None, torch.float16, torch.bfloat16):
        layer.compute_dtype = compute_dtype
        assert (layer(x).double() - reference).norm() < 1e-5  # float32 is never lowered, in evaluation either
        layer.eval()
        assert torch.equal(layer(x), layer.train()(x))


def test_copies_and_moves():
    layer = Linear4bit.from_linear(nn.Linear(128, 96))
    x = torch.randn(3, 128)
    expected, before = layer(x), {k: v.clone() for k, v in layer.state_dict().items()}
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)
    ]  # fmt: skip
    for other in copies:
        assert torch.equal(other(x), expected)
    for change in (lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.float64), lambda m: m.float()):
        change(layer)
        after = layer.state_dict()
        assert all(torch.equal(after[k], before[k]) for k in before if k != "bias")
        assert layer.absmax.dtype == torch.uint8
        assert layer.nested_absmax.dtype == torch.float32
    plain = Linear4bit.from_linear(nn.Linear(64, 64), double_quant=False).bfloat16()
    assert plain.absmax.dtype == torch.float32  # scales never lose precision
    meta = Linear4bit.from_linear(nn.Linear(128, 96)).to("meta")
    assert meta.weight.device.type == meta.quantized.device.type == "meta"
    meta.load_state_dict(before, assign=True)
    assert torch.equal(meta.quantized.dequantize(), layer.quantized.dequantize())


def test_state_dict():
    layer, other = (Linear4bit.from_linear(nn.Linear(128, 96)) for _ in range(2))
    state = layer.state_dict()
    assert set(state) == {
        "bias", "weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
        "weight.quant_state.bitsandbytes__nf4",
    }  # fmt: skip
    assert len({t.data_ptr() for t in state.values()}) == len(state)
    other.load_state_dict(state)
    x = torch.randn(2, 128)
    assert torch.equal(layer(x), other(x))
    for damage, message in (
        (lambda s: s.pop("weight"), "Missing key.*weight"),
        (lambda s: s.update(extra=torch.zeros(1)), "Unexpected key.*extra"),
        (lambda s: s.update(weight=s["weight"][:-1]), "weight: damaged quantised weight: packed: must have"),
        (lambda s: s.pop("weight.absmax"), r"weight: this layer is 4-bit and the state holds torch.uint8"),
        (lambda s: s.update({"weight.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8)}), "not JSON"),
    ):
        broken = dict(state)
        damage(broken)
        with pytest.raises(RuntimeError, match=message):
            other.load_state_dict(broken)
    small = Linear4bit.from_linear(nn.Linear(64, 96))
    with pytest.raises(RuntimeError, match=r"weight: shape must be \(96, 64\), got \(96, 128\)"):
        small.load_state_dict(state)


def test_compile_and_autocast():
    layer = Linear4bit.from_linear(nn.Linear(64, 32))
    x = torch.randn(5, 64, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.autograd.grad(y.float().sum(), x)[0].dtype == torch.float32


# ---------------------------------------------------------------------------- quantize


@pytest.mark.parametrize("family", FAMILIES)
def test_quantize_families(family):
    """Every linear layer but the head, and the function is that of the decoded weights, gradients included."""
    model = tiny_model(family)
    heads = {name for name, m in model.named_modules() if type(m) is nn.Linear} - set(
        linears_to_quantize(model, ["lm_head"])
    )
    deftcore.quantize(model, block_size=32)
    assert {name for name, m in model.named_modules() if type(m) is nn.Linear} == heads
    outside = {"lm_head", "cls.predictions.decoder", "lm_head.decoder", "lm_head.dense"}
    assert {name for name in heads if not name.endswith(".wo")} <= outside  # Transformers wants T5's wo in float32
    adapted = deftcore.patch(lora(model, family))
    dense = deftcore.unpatch(dequantised(adapted))
    batch = tiny_batch(family)
    ours, theirs = adapted(**batch), dense(**batch)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-5)
    ours.loss.backward()
    theirs.loss.backward()
    grads = {n: p.grad for n, p in dense.named_parameters() if p.grad is not None}
    assert grads
    for name, parameter in adapted.named_parameters():
        assert (parameter.grad is not None) == (name in grads)
        if name in grads:
            torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-3, atol=1e-6)


def test_unpatched_qlora_equals_patched():
    """get_peft_model alone works too; patching changes nothing but the speed, checkpoints and all."""
    model = lora(deftcore.quantize(tiny_model("llama"), block_size=32), "llama", lora_dropout=0.1)
    batch = tiny_batch("llama")
    plain = model.eval()(**batch).logits
    state = peft.get_peft_model_state_dict(model)
    deftcore.patch(model)
    torch.testing.assert_close(model(**batch).logits, plain, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(t, state[k]) for k, t in peft.get_peft_model_state_dict(model).items())


def test_quantize_conv1d(tmp_path, bnb):
    """GPT-2's layers, which store [in, out]: in memory, from files and back, in Transformers, merged, all of them equal
    to the decoded weights in float64."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1)
    model = transformers.GPT2LMHeadModel(config).eval()
    batch = tiny_batch("gpt2")
    dense = {name: m.weight.detach().t() for name, m in model.named_modules() if type(m).__name__ == "Conv1D"}
    model.save_pretrained(tmp_path / "dense")
    reference = copy.deepcopy(model).double()
    deftcore.quantize(model, double_quant=False)
    assert len(dense) == 8
    for name, weight in dense.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, Linear4bit)
        expected = quantize_4bit(weight.contiguous(), double_quant=False).dequantize(torch.float64)
        assert torch.equal(layer.quantized.dequantize(torch.float64), expected)
        reference.get_submodule(name).weight.data = expected.t().contiguous()
    with torch.no_grad():
        exact = reference(**batch).logits
        assert (model(**batch).logits - exact).abs().max() < 1e-5
        model.save_pretrained(tmp_path / "packed")
        for folder, options in (("dense", {"double_quant": False}), ("packed", {})):
            again = deftcore.load_quantized(tmp_path / folder, **options)
            assert (again(**batch).logits - exact).abs().max() < 1e-5
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    for name in dense:
        weight = theirs.get_submodule(name).weight
        decoded = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(decoded, model.get_submodule(name).quantized.dequantize())
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **LORA))
    logits = deftcore.patch(adapted).eval()(**batch).logits
    before = {name: m.quantized for name, m in adapted.named_modules() if isinstance(m, Linear4bit)}
    requantised = deftcore.merge(copy.deepcopy(adapted), to="4bit")
    merged = deftcore.merge(adapted, to="16bit", dtype=torch.float32)
    assert len(before) == 8
    torch.testing.assert_close(merged(**batch).logits, logits, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(again(**batch).logits, logits, rtol=1e-4, atol=1e-5)
    from_4bit = deftcore.merge(peft.get_peft_model(requantised, peft.LoraConfig(**LORA | {"init_lora_weights": True})))
    assert {type(from_4bit.get_submodule(name)).__name__ for name in dense} == {"Conv1D"}


def test_quantize_options(caplog):
    model = tiny_model("llama")
    deftcore.quantize(model, quant_type="fp4", block_size=128, double_quant=False, skip=["lm_head", "mlp.down_proj"])
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    layer = model.model.layers[1].self_attn.q_proj
    assert layer.quantized.quant_type == "fp4"
    assert not layer.quantized.double_quant
    assert model.config.quantization_config["llm_int8_skip_modules"] == ["lm_head", "mlp.down_proj"]
    tied = tiny_model("llama")
    tied.lm_head.weight = tied.model.embed_tokens.weight
    deftcore.quantize(tied, skip=())
    assert type(tied.lm_head) is nn.Linear  # shared with the embedding
    with pytest.raises(ValueError, match="skip: no module named 'q_prj'; near: q_proj"):
        deftcore.quantize(tiny_model("llama"), skip=["q_prj"])
    with pytest.raises(ValueError, match="block_size: must be one of"):
        deftcore.quantize(tiny_model("llama"), block_size=100)
    with pytest.raises(ValueError, match="quantise the base model first"):
        deftcore.quantize(lora(tiny_model("llama"), "llama"))
    with pytest.raises(ValueError, match="has no linear layer"):
        deftcore.quantize(nn.Sequential(nn.ReLU()))
    broken = tiny_model("llama")
    broken.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj: weight has values that are not finite"):
        deftcore.quantize(broken)


def test_prepare_for_training():
    model = deftcore.quantize(tiny_model("llama").to(torch.bfloat16))
    deftcore.prepare_for_training(model)
    assert model.model.norm.weight.dtype == torch.float32
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in model.parameters())
    adapted = deftcore.patch(lora(model, "llama"))
    assert any(getattr(m, "gradient_checkpointing", False) for m in adapted.modules())
    batch = tiny_batch("llama")
    with torch.autocast("cpu", torch.bfloat16):
        loss = adapted.train()(**batch).loss
    loss.backward()
    checkpointed = {n: p.grad.clone() for n, p in adapted.named_parameters() if p.grad is not None}
    adapted.zero_grad()
    getattr(adapted, "activation_checkpointing_disable", adapted.gradient_checkpointing_disable)()
    with torch.autocast("cpu", torch.bfloat16):
        adapted(**batch).loss.backward()
    for name, parameter in adapted.named_parameters():
        if name in checkpointed:
            torch.testing.assert_close(parameter.grad, checkpointed[name])


@pytest.mark.parametrize("source", ["in memory", "from files"])
@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "opt", "t5"])
def test_qlora_flow(tmp_path, family, dtype, prepared, source):
    """docs/library.md's, in each dtype of a checkpoint: quantise, prepare, adapt, patch, train, merge; logits and
    gradients are as near to the float32 model's as the dense 16-bit model's with the same weights are."""
    model = tiny_model(family).to(dtype)
    if source == "from files":
        model.save_pretrained(tmp_path)
        model = deftcore.load_quantized(tmp_path, block_size=32)
    else:
        deftcore.quantize(model, block_size=32)
    exact = lora(dequantised(model).float(), family, init_lora_weights=False)
    low = lora(dequantised(model).to(dtype), family, init_lora_weights=False)
    if prepared:
        deftcore.prepare_for_training(model, gradient_checkpointing=source == "in memory")
    adapted = deftcore.patch(lora(model, family, init_lora_weights=False))
    for other in (exact, low):
        peft.set_peft_model_state_dict(other, peft.get_peft_model_state_dict(adapted))
    batch = tiny_batch(family)
    results = []
    for each in (adapted, low, exact):
        output = each.train()(**batch)
        output.loss.float().backward()
        grads = torch.cat([p.grad.flatten().double() for p in each.parameters() if p.grad is not None])
        results.append((output.logits.detach().double(), grads))
    assert adapted(**batch).logits.dtype == dtype
    for ours, plain, reference in zip(*results, strict=True):
        assert ours.isfinite().all()
        assert (ours - reference).norm() <= 2 * (plain - reference).norm() + 1e-5 * reference.norm()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
    optimizer.step()
    logits = adapted.eval()(**batch).logits
    merged = deftcore.merge(adapted, to="16bit", dtype=dtype)(**batch).logits
    assert merged.dtype == dtype
    rounding = (results[1][0] - results[2][0]).norm()  # each side may be twice as far off as the dense 16-bit model
    assert (merged - logits).double().norm() <= 4 * rounding + 1e-5 * logits.double().norm()


# ---------------------------------------------------------------------------- files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reads_and_writes_bitsandbytes_files(tmp_path, bnb, dtype):
    """Byte for byte, also after evaluation, training and moves; the values are those that bitsandbytes decodes."""
    theirs = bnb_model(tmp_path, bnb, dtype)
    theirs.save_pretrained(tmp_path / "bnb")
    ours = deftcore.load_quantized(tmp_path / "bnb")
    assert ours.dtype == dtype
    adapted = deftcore.patch(lora(ours, "llama", init_lora_weights=True))
    batch = tiny_batch("llama")
    adapted.eval()(**batch)
    adapted.train()(**batch).loss.backward()
    base = adapted.to("cpu").to(dtype).unload()
    base.save_pretrained(tmp_path / "ours")
    for name in ("model.safetensors", "config.json"):
        assert filecmp.cmp(tmp_path / "bnb" / name, tmp_path / "ours" / name, shallow=False), name
    for name, module in base.named_modules():
        if isinstance(module, Linear4bit):
            layer = theirs.get_submodule(name)
            decoded = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            assert torch.equal(module.quantized.dequantize(), decoded)


def test_our_files_load_in_transformers(tmp_path, bnb):
    whole_blocks().to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    ours = deftcore.load_quantized(tmp_path / "dense", block_size=32)
    ours.save_pretrained(tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    layer = theirs.model.layers[0].mlp.up_proj
    assert isinstance(layer, bnb.nn.Linear4bit)
    decoded = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(decoded, ours.model.layers[0].mlp.up_proj.quantized.dequantize())
    again = deftcore.load_quantized(tmp_path / "ours")
    batch = tiny_batch("llama")
    assert torch.equal(again(**batch).logits, ours(**batch).logits)
    ids = batch["input_ids"][:1]
    assert ours.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, ids.shape[1] + 3)


@pytest.mark.parametrize("family", ["llama", "opt", "t5"])
def test_streaming_equals_in_memory(tmp_path, family):
    """Sharded files, tied heads; the same model as quantising in memory."""
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    assert (tmp_path / "dense" / "model.safetensors.index.json").exists()
    streamed = deftcore.load_quantized(tmp_path / "dense", block_size=32)
    expected = deftcore.quantize(model, block_size=32).state_dict()
    found = streamed.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)
    assert not any(p.device.type == "meta" for p in streamed.parameters())
    batch = tiny_batch(family)
    torch.testing.assert_close(streamed(**batch).logits, model.eval()(**batch).logits)


PEAK = """
import gc, json, sys, threading, time
import torch, transformers, deftcore
def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024
deftcore.load_quantized(sys.argv[2])  # code and threads are there
gc.collect()
before, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
model = deftcore.load_quantized(sys.argv[1])
done.set()
thread.join()
size = sum(t.nbytes for t in model.state_dict().values()) / 2**20
print(json.dumps({"peak_mb": peak - before, "model_mb": size}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_streaming_memory(tmp_path):
    """The peak is the quantised model plus a few tensors, not the dense model."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=8
    )
    model = transformers.LlamaForCausalLM(config)
    dense = sum(p.nbytes for p in model.parameters()) / 2**20
    model.save_pretrained(tmp_path / "large")
    tiny_model("llama").save_pretrained(tmp_path / "tiny")
    del model
    gc.collect()
    command = [sys.executable, "-c", PEAK, str(tmp_path / "large"), str(tmp_path / "tiny")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["peak_mb"] < found["model_mb"] + 30 < dense / 3, (found, dense)


def test_bad_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        deftcore.load_quantized(tmp_path / "missing")
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    state, whole = {k: t.clone() for k, t in load_file(file).items()}, file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        deftcore.load_quantized(tmp_path / "m")
    save_file({k: t for k, t in state.items() if "q_proj" not in k}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"of another model: missing \['model.layers.0.self_attn.q_proj.weight'"):
        deftcore.load_quantized(tmp_path / "m")
    save_file(state | {"stray": torch.zeros(1)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"unexpected \['stray'\]"):
        deftcore.load_quantized(tmp_path / "m")
    state["model.layers.0.mlp.up_proj.weight"] = torch.randn(7, 32)
    save_file(state, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"up_proj.weight: shape must be \(72, 32\), got \(7, 32\)"):
        deftcore.load_quantized(tmp_path / "m")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"no such file: .*model.safetensors"):
        deftcore.load_quantized(tmp_path / "m")


# ---------------------------------------------------------------------------- patching bitsandbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patch_bitsandbytes(tmp_path, bnb, dtype, caplog):
    model = bnb_model(tmp_path, bnb, dtype)
    adapted = lora(model, "llama")
    batch = tiny_batch("llama")
    expected = adapted.train()(**batch)  # in training, bitsandbytes does not repack
    expected.loss.backward()
    grads = {n: p.grad.clone() for n, p in adapted.named_parameters() if p.grad is not None}
    adapted.zero_grad()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    kinds = {n: type(m) for n, m in adapted.named_modules()}
    with caplog.at_level(logging.WARNING, "deftcore"):
        deftcore.patch(adapted)
    assert not caplog.records
    found = adapted(**batch)
    found.loss.backward()
    # bitsandbytes rounds the weights to their stored dtype in its backward
    near = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.02}
    torch.testing.assert_close(found.logits, expected.logits, **near)
    for name, parameter in adapted.named_parameters():
        if name in grads:
            torch.testing.assert_close(parameter.grad, grads[name], **near)
    adapted.eval()(**batch)  # would repack with bitsandbytes
    after = model.state_dict()
    assert all(torch.equal(after[k], state[k]) for k in state)
    deftcore.unpatch(adapted)
    assert {n: type(m) for n, m in adapted.named_modules()} == kinds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", ["ours", "ours, patched", "bitsandbytes, patched"])
def test_an_evaluation_leaves_the_next_step_alone(tmp_path, request, dtype, base):
    """Spec P25: the gradients of a training step, bit for bit, and the stored bytes, whatever ran before."""
    batch, other = tiny_batch("llama"), torch.tensor([[5, 6, 7]])

    def step(evaluations):
        if base.startswith("ours"):
            model = deftcore.quantize(whole_blocks().to(dtype))
        else:
            model = bnb_model(tmp_path, request.getfixturevalue("bnb"), dtype)
        torch.manual_seed(0)
        adapted = lora(model, "llama")
        if base.endswith("patched"):
            deftcore.patch(adapted)
        stored = {k: v.clone() for k, v in model.state_dict().items()}
        for gradient in evaluations:
            with torch.set_grad_enabled(gradient):
                for ids in (other, batch["input_ids"], other[:, :1]):
                    adapted.eval()(input_ids=ids)
        adapted.train()(**batch).loss.backward()
        after = model.state_dict()
        assert all(torch.equal(after[k], stored[k]) for k in stored)
        return {n: p.grad for n, p in adapted.named_parameters() if p.grad is not None}

    want = step([])
    assert any(bool(grad.any()) for grad in want.values())
    for evaluations in ([False], [True]):
        found = step(evaluations)
        assert want.keys() == found.keys()
        assert all(torch.equal(found[name], want[name]) for name in want)


def test_repacked_weights_are_left_alone(tmp_path, bnb, caplog):
    model = bnb_model(tmp_path, bnb)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.weight.quant_state.packing_format_for_cpu = True
    with caplog.at_level(logging.WARNING, "deftcore"):
        deftcore.patch(model)
    assert "bitsandbytes has repacked its weights" in caplog.text
    assert type(model.model.layers[0].mlp.up_proj) is bnb.nn.Linear4bit


def test_fp32_input_keeps_its_precision(tmp_path, bnb):
    model = deftcore.patch(bnb_model(tmp_path, bnb, torch.float32))
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 64)
    w = layer.quantized.dequantize(torch.float64)
    assert (layer.eval()(x).double() - x.double() @ w.t()).norm() < 1e-5


# ---------------------------------------------------------------------------- merging


def test_merge_report():
    """What a 4-bit merge keeps of a small update is almost nothing (spec section 9), and the report says so."""
    q = quantize_4bit(torch.randn(256, 1024))
    w = q.dequantize()
    for size, kept, error in ((0.003, (0.0, 0.02), (0.9, 1.3)), (0.1, (0.6, 1.0), (0.5, 1.0))):
        delta = torch.randn(256, 16) @ torch.randn(16, 1024)
        delta *= size * w.norm() / delta.norm()
        merged, report = merged_4bit(q, delta)
        assert report.relative_size == pytest.approx(size, rel=1e-3)
        assert kept[0] <= report.kept <= kept[1]
        assert error[0] <= report.error <= error[1]
        exact = merged.dequantize(torch.float64) - (w.double() + delta.double())
        assert report.error == pytest.approx(float(exact.norm() / delta.norm()), rel=1e-3)
        weight, report = merged_16bit(q, delta, torch.bfloat16)
        assert torch.equal(weight, (w + delta).bfloat16())  # one rounding
        assert report.kept == pytest.approx(1, abs=0.1)


def test_peft_merge_and_unmerge():
    model = deftcore.patch(lora(deftcore.quantize(tiny_model("llama"), block_size=32), "llama"))
    batch = tiny_batch("llama")
    before = model.eval()(**batch).logits
    bytes_before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.warns(UserWarning, match="merged into 4 bits: .* of the update is kept"):
        model.merge_adapter()
    merged = model(**batch).logits
    assert not torch.equal(merged, before)
    model.unmerge_adapter()
    after = model.state_dict()
    assert all(torch.equal(after[k], bytes_before[k]) for k in bytes_before)
    assert torch.equal(model(**batch).logits, before)
    with pytest.warns(UserWarning, match="merged into 4 bits"):
        plain = model.merge_and_unload()
    torch.testing.assert_close(plain(**batch).logits, merged)


def test_bitsandbytes_unmerge_is_exact(tmp_path, bnb):
    model = deftcore.patch(lora(bnb_model(tmp_path, bnb), "llama"))
    batch = tiny_batch("llama")
    before = model.eval()(**batch).logits
    bytes_before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.warns(UserWarning, match="4-bit"):
        model.merge_adapter()
    model(**batch)
    model.unmerge_adapter()
    assert torch.equal(model(**batch).logits, before)
    after = model.state_dict()
    assert all(torch.equal(after[k], bytes_before[k]) for k in bytes_before)


@pytest.mark.parametrize("kind", ["ours", "bitsandbytes"])
def test_merge_to_16bit(tmp_path, kind, request, caplog):
    if kind == "ours":
        base = deftcore.quantize(tiny_model("llama"), block_size=32)
    else:
        base = bnb_model(tmp_path, request.getfixturevalue("bnb"))
    model = deftcore.patch(lora(base, "llama"))
    batch = tiny_batch("llama")
    expected = model.eval()(**batch).logits
    with caplog.at_level(logging.WARNING, "deftcore"):
        merged = deftcore.merge(model, to="16bit", dtype=torch.float32)
    assert "merge: 8 layers into 16bit; worst:" in caplog.text
    assert sorted(merged.deftcore_merge)[0] == "model.layers.0.mlp.down_proj"
    assert not any(isinstance(m, Linear4bit) for m in merged.modules())
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again(**batch).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("to", ["16bit", "4bit"])
def test_merge_of_a_model_turned_off_takes_every_layer_or_none(to):
    """PEFT merges adapters that are turned off; those over 4 bits are no exception."""
    base = deftcore.quantize(tiny_model("llama"), block_size=32)
    options = {"target_modules": ["q_proj", "lm_head"], "init_lora_weights": False}
    model = peft.get_peft_model(base, peft.LoraConfig(**options)).eval()
    off = copy.deepcopy(model)
    off.base_model.disable_adapter_layers()
    batch = tiny_batch("llama")
    on, off = (deftcore.merge(each, to=to)(**batch).logits for each in (model, off))
    assert torch.equal(on, off)


def test_merge_to_4bit_and_errors():
    model = deftcore.patch(lora(deftcore.quantize(tiny_model("llama"), block_size=32), "llama"))
    for options in ({"dtype": torch.int8}, {"to": "4bit", "dtype": torch.float32}):
        with pytest.raises(ValueError, match="dtype: must be a floating type, and is for to='16bit' alone"):
            deftcore.merge(model, **options)
    with pytest.raises(ValueError, match="to: must be '16bit' or '4bit', got '8bit'"):
        deftcore.merge(model, to="8bit")
    with pytest.raises(ValueError, match="model: must be a PEFT model"):
        deftcore.merge(nn.Linear(2, 2))
    merged = deftcore.merge(model, to="4bit")
    assert len(merged.deftcore_merge) == 8
    assert isinstance(merged.model.layers[0].mlp.down_proj, Linear4bit)
