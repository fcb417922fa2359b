"""The native step of GaLore and Natural GaLore against its definition: one call over many matrices."""

import copy
import math

import pytest
import torch
from conftest import assert_close_to_ref, on_threads

from deftcore.ops import galore
from deftcore.ops.galore import galore_step
from deftcore.ops.galore_matrix import AdamMatrix, galore_step_ref, project, round_stochastically
from deftcore.ops.natural import Damping, Window, gram_of

F64 = torch.float64
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1, "scale": 0.5, "correct_bias": True}
SIDES = {"left": (True, False), "right": (False, True), "both": (True, True), "whole": (False, False)}
HISTORIES = [None, torch.float32, torch.bfloat16]


def numbers(*shape, seed=0, dtype=torch.float32):
    """The same in every dtype that is no shorter than bfloat16."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(dtype)


def make(shape, side, *, dtype=torch.float32, history=None, rows=6, fill=0, slot=0, rank=5, age=3, seed=0, **more):
    """A matrix in the middle of its training."""
    shape = tuple(shape)
    left, right = (numbers(n, min(rank, *shape), seed=seed + i) / n**0.5 if wanted else None
                   for i, (n, wanted) in enumerate(zip(shape, SIDES[side], strict=True)))  # fmt: skip
    compact = (shape[0] if left is None else left.shape[1], shape[1] if right is None else right.shape[1])
    window = None
    if history is not None:
        held = torch.zeros(rows, compact[0] * compact[1], dtype=history)
        held[:fill] = numbers(fill, held.shape[1], seed=seed + 2).to(history)
        window = Window(held, gram_of(held), slot, fill, torch.zeros((), dtype=torch.int64), **more)
    return AdamMatrix(
        weight=numbers(*shape, seed=seed + 3, dtype=dtype), grad=numbers(*shape, seed=seed + 4, dtype=dtype), left=left,
        right=right, window=window, exp_avg=numbers(*compact, seed=seed + 5),
        exp_avg_sq=numbers(*compact, seed=seed + 6).square() + 0.1, age=age,
    )  # fmt: skip


def twice_as_long(m):
    """The same in float64, all but what a window holds."""
    m = copy.deepcopy(m)
    for name in ("weight", "grad", "left", "right", "exp_avg", "exp_avg_sq"):
        value = getattr(m, name)
        setattr(m, name, None if value is None else value.double())
    if m.window is not None:
        m.window.history = m.window.history.double()
    return m


def by_reference(matrices, damping, **options):
    given = OPTIONS | options
    for m in matrices:
        galore_step_ref(m, **given, damping=damping)


def results(m):
    found = [m.weight, m.exp_avg, m.exp_avg_sq]
    return found if m.window is None else [*found, m.window.history, m.window.gram]


LIGHT = Damping(0.3)


def compare(matrices, damping=LIGHT, steps=1, **options):
    """Against the definition in the same dtypes and in float64."""
    plain, exact = copy.deepcopy(matrices), [twice_as_long(m) for m in matrices]
    for step in range(steps):
        for group in (matrices, plain, exact):
            for i, m in enumerate(group):
                m.grad = numbers(*m.grad.shape, seed=100 * step + i, dtype=m.grad.dtype)
                m.age += 1
        galore_step(matrices, **OPTIONS | options, damping=damping)
        by_reference(plain, damping, **options)
        by_reference(exact, damping, **options)
    for ours, theirs, right in zip(matrices, plain, exact, strict=True):
        for a, b, c in zip(results(ours), results(theirs), results(right), strict=True):
            if a.dtype == F64:  # products of what the history's dtype holds
                assert torch.allclose(a, gram_of(ours.window.history), rtol=1e-12)
            else:
                assert_close_to_ref(a, b, c.double(), reduction=1 + c.double().abs())
        if ours.window is not None:
            assert (ours.window.slot, ours.window.fill) == (theirs.window.slot, theirs.window.fill)
            assert int(ours.window.failures) == int(theirs.window.failures) == 0


@pytest.mark.parametrize("history", HISTORIES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("side", SIDES)
def test_equals_the_definition(side, dtype, history):
    """Windows empty, in part, full, and turned, of several sizes in one call."""
    states = [{}, {"fill": 3, "slot": 3}, {"fill": 6, "slot": 0}, {"fill": 6, "slot": 4}, {"rows": 1, "fill": 1}]
    shapes = [(7, 5), (5, 7), (64, 33), (1, 9), (300, 47)]
    compare([
        make(shape, side, dtype=dtype, history=history, seed=10 * i, **state)
        for i, (shape, state) in enumerate(zip(shapes, states, strict=True))
    ], steps=3)  # fmt: skip


@pytest.mark.parametrize("damping", [
    Damping(0.5), Damping(0.5, "relative"), Damping(0.5, norm="mean"), Damping(0.5, "relative", "mean")
])  # fmt: skip
def test_damping(damping):
    """Over more than a piece of elements, and rows of the window beside a multiple of four."""
    compare([make((9, 1025), "left", history=torch.float32, rows=n, fill=n, slot=n - 1, seed=n) for n in (1, 4, 5, 7)],
            damping, steps=2, weight_decay=0.0, correct_bias=False)  # fmt: skip


def test_kinds_of_matrices_may_be_mixed():
    compare([
        make((12, 8), "right", history=torch.float32), make((12, 8), "both", history=torch.bfloat16, seed=1),
        make((8, 12), "left", seed=2), make((3, 4), "whole", dtype=torch.bfloat16, seed=3),
        make((12, 8), "right", dtype=torch.bfloat16, history=torch.float32, seed=4),
    ], steps=2)  # fmt: skip


def test_a_call_gives_what_matrices_give_one_by_one(monkeypatch):
    """Bit for bit: cut into native calls as may be, on any number of threads, where more than one piece is there."""
    made = [make((40, 300 + i), "left", history=torch.float32, fill=2, slot=2, rank=32, seed=9 * i) for i in range(30)]
    before = copy.deepcopy(made)
    galore_step(made, **OPTIONS, damping=Damping(0.3))
    for most in (1, 1 << 20):
        again = copy.deepcopy(before)
        monkeypatch.setattr(galore, "_BYTES_OF_CALL", dict.fromkeys(("cpu", "cuda"), most))
        with on_threads(2):
            galore_step(again, **OPTIONS, damping=Damping(0.3))
        for a, b in zip(made, again, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(results(a), results(b), strict=True))


def test_a_gradient_that_is_not_kept_and_one_that_is_projected():
    for keep in (True, False):
        compare([make((12, 9), "right", history=torch.float32, fill=2, slot=1, keep=keep)])
    whole = make((12, 9), "right", history=torch.float32)
    given = copy.deepcopy(whole)
    given.grad, given.projected = project(given.grad, None, given.right), True
    before = given.grad.clone()
    galore_step([whole, given], **OPTIONS, damping=Damping(0.3))
    assert torch.equal(given.grad, before)
    assert all(torch.equal(x, y) for x, y in zip(results(whole), results(given), strict=True))


def test_windows_are_left_alone_without_damping():
    m = make((12, 9), "right", history=torch.float32, fill=2, slot=2)
    other = copy.deepcopy(m)
    other.window = None
    galore_step([m], **OPTIONS)
    galore_step([other], **OPTIONS)
    assert torch.equal(m.weight, other.weight)
    assert (m.window.slot, m.window.fill) == (2, 2)


# ---------------------------------------------------------------------------- windows that do not hold


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("history", HISTORIES[1:], ids=str)
@pytest.mark.parametrize("mode", [("absolute", "sum"), ("relative", "sum"), ("absolute", "mean"), ("relative", "mean")])
@pytest.mark.parametrize("bad", ["infinite", "none", "huge", "alike", "zero"])
def test_a_window_that_does_not_hold(bad, mode, history, keep):
    """Beside one that does."""
    m = make((3, 4), "whole", history=history, fill=3, slot=3, rows=4, keep=keep)
    damping = Damping(1e-30 if bad == "alike" else 0.25, *mode)
    if bad == "alike":
        m.grad = torch.zeros(3, 4).index_fill_(0, torch.tensor(1), 2.0**20)
        m.window.history[:] = m.grad.reshape(1, -1)
        m.window.gram = gram_of(m.window.history)
    else:
        m.grad[1, 2] = {"infinite": math.inf, "none": math.nan, "huge": 3e38, "zero": 0.0}[bad]
    if bad == "zero":
        m.grad.zero_()
        m.window.history.zero_()
        m.window.gram.zero_()
    m.window.failures += 3
    good = make((3, 4), "whole", history=history, fill=1, slot=1, rows=4, seed=7)
    ours, theirs = [m, good], copy.deepcopy([m, good])
    for step in range(2):
        for group in (ours, theirs):
            group[1].grad = numbers(3, 4, seed=20 + step)
            if bad == "huge":  # alike but for rounding, they would hold or not
                group[0].grad = group[0].grad.roll(step, 0)
        galore_step(ours, **OPTIONS, damping=damping)
        by_reference(theirs, damping)
        for a, b in zip(ours, theirs, strict=True):
            for x, y in zip(results(a), results(b), strict=True):
                assert torch.allclose(x.double(), y.double(), rtol=1e-5, atol=1e-7, equal_nan=True)
            assert (a.window.slot, a.window.fill) == (b.window.slot, b.window.fill)
            assert int(a.window.failures) == int(b.window.failures)
        assert int(good.window.failures) == 0
    failed = {"zero": 0, "huge": 0, "alike": 2 if keep else 1}.get(bad, 2)
    assert int(m.window.failures) == 3 + failed


# ---------------------------------------------------------------------------- layouts, sizes, rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", SIDES)
def test_any_strides(side, dtype):
    """Of gradients, weights, moments and windows, which stay what they are."""
    m = make((12, 9), side, dtype=dtype, history=torch.float32 if side != "whole" else None, fill=2, slot=2)
    other = copy.deepcopy(m)
    other.weight, other.grad = (x.t().contiguous().t() for x in (m.weight, m.grad))
    other.exp_avg = torch.stack((m.exp_avg, m.exp_avg), -1)[..., 0]
    other.exp_avg_sq = m.exp_avg_sq.t().contiguous().t()
    if m.window is not None:
        other.window.history = torch.nn.functional.pad(m.window.history, (1, 2))[:, 1:-2]
    pointers = [x.data_ptr() for x in results(other)]
    galore_step([m, other], **OPTIONS, damping=Damping(0.3))
    for x, y in zip(results(m), results(other), strict=True):
        assert torch.allclose(x.float(), y.float(), rtol=1e-6, atol=1e-7)
    assert [x.data_ptr() for x in results(other)] == pointers


def test_nothing_to_do():
    galore_step([], lr=0.1)
    for shape, side in (((0, 5), "whole"), ((5, 0), "whole")):
        galore_step([make(shape, side)], **OPTIONS)
    empty = make((0, 5), "whole", history=torch.float32)
    galore_step([empty], **OPTIONS, damping=Damping(1.0))
    assert (empty.window.slot, empty.window.fill, int(empty.window.failures)) == (1, 1, 0)


@pytest.mark.parametrize("side", ["right", "whole"])
def test_stochastic_rounding(side):
    """The reference's bits, by the place in the whole matrix; other dtypes than bfloat16 have none."""
    m = make((70, 47), side, dtype=torch.bfloat16)
    m.seed = 2**40 + 5
    wide = copy.deepcopy(m)
    wide.weight, wide.grad, wide.seed = m.weight.float(), m.grad.float(), None
    galore_step([m], **OPTIONS)
    galore_step([wide], **OPTIONS)
    expected = round_stochastically(wide.weight, m.seed)
    assert (m.weight != expected).float().mean() < 0.002  # where the last bit of float32 decides
    assert (m.weight != wide.weight.bfloat16()).float().mean() > 0.2
    plain = make((70, 47), side)
    plain.seed = 1
    galore_step([plain], **OPTIONS)
    assert torch.equal(plain.weight, wide.weight)


def test_rounding_keeps_what_is_not_finite():
    m = make((3, 4), "whole", dtype=torch.bfloat16)
    m.weight[0] = torch.tensor([math.inf, -math.inf, math.nan, 3.3e38])
    m.seed = 9
    galore_step([m], lr=0.0)
    assert torch.equal(m.weight[0, :2].float(), torch.tensor([math.inf, -math.inf]))
    assert m.weight[0, 2].isnan()
    assert m.weight[0, 3] == torch.tensor(3.3e38).bfloat16()


@pytest.mark.parametrize(
    ("weight", "grad", "state"),
    [
        (torch.float64, torch.float64, F64), (torch.float32, torch.float32, torch.bfloat16),
        (torch.float64, torch.float32, torch.float32), (torch.bfloat16, torch.float32, torch.float32),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("side", ["left", "whole"])
def test_dtypes_that_differ(side, weight, grad, state):
    """Of state, those that have no kernel take the reference, without a word."""
    m = make((9, 12), side, history=torch.float32 if side == "left" else None)
    m.weight, m.grad = m.weight.to(weight), m.grad.to(grad)
    for name in ("left", "exp_avg", "exp_avg_sq"):
        if getattr(m, name) is not None:
            setattr(m, name, getattr(m, name).to(state))
    other = copy.deepcopy(m)
    galore_step([m], **OPTIONS, damping=Damping(0.3))
    by_reference([other], Damping(0.3))
    assert torch.allclose(m.weight, other.weight, rtol=1e-2 if weight == torch.bfloat16 else 1e-5)
    assert m.weight.dtype == weight


# ---------------------------------------------------------------------------- registration, bad input


def test_opcheck(monkeypatch):
    calls = []
    op = galore._galore_step
    monkeypatch.setattr(galore, "_galore_step", lambda *args: calls.append(copy.deepcopy(args)) or op(*args))
    galore_step([make((12, 9), "right", history=torch.float32, fill=2, slot=2)], **OPTIONS, damping=Damping(0.3))
    galore_step([make((5, 4), "whole", dtype=torch.bfloat16)], **OPTIONS)
    for args in calls:
        torch.library.opcheck(torch.ops.deftcore.galore_step.default, args)


def test_what_is_changed_in_place_is_counted():
    m = make((12, 9), "right", history=torch.float32)
    changed = [m.weight, m.exp_avg, m.exp_avg_sq, m.window.history, m.window.gram, m.window.failures]
    before = [x._version for x in changed]
    galore_step([m], **OPTIONS, damping=Damping(0.3))
    assert all(x._version > old for x, old in zip(changed, before, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(12)}, "weight: must be a matrix"),
        ({"weight": torch.zeros(12, 9, dtype=torch.int32)}, "weight: dtype"),
        ({"grad": torch.zeros(12, 8)}, "grad: shape must be .12, 9."),
        ({"grad": torch.zeros(12, 9).to_sparse()}, "grad: must be a dense"),
        ({"right": torch.zeros(8, 5)}, "right: shape must be .9, r."),
        ({"right": torch.zeros(9, 5, dtype=F64)}, "right: dtype must be torch.float32 as exp_avg"),
        ({"exp_avg": torch.zeros(12, 9)}, "exp_avg: shape must be .12, 5."),
        ({"exp_avg_sq": torch.zeros(12, 5, device="meta")}, "exp_avg_sq: must be on cpu"),
        ({"projected": True}, "grad: shape must be .12, 5."),
        ({"age": 0}, "age: must be an integer of at least 1"),
        ({"seed": -1}, "seed: must be an integer of at least 0"),
    ],
)
def test_bad_matrices(change, message):
    m = make((12, 9), "right", history=torch.float32)
    before = m.weight.clone()
    good = make((12, 9), "right")
    kept = good.weight.clone()
    for name, value in change.items():
        setattr(m, name, value)
    with pytest.raises((TypeError, ValueError), match=message):
        galore_step([good, m], **OPTIONS, damping=Damping(0.3))
    assert torch.equal(good.weight, kept)
    assert "weight" in change or torch.equal(m.weight, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"history": torch.zeros(0, 60)}, "history: shape must be .1, 60."),
        ({"history": torch.zeros(6, 59)}, "history: shape must be .6, 60."),
        ({"gram": torch.zeros(5, 6, dtype=F64)}, "gram: shape"),
        ({"gram": torch.zeros(6, 6)}, "gram: dtype must be torch.float64"),
        ({"failures": torch.zeros((), dtype=torch.int32)}, "failures: dtype must be torch.int64"),
        ({"slot": 6}, "slot, fill"), ({"slot": 1}, "slot, fill"), ({"slot": -1}, "slot, fill"),
        ({"fill": 7}, "slot, fill"),
    ],
)  # fmt: skip
def test_bad_windows(change, message):
    m = make((12, 9), "right", history=torch.float32)
    for name, value in change.items():
        setattr(m.window, name, value)
    with pytest.raises((TypeError, ValueError), match=message):
        galore_step([m], **OPTIONS, damping=Damping(0.3))


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0}, {"lr": math.nan}, {"eps": "small"}, {"betas": (0.9, 1.0)}, {"betas": (0.9,)},
        {"weight_decay": -0.1}, {"scale": math.inf}, {"damping": Damping(0.0)},
    ],
)  # fmt: skip
def test_bad_options(options):
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        galore_step([make((12, 9), "right")], **{**OPTIONS, **options})
