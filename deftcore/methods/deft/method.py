"""What DEFT gives to recipes: the section `deft:`, a density loss beside any method."""

import logging
from typing import Annotated, Any

from pydantic.dataclasses import dataclass
from transformers import PreTrainedModel

from deftcore.methods.deft.objective import DensityLoss
from deftcore.models.blocks import base_of, find_mlp_blocks
from deftcore.models.families import is_mamba
from deftcore.ops.density import SURROGATES
from deftcore.training.fields import OPTIONS, NonNegative, Positive, Text, one_of
from deftcore.training.registry import Section, register

logger = logging.getLogger("deftcore")


@dataclass(frozen=True, config=OPTIONS)
class DeftConfig:
    """The section `deft:`; fields as in `DensityLoss`. Where it is off, density is still reported."""

    enabled: bool = False
    alpha: NonNegative = 1.0
    surrogate: Annotated[Text, one_of(*SURROGATES)] = "l0"
    eps: Positive = 1e-7
    beta: Positive = 20.0
    mask_policy: Annotated[Text, one_of("exclude_padding", "count_padding")] = "exclude_padding"
    ramp: NonNegative = 0.0
    adaptive: Annotated[Text, one_of("", "gate")] = ""
    gamma: NonNegative = 0.0


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
