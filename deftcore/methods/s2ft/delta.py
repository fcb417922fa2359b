"""S2FT updates as adapters (arXiv 2412.06289, section 6.2): extract, apply, remove, switch, fuse."""

import json
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deftcore._files import replacing_file
from deftcore.methods.s2ft.layer import S2ftLayer
from deftcore.models.gates import gates_of
from deftcore.nn.fingerprints import check_base, fingerprints
from deftcore.nn.linear import Linear4bit, is_transposed
from deftcore.ops.grouped_delta import SliceDelta

_FORMAT = "deftcore-delta-2"


@dataclass(eq=False)
class DeltaAdapter:
    """What a fine-tuning changed: per module the changed channels, in the base model's own numbering.

    Args:
        deltas: by module name of the base model.
        hashes: SHA-256, by dtype, of each slice of the base that the delta belongs to; none where fused adapters meet.
        details: family, method options and the like, saved along.
    """

    deltas: dict[str, SliceDelta]
    hashes: dict[str, dict[str, str]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        size = sum(d.block.numel() for d in self.deltas.values())
        return f"DeltaAdapter({len(self.deltas)} weights, {size} values)"

    def save(self, path: str | os.PathLike) -> None:
        """Writes a safetensors file, whole or not at all."""
        from safetensors.torch import save_file

        tensors = {}
        for name, delta in self.deltas.items():
            tensors[f"{name}.indices"] = delta.indices.to(torch.int32).contiguous()
            tensors[f"{name}.block"] = delta.block.contiguous()
        axes = {name: delta.axis for name, delta in self.deltas.items()}
        meta = {"format": _FORMAT, "axes": axes, "hashes": self.hashes, "details": self.details}
        with replacing_file(path) as partial:
            save_file(tensors, partial, {"deftcore": json.dumps(meta)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "DeltaAdapter":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError, ValueError: naming the file.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"adapter: no such file: {path}")
        try:
            with safe_open(path, "pt") as file:
                meta = json.loads((file.metadata() or {})["deftcore"])
                if meta["format"] != _FORMAT:
                    raise ValueError(f"format is {meta['format']!r}")
                deltas = {
                    name: SliceDelta(
                        int(axis), file.get_tensor(f"{name}.indices").clone(), file.get_tensor(f"{name}.block").clone()
                    )
                    for name, axis in meta["axes"].items()
                }
            return cls(deltas, dict(meta["hashes"]), dict(meta["details"]))
        except (SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"adapter: {path} is damaged or no delta adapter: {error}") from error


@torch.no_grad()
def extract_adapter(model: Any, *, dtype: torch.dtype | None = None) -> DeltaAdapter:
    """The update of a model wrapped by `S2ftConfig`, as a `DeltaAdapter` of its base.

    Args:
        dtype: of the blocks; None takes float32 where base + delta, rounded to the base's dtype, is the trained weight
            bit for bit, and float64 where only that is.

    Raises:
        ValueError: when the model has no S2FT layer, or adaptive gates, which no delta holds.
    """
    if gates_of(model) is not None:
        raise ValueError(
            "model: has adaptive gates, which a delta adapter does not hold; export the whole model instead"
        )
    deltas: dict[str, SliceDelta] = {}
    hashes: dict[str, dict[str, str]] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, S2ftLayer):
            continue
        name = name.removeprefix("base_model.model.")
        order = layer.indices.argsort()
        before, after = layer.original[order], layer.trained()[order]
        deltas[name] = SliceDelta(1 if layer.dim == 1 else 0, layer.indices[order], _difference(before, after, dtype))
        hashes[name] = fingerprints({name: before})
    if not deltas:
        raise ValueError(f"model: {type(model).__name__} has no S2FT layer; wrap it with S2ftConfig first")
    config: Any = model.peft_config[model.active_adapter]
    details = {"targets": config.targets, "strategy": config.strategy, "seed": config.seed, "indices": config.indices}
    family = getattr(getattr(model, "config", None), "model_type", None)
    return DeltaAdapter(deltas, hashes, {"family": family, **details})


def _difference(before: Tensor, after: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is not None:
        return (after.double() - before.double()).to(dtype)
    narrow = (after.double() - before.double()).float()
    if before.dtype != torch.float64 and torch.equal(_sum(before, narrow), after):
        return narrow
    return after.double() - before.double()


def _sum(before: Tensor, delta: Tensor) -> Tensor:
    """before + delta, added in the wider of float32 and delta's dtype, rounded once."""
    wide = torch.promote_types(delta.dtype, torch.float32)
    return (before.to(wide) + delta.to(wide)).to(before.dtype)


# ---------------------------------------------------------------------------- on a model's weights


def _check_adapter(adapter: Any) -> None:
    if not isinstance(adapter, DeltaAdapter):
        raise TypeError(
            f"adapter: must be a DeltaAdapter (DeltaAdapter.load reads a file), got {type(adapter).__name__}"
        )


class DeltaHost:
    """Puts delta adapters onto a plain model's weights and takes them off again, exactly.

        host = DeltaHost(model)
        host.switch(first)
        host.switch(second)
        host.remove()

    The changed slices' own values are kept, per adapter, and put back: subtracting would not restore them. A switch
    writes 2 s x n numbers per weight, whatever the weight's other side is. The base is compared with an adapter's
    hashes when that adapter is first applied.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.applied: DeltaAdapter | None = None
        # Per adapter that was applied once: each weight's places and its own values there.
        self._own: weakref.WeakKeyDictionary[DeltaAdapter, dict[str, tuple[Tensor, Tensor]]]
        self._own = weakref.WeakKeyDictionary()

    @torch.no_grad()
    def apply(self, adapter: DeltaAdapter) -> None:
        """Adds an adapter to the weights.

        Raises:
            TypeError: for anything but a `DeltaAdapter`.
            ValueError: when one is applied already, or this adapter is of another base. The model is unchanged then.
        """
        _check_adapter(adapter)
        if self.applied is not None:
            raise ValueError("adapter: another is applied; switch() or remove() it first")
        if adapter not in self._own:
            self._own[adapter] = self._read(adapter)
        for name, (index, values) in self._own[adapter].items():
            block = adapter.deltas[name].block.to(values.device)
            self._lines(name, adapter.deltas[name]).index_copy_(0, index, _sum(values, block))
        self.applied = adapter

    @torch.no_grad()
    def remove(self) -> None:
        """Puts the base's own values back, bit for bit. Without an applied adapter, does nothing."""
        if self.applied is None:
            return
        for name, (index, values) in self._own[self.applied].items():
            self._lines(name, self.applied.deltas[name]).index_copy_(0, index, values)
        self.applied = None

    def switch(self, adapter: DeltaAdapter) -> None:
        """`remove`, then `apply`; the applied adapter stays where this one is refused."""
        _check_adapter(adapter)
        before = self.applied
        self.remove()
        try:
            self.apply(adapter)
        except ValueError:
            if before is not None:
                self.apply(before)
            raise

    def _read(self, adapter: DeltaAdapter) -> dict[str, tuple[Tensor, Tensor]]:
        """Where the adapter writes, and what stands there; refuses an adapter of another base."""
        own = {}
        for name, delta in adapter.deltas.items():
            own[name] = values_under(adapter, name, self._lines(name, delta))
        return own

    def _lines(self, name: str, delta: SliceDelta) -> Tensor:
        """The weight with the changed axis first."""
        module = linear_of(self.model, name)
        if not isinstance(module.weight, Tensor) or isinstance(module, Linear4bit):
            raise ValueError(f"adapter: {name} is 4-bit; serve the adapter beside it with `serve`")
        return lines_of(module, delta)


def linear_of(model: nn.Module, name: str) -> Any:
    """A module of the base by its name.

    Raises:
        ValueError: the model has none of this name.
    """
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"adapter: the model has no module {name!r}; it is of another base") from error


def lines_of(module: Any, delta: SliceDelta) -> Tensor:
    """A dense layer's weight with the axis first that the delta changes."""
    weight = module.weight.detach()
    return weight.t() if is_transposed(module) != (delta.axis == 1) else weight


def values_under(adapter: DeltaAdapter, name: str, lines: Tensor) -> tuple[Tensor, Tensor]:
    """Where an adapter writes into a weight, and what stands there.

    Raises:
        ValueError: the adapter is of another base.
    """
    delta = adapter.deltas[name]
    _check_fits(name, delta, (lines.shape[0], lines.shape[1]))
    index = delta.indices.to(lines.device, torch.int64)
    values = lines.index_select(0, index)
    if name in adapter.hashes:
        check_base(name, adapter.hashes[name], fingerprints({name: values}))
    return index, values


def _check_fits(name: str, delta: SliceDelta, lines: tuple[int, int]) -> None:
    if delta.block.shape[1] != lines[1] or (delta.indices.numel() and int(delta.indices.max()) >= lines[0]):
        raise ValueError(
            f"adapter: {name} has {lines[0]} channels of {lines[1]}, the delta blocks of {delta.block.shape[1]} at up "
            f"to {int(delta.indices.max())}; it is of another base"
        )


# ---------------------------------------------------------------------------- fusing


@dataclass(frozen=True)
class FuseReport:
    """Where fused adapters met."""

    channels: int  # changed by at least one
    shared: int  # changed by more than one
    modules: dict[str, int]  # shared channels per module, where there are any

    def __str__(self) -> str:
        return f"{self.shared} of {self.channels} changed channels are changed by more than one adapter"


def fuse(adapters: Sequence[DeltaAdapter], weights: Sequence[float] | None = None) -> tuple[DeltaAdapter, FuseReport]:
    """sum_j w_j delta_j on the union of the channels, and where adapters meet. Disjoint adapters fuse exactly.

    Args:
        weights: one per adapter; None is 1 each.

    Raises:
        ValueError: when there is no adapter, weights do not match, or an axis differs between adapters.
    """
    weights = [1.0] * len(adapters) if weights is None else [float(w) for w in weights]
    if not adapters or len(weights) != len(adapters):
        raise ValueError(f"weights: must be one per adapter ({len(adapters)}, at least 1), got {len(weights)}")
    fused: dict[str, SliceDelta] = {}
    met: dict[str, int] = {}
    hashes: dict[str, dict[str, str]] = {}
    for name in sorted({name for adapter in adapters for name in adapter.deltas}):
        parts = [(a.deltas[name], w) for a, w in zip(adapters, weights, strict=True) if name in a.deltas]
        first = parts[0][0]
        if any(d.axis != first.axis or d.block.shape[1] != first.block.shape[1] for d, _ in parts):
            raise ValueError(f"adapters: {name} has another axis or width in some; they are of different bases")
        union = torch.cat([d.indices for d, _ in parts]).unique()
        dtype = max((d.block.dtype for d, _ in parts), key=lambda t: t.itemsize)
        block = torch.zeros((union.numel(), first.block.shape[1]), dtype=dtype)
        seen = torch.zeros(union.numel(), dtype=torch.int64)
        for delta, weight in parts:
            places = torch.searchsorted(union, delta.indices.to(union.dtype))
            block.index_add_(0, places, delta.block.to(dtype) * weight)
            seen[places] += 1
        if int((seen > 1).sum()):
            met[name] = int((seen > 1).sum())
        fused[name] = SliceDelta(first.axis, union, block)
        if len(parts) == 1:
            hashes.update({key: digest for a in adapters for key, digest in a.hashes.items() if key == name})
    total = sum(d.indices.numel() for d in fused.values())
    details = {"fused": [a.details for a in adapters], "weights": weights}
    return DeltaAdapter(fused, hashes, details), FuseReport(total, sum(met.values()), met)
