"""The table of architectures: each (entry, method) that it claims works as the unmodified model says, the rest is
refused with the table's reason."""

import copy
import json

import peft
import pytest
import torch
from conftest import task_type, tiny_batch, tiny_model
from torch import nn

import deftcore
from deftcore.methods.s2ft.layer import S2ftLayer
from deftcore.models import FAMILIES, describe, find_mlp_blocks
from deftcore.models.coupled import find_coupled
from deftcore.models.families import is_mamba
from deftcore.nn import SparseMLP
from deftcore.nn.linear import is_transposed, out_by_in
from deftcore.ops import dequantize_4bit, quantize_4bit
from deftcore.training.registry import Setup, uses
from deftcore.training.wrapping import add_adapter

OWN = {  # activations of the real models, where they are neither relu nor silu
    "gemma": "gelu_pytorch_tanh", "gemma2": "gelu_pytorch_tanh", "gemma3_text": "gelu_pytorch_tanh",
    "gpt2": "gelu_new", "gpt_neox": "gelu", "bert": "gelu", "roberta": "gelu", "t5": "gated-gelu", "mt5": "gated-gelu",
}  # fmt: skip
ROWS = {row["model_type"]: row for row in describe(uses())}
REFUSED = [(kind, use, reason) for kind, row in ROWS.items() for use, reason in row["refused"].items()]


def served_by(use):
    return [kind for kind, row in ROWS.items() if use in row["served"]]


def model_of(kind, activation="relu"):
    """A tiny model whose blocks weigh enough in its logits for a fault to show."""
    model = tiny_model(kind, activation).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "A_log" not in name:
                parameter.normal_(std=0.2, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1, generator=generator)
    return model


def logits_of(model, kind):
    with torch.no_grad():
        return model(**tiny_batch(kind)).logits


def train_a_step(model, kind):
    """What one step moved, by name."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    model(**tiny_batch(kind)).loss.backward()
    optimizer.step()
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("kind", served_by("density"))
def test_density(kind):
    """The share of positive inputs to each activation, as hooks on the unmodified modules see them."""
    model, batch = model_of(kind), tiny_batch(kind)
    logits = logits_of(model, kind)
    seen = {}
    blocks = find_mlp_blocks(model)
    handles = [
        block.activation.get().register_forward_hook(lambda _, args, out, name=block.name: seen.update({name: out > 0}))
        for block in blocks
    ]
    model(**batch)
    for handle in handles:
        handle.remove()
    density = deftcore.DensityLoss(model, mask_policy="count_padding")
    assert torch.equal(logits_of(model, kind), logits)
    report = density.report()["blocks"]
    assert report == {name: pytest.approx(float(on.double().mean()), abs=1e-6) for name, on in seen.items()}
    assert len(blocks) == {"t5": 4, "mt5": 4}.get(kind, 2)
    assert 0 < min(report.values()) <= max(report.values()) < 1
    model.train()
    model(**batch)
    density.loss().backward()
    assert all((block.gate or block.up).get().weight.grad.any() for block in blocks)


@pytest.mark.parametrize("kind", served_by("sparsify"))
def test_sparsify(kind):
    """With zeros to skip, and with the activation that the real model has."""
    for activation in ("relu", OWN.get(kind, "silu")):
        model = model_of(kind, activation)
        expected = logits_of(model, kind)
        sparse = deftcore.sparsify(model, path="sparse", tau=0.0)
        assert sum(isinstance(m, SparseMLP) for m in sparse.modules()) == {"t5": 4, "mt5": 4}.get(kind, 2)
        torch.testing.assert_close(logits_of(sparse, kind), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", served_by("s2ft"))
def test_s2ft(kind):
    """Every role of heads and channels: the function stays, slices train, the rest of the base does not move."""
    model = model_of(kind, OWN.get(kind, "silu"))
    expected = logits_of(model, kind)
    roles = ["q", "k", "v", "o", "up", "down"] + (["gate"] if FAMILIES[kind].mlps[0].gate else [])
    config = deftcore.S2ftConfig(channel_ratio=0.2, head_ratio=0.5, targets=roles, task_type=task_type(kind))
    wrapped = peft.get_peft_model(model, config).eval()
    torch.testing.assert_close(logits_of(wrapped, kind), expected, rtol=1e-4, atol=1e-5)
    layers = {name: module for name, module in wrapped.named_modules() if isinstance(module, S2ftLayer)}
    whole = {name: layer.base_layer.weight.detach().clone() for name, layer in layers.items()}
    moved = train_a_step(wrapped, kind)
    slices = {name for name in moved if ".s2ft_slices." in name}
    assert moved - slices <= {f"{name}.base_layer.weight" for name in layers}  # the memory that the slices lie on
    assert len(slices) >= len(layers)
    for name, layer in layers.items():
        change = (layer.base_layer.weight.detach() - whole[name]).ne(0)
        lines = (change.t() if is_transposed(layer.base_layer) else change).any(1 - layer.dim)
        places = torch.cat([torch.arange(start, start + length) for start, length in layer.runs])
        assert lines.nonzero().flatten().tolist() == places.tolist()


@pytest.mark.parametrize(
    ("kind", "role", "module", "rows"),
    [
        ("gpt_neox", "v", "gpt_neox.layers.0.attention.query_key_value", range(64, 72)),  # head 2 of q, k, v by head
        ("gpt2", "v", "transformer.h.0.attn.c_attn", range(80, 88)),
        ("phi3", "v", "model.layers.0.self_attn.qkv_proj", range(48 + 8, 48 + 16)),  # the second of two groups
        ("phi3", "up", "model.layers.0.mlp.gate_up_proj", range(72 + 5, 72 + 6)),
    ],
)
def test_s2ft_scores_rows_of_fused_matrices(kind, role, module, rows):
    """The largest rows of a role are found where that role lies."""
    model = model_of(kind)
    layer = model.get_submodule(module)
    weight = layer.weight.detach().t() if is_transposed(layer) else layer.weight.detach()
    weight[rows] *= 30
    options = {"channel_ratio": 1.5 / 72, "head_ratio": 0.5 if kind == "phi3" else 0.25}
    config = deftcore.S2ftConfig(strategy="weight", targets=[role], **options)
    config = peft.get_peft_model(model, config).peft_config["default"]
    unit = {"gpt_neox": [2], "gpt2": [2], "phi3": [1] if role == "v" else [5]}[kind]
    assert config.indices[f"{module}:{role}"] == unit


@pytest.mark.parametrize("kind", served_by("lora"))
def test_lora_and_patch(kind):
    """Patched, a LoRA model gives PEFT's own logits and gradients."""
    model = model_of(kind)
    names = [name for name, _ in model.named_modules()]
    targets = [t for t in FAMILIES[kind].lora_targets if any(f".{name}".endswith(f".{t}") for name in names)]
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, task_type=task_type(kind),
        fan_in_fan_out=kind == "gpt2",
    )  # fmt: skip
    base = logits_of(model, kind)
    plain = peft.get_peft_model(model, config).eval()
    expected = logits_of(plain, kind)
    assert not torch.allclose(expected, base)
    patched = deftcore.patch(copy.deepcopy(plain))
    torch.testing.assert_close(logits_of(patched, kind), expected, rtol=1e-4, atol=1e-4)
    for tuned in (plain, patched):
        tuned(**tiny_batch(kind)).loss.backward()
    grads = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    for name, p in patched.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, grads[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", served_by("bottleneck"))
def test_bottleneck(kind):
    """Unchanged at first; then it adds to the output of every MLP, sequential or parallel, and trains alone."""
    for parallel in (False, True):
        model = model_of(kind)
        expected = logits_of(model, kind)
        blocks = find_mlp_blocks(model)
        config = deftcore.BottleneckConfig(reduction_factor=4, parallel=parallel, task_type=task_type(kind))
        wrapped = peft.get_peft_model(model, config).eval()
        assert torch.equal(logits_of(wrapped, kind), expected)
        moved = train_a_step(wrapped, kind)
        assert len([name for name in moved if "bottleneck_up" in name and name.endswith("weight")]) == len(blocks)
        assert all("bottleneck_" in name for name in moved)
        assert not torch.allclose(logits_of(wrapped, kind), expected)


@pytest.mark.parametrize("kind", served_by("quantize"))
def test_quantize_and_load(kind, tmp_path):
    """Quantised in memory it is the unmodified model with rounded weights; straight from files it is the same."""
    dense = model_of(kind)
    dense.save_pretrained(tmp_path)
    ready = deftcore.patch if is_mamba(dense) else lambda model: model
    packed = deftcore.quantize(copy.deepcopy(dense))
    names = [name for name, module in packed.named_modules() if isinstance(module, deftcore.nn.Linear4bit)]
    with torch.no_grad():
        for name in names:
            layer = dense.get_submodule(name)
            rounded = dequantize_4bit(quantize_4bit(out_by_in(layer, layer.weight)))
            layer.weight.copy_(out_by_in(layer, rounded))
    ours = logits_of(ready(packed), kind)
    torch.testing.assert_close(ours, logits_of(dense, kind), rtol=1e-3, atol=1e-3)
    if kind in ("bert", "roberta"):
        return  # masked models: load_quantized reads causal and sequence-to-sequence ones
    torch.testing.assert_close(logits_of(ready(deftcore.load_quantized(tmp_path)), kind), ours)


@pytest.mark.parametrize("kind", served_by("mamba-lora"))
def test_mamba_lora(kind):
    """On the buffers alone, split; patched it gives the unpatched model's logits."""
    config = deftcore.MambaLoraConfig(r=2, split=True, init_lora_weights=False, task_type="CAUSAL_LM")
    plain = peft.get_peft_model(model_of(kind), config).eval()
    tuned = {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in plain.named_modules() if ".lora_A" in name}
    assert tuned == set(FAMILIES[kind].buffers)
    patched = deftcore.patch(copy.deepcopy(plain))
    torch.testing.assert_close(logits_of(patched, kind), logits_of(plain, kind), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("adapter", ["lora", "bottleneck"])
@pytest.mark.parametrize("kind", served_by("light-peft"))
def test_light_peft(kind, adapter):
    """What the masks of the first phase say goes for real, and what is left of the adapters trains."""
    model, batch = model_of(kind, OWN.get(kind, "silu")), tiny_batch(kind)
    sizes = {each.name: each.units for each in find_coupled(model)}

    def phase(adapted, name, changes, objective):
        """One step, after which the last units are those that go."""
        assert (name, changes) == ("estimate", {"max_steps": 5})
        objective.begin([batch], 0, 1)
        output = adapted(**batch)
        (output.loss + objective.share(batch, output)).backward()
        objective.end()
        with torch.no_grad():
            for mask in objective.masks:
                mask[len(mask) // 2 :] = 0.5
        adapted.zero_grad()

    options = {"adapter": adapter, "estimate_steps": 5, "head_ratio": 0.5, "ffn_ratio": 0.5, "dropout": 0.0}
    slim = add_adapter(model, "light-peft", options, Setup(phase=phase)).eval()
    for each in find_coupled(slim.get_base_model()):
        assert each.units == sizes[each.name] // 2
    moved = train_a_step(slim, kind)
    assert moved
    assert all("lora_" in name or "bottleneck_" in name for name in moved)
    assert logits_of(slim, kind).isfinite().all()


ATTEMPTS = {
    "density": deftcore.DensityLoss,
    "sparsify": deftcore.sparsify,
    "s2ft": lambda model: peft.get_peft_model(model, deftcore.S2ftConfig()),
    "bottleneck": lambda model: peft.get_peft_model(model, deftcore.BottleneckConfig()),
    "light-peft": lambda model: add_adapter(model, "light-peft", {}),
    "mamba-lora": lambda model: peft.get_peft_model(model, deftcore.MambaLoraConfig()),
}


@pytest.mark.parametrize(("kind", "use", "reason"), REFUSED)
def test_what_the_table_refuses_is_refused(kind, use, reason):
    model = tiny_model(kind)
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=f"got '{kind}'" if use == "mamba-lora" else reason):
        ATTEMPTS[use](model)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_an_architecture_that_is_not_listed_is_found_by_its_form():
    """Llama's MLP and Phi-3's under other names."""
    import transformers as t

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    olmo = t.OlmoForCausalLM(t.OlmoConfig(**sizes, **heads)).eval()
    glm = t.GlmForCausalLM(t.GlmConfig(**sizes, **heads, head_dim=8, eos_token_id=1)).eval()
    for model in (olmo, glm):
        assert model.config.model_type not in FAMILIES
        assert [block.name for block in find_mlp_blocks(model)] == ["model.layers.0.mlp", "model.layers.1.mlp"]
        expected = logits_of(model, "llama")
        sparse = deftcore.sparsify(model, tau=0.0)
        torch.testing.assert_close(logits_of(sparse, "llama"), expected, rtol=1e-4, atol=1e-5)


def test_phi3_sparse_with_an_adapter_and_in_4_bits():
    """LoRA's factors are cut with the matrix; a packed one is refused by name."""
    model = model_of("phi3")
    config = peft.LoraConfig(r=4, target_modules=["gate_up_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, config).eval()
    expected = logits_of(model, "phi3")
    for merge in (True, False):
        sparse = deftcore.sparsify(copy.deepcopy(model), merge=merge)
        torch.testing.assert_close(logits_of(sparse, "phi3"), expected, rtol=1e-4, atol=1e-4)
    packed = deftcore.quantize(model_of("phi3"), block_size=32)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.gate_up_proj: holds gate and up in 4 bits"):
        deftcore.sparsify(packed)
    part = deftcore.quantize(model_of("phi3"), block_size=32, skip=["lm_head", "gate_up_proj"])
    expected = logits_of(part, "phi3")
    torch.testing.assert_close(logits_of(deftcore.sparsify(part), "phi3"), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "phi3"])
def test_files(kind, tmp_path):
    """Forms whose names differ most, through files: sparse without one block, and in 4 bits."""
    model = model_of(kind)
    skip = [find_mlp_blocks(model)[0].name]
    deftcore.save_sparse(model, tmp_path / "sparse", skip=skip)
    expected = logits_of(deftcore.sparsify(copy.deepcopy(model), skip=skip), kind)
    torch.testing.assert_close(logits_of(deftcore.load_sparse(tmp_path / "sparse"), kind), expected)
    packed = deftcore.quantize(model)
    packed.save_pretrained(tmp_path / "packed")
    torch.testing.assert_close(logits_of(deftcore.load_quantized(tmp_path / "packed"), kind), logits_of(packed, kind))


def test_gates_fold_into_conv1d():
    model = model_of("gpt2")
    objective = deftcore.DensityLoss(model, adaptive="gate")
    with torch.no_grad():
        objective.gates.theta.copy_(torch.tensor([0.3, -1.2]))
        expected = logits_of(model, "gpt2")
        objective.fold_gates()
    torch.testing.assert_close(logits_of(model, "gpt2"), expected, rtol=1e-4, atol=1e-5)


def test_describe_is_plain_and_complete():
    rows = json.loads(json.dumps(list(ROWS.values())))
    assert [row["model_type"] for row in rows] == list(FAMILIES)
    claims = ["bottleneck", "density", "light-peft", "lora", "mamba-lora", "quantize", "s2ft", "sparsify"]
    assert sorted(uses()) == claims  # each has a test above
    for row in rows:
        assert sorted([*row["served"], *row["refused"]]) == claims
        model = tiny_model(row["model_type"], OWN.get(row["model_type"], "silu"))
        modules = dict(model.named_modules())
        paths = [path for form in [row["attention"], *row["mlp"][:1]] for path in form.values()]
        for path in paths:
            assert any(f".{name}".endswith(f".{path}") and isinstance(modules[name], nn.Module) for name in modules)
