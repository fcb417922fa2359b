"""Penalties on logits, by blocks of rows: no copy of [tokens, vocabulary] in float32 is made, but for the nuclear norm,
which takes all singular vectors.

A block's gradient is computed with its value, in the forward, into one buffer of the logits' own dtype; the backward
scales it. In float16 the buffer holds a power of two times the gradient, so that small entries are not lost.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deftcore.ops.checks import check_choice, check_float, check_number, check_shape

_BLOCK = 1 << 20  # elements of a block in float32: 4 MB
_OVERSAMPLING, _ITERATIONS = 5, 2  # of the randomised singular values
_FEW = 96  # rows up to which all inner products cost less than the random projections
_NOTHING = 1e-8  # norms below it have no spectrum
_TOP, _MOST = 14, 64  # exponents: of the largest entry that a float16 buffer should hold, and of what that may take
_SEED = 0xBA


class LogitPenalties(NamedTuple):
    """The weighted sum, differentiable, and its terms' values before weighting, of which those of weight 0 are 0."""

    total: Tensor
    consistency: Tensor
    diversity: Tensor
    spectral: Tensor


def logit_penalties(
    student: Tensor,
    teacher: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    consistency: float = 0.0,
    diversity: float = 0.0,
    spectral: float = 0.0,
    temperature: float = 2.0,
    top_k: int = 20,
    k: int = 10,
    norm: str = "frobenius",
    vocabulary: int | None = None,
) -> LogitPenalties:
    """The penalties of BA-LoRA on a language model's logits (arXiv 2408.04556, v6), over the M tokens that count:

        consistency   T^2 KL(softmax(teacher / T) | softmax(student / T)), mean over tokens
        diversity     minus the entropy of the top_k largest logits' softmax, mean over tokens
        spectral      minus the sum of the k largest singular values of the [M, V] logits over their Frobenius norm

    Args:
        student: [..., V], any floating dtype; the only argument that is differentiated. Terms are computed in float32,
            float64 for float64.
        teacher: of the student's shape, any floating dtype; only for `consistency`.
        mask: [...] bool, the tokens that count; None is all.
        consistency, diversity, spectral: weights; a term of weight 0 is not computed.
        temperature: T, above 0.
        top_k: 0 is the whole vocabulary.
        k: at most as many as there are count.
        norm: of `spectral`: "frobenius", or "nuclear", the sum of all singular values, which takes all inner products
            and as many numbers in float32 as there are logits.
        vocabulary: the entries beyond, padding of the vocabulary, count in no term; None: all of V do. Entries of
            minus infinity have no probability, and are 0 in the spectral term.

    Returns:
        Scalars in float32 or wider. Without a token, and with a norm below 1e-8 or a side below 2 in the spectral
        term, a term is 0; so is a spectral term that is not finite.

    Raises:
        TypeError, ValueError: naming the argument.

    >>> two = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    >>> round(logit_penalties(two, spectral=1.0, k=1).total.item(), 6)
    -0.8
    """
    check_float("student", student)
    if student.dim() < 1:
        raise ValueError(f"student: must be logits [..., V], got shape {tuple(student.shape)}")
    weights = [check_number(name, value, minimum=0.0) for name, value in (
        ("consistency", consistency), ("diversity", diversity), ("spectral", spectral))]  # fmt: skip
    check_number("temperature", temperature, minimum=0.0, strict=True)
    for name, value, least in (("top_k", top_k, 0), ("k", k, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: must be an integer of at least {least}, got {value!r}")
    check_choice("norm", norm, ("frobenius", "nuclear"))
    width = student.shape[-1]
    if vocabulary is not None and not 1 <= vocabulary <= width:
        raise ValueError(f"vocabulary: must be from 1 to {width} (student.shape[-1]), got {vocabulary}")
    if weights[0] and teacher is None:
        raise ValueError("teacher: consistency needs the pre-trained model's logits, got None")
    if teacher is not None:
        check_float("teacher", teacher)
        check_shape("teacher", teacher, tuple(student.shape), "as student")
        if teacher.device != student.device:
            raise ValueError(f"teacher: must be on {student.device} as student, got {teacher.device}")
    if mask is not None:
        check_shape("mask", mask, tuple(student.shape[:-1]), "a token each")
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: must be bool, got {mask.dtype}")
    options = (float(temperature), top_k, k, norm, width if vocabulary is None else vocabulary)
    kept = teacher.detach() if teacher is not None and weights[0] else None
    return LogitPenalties(*_LogitPenalties.apply(student, kept, mask, tuple(weights), options))


class _LogitPenalties(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor | None, mask: Tensor | None, weights: tuple[float, ...],
        options: tuple,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        temperature, top_k, k, norm, width = options
        rows = Rows(student, mask, width)
        zero = torch.zeros((), dtype=rows.dtype, device=student.device)
        values = [zero.clone(), zero.clone(), zero.clone()]
        wanted = ctx.needs_input_grad[0]
        grad = torch.zeros_like(student, memory_format=torch.contiguous_format) if wanted else None
        flat_grad = None if grad is None else grad.view(-1, student.shape[-1])
        flat_teacher = None if teacher is None else teacher.reshape(-1, student.shape[-1])
        spectrum = top_spectrum(rows, k, norm) if weights[2] and rows.count else None
        if spectrum is not None:
            values[2] = spectrum.value
        scale = _scale(student.dtype, weights, options, rows.count, spectrum) if wanted else 1.0
        for block in rows.blocks() if rows.count and (weights[0] or weights[1] or wanted) else ():
            z = rows.values(block)
            slope = torch.zeros_like(z)
            if weights[0]:
                assert flat_teacher is not None
                t = flat_teacher[rows.index[block], :width].to(z.dtype)
                value, part = _consistency(z, t, temperature)
                values[0] += value / rows.count
                slope.add_(part, alpha=weights[0] / rows.count)
            if weights[1]:
                value, part = _diversity(z, top_k)
                values[1] += value / rows.count
                slope.add_(part, alpha=weights[1] / rows.count)
            if flat_grad is None:
                continue
            if spectrum is not None:
                slope.add_(spectrum.slope(z, block), alpha=weights[2])
            flat_grad[rows.index[block], :width] = slope.mul_(scale).to(flat_grad.dtype)
        total = sum((weight * value for weight, value in zip(weights, values, strict=True)), zero)
        ctx.save_for_backward(*(() if grad is None else (grad,)))
        ctx.scale = scale
        ctx.mark_non_differentiable(*values)
        return total, *values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
        (slope,) = ctx.saved_tensors
        factor, result = grad / ctx.scale, torch.empty_like(slope)
        # by blocks in the factor's dtype: float16 does not hold what a loss is scaled by
        for part, out in zip(slope.view(-1).split(_BLOCK), result.view(-1).split(_BLOCK), strict=True):
            out.copy_(part.to(factor.dtype) * factor)
        return result, None, None, None, None


def _scale(
    dtype: torch.dtype, weights: tuple[float, ...], options: tuple, count: int, spectrum: "Spectrum | None"
) -> float:
    """The power of two that a buffer of this dtype holds the gradient times; 1 but for float16."""
    if dtype != torch.float16 or not count:
        return 1.0
    temperature, width = options[0], options[-1]
    # |T (q - p)| <= T, |p (log p + H)| <= max(1 / e, log V)
    most = (weights[0] * temperature + weights[1] * max(1.0, math.log(width))) / count
    most += 0.0 if spectrum is None else weights[2] * float(spectrum.most)
    return 2.0 ** min(_TOP - math.frexp(most)[1], _MOST)


class Rows:
    """The rows of logits [..., V] that count, a block of them at a time in float32 or wider."""

    def __init__(self, logits: Tensor, mask: Tensor | None, width: int) -> None:
        self.logits = logits.detach().reshape(-1, logits.shape[-1])
        self.width = width
        self.dtype = torch.promote_types(logits.dtype, torch.float32)
        every = torch.arange(self.logits.shape[0], device=logits.device)
        self.index = every if mask is None else every[mask.reshape(-1)]
        self.count = self.index.numel()

    def blocks(self) -> Iterator[slice]:
        """Ranges of rows that together are all."""
        size = max(1, _BLOCK // max(self.width, 1))
        for start in range(0, self.count, size):
            yield slice(start, min(start + size, self.count))

    def values(self, block: slice) -> Tensor:
        """A block's logits [rows, width]."""
        return self.logits[self.index[block], : self.width].to(self.dtype)

    def finite(self, block: slice) -> Tensor:
        """The same with 0 for minus infinity."""
        z = self.values(block)
        return z.masked_fill_(z == -math.inf, 0.0)


def _consistency(z: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The sum over rows of T^2 KL(p | q), and its gradient T (q - p)."""
    log_q = torch.log_softmax(z / temperature, -1)
    log_p = torch.log_softmax(teacher / temperature, -1)
    p = log_p.exp()
    value = torch.where(p > 0, p * (log_p - log_q), 0.0).sum() * temperature**2
    return value, log_q.exp_().sub_(p).mul_(temperature)


def _diversity(z: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The sum over rows of minus the entropy of the largest logits, and its gradient p (log p + H)."""
    every = not 0 < top_k < z.shape[-1]
    kept, where = (z, None) if every else z.topk(top_k, -1)
    log_p = torch.log_softmax(kept, -1)
    p = log_p.exp()
    of_each = torch.where(p > 0, p * log_p, 0.0)
    entropy = -of_each.sum(-1, keepdim=True)
    slope = of_each.add_(p * entropy)
    if where is not None:
        slope = torch.zeros_like(z).scatter_(-1, where, slope)
    return -entropy.sum(), slope


def mean_entropy(logits: Tensor, *, mask: Tensor | None = None, temperature: float = 1.0,
                 vocabulary: int | None = None) -> Tensor:  # fmt: skip
    """The mean over tokens of the entropy of softmax(logits / temperature), a scalar in float32 or wider; 0 without a
    token.

    Args:
        logits: [..., V]; mask, vocabulary: as in `logit_penalties`.
    """
    rows = Rows(logits, mask, logits.shape[-1] if vocabulary is None else vocabulary)
    total = torch.zeros((), dtype=rows.dtype, device=logits.device)
    for block in rows.blocks():
        total -= _diversity(rows.values(block) / temperature, 0)[0]
    return total / max(rows.count, 1)


# ---------------------------------------------------------------------------- the spectral term


class Spectrum(NamedTuple):
    """The spectral term of rows Z [M, V]: its value, and its gradient u (c v) + share Z."""

    value: Tensor
    u: Tensor  # [M, j]
    v: Tensor  # [j, V], with c
    share: Tensor
    most: Tensor  # which no entry of the gradient exceeds, as u and v are orthonormal

    def slope(self, z: Tensor, block: slice) -> Tensor:
        """The gradient of a block of rows z."""
        finite = z.masked_fill(z == -math.inf, 0.0)
        slope = torch.addmm(finite * self.share, self.u[block], self.v)
        return slope.masked_fill_(z == -math.inf, 0.0)


def top_spectrum(rows: Rows, k: int, norm: str) -> Spectrum | None:
    """Minus the sum of the k largest singular values over their norm; None where there is nothing to say."""
    shorter = min(rows.count, rows.width)
    if shorter < 2:
        return None
    squares = torch.stack([rows.finite(block).square().sum() for block in rows.blocks()])
    frobenius = squares.sum().sqrt()
    if not bool(torch.isfinite(frobenius)) or float(frobenius) < _NOTHING:
        return None
    k = min(k, shorter)
    exact = norm == "nuclear" or rows.count <= _FEW or k + _OVERSAMPLING >= shorter
    u, s, v = _all_values(rows, k if norm == "frobenius" else shorter) if exact else _random_values(rows, k)
    if not bool(torch.isfinite(s).all()):
        return None
    top = s[:k].sum()
    if norm == "frobenius":
        # d sigma_i = u_i v_i^T, d |Z| = Z / |Z|
        share, most = top / frobenius**3, (1 + top / frobenius) / frobenius
        return Spectrum(-top / frobenius, u[:, :k], -v[:k] / frobenius, share, most)
    total = s.sum()
    c = (top - total * (torch.arange(len(s), device=s.device) < k)) / total.square()
    return Spectrum(-top / total, u, v * c.unsqueeze(1), torch.zeros_like(total), c.abs().max())


def _all_values(rows: Rows, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [M, j], S [j] of all singular values that are not lost in rounding, and V^T [at most `most`, V] of the largest,
    from the M x M inner products in float64."""
    gram = torch.zeros(rows.count, rows.count, dtype=torch.float64, device=rows.logits.device)
    width = max(1, _BLOCK // rows.count)
    for start in range(0, rows.width, width):  # all rows of a range of columns
        z = rows.logits[rows.index, start : min(start + width, rows.width)].double()
        z = z.masked_fill_(z == -math.inf, 0.0)
        gram.addmm_(z, z.t())
    squares, u = torch.linalg.eigh(gram)
    found = squares > squares[-1] * 4 * rows.count * torch.finfo(torch.float64).eps
    squares, u = squares[found].flip(0), u[:, found].flip(1)
    s = squares.sqrt()
    left = (u[:, :most] / s[:most]).to(rows.dtype)
    v = torch.zeros(left.shape[1], rows.width, dtype=rows.dtype, device=gram.device)
    for block in rows.blocks():
        v.addmm_(left[block].t(), rows.finite(block))
    return u.to(rows.dtype), s.to(rows.dtype), v


def _random_values(rows: Rows, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [M, j], S [j], V^T [j, V] of the largest singular values, by a random projection and power iterations (Halko et
    al., arXiv 0909.4061): never above the true ones."""
    size = k + _OVERSAMPLING
    generator = torch.Generator().manual_seed(_SEED)
    right = torch.randn(rows.width, size, generator=generator).to(rows.logits.device, rows.dtype)
    for _ in range(_ITERATIONS + 1):
        left = torch.linalg.qr(torch.cat([rows.finite(block) @ right for block in rows.blocks()])).Q
        right = torch.zeros_like(right)
        for block in rows.blocks():
            right.addmm_(rows.finite(block).t(), left[block])
        basis, triangle = torch.linalg.qr(right)
        right = basis
    # Z ~ left (basis triangle)^T
    rotation_v, s, rotation_u = torch.linalg.svd(triangle, full_matrices=False)
    return left @ rotation_u.t(), s, (basis @ rotation_v).t()


# ---------------------------------------------------------------------------- classes, and the definition


def class_penalties(
    student: Tensor,
    teacher: Tensor | None = None,
    *,
    consistency: float = 0.0,
    diversity: float = 0.0,
    spectral: float = 0.0,
    temperature: float = 2.0,
    k: int = 5,
    normalized: bool = False,
) -> LogitPenalties:
    """The penalties of BA-LoRA on a classifier's logits [N, D] (arXiv 2408.04556, v6):

        consistency   T^2 KL(softmax(teacher / T) | softmax(student / T)), mean over the batch
        diversity     sum of the squared covariances of different classes over D
        spectral      minus the share of the k largest singular values in the sum of all

    Args:
        student, teacher: [N, D], any floating dtype; only the student is differentiated.
        consistency, diversity, spectral: weights; a term of weight 0 is not computed.
        normalized: v5's consistency: the mean squared difference of rows scaled to length 1.

    Returns:
        As `logit_penalties`. With one example the diversity is 0; with k of at least min(N, D) the spectral term is -1,
        without a gradient.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_float("student", student)
    if student.dim() != 2:
        raise ValueError(f"student: must be logits [N, D], got shape {tuple(student.shape)}")
    for name, value in (("consistency", consistency), ("diversity", diversity), ("spectral", spectral)):
        check_number(name, value, minimum=0.0)
    check_number("temperature", temperature, minimum=0.0, strict=True)
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k: must be an integer of at least 1, got {k!r}")
    if consistency and teacher is None:
        raise ValueError("teacher: consistency needs the pre-trained model's logits, got None")
    if teacher is not None:
        check_shape("teacher", teacher, tuple(student.shape), "as student")
    z = student.to(torch.promote_types(student.dtype, torch.float32))
    zero = z[:0].sum()  # in the graph
    values = [zero, zero, zero]
    count, classes = z.shape
    if consistency and count:
        assert teacher is not None
        t = teacher.detach().to(z.dtype)
        if normalized:
            unit = torch.nn.functional.normalize
            values[0] = (unit(z, dim=-1) - unit(t, dim=-1)).square().mean()
        else:
            log_q, log_p = (torch.log_softmax(x / temperature, -1) for x in (z, t))
            values[0] = (log_p.exp() * (log_p - log_q)).sum() * (temperature**2 / count)
    if diversity and count > 1:
        centred = z - z.mean(0)
        covariance = centred.t() @ centred / (count - 1)
        values[1] = (covariance - covariance.diag().diag()).square().sum() / classes
    if spectral and count:
        values[2] = _SpectralShare.apply(z, k)
    total = zero + consistency * values[0] + diversity * values[1] + spectral * values[2]
    return LogitPenalties(total, *(value.detach() for value in values))


class _SpectralShare(torch.autograd.Function):
    """Minus the share of the k largest singular values; gradient U diag(c) V^T, c_i = -([i <= k] sum - top) / sum^2."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, k: int) -> Tensor:
        u, s, vt = torch.linalg.svd(z, full_matrices=False)
        total, top = s.sum(), s[:k].sum()
        if not bool(torch.isfinite(total)) or float(total) < _NOTHING:
            ctx.save_for_backward(torch.zeros_like(z))
            return z.new_zeros(())
        if k >= len(s):
            ctx.save_for_backward(torch.zeros_like(z))
            return z.new_full((), -1.0)
        c = (top - total * (torch.arange(len(s), device=s.device) < k)) / total.square()
        ctx.save_for_backward((u * c) @ vt)
        return -top / total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return slope * grad, None


def logit_penalties_ref(
    student: Tensor, teacher: Tensor, temperature: float, top_k: int, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The three terms of rows [M, V], in plain PyTorch; any floating dtype."""
    log_q, log_p = (torch.log_softmax(x / temperature, -1) for x in (student, teacher))
    consistency = (log_p.exp() * (log_p - log_q)).sum(-1).mean() * temperature**2
    kept = student if top_k == 0 else student.topk(min(top_k, student.shape[-1]), -1).values
    log_kept = torch.log_softmax(kept, -1)
    diversity = (log_kept.exp() * log_kept).sum(-1).mean()
    values = torch.linalg.svdvals(student)
    return consistency, diversity, -values[:k].sum() / torch.linalg.matrix_norm(student)
