"""S2FT: structured sparse fine-tuning (Yang et al., arXiv 2412.06289): a few heads and channels, trained in place.

The selected units are permuted to one contiguous slice of each weight, and that slice, an ordinary `nn.Parameter` on
the weight's own memory, is all that trains. Weights whose input channels train are stored neuron-major, so that the
slice is one dense block: optimisers that ignore strides (torch's fused AdamW on the CPU) would destroy frozen weights
otherwise.
"""

import hashlib
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from deftcore.adapters.selection import Plan, make_plan
from deftcore.nn.blocks import activation_of
from deftcore.nn.coupled import is_transposed, permute, runs
from deftcore.nn.linear import Linear4bit, MergeReport, merged_4bit
from deftcore.objectives import ObservedActivation
from deftcore.ops.partial_linear import gated_linear, partial_linear

STRATEGIES = ("random", "weight", "activation", "product", "gradient")
DATA_STRATEGIES = ("activation", "product", "gradient")
TARGETS = ("o", "down", "v", "up", "gate", "q", "k")
_RECOMPUTE = ("none", "up", "gate_up")


@dataclass
class S2ftConfig(PeftConfig):
    """Config of S2FT.

    Raises ValueError, naming the field, on a value out of range.
    """

    channel_ratio: float = field(default=0.02, metadata={"help": "Share of the MLP channels trained, in (0, 1)."})
    head_ratio: float | None = field(
        default=None, metadata={"help": "Share of the heads trained, in (0, 1); None spends what the channels do."}
    )
    targets: list[str] | None = field(
        default=None, metadata={"help": f"Of {', '.join(TARGETS)}; None is o and down, down alone on grouped queries."}
    )
    strategy: str = field(default="random", metadata={"help": f"How to score units: {', '.join(STRATEGIES)}."})
    order: str = field(default="largest", metadata={"help": "Which scores to take: largest or smallest."})
    budget: str = field(default="layer", metadata={"help": "layer: equal counts; global: over all layers at once."})
    head_granularity: str | None = field(
        default=None, metadata={"help": "group: whole key-value groups (default for grouped queries); head."}
    )
    round_to: int = field(default=1, metadata={"help": "Round channel counts up to a multiple of this."})
    seed: int = field(default=0, metadata={"help": "Of the random strategy."})
    storage: str = field(
        default="shared", metadata={"help": "shared: in place; split: beside the weight (FSDP2; always for 4-bit)."}
    )
    master: str | None = field(
        default=None, metadata={"help": "fp32: optimise a float32 copy of the slice; none. None is fp32 for 16 bits."}
    )
    recompute: str = field(
        default="none", metadata={"help": "Of a gated MLP's two products, what the backward computes again: "
                                          "none, up or gate_up."}
    )  # fmt: skip
    exclude: dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Units not to select, as in `indices` of another adapter."}
    )
    indices: dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Selected units per weight; None selects when the model is wrapped."}
    )
    base_hash: str | None = field(default=None, metadata={"help": "Of the slices before training; set on wrapping."})
    target_modules: list[str] | None = field(default=None, metadata={"help": "Set on wrapping."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained and saved whole."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "S2FT"
        for name in ("channel_ratio", "head_ratio"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{name}: must be above 0 and below 1 (all of it is full fine-tuning), got {value}")
        for name, choices in (
            ("strategy", STRATEGIES), ("order", ("largest", "smallest")), ("budget", ("layer", "global")),
            ("storage", ("shared", "split")), ("recompute", _RECOMPUTE),
            ("head_granularity", (None, "group", "head")), ("master", (None, "fp32", "none")),
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: must be one of {', '.join(map(str, choices))}, got {getattr(self, name)!r}")
        if not isinstance(self.round_to, int) or self.round_to < 1:
            raise ValueError(f"round_to: must be an integer of at least 1, got {self.round_to!r}")
        for target in self.targets or []:
            if target not in TARGETS:
                raise ValueError(f"targets: must be among {', '.join(TARGETS)}, got {target!r}")
        if self.targets is not None and not self.targets:
            raise ValueError(f"targets: must name at least one of {', '.join(TARGETS)}, got []")

    @property
    def needs_data(self) -> bool:
        """Whether `select_channels` has to run over batches before wrapping."""
        return self.indices is None and self.strategy in DATA_STRATEGIES


class _Slices(nn.Module):
    """The trained blocks of one weight: part0, part1 ..., each [s, n], contiguous along the long axis."""

    def __init__(self, blocks: list[Tensor]) -> None:
        super().__init__()
        for i, block in enumerate(blocks):
            setattr(self, f"part{i}", nn.Parameter(block))

    def blocks(self) -> list[nn.Parameter]:
        return list(self._parameters.values())  # type: ignore[arg-type]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # Copies: the weight itself stands in the same state dict, and files may not share memory.
        for name, block in self._parameters.items():
            assert block is not None
            destination[prefix + name] = block if keep_vars else block.detach().clone()


class S2ftLayer(nn.Module, BaseTunerLayer):
    """A linear layer of which some input or output channels train.

    Args:
        base_layer: `nn.Linear`, GPT-2's Conv1D, or `Linear4bit`.
        dim: 1 trains input channels, 0 output channels.
        places: sorted places of the trained channels in the (permuted) weight.
        indices: their numbers in the original weight, in the order of `places`.
    """

    adapter_layer_names = ("s2ft_slices",)
    original: Tensor
    indices: Tensor

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: S2ftConfig, dim: int, places: Tensor, indices: Tensor
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.dim, self.runs = dim, runs(places)
        self.packed = isinstance(base_layer, Linear4bit)
        self.split = self.packed or config.storage == "split"
        self.merged_adapters: list[str] = []
        self.s2ft_slices = nn.ModuleDict()
        self.register_buffer("indices", indices.to(torch.int32), persistent=False)
        weight: Any = base_layer.weight
        device = weight.device
        with torch.no_grad():
            if self.split:
                whole = base_layer.quantized.dequantize() if isinstance(base_layer, Linear4bit) else self._logical()
                original = whole.index_select(dim, places.to(device))
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
        self._held: Tensor | None = None  # trained values, while the adapter is disabled
        self._seen: list[int] = []
        if self.master:
            self._mark_synced()
            _MASTERS.add(self)
        self.set_adapter(adapter_name, inference_mode=config.inference_mode)
        self.register_load_state_dict_post_hook(_after_load)

    # ------------------------------------------------------------------ memory

    @property
    def slices(self) -> list[nn.Parameter]:
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
        lines = self._lines()
        return [lines.narrow(0, start, length) for start, length in self.runs]

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
            if self.master:
                continue
            if part.data_ptr() != block.data_ptr():
                block.copy_(part)
                part.data = block
        if self.master and self._held is None:
            self.sync(force=True)

    @torch.no_grad()
    def sync(self, *, force: bool = False) -> None:
        """Writes a changed float32 master, rounded, into the weight. Changes through `.data`, which leave no mark, are
        seen after an optimiser's step and wherever weights are read out."""
        if not self.master or self._held is not None:
            return
        if force or self._seen != [part._version for part in self.slices]:
            for part, block in zip(self.slices, self._blocks(), strict=True):
                block.copy_(part)
            self._mark_synced()

    def _mark_synced(self) -> None:
        self._seen = [part._version for part in self.slices]

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
        if self.master:
            _MASTERS.add(self)
        self.tie()

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.sync(force=True)
        super()._save_to_state_dict(*args, **kwargs)

    @torch.no_grad()
    def trained(self) -> Tensor:
        """The trained channels' values as the weight holds them, [s, n] in its dtype."""
        if self._held is not None:
            return self._held
        if self.split:
            return torch.cat([part.detach() for part in self.slices]).to(self.original.dtype)
        self.sync(force=True)
        return torch.cat(self._blocks())

    @torch.no_grad()
    def _write(self, values: Tensor) -> None:
        for block, (_, length) in zip(self._blocks(), self.runs, strict=True):
            block.copy_(values[:length])
            values = values[length:]

    # ------------------------------------------------------------------ forward

    def forward(self, x: Tensor) -> Tensor:
        if self.split:
            y = self.base_layer(x)
            return y if self.disable_adapters or self.merged else self._add_delta(x, y)
        weight, slices, starts = self._operands()
        return partial_linear(
            x, weight, slices, dim=self.dim, start=starts, bias=self.base_layer.bias, synced=self.master  # type: ignore
        )  # fmt: skip

    def gated(self, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        """The layer's output for f(gate) * up, as one op."""
        weight, slices, starts = self._operands()
        return gated_linear(
            gate, up, weight, slices, start=starts, activation=activation, bias=self.base_layer.bias,  # type: ignore
            synced=self.master,
        )  # fmt: skip

    def _operands(self) -> tuple[Tensor, list[Tensor], list[int]]:
        if not torch.compiler.is_compiling():
            if self.master:
                self.sync()
            else:
                self._check_tied()
        weight: Any = self.base_layer.weight
        slices = [part.t() if self.dim == 1 else part for part in self.slices]
        weight = weight.t() if is_transposed(self.base_layer) else weight
        return weight, slices, [start for start, _ in self.runs]

    def _add_delta(self, x: Tensor, y: Tensor) -> Tensor:
        index = self.indices.to(torch.int64)
        delta = (torch.cat(list(self.slices)) - self.original).to(x.dtype)
        if self.dim == 1:
            return y + (x.index_select(-1, index) @ delta).to(y.dtype)
        return y.index_add(-1, index, (x @ delta.t()).to(y.dtype))

    # ------------------------------------------------------------------ what PEFT asks

    @torch.no_grad()
    def enable_adapters(self, enabled: bool) -> None:
        if not self.split and not enabled and self._held is None:
            self._held = self.trained().clone()
            self._write(self.original)
        elif not self.split and enabled and self._held is not None:
            self._write(self._held)
            self._held = None
        super().enable_adapters(enabled)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """In place, the weight is merged already; beside it, the slice is written into it."""
        if self.merged:
            return
        if safe_merge and not bool(torch.isfinite(self.trained()).all()):
            raise ValueError("NaNs detected in the merged weights. The adapter seems to be broken")
        if isinstance(self.base_layer, Linear4bit):
            self._unmerged = self.base_layer.quantized
            merged, self.merge_report = merged_4bit(self._unmerged, self.get_delta_weight())
            self.base_layer.set_quantized(merged)
        elif self.split:
            self._write_split(self.trained())
        self.merged_adapters.extend(self.s2ft_slices)

    merge_report: MergeReport

    @torch.no_grad()
    def get_delta_weight(self) -> Tensor:
        """The update as a dense float32 [out, in], in the base's numbering."""
        change = self.trained().float() - self.original.float()
        logical = (self.base_layer.quantized if isinstance(self.base_layer, Linear4bit) else self._logical()).shape
        delta = torch.zeros(logical, device=change.device)
        delta.index_copy_(self.dim, self.indices.long(), change.t() if self.dim == 1 else change)
        return delta

    @torch.no_grad()
    def unmerge(self) -> None:
        if isinstance(self.base_layer, Linear4bit) and self.merged:
            self.base_layer.set_quantized(self._unmerged)
        elif self.split and self.merged:
            self._write_split(self.original)
        self.merged_adapters.clear()

    def _write_split(self, values: Tensor) -> None:
        self._lines().index_copy_(0, self.indices.long(), values)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        if merge:
            self.enable_adapters(True)
            self.merge(safe_merge)
        elif self.merged:
            self.unmerge()
        if not self.split:
            if not merge:
                self._write(self.original)
            weight: Any = self.base_layer.weight
            weight.data = weight.data.contiguous()
        return self.base_layer

    def delete_adapter(self, adapter_name: str) -> None:
        raise ValueError("delete_adapter: an S2FT adapter lives in the weights; use unload()")

    def extra_repr(self) -> str:
        kind = "input" if self.dim == 1 else "output"
        where = "beside the weight" if self.split else "in place"
        return f"{self.indices.numel()} {kind} channels {where}" + (", float32 master" if self.master else "")

    def __repr__(self) -> str:
        return "s2ft." + super().__repr__()


_MASTERS: "weakref.WeakSet[S2ftLayer]" = weakref.WeakSet()


def _sync_masters(*_: Any) -> None:
    for layer in list(_MASTERS):
        layer.sync(force=True)


def _after_load(layer: Any, _: Any) -> None:
    layer.tie()


register_optimizer_step_post_hook(_sync_masters)


class FusedGatedMlp(nn.Module):
    """A gated MLP whose activation and down projection are one op, with the children and names of the class it
    replaced; the same function."""

    recompute: str
    unfused_class: type[nn.Module]

    def forward(self, x: Tensor) -> Tensor:
        down: Any = self.down_proj
        kind = None if isinstance(self.act_fn, ObservedActivation) else activation_of(self.act_fn)  # type: ignore
        if kind is None or (isinstance(down, S2ftLayer) and down.split):
            return self.unfused_class.forward(self, x)
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

        device = x.device.type
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

        def unpack(kept: Any) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            with torch.no_grad(), torch.autocast(device, dtype, enabled):  # as it was in the forward
                return kept(x)

        super().__init__(pack, unpack)
        self.active = bool(again) and torch.is_grad_enabled()

    def __enter__(self) -> None:
        if self.active:
            super().__enter__()

    def __exit__(self, *args: Any) -> None:
        if self.active:
            super().__exit__(*args)


class S2ftModel(BaseTuner):
    """Permutes a model and puts `S2ftLayer`s into it; made by `peft.get_peft_model`. One adapter per model: adapters
    are taken out, switched and served with `deftcore.adapters.delta`."""

    prefix: str = "s2ft_"
    tuner_layer_cls = S2ftLayer
    target_module_mapping = {}  # noqa: RUF012

    plan: Plan

    def _prepare_adapter_config(self, peft_config: S2ftConfig, model_config: dict) -> S2ftConfig:  # type: ignore
        return peft_config

    def _check_new_adapter_config(self, config: S2ftConfig) -> None:  # type: ignore[override]
        super()._check_new_adapter_config(config)
        if len(self.peft_config) > 1:
            raise ValueError("adapter_name: S2FT trains one adapter at a time, in place; extract it, then switch")

    def _prepare_model(self, peft_config: S2ftConfig, model: nn.Module) -> None:  # type: ignore[override]
        self.plan = make_plan(model, peft_config)
        digest = _hash_slices(model, self.plan)
        if peft_config.base_hash not in (None, digest):
            raise ValueError("model: this S2FT adapter was made for other base weights (or another dtype of them)")
        peft_config.base_hash = digest
        peft_config.indices = {key: units.tolist() for key, units in self.plan.selected.items()}
        peft_config.target_modules = sorted(self.plan.slices)
        for coupled, order in self.plan.orders:
            permute(model, coupled, order)

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: S2ftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        where = self.plan.slices[current_key]
        layer = S2ftLayer(target, adapter_name, peft_config, where.dim, where.places, where.indices)
        setattr(parent, target_name, layer)

    def _post_injection_hook(self, model: nn.Module, config: S2ftConfig, adapter_name: str) -> None:  # type: ignore
        super()._post_injection_hook(model, config, adapter_name)
        for name in self.plan.gated:
            mlp: Any = model.get_submodule(name)
            down = mlp.down_proj
            if isinstance(down, S2ftLayer) or type(down) is nn.Linear:
                mlp.unfused_class, mlp.recompute = type(mlp), config.recompute
                mlp.__class__ = FusedGatedMlp

    @staticmethod
    def _create_new_module(peft_config: S2ftConfig, adapter_name: str, target: nn.Module) -> nn.Module:
        raise NotImplementedError  # `_create_and_replace` knows the places

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """The slices' dtype is `S2ftConfig.master`'s business."""

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        for module in model.modules():
            if isinstance(module, FusedGatedMlp):
                module.__class__ = module.unfused_class  # type: ignore[assignment]
                del module.unfused_class, module.recompute
        for coupled, order in self.plan.orders:
            permute(model, coupled, torch.argsort(order))
        return model


@torch.no_grad()
def _hash_slices(model: nn.Module, plan: Plan) -> str:
    """SHA-256 over the values, and their places, that the adapter will change; of the model before permuting."""
    digest = hashlib.sha256()
    for name in sorted(plan.slices):
        where, module = plan.slices[name], model.get_submodule(name)
        if isinstance(module, Linear4bit):
            weight = module.quantized.dequantize()
        else:
            weight = module.weight.t() if is_transposed(module) else module.weight  # type: ignore
        values = weight.index_select(where.dim, where.indices.sort().values.to(weight.device)).contiguous().cpu()
        digest.update(f"{name} {where.dim} {where.indices.sort().values.tolist()} {values.dtype}".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
