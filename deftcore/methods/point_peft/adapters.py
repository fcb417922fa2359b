"""The small networks of Point-PEFT: a bottleneck in one form, from which all of them are made."""

import torch
from torch import Tensor, nn

_BIAS_STD = 1e-6  # of the reference start


class Bottleneck(nn.Module):
    """up(dropout(act(down(x)))), [..., C] -> [..., C] in the input's dtype, act(z) = z sigmoid(1.702 z).

    Args:
        init: "identity": up starts at zero; "reference": Xavier weights, biases of a spread of 1e-6.
    """

    def __init__(self, width: int, rank: int, dropout: float, init: str) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank)
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(rank, width)
        for linear in (self.down, self.up):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=_BIAS_STD)
        if init == "identity":
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.down(x.to(self.down.weight.dtype))
        return self.up(self.dropout(hidden * torch.sigmoid(1.702 * hidden))).to(x.dtype)
