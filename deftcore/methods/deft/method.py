"""What DEFT gives to recipes: the section `deft:`, a density loss beside any method; and `swap:`, ReLU."""

import logging
from typing import Annotated, Any

from pydantic.dataclasses import dataclass
from transformers import PreTrainedModel

from deftcore._processes import is_first_process
from deftcore.methods.deft.objective import DensityLoss
from deftcore.methods.deft.swap import SwapLoss
from deftcore.methods.deft.trained_thresholds import ThresholdLoss
from deftcore.models.activations import SWAPS, smooth_activations
from deftcore.models.blocks import base_of, find_mlp_blocks
from deftcore.models.families import is_mamba
from deftcore.nn.thresholds import BACKWARDS, CRITERIA
from deftcore.ops.density import SURROGATES, default_tau
from deftcore.training.fields import OPTIONS, NonNegative, Positive, Share, Text, one_of
from deftcore.training.registry import Section, register

logger = logging.getLogger("deftcore")


@dataclass(frozen=True, config=OPTIONS)
class DeftConfig:
    """The section `deft:`; fields as in `DensityLoss`, or with a `density` above 0 as in `ThresholdLoss`. Where it is
    off, density is still reported."""

    enabled: bool = False
    alpha: NonNegative = 1.0
    surrogate: Annotated[Text, one_of(*SURROGATES)] = "l0"
    eps: Positive = 1e-7
    beta: Positive = 20.0
    mask_policy: Annotated[Text, one_of("exclude_padding", "count_padding")] = "exclude_padding"
    ramp: NonNegative = 0.0
    adaptive: Annotated[Text, one_of("", "gate")] = ""
    gamma: NonNegative = 0.0
    density: Share = 0.0  # thresholds that leave this share; 0: none
    criterion: Annotated[Text, one_of(*CRITERIA)] = "product"
    scaled: bool = False
    backward: Annotated[Text, one_of(*BACKWARDS)] = "straight"


@dataclass(frozen=True, config=OPTIONS)
class SwapConfig:
    """The section `swap:`; fields as in `SwapLoss`."""

    enabled: bool = False
    activation: Annotated[Text, one_of(*SWAPS)] = "relu"
    distill: NonNegative = 1.0
    temperature: Positive = 1.0


_OF_A_SURROGATE = ("surrogate", "eps", "beta")  # which follows the thresholds, where there are any


def _make_swap(model: Any, config: SwapConfig) -> SwapLoss | None:
    """None where it is off.

    Raises:
        ValueError: naming what of the section, or why the model's activations cannot be swapped.
    """
    if not config.enabled:
        return None
    if is_mamba(model):
        raise ValueError("swap: is not defined for Mamba models, which have no MLP; set swap: false")
    # Of the model without weights the wrapper is not to be seen, but an adapter has frozen what it stands on.
    weightless = any(p.is_meta for p in model.parameters()) and not all(p.requires_grad for p in model.parameters())
    try:
        return SwapLoss(
            model, activation=config.activation, distill=0.0 if weightless else config.distill,
            temperature=config.temperature,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"swap.{error}") from error


def _make(model: Any, config: DeftConfig) -> DensityLoss | None:
    """The density loss; with `enabled: false` it reports and leaves training bit for bit alone.

    None for Mamba models, which have no MLP, and for those whose MLPs are of no known family.

    Raises:
        ValueError: `enabled: true` for such a model.
    """
    if is_mamba(model):
        if config.enabled:
            raise ValueError("deft: is not defined for Mamba models, which have no MLP; set deft: false")
        return None
    try:
        find_mlp_blocks(model)
    except ValueError as error:
        if config.enabled:
            raise ValueError(f"deft: {error}") from error
        if isinstance(base_of(model), PreTrainedModel):
            logger.warning("no density is reported: %s", error)
        return None
    if config.enabled and config.density:
        for name in _OF_A_SURROGATE:
            if getattr(config, name) != getattr(DeftConfig(), name):
                raise ValueError(f"deft.{name}: not with deft.density, whose thresholds say where the slope is")
        return ThresholdLoss(
            model, density=config.density, criterion=config.criterion, scaled=config.scaled, backward=config.backward,
            alpha=config.alpha, mask_policy=config.mask_policy, ramp=config.ramp, adaptive=config.adaptive or None,
            gamma=config.gamma,
        )  # fmt: skip
    if config.enabled and config.alpha and not any(p.is_meta for p in model.parameters()):
        _warn_of_smooth(model)
    return DensityLoss(
        model,
        alpha=config.alpha if config.enabled else 0.0,
        surrogate=config.surrogate,
        eps=config.eps,
        beta=config.beta,
        mask_policy=config.mask_policy,
        ramp=config.ramp,
        adaptive=config.adaptive or None,
        gamma=config.gamma,
    )


def _warn_of_smooth(model: Any) -> None:
    """Says where the density loss would make hardly any zeros."""
    smooth = smooth_activations(model)
    if smooth and is_first_process():
        logger.warning(
            "deft: %s is never exactly 0: density counts what is above tau = %.2g, and may hardly fall. Thresholds "
            "make zeros: deft.density, as in the recipe deft-thresholds, or of language models `deftcore sparsify` "
            "afterwards",
            ", ".join(smooth), default_tau(smooth[0]),
        )  # fmt: skip


register(  # before the density loss, which then watches the new activation
    Section(
        name="swap",
        summary="ReLU in the place of the model's activation, drawn to the original model by distillation.",
        paper="arXiv 2310.04564, 2402.13516",
        needs="a language model whose MLP blocks are known, and an adapter",
        config=SwapConfig,
        make=_make_swap,
    )
)
register(
    Section(
        name="deft",
        summary="A loss that makes MLP activations sparse, beside any method; sparse kernels then skip the zeros.",
        paper="arXiv 2402.01911",
        needs="a model whose MLP blocks are known",
        config=DeftConfig,
        make=_make,
    )
)
