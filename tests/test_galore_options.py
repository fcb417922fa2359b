"""NaturalGaLore's options: of groups, of a model's matrices; mistakes in them."""

import pytest
import torch
from conftest import tiny_model
from test_natural_galore import gradients, make, run

import deftcore
from deftcore.methods.natural_galore.optimizer import NaturalGaLore

pytestmark = pytest.mark.filterwarnings("ignore:NaturalGaLore. the state:UserWarning")


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
    with pytest.raises(TypeError, match="params: must be in an order that stays from run to run, got a set"):
        NaturalGaLore([{"params": {torch.nn.Parameter(torch.zeros(3))}}])
    with pytest.raises(TypeError, match="lr: must be a number, got Tensor"):
        NaturalGaLore([torch.nn.Parameter(torch.zeros(3))], lr=torch.zeros(2))
    with pytest.raises(ValueError, match="lr: must be finite and at least 0"):
        NaturalGaLore([torch.nn.Parameter(torch.zeros(3))], lr=torch.tensor(-1.0))
    with pytest.raises(TypeError, match="natural_histroy: no such option; did you mean natural_history"):
        NaturalGaLore([torch.nn.Parameter(torch.zeros(3))], natural_histroy=3)
    with pytest.raises(TypeError, match=r"params: must be dense and floating-point, got torch\.complex64"):
        NaturalGaLore([torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))])
    with pytest.raises(TypeError, match="stochastic_rounding: is for bfloat16"):
        NaturalGaLore([torch.nn.Parameter(torch.zeros(3).half())], stochastic_rounding=True)


@pytest.mark.parametrize(
    ("mark", "by"), [("ds_id", "ZeRO-3"), ("_fsdp_flattened", "FSDP1"), ("_is_flat_param", "FSDP1")]
)
def test_what_others_have_flattened_is_refused(mark, by):
    """They would take AdamW without a word, having one dimension; without a rank that is what was asked for."""
    p = torch.nn.Parameter(torch.zeros(3))
    setattr(p, mark, 1)
    NaturalGaLore([p])
    with pytest.raises(TypeError, match=f"params: no subspace of what .*{by} has flattened"):
        NaturalGaLore([{"params": [p], "rank": 3}])


@pytest.mark.parametrize("key", ["rnak", "update_proj_gaps", "weight_dcay", "dampning"])
def test_misspelt_options_of_a_group_are_refused(key):
    with pytest.raises(TypeError, match=f"{key}: no such option of a group; did you mean"):
        NaturalGaLore([{"params": [torch.nn.Parameter(torch.zeros(9, 5))], key: 3}])


def test_keys_of_others_stay_in_a_group():
    others = {"initial_lr": 1e-3, "lr_scale": 0.5, "weight_decay_mult": 2.0, "name": "all", "layer": 3, "swa_lr": 0.1}
    optimizer = NaturalGaLore([{"params": [torch.nn.Parameter(torch.zeros(9, 5))], **others}])
    assert optimizer.param_groups[0].items() >= others.items()


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


def test_every_target_matches_something():
    """One that does not would leave its matrices to AdamW without a word."""
    model = tiny_model("llama")
    for targets, wrong, meant in ((["attn", "mpl"], "mpl", "mlp"), (["mlp", "q_porj"], "q_porj", "q_proj")):
        with pytest.raises(ValueError, match=f"target_modules: '{wrong}' matches no linear .* did you mean {meant}"):
            deftcore.galore_param_groups(model, targets)
    for p in model.model.layers[0].mlp.parameters():
        p.requires_grad_(False)
    assert deftcore.galore_param_groups(model, ["layers.1.mlp", "attn"])
    with pytest.raises(ValueError, match=r"'layers\.0\.mlp' matches no linear layer that trains"):
        deftcore.galore_param_groups(model, ["layers.0.mlp", "attn"])
