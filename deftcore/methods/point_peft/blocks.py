"""The blocks of a point-cloud transformer: pre-norm attention and MLP, and a stack of them."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from deftcore.models.own import recomputed


class DropPath(nn.Module):
    """x, or in training 0 for a share `rate` of the batch's rows and x / (1 - rate) for the others (stochastic depth,
    arXiv 1603.09382)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        kept = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) >= self.rate
        return x * (kept / (1 - self.rate)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


class Attention(nn.Module):
    """Self-attention [B, T, C] -> [B, T, C] in heads of C / heads, its scale (C / heads)^(-1/2)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.projection = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.joined(scaled_dot_product_attention(*self.split(x)))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [B, heads, T, C / heads]."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return query, key, value

    def joined(self, attended: Tensor) -> Tensor:
        """[B, heads, T, C / heads] through the output projection: [B, T, C]."""
        return self.projection(attended.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))), [..., C] -> [..., C]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """x + drop_path(attention(norm1(x))), and on that x + drop_path(mlp(norm2(x)))."""

    def __init__(self, width: int, heads: int, hidden: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, hidden)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attention(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class BlockStack(nn.ModuleList):
    """Blocks one after another, each given the position anew.

    Args:
        drop_path: rate of the last block; it rises linearly from 0 at the first.
    """

    recompute: dict | None = None  # options of torch.utils.checkpoint: activations are computed again in the backward

    def __init__(self, depth: int, width: int, heads: int, hidden: int, drop_path: float) -> None:
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        super().__init__(Block(width, heads, hidden, rate) for rate in rates)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """Tokens [B, T, C] through the blocks, the position [B, T, C] added at the input of every one."""
        for block in self:
            x = self.run(block, x + position)
        return x

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        """One block; in training its activations are kept only where they are not to be recomputed."""
        if self.recompute is not None and self.training and torch.is_grad_enabled():
            return recomputed(block, x, options=self.recompute)
        return block(x)
