"""LoRA beside a frozen pair of factors that is taken away from the weight, as one op: what rooms share whose adapters
begin on the spectrum of the weight."""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor

from deftcore.methods.lora.base_weights import change_weight, dense_weight, stored_weight, weight_of
from deftcore.methods.lora.layer import fused_product, obstacle
from deftcore.nn.fingerprints import fingerprints
from deftcore.nn.linear import Linear4bit, is_transposed, shape_of
from deftcore.nn.linear16 import LINEARS
from deftcore.nn.sharding import is_sharded
from deftcore.ops.checks import check_count
from deftcore.training.tuners import check_finite, nothing_merged

Factors = tuple[Tensor, Tensor]  # A [R, K] and B [M, R], whose product is B A


class Terms(NamedTuple):
    """What an adapter adds to its layer's output: scaling ((drop(x) A^T) * sigma) B^T - (x A0^T) B0^T."""

    a: Tensor  # [R, K]
    b: Tensor  # [M, R]
    scaling: float
    sigma: Tensor | None  # [R]; None is ones
    minus: Factors | None  # A0 [R0, K], which is frozen, and B0 [M, R0]

    def joined(self) -> Factors:
        """As two factors of rank R + R0."""
        a = self.a * (self.scaling if self.sigma is None else (self.scaling * self.sigma).unsqueeze(1))
        if self.minus is None:
            return a, self.b
        return torch.cat([a, self.minus[0]]), torch.cat([self.b, -self.minus[1]], 1)


_PLAIN_ONLY = ("use_dora", "lora_bias", "target_parameters", "layer_replication", "trainable_token_indices")


class PairedVariant(LoraVariant):
    """What PEFT sees of an adapter of a `PairedLora`: a variant of LoRA, so that nothing takes its factors for plain
    ones."""

    @staticmethod
    def init(module: Any, adapter_name: str, *, config: Any, **_: Any) -> None:  # type: ignore[override]
        """Makes what the adapter has beside A and B."""
        if not hasattr(module, "lora_minus_A"):
            module.lora_minus_A, module.lora_minus_B = BufferDict(persistent=True), BufferDict(persistent=True)
            module.configs, module.pending = {}, set()
        module.configs[adapter_name] = config
        module.pending.add(adapter_name)
        module.start(adapter_name, config)

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """The rows of a mixed batch that are this adapter's [..., K] to [..., M]."""
        return result + module.added(x, active_adapter).to(result.dtype)

    def supports_lora_conversion(self) -> bool:
        """The update is linear and the weight untouched."""
        return True


class PairedLora(LoraLinear):
    """y = x W^T + bias + drop(x) (B A)^T - x (B0 A0)^T: B A is trained, B0 A0 [M, K] is frozen, a pair for each
    adapter. W stays as it is, dense or in 4 bits.

    All terms are one op (`deftcore.ops.lora_linear`), and what is frozen costs no gradient. Several active adapters
    add up. Merging keeps the weight of before, and unmerging puts it back bit for bit.

    A room says by `start` and `from_weight` what an adapter begins from, by `terms` how its change is computed.
    """

    fused_variants: tuple[type, ...] = (PairedVariant,)
    other_param_names: tuple[str, ...] = (*LoraLayer.other_param_names, "lora_minus_A", "lora_minus_B", "configs")
    constant_buffers = True  # processes need not send them
    lora_A: Any
    lora_B: Any
    lora_minus_A: Any
    lora_minus_B: Any
    configs: dict[str, Any]
    pending: set[str]  # adapters for which `from_weight` has not run
    digest: dict[str, str] | None = None  # of the weight as it was at first, by dtype
    _before: Any  # the weight as it was before the first merge

    @property
    def bases(self) -> tuple[type, ...]:
        """Layers whose product the fused op computes: bitsandbytes' too once `patch` has made it native."""
        home = sys.modules.get("deftcore.methods.lora.bitsandbytes")
        return (*LINEARS, Linear4bit) if home is None else (*LINEARS, Linear4bit, home.FusedBnbLinear)

    @property
    def lora_variants(self) -> dict:
        """PEFT's table of variants by the fields that ask for them: here there is one."""
        return {(): PairedVariant}

    # ------------------------------------------------------------------ what a room says

    def start(self, name: str, config: Any) -> None:
        """Makes what an adapter has beside `lora_A` and `lora_B`: shapes alone of what `from_weight` will set."""
        raise NotImplementedError

    def from_weight(self, name: str) -> None:
        """Sets, by `take_away`, what the adapter has from the weight; may change the weight."""
        raise NotImplementedError

    def sigma(self, name: str) -> Tensor | None:
        """What stands between A and B on the diagonal [R], if anything."""
        return None

    def terms(self, name: str) -> Terms:
        """What the adapter adds, differentiable in its parameters."""
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return Terms(a, b, self.scaling[name], self.sigma(name), self.minus(name))

    # ------------------------------------------------------------------ what comes from the weight

    @property
    def has_weights(self) -> bool:
        """Whether the layer beneath has values, not only shapes."""
        weight: Any = self.get_base_layer().weight
        return weight.device.type != "meta"

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """The weight's values [M, K], decoded where it is packed and whole where it is sharded."""
        return dense_weight(self.get_base_layer())

    @torch.no_grad()
    def fingerprint(self) -> dict[str, str]:
        """Digests of the weight as it was before any adapter changed it, by dtype.

        Raises:
            ValueError: an adapter is merged into it.
        """
        if self.digest is None:
            if self.merged:
                raise ValueError("model: an adapter is merged into the weights; unmerge it first")
            self.digest = fingerprints({"weight": self.dense_weight()})
        return self.digest

    @torch.no_grad()
    def settle(self, name: str) -> None:
        """Does what the adapter needs the weight for, where that has not been done.

        Raises:
            RuntimeError: the weights are on the meta device.
            ValueError: the weight is not finite, or cannot be changed.
        """
        if name not in self.pending:
            return
        if not self.has_weights:
            raise RuntimeError("the weights are on the meta device; load them before the first forward or merge")
        self.fingerprint()
        self.from_weight(name)
        self.pending.discard(name)

    def arrived(self, name: str) -> None:
        """A file gives, or is about to give, what the adapter has from the weight."""
        self.pending.discard(name)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in list(self.pending):
            if f"{prefix}lora_minus_A.{name}" in state_dict:
                self.arrived(name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        for name in list(self.pending) if self.has_weights else ():
            if self.configs[name].base_hash is None:  # otherwise it waits for its file
                self.settle(name)
        super()._save_to_state_dict(*args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's; where KaSA has truncated the weight, that stays."""
        super().delete_adapter(adapter_name)
        self.pending.discard(adapter_name)

    # ------------------------------------------------------------------ factors

    def take_away(self, name: str, a: Tensor, b: Tensor) -> None:
        """Sets the frozen pair of an adapter, A0 [R0, K] and B0 [M, R0], in its factors' dtype.

        The values are those of the weight's dtype, which factors have at first: PEFT may have widened them since."""
        weight: Any = self.get_base_layer().weight
        dtype = self.lora_A[name].weight.dtype
        at_first = weight.dtype if weight.is_floating_point() else dtype
        self.lora_minus_A[name] = a.detach().to(at_first).to(dtype).contiguous()
        self.lora_minus_B[name] = b.detach().to(at_first).to(dtype).contiguous()

    def room_for(self, name: str, rank: int) -> None:
        """A frozen pair of zeros of a rank, which a file may fill."""
        base: Any = self.get_base_layer()
        rows, columns = shape_of(base)
        place = base.weight.device  # not where an empty A may stand
        self.take_away(name, torch.zeros(rank, columns, device=place), torch.zeros(rows, rank, device=place))

    def minus(self, name: str) -> Factors | None:
        """The frozen pair that is taken away; None where there is none."""
        self.settle(name)
        a: Tensor = self.lora_minus_A[name]
        return (a, self.lora_minus_B[name]) if a.shape[0] else None

    def trained(self, name: str) -> Factors:
        """The factors A [R, K] and B [M, R] of the adapter's update alone, scaling and sigma in A."""
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return Terms(a, b, self.scaling[name], self.sigma(name), None).joined()

    def joined(self, name: str) -> Factors:
        """Factors of the whole change of the weight, trained and taken away; R + R0 of them."""
        return self.terms(name).joined()

    def _names(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name in self.lora_A]

    def takers(self, names: Sequence[str]) -> Sequence[str]:
        """Those of several active adapters whose frozen pairs are taken away."""
        return names

    def original(self, name: str) -> Factors:
        """Factors of the whole change against the weight as it was at first.

        Raises:
            ValueError: what was taken away is known no more.
        """
        return self.joined(name)

    # ------------------------------------------------------------------ forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., K] to [..., M] in x's dtype; with adapters disabled exactly what the layer beneath gives."""
        names = self._names(self.active_adapters)
        if args or kwargs or self.disable_adapters or self.merged or not names:
            for name in self.lora_A:
                self.settle(name)
            return super().forward(x, *args, **kwargs)
        weight, takers = weight_of(self.get_base_layer()), self.takers(names)
        if not obstacle(self, weight, x.dtype):  # there is one
            return fused_product(self, weight, x, *self.terms(names[0]), self.lora_dropout[names[0]])
        y = self.base_layer(x)
        dtype = y.dtype
        for name in names:
            y = y + self.added(x, name, takes=name in takers)
        return y.to(dtype)

    def added(self, x: Tensor, name: str, *, takes: bool = True) -> Tensor:
        """What an adapter adds to the output [..., M] for an input x [..., K], as products of their own.

        Args:
            takes: whether its frozen pair is taken away.
        """
        a, b, scaling, sigma, minus = self.terms(name)
        x = self._cast_input_dtype(x, a.dtype)
        low = F.linear(self.lora_dropout[name](x), a) * (scaling if sigma is None else scaling * sigma)
        y = F.linear(low, b)
        return y if minus is None or not takes else y - F.linear(F.linear(x, minus[0]), minus[1])

    def waits(self) -> str:
        """Why the layer runs as several products for now; empty where it is one op."""
        weight = weight_of(self.get_base_layer())
        return obstacle(self, weight, weight.dtype)

    # ------------------------------------------------------------------ merging

    @torch.no_grad()
    def dense_update(self, names: Sequence[str] | None = None) -> Tensor:
        """What the adapters change the weight by, [M, K] in float32 or wider; None is the active ones, of which there
        may be none."""
        names = self._names(self.active_adapters if names is None else names)
        base = self.get_base_layer()
        total = torch.zeros(shape_of(base), device=weight_of(base).device)
        takers = self.takers(names)
        for a, b in [self.joined(name) if name in takers else self.trained(name) for name in names]:
            wide = torch.promote_types(a.dtype, torch.float32)
            total = total + b.to(wide) @ a.to(wide)
        return total

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The whole change of the weight by one adapter, as the weight is stored."""
        delta = self.dense_update([adapter])
        return delta.t() if is_transposed(self.get_base_layer()) else delta

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the change to the weight, with one rounding; over a `Linear4bit` the sum is requantised.

        Raises:
            ValueError: with `safe_merge` a change that is not finite; a weight that is sharded or bitsandbytes'.
        """
        names = self._names(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        base: Any = self.get_base_layer()
        for name in names:
            self.settle(name)  # which may change the weight
        if is_sharded(base.weight):
            raise ValueError("merge: the weights are sharded over processes; merge into a model on one")
        update = self.dense_update([*self.merged_adapters, *names])
        if safe_merge:
            check_finite(update, names[0])
        before = self._before if self.merged else stored_weight(base)
        change_weight(base, before, update)
        self._before = before
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts the weight of before the first merge back, bit for bit."""
        if nothing_merged(self):
            return
        base: Any = self.get_base_layer()
        base.set_quantized(self._before) if isinstance(base, Linear4bit) else base.weight.data.copy_(self._before)
        del self._before
        self.merged_adapters.clear()

    @torch.no_grad()
    def scale_output_(self, factor: float) -> None:
        """Multiplies what the layer returns by a number: weight, bias and what adapters add and take away."""
        base: Any = self.get_base_layer()
        for name in self.lora_B:
            self.settle(name)  # from the weight as it was
        if hasattr(base, "scale_output_"):
            base.scale_output_(factor)
        else:
            for tensor in (base.weight, base.bias):
                _ = None if tensor is None else tensor.mul_(factor)
        if self.merged:
            self._before = self._before.scaled(factor) if isinstance(base, Linear4bit) else self._before * factor
        for name, up in self.lora_B.items():
            up.weight.mul_(factor)
            self.lora_minus_B[name].mul_(factor)


def check_plain(config: Any, inits: Sequence[Any]) -> None:
    """Raises ValueError, naming the field, where a config asks for a form of LoRA that a `PairedLora` is not.

    Args:
        config: a subclass of `peft.LoraConfig`.
        inits: what `init_lora_weights` may be.
    """
    variants = [
        name for name, field in type(config).__dataclass_fields__.items() if field.metadata.get("is_lora_variant")
    ]
    for name in dict.fromkeys((*variants, *_PLAIN_ONLY)):
        if getattr(config, name, None):
            raise ValueError(f"{name}: is not for {type(config).__name__}, got {getattr(config, name)!r}")
    if config.init_lora_weights not in inits:
        known = ", ".join(map(repr, inits))
        raise ValueError(f"init_lora_weights: must be one of {known}, got {config.init_lora_weights!r}")
    check_count("r", config.r)
