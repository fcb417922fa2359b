"""What is left of a linear layer that has no input, or no output, that counts."""

import torch
from torch import Tensor, nn


class Constant(nn.Module):
    """y = bias, whatever x: stands where a linear layer was whose channels are all cut. Without a bias y is zero.

    Its weight [0] is there for files: of none a reader that expects the whole layer would make a random one; its shape
    stops it.

    Shapes: x [..., in_features] -> [..., out_features].
    """

    weight: nn.Parameter
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        frozen = None if bias is None else nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
        self.register_parameter("bias", frozen)

    def forward(self, x: Tensor) -> Tensor:
        """bias [out_features] at every place of x [..., in_features], in x's dtype."""
        y = torch.zeros((*x.shape[:-1], self.out_features), dtype=x.dtype, device=x.device)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
