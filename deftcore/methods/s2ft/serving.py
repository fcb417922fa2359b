"""Many adapters at once: each row of a batch with its own."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deftcore.methods.s2ft.delta import DeltaAdapter, linear_of, lines_of, values_under
from deftcore.nn.linear import Linear4bit, is_transposed
from deftcore.ops.grouped_delta import Delta, DeltaBank, LowRankDelta, grouped_delta_linear
from deftcore.ops.quantized import QuantizedTensor


class GroupedDeltaLinear(nn.Module):
    """A linear layer that adds to each row of the batch the delta of that row's adapter; inference only."""

    def __init__(self, base: Any, deltas: Sequence[Delta | Sequence[Delta] | None], rows: "_Rows") -> None:
        super().__init__()
        self.base_layer = base
        self._rows = rows
        weight = self._weight()
        dtype = rows.dtype or (torch.float32 if isinstance(weight, QuantizedTensor) else weight.dtype)
        self.bank = DeltaBank(deltas, (weight.shape[0], weight.shape[1]), dtype=dtype, device=base.weight.device)

    @property
    def weight(self) -> Tensor:
        """The base's; some models read its dtype."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's."""
        return self.base_layer.bias

    def _weight(self) -> Tensor | QuantizedTensor:
        if isinstance(self.base_layer, Linear4bit):
            return self.base_layer.quantized
        weight: Any = self.base_layer.weight
        return weight.t() if is_transposed(self.base_layer) else weight

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ..., in] (or [B * tokens, in]) to [.., out], row b's adapter added; outside `ServedModel.rows` none.

        Raises:
            ValueError: the batch has other rows than there are adapters.
        """
        index = self._rows.of(x)
        if index is None:
            return self.base_layer(x)
        return grouped_delta_linear(x, self._weight(), self.bank, index, bias=self.bias)

    def extra_repr(self) -> str:
        return repr(self.bank)


@dataclass
class _Rows:
    """Which adapter each row of the running batch uses; shared by a model's layers."""

    index: Tensor | None = None
    dtype: torch.dtype | None = None
    expanded: Tensor | None = None  # as `index`, for the beams or samples that `generate` makes of each row

    def check(self, size: int) -> None:
        """Refuses a batch that is of neither the rows nor their beams."""
        if self.index is not None and size not in {i.shape[0] for i in (self.index, self.expanded) if i is not None}:
            raise ValueError(f"adapters: {self.index.shape[0]} given, but the batch has {size} rows")

    def of(self, x: Tensor) -> Tensor | None:
        """The adapter of each of a layer's rows; None outside `ServedModel.rows`."""
        if self.index is None:
            return None
        if x.dim() != 2:
            self.check(x.shape[0])
        # Beams, and the tokens that some models (OPT) make rows of, lie together. What the model got was checked.
        return self.index.repeat_interleave(x.shape[0] // max(self.index.shape[0], 1))


class ServedModel:
    """A model with several adapters at once: see `serve`."""

    def __init__(self, model: Any, names: Sequence[str], rows: _Rows) -> None:
        self.model, self.names = model, list(names)
        self._rows = rows

    @contextmanager
    def rows(self, adapters: Sequence[str | None]) -> Iterator[Any]:
        """Within it, row i of every batch uses adapters[i] (None: the base), and so do the beams and samples that
        `generate` makes of row i; gives the model.

        Raises:
            ValueError: naming an adapter that is not served.
        """
        unknown = [name for name in adapters if name is not None and name not in self.names]
        if unknown:
            raise ValueError(f"adapters: served are {', '.join(self.names)}, got {unknown[0]!r}")
        numbers = [-1 if name is None else self.names.index(name) for name in adapters]
        rows, before = self._rows, (self._rows.index, self._rows.expanded)
        index = torch.tensor(numbers, dtype=torch.int64, device=next(self.model.parameters()).device)
        expand = getattr(self.model, "_expand_inputs_for_generation", None)
        outer = vars(self.model).get("_expand_inputs_for_generation")

        def remember(*args: Any, expand_size: int = 1, **kwargs: Any) -> Any:
            rows.expanded = index.repeat_interleave(expand_size)  # beams change places within their row only
            return expand(*args, expand_size=expand_size, **kwargs)  # type: ignore[misc]

        def check(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() >= 2), None)
            if given is not None:
                rows.check(given.shape[0])

        rows.index, rows.expanded = index, None
        if expand is not None:
            self.model._expand_inputs_for_generation = remember
        checked = self.model.register_forward_pre_hook(check, with_kwargs=True)
        try:
            with torch.no_grad():
                yield self.model
        finally:
            checked.remove()
            rows.index, rows.expanded = before
            if outer is not None:
                self.model._expand_inputs_for_generation = outer
            elif expand is not None:
                del self.model._expand_inputs_for_generation


def serve(
    model: Any,
    adapters: Mapping[str, DeltaAdapter | Mapping[str, LowRankDelta]],
    *,
    dtype: torch.dtype | None = None,
) -> ServedModel:
    """Readies a plain model to run a different adapter for each row of a batch, in place.

        served = serve(model, {"law": law, "code": code})
        with served.rows(["law", None, "code"]) as model:
            model.generate(**batch)

    Args:
        adapters: by name: what `extract_adapter` gave, or `LowRankDelta`s (LoRA) by module name. A dense base is
            compared with an adapter's hashes; 4 bits may round the base that an adapter was made for.
        dtype: that 4-bit layers are called in; None is float32. Dense layers have their own.

    Raises:
        ValueError: when there is no adapter, or one is of another base.
    """
    if not adapters:
        raise ValueError("adapters: must name at least one, got none")
    per_adapter = [a.deltas if isinstance(a, DeltaAdapter) else a for a in adapters.values()]
    rows = _Rows(dtype=dtype)
    modules = {name: linear_of(model, name) for name in sorted({n for deltas in per_adapter for n in deltas})}
    for adapter in adapters.values():
        if not isinstance(adapter, DeltaAdapter):
            continue
        for name, delta in adapter.deltas.items():
            if not isinstance(modules[name], Linear4bit):
                values_under(adapter, name, lines_of(modules[name], delta))
    served = {
        name: GroupedDeltaLinear(module, [deltas.get(name) for deltas in per_adapter], rows)
        for name, module in modules.items()
    }
    for name, module in served.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, module)
    return ServedModel(model, list(adapters), rows)
