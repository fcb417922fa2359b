"""One linear layer under BA-LoRA."""

from typing import Any

import torch
from torch import Tensor, nn

from deftcore.methods.ba_lora.config import BaLoraConfig
from deftcore.methods.lora.base_weights import change_weight, stored_weight
from deftcore.methods.lora.paired import Factors, PairedLora, Terms
from deftcore.training.tuners import merge_or_unmerge


class BaLoraLinear(PairedLora):
    """y = x W^T + s x (B A - B0 A0)^T + bias, where B A starts as B0 A0, the part of W in its R largest singular
    components over s (PiSSA's start, arXiv 2404.02948).

    As factors it is [A - A0; A0] and [B, B - B0]: exactly 0 at the start in any dtype. Turned off, the layer is the
    pre-trained one. With `base_mode="pissa"` W - s B0 A0 takes W's place, and the layer that is off adds s B0 A0.
    """

    in_base = 0.0  # the s of an s B0 A0 that has been taken out of W itself
    stored: set[str]  # adapters whose A0 and B0 come from files

    def start(self, name: str, config: BaLoraConfig) -> None:
        """Room for A0 and B0."""
        if not hasattr(self, "stored"):
            self.stored = set()
        self.stored.discard(name)  # an earlier adapter of that name may have come from a file
        self.room_for(name, self.r[name])

    def terms(self, name: str) -> Terms:
        """s (A - A0) with B, and s A0 with B - B0, exactly 0 at the start; s A with B where the weight has no B0 A0."""
        self.settle(name)
        if self.in_base:
            return super().terms(name)
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        a0, b0, scaling = self.lora_minus_A[name], self.lora_minus_B[name], self.scaling[name]
        return Terms(a - a0, b, scaling, None, (a0, (b0 - b) * scaling))

    def minus(self, name: str) -> Factors | None:
        """s A0 and B0; None where they are not in the weight any more."""
        self.settle(name)
        return None if self.in_base else self._first(name)

    def _first(self, name: str) -> Factors:
        return self.lora_minus_A[name] * (self.in_base or self.scaling[name]), self.lora_minus_B[name]

    def original(self, name: str) -> Factors:
        """Factors of s (B A - B0 A0), the change against the pre-trained weight in either form; of rank 2 R."""
        self.settle(name)
        terms = self.terms(name)
        return (terms._replace(minus=self._first(name)) if self.in_base else terms).joined()

    def from_weight(self, name: str) -> None:
        """A = A0 = (S/s)^1/2 V^T and B = B0 = U (S/s)^1/2, unless a file has given them."""
        if name not in self.stored:
            weight, scaling = self.dense_weight(), self.scaling[name]
            u, s, v = principal(weight, self.r[name], self.configs[name].svd_niter)
            root = (s / scaling).sqrt()
            self.take_away(name, root.unsqueeze(1) * v.t(), u * root)
            self.lora_A[name].weight.copy_(self.lora_minus_A[name])
            self.lora_B[name].weight.copy_(self.lora_minus_B[name])
        if self.configs[name].base_mode == "pissa":
            self._add_first(name, -1.0)
            self.in_base = self.scaling[name]

    def _add_first(self, name: str, factor: float) -> None:
        """Adds factor s B0 A0 to the weight itself."""
        base = self.get_base_layer()
        a0, b0 = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in self._first(name))
        change_weight(base, stored_weight(base), factor * (b0 @ a0))

    def arrived(self, name: str) -> None:
        """A0 and B0 come from a file; in the form that changes the weight that is still to be done."""
        self.stored.add(name)
        if self.configs[name].base_mode == "factored":
            super().arrived(name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As `PairedLora.forward`; where adapters are disabled the pre-trained layer in either form."""
        for name in self.lora_A:
            self.settle(name)
        if self.in_base and "__base__" in (kwargs.get("adapter_names") or ()):
            raise ValueError("adapter_names: '__base__' is not there where base_mode 'pissa' has changed the weights")
        y = super().forward(x, *args, **kwargs)
        if not (self.in_base and self.disable_adapters):
            return y
        a0, b0 = self._first(next(iter(self.lora_A)))
        return y + nn.functional.linear(nn.functional.linear(x.to(a0.dtype), a0), b0).to(y.dtype)

    @torch.no_grad()
    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The plain layer, merged or as it was before training."""
        merge_or_unmerge(self, merge, safe_merge, adapter_names)
        if self.in_base and not self.merged:
            self._put_back(next(iter(self.lora_A)))
        return self.get_base_layer()

    @torch.no_grad()
    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's; the weight has what was taken out of it again, up to rounding."""
        if self.in_base and adapter_name in self.lora_A:
            self._put_back(adapter_name)
        super().delete_adapter(adapter_name)

    def _put_back(self, name: str) -> None:
        self._add_first(name, 1.0)
        self.in_base = 0.0

    def __repr__(self) -> str:
        return "ba_lora." + super().__repr__().removeprefix("lora.")


@torch.no_grad()
def principal(weight: Tensor, rank: int, iterations: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest singular triplets of a weight [M, K]: U [M, rank], S [rank] falling, V [K, rank], in float32
    or wider.

    Args:
        iterations: of the randomised form, whose draw is always the same; None decomposes the weight exactly.

    Raises:
        ValueError: a weight that is not finite.
    """
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("model: a weight is not finite and has no singular values")
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if iterations is None:
        u, s, vt = torch.linalg.svd(wide, full_matrices=False)
        return u[:, :rank], s[:rank], vt[:rank].t()
    devices = [wide.device] if wide.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        return torch.svd_lowrank(wide, q=rank, niter=iterations)
