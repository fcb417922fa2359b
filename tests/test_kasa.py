"""KaSA: every numbered property of its specification, the values of PEFT's own and of float64, and the edges."""

import json
import math
import os

import numpy as np
import peft
import pytest
import torch
import transformers as t
from conftest import tiny_base, tiny_batch, tiny_model
from recipe_runs import check_recipe
from torch import nn

import deftcore
from deftcore.methods.kasa.interchange import load_peft_kasa, save_peft_kasa
from deftcore.methods.kasa.layer import KasaLinear
from deftcore.methods.kasa.penalty import KasaPenalty, gram_distance, layer_penalties
from deftcore.methods.kasa.truncation import dropped_factors
from deftcore.methods.lora import layer as lora_layer
from deftcore.methods.lora import paired_model
from deftcore.nn.linear import Linear4bit
from deftcore.ops import minor_subspace, subspace
from deftcore.training.adapters import load_adapter

SHAPES = [(24, 10), (10, 24), (16, 16)]
TARGETS = ["q_proj", "v_proj", "down_proj"]


class Net(nn.Module):
    """One linear layer."""

    def __init__(self, rows, columns, dtype=torch.float64):
        super().__init__()
        self.layer = nn.Linear(columns, rows, dtype=dtype)

    def forward(self, x):
        return self.layer(x)


def net(rows=24, columns=10, dtype=torch.float64, kind=None, **options):
    """A model of one layer under KaSA, and its weight of before."""
    torch.manual_seed(0)
    plain = Net(rows, columns, dtype)
    if kind is not None:
        plain.layer = kind(plain.layer)
    before = plain.layer.weight.detach().clone()
    config = deftcore.KasaFactoredConfig(**({"r": 3, "lora_alpha": 6, "target_modules": ["layer"]} | options))
    return peft.get_peft_model(plain, config, autocast_adapter_dtype=options.get("autocast", True)), before


def perturbed(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def layer_of(model):
    return next(module for module in model.modules() if isinstance(module, KasaLinear))


def llama(dtype=torch.float32, adapter="default", model=None, **options):
    config = deftcore.KasaFactoredConfig(
        **({"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | options)
    )
    return peft.get_peft_model(model or tiny_model("llama").to(dtype).eval(), config, adapter_name=adapter)


def logits(model, **more):
    with torch.no_grad():
        return model(input_ids=tiny_batch("llama")["input_ids"], **more).logits


def truncated(weight, cut):
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    keep = len(s) - cut
    return (u[:, :keep] * s[:keep]) @ vt[:keep], s


# ---------------------------------------------------------------------------- the minor subspace


@pytest.mark.parametrize("shape", [*SHAPES, (40, 1), (1, 40), (800, 780), (770, 1500)])
@pytest.mark.parametrize("rank", [1, 9])
def test_minor_subspace(shape, rank):
    """Against the whole decomposition, through both ways of computing it."""
    rank = min(rank, min(shape))
    w = torch.randn(shape, dtype=torch.float64)
    u, s, v = minor_subspace(w, rank)
    expected, values = truncated(w, rank)
    assert torch.allclose(s, values[-rank:], rtol=1e-10, atol=1e-13)
    assert torch.allclose(w - (u * s) @ v.t(), expected, rtol=0, atol=1e-9)
    for factor in (u, v):
        assert torch.allclose(factor.t() @ factor, torch.eye(rank, dtype=torch.float64), atol=1e-10)


def test_minor_subspace_keeps_small_values():
    """Values of 1e-7 of the largest, which a Gram matrix in float32 would lose, keep their digits."""
    q, _ = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64))
    p, _ = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64))
    values = torch.logspace(0, -7, 30, dtype=torch.float64)
    _, s, _ = minor_subspace((q * values) @ p.t(), 4)
    assert torch.allclose(s, values[-4:], rtol=1e-6)


@pytest.mark.parametrize("kind", ["deficient", "zero", "cluster"])
def test_minor_subspace_of_degenerate_weights(kind):
    side = 790
    if kind == "deficient":
        w = torch.randn(side, 700, dtype=torch.float64) @ torch.randn(700, side, dtype=torch.float64)
    else:
        w = torch.eye(side, dtype=torch.float64) if kind == "cluster" else torch.zeros(side, side, dtype=torch.float64)
    u, s, v = minor_subspace(w, 6)
    left = w - (u * s) @ v.t()
    largest = float(torch.linalg.matrix_norm(w, 2)) or 1.0
    assert torch.isfinite(left).all()
    if kind == "cluster":
        assert torch.allclose(s, torch.ones(6, dtype=torch.float64), atol=1e-9)
        assert abs(float(left.norm().square()) - (side - 6)) < 1e-6
    else:
        assert float(s.max()) < 1e-9 * largest
        assert torch.allclose(left, w, atol=1e-8 * largest)


def test_the_iteration_settles_where_it_is_used():
    gram = torch.randn(900, 900, dtype=torch.float64)
    assert subspace._inverse_krylov(gram @ gram.t(), 8) is not None
    assert subspace._inverse_krylov(torch.zeros(800, 800, dtype=torch.float64), 4) is None


@pytest.mark.parametrize("shape", [(5, 1), (600, 511), (600, 512), (1100, 1030)])
def test_gram_is_the_product(shape):
    w = torch.randn(shape, dtype=torch.float64)
    assert torch.allclose(subspace._gram(w), w.t() @ w, rtol=1e-12, atol=1e-10)


def test_a_square_weight_takes_one_factorisation(monkeypatch):
    """The second is for a lower end that is far from zero, or close together."""
    calls = []
    u, v = (torch.linalg.qr(torch.randn(900, 900, generator=torch.Generator().manual_seed(i))).Q for i in range(2))
    factorise = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda *a: calls.append(1) or factorise(*a))
    minor_subspace(u * torch.linspace(1e-3, 1, 900) @ v, 8)
    assert calls == [1]
    assert minor_subspace(torch.randn(1500, 800), 8)[1].min() > 0


def test_minor_subspace_is_reproducible():
    w = torch.randn(800, 800)
    assert all(torch.equal(a, b) for a, b in zip(minor_subspace(w, 5), minor_subspace(w, 5), strict=True))


@pytest.mark.parametrize(
    ("w", "rank", "message"),
    [
        (torch.ones(3), 1, "w: must be a matrix"), (torch.ones(3, 4), 4, "rank: must be from 0 to 3"),
        (torch.ones(3, 4), -1, "rank"), (torch.full((3, 4), math.nan), 1, "w: must be finite"),
        (torch.ones(3, 4), 1.0, "rank: must be an integer"), (torch.ones(3, 4).int(), 1, "w: dtype"),
    ],
)  # fmt: skip
def test_minor_subspace_refuses(w, rank, message):
    with pytest.raises((ValueError, TypeError), match=message):
        minor_subspace(w, rank)


def test_what_was_computed_is_kept(monkeypatch):
    w = torch.randn(300, 280)
    first = dropped_factors(w, 5, "digest-of-w")
    monkeypatch.setattr("deftcore.methods.kasa.truncation.minor_subspace", lambda *_: pytest.fail("computed again"))
    for rank in (5, 3):  # a smaller rank is part of a larger one's
        a, b = dropped_factors(w, rank, "digest-of-w")
        assert torch.equal(a, first[0][5 - rank :])
        assert torch.equal(b, first[1][:, 5 - rank :])


def test_large_weights_have_a_progress_bar(monkeypatch):
    hidden = []
    monkeypatch.setattr(paired_model, "tracked", lambda layers, text, quick: hidden.append(quick) or layers)
    for slow in (512, 16):
        monkeypatch.setattr(paired_model, "_SLOW", slow)
        llama()
    assert hidden == [True, False]


def test_a_damaged_cache_is_computed_again():
    from deftcore._files import cache_folder

    w = torch.randn(300, 280)
    first = dropped_factors(w, 5, "damaged")
    (cache_folder() / "minor_subspaces" / "damaged.safetensors").write_bytes(b"nothing")
    assert all(map(torch.equal, dropped_factors(w, 5, "damaged"), first))


def test_the_cache_is_bounded(monkeypatch):
    """What was not used for longest goes; a digest that was forgotten is computed again."""
    from deftcore._files import cache_folder

    w, folder = torch.randn(300, 280), cache_folder() / "minor_subspaces"
    first = dropped_factors(w, 5, "used")
    size = (folder / "used.safetensors").stat().st_size
    monkeypatch.setattr("deftcore.methods.kasa.truncation.KEPT_BYTES", 2 * size)
    dropped_factors(w, 5, "unused")
    for age, name in ((2, "used"), (1, "unused")):
        past = (folder / f"{name}.safetensors").stat().st_mtime - age
        os.utime(folder / f"{name}.safetensors", (past, past))
    dropped_factors(w, 5, "used")
    dropped_factors(w, 5, "new")
    assert sorted(path.name for path in folder.iterdir()) == ["new.safetensors", "used.safetensors"]
    assert all(map(torch.equal, dropped_factors(w, 5, "unused"), first))


# ---------------------------------------------------------------------------- properties of the specification


@pytest.mark.parametrize("mode", ["factored", "destructive"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 9])
def test_fresh_adapter_computes_with_the_truncated_weight(shape, rank, mode):
    """Properties 1 and 9."""
    model, before = net(*shape, r=rank, base_mode=mode)
    expected, values = truncated(before, rank)
    layer = layer_of(model)
    kept = before + layer.dense_update() if mode == "factored" else layer.base_layer.weight.detach()
    x = torch.randn(5, shape[1], dtype=torch.float64)
    bias = layer.base_layer.bias
    # float32 holds what is taken away
    assert torch.allclose(model(x), x @ expected.t() + bias, rtol=1e-5, atol=1e-6)
    gone = before - kept
    assert torch.allclose(gone.norm().square(), values[-rank:].square().sum(), rtol=1e-5)
    assert torch.allclose(torch.linalg.matrix_norm(gone, 2), values[-rank], rtol=1e-5)
    left = torch.linalg.svdvals(kept)
    assert (left > 1e-5 * left[0]).sum() == min(shape) - rank


def test_truncating_again_drops_zeros():
    """Property 2."""
    weight = torch.randn(20, 14, dtype=torch.float64)
    once, _ = truncated(weight, 4)
    _, s, _ = minor_subspace(once, 4)
    assert float(s.max()) < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_modes_agree(shape, dtype):
    """Property 3: and a disabled factored adapter is the base, bit for bit."""
    x = torch.randn(7, shape[1]).to(dtype)
    found = {}
    for mode in ("factored", "destructive"):
        model, before = net(*shape, dtype=dtype, base_mode=mode)
        found[mode] = perturbed(model)(x)
        assert found[mode].dtype == dtype
        if mode == "factored":
            with model.disable_adapter():
                bias = layer_of(model).base_layer.bias
                assert torch.equal(model(x), nn.functional.linear(x, before, bias))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    scale = found["factored"].float().abs().max()
    assert (found["factored"] - found["destructive"]).float().abs().max() <= tolerance * scale


def test_factored_is_closer_than_destructive_in_bfloat16():
    x = torch.randn(64, 40).bfloat16()
    model, before = net(48, 40, torch.float32)
    exact = perturbed(model)(x.float())
    error = {}
    for mode in ("factored", "destructive"):
        torch.manual_seed(0)
        plain = Net(48, 40, torch.float32)
        assert torch.equal(plain.layer.weight, before)
        with torch.no_grad():
            rounded = plain.bfloat16()
        config = deftcore.KasaFactoredConfig(r=3, lora_alpha=6, target_modules=["layer"], base_mode=mode)
        error[mode] = (perturbed(peft.get_peft_model(rounded, config))(x).float() - exact).norm()
    assert error["factored"] < 1.02 * error["destructive"]


@pytest.mark.parametrize("mode", ["factored", "destructive"])
@pytest.mark.parametrize("safe", [True, False])
def test_merging(mode, safe):
    """Property 4: unmerging gives back the weight of before, in destructive mode the truncated one."""
    model, before = net(base_mode=mode)
    perturbed(model)
    x, layer = torch.randn(4, 10, dtype=torch.float64), layer_of(model)
    weight, y = layer.base_layer.weight.detach().clone(), model(x)
    assert torch.equal(weight, before) == (mode == "factored")
    model.merge_adapter(safe_merge=safe)
    assert torch.allclose(model(x), y, rtol=1e-6, atol=1e-9)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, weight)
    assert torch.equal(model(x), y)
    assert torch.allclose(model.merge_and_unload()(x), y, rtol=1e-6, atol=1e-9)


def test_export_as_plain_lora(tmp_path):
    """Property 4: rank 2 r on the original base, with PEFT alone."""
    model = perturbed(llama(rank_pattern={"v_proj": 3}))
    deftcore.export_lora(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 8, 8)
    assert set(config["rank_pattern"].values()) == {6}
    plain = peft.PeftModel.from_pretrained(tiny_model("llama").eval(), tmp_path)
    assert torch.allclose(logits(plain), logits(model), rtol=1e-5, atol=1e-5)
    assert {type(m).__module__ for m in plain.modules() if hasattr(m, "lora_A")} == {"peft.tuners.lora.layer"}


def test_export_refuses(tmp_path):
    with pytest.raises(ValueError, match="base_mode 'factored'"):
        deftcore.export_lora(llama(base_mode="destructive"), tmp_path / "a")
    with pytest.raises(ValueError, match="no KaSA or BA-LoRA adapter 'other'"):
        deftcore.export_lora(llama(), tmp_path / "b", adapter="other")
    assert not list(tmp_path.iterdir())


def test_values_of_the_penalties():
    """Property 5."""
    rank, orthonormal = 3, torch.linalg.qr(torch.randn(10, 3, dtype=torch.float64)).Q.t()
    values, off = layer_penalties(torch.tensor([1.0, -2.0, 3.0]), orthonormal, torch.zeros(6, rank).double())
    assert float(values) == 14
    assert abs(float(off) - math.sqrt(rank)) < 1e-12
    assert abs(float(gram_distance(2 * orthonormal)) - 3 * math.sqrt(rank)) < 1e-12


def test_the_penalty_of_the_active_adapter():
    """Its own weights and forms, not those of the first that the model had."""
    model = llama(beta=0.5)
    second = {"beta": 0.0, "gamma": 0.25, "reduction": "sum", "ortho_form": "reference"}
    config = deftcore.KasaFactoredConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM", **second)
    model.add_adapter("other", config)
    model.set_adapter("other")
    assert KasaPenalty(model).settings() == second
    assert KasaPenalty(model, gamma=1.0).settings() == second | {"gamma": 1.0}
    assert KasaPenalty(model, model.peft_config["default"]).beta == 0.5
    with pytest.raises(ValueError, match="config: must be a KasaFactoredConfig, got"):
        KasaPenalty(model, deftcore.BaLoraConfig())
    model.delete_adapter("other")
    model.delete_adapter("default")
    with pytest.raises(ValueError, match="config: must be a KasaFactoredConfig, no KaSA adapter is active"):
        KasaPenalty(model)


def test_a_penalty_of_weight_0_is_left_out():
    model = perturbed(llama())
    with torch.no_grad():
        layer_of(model).lora_diag["default"].fill_(1e30)  # whose square is infinite
    penalty = KasaPenalty(model, beta=0.0, gamma=0.5)
    loss = penalty.loss()
    assert torch.equal(loss, 0.5 * penalty.terms()[1])
    loss.backward()
    assert layer_of(model).lora_diag["default"].grad is None
    assert penalty.report().keys() == {"kasa_l3"}
    assert float(KasaPenalty(model, beta=0.0, gamma=0.0).loss()) == 0


def test_reference_form_is_the_large_gram():
    """Property 6."""
    a = torch.randn(4, 17, dtype=torch.float64)
    direct = torch.linalg.matrix_norm(a.t() @ a - torch.eye(17, dtype=torch.float64))
    assert abs(float(gram_distance(a, form="reference") - direct)) < 1e-12 * float(direct)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("form", ["paper", "reference"])
def test_gradients_of_the_penalties(rank, form):
    """Property 7."""
    a, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((rank, 7), (5, rank)))
    diag = torch.randn(rank, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *p: layer_penalties(*p, form=form), (diag, a, b))


def test_no_gradient_at_exact_orthonormality():
    """Property 7."""
    a = torch.eye(3, 8, dtype=torch.float64, requires_grad=True)
    gram_distance(a).backward()
    assert torch.equal(a.grad, torch.zeros_like(a))


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("mode", ["factored", "destructive"])
def test_gradients_of_the_layer(rank, mode):
    """Property 7, against finite differences."""
    model, _ = net(r=rank, base_mode=mode)
    layer = layer_of(perturbed(model))
    x = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    names = [name for name, p in layer.named_parameters() if p.requires_grad]
    assert sorted(name.split(".")[0] for name in names) == ["lora_A", "lora_B", "lora_diag"]
    given = tuple(layer.get_parameter(name).detach().requires_grad_() for name in names)

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *given))


def test_permutations_and_signs_change_nothing():
    """Property 8."""
    model, _ = net()
    layer = layer_of(perturbed(model))
    x = torch.randn(4, 10, dtype=torch.float64)
    y, penalty = model(x), KasaPenalty(model).loss()
    a, b, diag = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_diag["default"]
    with torch.no_grad():
        for tensor, dim in ((a, 0), (b, 1), (diag, 0)):
            tensor.copy_(tensor.index_select(dim, torch.tensor([2, 0, 1])))
        a[1].neg_()
        b[:, 1].neg_()
    assert torch.allclose(model(x), y, rtol=1e-12)
    assert torch.allclose(KasaPenalty(model).loss(), penalty, rtol=1e-12)


def test_mean_and_sum_differ_by_the_number_of_layers():
    """Property 10."""
    model = perturbed(llama())
    mean, total = (KasaPenalty(model, reduction=each).loss() for each in ("mean", "sum"))
    assert torch.allclose(total, 6 * mean, rtol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mode", ["factored", "destructive"])
def test_save_and_load(tmp_path, mode, packed):
    """Property 11: the same logits, bit for bit."""
    model = perturbed(llama(model=tiny_base(packed), base_mode=mode))
    y = logits(model)
    model.save_pretrained(tmp_path)
    for loaded in (
        peft.PeftModel.from_pretrained(tiny_base(packed), tmp_path),
        load_adapter(tiny_base(packed), tmp_path),
    ):
        assert torch.equal(logits(loaded), y)
    low = peft.PeftModel.from_pretrained(tiny_base(packed), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(low), y)


def test_loading_does_not_decompose(tmp_path, monkeypatch):
    model = perturbed(llama())
    model.save_pretrained(tmp_path)
    y = logits(model)
    monkeypatch.setattr("deftcore.methods.kasa.layer.dropped_factors", lambda *_: pytest.fail("decomposed"))
    assert torch.equal(logits(peft.PeftModel.from_pretrained(tiny_model("llama").eval(), tmp_path)), y)


@pytest.mark.parametrize("mode", ["factored", "destructive"])
@pytest.mark.parametrize("fault", ["another", "truncated"])
def test_a_wrong_base_is_refused(tmp_path, mode, fault):
    """Property 11: one whose weights differ, or are truncated already; before anything changes."""
    llama(base_mode=mode).save_pretrained(tmp_path)
    wrong = tiny_model("llama").eval()
    weight = wrong.model.layers[0].self_attn.q_proj.weight.data
    if fault == "another":
        weight[0, 0] += 1e-4
    else:
        weight.copy_(truncated(weight, 4)[0])
    names = [name for name, _ in wrong.named_modules()]
    with pytest.raises(ValueError, match="made for other base weights"):
        peft.PeftModel.from_pretrained(wrong, tmp_path)
    assert [name for name, _ in wrong.named_modules()] == names


def test_a_base_in_another_precision_is_the_same_base(tmp_path):
    """Of a bfloat16 checkpoint, loaded in float32."""
    llama(torch.bfloat16).save_pretrained(tmp_path)
    wide = tiny_model("llama").bfloat16().float().eval()
    assert logits(peft.PeftModel.from_pretrained(wide, tmp_path)).isfinite().all()


@pytest.mark.parametrize("alpha", [4, 3])  # a scaling of 3/4 rounds
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_without_truncation_and_with_ones_it_is_lora(dropout, alpha):
    """Property 12: exactly."""
    options = {
        "r": 4,
        "lora_alpha": alpha,
        "target_modules": TARGETS,
        "lora_dropout": dropout,
        "task_type": "CAUSAL_LM",
    }
    ours = llama(**options, truncate_rank=0)
    plain = deftcore.patch(peft.get_peft_model(tiny_model("llama").eval(), peft.LoraConfig(**options)), verify=False)
    with torch.no_grad():
        state = plain.state_dict()
        for name, p in perturbed(ours).named_parameters():
            if "lora_diag" in name:
                p.fill_(1)
            elif p.requires_grad:
                state[name].copy_(p)
    batch, found = tiny_batch("llama"), []
    for model in (ours, plain):
        torch.manual_seed(5)
        loss = model.train()(**batch).loss
        loss.backward()
        found.append([loss, *(p.grad for n, p in model.named_parameters() if p.requires_grad and "diag" not in n)])
    assert all(map(torch.equal, *found))


# ---------------------------------------------------------------------------- values of others


def parity_layer(data, run, matrix, **options):
    """A layer with the file's weights and adapter, in float64 but for runs in float32."""
    dtype = torch.float32 if "f32" in run else torch.float64
    value = {name: torch.from_numpy(data[f"{matrix}.{name}"]).to(dtype) for name in ("W", "bias", "x", "grad_y")}
    rows, columns = value["W"].shape
    plain = Net(rows, columns, dtype)
    with torch.no_grad():
        plain.layer.weight.copy_(value["W"])
        plain.layer.bias.copy_(value["bias"])
    slora = bool(data[f"{run}.rslora"]) if f"{run}.rslora" in data else "rslora" in run
    config = deftcore.KasaFactoredConfig(
        r=int(data[f"{run}.r"]), lora_alpha=int(data[f"{run}.alpha"]), use_rslora=slora, target_modules=["layer"],
        reduction="sum", beta=float(data[f"{run}.beta"]), gamma=float(data[f"{run}.gamma"]), **options,
    )  # fmt: skip
    model = peft.get_peft_model(plain, config)
    layer = layer_of(model)
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.from_numpy(data[f"{run}.{matrix}.A"]))
        layer.lora_B["default"].weight.copy_(torch.from_numpy(data[f"{run}.{matrix}.B"]))
        layer.lora_diag["default"].copy_(torch.from_numpy(data[f"{run}.{matrix}.diag"]))
    return model, layer, value


def near(ours, data, key, tolerance):
    theirs = torch.from_numpy(np.asarray(data[key])).double()
    error = float((ours.detach().double() - theirs).abs().max())
    assert error <= tolerance * max(float(theirs.abs().max()), 1e-300), (key, error)


@pytest.mark.parametrize("mode", ["factored", "destructive"])
@pytest.mark.parametrize("matrix", ["tall", "wide", "square"])
@pytest.mark.parametrize("run", ["peft_f32_r4", "peft_f64_r4", "peft_f64_r4_rslora", "peft_f64_r1", "peft_f64_r9"])
def test_values_of_peft(parity, run, matrix, mode):
    data = parity("kasa_peft_0_21_2.npz")
    model, layer, value = parity_layer(data, run, matrix, base_mode=mode)
    key, x = f"{run}.{matrix}", value["x"].requires_grad_()
    assert layer.scaling["default"] == pytest.approx(float(data[f"{key}.scaling"]))
    y = model(x)
    near(y, data, f"{key}.y", 2e-6)
    near(model(x[:, 0]), data, f"{key}.y_2d", 2e-6)
    (y * value["grad_y"]).sum().backward()
    grads = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_diag["default"]
    near(x.grad, data, f"{key}.gtask_x", 2e-6)
    exact = 1e-12 if "f64" in run else 2e-6
    for name, p in zip(("A", "B", "diag"), grads, strict=True):
        near(p.grad, data, f"{key}.gtask_{name}", exact)
        p.grad = None
    penalty = KasaPenalty(model)
    for term, name in zip(penalty.terms(), ("L2", "L3"), strict=True):
        near(term, data, f"{key}.{name}", 5e-7)
    penalty.loss().backward()
    for name, p in zip(("A", "B", "diag"), grads, strict=True):
        near(p.grad, data, f"{key}.greg_{name}", 5e-7)
    model.merge_adapter()
    near(layer.base_layer.weight, data, f"{key}.W_merged", 2e-6)
    near(model(x), data, f"{key}.y_merged", 2e-6)
    model.unmerge_adapter()
    if mode == "destructive":
        near(layer.base_layer.weight, data, f"{key}.W_trunc", 2e-6)
        near(layer.base_layer.weight, data, f"{key}.W_unmerged", 2e-6)


@pytest.mark.parametrize("matrix", ["tall", "wide", "square"])
@pytest.mark.parametrize("run", ["oracle_r4", "oracle_r4_rslora", "oracle_r1", "oracle_r9"])
def test_values_of_the_oracle(parity, run, matrix):
    data = parity("kasa_oracle_float64.npz")
    model, layer, value = parity_layer(data, run, matrix)
    key, rank = f"{run}.{matrix}", int(data[f"{run}.r"])
    u, s, v = minor_subspace(value["W"], rank)
    near((u * s) @ v.t(), data, f"{key}.D_dropped", 1e-11)
    layer.take_away("default", v.t(), u * s)
    x = value["x"].requires_grad_()
    y = model(x)
    near(y, data, f"{key}.y", 1e-11)
    (y * value["grad_y"]).sum().backward()
    grads = {
        "A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight, "diag": layer.lora_diag["default"]
    }  # fmt: skip
    near(x.grad, data, f"{key}.gtask_x", 1e-11)
    for name, p in grads.items():
        near(p.grad, data, f"{key}.gtask_{name}", 1e-11)
    near(value["W"] + layer.dense_update(), data, f"{key}.W_merged", 1e-11)
    for form in ("paper", "reference"):
        values, off = layer_penalties(grads["diag"], grads["A"], grads["B"], form=form)
        near(values, data, f"{key}.L2", 1e-11)
        near(off, data, f"{key}.L3_{form}", 1e-11)
        for name, gradient in zip("AB", torch.autograd.grad(off, (grads["A"], grads["B"])), strict=True):
            near(gradient, data, f"{key}.gL3_{form}_{name}", 1e-11)


# ---------------------------------------------------------------------------- PEFT's own adapters


def peft_kasa(tmp_path):
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM", kasa_config=peft.KasaConfig(1e-2, 1e-3)
    )
    theirs = perturbed(peft.get_peft_model(tiny_model("llama").eval(), config))
    theirs.save_pretrained(tmp_path)
    return theirs


@pytest.mark.parametrize("mode", ["factored", "destructive"])
def test_reads_what_peft_wrote(tmp_path, mode):
    theirs = peft_kasa(tmp_path)
    ours = load_peft_kasa(tiny_model("llama").eval(), tmp_path, base_mode=mode)
    assert torch.allclose(logits(ours), logits(theirs), rtol=1e-4, atol=2e-6)
    assert float(KasaPenalty(ours).loss().detach()) == pytest.approx(
        float(theirs.base_model._get_kasa_loss()), rel=1e-5
    )


def test_writes_what_peft_reads(tmp_path):
    ours = perturbed(llama(beta=0.5, gamma=0.25))
    save_peft_kasa(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_model("llama").eval(), tmp_path)
    assert torch.allclose(logits(theirs), logits(ours), rtol=1e-4, atol=2e-6)
    penalty = float(KasaPenalty(ours).loss().detach())
    assert float(theirs.base_model._get_kasa_loss()) == pytest.approx(penalty, rel=1e-5)


def test_interchange_refuses(tmp_path):
    with pytest.raises(FileNotFoundError, match="folder: no such file"):
        load_peft_kasa(tiny_model("llama"), tmp_path)
    with pytest.raises(ValueError, match="as many singular values as the rank"):
        save_peft_kasa(llama(truncate_rank=2), tmp_path / "a")
    peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no kasa_config, it is a LORA adapter"):
        load_peft_kasa(tiny_model("llama"), tmp_path)


# ---------------------------------------------------------------------------- layers and edges


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_is_of_the_update_alone(dropout, dtype):
    model, before = net(dtype=dtype, lora_dropout=dropout)
    layer = layer_of(perturbed(model))
    x = torch.randn(64, 10).to(dtype)
    torch.manual_seed(3)
    y = model.train()(x)
    torch.manual_seed(3)
    dropped = layer.lora_dropout["default"](x.float())
    a, b = (each.detach() for each in layer.trained("default"))
    minus = layer.minus("default")
    expected = (
        x.float() @ before.float().t() + layer.base_layer.bias.float() + dropped @ a.t() @ b.t()
        - x.float() @ minus[0].t() @ minus[1].t()
    )  # fmt: skip
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (y.float() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("kind", [None, Linear4bit.from_linear])
@pytest.mark.parametrize(
    ("method", "dropout"),
    [(deftcore.KasaFactoredConfig, 0.0), (deftcore.KasaFactoredConfig, 0.5), (deftcore.BaLoraConfig, 0.0)],
)
def test_a_layer_is_one_op_without_gradients_of_what_is_frozen(method, dropout, kind):
    """Dropout included, on rows that are not contiguous and on none."""
    from torch.utils.flop_counter import FlopCounterMode

    plain, rank, rows, columns = Net(32, 64, torch.float32), 3, 32, 64
    plain.layer = plain.layer if kind is None else kind(plain.layer)
    config = method(r=rank, lora_alpha=2, target_modules=["layer"], lora_dropout=dropout)
    layer = next(m for m in perturbed(peft.get_peft_model(plain, config)).modules() if hasattr(m, "lora_minus_A"))
    calls = []
    run = lora_layer.lora_linear
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora_layer, "lora_linear", lambda *a, **k: calls.append(1) or run(*a, **k))
        y = layer.train()(torch.randn(columns, 5).t().requires_grad_())
        assert layer(torch.randn(0, columns)).shape == (0, rows)
    assert calls == [1, 1]
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    paired = method is deftcore.BaLoraConfig  # A - A0 meets B, A0 meets B - B0: B twice, A once
    needed = rows * 2 * rank + rank * columns + rows * rank * (1 + paired)
    if kind is None:
        needed += rows * columns + rank * columns  # of grad x; over 4 bits one op, uncounted
    needed += rank * columns if kind is None or dropout else 0
    assert counter.get_total_flops() == 2 * 5 * needed


def test_masters_are_float32_and_train_over_bfloat16():
    model = llama(torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    model(**tiny_batch("llama")).loss.backward()
    layer = layer_of(model)
    assert float(layer.lora_B["default"].weight.grad.abs().sum()) > 0
    for untouched in (layer.lora_A["default"].weight, layer.lora_diag["default"]):
        assert float(untouched.grad.abs().sum()) == 0  # B is zero at first


@pytest.mark.parametrize("shape", [(24, 10), (10, 24)])
def test_over_four_bits(shape):
    """The base stays packed; what is taken away is of the decoded weight."""
    model, _ = net(*shape, dtype=torch.float32, kind=Linear4bit.from_linear)
    layer = layer_of(model)
    packed, decoded = layer.base_layer.quantized.packed.clone(), layer.base_layer.quantized.dequantize()
    x = torch.randn(6, shape[1])
    expected = x @ truncated(decoded, 3)[0].float().t() + layer.base_layer.bias
    assert torch.allclose(model(x), expected, rtol=1e-5, atol=1e-5)
    perturbed(model)(x).sum().backward()
    assert float(layer.lora_diag["default"].grad.abs().sum()) > 0
    assert not layer.waits()
    with pytest.warns(UserWarning, match="merged into 4 bits"):
        model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.quantized.packed, packed)


def test_merges_over_four_bits_into_sixteen():
    model = perturbed(llama(model=deftcore.quantize(tiny_model("llama").eval())))
    y = logits(model)
    merged = deftcore.merge(model, to="16bit")
    assert torch.allclose(logits(merged), y, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, Linear4bit) for module in merged.modules())


def test_conv1d():
    """GPT-2 stores [in, out]."""
    model = tiny_model("gpt2").eval()
    before = model.transformer.h[0].attn.c_attn.weight.detach().clone()
    options = {"r": 3, "target_modules": ["c_attn", "c_proj"], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(model, deftcore.KasaFactoredConfig(**options))
    layer = layer_of(model)
    kept = before.t() + layer.dense_update()
    assert torch.allclose(kept, truncated(before.t(), 3)[0].float(), atol=1e-6)
    y = logits(perturbed(model))
    model.merge_adapter()
    assert torch.allclose(logits(model), y, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, before)


@pytest.mark.parametrize("rule", ["min", "in_features"])
@pytest.mark.parametrize(("shape", "kept_whole"), [((10, 24), True), ((24, 10), False), ((10, 11), False)])
def test_truncate_rule(shape, kept_whole, rule):
    """The reference code leaves wide weights whole, or nearly."""
    model, before = net(*shape, truncate_rule=rule)
    gone = layer_of(model).dense_update().abs().max()
    cut = 3 if rule == "min" else max(0, 3 - (shape[1] - min(shape)))
    assert (gone == 0) == (cut == 0) == (rule == "in_features" and kept_whole)
    assert torch.allclose(before + layer_of(model).dense_update(), truncated(before, cut)[0], atol=1e-6)


def test_rank_deficient_weight_stays():
    torch.manual_seed(0)
    plain = Net(12, 10)
    plain.layer.weight.data = torch.randn(12, 4).double() @ torch.randn(4, 10).double()
    before = plain.layer.weight.detach().clone()
    model = peft.get_peft_model(plain, deftcore.KasaFactoredConfig(r=3, target_modules=["layer"]))
    assert torch.allclose(before + layer_of(model).dense_update(), before, atol=1e-12)


def test_mixed_batches_apply_sigma():
    """Each row by its own adapter; `__base__` is the base, exactly."""
    model = llama(adapter="one")
    other = deftcore.KasaFactoredConfig(r=2, lora_alpha=2, target_modules=TARGETS, task_type="CAUSAL_LM")
    model.add_adapter("two", other)
    for name in ("one", "two"):
        model.set_adapter(name)
        perturbed(model, seed=len(name) + ord(name[0]))
    ids = tiny_batch("llama")["input_ids"][:1].repeat(3, 1)
    model.eval()
    with torch.no_grad():
        rows = model(input_ids=ids, adapter_names=["one", "two", "__base__"]).logits
        for i, name in enumerate(("one", "two")):
            model.set_adapter(name)
            assert torch.allclose(rows[i], model(input_ids=ids[:1]).logits[0], rtol=1e-4, atol=1e-5)
        with model.disable_adapter():
            assert torch.allclose(rows[2], model(input_ids=ids[:1]).logits[0], atol=1e-6)
    layer = layer_of(model)
    with torch.no_grad():
        layer.lora_diag["one"].zero_()
        assert not torch.equal(model(input_ids=ids, adapter_names=["one", "two", "__base__"]).logits[0], rows[0])


def test_several_active_adapters_truncate_once():
    model, before = net()
    model.add_adapter("wider", deftcore.KasaFactoredConfig(r=5, target_modules=["layer"]))
    model.base_model.set_adapter(["default", "wider"])
    layer = layer_of(model)
    x = torch.randn(4, 10, dtype=torch.float64)
    expected = x @ truncated(before, 5)[0].t() + layer.base_layer.bias
    assert torch.allclose(model(x), expected, rtol=1e-5, atol=1e-6)
    y = perturbed(model)(x)
    model.merge_adapter()
    assert torch.allclose(model(x), y, rtol=1e-6, atol=1e-8)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, before)


@pytest.mark.parametrize(("second", "cut"), [(3, 3), (2, 3), (5, 5)])
def test_a_second_destructive_adapter(second, cut):
    """The same rank, or a smaller one, changes nothing; a larger one takes more."""
    model, before = net(base_mode="destructive")
    once = layer_of(model).base_layer.weight.detach().clone()
    model.add_adapter(
        "second", deftcore.KasaFactoredConfig(r=second, target_modules=["layer"], base_mode="destructive")
    )
    now = layer_of(model).base_layer.weight.detach()
    assert torch.equal(now, once) == (cut == 3)
    assert torch.allclose(now, truncated(before, cut)[0], atol=1e-6)


def test_modes_do_not_mix():
    model, _ = net()
    with pytest.raises(ValueError, match="base_mode: only factored adapters stand beside others"):
        model.add_adapter("second", deftcore.KasaFactoredConfig(target_modules=["layer"], base_mode="destructive"))


@pytest.mark.parametrize("shape", SHAPES)
def test_too_high_a_rank_is_an_error(shape):
    """And leaves the model alone."""
    plain = Net(*shape)
    with pytest.raises(ValueError, match=f"r: must be below {min(shape)}"):
        peft.get_peft_model(plain, deftcore.KasaFactoredConfig(r=min(shape), target_modules=["layer"]))
    assert type(plain.layer) is nn.Linear
    with pytest.raises(ValueError, match="truncate_rank: must be below"):
        peft.get_peft_model(plain, deftcore.KasaFactoredConfig(r=2, truncate_rank=99, target_modules=["layer"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r: must be an integer of at least 1"), ({"beta": -1}, "beta"), ({"gamma": math.nan}, "gamma"),
        ({"truncate_rank": -1}, "truncate_rank"), ({"reduction": "max"}, "reduction"),
        ({"base_mode": "x"}, "base_mode"),
        ({"ortho_form": "x"}, "ortho_form"), ({"truncate_rule": "x"}, "truncate_rule"),
        ({"use_dora": True}, "use_dora: is not for KasaFactoredConfig"), ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"kasa_config": peft.KasaConfig()}, "kasa_config: is not for"),
    ],
)  # fmt: skip
def test_config_refuses(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        deftcore.KasaFactoredConfig(**options)


def test_other_layers_are_refused():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, 4)

    with pytest.raises(ValueError, match=r"target_modules: must be torch.nn.Linear.* got Embedding"):
        peft.get_peft_model(Other(), deftcore.KasaFactoredConfig(r=2, target_modules=["table"]))


def test_a_weight_that_is_not_finite_is_refused():
    plain = Net(8, 8)
    plain.layer.weight.data[0, 0] = math.inf
    with pytest.raises(ValueError, match="finite"):
        peft.get_peft_model(plain, deftcore.KasaFactoredConfig(r=2, target_modules=["layer"]))


@pytest.mark.parametrize("mode", ["factored", "destructive"])
@pytest.mark.parametrize("first", ["forward", "merge", "gates"])
def test_weights_that_come_later(first, mode):
    """Wrapped on the meta device; the first forward, or merge, truncates, and so do gates that fold into the layer."""
    torch.manual_seed(0)
    source = Net(24, 10)
    with torch.device("meta"):
        plain = Net(24, 10)
    config = deftcore.KasaFactoredConfig(r=3, target_modules=["layer"], base_mode=mode)
    model = peft.get_peft_model(plain, config, autocast_adapter_dtype=False)
    model.to_empty(device="cpu")
    layer = layer_of(model)
    with torch.no_grad():
        layer.base_layer.weight.copy_(source.layer.weight)
        layer.base_layer.bias.copy_(source.layer.bias)
        for p in (layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_diag["default"]):
            p.zero_()
    x = torch.randn(4, 10, dtype=torch.float64)
    if first == "merge":
        model.merge_adapter()
    if first == "gates":
        layer.scale_output_(0.25)
    expected = x @ truncated(source.layer.weight.detach(), 3)[0].t() + source.layer.bias
    expected = 0.25 * expected if first == "gates" else expected
    assert torch.allclose(model(x), expected, rtol=1e-5, atol=1e-6)
    model.state_dict()
    assert not layer.pending


def test_the_step_of_sigma_has_no_weight_decay(tmp_path):
    from deftcore.training.config import TrainingConfig
    from deftcore.training.loop import train

    examples = [{"input_ids": list(range(2, 9))} for _ in range(4)]
    model = llama()
    before = layer_of(model).lora_diag["default"].detach().clone()
    config = TrainingConfig(max_steps=2, batch_size=2, learning_rate=1e-3, weight_decay=300.0, warmup_ratio=0.0)
    result = train(model, examples, config, tmp_path, objective=KasaPenalty(model, beta=1e-3, gamma=0.0))
    after = layer_of(model).lora_diag["default"].detach()
    assert float((after - before).abs().max()) <= 0.0021  # AdamW's own steps; decay alone would halve it
    assert result.measured["kasa_l2"] > 0


def test_the_penalty_is_shared_over_micro_batches():
    model = perturbed(llama())
    penalty = KasaPenalty(model)
    penalty.begin([{}, {}, {}], 0, 1)
    assert torch.allclose(3 * penalty.share({}, None), penalty.loss())
    with pytest.raises(ValueError, match="no KaSA layer"):
        KasaPenalty(tiny_model("llama"))


def test_other_consumers_do_not_take_its_factors_for_plain_ones():
    """Merging by deftcore and PEFT alike; the sparse form refuses what it does not know."""
    model = perturbed(llama(target_modules=["down_proj", "up_proj"]))
    with pytest.raises(ValueError, match="only one plain LoRA adapter can stay unmerged"):
        deftcore.sparsify(model, merge=False)
    with pytest.raises(ValueError, match="add_weighted_adapter"):
        model.add_weighted_adapter(["default"], [1.0], "x")
    assert deftcore.patch(model) is model


def test_transformers_sequence_classifier_trains():
    options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = t.BertForSequenceClassification(t.BertConfig(vocab_size=64, num_labels=3, **options))
    model = peft.get_peft_model(model, deftcore.KasaFactoredConfig(r=2, task_type="SEQ_CLS"))
    loss = model(input_ids=torch.ones(2, 5, dtype=torch.long), labels=torch.tensor([0, 2])).loss
    (loss + KasaPenalty(model).loss()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# ---------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("method", ["kasa", "qkasa"])
def test_a_recipe_trains_resumes_and_is_exported(tmp_path, stopping, capsys, method):
    log = check_recipe(tmp_path, stopping, capsys, "kasa", method, "training.max_steps=4")
    assert log[-1]["kasa_loss"] > 0


def test_a_patched_mamba_mixer_leaves_its_projections_to_their_layers():
    """The mixers' fused block knows plain LoRA alone."""
    model = tiny_model("mamba").eval()
    config = deftcore.KasaFactoredConfig(r=2, target_modules=["in_proj", "x_proj"], task_type="CAUSAL_LM")
    model = perturbed(peft.get_peft_model(model, config))
    y = logits(model)
    deftcore.patch(model, verify=False)
    assert torch.allclose(logits(model), y, rtol=1e-4, atol=1e-5)
