"""Values of centres carried to other points, by inverse squared distance (PointNet++)."""

from typing import NamedTuple

import torch
from torch import Tensor

from deftcore.ops.autocast import autocast_to
from deftcore.ops.checks import check_float
from deftcore.ops.neighbours import check_points, check_values, knn
from deftcore.ops.neighbours_gather import gather_points

_NEAR = 1e-8  # added to a squared distance


class Interpolation(NamedTuple):
    """From which centres, and with what weights, each query takes its value; called with values, it carries them.

    Made once by `Interpolation.between` and called on the values of every layer, it finds the centres once.
    """

    weights: Tensor  # [B, Q, k], sums over k are 1; float32, or float64 of float64 points
    indices: Tensor | None  # [B, Q, k] int64; None: all centres in their order
    centres: int  # N, that values have to have

    @staticmethod
    def between(centres: Tensor, queries: Tensor, k: int | None = None) -> "Interpolation":
        """Weights 1 / (squared distance + 1e-8) of the k nearest centres, scaled to the sum 1; arguments as for
        `interpolate`."""
        size = check_points("centres", centres).shape[1]
        if not torch.compiler.is_compiling():  # a compiled call hears of it from knn
            check_values(None, centres=centres)
        every = k is None or (isinstance(k, int) and not isinstance(k, bool) and k >= size)
        indices, distances = knn(centres, queries, size if every or k is None else k)
        weights = 1 / (distances + _NEAR)
        weights = weights / weights.sum(-1, keepdim=True)
        if not every:
            return Interpolation(weights, indices, size)
        return Interpolation(torch.zeros_like(weights).scatter(2, indices, weights), None, size)

    def __call__(self, values: Tensor) -> Tensor:
        """values [B, N, C] of the centres as [B, Q, C] of the queries, summed in float32."""
        check_float("values", values)
        batch, wide = self.weights.shape[0], self.weights.dtype
        if values.dim() != 3 or values.shape[0] != batch:
            raise ValueError(f"values: must be [{batch}, N, C], got shape {tuple(values.shape)}")
        if values.shape[1] != self.centres:
            raise ValueError(f"values: must have {self.centres} rows, one per centre, got {values.shape[1]}")
        if (values.dtype == torch.float64) != (wide == torch.float64):
            raise TypeError(f"values: must be float64 where the centres are and only there, got {values.dtype}")
        if values.device != self.weights.device:
            raise ValueError(f"values: must be on {self.weights.device} as the weights, got {values.device}")
        if self.indices is not None:
            return gather_points(values, self.indices, self.weights)
        with autocast_to(values.device.type, None):
            return (self.weights @ values.to(wide)).to(values.dtype)


def interpolate(centres: Tensor, queries: Tensor, values: Tensor, k: int | None = None) -> Tensor:
    """Values at the queries: sum_j u_j v_j over the k nearest centres, u_j = 1 / (d_j^2 + 1e-8) scaled to the sum 1.

    At a centre it is that centre's value, and a constant stays what it is. The gradient is exact, that of the weights
    included where points have one.

    Args:
        centres: [B, N, 3], finite.
        queries: [B, Q, 3], in the centres' dtype.
        values: [B, N, C], float32, bfloat16 or float16; float64 where the centres are.
        k: centres that take part, at least 1; more than there are is all. None: all.

    Returns:
        [B, Q, C] in the values' dtype; weights and sums are float32, also under autocast.

    Raises:
        TypeError, ValueError: naming the argument.

    >>> centres = torch.tensor([[[0.0, 0, 0], [2, 0, 0]]])
    >>> interpolate(centres, torch.tensor([[[1.0, 0, 0]]]), torch.tensor([[[3.0], [5.0]]])).tolist()
    [[[4.0]]]
    """
    return Interpolation.between(centres, queries, k)(values)
