"""What the common room gives to recipes: LoRA, PEFT's prompts, bottlenecks, and training without an adapter."""

import typing
from typing import Annotated, Any

import peft
from pydantic import Field

from deftcore.methods.lora.bitfit import BitFitConfig
from deftcore.methods.lora.bottleneck import BottleneckConfig
from deftcore.methods.lora.patch import concerns, patch
from deftcore.training.fields import Count, Share
from deftcore.training.registry import Method, Setup, check_by_peft, register, wrap_by_peft

_INIT = typing.get_type_hints(peft.LoraConfig)["init_lora_weights"]  # it holds a placeholder for `pissa_niter_<n>`
# PEFT checks these on wrapping or later.
LORA_LIMITS: dict[str, Any] = {
    "r": Count,
    "lora_dropout": Share,
    "init_lora_weights": typing.Union[_INIT, Annotated[str, Field(pattern=r"^pissa_niter_\d+$")]],  # noqa: UP007
}


def wrap_lora(model: Any, config: Any, setup: Setup) -> Any:
    """The PEFT model, its LoRA layers fused."""
    return patch(wrap_by_peft(model, config, setup))


def check_lora(model: Any, config: Any) -> None:
    """Wraps a model without weights, which some initialisations would look at."""
    config.init_lora_weights = False
    check_by_peft(model, config)


def _check_prompts(model: Any, config: Any) -> None:
    if config.task_type is None:  # PEFT, which puts prompts before its tokens, would look it up
        raise ValueError(f"model: must be a language model of Transformers, got {type(model).__name__}")
    check_by_peft(model, config)


def wrap_full(model: Any, config: Any, setup: Setup) -> Any:
    """The model itself, its mixers fused where it has such."""
    return patch(model) if concerns(model) else model


_PROMPTS: dict[str, Any] = {"limits": {"num_virtual_tokens": Count}, "check": _check_prompts, "export": "keep"}
FUSED: dict[str, Any] = {"limits": LORA_LIMITS, "wrap": wrap_lora, "check": check_lora}
_LORA: dict[str, Any] = {"config": peft.LoraConfig, **FUSED}
register(Method(name="lora", summary="Low-rank updates beside frozen weights, fused.", paper="arXiv 2106.09685",
                part="", **_LORA))  # fmt: skip
register(Method(name="qlora", summary="LoRA over a frozen base in 4 bits.", paper="arXiv 2305.14314",
                quantized=True, **_LORA))  # fmt: skip
register(
    Method(
        name="bottleneck",
        summary="Small networks after each MLP, or beside it (AdaptFormer).",
        paper="arXiv 2005.00052, 2205.13535",
        part="MLP",
        config=BottleneckConfig,
        export="keep",
    )
)
register(
    Method(
        name="bitfit",
        summary="Biases alone, those that are there or new ones.",
        paper="arXiv 2106.10199",
        needs="biases, or names of linear layers to get one (new_biases)",
        config=BitFitConfig,
    )
)
register(Method(name="prompt", summary="Learned tokens before the input (PEFT's).", paper="arXiv 2104.08691",
                needs="num_virtual_tokens", config=peft.PromptTuningConfig, **_PROMPTS))  # fmt: skip
register(
    Method(
        name="prefix",
        summary="Learned keys and values before those of the input (PEFT's).",
        paper="arXiv 2101.00190",
        needs="num_virtual_tokens; no gradient checkpointing",
        config=peft.PrefixTuningConfig,
        must_be_off={"gradient_checkpointing": "whose keys it would not recompute"},
        **_PROMPTS,
    )
)
register(
    Method(
        name="full",
        summary="Every weight of the model, in float32.",
        wrap=wrap_full,
        check=lambda model, config: None,
        float32=True,
    )
)
