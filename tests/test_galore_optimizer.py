"""NaturalGaLore as an optimizer: groups, odd parameters and gradients, dtypes, files, hooks in the backward, memory."""

import copy
import io
import warnings
from contextlib import nullcontext

import pytest
import torch
from conftest import tiny_batch, tiny_model
from second_device import DEVICE, second_device
from test_natural_galore import F64, close, gradients, make, reference_adam, run

import deftcore
from deftcore.methods.natural_galore.optimizer import NaturalGaLore
from deftcore.ops.galore import gram_of, round_stochastically

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


# ---------------------------------------------------------------------------- resume and memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", VARIANTS)
def test_a_reloaded_run_is_the_uninterrupted_one(options, dtype):
    """Property 10, bit for bit: over a new subspace and a full ring, from several places; read as tensors alone."""
    options = {**options, "stochastic_rounding": dtype == torch.bfloat16, "seed": 7}
    whole, optimizer = mixed(dtype, **options)
    train(whole, optimizer, 13)
    for at in (0, 3, 5, 9):
        model, first = mixed(dtype, **options)
        train(model, first, at)
        file = io.BytesIO()
        torch.save([model.state_dict(), first.state_dict()], file)
        file.seek(0)
        weights, state = torch.load(file, weights_only=True)
        model, second = mixed(dtype, **{**options, "seed": 8, "rank": 2})  # the file's options count
        model.load_state_dict(weights)
        second.load_state_dict(state)
        train(model, second, 13 - at, first=at)
        for (name, p), q in zip(whole.named_parameters(), model.parameters(), strict=True):
            assert torch.equal(p, q), (at, name)
        for a, b in zip(tensors_of(optimizer), tensors_of(second), strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
@pytest.mark.parametrize("options", [*VARIANTS, {"flatten": True}, {"rank": 100}])
def test_the_estimate_is_what_is_held(options, dtype):
    """Property 12."""
    model, optimizer = mixed(dtype, **options)
    before = optimizer.estimate_state_bytes()
    train(model, optimizer, 7)
    held = sum(x.numel() * x.element_size() for x in tensors_of(optimizer))
    assert before == optimizer.estimate_state_bytes()
    assert before.total == held
    assert before.adamw == 2 * sum(p.numel() * p.element_size() for p in model.parameters())


def test_state_is_tensors_and_whole_numbers():
    model, optimizer = mixed()
    train(model, optimizer, 2)
    for state in optimizer.state_dict()["state"].values():
        assert {type(value) for value in state.values()} <= {torch.Tensor, int}


@pytest.mark.parametrize("options", VARIANTS[:4])
def test_the_gram_matrix_over_subspaces(options):
    """Property 11, in the optimizer, which also turns the window."""
    weight, *gs = gradients(14, 9, 5)
    p, optimizer = make(weight, update_proj_gap=5, **options)
    run(p, optimizer, gs)
    state = optimizer.state[p]
    if options.get("on_switch") != "keep":
        assert state["fill"] == 4
    close(state["gram"], gram_of(state["history"]), 1e-12)


def test_a_state_above_adamws_is_warned_of():
    p = torch.nn.Parameter(torch.zeros(64, 64))
    with pytest.warns(UserWarning, match=r"group 0 takes 0.0503 MB, AdamW's would take 0.0328 MB.*natural_history=20"):
        NaturalGaLore([{"params": [p], "rank": 8}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({"natural_history": 5}, {"proj_type": "galore"}, {"rank": 4}):
            NaturalGaLore([{"params": [p], "rank": 8, **options}])


def test_files_of_others_are_refused_by_name():
    model, optimizer = mixed()
    train(model, optimizer, 1)
    good, before = optimizer.state_dict(), copy.deepcopy(optimizer.state_dict())
    theirs = copy.deepcopy(good)
    theirs["state"][0] = {"step": 1, "projector": object(), "exp_avg": torch.zeros(9, 3)}
    with pytest.raises(
        ValueError, match=r"parameter 0 has the state of another optimizer, which differs in .*projector"
    ):
        optimizer.load_state_dict(theirs)
    other = copy.deepcopy(good)
    other["state"][1]["exp_avg"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"exp_avg of parameter 1 must be \(3, 9\), got \(2, 2\)"):
        optimizer.load_state_dict(other)
    assert str(optimizer.state_dict()) == str(before)


def test_a_loaded_state_is_a_copy():
    model, optimizer = mixed()
    train(model, optimizer, 1)
    state = optimizer.state_dict()
    _, other = mixed()
    other.load_state_dict(state)
    assert not {x.data_ptr() for x in tensors_of(optimizer)} & {x.data_ptr() for x in tensors_of(other)}


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
def test_on_another_device(options):
    """All of the state lies where the weights lie; a file from there goes on here."""
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


# ---------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"rank": 0}, ValueError, "rank: must be an integer of at least 1, got 0"),
        ({"rank": 2.0}, ValueError, "rank: must be an integer"),
        ({"damping": 0.0}, ValueError, "damping: must be finite and above 0"),
        ({"damping_mode": "none"}, ValueError, "damping_mode: must be one of 'absolute', 'relative'"),
        ({"natural_history": 0}, ValueError, "natural_history: must be an integer of at least 1"),
        ({"history_dtype": torch.float16}, ValueError, "history_dtype: must be None, 'float32' or 'bfloat16'"),
        ({"proj_type": "nat"}, ValueError, "proj_type: no 'nat'"),
        ({"proj_type": "reverse_std"}, ValueError, "proj_type: no 'reverse_std'"),
        ({"update_proj_gap": 0}, ValueError, "update_proj_gap: must be"),
        ({"scale": 0}, ValueError, "scale: must be finite and above 0"),
        ({"side": "top"}, ValueError, "side: must be one of"),
        ({"on_switch": "turn"}, ValueError, "on_switch: must be one of"),
        ({"flatten": 1}, TypeError, "flatten: must be a bool"),
        ({"seed": 2**32}, ValueError, "seed: must be below"),
        ({"lr": -1.0}, ValueError, "lr: must be finite and at least 0"),
        ({"betas": (0.9, 1.0)}, ValueError, "betas: must be two numbers in"),
    ],
)
def test_bad_options_are_named(options, error, match):
    p = torch.nn.Parameter(torch.zeros(9, 5))
    with pytest.raises(error, match=match):
        NaturalGaLore([{"params": [p], "rank": 3, **options}])
    optimizer = NaturalGaLore([torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(error, match=match):
        optimizer.add_param_group({"params": [p], "rank": 3, **options})
    assert len(optimizer.param_groups) == 1


def test_unknown_options_and_parameters_are_refused():
    with pytest.raises(TypeError, match="natural_histroy: no such option; did you mean natural_history"):
        NaturalGaLore([torch.nn.Parameter(torch.zeros(3))], natural_histroy=3)
    with pytest.raises(TypeError, match=r"params: must be dense and floating-point, got torch\.complex64"):
        NaturalGaLore([torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))])
    with pytest.raises(TypeError, match="stochastic_rounding: is for bfloat16"):
        NaturalGaLore([torch.nn.Parameter(torch.zeros(3).half())], stochastic_rounding=True)


@pytest.mark.parametrize(
    ("proj_type", "held"), [("std", {"right"}), ("left", {"left"}), ("right", {"right"}), ("full", {"left", "right"})]
)
def test_names_of_galore_torch(proj_type, held):
    weight, g = gradients(2, 9, 5)
    p, optimizer = make(weight, proj_type=proj_type)
    run(p, optimizer, [g])
    assert optimizer.state[p].keys() & {"left", "right", "history"} == held


def test_param_groups_of_a_model():
    model = tiny_model("llama")
    groups = deftcore.galore_param_groups(model, ["attn", "mlp"], rank=4, scale=2.0)
    names = {id(p): name for name, p in model.named_parameters()}
    chosen = {names[id(p)] for p in groups[0]["params"]}
    assert chosen == {n for n in names.values() if "attn" in n or "mlp" in n}
    assert (groups[0]["rank"], groups[0]["scale"]) == (4, 2.0)
    assert {names[id(p)] for group in groups for p in group["params"]} == set(names.values())
    for same in ("all-linear", r".*_proj"):
        assert {names[id(p)] for p in deftcore.galore_param_groups(model, same)[0]["params"]} == chosen
    with pytest.raises(
        ValueError, match="target_modules: 'q_porj' matches no linear layer that trains; did you mean q_proj"
    ):
        deftcore.galore_param_groups(model, ["q_porj"])
    with pytest.raises(ValueError, match="rank: must be"):
        deftcore.galore_param_groups(model, rank=0)
    model.lm_head.weight = model.model.embed_tokens.weight
    assert all(
        p is not model.lm_head.weight for p in deftcore.galore_param_groups(model, ["lm_head", "mlp"])[0]["params"]
    )
    transposed = tiny_model("gpt2")
    assert len(deftcore.galore_param_groups(transposed)[0]["params"]) == 8


# ---------------------------------------------------------------------------- inside the backward


def llama(**options):
    model = tiny_model("llama").double()
    groups = deftcore.galore_param_groups(model, rank=4, update_proj_gap=3, natural_history=4, **options)
    return model, NaturalGaLore(groups, lr=1e-2)


def test_steps_in_the_backward_are_those_behind_it():
    plain, optimizer = llama()
    model, early = llama()
    with early.step_in_backward():
        for _ in range(5):
            for each in (plain, model):
                each(**tiny_batch("llama")).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert all(p.grad is None for p in model.parameters())
            early.step()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)
    model(**tiny_batch("llama")).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_projected_gradients_add_up():
    """As whole ones do: projection is linear. Whole gradients of matrices stay only where a subspace is found."""
    plain, optimizer = llama()
    model, projecting = llama()
    parts = [{key: value[i : i + 1] for key, value in tiny_batch("llama").items()} for i in range(2)]
    matrices = projecting.param_groups[0]["params"]
    with projecting.accumulate_in_subspace():
        for t in range(7):
            for part in parts:
                plain(**part).loss.backward()
                model(**part).loss.backward()
                assert all((p.grad is None) == (t % 3 != 0) for p in matrices)
            for each in (optimizer, projecting):
                each.step()
                each.zero_grad()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        close(q.detach(), p.detach(), 1e-8)


def test_projected_and_whole_gradients_of_one_step():
    """Hooks that end between two micro-batches."""
    plain, optimizer = llama()
    model, projecting = llama()
    for t in range(2):
        for part in (1, 2):
            for each in (plain, model):
                hooks = projecting.accumulate_in_subspace() if part == 1 and t == 1 and each is model else nullcontext()
                with hooks:
                    (each(**tiny_batch("llama")).loss * part).backward()
        for each in (optimizer, projecting):
            each.step()
            each.zero_grad()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        close(q.detach(), p.detach(), 1e-8)


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


def test_closures_copies_and_schedules():
    model, optimizer = mixed()

    def closure():
        loss = (model.tall**2).sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == pytest.approx(float((mixed()[0].tall.detach() ** 2).sum()))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 5e-3
    again = copy.deepcopy(optimizer)
    assert again.param_groups[0]["rank"] == 3
    train(model, again, 0)
    again.step()
