"""Natural GaLore: what its step is, by properties; and what the optimizer does with everything that is not a step."""

import copy
import math

import numpy as np
import pytest
import torch

from deftcore.methods.natural_galore import refresh as refreshing
from deftcore.methods.natural_galore.optimizer import NaturalGaLore
from deftcore.methods.natural_galore.refresh import refresh
from deftcore.methods.natural_galore.subspace import Subspace, find_subspace
from deftcore.ops.galore_matrix import back_project, project
from deftcore.ops.natural import Damping, Window, gram_of, natural_gradient

pytestmark = pytest.mark.filterwarnings("ignore:NaturalGaLore. the state:UserWarning")
F64 = torch.float64


def empty_window(rows, size, dtype=F64):
    gram, failures = torch.zeros(rows, rows, dtype=F64), torch.zeros((), dtype=torch.int64)
    return Window(torch.zeros(rows, size, dtype=dtype), gram, 0, 0, failures)


def push(window, r, damping):
    """One step's N; the row stays in the window, which moves on."""
    return natural_gradient(r, window, damping)


def natural(rows, damping, size=None):
    """N of the last of some vectors."""
    window = empty_window(size or len(rows), rows[0].numel(), rows[0].dtype)
    for row in rows:
        n = push(window, row, damping)
    return n


def dense(rows, ridge):
    """(ridge I + sum h h^T)^-1 of the last row: a k x k solve, refined in longer numbers, as it is ill-conditioned."""
    h = np.stack([row.double().flatten().numpy() for row in rows]).astype(np.longdouble)
    matrix = np.longdouble(ridge) * np.eye(h.shape[1], dtype=np.longdouble) + h.T @ h
    x = np.zeros(h.shape[1], dtype=np.longdouble)
    for _ in range(6):
        x += np.linalg.solve(matrix.astype(float), (h[-1] - matrix @ x).astype(float))
    return torch.from_numpy(x.astype(float)).view(rows[-1].shape)


def close(a, b, tolerance):
    assert (a.double() - b.double()).abs().max() <= tolerance * b.double().abs().max().clamp(min=1e-300)


def gradients(count, *shape, dtype=F64, seed=1):
    return list(torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype))


def make(weight, **options):
    """An optimizer of one matrix."""
    p = torch.nn.Parameter(weight.clone())
    return p, NaturalGaLore([{"params": [p], "rank": 3, **options}], lr=options.pop("lr", 1e-2))


def run(p, optimizer, gs):
    """The weights after each step."""
    found = []
    for g in gs:
        p.grad = g.clone()
        optimizer.step()
        found.append(p.detach().clone())
    return found


def decaying(m, n, power, seed=3):
    """Singular values 1, 2^-power, 3^-power ..., random vectors."""
    g = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(m, min(m, n), generator=g, dtype=F64)).Q
    v = torch.linalg.qr(torch.randn(n, min(m, n), generator=g, dtype=F64)).Q
    return (u * torch.arange(1, min(m, n) + 1, dtype=F64) ** -power) @ v.t()


# ---------------------------------------------------------------------------- the natural gradient


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_equals_the_dense_solve(rows, scale):
    """Property 1, at every fill, and behind the first turn of the ring."""
    window, seen = empty_window(rows, 12), []
    for r in gradients(3 * rows + 1, 4, 3):
        seen = [*seen, r * scale][-rows:]
        close(push(window, seen[-1], Damping(1e-3)), dense(seen, 1e-3), 1e-10)


@pytest.mark.parametrize("norm", [0.1, 1.0, 10.0, 100.0, 1e4])
def test_large_gradients_keep_their_digits_in_float32(norm):
    """Where Woodbury's form has lost all of them; rows that are alike, too."""
    (first, *more) = [r / r.norm() * norm for r in gradients(8, 64, dtype=torch.float32)]
    rows = [first, *(first + 0.01 * each for each in more)]
    close(natural(rows, Damping(1e-3)), dense(rows, 1e-3), 3e-7)


def test_closed_forms():
    """Property 2."""
    r, damping = gradients(1, 4, 3)[0], Damping(0.5)
    close(natural([r], damping), r / (0.5 + r.norm() ** 2), 1e-12)
    close(natural([r] * 5, damping), r / (0.5 + 5 * r.norm() ** 2), 1e-12)
    orthogonal = list(
        torch.linalg.qr(torch.randn(6, 6, dtype=F64)).Q[:4] * torch.arange(1.0, 5.0, dtype=F64).view(4, 1)
    )
    close(natural(orthogonal, damping), orthogonal[-1] / (0.5 + 16), 1e-12)


def test_positive_limits_scales_order_rotations():
    """Property 3."""
    rows = gradients(6, 12)
    n = natural(rows, Damping(0.1))
    assert n @ rows[-1] > 0
    close(1e9 * natural(rows, Damping(1e9)), rows[-1], 1e-6)
    close(natural([3 * row for row in rows], Damping(0.9)), n / 3, 1e-10)
    close(natural([rows[i] for i in (3, 0, 4, 2, 1, 5)], Damping(0.1)), n, 1e-10)
    q = torch.linalg.qr(torch.randn(12, 12, dtype=F64)).Q
    close(natural([q @ row for row in rows], Damping(0.1)), q @ n, 1e-10)


def test_damping_relative_and_mean():
    rows = gradients(4, 6)
    trace = sum(float(row.norm() ** 2) for row in rows)
    close(natural(rows, Damping(0.3, "relative")), dense(rows, 0.3 * trace / 4), 1e-10)
    close(
        natural([1e-6 * row for row in rows], Damping(0.3, "relative")),
        1e6 * natural(rows, Damping(0.3, "relative")),
        1e-9,
    )
    close(natural(rows, Damping(0.3, norm="mean")), 4 * dense(rows, 4 * 0.3), 1e-10)


def test_the_gram_matrix_is_that_of_the_window():
    """Property 11, rows in bfloat16 too."""
    for dtype in (F64, torch.float32, torch.bfloat16):
        window = empty_window(5, 12, dtype)
        for r in gradients(17, 12):
            push(window, r, Damping(1e-3))
        close(window.gram, gram_of(window.history), 1e-13)
        assert window.history.unique(dim=0).shape[0] == 5


def test_a_window_that_does_not_hold_is_dropped_and_counted():
    """A product that is infinite, or no number: N = R / lambda, and the next step starts anew."""
    window, (r, then) = empty_window(3, 12, torch.float32), gradients(2, 12, dtype=torch.float32)
    push(window, r, Damping(0.5))
    n = push(window, torch.full((12,), math.inf), Damping(0.5))
    assert n.isinf().all()
    assert int(window.failures) == 1
    assert not window.history.any()
    close(push(window, then, Damping(0.5)), then / (0.5 + then.norm() ** 2), 1e-6)
    assert int(window.failures) == 1


MODES = (Damping(1e-3), Damping(1e-30, "relative"), Damping(1e-3, norm="mean"), Damping(1e-30, "relative", "mean"))


@pytest.mark.parametrize("damping", MODES)
def test_a_finite_window_that_does_not_hold_starts_anew_with_the_gradient(damping):
    """Rows alike beside which lambda vanishes: the last pivot is exactly zero."""
    window, r = empty_window(4, 2), torch.tensor([1e10, 0.0], dtype=F64)
    for failures in range(3):
        close(push(window, r, damping), r / 1e20, 1e-12)
        assert int(window.failures) == failures
        assert (window.slot, window.fill) == (1, 1)
        close(window.gram, gram_of(window.history), 1e-13)
    then = torch.tensor([3.0, 4e10], dtype=F64)  # orthogonal, but for what is below rounding
    close(push(window, then, damping), (2 if damping.norm == "mean" else 1) * then / 16e20, 1e-9)
    assert (int(window.failures), window.slot, window.fill) == (2, 2, 2)


@pytest.mark.parametrize(
    "damping", [Damping(0.3), Damping(0.3, "relative"), Damping(0.3, norm="mean"), Damping(0.3, "relative", "mean")]
)
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_no_row_is_left_of_a_gradient_that_is_not_finite(damping, bad):
    """Neither lambda nor the mean counts rows of zeros in the steps behind it."""
    window, (r, *then) = empty_window(4, 12), gradients(3, 12)
    for each in (r, r, torch.full((12,), bad, dtype=F64)):
        push(window, each, damping)
    assert (window.slot, window.fill, int(window.failures)) == (0, 0, 1)
    fresh = empty_window(4, 12)
    for each in then:
        close(push(window, each, damping), push(fresh, each, damping), 1e-14)
    assert int(window.failures) == 1


def test_a_product_that_overflows():
    window, r = empty_window(2, 2), torch.tensor([1e200, 0.0], dtype=F64)
    close(push(window, r, Damping(2.0)), r / 2, 1e-12)
    assert int(window.failures) == 1
    assert not window.gram.any()


def test_zero_gradients():
    for damping in (Damping(1e-3), Damping(1e-3, "relative"), Damping(1e-3, "relative", "mean")):
        window = empty_window(3, 4)
        assert not push(window, torch.zeros(4, dtype=F64), damping).any()
        r = torch.ones(4, dtype=F64)
        assert bool((push(window, r, damping) > 0).all())
        assert int(window.failures) == 0


# ---------------------------------------------------------------------------- the step


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6)])
def test_the_first_step_is_galores(shape):
    """Property 4: N is parallel to R, and Adam's first step is the sign."""
    weight, g = gradients(2, *shape)
    found = []
    for proj_type in ("galore", "natural_galore"):
        p = torch.nn.Parameter(weight.clone())
        optimizer = NaturalGaLore([{"params": [p], "rank": 3, "proj_type": proj_type}], lr=1e-2, eps=1e-30)
        found += run(p, optimizer, [g])
    close(found[0] - weight, found[1] - weight, 1e-9)


def reference_adam(weight, gs, lr=1e-2, betas=(0.9, 0.999), eps=1e-6):
    m, v, w = torch.zeros_like(weight), torch.zeros_like(weight), weight.clone()
    for t, g in enumerate(gs, 1):
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        w = w - lr * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) * m / (v.sqrt() + eps)
    return w


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rank", [5, 8])
def test_full_rank_is_adam_in_other_coordinates(side, rank):
    """Property 5; and a rank above the dimension is the dimension."""
    weight, *gs = gradients(8, *((5, 9) if side == "left" else (9, 5)))
    p, optimizer = make(weight, rank=rank, scale=1.0, update_proj_gap=10**9, proj_type="galore")
    after = run(p, optimizer, gs)[-1]
    basis = optimizer.state[p][side]
    assert basis.shape == (5, 5)
    if side == "left":
        close(after, basis @ reference_adam(basis.t() @ weight, [basis.t() @ g for g in gs]), 1e-12)
    else:
        close(after, reference_adam(weight @ basis, [g @ basis for g in gs]) @ basis.t(), 1e-12)


@pytest.mark.parametrize("projection", ["one_sided", "two_sided"])
@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6), (1, 7), (7, 1)])
def test_weights_change_within_the_subspace(shape, projection):
    """Property 6, and side's rule: the shorter one, the right one of a square."""
    weight, *gs = gradients(6, *shape)
    p, optimizer = make(weight, projection=projection, update_proj_gap=100)
    change = run(p, optimizer, gs)[-1] - weight
    state = optimizer.state[p]
    sides = {"left", "right"} if projection == "two_sided" else {"left" if shape[0] < shape[1] else "right"}
    assert state.keys() & {"left", "right"} == sides
    left, right = state.get("left"), state.get("right")
    close(back_project(project(change, left, right), left, right), change, 1e-12)
    assert torch.linalg.matrix_rank(change, atol=1e-12) == min(3, *shape)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_subspaces_are_orthonormal_and_catch_the_energy(power, dtype):
    """Property 7: cold, and warm from the subspace of another gradient."""
    g, before = (decaying(96, 64, power, seed).to(dtype) for seed in (3, 4))
    empty = Subspace(None, torch.zeros(64, 8, dtype=dtype))
    best = find_subspace(g, empty, warm=False, exact=True, seed=0).right
    old = find_subspace(before, empty, warm=False, exact=False, seed=1)
    near = find_subspace(g + 0.1 * before, empty, warm=False, exact=False, seed=1)
    starts = [(old, False), (near, True)]
    if power > 0.5:  # of a spectrum so flat, one pass does not find all from an unrelated start
        starts.append((old, True))
    for start, warm in starts:
        p = find_subspace(g, start, warm=warm, exact=False, seed=2).right
        assert (p.t() @ p - torch.eye(8)).abs().max() < 1e-5
        assert (g @ p).norm() ** 2 >= 0.99 * (g @ best).norm() ** 2


def test_tiny_gradients_have_a_subspace_too():
    g = decaying(12, 8, 2.0).float()
    empty = Subspace(None, torch.zeros(8, 2))
    a, b = (find_subspace(g * size, empty, warm=False, exact=False, seed=0).right for size in (1.0, 1e-30))
    assert torch.linalg.svdvals(a.t() @ b).min() > 1 - 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("power", [None, 0.0, 8.0])
def test_subspaces_of_degenerate_gradients(power, size, warm, dtype):
    """Of rank 2 (None), of a flat spectrum, and of one that falls below the dtype's digits: orthonormal to its digits,
    and nothing is lost that it could hold. A zero gradient has none."""
    if power is None:
        g = torch.outer(torch.arange(1.0, 97.0), torch.ones(64)) + torch.outer(torch.ones(96), torch.arange(64.0))
    else:
        g = decaying(96, 64, power, 3)
    g = (g / g.abs().max() * size).to(dtype)
    old = Subspace(None, torch.linalg.qr(decaying(64, 8, 0.0, 5).to(dtype)).Q)
    for _ in range(3 if warm else 1):
        found = find_subspace(g, old, warm=warm, exact=False, seed=2)
        old = found
    p, exact = found.right, find_subspace(g, old, warm=False, exact=True, seed=0).right
    assert (p.t() @ p - torch.eye(8)).abs().max() < 50 * torch.finfo(dtype).eps
    held, best = ((g / size).double() @ each.double() for each in (p, exact))
    assert held.norm() ** 2 >= (0.8 if power == 0 else 1 - 1e-5) * best.norm() ** 2
    assert find_subspace(0 * g, old, warm=warm, exact=False, seed=2) is None


@pytest.mark.parametrize("options", [{}, {"refresh": "exact"}, {"projection": "two_sided"}, {"proj_type": "galore"}])
def test_a_transposed_matrix_has_the_transposed_update(options):
    """Property 8, over three subspaces."""
    weight, *gs = gradients(13, 9, 5)
    options = {"update_proj_gap": 4, "natural_history": 5, **options}
    there = run(*make(weight, **options), gs)[-1]
    back = run(*make(weight.t(), **options), [g.t() for g in gs])[-1]
    close(back.t() - weight, there - weight, 1e-9)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9)])
def test_rotation_within_a_subspace_changes_nothing(shape, monkeypatch):
    """Property 9: N, carried back, and K stay, and so does M; V is what it is in new coordinates."""
    weight, *gs = gradients(9, *shape)
    p, optimizer = make(weight, natural_history=4, update_proj_gap=100)
    run(p, optimizer, gs[:-1])
    state = optimizer.state[p]
    before = copy.deepcopy(state)
    side = "right" if "right" in state else "left"
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=F64)).Q
    monkeypatch.setattr(refreshing, "find_subspace", lambda g, old, **_: Subspace(**{
        "left": None, "right": None, side: getattr(old, side) @ turn}))  # fmt: skip
    refresh(gs[-1], state, optimizer.param_groups[0], optimizer.inner)
    close(state["gram"], before["gram"], 1e-12)
    assert not torch.allclose(state["history"], before["history"])
    ends = []
    for each in (before, state):
        factors = each.get("left"), each.get("right")
        window = Window(*(each[name] for name in ("history", "gram", "slot", "fill", "failures")))
        ends.append([
            back_project(natural_gradient(project(gs[-1], *factors), window, Damping(1e-3)), *factors),
            back_project(each["exp_avg"], *factors),
        ])  # fmt: skip
    for a, b in zip(*ends, strict=True):
        close(a, b, 1e-12)
    assert (state["exp_avg_sq"] >= 0).all()


def test_moments_follow_a_permutation_exactly(monkeypatch):
    """Columns that change places take their moments along: LDAdam's rule is exact there, and `keep` is not."""
    weight, *gs = gradients(9, 9, 5)
    order = torch.tensor([2, 0, 1])
    for mode, same in (("rotate", True), ("keep", False)):
        p, optimizer = make(weight, on_switch=mode, update_proj_gap=100)
        run(p, optimizer, gs)
        state = optimizer.state[p]
        before = copy.deepcopy(state)
        monkeypatch.setattr(refreshing, "find_subspace", lambda g, old, **_: Subspace(None, old.right[:, order]))
        refresh(gs[0], state, optimizer.param_groups[0], optimizer.inner)
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.allclose(state[name], before[name][:, order], rtol=1e-9, atol=1e-15) == same
    p, optimizer = make(weight, on_switch="reset", update_proj_gap=4)
    after = run(p, optimizer, gs[:5])
    state = optimizer.state[p]
    assert (state["step"], state["age"], state["fill"]) == (5, 1, 1)
    fresh, anew = make(after[3], refresh="exact")
    anew.state[fresh] |= {}  # a first step in the same subspace
    monkeypatch.setattr(refreshing, "find_subspace", lambda g, old, **_: Subspace(None, state["right"]))
    close(run(fresh, anew, gs[4:5])[0], after[4], 1e-12)
