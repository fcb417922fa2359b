"""Thresholds that leave a wanted share of neurons: how they are found, kept, and used by the sparse forms."""

import copy

import peft
import pytest
import torch
from conftest import perturbed, tiny_batch, tiny_model
from test_decoder import model_of, step_of
from test_decoder_forms import same_tokens

import deftcore
from deftcore.models.thresholds import Thresholded
from deftcore.nn.thresholds import Quantiles, keep_above
from deftcore.ops.decoder import decode_step, decode_step_ref

CRITERIA = ["product", "gate"]


def texts(count=3, rows=4, length=24, vocabulary=64):
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(count):
        ids = torch.randint(2, vocabulary, (rows, length), generator=generator)
        lengths = torch.randint(3, length + 1, (rows, 1), generator=generator)
        found.append({"input_ids": ids, "attention_mask": (torch.arange(length) < lengths).long()})
    return found


# ---------------------------------------------------------------------------- values and their quantiles


@pytest.mark.parametrize("backward", ["mask", "straight"])
@pytest.mark.parametrize("each", [False, True])
def test_what_is_above_is_kept(each, backward):
    torch.manual_seed(0)
    values = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
    level = torch.rand(7, dtype=torch.float64) if each else 0.4
    kept = keep_above(values, level, backward)
    cut = values.detach().abs() <= level
    assert torch.equal(kept, torch.where(cut, 0.0, values))
    assert cut.any()
    assert not cut.all()
    (grad,) = torch.autograd.grad(kept.square().sum() + kept.sum(), values)
    assert torch.equal(grad, torch.where(cut, 1.0 if backward == "straight" else 0.0, 2 * values.detach() + 1))
    if backward == "mask":  # the function's own gradient, away from its steps
        assert torch.autograd.gradcheck(lambda v: keep_above(v, level), values, eps=1e-7)
    assert keep_above(torch.tensor([torch.nan, -0.0, 1.0]), 0.5).isnan().tolist() == [True, False, False]
    with pytest.raises(ValueError, match="backward: must be one of 'straight', 'mask', got 'soft'"):
        keep_above(values, level, "soft")


@pytest.mark.parametrize("density", [0.9, 0.5, 0.07])
def test_levels_are_quantiles(density):
    torch.manual_seed(1)
    values = torch.randn(20011).double().pow(3).float()
    one, other = Quantiles(), Quantiles()
    one.add(values)
    for part in values.flip(0).split(700):
        other.add(part)
    level, share = one.level(density)
    assert (level, share) == other.level(density)
    assert share == float((values.abs() > level).double().mean()) <= density
    exact = float(values.abs().double().quantile(1 - density))
    assert abs(level - exact) <= 2**-11 * exact + 1e-3 * exact  # a bin, and a step between two of the values


def test_zeros_are_below_any_level():
    found = Quantiles()
    found.add(torch.tensor([0.0, -0.0, 0.0, 2.0]))
    assert found.level(0.5) == (0.0, 0.25)
    with pytest.raises(ValueError, match="no token was seen"):
        Quantiles().level(0.5)


# ---------------------------------------------------------------------------- calibration


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_calibrated_to_a_density(criterion, scaled):
    model = tiny_model("llama", "silu").eval()
    found = deftcore.calibrate_thresholds(model, texts(), density=0.4, criterion=criterion, scaled=scaled)
    assert found.tokens == sum(int(b["attention_mask"].sum()) for b in texts())
    assert all(0.38 < share <= 0.4 for share in found.densities.values())
    with torch.no_grad(), Thresholded(model, found) as measured:  # the blocks behind see what those before left
        for batch in texts():
            model(**batch)
    first = next(iter(found.levels))
    assert measured.densities()[first] == pytest.approx(found.densities[first], abs=1e-3)
    again = deftcore.calibrate_thresholds(model, texts()[::-1], density=0.4, criterion=criterion, scaled=scaled)
    assert again.densities == found.densities
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(found.levels[n])) for n, a in again.levels.items())


def test_padding_does_not_count():
    model = tiny_model("llama", "silu").eval()
    batch = texts(1)[0]
    other = dict(batch, input_ids=torch.where(batch["attention_mask"] == 0, 7, batch["input_ids"]))
    assert not torch.equal(batch["input_ids"], other["input_ids"])
    found = [deftcore.calibrate_thresholds(model, [each]) for each in (batch, other)]
    assert found[0].levels == found[1].levels
    assert found[0].tokens == int(batch["attention_mask"].sum())


def test_scaled_by_what_a_neuron_adds():
    """A neuron whose column of W_down is small is cut first, also where LoRA made it small."""
    model = tiny_model("llama", "silu").eval()
    down = model.model.layers[0].mlp.down_proj
    with torch.no_grad():
        down.weight[:, :8] *= 0.01
    levels = deftcore.calibrate_thresholds(model, texts(), scaled=True).levels["model.layers.0.mlp"]
    norms = down.weight.double().norm(dim=0)
    torch.testing.assert_close(levels.double() * norms, (levels.double() * norms)[:1].expand(72), rtol=1e-5, atol=0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["down_proj"])).eval()
    perturbed(adapted)
    merged = copy.deepcopy(adapted).merge_and_unload()
    two = [deftcore.calibrate_thresholds(each, texts(), scaled=True) for each in (adapted, merged)]
    torch.testing.assert_close(*(each.levels["model.layers.0.mlp"] for each in two), rtol=1e-3, atol=0)


@pytest.mark.parametrize("family", ["opt", "t5", "phi3", "bert"])
def test_families(family):
    """Plain blocks, pairs of encoder and decoder, gate and up in one matrix, layers that call the parts themselves."""
    model = tiny_model(family, "relu").eval()
    batch = tiny_batch(family)
    for criterion in CRITERIA:
        found = deftcore.calibrate_thresholds(model, [batch], density=0.2, criterion=criterion)
        with torch.no_grad():
            with Thresholded(model, found):
                wanted = model(**batch).logits
            sparse = deftcore.sparsify(copy.deepcopy(model), thresholds=found, path="sparse")
            torch.testing.assert_close(sparse(**batch).logits, wanted, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------------- the sparse forms


def reference(model, thresholds, batch):
    """The thresholded model in float64."""
    wide = copy.deepcopy(model).double()
    with torch.no_grad(), Thresholded(wide, thresholds):
        return wide(**batch).logits


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("form", ["dense", "lora", "nf4", "nf4 lora"])
def test_sparse_forms_are_the_thresholded_model(form, criterion, scaled):
    model = model_of("llama", "nf4" if "nf4" in form else "float32")
    if "lora" in form:
        targets = ["gate_proj", "up_proj", "down_proj"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=targets)).eval()
        perturbed(model)
    found = deftcore.calibrate_thresholds(
        model, texts(vocabulary=97), density=0.5, criterion=criterion, scaled=scaled
    )  # fmt: skip
    for batch in ({"input_ids": texts()[0]["input_ids"][:1, :9]}, texts()[0]):
        with torch.no_grad(), Thresholded(model, found):
            wanted = model(**batch).logits
        if form == "dense":
            torch.testing.assert_close(reference(model, found, batch), wanted.double(), rtol=1e-4, atol=1e-5)
        sparse = deftcore.sparsify(copy.deepcopy(model), thresholds=found, path="sparse", merge=False)
        with torch.no_grad():
            torch.testing.assert_close(sparse(**batch).logits, wanted, rtol=1e-3, atol=1e-4)
    block = next(m for m in sparse.modules() if type(m).__name__.startswith("SparseMLP"))
    assert block.by_product == (criterion == "product")
    assert (block.taus is not None) == scaled
    assert ("a tau each" in repr(block)) == scaled
    assert ("of the product" in repr(block)) == block.by_product


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("form", ["float32", "bfloat16", "nf4"])
def test_the_decoder_takes_thresholds(form, criterion, scaled):
    model = model_of("llama", form)
    found = deftcore.calibrate_thresholds(
        model, texts(vocabulary=97), density=0.5, criterion=criterion, scaled=scaled
    )  # fmt: skip
    model = deftcore.sparsify(model, thresholds=found)
    stack, hidden, keys, values = step_of(model, batch=5)
    assert stack.blocks[0].by_product == (criterion == "product")
    twins = [t.double() for t in (keys, values)]
    exact = decode_step_ref(hidden.double(), stack, *twins, torch.arange(5) % 3, 9)
    found = decode_step(hidden, stack, keys, values, torch.arange(5) % 3, 9)
    assert (found.double() - exact).abs().max() <= 1e-5 * exact.abs().max()
    blocks = [block.tau for block in stack.blocks] if not scaled else [block.taus for block in stack.blocks]
    assert all(level is not None for level in blocks)
    if form != "bfloat16":
        same_tokens(model, 2)


# ---------------------------------------------------------------------------- on disk


@pytest.mark.parametrize("scaled", [False, True])
def test_saved_and_read_again(tmp_path, scaled):
    model = tiny_model("llama", "silu").eval()
    found = deftcore.calibrate_thresholds(model, texts(), scaled=scaled)
    found.save(tmp_path)
    again = deftcore.Thresholds.load(tmp_path)
    assert (again.criterion, again.target, again.densities, again.tokens) == (
        found.criterion, 0.5, found.densities, found.tokens,
    )  # fmt: skip
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(found.levels[n])) for n, a in again.levels.items())
    folder = deftcore.save_sparse(model, tmp_path / "model", thresholds=found, skip=["model.layers.1.mlp"])
    loaded = deftcore.load_sparse(folder)
    with torch.no_grad():
        wanted = deftcore.sparsify(model, thresholds=found, skip=["model.layers.1.mlp"])(**texts()[0]).logits
        torch.testing.assert_close(loaded(**texts()[0]).logits, wanted)
    (folder / "density_thresholds.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no density_thresholds\.safetensors"):
        deftcore.load_sparse(folder)
    (folder / "density_thresholds.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"thresholds: .*density_thresholds\.safetensors is damaged"):
        deftcore.load_sparse(folder)
    assert deftcore.Thresholds.load(tmp_path / "elsewhere") is None


def test_errors_name_what_is_wrong(tmp_path):
    model = tiny_model("llama", "silu").eval()
    calibrate = deftcore.calibrate_thresholds
    with pytest.raises(ValueError, match="criterion: must be one of 'product', 'gate', got 'up'"):
        calibrate(model, texts(), criterion="up")
    with pytest.raises(ValueError, match=r"density: must be above 0, at most 1, got 1\.5"):
        calibrate(model, texts(), density=1.5)
    with pytest.raises(ValueError, match=r"density: must name every MLP block.*model\.layers\.1\.mlp"):
        calibrate(model, texts(), density={"model.layers.0.mlp": 0.5})
    with pytest.raises(ValueError, match="no token was seen"):
        calibrate(model, [])
    found = calibrate(model, texts())
    for refuse in (deftcore.sparsify, lambda m, **k: deftcore.save_sparse(m, tmp_path / "m", **k)):
        with pytest.raises(ValueError, match="tau: is for a model without thresholds"):
            refuse(model, tau={"model.layers.0.mlp": 0.1}, thresholds=found)
        less = deftcore.Thresholds("gate", {"model.layers.0.mlp": 0.1, "mlp": 0.1})
        with pytest.raises(
            ValueError, match=r"of another model: no level of \['model\.layers\.1\.mlp'\], unknown .*mlp"
        ):
            refuse(model, thresholds=less)
        other = deftcore.Thresholds("gate", dict.fromkeys(found.levels, torch.ones(5)))
        with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp has 72 neurons, got 5 levels"):
            refuse(model, thresholds=other)
    with pytest.raises(ValueError, match="levels: a"):
        deftcore.Thresholds("gate", {"a": -1.0})
    with pytest.raises(ValueError, match=r"levels: a must be \[F\]"):
        deftcore.Thresholds("gate", {"a": torch.ones(2, 2)})
    sparse = deftcore.sparsify(model, thresholds=found)
    with pytest.raises(ValueError, match=r"sparse form already|no MLP block"):
        calibrate(sparse, texts())
