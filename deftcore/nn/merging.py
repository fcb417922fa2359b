"""Adding a low-rank or sliced update to a 4-bit weight, and what that keeps of it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deftcore.ops.quant4 import quantize_4bit
from deftcore.ops.quantized import QuantizedTensor


@dataclass(frozen=True)
class MergeReport:
    """What a merge kept of the update D = scaling B A; norms are Frobenius."""

    relative_size: float  # |D| / |W|
    kept: float  # share of D in the merged weight: <merged - W, D> / |D|^2
    error: float  # |merged - (W + D)| / |D|

    def __str__(self) -> str:
        return (
            f"{100 * self.kept:.1f} % of the update is kept, error {self.error:.3g} of its size "
            f"(update {self.relative_size:.2g} of the weight)"
        )


def merged_4bit(q: QuantizedTensor, delta: Tensor) -> tuple[QuantizedTensor, MergeReport]:
    """q + delta, requantised as q was.

    Args:
        q: 4-bit weights [M, K].
        delta: [M, K], any floating dtype.

    Returns:
        The merged weights in q's type, block size and dtype, and what they kept of delta.

    Raises:
        ValueError: a sum that is not finite.
    """
    before = q.dequantize(torch.float32)
    target = before + delta.float()
    options: dict[str, Any] = {"block_size": q.block_size, "double_quant": q.double_quant}
    merged = quantize_4bit(target, quant_type=q.quant_type, **options)
    merged.dtype, merged.storage = q.dtype, q.storage
    return merged, _report(before, target, merged.dequantize(torch.float32), delta)


def merged_16bit(q: QuantizedTensor, delta: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, MergeReport | None]:
    """The decoded q + delta, rounded once.

    Args:
        q: 4-bit weights [M, K].
        delta: [M, K], any floating dtype; None for the decoded weights alone.
        dtype: float32, bfloat16 or float16.

    Returns:
        Weights [M, K] in `dtype`, and what they kept of delta; None without one.

    Raises:
        TypeError: another dtype.
    """
    if delta is None:
        return q.dequantize(dtype), None
    before = q.dequantize(torch.float32)
    target = before + delta.float()
    merged = target.to(dtype)
    return merged, _report(before, target, merged.float(), delta)


def _report(before: Tensor, target: Tensor, merged: Tensor, delta: Tensor) -> MergeReport:
    size = delta.float().norm().clamp(min=torch.finfo(torch.float32).tiny)
    kept = ((merged - before) * delta).sum() / size.square().clamp(min=torch.finfo(torch.float32).tiny)
    return MergeReport(
        float(size / before.norm().clamp(min=1e-30)), float(kept), float((merged - target).norm() / size)
    )
