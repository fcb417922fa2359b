"""What BA-LoRA gives to recipes, over dense and 4-bit bases."""

from inspect import signature
from typing import Any

from deftcore.methods.ba_lora.config import BaLoraConfig
from deftcore.methods.ba_lora.penalty import BaLoraPenalty
from deftcore.methods.lora.method import LORA_LIMITS
from deftcore.training.registry import Method, check_by_peft, register


def _objective(model: Any, config: BaLoraConfig) -> BaLoraPenalty | None:
    return BaLoraPenalty(model, config) if any(config.weights()) else None


def _check(model: Any, config: BaLoraConfig) -> None:
    if any(config.weights()) and "labels" not in signature(type(model).forward).parameters:
        raise ValueError(
            f"model: {type(model).__name__} takes no labels; BA-LoRA's losses are over a language model's words or a "
            "classifier's classes, where consistency, diversity and spectral are not 0"
        )
    check_by_peft(model, config)


_BA_LORA: dict[str, Any] = {
    "paper": "arXiv 2408.04556",
    "needs": "nothing; each step is one forward more, of the pre-trained model",
    "config": BaLoraConfig,
    "limits": {"r": LORA_LIMITS["r"]},
    "check": _check,
    "objective": _objective,
}
register(Method(name="ba-lora", summary="LoRA from the weights' largest singular values, tied to the pre-trained "
                "model's outputs.", **_BA_LORA))  # fmt: skip
register(Method(name="qba-lora", summary="BA-LoRA over a frozen base in 4 bits.", quantized=True, **_BA_LORA))
