"""NaturalGaLore's state: files and what reads them, the bytes it takes."""

import copy
import io
import warnings

import pytest
import torch
from test_galore_optimizer import VARIANTS, mixed, tensors_of, train
from test_natural_galore import F64, close, gradients, make, run

from deftcore.methods.natural_galore.optimizer import NaturalGaLore
from deftcore.ops.natural import gram_of

pytestmark = pytest.mark.filterwarnings("ignore:NaturalGaLore. the state:UserWarning")


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


def test_hooks_of_loading():
    """What a hook puts in the state's place is loaded; what one does behind the loading stays."""
    model, optimizer = mixed()
    train(model, optimizer, 2)
    _, other = mixed()
    later = copy.deepcopy(optimizer.state_dict())
    for state in later["state"].values():
        state["step"] = 17
    other.register_load_state_dict_pre_hook(lambda _, given: later)
    seen = []

    def behind(loaded):
        seen.extend(state["step"] for state in loaded.state.values())
        for state in loaded.state.values():
            state["age"] = 23

    other.register_load_state_dict_post_hook(behind)
    for _ in range(2):
        other.load_state_dict(optimizer.state_dict())
        assert {(state["step"], state["age"]) for state in other.state.values()} == {(17, 23)}
    assert seen == [17] * 14


def test_loading_casts_no_second_copy(monkeypatch):
    model, optimizer = mixed()
    train(model, optimizer, 2)
    stored, cast = optimizer.state_dict(), []
    policy = torch.optim.Optimizer._process_value_according_to_param_policy
    monkeypatch.setattr(
        torch.optim.Optimizer,
        "_process_value_according_to_param_policy",
        staticmethod(lambda *a, **k: cast.append(a[-1]) or policy(*a, **k)),
    )
    optimizer.load_state_dict(stored)
    assert cast == []


def test_options_that_a_file_lacks_stay():
    """A file of AdamW's before its first step does not turn the projection off."""
    model, optimizer = mixed(natural_history=4)
    plain = torch.optim.AdamW([{"params": group["params"]} for group in optimizer.param_groups])
    plain.param_groups[0]["lr"] = 3e-3
    optimizer.load_state_dict(plain.state_dict())
    first, second = optimizer.param_groups
    assert (first["rank"], first["natural_history"], first["update_proj_gap"], first["lr"]) == (3, 4, 5, 3e-3)
    assert second["rank"] is None
    train(model, optimizer, 1)
    assert "right" in optimizer.state[model.tall]


def test_a_loaded_state_is_a_copy():
    model, optimizer = mixed()
    train(model, optimizer, 1)
    state = optimizer.state_dict()
    _, other = mixed()
    other.load_state_dict(state)
    assert not {x.data_ptr() for x in tensors_of(optimizer)} & {x.data_ptr() for x in tensors_of(other)}
