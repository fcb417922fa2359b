"""NaturalGaLore's inner rules: Adam's moments in another subspace, rules that are not Adam."""

import copy

import pytest
import torch
from test_natural_galore import F64, close, gradients, run

from deftcore.methods.natural_galore.inner import InnerRule, turn_adam
from deftcore.methods.natural_galore.optimizer import NaturalGaLore
from deftcore.methods.natural_galore.state import window_of
from deftcore.methods.natural_galore.subspace import Subspace
from deftcore.ops.galore_matrix import back_project, project
from deftcore.ops.natural import Damping, gram_of, natural_gradient

pytestmark = pytest.mark.filterwarnings("ignore:NaturalGaLore. the state:UserWarning")


def test_adams_moments_in_another_subspace():
    """Of unbiased moments, element by element: the variance by the squares of Q, the mean by Q."""
    generator = torch.Generator().manual_seed(0)
    m, v = (torch.randn(5, 3, generator=generator, dtype=F64) for _ in range(2))
    v, q, age, betas = v.square(), torch.randn(3, 3, generator=generator, dtype=F64), 4, (0.9, 0.99)
    found = turn_adam({"exp_avg": m, "exp_avg_sq": v}, Subspace(None, q), age, {"betas": betas})
    for i in range(5):
        for j in range(3):
            mean = [float(m[i, k]) / (1 - 0.9**age) for k in range(3)]
            spread = [float(v[i, k]) / (1 - 0.99**age) - mean[k] ** 2 for k in range(3)]
            turned = sum(float(q[j, k]) * mean[k] for k in range(3))
            second = abs(sum(float(q[j, k]) ** 2 * spread[k] for k in range(3)) + turned**2)
            assert float(found["exp_avg"][i, j]) == pytest.approx(turned * (1 - 0.9**age), rel=1e-12)
            assert float(found["exp_avg_sq"][i, j]) == pytest.approx(second * (1 - 0.99**age), rel=1e-12)


def test_other_inner_rules_are_functions():
    """A rule of one moment; the projector does not know it."""

    def direction(n, *, moments, age, group):
        moments["exp_avg"].mul_(0.9).add_(n, alpha=0.1)
        return moments["exp_avg"].sign()

    class SignGaLore(NaturalGaLore):
        inner = InnerRule(("exp_avg",), direction, lambda moments, turn, age, group: moments)

    weight, *gs = gradients(5, 9, 5)
    p, b = torch.nn.Parameter(weight.clone()), torch.nn.Parameter(torch.zeros(3, dtype=F64))
    optimizer = SignGaLore([{"params": [p], "rank": 2, "proj_type": "galore", "scale": 1.0}, {"params": [b]}], lr=0.1)
    b.grad = torch.tensor([1.0, -2.0, 0.0], dtype=F64)
    run(p, optimizer, gs[:1])
    right = optimizer.state[p]["right"]
    close(p.detach(), weight - 0.1 * (gs[0] @ right).sign() @ right.t(), 1e-12)
    assert b.tolist() == [-0.1, 0.1, 0.0]
    assert "exp_avg_sq" not in optimizer.state[p]


@pytest.mark.parametrize("projection", ["one_sided", "two_sided"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_rule_without_moments_over_subspaces(projection, dtype):
    """The window turns by the shape of R, which is no moment's."""

    class Stateless(NaturalGaLore):
        inner = InnerRule((), lambda n, *, moments, age, group: n.sign(), lambda moments, turn, age, group: moments)

    weight, *gs = gradients(5, 9, 5)
    p = torch.nn.Parameter(weight.clone())
    options = {"projection": projection, "history_dtype": dtype, "update_proj_gap": 2, "natural_history": 3}
    optimizer = Stateless([{"params": [p], "rank": 2, "scale": 1.0, **options}], lr=0.1)
    before = run(p, optimizer, gs[:-1])[-1]
    state = optimizer.state[p]
    assert not state.keys() & {"exp_avg", "exp_avg_sq"}
    assert optimizer.estimate_state_bytes().moments == 0
    close(state["gram"], gram_of(state["history"]), 1e-12)
    factors, window = (state.get("left"), state.get("right")), window_of(copy.deepcopy(state))
    n = natural_gradient(project(gs[-1], *factors), window, Damping(1e-3))
    run(p, optimizer, gs[-1:])
    close(p.detach(), before - 0.1 * back_project(n.sign(), *factors), 1e-12)
