"""One linear layer under S2FT: the trained channels are `nn.Parameter`s on the weight's own memory.

Weights whose input channels train are stored neuron-major, so that the slice is one dense block: optimisers that ignore
strides (torch's fused AdamW on the CPU) would destroy frozen weights otherwise.
"""

from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from deftcore.methods.s2ft.config import S2ftConfig
from deftcore.models.coupled import runs
from deftcore.nn.linear import Linear4bit, is_transposed
from deftcore.nn.merging import MergeReport, merged_4bit
from deftcore.nn.sharding import is_sharded, whole
from deftcore.ops.gated_linear import gated_linear
from deftcore.ops.partial_linear import partial_linear
from deftcore.training.tuners import WrapperLayer, check_finite, merge_or_unmerge, nothing_merged


class _Slices(nn.Module):
    """The trained blocks of one weight: part0, part1 ..., each [s, n], contiguous along the long axis."""

    def __init__(self, blocks: list[Tensor]) -> None:
        super().__init__()
        for i, block in enumerate(blocks):
            setattr(self, f"part{i}", nn.Parameter(block))

    def blocks(self) -> list[nn.Parameter]:
        """The blocks in the order of their places."""
        return list(self._parameters.values())  # type: ignore[arg-type]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # Copies: the weight itself stands in the same state dict, and files may not share memory.
        for name, block in self._parameters.items():
            assert block is not None
            destination[prefix + name] = block if keep_vars else block.detach().clone()


class S2ftLayer(WrapperLayer):
    """A linear layer of which some input or output channels train.

    Args:
        base_layer: `nn.Linear`, GPT-2's Conv1D, or `Linear4bit`.
        dim: 1 trains input channels, 0 output channels.
        places: sorted places of the trained channels in the (permuted) weight.
        indices: their numbers in the original weight, in the order of `places`.
    """

    shown_as = "s2ft"
    adapter_layer_names = ("s2ft_slices",)
    constant_buffers = True  # processes need not send them
    original: Tensor
    indices: Tensor

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: S2ftConfig, dim: int, places: Tensor, indices: Tensor
    ) -> None:
        super().__init__(base_layer)
        self.dim, self.runs = dim, runs(places)
        self.packed = isinstance(base_layer, Linear4bit)
        self.split = self.packed or config.storage == "split"
        self.s2ft_slices = nn.ModuleDict()
        self.register_buffer("indices", indices.to(torch.int32), persistent=False)
        weight: Any = base_layer.weight
        device = weight.device
        with torch.no_grad():
            if self.split:
                dense = base_layer.quantized.dequantize() if isinstance(base_layer, Linear4bit) else self._logical()
                original = dense.index_select(dim, places.to(device))
                blocks = [(original.t() if dim == 1 else original).contiguous()]
            else:
                self._make_dense_blocks()
                blocks = self._blocks()
            self.register_buffer("original", torch.cat([block.detach() for block in blocks]), persistent=False)
            half = self.original.dtype in (torch.float16, torch.bfloat16)
            self.master = half and config.master != "none" and not self.split
            if half and config.master != "none":
                blocks = [block.float() for block in blocks]
            elif self.split:
                blocks = [block.clone() for block in blocks]
        self.s2ft_slices[adapter_name] = _Slices(blocks)
        self.set_adapter(adapter_name, inference_mode=config.inference_mode)
        self.register_load_state_dict_post_hook(_after_load)

    # ------------------------------------------------------------------ memory

    @property
    def slices(self) -> list[nn.Parameter]:
        """The trained blocks [s, n], one per run of neighbouring places: what an optimiser gets."""
        kept: Any = next(iter(self.s2ft_slices.values()))
        return kept.blocks()

    def _logical(self) -> Tensor:
        """The weight as [out, in]."""
        weight: Any = self.base_layer.weight
        return weight.detach().t() if is_transposed(self.base_layer) else weight.detach()

    def _lines(self) -> Tensor:
        """The weight with the trained axis first: [channels, n]."""
        weight = self._logical()
        return weight.t() if self.dim == 1 else weight

    def _blocks(self) -> list[Tensor]:
        return self._blocks_of(self._lines())

    def _blocks_of(self, lines: Tensor) -> list[Tensor]:
        return [lines.narrow(0, start, length) for start, length in self.runs]

    def _parts(self, values: Tensor) -> tuple[Tensor, ...]:
        """Values [s, n], as of `trained`, block by block."""
        return values.split([length for _, length in self.runs])

    def _make_dense_blocks(self) -> None:
        """Lays the weight out so that the trained channels are whole rows of memory."""
        lines = self._lines()
        if lines.is_contiguous():
            return
        laid_out = lines.contiguous()
        stored = laid_out.t() if (self.dim == 1) != is_transposed(self.base_layer) else laid_out
        self.base_layer.weight.data = stored

    @torch.no_grad()
    def tie(self) -> None:
        """Puts the slices back onto the weight's memory, with their own values, where something separated them."""
        if self.split or self.original.device.type == "meta":
            return
        self._make_dense_blocks()
        for part, block in zip(self.slices, self._blocks(), strict=True):
            if not self.master and part.data_ptr() != block.data_ptr():
                block.copy_(part)
                part.data = block
        self.sync()

    @torch.no_grad()
    def sync(self) -> None:
        """Writes a float32 master, rounded, into the weight. Every forward does, whatever changed the master: not each
        optimiser leaves a mark. Nor does this: it is the master that a stale backward is known by."""
        if self.master:
            for part, block in zip(self.slices, self._blocks(), strict=True):
                block.data.copy_(part)

    def _check_tied(self) -> None:
        for part, block in zip(self.slices, self._blocks(), strict=True):
            if not isinstance(part, nn.Parameter) or part.data_ptr() != block.data_ptr():
                raise RuntimeError(
                    "S2ftLayer: a trained slice no longer shares its weight's memory; call layer.tie(), or wrap with "
                    "S2ftConfig(storage='split') where something shards or moves parameters one by one"
                )

    def _apply(self, fn: Any, recurse: bool = True) -> "S2ftLayer":
        masters = [part.data for part in self.slices] if self.master else []
        super()._apply(fn, recurse)
        for part, before in zip(self.slices if self.master else [], masters, strict=True):
            if part.dtype != before.dtype:  # .half() and .bfloat16() leave a master alone
                part.data = before.to(part.device)
        self.tie()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.tie()

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.sync()
        super()._save_to_state_dict(*args, **kwargs)

    @torch.no_grad()
    def trained(self) -> Tensor:
        """The trained channels' values as the weight holds them, [s, n] in its dtype; of a sharded slice, every process
        must ask."""
        if self.split:
            return torch.cat([whole(part.detach()) for part in self.slices]).to(self.original.dtype)
        self.sync()
        return torch.cat(self._blocks())

    @torch.no_grad()
    def _write(self, values: Tensor) -> None:
        for block, part in zip(self._blocks(), self._parts(values), strict=True):
            block.copy_(part)

    # ------------------------------------------------------------------ forward

    @property
    def is_off(self) -> bool:
        """Whether the layer computes what its base did."""
        return self.disable_adapters or not any(name in self.s2ft_slices for name in self.active_adapters)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to x W^T + bias [..., out], in x's dtype; the backward gives dx and the slices' gradients alone
        (arXiv 2412.06289, section 4). With the adapter disabled, W is what it was before training.

        Raises:
            RuntimeError: a slice no longer shares the weight's memory.
        """
        if self.split:
            if self.merged and self.is_off:
                self.unmerge()
            y = self.base_layer(x)
            return y if self.merged or self.is_off else self._add_delta(x, y)
        weight, slices, starts, synced = self._operands()
        return partial_linear(
            x, weight, slices, dim=self.dim, start=starts, bias=self.base_layer.bias, synced=synced
        )  # fmt: skip

    def gated(self, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        """The layer's output for f(gate) * up, as one op."""
        weight, slices, starts, synced = self._operands()
        return gated_linear(
            gate, up, weight, slices, start=starts, activation=activation, bias=self.base_layer.bias,
            synced=synced,
        )  # fmt: skip

    def _operands(self) -> tuple[Tensor, list[Tensor], list[int], bool]:
        """Weight [out, in], trained slices, where they start, and whether they are masters that the weight follows."""
        starts = [start for start, _ in self.runs]
        if self.is_off:
            # A copy: the weight itself may stand in the graph of a forward before this one, whose backward is to come.
            with torch.no_grad():
                lines = self._lines().clone()
                blocks = self._blocks_of(lines)
                for block, before in zip(blocks, self._parts(self.original), strict=True):
                    block.copy_(before)
            synced = False
        else:
            if self.master:
                self.sync()
            elif not torch.compiler.is_compiling():
                self._check_tied()
            lines, blocks, synced = self._lines(), list(self.slices), self.master
        turned = self.dim == 1
        return (lines.t() if turned else lines), [b.t() if turned else b for b in blocks], starts, synced

    def _add_delta(self, x: Tensor, y: Tensor) -> Tensor:
        index = self.indices.to(torch.int64)
        delta = (torch.cat(list(self.slices)) - self.original).to(x.dtype)
        if self.dim == 1:
            return y + (x.index_select(-1, index) @ delta).to(y.dtype)
        return y.index_add(-1, index, (x @ delta.t()).to(y.dtype))

    # ------------------------------------------------------------------ what PEFT asks

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """In place, the weight is merged already; beside it, the slice is written into it, over 4 bits requantised.

        Raises:
            ValueError: an unknown adapter; with `safe_merge` values that are not finite; a sharded weight.
        """
        names = check_adapters_to_merge(self, adapter_names)
        for name in names:
            if name not in self.s2ft_slices:
                raise ValueError(f"adapter_names: this model has {', '.join(self.s2ft_slices)}, got {name!r}")
        if not names:
            return
        if safe_merge:
            check_finite(self.trained(), names[0])
        if isinstance(self.base_layer, Linear4bit):
            self._unmerged = self.base_layer.quantized
            merged, self.merge_report = merged_4bit(self._unmerged, self.dense_update())
            self.base_layer.set_quantized(merged)
        elif self.split:
            if is_sharded(self.base_layer.weight):
                raise ValueError("merge: the weights are sharded over processes; merge into a model on one")
            self._write_split(self.trained())
        self.sync()
        self.merged_adapters.extend(names)

    merge_report: MergeReport

    @torch.no_grad()
    def dense_update(self) -> Tensor:
        """The update as a dense float32 [out, in], in the base's numbering."""
        change = self.trained().float() - self.original.float()
        logical = (self.base_layer.quantized if isinstance(self.base_layer, Linear4bit) else self._logical()).shape
        delta = torch.zeros(logical, device=change.device)
        delta.index_copy_(self.dim, self.indices.long(), change.t() if self.dim == 1 else change)
        return delta

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes back what `merge` wrote beside or over the weight, bit for bit; in place there is nothing to do."""
        if nothing_merged(self):
            return
        if isinstance(self.base_layer, Linear4bit):
            self.base_layer.set_quantized(self._unmerged)
        elif self.split:
            self._write_split(self.original)
        self.merged_adapters.clear()

    @torch.no_grad()
    def scale_output_(self, factor: float) -> None:
        """Multiplies what the layer returns by a number: base weight, bias, slices and their original values alike."""
        base: Any = self.base_layer
        if isinstance(base, Linear4bit):
            base.scale_output_(factor)
            if self.merged:
                self._unmerged = self._unmerged.scaled(factor)
        else:
            base.weight.mul_(factor)  # slices in place with it
            if base.bias is not None:
                base.bias.mul_(factor)
        if self.split or self.master:
            for part in self.slices:
                part.mul_(factor)
        self.original.mul_(factor)
        self.sync()

    def _write_split(self, values: Tensor) -> None:
        self._lines().index_copy_(0, self.indices.long(), values)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The plain layer, as it was before training or with what was trained; its weight's usual memory layout."""
        merge_or_unmerge(self, merge, safe_merge, adapter_names)
        if not self.split:
            if not self.merged:
                self._write(self.original)
            weight: Any = self.base_layer.weight
            weight.data = weight.data.contiguous()
        return self.base_layer

    def delete_adapter(self, adapter_name: str) -> None:
        """Raises ValueError: `unload` takes the adapter out."""
        raise ValueError("delete_adapter: an S2FT adapter lives in the weights; use unload()")

    def extra_repr(self) -> str:
        kind = "input" if self.dim == 1 else "output"
        where = "beside the weight" if self.split else "in place"
        return f"{self.indices.numel()} {kind} channels {where}" + (", float32 master" if self.master else "")


def _after_load(layer: Any, _: Any) -> None:
    layer.tie()
