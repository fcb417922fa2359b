"""The inner optimizer: what makes an update of a projected gradient. A rule is functions, not a fork of the rest."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deftcore.methods.natural_galore.subspace import Subspace, turned

Moments = dict[str, Tensor]
Group = Mapping[str, Any]


@dataclass(frozen=True)
class InnerRule:
    """An optimizer of numbers one by one, which does not know whether they are projected.

    Args:
        moments: names of the tensors that it keeps, each of the gradient's shape, zero at first.
        direction: (gradient, moments=..., age=..., group=...) to what is subtracted, without the learning rate; it
            moves the moments on in place. `age` counts the steps that they have seen, this one included. None is
            Adam's, of its two moments, by `deftcore.ops.galore.galore_step`: one op over all matrices of a group.
        turn: (moments, turn, age, group) to those of another subspace; see `turned`. `age` counts the steps seen.
    """

    moments: tuple[str, ...]
    direction: Callable[..., Tensor] | None
    turn: Callable[[Moments, Subspace, int, Group], Moments]


def turn_adam(moments: Moments, turn: Subspace, age: int, group: Group) -> Moments:
    """M <- Q M and V <- |(Q o Q)(V - M^2) + (Q M)^2| of the unbiased moments: the rule of LDAdam, arXiv 2410.16103."""
    if age == 0:
        return {name: turned(x, turn) for name, x in moments.items()}
    first, second = (1 - beta**age for beta in group["betas"])
    mean, square = moments["exp_avg"] / first, moments["exp_avg_sq"] / second
    new = turned(mean, turn)
    spread = turned(square - mean.square(), turn.squared())
    return {"exp_avg": new * first, "exp_avg_sq": (spread + new.square()).abs() * second}


ADAM = InnerRule(("exp_avg", "exp_avg_sq"), None, turn_adam)
