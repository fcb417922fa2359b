"""What S2FT gives to recipes, over dense and 4-bit bases."""

from typing import Any

from deftcore.methods.s2ft.config import S2ftConfig
from deftcore.methods.s2ft.selection import make_plan, select_channels
from deftcore.training.registry import Method, Setup, register, wrap_by_peft

_SHARE, _AT_LEAST = 0.01, 32  # of the training set, as in the paper; examples, where there are so many


def _wrap(model: Any, config: S2ftConfig, setup: Setup) -> Any:
    if config.needs_data:
        config = select_channels(model, config, setup.batches(_SHARE, _AT_LEAST))
    return wrap_by_peft(model, config, setup)


def _check(model: Any, config: S2ftConfig) -> None:
    config.strategy = "random"  # others look at the weights
    make_plan(model, config)


_S2FT: dict[str, Any] = {
    "paper": "arXiv 2412.06289",
    "needs": "a model whose heads and channels are known; the strategies activation, product and gradient look at data",
    "config": S2ftConfig,
    "wrap": _wrap,
    "check": _check,
    "export": "always",
}
register(Method(name="s2ft", summary="A few heads and MLP channels, trained in place.", part="MLP", **_S2FT))
register(Method(name="qs2ft", summary="S2FT over a base in 4 bits.", quantized=True, **_S2FT))
