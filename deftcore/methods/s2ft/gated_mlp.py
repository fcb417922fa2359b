"""A gated MLP whose activation and down projection are one op, and what its backward may compute again."""

from typing import Any

import torch
from torch import Tensor, nn

from deftcore.methods.s2ft.layer import S2ftLayer
from deftcore.models.activations import Swapped
from deftcore.nn.activations import activation_of
from deftcore.nn.linear import called_plainly
from deftcore.nn.observed import ObservedActivation
from deftcore.ops.autocast import autocast_dtype, autocast_to
from deftcore.ops.gated_linear import gated_linear


class FusedGatedMlp(nn.Module):
    """A gated MLP whose activation and down projection are one op, with the children and names of the class it
    replaced, which are those of `deftcore.models.families.GATED_MLP`; the same function."""

    recompute: str
    unfused_class: type[nn.Module]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] to (f(x G^T) * x U^T) D^T [..., d], in x's dtype.

        The replaced class's own forward runs where a part has hooks, is observed, or trains whole.
        """
        down: Any = self.down_proj
        act: Any = self.act_fn
        direct = called_plainly(down) and called_plainly(act) and not isinstance(act, (ObservedActivation, Swapped))
        if not direct or (down.split if isinstance(down, S2ftLayer) else down.weight.requires_grad):
            return self.unfused_class.forward(self, x)
        kind = activation_of(act)
        gate, up = self.gate_proj(x), self.up_proj(x)  # type: ignore[operator]
        with _Recomputed(self, x, gate, up):
            if isinstance(down, S2ftLayer):
                return down.gated(gate, up, kind)
            return gated_linear(gate, up, down.weight, activation=kind, bias=down.bias)


class _Recomputed(torch.autograd.graph.saved_tensors_hooks):
    """Keeps the MLP's input in place of `up`, or of `gate` and `up`, and multiplies again in the backward."""

    def __init__(self, mlp: FusedGatedMlp, x: Tensor, gate: Tensor, up: Tensor) -> None:
        x = x.detach()
        again = {}
        if mlp.recompute != "none":
            again[up.data_ptr()] = (mlp.up_proj, up.shape)
        if mlp.recompute == "gate_up":
            again[gate.data_ptr()] = (mlp.gate_proj, gate.shape)

        def pack(tensor: Tensor) -> Any:
            found = again.get(tensor.data_ptr())
            return found[0] if found is not None and tensor.shape == found[1] else tensor

        dtype = autocast_dtype(x)

        def unpack(kept: Any) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            with torch.no_grad(), autocast_to(x.device.type, dtype):  # as it was in the forward
                return kept(x)

        super().__init__(pack, unpack)
        self.active = bool(again) and torch.is_grad_enabled()

    def __enter__(self) -> None:
        if self.active:
            super().__enter__()

    def __exit__(self, *args: Any) -> None:
        if self.active:
            super().__exit__(*args)
