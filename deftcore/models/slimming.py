"""Cuts heads and channels out of a Transformers model (Light-PEFT, arXiv 2406.03792): rows and columns go for real.

`plan` says which lines of which layers stay, `cut` removes all others, in place. Layers then differ in size: the config
says so by structure (`stored_sizes`), or in its own fields where all layers came out alike and it can.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deftcore.models.blocks import base_of
from deftcore.models.coupled import CONSUMERS, SIZES_FIELD, Coupled, elements, find_coupled, layer_at, stored_sizes
from deftcore.models.families import FAMILIES, Family, model_type
from deftcore.models.gates import gates_of
from deftcore.models.kept import Kept
from deftcore.nn.constant import Constant
from deftcore.nn.linear import Linear4bit, is_transposed, shape_of
from deftcore.nn.linear16 import LINEARS
from deftcore.ops.quant4 import quantize_4bit

_SIDES = (("out_features", "nf"), ("in_features", "nx", "embedding_dim"))  # names of a layer's sizes, by dim


@dataclass(frozen=True)
class Cut:
    """What stays of one layer along one side.

    Args:
        layer: its name in the model, that of the adapter's layer where one wraps it.
        dim: of its weight [out, in]; with rows (0) goes their bias.
        lines: int64, ascending.
        factors: one per line, which the weight takes over.
        empty: no unit stays, and the layer becomes a constant.
    """

    layer: str
    dim: int
    lines: Tensor
    factors: Tensor | None = None
    empty: bool = False


@dataclass(frozen=True)
class SlimReport:
    """What slimming did to a base: numbers of weights, and what rounding them again cost, as a share of what stayed of
    each 4-bit weight's norm."""

    before: int
    after: int
    requantized: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        again = f", {len(self.requantized)} weights rounded again" if self.requantized else ""
        return f"{self.after} of {self.before} weights of the base stay{again}"


class LayerConfig:
    """A model's config as one layer of another size sees it: some fields are its own, all others the model's."""

    def __init__(self, config: Any, **own: int) -> None:
        self.__dict__.update(own, _config=config)

    def __getattr__(self, name: str) -> Any:
        if name == "_config" or name.startswith("__"):  # while it is being copied
            raise AttributeError(name)
        return getattr(self._config, name)


def plan(model: nn.Module, structures: Iterable[Coupled], kept: Kept) -> list[Cut]:
    """The lines of each layer of a model that stay, for layers that lose any or take factors over."""
    cuts: list[Cut] = []
    for coupled in structures:
        if coupled.name in kept.units:
            cuts += _plan_one(model, coupled, kept.units[coupled.name], kept.scales.get(coupled.name, ()))
    return cuts


def _plan_one(model: nn.Module, coupled: Coupled, places: tuple[int, ...], scales: tuple[float, ...]) -> list[Cut]:
    units = torch.tensor(places or (0,))  # constants are as wide as one unit: attention needs a head
    stay: dict[tuple[str, int], Tensor] = {}
    factors: dict[str, Tensor] = {}
    for axis in coupled.axes:
        if axis.tensor != "weight":
            continue  # a bias goes with its rows
        count = coupled.units // coupled.group if axis.shared else coupled.units
        own = (units // coupled.group).unique() if axis.shared else units
        lines = _size(layer_at(model, axis.module), axis.dim)
        mask = stay.setdefault((axis.module, axis.dim), torch.ones(lines, dtype=torch.bool))
        mask[elements(torch.arange(count), axis)] = False
        mask[elements(own, axis)] = True
        if scales and axis.role in CONSUMERS:
            factors[axis.module] = torch.tensor(scales, dtype=torch.float64).repeat_interleave(axis.width)
    return [
        Cut(layer, dim, mask.nonzero().flatten(), factors.get(layer), empty=not places)
        for (layer, dim), mask in stay.items()
        if not mask.all() or layer in factors or not places
    ]


def _size(layer: Any, dim: int) -> int:
    return int(layer.weight.shape[dim]) if isinstance(layer, nn.Embedding) else shape_of(layer)[dim]


# ---------------------------------------------------------------------------- cutting


@torch.no_grad()
def cut(model: Any, kept: Kept, *, requantize: bool = False) -> SlimReport:
    """Removes from a model, in place, the heads and channels that `kept.units` does not name, and folds `kept.scales`.

    Adapters over its layers are left as they are: see `deftcore.slim`.

    Args:
        model: a Transformers model of a family of the table, or its PEFT model; dense or in 4 bits.
        requantize: rounds weights in 4 bits again where a cut goes through their blocks; otherwise it is refused.

    Raises:
        ValueError: naming the structure or layer that the model lacks or that cannot be cut. The model is as it was
            then.
    """
    cuts = check_cut(model, kept, requantize=requantize)
    base: Any = base_of(model)
    everything = find_coupled(base)
    structures = [each for each in everything if each.name in kept.units]
    own_configs(model)
    before, errors = _weights(base), dict[str, float]()
    for each in cuts:
        layer = layer_at(base, each.layer)
        if each.empty and not isinstance(layer, nn.Embedding):
            base.set_submodule(each.layer, _constant(layer, each))
            continue
        if isinstance(layer, Linear4bit):
            error = _cut_packed(layer, each)
            errors |= {} if error is None else {each.layer: error}
        else:
            _cut_dense(layer, each)
        _resize(base.get_submodule(each.layer), each)
    family = FAMILIES[model_type(base)]
    for coupled in structures:
        _count_heads(base, family, coupled, kept.units[coupled.name])
    _write_sizes(base, family, everything, kept)
    return SlimReport(before, _weights(base), errors)


def check_cut(model: Any, kept: Kept, *, requantize: bool = False) -> list[Cut]:
    """What `cut` would do, with the same arguments; raises what it would raise."""
    base = base_of(model)
    if hasattr(base, "deftcore_blocks"):
        raise ValueError("model: is in its sparse form; slim it before sparsify")
    if gates_of(model) is not None:
        raise ValueError("model: has adaptive gates; fold them first (fold_gates)")
    structures = find_coupled(base)
    Kept(kept.units, {}, kept.scales).check(structures, {})
    with torch.device("cpu"):  # where a model is built on the meta device
        cuts = plan(base, structures, kept)
    for each in cuts:
        _check(base, each, requantize)
    return cuts


def own_configs(model: nn.Module) -> None:
    """Gives a model and its modules copies of their configs, which other models may hold too."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        for name in ("config", "generation_config"):
            if name in vars(module):
                setattr(module, name, copy.deepcopy(vars(module)[name], copies))


def _check(model: nn.Module, each: Cut, requantize: bool) -> None:
    layer = layer_at(model, each.layer)
    if not (type(layer) in (*LINEARS, nn.Embedding, Linear4bit) or is_transposed(layer)):
        raise ValueError(f"{each.layer}: a {type(layer).__module__}.{type(layer).__name__} cannot be cut")
    if isinstance(layer, Linear4bit) and not (each.empty or requantize):
        whole = layer.quantized.has_whole(each.dim, each.lines)
        if each.factors is not None or not whole:
            what = "cut through" if not whole else "scale"
            raise ValueError(
                f"{each.layer}: this would {what} blocks of {layer.quantized.block_size} weights in 4 bits; pass "
                "requantize=True (a recipe's adapter.requantize=true), which rounds them again and reports the error, "
                "or slim before quantize"
            )


def _cut_dense(layer: Any, each: Cut) -> None:
    weight = layer.weight
    lines = each.lines.to(weight.device)
    dim = 1 - each.dim if is_transposed(layer) else each.dim
    new = weight.detach().index_select(dim, lines)
    if each.factors is not None:
        new = _scaled(new, each.factors, dim)
    layer.weight = nn.Parameter(new, requires_grad=weight.requires_grad)
    _cut_bias(layer, each)


def _cut_packed(layer: Linear4bit, each: Cut) -> float | None:
    q = layer.quantized
    lines = each.lines.to(q.device)
    error = None
    if each.factors is None and q.has_whole(each.dim, each.lines):
        new = q.select(each.dim, lines)
    else:
        wanted = q.dequantize(torch.float32).index_select(each.dim, lines)
        wanted = wanted if each.factors is None else _scaled(wanted, each.factors, each.dim)
        options: dict[str, Any] = {"quant_type": q.quant_type, "block_size": q.block_size}
        new = quantize_4bit(wanted, double_quant=q.double_quant, **options)
        new.dtype, new.storage = q.dtype, q.storage
        error = float((new.dequantize(torch.float32) - wanted).norm() / wanted.norm().clamp(min=1e-30))
    layer.set_quantized(new)
    _cut_bias(layer, each)
    return error


def _cut_bias(layer: Any, each: Cut) -> None:
    bias = getattr(layer, "bias", None)
    if each.dim == 0 and bias is not None:
        new = bias.detach().index_select(0, each.lines.to(bias.device))
        layer.bias = nn.Parameter(new, requires_grad=bias.requires_grad)


def _scaled(weight: Tensor, factors: Tensor, dim: int) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    shape = [-1, 1] if dim == 0 else [1, -1]
    return (weight.to(wide) * factors.to(weight.device, wide).view(shape)).to(weight.dtype)


def _constant(layer: Any, each: Cut) -> Constant:
    rows, columns = shape_of(layer)
    if each.dim == 0:
        return Constant(columns, each.lines.numel())
    return Constant(each.lines.numel(), rows, layer.bias)


def _resize(module: Any, each: Cut) -> None:
    """Tells a layer, and adapters that wrap it, its new size."""
    while True:
        for name in _SIDES[each.dim]:
            if name in vars(module):
                setattr(module, name, each.lines.numel())
        if not hasattr(module, "base_layer"):
            return
        module = module.base_layer


def _weights(model: nn.Module) -> int:
    """How many weights a model has, those of adapters aside."""
    seen: set[int] = set()

    def count(module: nn.Module) -> int:
        if hasattr(module, "base_layer"):
            return count(module.base_layer)  # type: ignore[arg-type]
        own = module.quantized.numel() if isinstance(module, Linear4bit) else 0
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                own += parameter.numel()
        return own + sum(count(child) for child in module.children())

    return count(model)


# ---------------------------------------------------------------------------- what modules and the config say of it


def _count_heads(model: nn.Module, family: Family, coupled: Coupled, places: tuple[int, ...]) -> None:
    """Writes an attention's numbers of heads into its module, under whichever names that has them."""
    form = family.attention
    for axis in coupled.weights(["q"]):
        assert form is not None
        holder: Any = model.get_submodule(axis.module.rpartition(".")[0])
        heads, groups = _heads(coupled, places or (0,))
        size = heads * axis.width
        counts = {
            "num_heads": heads, "num_attention_heads": heads, "n_heads": heads, "num_key_value_heads": groups,
            "num_key_value_groups": heads // groups, "split_size": size, "all_head_size": size, "inner_dim": size,
        }  # fmt: skip
        for name in counts.keys() & vars(holder).keys():
            setattr(holder, name, counts[name])
        if form.reads_config:
            holder.config = LayerConfig(holder.config, num_attention_heads=heads, num_key_value_heads=groups)
        if form.apart and axis.module.rpartition(".")[0].endswith(form.apart):
            # The stack's first layer of this kind makes one tensor of zeros in place of biases, for all of them.
            for name, module in model.named_modules():
                if name.endswith(form.apart):
                    module.n_heads = 1


def _heads(coupled: Coupled, places: tuple[int, ...]) -> tuple[int, int]:
    return len(places), len({place // coupled.group for place in places})


def _sizes(coupled: Coupled, places: tuple[int, ...]) -> dict[str, int]:
    if coupled.mlp is not None:
        return {"intermediate_size": len(places)}
    heads, groups = _heads(coupled, places)
    return {"num_heads": heads, "num_kv_heads": groups}


def _write_sizes(model: Any, family: Family, before: list[Coupled], kept: Kept) -> None:
    """Into the config: its own fields where they can say it, else a table of the structures that differ."""
    config = model.config
    sizes = {each.name: _sizes(each, kept.units.get(each.name, tuple(range(each.units)))) for each in before}
    table = stored_sizes(config) | {name: sizes[name] for name in kept.units}
    everything = (table | sizes).values()
    heads = {(each["num_heads"], each["num_kv_heads"]) for each in everything if "num_heads" in each}
    channels = {each["intermediate_size"] for each in everything if "intermediate_size" in each}
    own = config.num_attention_heads
    fits = family.head_size_field or heads <= {(own, getattr(config, "num_key_value_heads", None) or own)}
    if not fits or len(heads) > 1 or len(channels) > 1 or (0, 0) in heads or 0 in channels:
        setattr(config, SIZES_FIELD, table)
        return
    if hasattr(config, SIZES_FIELD):
        delattr(config, SIZES_FIELD)
    for count, groups in heads:
        if family.head_size_field:
            size = next(axis.width for each in before for axis in each.weights(["q"]))
            setattr(config, family.head_size_field, size)
        config.num_attention_heads = count
        if getattr(config, "num_key_value_heads", None) is not None:
            config.num_key_value_heads = groups
    for count in channels:
        setattr(config, family.channels_field, count)
