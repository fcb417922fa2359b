"""The sparse and the dense path of a product, and which is the faster one: a break-even density, measured once per
machine, shape, dtype and token count.

Both paths are timed on cold weights, on a GPU by its own clock; the sparse path's time is taken as linear in the rows
read. Results are kept in the cache folder in cost_model.json, under a key of everything they depend on.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from deftcore._files import first_in_table, read_table
from deftcore.ops.kernels import capturing, machine_name, native
from deftcore.ops.timing import COST_MODEL, bucket_of, medians

logger = logging.getLogger("deftcore")

AUTO, SPARSE, DENSE = 0, 1, 2
PATHS = {"auto": AUTO, "sparse": SPARSE, "dense": DENSE}
MAX_TOKENS: int = native.max_sparse_tokens
_COLD_BYTES = 96 << 20  # more than a last-level cache holds
_known: dict[tuple, float] = {}


def break_even_density(
    like: Tensor,
    tokens: int,
    neurons: int,
    width: int,
    sparse: Callable[[Any, Any], Tensor],
    dense: Callable[[Any, Any], Tensor],
    kind: str = "",
    make_weight: Callable[[], Any] | None = None,
    inputs: tuple[Any, Any] | None = None,
) -> float:
    """Union density below which `sparse(a, w_down_t)` is faster than `dense`; 1 if it always is, 0 if never.

    While a CUDA graph is captured nothing can be measured: what is not known yet counts as 0.

    Args:
        like: a tensor with the device and dtype in question.
        tokens, neurons, width: the product's sizes; tokens are rounded up to a power of two.
        kind, make_weight: a name for weights other than [neurons, width] of like's dtype, and how to make one.
        inputs: what to pass for `a` at density 1 and 1/4, where that is not an activation [tokens, neurons].
    """
    bucket = bucket_of(tokens)
    where = like.device.index if like.device.type == "cuda" else torch.get_num_threads()
    quick = (like.device.type, where, like.dtype, bucket, neurons, width, kind)
    if quick not in _known:
        table = _load()
        key = f"{machine_name(like)} {neurons}x{width} {str(like.dtype)[6:]}{kind and ' ' + kind} tokens={bucket}"
        if key not in table:
            if capturing(like.device):
                return 0.0

            def plain_weight() -> Tensor:
                return torch.full((neurons, width), 0.01, dtype=like.dtype, device=like.device)

            found = _measure(like, bucket, neurons, sparse, dense, make_weight or plain_weight, inputs)
            logger.info("cost model: %s: sparse below density %.2f", key, found)
            table[key] = _share(first_in_table(COST_MODEL, key, found))
        _known[quick] = table[key]
    return _known[quick]


def _measure(
    like: Tensor,
    tokens: int,
    neurons: int,
    sparse: Callable[[Any, Any], Tensor],
    dense: Callable[[Any, Any], Tensor],
    make_weight: Callable[[], Any],
    inputs: tuple[Any, Any] | None,
) -> float:
    weights = [make_weight()]
    copies = min(max(_COLD_BYTES // max(weights[0].nbytes, 1), 1), 64)
    weights += [make_weight() for _ in range(copies - 1)]
    if inputs is None:
        inputs = torch.ones((tokens, neurons), dtype=like.dtype, device=like.device), like.new_zeros(tokens, neurons)
        inputs[1][:, ::4] = 1
    full, quarter = inputs
    cases: list[tuple[Callable[[Any, Any], Tensor], Any]] = [(dense, full), (sparse, full), (sparse, quarter)]

    def calls(repeat: int) -> list[Callable[[], Tensor]]:
        return [partial(run, a, weights[(repeat + case) % copies]) for case, (run, a) in enumerate(cases)]

    dense_time, full_time, quarter_time = medians(calls, like.device)
    per_density = max((full_time - quarter_time) / 0.75, 1e-12)
    fixed = full_time - per_density
    return _share((dense_time - fixed) / per_density)


def most_active(like: Tensor, neurons: int, density: float) -> int:
    """Most active neurons for which "auto" takes the sparse path, -1 for none, from the break-even density.

    On a GPU nobody may wait for the count: there the sparse path has to pay at any density, or to lose by no more than
    3 % at density 1.
    """
    if like.device.type == "cuda":
        return neurons if density >= 0.97 else -1
    return neurons if density >= 1 else int(density * neurons)


def _share(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def _load() -> dict[str, float]:
    try:
        return {str(key): _share(float(value)) for key, value in read_table(COST_MODEL).items()}
    except (ValueError, TypeError):
        return {}  # damaged: measured again
