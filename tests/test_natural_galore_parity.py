"""Natural GaLore and GaLore against values of the published code, and of an independent computation in float64.

The files are not part of the project: `--parity` names the folder that holds them.
"""

import re

import pytest
import torch

from deftcore.methods.natural_galore import refresh as refreshing
from deftcore.methods.natural_galore.optimizer import NaturalGaLore
from deftcore.methods.natural_galore.subspace import Subspace
from deftcore.ops import galore_matrix

pytestmark = pytest.mark.filterwarnings("ignore:NaturalGaLore. the state:UserWarning")
MATRICES = ("tall", "wide", "square")


def from_file(data, key, dtype):
    """In place of `find_subspace`: the run's own subspaces, one after the other."""
    given = iter(range(len(data[f"{key}.refresh_steps"])))

    def find(g, old, **_):
        i = next(given)
        if f"{key}.P" not in data:
            return Subspace(*(torch.from_numpy(data[f"{key}.{name}"][i]).to(dtype) for name in ("U_row", "U_col")))
        factor = torch.from_numpy(data[f"{key}.P"][i]).to(dtype)
        return Subspace(factor, None) if old.right is None else Subspace(None, factor)

    return find


def follow(data, run, matrix, monkeypatch, dtype=torch.float64, find=None, **options):
    """Trains as the run did, in its subspaces or those of `find`: the weights after each step, every N, the state at
    the end, and all values of the run."""
    data, key = dict(data), f"{run}.{matrix}."
    hp = {name.removeprefix("hp."): value.item() for name, value in data.items() if name.startswith("hp.")}
    monkeypatch.setattr(refreshing, "find_subspace", find or from_file(data, f"{run}.{matrix}", dtype))
    natural, seen = galore_matrix.natural_gradient, []
    monkeypatch.setattr(galore_matrix, "natural_gradient", lambda *a: seen.append(natural(*a)) or seen[-1].clone())
    p = torch.nn.Parameter(torch.from_numpy(data[f"{matrix}.W0"]).to(dtype, copy=True))
    group = {"rank": hp["rank"], "scale": hp["scale"], "on_switch": "keep", "refresh": "exact", **options}
    adam = {"betas": (hp["beta1"], hp["beta2"]), "eps": hp["eps"], "correct_bias": bool(hp["correct_bias"])}
    optimizer = NaturalGaLore([{"params": [p], **group}], lr=hp["lr"], **adam)
    weights = []
    for g in torch.from_numpy(data[f"{matrix}.G"]).to(dtype):
        p.grad = g
        optimizer.step()
        weights.append(p.detach().clone())
    wanted = {name.removeprefix(key): torch.from_numpy(value) for name, value in data.items() if name.startswith(key)}
    return torch.stack(weights), seen, optimizer.state[p], wanted


def off(a, b):
    return float((a.double() - b.double()).abs().max())


def options_of(run):
    """What a run's name says."""
    return {
        "proj_type": "natural_galore" if run.startswith("natural") else "galore",
        "natural_history": 6 if "_s6" in run else 20,
        "damping": 1.0 if re.search(r"_lam1(_|$)", run) else 1e-3,
        "weight_decay": 0.1 if "wd0.1" in run else 0.0,
        "update_proj_gap": 1000 if "gap1000" in run else 5,
    }


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("run", ["gap5_wd0_f64", "gap5_wd0.1_f64", "gap1000_wd0_f64", "gap5_wd0_f32"])
def test_galore_torch(parity, run, matrix, monkeypatch):
    """galore-torch 1.0's GaLoreAdamW, in its own subspaces."""
    dtype = torch.float32 if run.endswith("f32") else torch.float64
    options = options_of(run) | {"proj_type": "std"}
    weights, _, state, wanted = follow(parity("galore_torch_adamw.npz"), run, matrix, monkeypatch, dtype, **options)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    assert off(weights, wanted["W_after"]) <= tolerance
    assert off(state["exp_avg"], wanted["M_final"]) <= tolerance
    assert off(state["exp_avg_sq"], wanted["V_final"]) <= tolerance


@pytest.mark.parametrize("matrix", MATRICES)
def test_galore_torch_with_our_own_subspace(parity, matrix, monkeypatch):
    """One subspace, so that the signs of its vectors do not matter; theirs is a float32 SVD."""
    options = {"proj_type": "std", "update_proj_gap": 1000, "find": refreshing.find_subspace}
    weights, _, _, wanted = follow(parity("galore_torch_adamw.npz"), "gap1000_wd0_f64", matrix, monkeypatch, **options)
    assert off(weights, wanted["W_after"]) <= 5e-7


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize(
    "run",
    [
        "galore_gap5_f64", "natural_gap5_s20_f64", "natural_gap5_s6_f64", "natural_gap5_s20_wd0.1_f64",
        "natural_gap1000_s6_f64", "natural_gap5_s20_f32",
    ],
)  # fmt: skip
def test_the_authors_two_sided_form(parity, run, matrix, monkeypatch):
    """SubSpaceAdamW in its Tucker factors."""
    dtype = torch.float32 if run.endswith("f32") else torch.float64
    weights, seen, state, wanted = follow(
        parity("natural_galore_authors_tucker.npz"),
        run,
        matrix,
        monkeypatch,
        dtype,
        projection="two_sided",
        **options_of(run),
    )
    assert off(weights, wanted["W_after"]) <= (5e-5 if dtype == torch.float32 else 1e-12)
    assert ("N" in wanted and dtype == torch.float64) == bool(seen)  # the native step, of float32, shows no N
    if seen:
        assert off(torch.stack(seen), wanted["N"]) <= 1e-9 * float(wanted["N"].abs().max())
        assert off(in_order(state), wanted["H_final"]) <= 1e-12


def in_order(state):
    """The window's rows, oldest first."""
    history, fill = state["history"], state["fill"]
    return history[:fill] if fill < len(history) else history.roll(-state["slot"], 0)


RUNS = [
    "galore_gap5_wd0", "galore_gap1000_wd0.1", "natural_gap5_s20_lam1e-3", "natural_gap5_s6_lam1e-3",
    "natural_gap5_s20_lam1", "natural_gap1000_s6_lam1e-3", "natural_gap5_s6_lam1_wd0.1",
]  # fmt: skip


def same_signs(space):
    """Columns whose entry of largest magnitude is positive."""

    def fixed(factor):
        return factor * factor.gather(0, factor.abs().argmax(0, keepdim=True)).sign()

    return Subspace(*(None if f is None else fixed(f) for f in (space.left, space.right)))


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("run", RUNS)
def test_one_sided(parity, run, matrix, monkeypatch):
    """An independent computation of the specification's form, in its subspaces."""
    weights, seen, state, wanted = follow(
        parity("natural_galore_onesided_oracle.npz"), run, matrix, monkeypatch, **options_of(run)
    )
    found = {"W_after": weights, "M_final": state["exp_avg"], "V_final": state["exp_avg_sq"]}
    if seen:
        found |= {"N": torch.stack(seen), "H_final": in_order(state)}
    assert found.keys() == wanted.keys() - {"P", "refresh_steps"}
    for name, value in found.items():
        assert off(value, wanted[name]) <= 1e-10 * max(1, float(wanted[name].abs().max())), name


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("run", RUNS)
def test_one_sided_in_our_own_subspaces(parity, run, matrix, monkeypatch):
    find = refreshing.find_subspace
    options = options_of(run) | {"find": lambda *a, **k: same_signs(find(*a, **k))}
    weights, _, _, wanted = follow(parity("natural_galore_onesided_oracle.npz"), run, matrix, monkeypatch, **options)
    assert off(weights, wanted["W_after"]) <= 1e-9
