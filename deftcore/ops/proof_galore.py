"""What proves the kernels of a GaLore step; see `proof_cases`."""

from collections.abc import Iterator

import torch
from torch import Tensor

from deftcore.ops.galore import galore_step
from deftcore.ops.galore_matrix import AdamMatrix
from deftcore.ops.natural import Damping, Window, gram_of
from deftcore.ops.proof_case import Case, Numbers


def galore_cases(draw: Numbers) -> Iterator[Case]:
    """Steps of one and of many matrices, windows that are empty, in part and full, one and two sides, and none."""

    def step(
        weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, *more: Tensor | None, fill: int = 0, count: int
    ) -> list[Tensor]:
        state = torch.promote_types(weight.dtype, torch.float32)
        left, right, history = (None if x is None else x.to(state) for x in more)
        if history is not None and weight.dtype == torch.bfloat16:
            history = history.bfloat16()
        made, found = [], []
        for i in range(count):
            moments = mean.to(state, copy=True), square.to(state).square() + 0.5
            window = None
            if history is not None:
                failures = torch.zeros((), dtype=torch.int64, device=weight.device)
                window = Window(history.clone(), gram_of(history), fill % len(history), fill, failures)
                found += [window.history, window.gram, failures]
            made.append(
                AdamMatrix(
                    weight=weight.clone(), grad=grad * (i + 1), left=left, right=right, window=window,
                    exp_avg=moments[0], exp_avg_sq=moments[1], age=2 + i,
                )
            )  # fmt: skip
            found += [made[-1].weight, *moments]
        galore_step(made, lr=0.1, weight_decay=0.1, damping=Damping(0.5))
        return found

    for (rows, columns), sides, window, fill, count in (
        ((70, 40), "right", 6, 6, 3), ((40, 70), "left", 5, 2, 3), ((70, 40), "both", 34, 33, 2),
        ((33, 130), "left", 1, 0, 26), ((70, 40), "right", 0, 0, 2), ((65, 67), "", 0, 0, 3), ((7, 601), "", 3, 3, 2),
    ):  # fmt: skip
        left = draw.normal(rows, 8, scale=rows**-0.5) if sides in ("left", "both") else None
        right = draw.normal(columns, 8, scale=columns**-0.5) if sides in ("right", "both") else None
        compact = (8 if left is not None else rows, 8 if right is not None else columns)
        history = torch.zeros(window, compact[0] * compact[1], device=draw.device)
        history[:fill] = draw.normal(fill, history.shape[1])
        yield Case(
            f"{rows} x {columns}, factors {sides or 'none'}, window {window}",
            lambda *inputs, fill=fill, count=count: step(*inputs, fill=fill, count=count),
            [draw.normal(rows, columns), draw.normal(rows, columns), draw.normal(*compact), draw.normal(*compact),
             left, right, history if window else None],
        )  # fmt: skip
