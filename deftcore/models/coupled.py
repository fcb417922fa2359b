"""Heads and channels of a Transformers model that belong together, and their permutation (S2FT, arXiv 2412.06289).

A permutation of an MLP's channels, or of an attention's heads, applied to every matrix that touches them leaves the
function as it was. One table here says, family by family, which rows and columns those are.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deftcore.nn.linear import PackedModule, is_transposed

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "opt", "gpt2", "bert", "roberta", "t5")
HEAD_ROLES = ("q", "k", "v", "o")
CHANNEL_ROLES = ("gate", "up", "down")
CONSUMERS = ("o", "down")  # their input channels are the units; the others' output channels are


@dataclass(frozen=True)
class Axis:
    """The rows (dim 0) or columns (dim 1) of one [out, in] tensor that belong to the units, `width` each."""

    module: str
    tensor: str  # "weight" or "bias"
    role: str
    dim: int
    width: int = 1
    offset: int = 0  # where unit 0 starts, in a fused weight
    shared: bool = False  # one per group of units: keys and values of grouped queries

    @property
    def key(self) -> str:
        """A name for the slices of this role: the module's, with the role where a fused weight has several."""
        return f"{self.module}:{self.role}" if self.module.endswith("c_attn") else self.module


@dataclass(frozen=True)
class Coupled:
    """Units (heads or channels) that move together, and everything that moves with them."""

    name: str
    units: int
    group: int  # query heads per key-value head; 1 elsewhere
    axes: tuple[Axis, ...]

    def weights(self, roles: Iterable[str]) -> list[Axis]:
        """The matrices of these roles."""
        return [axis for axis in self.axes if axis.tensor == "weight" and axis.role in set(roles)]

    def order_of(self, axis: Axis, order: Tensor) -> Tensor:
        """The order of the axis's own units: that of groups where it has one per group."""
        return order.view(-1, self.group)[:, 0] // self.group if axis.shared else order


def elements(units: Tensor, axis: Axis) -> Tensor:
    """The rows or columns of some units of an axis."""
    return (units.view(-1, 1) * axis.width + torch.arange(axis.width)).flatten() + axis.offset


def find_coupled(model: nn.Module) -> list[Coupled]:
    """All coupled units of a model, in forward order.

    Raises:
        ValueError: naming the model type, where its structure is not in the table.
    """
    config: Any = getattr(model, "config", None)
    family = getattr(config, "model_type", type(model).__name__)
    if family not in FAMILIES:
        raise ValueError(f"model: S2FT knows {', '.join(FAMILIES)}; the structure of {family!r} is not in its table")
    if getattr(config, "add_cross_attention", False):
        raise ValueError(f"model: {family} with cross-attention is not in S2FT's table")
    found = list(_walk(model, family, config))
    if not found:
        raise ValueError(f"model: {type(model).__name__} has no attention or MLP of the {family} family")
    return found


def _walk(model: nn.Module, family: str, config: Any) -> Iterator[Coupled]:
    stacks: dict[str, list[Coupled]] = {}  # T5: one head order for a whole stack, whose blocks share a bias table
    for name, module in model.named_modules():
        children = {child for child, _ in module.named_children()}

        def has(*names: str, within: set[str] = children) -> bool:
            return within.issuperset(names)

        if family == "gpt2":
            if has("c_attn", "c_proj"):
                yield _attention(model, name, config, fused="c_attn", o="c_proj")
            elif has("c_fc", "c_proj"):
                yield _mlp(model, name, up="c_fc", down="c_proj")
        elif family in ("bert", "roberta"):
            if has("self", "output"):
                yield _attention(model, name, config, "self.query", "self.key", "self.value", o="output.dense")
            elif has("intermediate", "output"):
                yield _mlp(model, name, up="intermediate.dense", down="output.dense")
        elif family == "t5":
            if has("q", "k", "v", "o"):
                attention = _attention(model, name, config, "q", "k", "v", o="o")
                if name.endswith("EncDecAttention"):
                    yield attention
                else:
                    stacks.setdefault(name.split(".block.")[0], []).append(attention)
            elif has("wi", "wo"):
                yield _mlp(model, name, up="wi", down="wo")
            elif has("wi_0", "wi_1", "wo"):
                yield _mlp(model, name, gate="wi_0", up="wi_1", down="wo")
        elif has("q_proj", "k_proj", "v_proj"):
            output = "out_proj" if family == "opt" else "o_proj"
            yield _attention(model, name, config, "q_proj", "k_proj", "v_proj", o=output)
        elif has("fc1", "fc2"):
            yield _mlp(model, name, up="fc1", down="fc2")
        elif has("gate_proj", "up_proj", "down_proj"):
            yield _mlp(model, name, gate="gate_proj", up="up_proj", down="down_proj")
    for stack, members in stacks.items():
        first = members[0].name.removesuffix(".o")
        table = Axis(f"{members[0].name}.relative_attention_bias", "weight", "bias", 1)
        axes = tuple(axis for member in members for axis in member.axes)
        yield Coupled(f"{stack} ({first.rsplit('.', 1)[-1]})", members[0].units, 1, (*axes, table))


def _attention(
    model: nn.Module, name: str, config: Any, q: str = "", k: str = "", v: str = "", *, o: str, fused: str = ""
) -> Coupled:
    heads = config.num_heads if config.model_type == "t5" else config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    size = _shape(model.get_submodule(f"{name}.{o}"))[1] // heads
    axes: list[Axis] = []
    for role, child, count in (("q", q, heads), ("k", k, kv_heads), ("v", v, kv_heads)):
        offset = "qkv".index(role) * heads * size if fused else 0
        axes += _both(
            model, f"{name}.{fused or child}", role, width=size, offset=offset, shared=count != heads
        )  # fmt: skip
    axes.append(Axis(f"{name}.{o}", "weight", "o", 1, size))
    return Coupled(name, heads, heads // kv_heads, tuple(axes))


def _mlp(model: nn.Module, name: str, *, up: str, down: str, gate: str = "") -> Coupled:
    axes: list[Axis] = []
    for role, child in (("gate", gate), ("up", up)):
        if child:
            axes += _both(model, f"{name}.{child}", role)
    axes.append(Axis(f"{name}.{down}", "weight", "down", 1))
    return Coupled(name, _shape(model.get_submodule(f"{name}.{down}"))[1], 1, tuple(axes))


def _both(model: nn.Module, module: str, role: str, **place: Any) -> list[Axis]:
    """A producer's rows: its weight's and, where there is one, its bias's."""
    names = ["weight"] if getattr(model.get_submodule(module), "bias", None) is None else ["weight", "bias"]
    return [Axis(module, tensor, role, 0, **place) for tensor in names]


def _shape(module: Any) -> tuple[int, int]:
    """[out, in] of a linear layer."""
    if hasattr(module, "out_features"):
        return int(module.out_features), int(module.in_features)
    rows, columns = module.weight.shape
    return (columns, rows) if is_transposed(module) else (rows, columns)


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
        moved = elements(coupled.order_of(axis, order), axis).to(tensor.device)
        values = tensor.index_select(dim, moved)
        tensor.narrow(dim, axis.offset, moved.numel()).copy_(values)


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
