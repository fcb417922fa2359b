"""The penalties of KaSA: on its singular values, and on factors that are not orthonormal."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deftcore.methods.kasa.config import ORTHO_FORMS, REDUCTIONS, KasaFactoredConfig
from deftcore.methods.kasa.layer import KasaLinear
from deftcore.ops.checks import check_choice, check_float, check_number
from deftcore.training.objective import Batch, Objective

_ORTHONORMAL = 1e-12  # distances below it have no direction


class _GramDistance(torch.autograd.Function):
    """sqrt(|X X^T - I|^2 + extra) of X [R, N]; gradient 2 (X X^T - I) X / value, 0 at the end of the way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, extra: int) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        off = wide @ wide.t()
        off.diagonal().sub_(1)
        distance = (off.square().sum() + extra).sqrt()
        ctx.save_for_backward(x, off, distance)
        return distance

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, off, distance = ctx.saved_tensors
        scale = torch.where(distance < _ORTHONORMAL, 0.0, 2 * grad / distance.clamp(min=_ORTHONORMAL))
        return (scale * (off @ x.to(off.dtype))).to(x.dtype), None


def gram_distance(x: Tensor, *, form: str = "paper") -> Tensor:
    """How far rows are from orthonormal: |X X^T - I|_F, a scalar in float32 or wider (KaSA, arXiv 2412.06071, eq. 11).

    Args:
        x: [R, N], R rows.
        form: "paper", or "reference": |X^T X - I|_F, as the authors' code has it, through the same R x R matrix:
            its square is the other's plus N - R.

    Raises:
        TypeError, ValueError: naming the argument.

    >>> gram_distance(2 * torch.eye(4, 6)).item()
    6.0
    """
    check_float("x", x)
    if x.dim() != 2:
        raise ValueError(f"x: must be a matrix, got shape {tuple(x.shape)}")
    check_choice("form", form, ORTHO_FORMS)
    return _GramDistance.apply(x, x.shape[1] - x.shape[0] if form == "reference" else 0)


def layer_penalties(diag: Tensor, a: Tensor, b: Tensor, *, form: str = "paper") -> tuple[Tensor, Tensor]:
    """L2 = sum of sigma^2, and L3 = |B^T B - I| + |A A^T - I| of one layer (arXiv 2412.06071, eq. 9 to 11), scalars in
    float32 or wider.

    Args:
        diag: sigma [R]; a: A [R, K]; b: B [M, R].
        form: as in `gram_distance`.
    """
    wide = diag.to(torch.promote_types(diag.dtype, torch.float32))
    return wide.square().sum(), gram_distance(b.t(), form=form) + gram_distance(a, form=form)


class KasaPenalty(Objective):
    """beta L2 + gamma L3 of the active KaSA adapters, mean or sum over the layers; see `layer_penalties`.

        penalty = KasaPenalty(model)
        loss = model(**batch).loss + penalty.loss()

    Args:
        model: a PEFT model with KaSA adapters.
        config: None is that of the first active adapter.
        beta, gamma, reduction, form: None is what the config says; the last is its `ortho_form`.

    Raises:
        ValueError, TypeError: naming the argument; no KaSA layer; no config and none of its adapters active.
    """

    name, measure = "kasa", "kasa"

    def __init__(
        self, model: nn.Module, config: KasaFactoredConfig | None = None, *, beta: float | None = None,
        gamma: float | None = None, reduction: str | None = None, form: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._layers = tuple(module for module in model.modules() if isinstance(module, KasaLinear))
        if not self._layers:
            raise ValueError(f"model: {type(model).__name__} has no KaSA layer; wrap it with KasaFactoredConfig first")
        config = next((layer.configs[name] for layer, name in self._active()), None) if config is None else config
        if not isinstance(config, KasaFactoredConfig):
            found = "no KaSA adapter is active" if config is None else f"got {type(config).__name__}"
            raise ValueError(f"config: must be a KasaFactoredConfig, {found}")
        self.beta = check_number("beta", config.beta if beta is None else beta, minimum=0.0)
        self.gamma = check_number("gamma", config.gamma if gamma is None else gamma, minimum=0.0)
        self.reduction = config.reduction if reduction is None else reduction
        self.form = config.ortho_form if form is None else form
        check_choice("reduction", self.reduction, REDUCTIONS)
        check_choice("form", self.form, ORTHO_FORMS)
        self._parts = 1
        self._last: dict[str, Tensor] = {}

    def settings(self) -> dict[str, Any]:
        return {"beta": self.beta, "gamma": self.gamma, "reduction": self.reduction, "ortho_form": self.form}

    def _active(self) -> Iterator[tuple[KasaLinear, str]]:
        """Layers and adapters that count."""
        for layer in self._layers:
            yield from ((layer, name) for name in layer.active_adapters if name in layer.lora_A)

    def terms(self) -> tuple[Tensor, Tensor]:
        """L2 and L3, reduced over the layers, in the graph."""
        found = []
        for layer, name in self._active():
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            found.append(layer_penalties(layer.lora_diag[name], a, b, form=self.form))
        if not found:
            raise RuntimeError("KasaPenalty: no KaSA adapter is active")
        values, orthogonal = (torch.stack(each).sum() for each in zip(*found, strict=True))
        count = len(found) if self.reduction == "mean" else 1
        return values / count, orthogonal / count

    def loss(self) -> Tensor:
        """beta L2 + gamma L3, a scalar in the graph; a term of weight 0 is left out."""
        weights, terms = {"kasa_l2": self.beta, "kasa_l3": self.gamma}, self.terms()
        kept = {name: value for name, value in zip(weights, terms, strict=True) if weights[name]}
        self._last = {name: value.detach() for name, value in kept.items()}
        return sum((weights[name] * value for name, value in kept.items()), terms[0].new_zeros(()))

    def begin(self, window: Sequence[Batch], step: int, steps: int, device: torch.device | None = None) -> None:
        self._parts = max(len(window), 1)

    def share(self, batch: Batch, output: Any) -> Tensor:
        return self.loss() / self._parts

    def undecayed(self) -> list[nn.Parameter]:
        """sigma, which has a penalty of its own, where beta is above 0."""
        return [p for layer in self._layers for p in layer.lora_diag.values()] if self.beta else []

    def reset(self) -> None:
        self._last = {}

    def report(self, reduce: Any = lambda x: x) -> dict[str, Any]:
        """L2 and L3 of the last `loss`, without one of weight 0; equal on every process."""
        return {name: float(value) for name, value in self._last.items()}

    def summary(self, report: Any) -> dict[str, Any]:
        return dict(report)
