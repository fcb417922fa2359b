"""Activations that are watched: what `deftcore.DensityLoss` puts in their place."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from deftcore import ops
from deftcore.nn.activations import activation_of
from deftcore.nn.tokens import fitted
from deftcore.ops.density import active_count, default_tau


@dataclass(frozen=True)
class Options:
    """Of one density loss; as in `DensityLoss`."""

    alpha: float
    surrogate: str
    eps: float
    beta: float
    tau: float | None
    mask_policy: str


@dataclass
class Tally:
    """What one block has shown: `sums` for the next loss, the rest for the report."""

    width: int = 0
    sums: list[Tensor] = field(default_factory=list)  # surrogate sums of the last forward, in the graph
    tokens: list[Tensor | int] = field(default_factory=list)
    blind: bool = False  # the last training forward ran without a graph
    active: Tensor | int = 0
    elements: Tensor | int = 0


class _Aside:
    depth = 0


@contextmanager
def aside() -> Iterator[None]:
    """Forwards within are not observed: a teacher's, of the same model, between a forward and what is made of it."""
    _Aside.depth += 1
    try:
        yield
    finally:
        _Aside.depth -= 1


def is_aside() -> bool:
    """Whether `aside` is in force."""
    return _Aside.depth > 0


class Recorder:
    """Shared by the observed activations of one model: which tokens count, and whether a forward is under way."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.open = False
        self.masks: dict[str, Tensor | None] = {}

    def mask(self, side: str, z: Tensor) -> Tensor | None:
        """The token mask of one side, in the shape of z without its last dimension."""
        return fitted(self.masks.get(side), z.shape[:-1])


class ObservedActivation(nn.Module):
    """An activation whose density is recorded; same function, no parameters, nothing in the state dict."""

    def __init__(self, inner: nn.Module, side: str, recorder: Recorder) -> None:
        super().__init__()
        self.inner = inner
        self.deftcore_activation = activation_of(inner)
        self.side = side
        self.recorder = recorder
        self.tally = Tally()

    def forward(self, z: Tensor) -> Tensor:
        """The activation f(z), and a note of how many of its values are active (DEFT, arXiv 2402.01911).

        Args:
            z: [..., F], any floating dtype.

        Returns:
            f(z) as the module that stands inside gives it.

        Raises:
            TypeError, ValueError: by `deftcore.ops.act_density`, naming the argument.
        """
        options, recorder = self.recorder.options, self.recorder
        tau = default_tau(self.deftcore_activation) if options.tau is None else options.tau
        mask = recorder.mask(self.side, z)
        # A recomputation under activation checkpointing runs with the recorder closed: it must call the same op, so
        # that the same tensors are saved, but it is not counted again.
        if options.alpha != 0 and self.training and torch.is_grad_enabled():
            a, total, active = ops.act_density(
                z, self.deftcore_activation, mask=mask, surrogate=options.surrogate, eps=options.eps,
                beta=options.beta, tau=tau,
            )  # fmt: skip
            if recorder.open:
                self._record(z, mask, total, active)
            return a
        a = self.inner(z)
        if recorder.open and not is_aside():
            self._record(z, mask, None, active_count(a, mask, tau))
        return a

    def _record(self, z: Tensor, mask: Tensor | None, total: Tensor | None, active: Tensor) -> None:
        tokens = z.shape[:-1].numel() if mask is None else (mask != 0).sum()
        self.tally.width = z.shape[-1]
        if total is not None:
            self.tally.sums.append(total)
            self.tally.tokens.append(tokens)
        self.tally.blind = total is None and self.training
        self.tally.active = self.tally.active + active.detach()
        self.tally.elements = self.tally.elements + tokens * z.shape[-1]

    def extra_repr(self) -> str:
        return f"{self.deftcore_activation}, side={self.side}"
