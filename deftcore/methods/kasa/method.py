"""What KaSA gives to recipes, over dense and 4-bit bases."""

from typing import Any

from deftcore.methods.kasa.config import KasaFactoredConfig
from deftcore.methods.kasa.penalty import KasaPenalty
from deftcore.methods.lora.method import LORA_LIMITS
from deftcore.training.registry import Method, register


def _objective(model: Any, config: KasaFactoredConfig) -> KasaPenalty | None:
    return KasaPenalty(model, config) if config.beta or config.gamma else None


_KASA: dict[str, Any] = {
    "paper": "arXiv 2412.06071",
    "needs": "nothing; weights are decomposed once, and what is found is kept",
    "config": KasaFactoredConfig,
    "limits": {name: LORA_LIMITS[name] for name in ("r", "lora_dropout")},
    "objective": _objective,
}
register(Method(name="kasa", summary="LoRA with singular values, the weights' smallest taken away.", **_KASA))
register(Method(name="qkasa", summary="KaSA over a frozen base in 4 bits.", quantized=True, **_KASA))
