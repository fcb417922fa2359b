"""The Transformer of TSViT: residual branches that begin with their LayerNorm, so that an adapter put on a branch
reads what the branch reads."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deftcore.models.own import recomputed

Prompt = tuple[Tensor, Tensor]  # keys and values, [heads, m, d_h] each


class Attention(nn.Module):
    """projection(softmax(q k^T / sqrt(d_h)) v) with q, k, v = qkv(norm(x)); no [heads, L, L] is kept."""

    def __init__(self, dim: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.projection = nn.Linear(heads * dim_head, dim)

    def keys_and_values(self, rows: Tensor) -> Prompt:
        """The prompt [heads, m, d_h] that rows [m, d] make, which stand behind the normalised ones of every sequence.

        Since what rows would put out is cut off, they are keys and values alone, and the same for all sequences.
        """
        _, k, v = self._cut(self.qkv(rows))
        return k, v

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, queries: int | None = None, prompt: Prompt | None = None
    ) -> Tensor:
        """[N, queries, d] for x [N, L, d].

        Args:
            mask: bool [N, L], the rows that may be attended to, or [N, L + m] with the prompt's; None: all.
            queries: for how many rows, from the first; None: all.
            prompt: keys and values that join those of x at their end.
        """
        q, k, v = self._cut(self.qkv(self.norm(x)))
        if prompt is not None:
            k, v = (
                torch.cat([own, joined.to(own.dtype).expand(x.shape[0], -1, -1, -1)], 2)
                for own, joined in zip((k, v), prompt, strict=True)
            )
        if mask is not None:
            mask = F.pad(mask, (0, k.shape[2] - mask.shape[1]), value=True)[:, None, None]
        y = F.scaled_dot_product_attention(q[:, :, :queries], k, v, attn_mask=mask)
        return self.projection(y.transpose(1, 2).flatten(2))

    def _cut(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """q, k and v [..., heads, L, d_h] of what the projection gave, [..., L, 3 heads d_h]."""
        return qkv.unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-3, -2).unbind()


class Mlp(nn.Module):
    """fc2(gelu(fc1(norm(x))))."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] for x [..., d]."""
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class EncoderLayer(nn.Module):
    """x + attention(x), and then x + mlp(x)."""

    def __init__(self, dim: int, heads: int, dim_head: int, hidden: int) -> None:
        super().__init__()
        self.attention = Attention(dim, heads, dim_head)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x: Tensor, mask: Tensor | None = None, queries: int | None = None) -> Tensor:
        """The first `queries` rows, [N, queries, d], for x [N, L, d] and mask [N, L]; see `Attention`."""
        x = x[:, :queries] + self.attention(x, mask, queries=queries)
        return x + self.mlp(x)


class Encoder(nn.Module):
    """Layers, and a LayerNorm after the last."""

    def __init__(self, depth: int, dim: int, heads: int, dim_head: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(dim, heads, dim_head, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.recompute: dict[str, Any] | None = None  # options of `checkpoint`, where layers are to be computed again

    def forward(self, x: Tensor, mask: Tensor | None = None, keep: int | None = None) -> Tensor:
        """The first `keep` rows, [N, keep, d], for x [N, L, d] and mask [N, L]: the last layer is asked for no others.

        They are the same numbers as those of the whole sequence, as no row of a layer reads what another puts out.
        """
        for number, layer in enumerate(self.layers, 1):
            queries = keep if number == len(self.layers) else None
            if self.recompute is None or not self.training:
                x = layer(x, mask, queries)
            else:
                x = recomputed(layer, x, mask, queries, options=self.recompute)
        return self.norm(x)
