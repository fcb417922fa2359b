"""Lyapunov exponents of Mamba's state recurrence (Halloran et al., arXiv 2406.00209), exact for given steps."""

import torch
from torch import Tensor

from deftcore.ops.checks import check_float, check_shape


@torch.no_grad()
def lyapunov_exponents(delta: Tensor, A: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """lambda = mean over time of delta_t A, the growth rate per step of a disturbed state (nats).

    With its inputs held, h_t = exp(delta_t A) h_{t-1} + ... is diagonal, so that the product of its Jacobians is
    exp(A sum_t delta_t) and no orthogonalisation is needed. delta >= 0 and A < 0 make every exponent at most 0; it is 0
    only where all steps are 0. Sums are float64. For segments of a sequence, add `mean * length` and lengths.

    Args:
        delta: [B, D, L], any floating dtype, the steps: after softplus and clamp. For Mamba-2 [B, H, L].
        A: [D, N], or [H] for Mamba-2; negative.
        mask: [B, L], 0 or False at steps that do not count.

    Returns:
        [B, D, N] (or [B, H]), float64; NaN in rows without a step.

    Raises:
        TypeError, ValueError: naming the argument; negative or NaN steps.

    >>> lyapunov_exponents(torch.full((1, 1, 4), 0.5), torch.tensor([[-2.0, -1.0]])).tolist()
    [[[-1.0, -0.5]]]
    """
    check_float("delta", delta)
    check_float("A", A)
    if delta.dim() != 3:
        raise ValueError(f"delta: must be [B, D, L], got shape {tuple(delta.shape)}")
    if A.dim() not in (1, 2) or A.shape[0] != delta.shape[1]:
        raise ValueError(f"A: shape must be ({delta.shape[1]}, N) or ({delta.shape[1]},), got {tuple(A.shape)}")
    if A.device != delta.device:
        raise ValueError(f"A: must be on {delta.device} as delta, got {A.device}")
    if not bool((delta >= 0).all()):
        raise ValueError("delta: steps must not be negative or NaN; give them after softplus")
    if mask is None:
        mean = delta.sum(-1, dtype=torch.float64) / delta.shape[2] if delta.shape[2] else delta.double().mean(-1)
    else:
        check_shape("mask", mask, (delta.shape[0], delta.shape[2]), "[B, L]")
        mask = mask.to(device=delta.device, dtype=torch.bool).unsqueeze(1)
        mean = torch.where(mask, delta, 0).sum(-1, dtype=torch.float64) / mask.sum(-1)
    return mean.unsqueeze(-1) * A.double() if A.dim() == 2 else mean * A.double()
