"""Token tuning of TSViT: class tokens alone train, all or those that `extend` has put behind the others."""

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from deftcore.methods.tsvit.heads import ClassTokens
from deftcore.methods.tsvit.model import TSViT
from deftcore.methods.tsvit.tuner import TSViTTuner
from deftcore.ops.checks import check_count
from deftcore.training.adapters import MethodName
from deftcore.training.fields import option
from deftcore.training.tuners import OneActive, RestoringLayer, check_finite


@dataclass
class TSViTTokenConfig(PeftConfig):
    """Config of token tuning.

    Raises ValueError, naming the field, on a value out of range.
    """

    tokens: int | None = option(None, "How many class tokens train, from the last; None is all.")
    modules_to_save: list[str] | None = option(None, "Modules trained and saved whole.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MethodName("TSVIT_TOKEN")
        self.target_modules = None  # which PEFT reads; there are but one module's tokens
        if self.tokens is not None:
            check_count("tokens", self.tokens)


class TokenLayer(RestoringLayer, OneActive):
    """Class tokens of which the last are an adapter's, [n, d], that start as the model's. One is active at a time."""

    one_of = "one adapter's class tokens are"
    shown_as = "tsvit_token"
    adapter_layer_names = ("tsvit_token_rows",)

    def __init__(self, base_layer: ClassTokens, adapter_name: str, config: TSViTTokenConfig, tokens: int) -> None:
        super().__init__(base_layer)
        self.tsvit_token_rows = nn.ParameterDict()
        self.update_layer(adapter_name, config, tokens)

    def update_layer(self, adapter_name: str, config: TSViTTokenConfig, tokens: int) -> None:
        """Adds an adapter of the last `tokens` rows, which start as the base's."""
        weight = self.base_layer.weight if self._before is None else self._before
        self.tsvit_token_rows[adapter_name] = nn.Parameter(weight[-tokens:].detach().clone())
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor) -> Tensor:
        """[N, K + L, d] for x [N, L, d]."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = self._present()
        if self.disable_adapters or self.merged or not names:
            return self.base_layer(x)
        rows: Any = self.tsvit_token_rows[names[0]]
        kept = self.base_layer.weight
        tokens = torch.cat([kept[: len(kept) - len(rows)], rows.to(kept.dtype)])
        return torch.cat([tokens.expand(x.shape[0], -1, -1), x], 1)

    def _present(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.tsvit_token_rows]

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Writes an adapter's tokens into the model's.

        Raises:
            ValueError: several; with `safe_merge`, values that are not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.tsvit_token_rows]
        if not names:
            return
        if len(names) + len(self.merged_adapters) > 1:
            raise ValueError(f"adapter_names: one adapter's class tokens are merged at a time, got {names}")
        rows: Any = self.tsvit_token_rows[names[0]]
        if safe_merge:
            check_finite(rows, names[0])
        self._before = self.base_layer.weight.detach().clone()
        self.base_layer.weight[-len(rows) :] = rows
        self.merged_adapters.extend(names)

    def restore(self) -> None:
        """Gives the model its own tokens back."""
        self.base_layer.weight.copy_(self._before)


class TSViTTokenModel(TSViTTuner):
    """Puts a `TokenLayer` into a TSViT; made by `peft.get_peft_model`."""

    prefix: str = "tsvit_token_"
    tuner_layer_cls = TokenLayer

    def places(self, config: TSViTTokenConfig, model: TSViT) -> dict[str, tuple[int]]:
        """The class tokens, and how many of them train."""
        tokens = model.config.num_classes
        if config.tokens is not None and config.tokens > tokens:
            raise ValueError(f"tokens: must be at most the {tokens} that the model has, got {config.tokens}")
        return {"class_tokens": (config.tokens or tokens,)}
