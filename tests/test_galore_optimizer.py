"""NaturalGaLore as an optimizer: odd parameters and gradients, dtypes, what PyTorch asks of it."""

import copy
import pickle

import pytest
import torch
from conftest import tiny_batch, tiny_model
from second_device import DEVICE, second_device
from test_natural_galore import F64, close, gradients, make, reference_adam, run

from deftcore.methods.natural_galore.optimizer import NaturalGaLore
from deftcore.ops import products
from deftcore.ops.galore_matrix import round_stochastically
from deftcore.ops.natural import gram_of

pytestmark = pytest.mark.filterwarnings("ignore:NaturalGaLore. the state:UserWarning")
VARIANTS = [
    {"natural_history": 4},
    {"natural_history": 4, "projection": "two_sided", "damping_mode": "relative"},
    {"natural_history": 4, "history_every": 2, "fisher_norm": "mean"},
    {"natural_history": 4, "history_dtype": "bfloat16", "on_switch": "keep"},
    {"natural_history": 4, "on_switch": "reset", "refresh": "exact"},
    {"proj_type": "galore"},
]


def mixed(dtype=torch.float32, device="cpu", **options):
    """A module with a matrix of each form, a convolution, vectors and a scalar; and its optimizer."""
    torch.manual_seed(3)
    model = torch.nn.Module()
    model.tall, model.wide, model.square = (
        torch.nn.Parameter(torch.randn(s).to(dtype)) for s in ((9, 5), (5, 9), (6, 6))
    )
    model.conv = torch.nn.Parameter(torch.randn(4, 3, 2, 2).to(dtype))
    model.bias, model.scalar = (
        torch.nn.Parameter(torch.randn(7).to(dtype)),
        torch.nn.Parameter(torch.randn(()).to(dtype)),
    )
    model.free = torch.nn.Parameter(torch.randn(5, 4).to(dtype))
    model.to(device)
    free = [model.free]
    others = [p for p in model.parameters() if p is not model.free]
    group = {"params": others, "rank": 3, "update_proj_gap": 5, **options}
    return model, NaturalGaLore([group, {"params": free}], lr=1e-2, weight_decay=0.1)


def train(model, optimizer, steps, first=0):
    """Steps with gradients that depend on the step and the weights alone."""
    for t in range(first, first + steps):
        generator = torch.Generator().manual_seed(t)
        for p in model.parameters():
            g = torch.randn(p.shape, generator=generator) + p.detach().cpu().float() / 3
            p.grad = g.to(p.dtype).to(p.device)
        optimizer.step()
        optimizer.zero_grad()


def tensors_of(optimizer):
    return [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]


# ---------------------------------------------------------------------------- odd parameters and gradients


def test_what_is_not_projected_is_adamw():
    model, optimizer = mixed()
    names = {id(p): name for name, p in model.named_parameters()}
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, 1)
    for p, state in optimizer.state.items():
        assert ("left" in state or "right" in state) == (names[id(p)] in ("tall", "wide", "square"))
    generator = torch.Generator().manual_seed(0)
    for name, w in start.items():
        g = torch.randn(w.shape, generator=generator) + w / 3
        if name in ("conv", "bias", "scalar", "free"):
            close(getattr(model, name).detach(), reference_adam(w, [g]) * (1 - 1e-3), 1e-6)


def test_convolutions_are_matrices_where_asked():
    """Also where memory is in another order than the shape's."""
    found = []
    for weight in (gradients(1, 4, 3, 2, 2)[0], gradients(1, 4, 3, 2, 2)[0].to(memory_format=torch.channels_last)):
        p, optimizer = make(weight, flatten=True, rank=2)
        found.append(run(p, optimizer, gradients(3, 4, 3, 2, 2, seed=5))[-1])
    assert optimizer.state[p]["left"].shape == (4, 2)
    close(found[1], found[0], 1e-12)
    assert torch.linalg.matrix_rank((found[0] - gradients(1, 4, 3, 2, 2)[0]).view(4, 12), atol=1e-12) == 2


def test_without_a_gradient_the_clock_stands_still():
    weight, *gs = gradients(6, 9, 5)
    alone, with_pauses = make(weight, update_proj_gap=2), make(weight, update_proj_gap=2)
    run(*alone, gs)
    for g in gs:
        with_pauses[0].grad = None
        before = with_pauses[0].detach().clone()
        with_pauses[1].step()
        assert torch.equal(with_pauses[0], before)
        run(*with_pauses, [g])
    assert torch.equal(alone[0], with_pauses[0])


def test_sparse_gradients_are_refused_before_anything_changes():
    model, optimizer = mixed()
    train(model, optimizer, 1)
    before = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.free.grad = torch.ones(5, 4).to_sparse()
    with pytest.raises(TypeError, match=r"grad: must be dense, got torch.sparse_coo of a parameter \(5, 4\)"):
        optimizer.step()
    assert str(optimizer.state_dict()) == str(before[0])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before[1], strict=True))


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_gradient_without_a_subspace(bad):
    """Zero or not finite where a subspace is due: a stand-in at first, then the old one, and another try."""
    weight, *gs = gradients(4, 9, 5)
    p, optimizer = make(weight, update_proj_gap=3, lr=0.0 if bad else 1e-2)
    run(p, optimizer, [torch.full((9, 5), bad, dtype=F64)])
    state = optimizer.state[p]
    assert torch.equal(state["right"], torch.eye(5, 3, dtype=F64))
    assert (state["found"], state["step"]) == (0, 1)
    if bad == 0:
        assert torch.equal(p, weight)
    run(p, optimizer, gs[:2])  # the next step finds one, though none is due
    assert state["found"] == 1
    kept = state["right"].clone()
    assert not torch.equal(kept, torch.eye(5, 3, dtype=F64))
    run(p, optimizer, [torch.full((9, 5), bad, dtype=F64)])
    assert torch.equal(state["right"], kept)
    assert int(state["failures"]) == (0 if bad == 0 else 2)
    assert (state["slot"], state["fill"]) == ((4, 4) if bad == 0 else (0, 0))


@pytest.mark.parametrize("options", [{}, {"damping_mode": "relative"}, {"fisher_norm": "mean"}])
def test_the_step_behind_an_infinite_gradient_is_that_of_an_empty_window(options):
    weight, g, *then = gradients(4, 9, 5)
    p, optimizer = make(weight, update_proj_gap=100, lr=0.0, damping=0.3, **options)
    run(p, optimizer, [g, g, torch.full((9, 5), float("inf"), dtype=F64)])
    state = optimizer.state[p]
    assert (state["slot"], state["fill"]) == (0, 0)
    for count, each in enumerate(then, 1):
        run(p, optimizer, [each])
        assert (state["slot"], state["fill"], int(state["failures"])) == (count, count, 1)
    close(state["gram"], gram_of(state["history"]), 1e-12)
    assert optimizer.diagnostics()[0]["window"] == 2


@pytest.mark.parametrize(("every", "fills"), [(1, [1, 1, 1]), (2, [1, 0, 1])])
def test_a_finite_window_that_does_not_hold_starts_anew(every, fills):
    """The same gradient twice, beside whose square lambda vanishes; kept or not, as its step is."""
    p, optimizer = make(torch.zeros(2, 1, dtype=F64), history_every=every, update_proj_gap=100)
    for fill, failures in zip(fills, ([0, 1, 2] if every == 1 else [0, 1, 1]), strict=True):
        run(p, optimizer, [torch.tensor([[1e10], [0.0]], dtype=F64)])
        state = optimizer.state[p]
        assert (state["slot"], state["fill"], int(state["failures"])) == (fill, fill, failures)
        assert state["exp_avg"].abs().max() <= 1e-10, "N is R / |R|^2 at most"


def test_history_every_keeps_every_other_step():
    """The current gradient is in every solve; the window holds those of steps 0, 2, 4 ..."""
    weight, *gs = gradients(7, 9, 5)
    p, optimizer = make(weight, natural_history=3, history_every=2, update_proj_gap=100)
    run(p, optimizer, gs)
    state = optimizer.state[p]
    right = state["right"]
    assert (state["slot"], state["fill"]) == (0, 3)
    want = [(gs[i] @ right).flatten() for i in (5, 2, 4)]  # step 5's stands where step 6's will, in the oldest's place
    close(state["history"], torch.stack(want), 1e-12)


# ---------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_state_of_16_bit_weights_is_float32(dtype):
    """The step of a 16-bit weight is float32's, rounded once."""
    weight, g = (x.to(dtype) for x in gradients(2, 9, 5))
    p, optimizer = make(weight)
    want = run(*make(weight.float()), [g.float()])[0].to(dtype)
    assert torch.equal(run(p, optimizer, [g])[0], want)
    assert not torch.equal(want, weight)
    run(p, optimizer, gradients(3, 9, 5, dtype=dtype))
    assert {x.dtype for x in tensors_of(optimizer)} == {torch.float32, torch.float64, torch.int64}


def test_stochastic_rounding_is_unbiased():
    """Steps that rounding to the nearest would lose arrive in the mean."""
    start = torch.ones(64, 64, dtype=torch.bfloat16)
    ends = {}
    for rounding in (False, True):
        p = torch.nn.Parameter(start.clone())
        optimizer = NaturalGaLore([{"params": [p]}], lr=1e-4, stochastic_rounding=rounding)
        run(p, optimizer, [torch.ones(64, 64, dtype=torch.bfloat16)] * 20)
        ends[rounding] = p.detach().double()
    assert torch.equal(ends[False], start.double())
    assert abs(float(ends[True].mean()) - (1 - 20e-4)) < 2e-4
    assert float(ends[True].min()) > 1 - 8 * 2**-8, "other places move in other steps"


def test_stochastic_rounding_of_odd_values():
    x = torch.tensor([0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan")])
    y = round_stochastically(x, seed=5)
    assert torch.equal(y[:6], x[:6].bfloat16())
    assert y[6].isnan()
    x = torch.linspace(-3, 3, 1001)
    low, high = (torch.nextafter(x.bfloat16(), torch.tensor(end).bfloat16()) for end in (-9.0, 9.0))
    y = round_stochastically(x, seed=1)
    assert ((y >= low) & (y <= high)).all()
    assert not torch.equal(y, round_stochastically(x, seed=2))


@pytest.mark.parametrize("options", VARIANTS)
def test_on_another_device(options, monkeypatch):
    """All of the state lies where the weights lie; a file from there goes on here."""
    monkeypatch.setattr(products, "_linear", None)  # the stand-in for a device has PyTorch's own products
    options = {**options, "flatten": True, "stochastic_rounding": True}
    want, optimizer = mixed(torch.bfloat16, **options)
    train(want, optimizer, 7)
    with second_device() as operations:
        model, away = mixed(torch.bfloat16, **options, device=DEVICE)
        train(model, away, 4)
        assert {x.device for x in tensors_of(away)} == {DEVICE}
        weights, state = ({k: v.cpu() for k, v in model.state_dict().items()}, copy.deepcopy(away.state_dict()))
    assert operations.away > 100
    here, again = mixed(torch.bfloat16, **options)
    here.load_state_dict(weights)
    again.load_state_dict(state)
    train(here, again, 3, first=4)
    for p, q in zip(want.parameters(), here.parameters(), strict=True):
        assert torch.equal(p, q)


# ---------------------------------------------------------------------------- as an optimizer of PyTorch's


def test_diagnostics():
    weight, *gs = gradients(5, 9, 5)
    for every, kept in ((1, gs), (3, [gs[0], gs[3]])):
        p, optimizer = make(weight, natural_history=8, history_every=every, damping=0.5, update_proj_gap=100)
        run(p, optimizer, [*gs, gs[0]] if every == 3 else gs)
        (found,) = optimizer.diagnostics()
        mean = sum(float((g @ optimizer.state[p]["right"]).norm() ** 2) for g in kept) / len(kept)
        assert (found["parameter"], found["window"], found["failures"]) == (0, len(kept), 0)
        assert found["rho"] == pytest.approx(mean / 0.5)


def test_named_parameters():
    model = tiny_model("llama")
    optimizer = NaturalGaLore([{"params": list(model.model.layers.named_parameters()), "rank": 2}])
    assert optimizer.param_groups[0]["param_names"][0] == "0.self_attn.q_proj.weight"
    model(**tiny_batch("llama")).loss.backward()
    optimizer.step()
    assert "right" in optimizer.state[model.model.layers[0].self_attn.q_proj.weight]


def test_closures_and_schedules():
    model, optimizer = mixed()
    start = model.tall.detach().clone()

    def closure():
        loss = (model.tall**2).sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == pytest.approx(float((start**2).sum()))
    assert float((model.tall.detach() ** 2).sum()) < float((start**2).sum()), "the step takes the closure's gradient"
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 5e-3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_goes_on_as_the_original(copied):
    """Model and optimizer copied together, over a new subspace and a full ring."""
    options = {**VARIANTS[0], "stochastic_rounding": True}
    both = mixed(torch.bfloat16, **options)
    train(*both, 7)
    again = copied(both)
    assert again[1].param_groups[0]["rank"] == 3
    for pair in (both, again):
        train(*pair, 5, first=7)
    for p, q in zip(both[0].parameters(), again[0].parameters(), strict=True):
        assert p is not q
        assert torch.equal(p, q)
    for a, b in zip(tensors_of(both[1]), tensors_of(again[1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kept", [lambda x: x, torch.tensor, lambda x: torch.tensor([x])])
def test_a_learning_rate_may_be_a_tensor(kept):
    want, optimizer = mixed()
    train(want, optimizer, 3)
    model, other = mixed(lr=kept(1e-2))
    train(model, other, 3)
    for p, q in zip(want.parameters(), model.parameters(), strict=True):
        close(q.detach(), p.detach(), 1e-6)
