"""Penalties on logits, without a copy of [tokens, vocabulary] in float32: the forward keeps a few numbers a row, and of
these and the logits themselves the backward makes the gradient.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deftcore.ops._library import define
from deftcore.ops.checks import check_choice, check_count, check_float, check_number, check_shape
from deftcore.ops.logit_rows import (
    DIVERGENCE,
    ENTROPY,
    STATS,
    Rows,
    Sharpness,
    Slopes,
    row_stats,
    rows_gradient,
    top_logits,
)
from deftcore.ops.spectrum import spectrum, spectrum_rank


class LogitPenalties(NamedTuple):
    """The weighted sum, differentiable, and its terms' values before weighting, of which those of weight 0 are 0."""

    total: Tensor
    consistency: Tensor
    diversity: Tensor
    spectral: Tensor


def logit_penalties(
    student: Tensor, teacher: Tensor | None = None, *, mask: Tensor | None = None, consistency: float = 0.0,
    diversity: float = 0.0, spectral: float = 0.0, temperature: float = 2.0, top_k: int = 20, k: int = 10,
    norm: str = "frobenius", vocabulary: int | None = None,
) -> LogitPenalties:  # fmt: skip
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
        norm: of `spectral`: "frobenius", or "nuclear", the sum of all singular values, which takes all inner
            products.
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
    if student.dim() < 1 or student.shape[-1] < 1:
        raise ValueError(f"student: must be logits [..., V] of at least one word, got shape {tuple(student.shape)}")
    weights = [check_number(name, value, minimum=0.0) for name, value in (
        ("consistency", consistency), ("diversity", diversity), ("spectral", spectral))]  # fmt: skip
    check_number("temperature", temperature, minimum=0.0, strict=True)
    for name, value, least in (("top_k", top_k, 0), ("k", k, 1)):
        check_count(name, value, minimum=least)
    check_choice("norm", norm, ("frobenius", "nuclear"))
    width = _check_vocabulary("student", student, vocabulary)
    if weights[0] and teacher is None:
        raise ValueError("teacher: consistency needs the pre-trained model's logits, got None")
    if teacher is not None:
        check_teacher(teacher, student)
    _check_mask(mask, student)
    terms = _logit_terms(
        student, teacher.detach() if teacher is not None and weights[0] else None, mask, width, float(temperature),
        top_k if weights[1] else None, k if weights[2] else None, norm == "nuclear",
    )[0].unbind()  # fmt: skip
    total = sum(weight * term for weight, term in zip(weights, terms, strict=True))
    return LogitPenalties(total, *(term.detach() for term in terms))


def mean_entropy(logits: Tensor, *, mask: Tensor | None = None, temperature: float = 1.0,
                 vocabulary: int | None = None) -> Tensor:  # fmt: skip
    """The mean over tokens of the entropy of softmax(logits / temperature), a scalar in float32 or wider; 0 without a
    token. Not differentiable.

    Args:
        logits: [..., V]; mask, vocabulary: as in `logit_penalties`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_float("logits", logits)
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits: must be [..., V] of at least one word, got shape {tuple(logits.shape)}")
    check_number("temperature", temperature, minimum=0.0, strict=True)
    _check_mask(mask, logits)
    return _mean_entropy(logits.detach(), mask, _check_vocabulary("logits", logits, vocabulary), float(temperature))


def check_teacher(teacher: Tensor, student: Tensor) -> None:
    """Raises TypeError or ValueError unless it has logits of the student's shape, on its device."""
    check_float("teacher", teacher)
    check_shape("teacher", teacher, tuple(student.shape), "as student")
    if teacher.device != student.device:
        raise ValueError(f"teacher: must be on {student.device} as student, got {teacher.device}")


def _check_mask(mask: Tensor | None, logits: Tensor) -> None:
    if mask is None:
        return
    check_shape("mask", mask, tuple(logits.shape[:-1]), "a token each")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: must be bool, got {mask.dtype}")
    if mask.device != logits.device:
        raise ValueError(f"mask: must be on {logits.device} as the logits, got {mask.device}")


def _check_vocabulary(name: str, logits: Tensor, vocabulary: int | None) -> int:
    width = logits.shape[-1]
    if vocabulary is None:
        return width
    if isinstance(vocabulary, bool) or not isinstance(vocabulary, int) or not 1 <= vocabulary <= width:
        raise ValueError(f"vocabulary: must be from 1 to {width} ({name}.shape[-1]), got {vocabulary!r}")
    return vocabulary


# ---------------------------------------------------------------------------- the op


class _Options(NamedTuple):
    """What an op call says of its terms; the consistency is wanted where there is a teacher."""

    width: int
    temperature: float
    top_k: int | None
    k: int | None
    nuclear: bool

    @property
    def kept(self) -> int:
        """Logits of a row that the diversity is of, where these are not all."""
        return self.top_k if self.top_k is not None and 0 < self.top_k < self.width else 0

    @property
    def sharpness(self) -> Sharpness:
        every = self.top_k is not None and not self.kept
        return Sharpness(1 / self.temperature, 1.0 if every else 0.0)

    def rank(self, tokens: int) -> int:
        return 0 if self.k is None else spectrum_rank(tokens, self.width, self.k, self.nuclear)


def _logit_terms_impl(
    student: Tensor, teacher: Tensor | None, mask: Tensor | None, *given: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = _Options(*given)
    rows = Rows.of(student, teacher, mask, options.width)
    stats = row_stats(rows, options.sharpness)
    consistency = stats[:, DIVERGENCE].sum() * options.temperature**2
    diversity = -stats[:, ENTROPY].sum()
    kept = torch.empty(len(rows), options.kept, dtype=torch.int32, device=student.device)
    kept_slope = stats.new_empty(len(rows), options.kept)
    if options.kept:
        kept = top_logits(rows, options.kept)
        minus_entropy, kept_slope = _kept_entropy(rows, kept)
        diversity = minus_entropy.sum()
    if options.k is None:
        value, share = stats.new_zeros(()), stats.new_zeros(())
        left, right = stats.new_empty(len(rows), 0), stats.new_empty(len(rows), 0)
    else:
        value, left, right, share = spectrum(rows, stats, options.k, options.nuclear)
    terms = torch.stack([consistency / rows.divisor, diversity / rows.divisor, value])
    return terms, stats, kept, kept_slope, left, right, share


def _kept_entropy(rows: Rows, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Minus the entropy [N] of the softmax of a row's kept logits, and its gradient p (log p + entropy) [N, K]."""
    z = rows.logits.gather(1, kept.clamp(min=0).long()).to(rows.dtype)
    none = (kept < 0) | (z == -math.inf)
    log_p = torch.log_softmax(z.masked_fill(none, -math.inf), 1)
    p = log_p.exp()
    of_each = (p * log_p).masked_fill(none, 0.0)
    minus_entropy = of_each.sum(1)
    return minus_entropy, (of_each - p * minus_entropy.unsqueeze(1)).masked_fill(none, 0.0)


def _logit_terms_fake(
    student: Tensor, teacher: Tensor | None, mask: Tensor | None, *given: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    options, tokens = _Options(*given), student.shape[:-1].numel()
    rank = options.rank(tokens)

    def wide(*shape: int) -> Tensor:
        return student.new_empty(shape, dtype=torch.promote_types(student.dtype, torch.float32))

    kept = student.new_empty((tokens, options.kept), dtype=torch.int32)
    return (
        wide(3),
        wide(tokens, STATS),
        kept,
        wide(tokens, options.kept),
        wide(tokens, rank),
        wide(tokens, rank),
        wide(),
    )


def _logit_terms_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    student, teacher, mask, *ctx.options = inputs
    ctx.save_for_backward(student, teacher, mask, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _logit_terms_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
    found = None if grad is None else _logit_terms_backward_op(*ctx.saved_tensors, grad, *ctx.options)
    return found, *(None,) * (2 + len(ctx.options))


def _logit_terms_backward_impl(
    student: Tensor, teacher: Tensor | None, mask: Tensor | None, stats: Tensor, kept: Tensor, kept_slope: Tensor,
    left: Tensor, right: Tensor, share: Tensor, grad: Tensor, *given: Any,
) -> Tensor:  # fmt: skip
    options = _Options(*given)
    rows = Rows.of(student, teacher, mask, options.width)
    of_consistency, of_diversity, of_spectrum = grad.unbind()
    of_consistency, of_diversity = of_consistency * options.temperature / rows.divisor, of_diversity / rows.divisor
    terms = torch.stack([of_consistency, of_diversity, of_spectrum * share])
    slopes = Slopes(terms, kept, kept_slope * of_diversity, left * of_spectrum, right)
    return rows_gradient(rows, stats, options.sharpness, slopes).view(student.shape)


def _logit_terms_backward_fake(student: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(student, memory_format=torch.contiguous_format)


def _mean_entropy_impl(logits: Tensor, mask: Tensor | None, width: int, temperature: float) -> Tensor:
    rows = Rows.of(logits, None, mask, width)
    return row_stats(rows, Sharpness(1.0, 1 / temperature))[:, ENTROPY].sum() / rows.divisor


def _mean_entropy_fake(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty((), dtype=torch.promote_types(logits.dtype, torch.float32))


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


_OPTIONS = "int width, float temperature, int? top_k, int? k, bool nuclear"
_logit_terms_backward_op = define(
    "logit_terms_backward(Tensor student, Tensor? teacher, Tensor? mask, Tensor stats, Tensor kept, Tensor kept_slope, "
    f"Tensor left, Tensor right, Tensor share, Tensor grad, {_OPTIONS}) -> Tensor",
    _logit_terms_backward_impl,
    _logit_terms_backward_fake,
)
_logit_terms = define(
    f"logit_terms(Tensor student, Tensor? teacher, Tensor? mask, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _logit_terms_impl,
    _logit_terms_fake,
    setup_context=_logit_terms_setup,
    backward=_logit_terms_backward,
)
_mean_entropy = define(
    "mean_entropy(Tensor logits, Tensor? mask, int width, float temperature) -> Tensor",
    _mean_entropy_impl,
    _mean_entropy_fake,
)
