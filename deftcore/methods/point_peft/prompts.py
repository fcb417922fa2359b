"""Prompts: learned keys and values of a block, enriched by what a cloud finds in the memory bank."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from deftcore.methods.point_peft.adapters import Bottleneck
from deftcore.methods.point_peft.config import PointPeftConfig

_STD = 0.02


class Prompts(nn.Module):
    """P_l = dropout(E_l) + R + W2 act(W1 R), the prompts of one block; dropout(E_l) without a bank.

    Args:
        width, heads: of the block's attention.
    """

    def __init__(self, config: PointPeftConfig, width: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(config.prompt_tokens, width))
        nn.init.trunc_normal_(self.tokens, std=_STD)
        self.dropout = nn.Dropout(config.prompt_dropout)
        self.enrich = None
        if config.uses_bank:
            self.enrich = Bottleneck(width, config.prompt_rank, config.dropout, config.init)
        self.gate = nn.Parameter(torch.zeros(heads, 1, 1)) if config.prompts == "gated" else None

    def forward(self, retrieved: Tensor | None) -> Tensor:
        """[B, P, C] of a bank's [B, P, C]; [1, P, C], the same for all clouds, without one."""
        own = self.dropout(self.tokens).unsqueeze(0)
        if self.enrich is None or retrieved is None:
            return own
        return own.to(retrieved.dtype) + retrieved + self.enrich(retrieved)

    def attend(self, attention: Any, x: Tensor, prompts: Tensor) -> Tensor:
        """What a block's attention gathers for its tokens: [B, heads, T, C / heads].

        Prompts have no output, so that they are keys and values and nothing else. As tokens they stand in one softmax
        with the block's own keys; gated they have one of their own, times the heads' gates.

        Args:
            attention: with `split`, [B, T, C] to queries, keys and values by heads.
            x, prompts: normalised, [B, T, C] and [B or 1, P, C].
        """
        query, key, value = attention.split(x)
        _, prompt_key, prompt_value = attention.split(prompts.to(x.dtype).expand(x.shape[0], -1, -1))
        if self.gate is not None:
            beside = scaled_dot_product_attention(query, prompt_key, prompt_value)
            return scaled_dot_product_attention(query, key, value) + self.gate.to(value.dtype) * beside
        return scaled_dot_product_attention(query, torch.cat([prompt_key, key], 2), torch.cat([prompt_value, value], 2))
