"""Slimming over 4 bits: whole blocks are cut bit by bit, others refused or rounded again; and the way on from a slim
model, through 4 bits, sparsity, DEFT and fused adapters."""

import copy

import peft
import pytest
import torch
from conftest import tiny_batch
from slim_models import assert_same, filled, logits_of, lora_of, masked, model_of, some_kept

import deftcore
from deftcore.models.coupled import find_coupled
from deftcore.models.kept import Kept
from deftcore.models.slimming import cut
from deftcore.nn import Linear4bit, SparseMLP, SparseMLP4bit
from deftcore.nn.linear import PackedModule
from deftcore.ops import quantize_4bit


def wide_model():
    """Llama with heads of 32, so that blocks of 32 lie within them, and rows of whole blocks."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        intermediate_size=160,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.2)
    return model


def decoded(model):
    """The weights that a model in 4 bits computes with, by name."""
    return {
        name: module.quantized.dequantize(torch.float32) if isinstance(module, PackedModule) else module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, (PackedModule, torch.nn.Linear))
    }


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(12, 64), (9, 32), (10, 16), (6, 96), (7, 48)])
@pytest.mark.parametrize("dim", [0, 1])
def test_whole_blocks_are_taken_bit_by_bit(dim, shape, double_quant):
    """Every set of lines: those that are whole blocks give the values that they had, others are refused."""
    q = quantize_4bit(torch.randn(shape), block_size=32, double_quant=double_quant)
    values = q.dequantize()
    groups = 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        step = (1, 2, 4, 32)[seed % 4]
        places = torch.arange(shape[dim])
        lines = places[torch.rand(-(-shape[dim] // step), generator=generator).lt(0.6)[places // step]]
        owners = torch.arange(q.numel()).view(shape) // 32
        here, rest = owners.index_select(dim, lines), owners.index_select(dim, places[~torch.isin(places, lines)])
        # Whole: no block has elements on both sides, and what stays lies in the order of its blocks.
        in_place = torch.equal(here.flatten(), here.flatten().sort().values)
        whole = lines.numel() > 0 and in_place and not torch.isin(here, rest).any()
        assert q.has_whole(dim, lines) == whole
        if whole:
            groups += 1
            assert torch.equal(q.select(dim, lines).dequantize(), values.index_select(dim, lines))
        else:
            with pytest.raises(ValueError, match="lines: must be whole blocks of 32"):
                q.select(dim, lines)
    assert groups


@pytest.mark.parametrize("dim", [0, 1])
def test_columns_of_neuron_major_weights(dim):
    """Blocks down the columns: any columns, and rows by whole blocks."""
    q = quantize_4bit(torch.randn(5, 64), block_size=32).t()
    lines = torch.tensor([0, 2, 3]) if dim == 1 else torch.arange(32, 64)
    assert q.has_whole(dim, lines)
    assert torch.equal(q.select(dim, lines).dequantize(), q.dequantize().index_select(dim, lines))
    assert not q.has_whole(0, torch.tensor([0, 2, 3]))


def test_a_4bit_base_loses_whole_blocks_exactly():
    model = deftcore.quantize(wide_model(), block_size=32)
    units = {each.name: (2, 3) if each.mlp is None else tuple(range(32, 128)) for each in find_coupled(model)}
    expected = masked(model, Kept(units))
    before = decoded(model)
    report = cut(model, Kept(units))
    assert not report.requantized
    after = decoded(model)
    for name, weight in before.items():
        rows, columns = slice(None), slice(None)
        if "self_attn" in name:
            kept = slice(64, 128) if name.endswith(("q_proj", "o_proj")) else slice(32, 64)
            rows, columns = (rows, kept) if name.endswith("o_proj") else (kept, columns)
        elif "mlp" in name:
            rows, columns = (rows, slice(32, 128)) if name.endswith("down_proj") else (slice(32, 128), columns)
        assert torch.equal(after[name], weight[rows, columns]), name
    assert_same(logits_of(model, "llama"), logits_of(expected, "llama"), 1e-5)


def test_neuron_major_weights_lose_any_channel_exactly():
    """A down projection whose blocks run down its columns, beside an MLP whose rows are whole blocks."""
    model = wide_model()
    mlp = model.model.layers[0].mlp
    for name in ("gate_proj", "up_proj"):
        setattr(mlp, name, Linear4bit.from_linear(getattr(mlp, name), block_size=32))
    mlp.down_proj = Linear4bit(quantize_4bit(mlp.down_proj.weight.detach().t().contiguous(), block_size=32).t())
    kept = Kept({"model.layers.0.mlp": (0, 3, 31, 64, 159)})
    expected, weight = masked(model, kept), mlp.down_proj.quantized.dequantize()
    assert not cut(model, kept).requantized
    assert torch.equal(mlp.down_proj.quantized.dequantize(), weight[:, [0, 3, 31, 64, 159]])
    assert_same(logits_of(model, "llama"), logits_of(expected, "llama"), 1e-5)


def test_a_cut_block_is_refused_or_rounded_again():
    model = deftcore.quantize(wide_model(), block_size=32)
    kept = some_kept(model)
    before = decoded(model)
    with pytest.raises(ValueError, match=r"down_proj: this would cut through blocks of 32 weights .* requantize=True"):
        cut(model, kept)
    folded = Kept(kept.units, {}, {name: (1.1,) * len(places) for name, places in kept.units.items()})
    attention = {name: places for name, places in folded.units.items() if "attn" in name}
    whole = Kept(attention, {}, {name: folded.scales[name] for name in attention})
    with pytest.raises(ValueError, match=r"o_proj: this would scale blocks"):
        cut(model, whole)
    assert all(torch.equal(each, before[name]) for name, each in decoded(model).items())
    expected = logits_of(masked(model, folded), "llama")
    report = cut(model, folded, requantize=True)
    assert sorted(report.requantized) == [
        f"model.layers.{i}.{name}" for i in (0, 1) for name in ("mlp.down_proj", "self_attn.o_proj")
    ]
    assert all(0 < error < 0.15 for error in report.requantized.values())
    found = logits_of(model, "llama")
    assert 0 < (found - expected).norm() / expected.norm() < 0.5
    assert "4 weights rounded again" in str(report)


def test_a_slim_model_in_4_bits_on_disk(tmp_path):
    """Cut, then quantised, as deftcore's files and as bitsandbytes' names; a task over a base in 4 bits."""
    model = wide_model()
    cut(model, some_kept(model))
    deftcore.quantize(model, block_size=32)
    model.save_pretrained(tmp_path / "model")
    again = deftcore.load_model(tmp_path / "model")
    assert isinstance(again.model.layers[0].mlp.up_proj, Linear4bit)
    assert torch.equal(logits_of(again, "llama"), logits_of(model, "llama"))

    model = deftcore.quantize(wide_model(), block_size=32)
    cut(model, some_kept(model), requantize=True)  # some scales are nested then, some are not
    model.save_pretrained(tmp_path / "other")
    assert torch.equal(logits_of(deftcore.load_model(tmp_path / "other"), "llama"), logits_of(model, "llama"))

    base = deftcore.quantize(wide_model(), block_size=32)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = filled(peft.get_peft_model(copy.deepcopy(base), config))
    deftcore.slim(adapted, some_kept(base), requantize=True)
    deftcore.save_slim(adapted, tmp_path / "task")
    again = deftcore.load_slim(base, tmp_path / "task").eval()
    assert torch.equal(logits_of(again, "llama"), logits_of(adapted, "llama"))


@pytest.mark.parametrize("kind", ["llama", "opt", "t5"])
def test_slim_then_4_bits_and_sparse(kind, tmp_path):
    """Prune, train sparse activations with fused LoRA, merge, 4 bits, write, sparse: each step computes what the one
    before it did."""
    model = model_of(kind, "relu" if kind != "t5" else "gated-gelu")
    adapted = lora_of(model, kind, r=4)
    deftcore.slim(adapted, some_kept(model, round_to=32))  # whole blocks, for weights in neuron-major order
    slim = logits_of(adapted, kind)
    deftcore.patch(adapted)
    torch.testing.assert_close(logits_of(adapted, kind), slim, rtol=1e-4, atol=1e-4)
    density = deftcore.DensityLoss(adapted)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
    adapted.train()
    for _ in range(2):
        (adapted(**tiny_batch(kind)).loss + density.loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
    density.detach()
    adapted.eval()
    trained = logits_of(adapted, kind)
    assert not torch.equal(trained, slim)
    merged = adapted.merge_and_unload()
    assert_same(logits_of(merged, kind), trained, 1e-4)
    packed = deftcore.quantize(merged, block_size=32)
    expected = logits_of(packed, kind)
    deftcore.save_sparse(packed, tmp_path / "sparse")
    for sparse in (deftcore.sparsify(packed, tau=0.0, path="sparse"), deftcore.load_sparse(tmp_path / "sparse")):
        blocks = [module for module in sparse.modules() if isinstance(module, (SparseMLP, SparseMLP4bit))]
        assert len(blocks) == (4 if kind == "t5" else 2)
        assert kind == "t5" or all(isinstance(block, SparseMLP4bit) for block in blocks)  # T5's wo stays dense
        assert_same(logits_of(sparse, kind), expected, 1e-3)
