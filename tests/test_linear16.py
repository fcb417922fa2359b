"""Plain 16-bit linear layers under `patch`."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import deftcore
from deftcore.nn.linear16 import Linear16
from deftcore.ops import products

BF16 = torch.bfloat16


@pytest.fixture
def clock(monkeypatch):
    """Sets what the two products take."""

    def set_to(theirs, ours=1.0):
        monkeypatch.setattr(products, "_seconds", lambda *_: (theirs, ours))
        products._is_faster.cache_clear()

    monkeypatch.setattr(products, "_LEAST_WORK_16", 0)
    set_to(2.0)
    yield set_to
    products._is_faster.cache_clear()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DEFTCORE_CACHE", str(tmp_path))


def net(dtype=BF16):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 24, bias=False)).to(dtype)


def close(found, exact, scale=0.02):
    assert ((found.double() - exact).abs() <= scale * (exact.abs() + exact.abs().mean())).all()


def run(model, x):
    x = x.detach().requires_grad_()
    y = model(x)
    y.square().mean().backward()
    grads = [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
    model.zero_grad()
    return [y.detach(), *grads]


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("shape", [(40,), (6, 40), (2, 9, 40), (0, 40)])
def test_values_and_gradients(dtype, trains, shape, clock):
    model = net(dtype).requires_grad_(trains)
    names = list(model.state_dict())
    plain = copy.deepcopy(model)
    assert deftcore.patch(model, verify=False) is model
    assert [type(m) for m in model] == [Linear16, nn.ReLU, Linear16]
    assert list(model.state_dict()) == names
    x = torch.randn(shape, dtype=dtype)
    if x.numel():
        for ours, exact in zip(run(model, x), run(plain.double(), x.double()), strict=True):
            assert ours.dtype == dtype
            close(ours, exact)
    assert model(x).shape == (*shape[:-1], 24)
    deftcore.unpatch(model)
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear]


def test_patched_after_a_proof(clock):
    model = deftcore.patch(net())
    assert type(model[0]) is Linear16


def test_where_pytorch_is_faster_nothing_is_replaced(clock, caplog):
    clock(1.0)
    model = net()
    assert deftcore.patch(model) is model
    assert type(model[0]) is nn.Linear
    with pytest.raises(ValueError, match="call get_peft_model first"):
        deftcore.patch(net(torch.float32))


def test_a_patched_layer_has_pytorchs_bits_where_that_is_faster(clock):
    model, plain = deftcore.patch(net(), verify=False), net()
    clock(1.0)
    x = torch.randn(2, 9, 40, dtype=BF16)
    for ours, theirs in zip(run(model, x), run(plain, x), strict=True):
        assert torch.equal(ours, theirs)


def test_float32_and_other_calls_are_pytorchs(clock):
    model = deftcore.patch(net(), verify=False)
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 41, dtype=BF16))
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 40))
    x = torch.randn(5, 3, 40, dtype=BF16)
    assert torch.equal(torch.vmap(model)(x), torch.vmap(deftcore.unpatch(copy.deepcopy(model)))(x))
    assert torch.equal(model.float()(x.float()), net(BF16).float()(x.float()))


def test_hooks_and_subclasses_are_left_alone_and_named(clock, caplog):
    class Own(nn.Linear):
        pass

    model = nn.ModuleDict({"own": Own(8, 8), "hooked": nn.Linear(8, 8), "plain": nn.Linear(8, 8)}).to(BF16)
    model["hooked"].register_forward_hook(lambda *_: None)
    deftcore.patch(model, verify=False)
    assert [type(m) for m in model.values()] == [Own, nn.Linear, Linear16]
    assert "own (a subclass of Linear, Own)" in caplog.text
    assert "hooked (hooks on a linear layer)" in caplog.text


def test_lora_layers_keep_their_parts(clock):
    model = get_peft_model(net(), LoraConfig(r=4, target_modules=["0"]), autocast_adapter_dtype=False)
    deftcore.patch(model, verify=False)
    kinds = {name: type(m) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert [name for name, kind in kinds.items() if kind is Linear16] == ["base_model.model.2"]
    over = get_peft_model(deftcore.patch(net(), verify=False), LoraConfig(r=4, target_modules=["0", "2"]))
    deftcore.patch(over, verify=False)
    x = torch.randn(6, 40, dtype=BF16)
    close(over(x), net().double()(x.double()), 0.03)
    assert all(not p.requires_grad for name, p in over.named_parameters() if "lora_" not in name)


def test_compiled(clock):
    model = deftcore.patch(net(), verify=False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 9, 40, dtype=BF16)
    for ours, eager in zip(run(compiled, x), run(model, x), strict=True):
        assert torch.equal(ours, eager)


def test_autocast(clock):
    model, plain = deftcore.patch(net(), verify=False).float(), net().float()
    for kind in (model[0], model[2]):
        assert type(kind) is Linear16
    x = torch.randn(6, 40)
    with torch.autocast("cpu", BF16):
        found, theirs = run(model, x), run(plain, x)
    for ours, other, exact in zip(found, theirs, run(plain.double(), x.double()), strict=True):
        assert ours.dtype == other.dtype
        close(ours, exact, 0.05)


def test_checkpointing_pickling_and_copies(clock):
    model = deftcore.patch(net(), verify=False)
    x = torch.randn(6, 40, dtype=BF16)
    wanted = run(model, x)
    for each in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert all(torch.equal(a, b) for a, b in zip(run(each, x), wanted, strict=True))
    found = run(lambda_module(model), x)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def lambda_module(model):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    return Checkpointed()


def test_rooms_take_a_patched_layer_for_a_linear_one(clock):
    packed = deftcore.quantize(deftcore.patch(net(), verify=False))
    assert [type(m).__name__ for m in packed] == ["Linear4bit", "ReLU", "Linear4bit"]
