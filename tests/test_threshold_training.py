"""Training under thresholds, and with ReLU in the place of SiLU: gradients, recipes, files, export."""

import copy
import json

import peft
import pytest
import torch
import transformers
from conftest import perturbed, recompute, tiny_batch, tiny_model
from test_package import save_base
from test_thresholds import texts

import deftcore
from deftcore.methods.deft.trained_thresholds import surrogate_sum
from deftcore.models.activations import Swapped
from deftcore.models.thresholds import Thresholded
from deftcore.nn.observed import aside
from deftcore.training.teacher import original_logits


def adapted(activation="silu", targets=("q_proj", "up_proj", "down_proj")):
    model = tiny_model("llama", activation)
    config = peft.LoraConfig(r=4, target_modules=list(targets), task_type="CAUSAL_LM")
    return perturbed_model(deftcore.patch(peft.get_peft_model(model, config)))


def perturbed_model(model):
    perturbed(model)
    return model.train()


def labelled(batch):
    return dict(batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100))


# ---------------------------------------------------------------------------- under thresholds


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("criterion", ["product", "gate"])
def test_the_forward_is_that_of_the_thresholds(criterion, scaled):
    model = adapted()
    loss = deftcore.ThresholdLoss(model, density=0.4, criterion=criterion, scaled=scaled, alpha=0.0)
    batch = labelled(texts()[0])
    for _ in range(40):  # levels come to rest
        model(**batch)
    loss.reset()
    model.eval()
    with torch.no_grad():
        found = model(**batch).logits
    report, thresholds = loss.report(), loss.thresholds()
    assert report["density"] == pytest.approx(0.4, abs=0.02)
    assert report["tokens"] == int(batch["attention_mask"].sum())
    loss.detach()
    with torch.no_grad(), Thresholded(model, thresholds) as measured:
        torch.testing.assert_close(model(**batch).logits, found, rtol=1e-5, atol=1e-6)
    for name, share in measured.densities().items():
        assert report["blocks"][name] == pytest.approx(share, abs=1e-3)
    with torch.no_grad():
        assert not torch.equal(model(**batch).logits, found), "after detach nothing is cut"


@pytest.mark.parametrize("alpha", [0.0, 3.0])
@pytest.mark.parametrize("criterion", ["product", "gate"])
def test_the_gradient_is_that_of_the_definition(criterion, alpha):
    """Against plain PyTorch in float64, the levels standing still."""
    model = adapted().double()
    loss = deftcore.ThresholdLoss(model, density=0.5, criterion=criterion, alpha=alpha, backward="mask")
    batch = labelled(texts()[0])
    model(**batch)
    model.eval()  # levels stay
    levels = loss.levels.clone()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        model(**batch)
    model.train()
    loss._follow = lambda *_: None
    (model(**batch).loss + loss.loss()).backward()
    ours = {name: p.grad.clone() for name, p in trained.items()}
    assert torch.equal(loss.levels, levels)
    loss.detach()
    model.zero_grad()
    seen = []
    keep = batch["attention_mask"] != 0

    def cut(index, values):
        level = levels[index].double()
        square = level.square().clamp(min=1e-7)
        seen.append((values.square() / (values.square() + square))[keep].mean())
        return torch.where(values.abs() <= level, 0.0, values)

    layers = model.get_base_model().model.layers
    for index, layer in enumerate(layers):
        if criterion == "gate":
            layer.mlp.act_fn.register_forward_hook(lambda m, args, out, index=index: cut(index, out))
        else:
            layer.mlp.down_proj.register_forward_pre_hook(lambda m, args, index=index: (cut(index, args[0]),))
    output = model(**batch).loss
    (output + alpha * torch.stack(seen).mean()).backward()
    for name, p in trained.items():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("each", [False, True])
def test_the_slope_is_where_the_level_is(each):
    torch.manual_seed(0)
    values = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    level = torch.rand(5, dtype=torch.float64) + 0.5 if each else torch.tensor(0.7, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert torch.autograd.gradcheck(lambda v: surrogate_sum(v, level, mask), values)
    total = surrogate_sum(level.expand(5).view(1, 1, 5), level, None)
    assert float(total) == pytest.approx(2.5)
    hidden = values.detach().masked_fill((mask == 0).unsqueeze(-1), torch.nan)
    assert float(surrogate_sum(hidden, level, mask)) == pytest.approx(
        float(surrogate_sum(values, level, mask).detach())
    )


@pytest.mark.parametrize("level", [0.0, 0.5])
def test_surrogate_has_a_slope_at_zeros_and_at_huge_values(level):
    values = torch.tensor([[0.0, 1e-30, 1.0, -2.0, 1e25, -3e38]], requires_grad=True)
    square = max(level**2, 1e-7)
    total = surrogate_sum(values, torch.tensor(level), None)
    total.backward()
    v = values.detach().double()
    assert float(total.detach()) == pytest.approx(float((v**2 / (v**2 + square)).sum()), rel=1e-6)
    torch.testing.assert_close(values.grad.double(), 2 * square * v / (v**2 + square) ** 2, rtol=1e-5, atol=1e-18)


def test_a_cut_value_can_come_back():
    """The straight gradient reaches what is cut, the masked one does not."""
    grads = {}
    for backward in ("straight", "mask"):
        model = adapted()
        deftcore.ThresholdLoss(model, density=0.1, alpha=0.0, backward=backward)
        model(**labelled(texts()[0])).loss.backward()
        grads[backward] = model.get_base_model().model.layers[0].mlp.up_proj.lora_B["default"].weight.grad
    assert int((grads["straight"] != 0).any(1).sum()) >= int((grads["mask"] != 0).any(1).sum())
    assert not torch.allclose(grads["straight"], grads["mask"])


def test_checkpointing_cuts_the_same():
    batch, grads = labelled(texts()[0]), []
    for checkpoint in (False, True):
        model = adapted()
        loss = deftcore.ThresholdLoss(model, density=0.3)
        if checkpoint:
            recompute(model.get_base_model())
        (model(**batch).loss + loss.loss()).backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_thresholds_are_kept_and_read(tmp_path):
    model = adapted()
    loss = deftcore.ThresholdLoss(model, density=0.3, scaled=True)
    loss.save(tmp_path)
    assert not list(tmp_path.iterdir()), "there are none before the first forward"
    with pytest.raises(RuntimeError, match="no forward of the model has run"):
        loss.thresholds()
    with pytest.raises(RuntimeError, match=r"has shown the values of model\.layers\.0\.mlp, model\.layers\.1\.mlp"):
        loss.loss()
    model(**labelled(texts()[0]))
    loss.save(tmp_path)
    again = deftcore.ThresholdLoss(adapted(), density=0.3, scaled=True)
    again.load(tmp_path)
    torch.testing.assert_close(again.levels, loss.levels, rtol=1e-5, atol=0)
    with pytest.raises(FileNotFoundError, match=r"thresholds: .* has none"):
        again.load(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="those of the product of another model or run"):
        deftcore.ThresholdLoss(adapted(), criterion="gate").load(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, r"density: must be above 0, at most 1, got 0\.0"),
        ({"criterion": "up"}, "criterion: must be one of 'product', 'gate', got 'up'"),
        ({"backward": "soft"}, "backward: must be one of 'straight', 'mask'"),
        ({"eps": 1e-3}, "eps: not with thresholds"),
    ],
)
def test_arguments_of_thresholds(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        deftcore.ThresholdLoss(adapted(), **options)


# ---------------------------------------------------------------------------- another activation


def test_swapped_for_relu():
    model = adapted()
    with torch.no_grad():
        before = original_logits(model, texts()[0])
        with model.disable_adapter():
            model.eval()
            torch.testing.assert_close(model(**texts()[0]).logits, before)
            model.train()
    swap = deftcore.SwapLoss(model, distill=2.0)
    assert model.config.hidden_act == "relu"
    batch = labelled(texts()[0])
    torch.testing.assert_close(original_logits(model, batch), before)  # the teacher has SiLU, and no adapter
    output = model(**batch)
    loss = swap.loss(batch, output.logits)
    keep = (batch["labels"][:, 1:] != -100).unsqueeze(-1)
    p, q = (x[:, :-1].double().log_softmax(-1) for x in (before, output.logits))
    expected = 2 * torch.where(keep, p.exp() * (p - q), 0.0).sum() / keep.sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    density = deftcore.DensityLoss(model, alpha=0.0)
    model(**batch)
    assert 0.2 < density.report()["density"] < 0.8
    assert density.report()["tau"] == 0
    density.detach()
    sparse = deftcore.sparsify(copy.deepcopy(model))
    with torch.no_grad():
        torch.testing.assert_close(sparse(**batch).logits, model.eval()(**batch).logits, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_swapped():
    with pytest.raises(ValueError, match="distill: the original model is the trained one without its adapter"):
        deftcore.SwapLoss(tiny_model("llama", "silu"))
    with pytest.raises(ValueError, match="activation: must be one of 'relu', got 'gelu'"):
        deftcore.SwapLoss(adapted(), activation="gelu")
    with pytest.raises(ValueError, match="names no activation to swap"):
        deftcore.SwapLoss(tiny_model("t5", "relu"), distill=0.0)
    plain = Swapped(torch.nn.SiLU())
    z = torch.randn(5)
    assert torch.equal(plain(z), z.relu())
    with aside():
        assert torch.equal(plain(z), torch.nn.functional.silu(z))
    batch = tiny_batch("llama")
    model = adapted()
    swap = deftcore.SwapLoss(model)
    del batch["labels"]
    with pytest.raises(ValueError, match="labels say which tokens count"):
        swap.loss(batch, model(**batch).logits)


# ---------------------------------------------------------------------------- recipes


def run(base, data, out, *words):
    from deftcore.cli.main import main

    return main(["train", "deft-thresholds", f"model={base}", f"data.train={data}",
                 f"data.validation={data}", f"output={out}", "adapter.r=2", "adapter.target_modules=[up_proj,q_proj]",
                 "training.max_steps=4", "training.batch_size=4", "data.max_length=24", "device=cpu",
                 *words])  # fmt: skip


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    save_base(folder, tiny_model("llama", "silu"))
    return folder, folder / "data.txt"


@pytest.mark.parametrize(
    "words",
    [
        ["deft.density=0.4", "deft.alpha=0.5"],
        ["swap=true", "deft.density=0", "deft.alpha=0.1", "deft.scaled=false"],
        ["swap={enabled: true, distill: 0.5}", "deft.criterion=gate", "deft.scaled=false"],
    ],
    ids=["thresholds", "swap", "both"],
)
def test_a_recipe_to_its_sparse_model(base, tmp_path, words, capsys):
    from deftcore.cli.main import main

    folder, data = base
    assert run(folder, data, tmp_path / "run", *words) == 0, capsys.readouterr().err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    final, ids = tmp_path / "run" / "final", torch.tensor([[1, 2, 3, 4]])
    wanted = 0.4 if words[0] == "deft.density=0.4" else 0.3
    if "swap=true" not in words:
        assert result["density"] == pytest.approx(wanted, abs=0.1)
        assert (final / "density_thresholds.safetensors").is_file()
    assert main(["export", str(folder), str(tmp_path / "out"), "--adapter", str(final)]) == 0
    sparse = deftcore.load_sparse(tmp_path / "out")
    block = next(m for m in sparse.modules() if type(m).__name__ == "SparseMLP")
    relu = any(word.startswith("swap") for word in words)
    assert block.activation == ("relu" if relu else "silu")
    assert (block.taus is not None) == ("deft.scaled=false" not in words)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").hidden_act == ("relu" if relu else "silu")
    loaded = deftcore.merge(_adapter(folder, final))
    thresholds = deftcore.Thresholds.load(final)
    with torch.no_grad():
        if thresholds is None:
            expected = loaded(ids).logits
        else:
            with Thresholded(loaded, thresholds):
                expected = loaded(ids).logits
        torch.testing.assert_close(sparse(ids).logits, expected, rtol=1e-3, atol=1e-4)
    for model, *more in ((folder, "--adapter", str(final)), (tmp_path / "out",)):  # as the run measured it at its end
        capsys.readouterr()
        words = [str(model), str(data), *more, "--max-length", "24", "--device", "cpu", "--json"]
        assert main(["density", *words]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["loss"] == pytest.approx(result["eval_loss"], rel=1e-4)
        assert found["density"] == pytest.approx(result["density"], abs=2e-3)
        assert found["density"] == pytest.approx(sum(found["blocks"].values()) / len(found["blocks"]))
        assert found.get("criterion") == (None if thresholds is None else thresholds.criterion)


def _adapter(folder, final):
    from deftcore.training.adapters import load_adapter

    return load_adapter(deftcore.load_model(folder), final).eval()


def test_recipes_that_are_refused(base, tmp_path, capsys):
    folder, data = base
    for words, message in (
        (["deft.enabled=true", "deft.density=0.3", "deft.eps=0.1"], "deft.eps: not with deft.density"),
        (["deft.density=1.5"], "deft.density: must be at most 1, got 1.5"),
        (["deft.criterion=up"], "deft.criterion: must be one of product, gate, got 'up'"),
        (["swap.activation=gelu"], "swap.activation: must be one of relu, got 'gelu'"),
        (["swap=true", "method=full", "adapter={}"], "swap.distill: the original model is"),
    ):
        assert run(folder, data, tmp_path / "no", *words) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "swap").mkdir()
    (tmp_path / "swap" / "density_swap.json").write_text("{}")
    from deftcore.models.activations import load_swap

    with pytest.raises(ValueError, match=r"density_swap\.json is damaged"):
        load_swap(tiny_model("llama"), tmp_path / "swap")


# ---------------------------------------------------------------------------- the command


def test_sparsify_chooses_and_writes(base, tmp_path, capsys):
    from deftcore.cli.main import main

    folder, data = base
    words = ["sparsify", str(folder), "--data", str(data), "--density", "0.5", "--max-length", "24", "--device", "cpu"]
    assert main([*words, "-o", str(tmp_path / "out"), "--json", "--scaled"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["blocks"]) == {"model.layers.0.mlp", "model.layers.1.mlp"}
    assert found["density"] == pytest.approx(0.5, abs=0.1)
    assert found["loss_change"] == pytest.approx(found["loss_sparse"] / found["loss"] - 1)
    sparse = deftcore.load_sparse(tmp_path / "out")
    assert all(m.taus is not None for m in sparse.modules() if type(m).__name__ == "SparseMLP")
    assert main([*words, "-o", str(tmp_path / "again"), "--validation", str(data), "--criterion", "gate"]) == 0
    shown = capsys.readouterr().out
    assert "model.layers.1.mlp" in shown
    assert "of the gate" in shown
    assert "sparse (" in shown
    for more, message in (
        (["--density", "0"], "density: must be above 0"),
        (["--validation", "nowhere"], "validation: no such file: nowhere"),
        (["--max-length", "100000"], "one can be held out"),
    ):
        assert main([*words, "-o", str(tmp_path / "no"), *more]) == 2
        assert message in capsys.readouterr().err
    assert main([*words, "-o", str(tmp_path / "out")]) == 2
    assert "output: must be a new folder" in capsys.readouterr().err
    assert main(["sparsify", str(tmp_path / "no"), "--data", str(data), "-o", str(tmp_path / "x")]) == 2
