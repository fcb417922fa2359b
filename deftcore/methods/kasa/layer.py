"""One linear layer under KaSA."""

from collections.abc import Sequence

import torch
from torch import nn

from deftcore.methods.kasa.config import KasaFactoredConfig
from deftcore.methods.kasa.truncation import dropped_factors
from deftcore.methods.lora.base_weights import change_weight, stored_weight
from deftcore.methods.lora.paired import Factors, PairedLora
from deftcore.nn.fingerprints import fingerprints
from deftcore.nn.linear import shape_of


class KasaLinear(PairedLora):
    """y = x W^T - (x F) E^T + s ((drop(x) A^T) * sigma) B^T + bias (KaSA, arXiv 2412.06071), with E F^T the part of W
    in its smallest singular components and sigma [R] trained beside A [R, K] and B [M, R].

    With `base_mode="destructive"` E F^T is taken out of W itself, once and for all.
    """

    adapter_layer_names: tuple[str, ...] = (*PairedLora.adapter_layer_names, "lora_diag")
    truncated = 0  # how many singular components are gone from W itself

    def start(self, name: str, config: KasaFactoredConfig) -> None:
        """sigma from a standard normal, and room for what is taken away."""
        if not hasattr(self, "lora_diag"):
            self.lora_diag = nn.ParameterDict()
        like = self.lora_A[name].weight
        self.lora_diag[name] = nn.Parameter(torch.randn(self.r[name], device=like.device, dtype=like.dtype))
        cut = self._cut(name)
        self.room_for(name, cut if config.base_mode == "factored" else 0)

    def _cut(self, name: str) -> int:
        return self.configs[name].cut(self.r[name], *shape_of(self.get_base_layer()))

    def sigma(self, name: str) -> torch.Tensor:
        return self.lora_diag[name]

    def takers(self, names: Sequence[str]) -> Sequence[str]:
        """The first of the highest rank: what others take away is part of that."""
        return names if len(names) < 2 else [max(names, key=lambda name: self.lora_minus_A[name].shape[0])]

    def original(self, name: str) -> Factors:
        """As `joined`; not of a destructive adapter.

        Raises:
            ValueError: a destructive adapter.
        """
        if self.configs[name].base_mode != "factored":
            raise ValueError(f"adapter: {name!r} has truncated the weights; export needs base_mode 'factored'")
        return self.joined(name)

    def from_weight(self, name: str) -> None:
        """What the adapter takes away, from the weight; a destructive one takes it out of the weight."""
        config, cut, weight = self.configs[name], self._cut(name), self.dense_weight()
        digest = next(iter(self.fingerprint().values()))
        if config.base_mode == "factored":
            self.take_away(name, *dropped_factors(weight, cut, digest, config.svd_device))
        elif cut > self.truncated:  # a second adapter of the same rank finds only zeros
            if self.truncated:
                digest = next(iter(fingerprints({"weight": weight}).values()))
            a, b = dropped_factors(weight, cut, digest, config.svd_device)
            base = self.get_base_layer()
            change_weight(base, stored_weight(base), -(b @ a))
            self.truncated = cut

    def arrived(self, name: str) -> None:
        """A destructive adapter's file holds nothing that was truncated."""
        if self.configs[name].base_mode == "factored":
            super().arrived(name)

    def __repr__(self) -> str:
        return "kasa." + super().__repr__().removeprefix("lora.")
