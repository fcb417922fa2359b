"""Penalties on the logits of a classifier, [N, D]: small beside those of a language model."""

from typing import Any

import torch
from torch import Tensor

from deftcore.ops._library import define
from deftcore.ops.checks import check_count, check_float, check_number
from deftcore.ops.logits import LogitPenalties, check_teacher

_NOTHING = 1e-8  # sums of singular values below it have no shares


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
    check_count("k", k)
    if consistency and teacher is None:
        raise ValueError("teacher: consistency needs the pre-trained model's logits, got None")
    if teacher is not None:
        check_teacher(teacher, student)
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
        values[2] = _spectral_share(z, k)[0]
    total = zero + consistency * values[0] + diversity * values[1] + spectral * values[2]
    return LogitPenalties(total, *(value.detach() for value in values))


# ---------------------------------------------------------------------------- the spectral term


def _spectral_share_impl(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Minus the share of the k largest singular values, and the gradient U diag(c) V^T,
    c_i = -([i <= k] sum - top) / sum^2."""
    u, s, vt = torch.linalg.svd(z, full_matrices=False)
    total, top = s.sum(), s[:k].sum()
    if not bool(torch.isfinite(total)) or float(total) < _NOTHING:
        return z.new_zeros(()), torch.zeros_like(z, memory_format=torch.contiguous_format)
    if k >= len(s):
        return z.new_full((), -1.0), torch.zeros_like(z, memory_format=torch.contiguous_format)
    c = (top - total * (torch.arange(len(s), device=s.device) < k)) / total.square()
    return -top / total, ((u * c) @ vt).contiguous()


def _spectral_share_fake(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return z.new_empty(()), torch.empty_like(z, memory_format=torch.contiguous_format)


def _spectral_share_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _spectral_share_backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, None]:
    return None if grad is None else ctx.saved_tensors[0] * grad, None


_spectral_share = define(
    "spectral_share(Tensor z, int k) -> (Tensor, Tensor)",
    _spectral_share_impl,
    _spectral_share_fake,
    setup_context=_spectral_share_setup,
    backward=_spectral_share_backward,
)
