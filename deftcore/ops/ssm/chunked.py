"""Mamba-2's scan by matrix products over chunks (Dao and Gu, arXiv 2405.21060, section 6): what a library can do best.

In a chunk of Q steps y = (M * C B^T) X + e * (C h^T), with X = step x, h the state before the chunk, M[t, s] the decay
from step s to step t and e[t] the one from the chunk's start; the states before the chunks are the same sum over
chunks, a block of them at a time, so that nothing grows faster than the length.
A product sums over all steps of a chunk, and 0 times NaN is NaN: what is not finite enters as 0, and the steps of its
head that it reaches, which are later ones of its own sequence, are set to NaN.
Letters of the products: b batch, k chunk, t and s step, g group, r head in its group, p head dim, n state.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_STEPS = 64  # of a chunk
_CHUNKS = 64  # of a block


class _Flaws(NamedTuple):
    """Where the op's inputs are not finite, [B, L, H], and what that reaches."""

    x: Tensor
    step: Tensor
    decay: Tensor
    b: Tensor
    c: Tensor
    begins: Tensor  # of a sequence: a decay of 0
    states: Tensor  # before each step, and after the last [B, L + 1, H]

    @classmethod
    def of(cls, x: Tensor, step: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, first: Tensor | None) -> "_Flaws":
        begins, heads = log_decay == -torch.inf, step.shape[2]
        in_decay = ~(log_decay.isfinite() | begins)
        in_x, in_b, in_c = (_flawed(t, heads) for t in (x, b, c))
        in_step = ~step.isfinite()
        in_first = begins.new_zeros(len(x), heads) if first is None else ~first.isfinite().all(-1).all(-1)
        states = _reached(in_x | in_step | in_b | in_decay, begins, in_first)
        return cls(in_x, in_step, in_decay, in_b, in_c, begins, states)


class _Chunks(NamedTuple):
    """The op's inputs by chunks, and what both directions take from them."""

    x: Tensor  # [b k s g r p]
    step: Tensor  # [b k s g r 1]
    b: Tensor  # [b k s g n]
    c: Tensor  # [b k t g n]
    decay: Tensor  # M [b k g r t s]
    start: Tensor  # e [b k t g r 1]
    end: Tensor  # decay from step s to the chunk's end [b k s g r 1]
    products: Tensor  # C B^T [b k g 1 t s]
    whole: Tensor  # logarithm of the decay over a chunk [b g r k]
    states: Tensor  # before each chunk, and after the last [b k g r p n]

    @classmethod
    def of(cls, x: Tensor, step: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, first: Tensor | None) -> "_Chunks":
        groups = b.shape[2]
        log_decay = torch.where(log_decay < torch.inf, log_decay, 0)
        x, step, log_decay = (
            _cut(t.to(b.dtype)).unflatten(3, (groups, -1)) for t in (_finite(x), _finite(step), log_decay)
        )
        b, c, step = _cut(_finite(b)), _cut(_finite(c)), step.unsqueeze(-1)
        log_decay = log_decay.movedim(2, -1)
        decay = _decays(log_decay)
        end = decay[..., -1, :].movedim(-1, 2).unsqueeze(-1)
        start = log_decay.cumsum(-1).exp().movedim(-1, 2).unsqueeze(-1)
        whole = log_decay.sum(-1).movedim(1, -1)
        added = torch.einsum("bksgrp,bksgn->bkgrpn", end * step * x, b)
        before = added.new_zeros(len(x), 1, *added.shape[2:])
        if first is not None:
            before = _finite(first).unflatten(1, (groups, -1)).unsqueeze(1)
        states = _carried(before, added, whole)
        products = torch.einsum("bktgn,bksgn->bkgts", c, b).tril().unsqueeze(3)
        return cls(x, step, b, c, decay, start, end, products, whole, states)


def ssd_chunked(
    x: Tensor, step: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, d: Tensor | None, first: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `ssd_forward`: out [B, L, H, P] and the last state [B, H, P, N]."""
    inputs = x, step, log_decay, b, c, first
    k, flaws = _Chunks.of(*inputs), _Flaws.of(*inputs)
    y = torch.einsum("bkgrts,bksgrp->bktgrp", k.decay * k.products, k.step * k.x)
    y += k.start * torch.einsum("bktgn,bkgrpn->bktgrp", k.c, k.states[:, :-1])
    y = _marked(_joined(y, x), flaws.states[:, 1:] | flaws.c)
    y = y if d is None else y + d.view(x.shape[2:]) * x.to(y.dtype)
    return y.to(x.dtype), _marked(k.states[:, -1].flatten(1, 2), flaws.states[:, -1]).contiguous()


def ssd_chunked_backward(
    grad_out: Tensor, grad_last: Tensor, x: Tensor, step: Tensor, log_decay: Tensor, b: Tensor, c: Tensor,
    d: Tensor | None, first: Tensor | None, want_d: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As `ssd_backward`: gradients in the order of the inputs, d's only where it is wanted."""
    inputs = x, step, log_decay, b, c, first
    k, flaws = _Chunks.of(*inputs), _Flaws.of(*inputs)
    grad, groups = grad_out.to(b.dtype), b.shape[2]
    dy = _cut(_finite(grad)).unflatten(3, (groups, -1))
    moved, from_start = k.step * k.x, k.start * dy
    # Gradients of the states: those before the chunks, through time, to what each chunk adds.
    of_states = torch.einsum("bktgrp,bktgn->bkgrpn", from_start, k.c)
    last = _finite(grad_last).to(b.dtype).unflatten(1, (groups, -1)).unsqueeze(1)
    of_states = _carried(last, of_states.flip(1), k.whole.flip(-1)).flip(1)
    of_added, before = of_states[:, 1:], k.states[:, :-1]

    pairs = k.decay * torch.einsum("bktgrp,bksgrp->bkgrts", dy, moved).tril()
    of_products = pairs.sum(3)
    seen = k.end * torch.einsum("bksgn,bkgrpn->bksgrp", k.b, of_added)
    of_moved = torch.einsum("bkgrts,bktgrp->bksgrp", k.decay * k.products, dy) + seen
    of_b = torch.einsum("bkgts,bktgn->bksgn", of_products, k.c)
    of_b += torch.einsum("bksgrp,bkgrpn->bksgn", k.end * moved, of_added)
    of_c = torch.einsum("bkgts,bksgn->bktgn", of_products, k.b)
    of_c += torch.einsum("bktgrp,bkgrpn->bktgn", from_start, before)

    # A step's decay is in every pair (t, s) that it stands between, in the way from the start to t, from s to the end.
    crossed = _sums_from(pairs * k.products, -2).tril(-1).sum(-1)
    to_later = (from_start * torch.einsum("bktgn,bkgrpn->bktgrp", k.c, before)).sum(-1).movedim(2, -1)
    from_earlier = (seen * moved).sum(-1).movedim(2, -1)
    whole = (of_added * before).sum((-1, -2)) * k.start[:, :, -1, ..., 0]
    of_decay = crossed + _sums_from(to_later, -1) + (from_earlier.cumsum(-1) - from_earlier) + whole.unsqueeze(-1)

    in_dy = _flawed(grad, step.shape[2])
    came = _reached(
        ((in_dy | flaws.c | flaws.decay) & ~flaws.begins).flip(1), flaws.begins.flip(1),
        ~grad_last.isfinite().all(-1).all(-1),
    ).flip(1)  # fmt: skip
    adjoint = in_dy | flaws.c | came[:, 1:]  # the gradients of the states after each step

    grad_x = _marked(_joined(k.step * of_moved, x), adjoint | flaws.b | flaws.step)
    grad_d = b.new_empty(0)
    if d is not None:
        grad_x = grad_x + d.view(x.shape[2:]) * grad
    if d is not None and want_d:
        grad_d = (grad * x.to(b.dtype)).sum((0, 1)).reshape(-1)
    return (
        grad_x.to(x.dtype), _marked(_joined((of_moved * k.x).sum(-1), step), adjoint | flaws.b | flaws.x),
        _marked(_joined(of_decay.movedim(-1, 2), step),
                (adjoint | flaws.states[:, :-1] | flaws.decay) & ~flaws.begins),
        _marked(_joined(of_b, b), (adjoint | flaws.x | flaws.step).unflatten(2, (groups, -1)).any(3)),
        _marked(_joined(of_c, c), (in_dy | flaws.states[:, 1:]).unflatten(2, (groups, -1)).any(3)),
        grad_d, _marked(of_states[:, 0].flatten(1, 2), came[:, 0]).contiguous(),
    )  # fmt: skip


def _finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, 0)


def _flawed(x: Tensor, heads: int) -> Tensor:
    """Which heads of x [B, L, heads or groups, ...] have something that is not finite, [B, L, H]."""
    found = ~x.isfinite().all(-1)
    return found if found.shape[2] == heads else found.repeat_interleave(heads // found.shape[2], 2)


def _reached(flaws: Tensor, begins: Tensor, first: Tensor) -> Tensor:
    """Whether a flaw came at or before each step, no farther back than its sequence begins: [B, L + 1, H]."""
    flaws = torch.cat((first.unsqueeze(1), flaws), 1)
    place = torch.arange(flaws.shape[1], dtype=torch.int32, device=flaws.device).view(-1, 1)
    last_begin = torch.where(F.pad(begins, (0, 0, 1, 0)), place, 0).cummax(1).values
    return torch.where(flaws, place, -1).cummax(1).values >= last_begin


def _marked(x: Tensor, flaws: Tensor) -> Tensor:
    """x with NaN at flaws, which have its first dimensions."""
    return x.masked_fill(flaws.view(*flaws.shape, *[1] * (x.dim() - flaws.dim())), torch.nan)


def _cut(x: Tensor) -> Tensor:
    """[B, L, ...] as [B, chunks, steps, ...], with zeros behind: no decay, nothing added."""
    padded = F.pad(x, (0, 0) * (x.dim() - 2) + (0, -x.shape[1] % _STEPS))
    return padded.unflatten(1, (-1, _STEPS)) if x.shape[1] else padded.view(len(x), 0, _STEPS, *x.shape[2:])


def _joined(x: Tensor, like: Tensor) -> Tensor:
    """The opposite: of like's shape."""
    return x.flatten(1, 2)[:, : like.shape[1]].reshape(like.shape).contiguous()


def _carried(first: Tensor, added: Tensor, whole: Tensor) -> Tensor:
    """States [b k+1 g r p n]: first, and after each chunk what is left of the one before it and what was added."""
    states = [first]
    for more, logs in zip(added.split(_CHUNKS, 1), whole.split(_CHUNKS, -1), strict=True):
        between = _decays(F.pad(logs, (1, 0)))[..., 1:, :]
        block = torch.cat((states[-1][:, -1:], more), 1)
        states.append(torch.einsum("bgrkj,bjgrpn->bkgrpn", between, block))
    return torch.cat(states, 1)


def _decays(log_decay: Tensor) -> Tensor:
    """exp(log_decay[s + 1] + ... + log_decay[t]) at [..., t, s], 0 for s > t; sums, as a difference of -inf is NaN."""
    size = log_decay.shape[-1]
    lower = torch.ones(size, size, dtype=torch.bool, device=log_decay.device).tril(-1)
    sums = torch.where(lower, log_decay.unsqueeze(-1), 0).cumsum(-2)
    return sums.exp().tril()


def _sums_from(x: Tensor, dim: int) -> Tensor:
    """Sums over all that comes at or after a place."""
    return x.flip(dim).cumsum(dim).flip(dim)
