"""One optimizer step of matrices whose state lives in a subspace of their gradients (GaLore, Natural GaLore).

The products with a subspace's factors are a library's; what stands between them is one native call over many matrices.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deftcore.ops._library import define
from deftcore.ops.checks import check_float, check_like, check_number, check_shape
from deftcore.ops.galore_matrix import AdamMatrix, back_project, galore_step_ref, project, update
from deftcore.ops.kernels import DTYPE_CODES, address, backend, give_workspace, native, runs_cuda, stream
from deftcore.ops.natural import Damping, Window
from deftcore.ops.products import add_product_

# Bytes that one native call goes over: on a CPU what may stay in a cache between the two readings of a window, on a GPU
# enough to fill it.
_BYTES_OF_CALL = {"cpu": 1 << 24, "cuda": 1 << 28}
_HELD, _ALONE, _EMPTY = range(3)  # what became of a window: it held, it has the current gradient alone, it has none


def galore_step(
    matrices: Sequence[AdamMatrix],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    scale: float = 1.0,
    correct_bias: bool = True,
    damping: Damping | None = None,
) -> None:
    """One step of every matrix: R = L^T G Q; N = F^-1 R; U = Adam(N); W -= lr scale L U Q^T; W -= lr weight_decay W.

    Das, *Natural GaLore*, arXiv 2410.16029, section 3; Zhao et al., *GaLore*, arXiv 2403.03507. A window whose K
    + lambda I has no Cholesky factor does not hold: it starts anew with R alone, so that N = R / (lambda + |R|^2), and
    the failure is counted. Where |R|^2 is infinite or NaN, N is R / lambda, and the window is empty.

    Moments in float32 with windows in float32 or bfloat16 have native kernels; others run on the reference. On a GPU
    each kind of matrix with a window waits once for the device, to know which windows held.

    Args:
        matrices: their dtypes, shapes and sides may differ.
        damping: of those with a window; None leaves their windows alone.

    Raises:
        TypeError, ValueError: naming the argument; nothing is changed.
    """
    numbers = (
        check_number("lr", lr, minimum=0.0), *(check_number("betas", beta, minimum=0.0) for beta in betas),
        check_number("eps", eps, minimum=0.0), check_number("weight_decay", weight_decay, minimum=0.0),
        check_number("scale", scale, minimum=0.0),
    )  # fmt: skip
    if len(betas) != 2 or max(betas) >= 1:
        raise ValueError(f"betas: must be two numbers in [0, 1), got {betas}")
    if not isinstance(correct_bias, bool):
        raise TypeError(f"correct_bias: must be True or False, got {correct_bias!r}")
    if damping is not None:
        if not isinstance(damping, Damping):
            raise TypeError(f"damping: must be a Damping or None, got {type(damping).__name__}")
        check_number("damping", damping.value, minimum=0.0, strict=True)
    groups: dict[_Kind, list[AdamMatrix]] = {}
    for matrix in matrices:
        _check_matrix(matrix)
        groups.setdefault(_Kind.of(matrix, damping), []).append(matrix)
    value, mode, norm = (1.0, "absolute", "sum") if damping is None else (damping.value, damping.mode, damping.norm)
    options = (*numbers, correct_bias, value, mode == "relative", norm == "mean")
    for kind, group in groups.items():
        windows = [m.window for m in group if m.window is not None and kind.history is not None]
        outcomes = _galore_step(
            [m.weight for m in group], [m.grad for m in group],
            [m.left for m in group if m.left is not None], [m.right for m in group if m.right is not None],
            [m.exp_avg for m in group], [m.exp_avg_sq for m in group],
            [w.history for w in windows], [w.gram for w in windows], [w.failures for w in windows],
            [m.age for m in group], [w.slot for w in windows], [w.fill for w in windows],
            [m.seed for m in group if m.seed is not None], kind.projected, *options,
        )  # fmt: skip
        for window, outcome in zip(windows, outcomes.tolist() if windows else [], strict=True):
            if outcome != _HELD:
                window.slot = window.fill = 0
            if outcome != _EMPTY:
                window.move_on()


class _Kind(NamedTuple):
    """What matrices of one call have in common."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    history: torch.dtype | None  # None: there is no window, or none that counts
    left: bool
    right: bool
    projected: bool
    stochastic: bool

    @classmethod
    def of(cls, m: AdamMatrix, damping: Damping | None) -> "_Kind":
        history = None if m.window is None or damping is None else m.window.history.dtype
        sides = m.left is not None, m.right is not None
        dtypes = m.weight.dtype, m.grad.dtype, m.exp_avg.dtype
        return cls(m.weight.device, dtypes, history, *sides, m.projected, m.seed is not None)


def _check_matrix(m: AdamMatrix) -> None:
    """Raises unless its tensors belong together."""
    check_float("weight", m.weight)
    check_float("grad", m.grad)
    check_float("exp_avg", m.exp_avg)
    shape = m.weight.shape
    if m.left is not None or m.right is not None:
        if m.weight.dim() != 2:
            raise ValueError(f"weight: must be a matrix where there is a factor, got shape {tuple(shape)}")
        compact = list(shape)
        for side, (name, factor) in enumerate((("left", m.left), ("right", m.right))):
            if factor is None:
                continue
            check_like(name, factor, "exp_avg", m.exp_avg)
            if factor.dim() != 2 or factor.shape[0] != shape[side]:
                raise ValueError(f"{name}: shape must be ({shape[side]}, r), got {tuple(factor.shape)}")
            compact[side] = factor.shape[1]
        shape = torch.Size(compact)
    check_like("exp_avg_sq", m.exp_avg_sq, "exp_avg", m.exp_avg)
    for name, x in (("exp_avg", m.exp_avg), ("exp_avg_sq", m.exp_avg_sq)):
        check_shape(name, x, tuple(shape), "the projected gradient's")
    check_shape("grad", m.grad, tuple(shape if m.projected else m.weight.shape), "the gradient's, projected or not")
    for name, x in (("grad", m.grad), ("exp_avg", m.exp_avg)):
        if x.device != m.weight.device:
            raise ValueError(f"{name}: must be on {m.weight.device} as weight, got {x.device}")
    for name, number, least in (("age", m.age, 1), ("seed", m.seed or 0, 0)):
        if isinstance(number, bool) or not isinstance(number, int) or not least <= number < 2**63:
            raise ValueError(f"{name}: must be an integer of at least {least}, got {number!r}")
    if m.window is not None:
        _check_window(m.window, m.exp_avg)


def _check_window(window: Window, like: Tensor) -> None:
    check_float("history", window.history)
    rows = window.history.shape[0] if window.history.dim() else 0
    check_shape("history", window.history, (max(rows, 1), like.numel()), "a row per gradient")
    check_shape("gram", window.gram, (rows, rows), "products of the rows")
    check_shape("failures", window.failures, (), "a number")
    for name, x, dtype in (("gram", window.gram, torch.float64), ("failures", window.failures, torch.int64)):
        if x.dtype != dtype:
            raise TypeError(f"{name}: dtype must be {dtype}, got {x.dtype}")
    for name, x in (("history", window.history), ("gram", window.gram), ("failures", window.failures)):
        if x.device != like.device:
            raise ValueError(f"{name}: must be on {like.device} as exp_avg, got {x.device}")
    fits = all(isinstance(n, int) and not isinstance(n, bool) for n in (window.slot, window.fill))
    if not fits or not (0 <= window.slot < rows and window.slot <= window.fill <= rows):
        raise ValueError(
            f"slot, fill: must be a row and how many are filled of {rows}, got {window.slot}, {window.fill}"
        )


# ---------------------------------------------------------------------------- galore_step


class _Options(NamedTuple):
    """Numbers of a step; their order is that of the schema."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    scale: float
    correct_bias: bool
    damping: float
    relative: bool
    mean: bool

    @property
    def rate(self) -> float:
        return self.lr * self.scale

    @property
    def keep(self) -> float:
        """What decay leaves of a weight."""
        return 1 - self.lr * self.weight_decay


def _galore_step_impl(
    weights: list[Tensor],
    grads: list[Tensor],
    lefts: list[Tensor],
    rights: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    histories: list[Tensor],
    grams: list[Tensor],
    failures: list[Tensor],
    ages: list[int],
    slots: list[int],
    fills: list[int],
    seeds: list[int],
    projected: bool,
    *numbers: Any,
) -> Tensor:
    """What became of each window. Lists that this kind of matrix has no use for are empty."""
    none: list[Any] = [None] * len(weights)
    windows = [Window(*each) for each in zip(histories, grams, slots, fills, failures, strict=True)] or none
    matrices = [
        AdamMatrix(
            weight=weight, grad=grad, left=left, right=right, window=window, projected=projected, seed=seed,
            exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, age=age,
        )
        for weight, grad, left, right, window, seed, exp_avg, exp_avg_sq, age in zip(
            weights, grads, lefts or none, rights or none, windows, seeds or none, exp_avgs, exp_avg_sqs, ages,
            strict=True,
        )
    ]  # fmt: skip
    like, options = exp_avgs[0], _Options(*numbers)
    outcomes = torch.zeros(len(weights), dtype=torch.int64, device=like.device)
    fits = like.dtype == torch.float32 and all(h.dtype in (torch.float32, torch.bfloat16) for h in histories)
    kernels = backend("galore_step", like) if fits else None
    if kernels is None:
        for i, matrix in enumerate(matrices):
            outcomes[i] = _step_by_reference(matrix, options)
        return outcomes
    for begin, end in _calls(matrices):
        _step_natively(kernels, matrices[begin:end], outcomes[begin:end], options)
    return outcomes


def _step_by_reference(matrix: AdamMatrix, o: _Options) -> int:
    window = matrix.window
    before = 0 if window is None else int(window.failures)
    damping = Damping(o.damping, "relative" if o.relative else "absolute", "mean" if o.mean else "sum")
    galore_step_ref(matrix, o.lr, (o.beta1, o.beta2), o.eps, o.weight_decay, o.scale, o.correct_bias, damping)
    if window is None or int(window.failures) == before:
        return _HELD
    return _ALONE if window.fill else _EMPTY


def _calls(matrices: list[AdamMatrix]) -> Iterator[tuple[int, int]]:
    """Bounds of the native calls' matrices."""
    most = _BYTES_OF_CALL["cuda" if runs_cuda(matrices[0].exp_avg) else "cpu"]
    begin = size = 0
    for i, m in enumerate(matrices):
        more = 4 * m.exp_avg.nbytes + (0 if m.window is None else m.window.history.nbytes)
        if i > begin and size + more > most:
            yield begin, i
            begin, size = i, 0
        size += more
    yield begin, len(matrices)


class _Dense:
    """Tensors as one piece of memory each: copies where they are not, which are copied back at the end."""

    def __init__(self) -> None:
        self._copies: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor) -> Tensor:
        if x.is_contiguous():
            return x
        copy = x.contiguous()
        self._copies.append((x, copy))
        return copy

    def copy_back(self) -> None:
        for x, copy in self._copies:
            x.copy_(copy)


def _step_natively(kernels: Any, matrices: list[AdamMatrix], outcomes: Tensor, o: _Options) -> None:
    first, like = matrices[0], matrices[0].exp_avg
    sided = first.left is not None or first.right is not None
    # Then the weights change in the same pass.
    whole = not sided and first.window is None and first.grad.dtype == first.weight.dtype and _has_code(first.weight)
    dense, rows, outs = _Dense(), [], []
    for i, m in enumerate(matrices):
        if whole:
            grad, out = m.grad.contiguous(), dense(m.weight)
        elif sided and not m.projected:
            grad = out = project(m.grad, m.left, m.right).contiguous()
        else:
            grad = m.grad.to(like.dtype).contiguous()
            out = torch.empty_like(grad)
        w, moments = m.window, (dense(m.exp_avg), dense(m.exp_avg_sq))
        outs.append((grad, out, *moments))
        row = dict.fromkeys(native.galore_matrix.split(", "), 0)
        row |= {"grad": address(grad), "out": address(out), "elements": grad.numel(), "age": m.age, "seed": m.seed or 0}
        row |= {"exp_avg": address(moments[0]), "exp_avg_sq": address(moments[1])}
        row |= {"outcome": address(outcomes) + i * outcomes.itemsize}
        if w is not None:
            history, gram = dense(w.history), dense(w.gram)
            row |= {"history": address(history), "gram": address(gram), "failures": address(w.failures)}
            row |= {"rows": history.shape[0], "slot": w.slot, "fill": w.fill}
        rows.append(row)
    table = torch.tensor([list(row.values()) for row in rows])  # in the host's memory
    args = native.GaloreStep(
        matrices=address(table), workspace=0, count=len(rows), elements=sum(row["elements"] for row in rows),
        rows=max(row["rows"] for row in rows), dtype=DTYPE_CODES[first.weight.dtype if whole else like.dtype],
        history_dtype=DTYPE_CODES[like.dtype if first.window is None else first.window.history.dtype], whole=whole,
        stochastic=first.seed is not None, correct_bias=o.correct_bias, relative=o.relative, mean=o.mean,
        damping=o.damping, beta1=o.beta1, beta2=o.beta2, eps=o.eps, rate=o.rate, keep=o.keep,
    )  # fmt: skip
    _held = give_workspace(args, kernels.galore_step_workspace(args), like)
    kernels.galore_step(args, stream(like))
    dense.copy_back()
    if not whole:
        for m, (_, out, *_) in zip(matrices, outs, strict=True):
            _change_weight(kernels, m, out.view(m.exp_avg.shape), o)


def _change_weight(kernels: Any, m: AdamMatrix, u: Tensor, o: _Options) -> None:
    """W = keep (W - rate L U Q^T)."""
    if m.weight.dtype == u.dtype and (m.left is not None or m.right is not None):  # the change is not written
        pair = (u, m.right.t()) if m.left is None else (m.left, back_project(u, None, m.right))  # type: ignore[union-attr]
        add_product_(m.weight, *pair, beta=o.keep, alpha=-o.rate * o.keep)
        return
    change = back_project(u, m.left, m.right).contiguous()
    if not _has_code(m.weight):
        return update(m.weight, change, o.rate, o.lr * o.weight_decay, m.seed)
    dense = _Dense()
    weight = dense(m.weight)
    args = native.GaloreUpdate(
        weight=address(weight), change=address(change), elements=weight.numel(), seed=m.seed or 0,
        dtype=DTYPE_CODES[weight.dtype], stochastic=m.seed is not None, rate=o.rate, keep=o.keep,
    )  # fmt: skip
    kernels.galore_update(args, stream(weight))
    dense.copy_back()


def _has_code(x: Tensor) -> bool:
    return x.dtype in DTYPE_CODES


def _galore_step_fake(weights: list[Tensor], *_: Any) -> Tensor:
    return weights[0].new_empty(len(weights), dtype=torch.int64)


_galore_step = define(
    "galore_step(Tensor(a!)[] weights, Tensor[] grads, Tensor[] lefts, Tensor[] rights, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] histories, Tensor(e!)[] grams, Tensor(f!)[] failures, int[] ages, "
    "int[] slots, int[] fills, int[] seeds, bool projected, float lr, float beta1, float beta2, float eps, "
    "float weight_decay, float scale, bool correct_bias, float damping, bool relative, bool mean) -> Tensor",
    _galore_step_impl,
    _galore_step_fake,
)
