"""Heads and channels of a Transformers model that belong together, and their permutation (S2FT, arXiv 2412.06289).

A permutation of an MLP's channels, or of an attention's heads, applied to every matrix that touches them leaves the
function as it was. `families` says, architecture by architecture, which matrices those are.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deftcore.models.blocks import has_parts
from deftcore.models.families import FAMILIES, Attention, Family, Mlp, check_part, model_type, with_part
from deftcore.nn.linear import PackedModule, is_transposed, shape_of

HEAD_ROLES = ("q", "k", "v", "o")
CHANNEL_ROLES = ("gate", "up", "down")
SIZES_FIELD = "deftcore_slim"  # of a slim model's config
CONSUMERS = ("o", "down")  # their input channels are the units; the others' output channels are


@dataclass(frozen=True)
class Axis:
    """The rows (dim 0) or columns (dim 1) of one [out, in] tensor that belong to the units, `width` each."""

    module: str
    tensor: str  # "weight" or "bias"
    role: str
    dim: int
    width: int = 1
    stride: int = 1  # from one unit to the next
    offset: int = 0  # where unit 0 starts, in a fused weight
    shared: bool = False  # one per group of units: keys and values of grouped queries
    fused: bool = False  # the weight has other roles' rows too

    @property
    def key(self) -> str:
        """A name for the slices of this role: the module's, with the role where a fused weight has several."""
        return f"{self.module}:{self.role}" if self.fused else self.module


@dataclass(frozen=True)
class Coupled:
    """Units (heads or channels) that move together, and everything that moves with them.

    The name is that of the module in the base model, whatever adapters wrap; the axes name modules where they are.
    """

    name: str
    units: int
    group: int  # query heads per key-value head; 1 elsewhere
    axes: tuple[Axis, ...]
    mlp: Mlp | None = None  # the form, of an MLP's channels

    def weights(self, roles: Iterable[str]) -> list[Axis]:
        """The matrices of these roles."""
        return [axis for axis in self.axes if axis.tensor == "weight" and axis.role in set(roles)]

    def order_of(self, axis: Axis, order: Tensor) -> Tensor:
        """The order of the axis's own units: that of groups where it has one per group."""
        return order.view(-1, self.group)[:, 0] // self.group if axis.shared else order


def elements(units: Tensor, axis: Axis) -> Tensor:
    """The rows or columns of some units of an axis."""
    return (units.view(-1, 1) * axis.stride + torch.arange(axis.width)).flatten() + axis.offset


def find_coupled(model: nn.Module) -> list[Coupled]:
    """All coupled units of a model, in forward order; under adapters on its linear layers too.

    Raises:
        ValueError: naming the model type, where its structure is not in the table; an attention whose output is not
            heads times their size.
    """
    config: Any = getattr(model, "config", None)
    kind = model_type(model) or type(model).__name__
    check_part(kind, "MLP")
    if getattr(config, "kv_lora_rank", None) is not None:
        raise ValueError(f"model: {kind} has latent attention, whose keys and values are not split by heads")
    if kind not in FAMILIES:
        known = ", ".join(with_part("MLP"))
        raise ValueError(f"model: heads and channels that belong together are known of {known}; got {kind!r}")
    if getattr(config, "add_cross_attention", False):
        raise ValueError(f"model: of {kind} with cross-attention it is not known what belongs together")
    found = list(_walk(model, FAMILIES[kind], config))
    if not found:
        raise ValueError(f"model: {type(model).__name__} has no attention or MLP of the {kind} family")
    return found


def _walk(model: nn.Module, family: Family, config: Any) -> Iterator[Coupled]:
    # One head order for a whole stack, whose layers share a table of biases.
    stacks: dict[str, list[tuple[str, Coupled]]] = {}
    attention = family.attention
    for name, module in model.named_modules():
        if attention is not None and has_parts(module, attention.projections):
            stack = name.split(".block.")[0]
            if attention.bias_table and not name.endswith(attention.apart):
                label = f"{stack} ({name.rpartition('.')[2]})"
                stacks.setdefault(label, []).append((name, _attention(model, name, label, attention, config)))
            else:
                yield _attention(model, name, name, attention, config)
            continue
        mlp = next((form for form in family.mlps if has_parts(module, form.projections)), None)
        if mlp is not None:
            yield _mlp(model, name, mlp)
    for label, members in stacks.items():
        assert attention is not None
        table = Axis(f"{members[0][0]}.{attention.bias_table}", "weight", "bias", 1)
        axes = tuple(axis for _, member in members for axis in member.axes)
        yield Coupled(label, members[0][1].units, 1, (*axes, table))


def stored_sizes(config: Any) -> dict[str, dict[str, int]]:
    """What a slim model's config says of the structures that differ from the rest of the config, by name: `num_heads`
    and `num_kv_heads`, or `intermediate_size`. 0 where nothing is left.
    """
    return getattr(config, SIZES_FIELD, None) or {}


def _attention(model: nn.Module, name: str, label: str, form: Attention, config: Any) -> Coupled:
    own = stored_sizes(config).get(label, {})
    heads = own.get("num_heads") or config.num_attention_heads
    kv_heads = own.get("num_kv_heads") or getattr(config, "num_key_value_heads", None) or heads
    size = shape_of(layer_at(model, f"{name}.{form.o}"))[1] // heads
    axes: list[Axis] = []
    offset = 0
    for role, child, count in (("q", form.q, heads), ("k", form.k, kv_heads), ("v", form.v, kv_heads)):
        axes += _producer(
            model, f"{name}.{child}", role, width=size, stride=3 * size if form.interleaved else size, offset=offset,
            shared=count != heads, fused=form.fused,
        )  # fmt: skip
        if form.fused:
            offset += size if form.interleaved else count * size
    rows = {path: shape_of(layer_at(model, f"{name}.{path}"))[0] for path in dict.fromkeys((form.q, form.k, form.v))}
    if sum(rows.values()) != (heads + 2 * kv_heads) * size:
        raise ValueError(f"model: the output of {name} is not that of {heads} heads, on {kv_heads} of keys and values")
    axes.append(Axis(f"{name}.{form.o}", "weight", "o", 1, size, size))
    return Coupled(label, heads, heads // kv_heads, tuple(axes))


def _mlp(model: nn.Module, name: str, form: Mlp) -> Coupled:
    channels = shape_of(layer_at(model, f"{name}.{form.down}"))[1]
    axes: list[Axis] = []
    if form.gate:
        axes += _producer(model, f"{name}.{form.gate}", "gate", fused=form.fused)
    axes += _producer(model, f"{name}.{form.up}", "up", offset=channels if form.fused else 0, fused=form.fused)
    axes.append(Axis(f"{name}.{form.down}", "weight", "down", 1))
    return Coupled(name.replace(".base_layer", ""), channels, 1, tuple(axes), form)


def _producer(model: nn.Module, module: str, role: str, **place: Any) -> list[Axis]:
    """A producer's rows: its weight's and, where there is one, its bias's."""
    names = ["weight"] if getattr(layer_at(model, module), "bias", None) is None else ["weight", "bias"]
    return [Axis(module, tensor, role, 0, **place) for tensor in names]


def layer_at(model: nn.Module, path: str) -> Any:
    """The linear layer of a path, beneath an adapter."""
    module: Any = model.get_submodule(path)
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def is_packed(model: nn.Module, coupled: Coupled) -> bool:
    """Whether one of the matrices is 4-bit, whose blocks a permutation would cut."""
    return any(isinstance(model.get_submodule(axis.module), PackedModule) for axis in coupled.axes)


@torch.no_grad()
def permute(model: nn.Module, coupled: Coupled, order: Tensor) -> None:
    """Puts unit order[i] at place i, in place, everywhere; index moves, hence exact in any dtype.

    Raises:
        ValueError: where `order` is no permutation, takes a query head out of its group, or would cut a 4-bit block.
    """
    if not torch.equal(order.sort().values, torch.arange(coupled.units)):
        raise ValueError(f"order: must be a permutation of 0..{coupled.units - 1}")
    groups = order.view(-1, coupled.group) // coupled.group
    if not bool((groups == groups[:, :1]).all()):
        raise ValueError(f"order: {coupled.name}: query heads may not leave their key-value group")
    if is_packed(model, coupled):
        raise ValueError(f"{coupled.name}: permuting would cut blocks of 4-bit weights; it is not exact")
    for axis in coupled.axes:
        module = model.get_submodule(axis.module)
        tensor = getattr(module, axis.tensor)
        flipped = axis.tensor == "weight" and is_transposed(module)
        dim = 1 - axis.dim if flipped else axis.dim
        units = coupled.order_of(axis, order)
        lines = torch.arange(tensor.shape[dim])
        lines[elements(torch.arange(units.numel()), axis)] = elements(units, axis)
        tensor.copy_(tensor.index_select(dim, lines.to(tensor.device)))


def selected_first(coupled: Coupled, selected: dict[str, Tensor]) -> Tensor:
    """An order in which the selected units of each role lie in few runs: with two roles first's own, common, second's
    own, rest. Groups stay whole.

    Args:
        selected: units per role; per group for keys and values of grouped queries.
    """
    shared = {axis.role for axis in coupled.axes if axis.shared}
    groups = coupled.units // coupled.group
    head_bits = torch.zeros((len(selected), coupled.units), dtype=torch.int64)
    group_bits = torch.zeros((len(selected), groups), dtype=torch.int64)
    for i, (role, units) in enumerate(selected.items()):
        if role in shared:
            group_bits[i, units] = 1
        else:
            head_bits[i, units] = 1
            group_bits[i, units // coupled.group] = 1
    by_group = torch.argsort(-_gray_rank(group_bits), stable=True)
    heads = _gray_rank(head_bits).view(groups, coupled.group)
    inside = torch.argsort(-heads, dim=1, stable=True) + torch.arange(groups).view(-1, 1) * coupled.group
    return inside[by_group].flatten()


def _gray_rank(bits: Tensor) -> Tensor:
    """Position of each column of bits in the reflected Gray code: neighbours differ in one bit."""
    rank = torch.zeros(bits.shape[1], dtype=torch.int64)
    parity = torch.zeros(bits.shape[1], dtype=torch.int64)
    for row in bits:
        parity = parity ^ row
        rank = rank * 2 + parity
    return rank


def runs(places: Tensor) -> list[tuple[int, int]]:
    """Sorted numbers as (start, length) of their consecutive runs."""
    found: list[tuple[int, int]] = []
    for place in places.tolist():
        if found and place == found[-1][0] + found[-1][1]:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((place, 1))
    return found
