"""The smallest singular triplets of a matrix, without its whole decomposition."""

import torch
from torch import Tensor

from deftcore.ops.checks import check_float

_DENSE = 768  # short sides up to here: all of the Gram matrix's eigenvectors cost less than the iteration
_TOLERANCE = 1e-13  # of the Gram matrix's largest eigenvalue: the residual of an eigenpair that is good enough
_SEED = 0x5EED
_GRAM_BLOCK = 512  # columns a product; wide enough for the library's full speed


def minor_subspace(w: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` smallest singular triplets of w: U [M, rank], S [rank] falling, V [N, rank], so that w minus
    U diag(S) V^T is w's best approximation with as many fewer ranks.

    In float64 throughout: squaring in float32 would lose values below 3e-4 of the largest. Short sides beyond 768 take
    a block Krylov iteration on the inverse of the Gram matrix, which costs about one product and two factorisations;
    where it does not settle, all eigenvectors are computed. Equal inputs give equal results. Where the cut falls into
    a cluster of equal singular values, the triplets of it are not unique, and any are returned.

    Args:
        w: [M, N], any floating dtype; computed on its device.
        rank: 0 to min(M, N).

    Returns:
        float64 tensors on w's device.

    Raises:
        TypeError, ValueError: naming the argument.

    >>> u, s, v = minor_subspace(torch.diag(torch.tensor([3.0, 1.0, 2.0])), 2)
    >>> [round(float(x), 9) for x in s]
    [2.0, 1.0]
    """
    check_float("w", w)
    if w.dim() != 2:
        raise ValueError(f"w: must be a matrix, got shape {tuple(w.shape)}")
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank: must be an integer, got {type(rank).__name__}")
    if not 0 <= rank <= min(w.shape):
        raise ValueError(f"rank: must be from 0 to {min(w.shape)} (the shorter side), got {rank}")
    if not bool(torch.isfinite(w).all()):
        raise ValueError("w: must be finite, got infinities or NaN")
    if w.shape[0] < w.shape[1]:
        v, s, u = minor_subspace(w.t(), rank)
        return u, s, v
    if rank == 0:
        empty = (w.shape[0], 0), (0,), (w.shape[1], 0)
        return tuple(w.new_zeros(shape, dtype=torch.float64) for shape in empty)  # type: ignore[return-value]
    tall = w.detach().double()
    gram = _gram(tall)
    side = gram.shape[0]
    basis = None if side <= _DENSE or 4 * rank > side else _inverse_krylov(gram, rank)
    if basis is None:
        basis = torch.linalg.eigh(gram).eigenvectors[:, :rank]
    # Within the subspace w itself is decomposed: values keep their digits, which the Gram matrix has squared away.
    u, s, rotation = torch.linalg.svd(tall @ basis, full_matrices=False)
    return u[:, -rank:], s[-rank:], (basis @ rotation.t())[:, -rank:]


def _gram(tall: Tensor) -> Tensor:
    """tall^T tall [N, N] with half of the work: blocks below the diagonal, and what mirrors them."""
    gram = tall.new_empty(tall.shape[1], tall.shape[1])
    for start in range(0, len(gram), _GRAM_BLOCK):
        stop = min(start + _GRAM_BLOCK, len(gram))
        gram[start:, start:stop] = tall[:, start:].t() @ tall[:, start:stop]
        gram[start:stop, stop:] = gram[stop:, start:stop].t()
    return gram


def _inverse_krylov(gram: Tensor, rank: int) -> Tensor | None:
    """An orthonormal basis [N, >= rank] that holds the `rank` smallest eigenvectors of a positive semi-definite matrix;
    None where it does not settle."""
    scale = float(torch.linalg.matrix_norm(gram, 1))  # at least the largest eigenvalue
    if scale == 0:
        return None
    side, width = gram.shape[0], rank + max(8, rank // 4)
    generator = torch.Generator().manual_seed(_SEED)
    start = torch.randn(side, width, generator=generator, dtype=torch.float64).to(gram.device)
    shift = -2.0 * side * torch.finfo(torch.float64).eps * scale
    # Near zero, where square weights' values are, a few steps settle. Far from it the spectrum's lower end looks flat
    # to the plain inverse: they say where it begins, and a factorisation just below tells the values there apart.
    for steps, last in ((8, False), (max(24, 2 * rank // width + 12), True)):
        factor, info = torch.linalg.cholesky_ex(_shifted(gram, shift))
        if int(info):
            return None
        found, values, residuals = _rayleigh_ritz(gram, factor, start, steps, rank, _TOLERANCE * scale)
        if float(residuals.max()) <= _TOLERANCE * scale:
            return found
        if last:
            return None
        start = found
        bottom, span = float(values[0]), float(values[-1] - values[0])
        shift = max(shift, bottom - float(residuals[0]) - 0.1 * span)
    return None


def _shifted(gram: Tensor, shift: float) -> Tensor:
    moved = gram.clone()
    moved.diagonal().sub_(shift)
    return moved


def _rayleigh_ritz(
    gram: Tensor, factor: Tensor, start: Tensor, steps: int, rank: int, enough: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Ritz vectors of the smallest values [N, width], the `rank` smallest values, and their residuals, after at most
    `steps` blocks of the Krylov space of the factorised matrix's inverse."""
    width = start.shape[1]
    blocks = [torch.linalg.qr(start).Q]
    basis, image = blocks[0], gram @ blocks[0]
    while True:
        values, rotation = torch.linalg.eigh(basis.t() @ image)
        kept = rotation[:, :width]
        vectors = basis @ kept
        residuals = torch.linalg.vector_norm(image @ kept - vectors * values[:width], dim=0)[:rank]
        full = basis.shape[1] + width > gram.shape[0] // 2
        if len(blocks) > steps or full or float(residuals.max()) <= enough:
            return vectors, values[:rank], residuals
        block = torch.cholesky_solve(blocks[-1], factor)
        for _ in range(2):  # twice is enough
            block = torch.linalg.qr(block - basis @ (basis.t() @ block)).Q
        blocks.append(block)
        basis, image = torch.cat([basis, block], 1), torch.cat([image, gram @ block], 1)
