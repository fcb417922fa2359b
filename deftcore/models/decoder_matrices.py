"""A decoder's matrices as a model's layers hold them: dense or in 4 bits, under LoRA, in an MLP's sparse form."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from deftcore.models.blocks import MlpBlock
from deftcore.models.decoder_steps import matrix_of
from deftcore.nn.activations import activation_of
from deftcore.nn.linear import PackedModule, called_plainly
from deftcore.nn.mlp import SkippedMLP, SparseMLP, SparseMLP4bit
from deftcore.ops.decoder_matrix import Matrix

# PEFT's layer and `deftcore.patch`'s, which computes the same; what is derived from them computes something else.
_LORA = ("peft.tuners.lora.layer.Linear", "deftcore.methods.lora.layer.FusedLoraLinear")
SPARSE = (SparseMLP, SparseMLP4bit, SkippedMLP)


@dataclass(frozen=True)
class MlpParts:
    """What a block takes of an MLP; without a gate it has none."""

    gate: Matrix | None = None
    up: Matrix | None = None
    down: Matrix | None = None
    activation: str = ""
    tau: float | None = None
    taus: Tensor | None = None
    by_product: bool = False


def read_matrix(name: str, layer: Any) -> Matrix:
    """A linear layer, with the LoRA adapter that is active in it.

    Raises:
        ValueError: with the reason why the native step does not compute it.
    """
    low: dict[str, Any] = {}
    bias = None
    if _kind(layer) in _LORA:
        active = _active(layer)
        if len(active) > 1:
            raise ValueError(f"{name}: {len(active)} active adapters have no native step, one has")
        if active and active[0] in layer.lora_variant:
            variant = type(layer.lora_variant[active[0]]).__name__
            raise ValueError(f"{name}: {variant} has no native step; merge the adapter first (deftcore.merge)")
        if active:
            a, b = layer.lora_A[active[0]], layer.lora_B[active[0]]
            low = {"lora_a": _float(a.weight), "lora_b": _float(b.weight), "lora_scale": layer.scaling[active[0]]}
            bias = None if b.bias is None else low["lora_scale"] * _float(b.bias)
        layer = layer.base_layer
    if hasattr(layer, "base_layer"):
        raise ValueError(f"{name}: {type(layer).__name__} has no native step; merge the adapter first (deftcore.merge)")
    base = matrix_of(name, layer)
    if bias is not None and base.bias is not None:
        bias = base.bias + bias
    return Matrix(base.weight, base.bias if bias is None else bias, **low)


def adapter_state(model: nn.Module) -> list[tuple]:
    """What of a model's LoRA layers is read once, when a decoder is made."""
    layers: list[Any] = [module for module in model.modules() if _kind(module) in _LORA]
    return [(*_active(layer), layer.merged, *(layer.scaling[name] for name in _active(layer))) for layer in layers]


def calls_state(model: nn.Module) -> list[tuple]:
    """Whether a model's modules do nothing but their forward, and the thresholds of sparse ones: read once as well."""
    modules: list[Any] = list(model.modules())
    taus = [m.tau if isinstance(m, (SparseMLP, SparseMLP4bit)) else None for m in modules]
    return [(called_plainly(m, capturing=False), tau) for m, tau in zip(modules, taus, strict=True)]


def weights_state(model: nn.Module) -> list[tuple[int, int]]:
    """Where a model's weights lie, and how often they were written: most are read there, some were copied."""
    packed = [module.weight for module in model.modules() if isinstance(module, PackedModule)]
    return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in (*model.parameters(), *packed)]


def read_mlp(mlp: Any, dense: Mapping[nn.Module, MlpBlock]) -> MlpParts:
    """A layer's MLP.

    Args:
        dense: those that are made of linear layers, by the module that holds them.

    Raises:
        ValueError: as `read_matrix`.
    """
    if type(mlp) is SkippedMLP:
        return MlpParts()
    if type(mlp) in (SparseMLP, SparseMLP4bit):
        matrices = (_sparse if type(mlp) is SparseMLP else _sparse_4bit)(mlp)
        taus = None if mlp.taus is None else mlp.taus.detach()
        return MlpParts(*matrices, mlp.activation, mlp.tau, taus, mlp.by_product)
    block = dense.get(mlp)
    if block is None or block.gate is None or block.form.fused:
        merge = "; merge the adapter first (deftcore.merge)" if hasattr(mlp, "base_layer") else ""
        raise ValueError(f"mlp: {type(mlp).__name__} has no native step{merge}")
    gate, up, down = (read_matrix(slot.attribute, slot.get()) for slot in (block.gate, block.up, block.down))
    return MlpParts(gate, up, down, activation_of(block.activation.get()))


def _sparse(mlp: SparseMLP) -> tuple[Matrix, Matrix, Matrix]:
    """Rows carry low-rank factors beyond the model's width."""
    if mlp.w_gate is None:
        raise ValueError("mlp: a sparse MLP without a gate has no native step")
    gate, rows = mlp.w_gate.detach(), mlp.rows.detach()
    into = 0 if mlp.lora_a is None else mlp.lora_a.shape[0]
    width = rows.shape[2] - max(into, mlp.rank_down)

    def reading(weight: Tensor) -> Matrix:
        if mlp.lora_a is None:
            return Matrix(weight[:, :width])
        return Matrix(weight[:, :width], lora_a=_float(mlp.lora_a), lora_b=_float(weight[:, width : width + into]))

    low: dict[str, Any] = {}
    if mlp.lora_b is not None:
        low = {"lora_a": _float(rows[:, 1, width : width + mlp.rank_down]), "lora_b": _float(mlp.lora_b)}
    bias = None if mlp.b_down is None else _float(mlp.b_down[:width])
    return reading(gate), reading(rows[:, 0]), Matrix(rows[:, 1, :width], bias, **low, neuron_major=True)


def _sparse_4bit(mlp: SparseMLP4bit) -> tuple[Matrix, Matrix, Matrix]:
    if mlp.gate is None:
        raise ValueError("mlp: a sparse MLP without a gate has no native step")

    def low(a: str, b: str) -> dict[str, Any]:
        return {"lora_a": _float(mlp.lora[a]), "lora_b": _float(mlp.lora[b])} if b in mlp.lora else {}

    bias = None if mlp.b_down is None else _float(mlp.b_down)
    return (
        Matrix(mlp.gate.quantized, **low("gate_a", "gate_b")),
        Matrix(mlp.up.quantized, **low("up_a", "up_b")),
        Matrix(mlp.down.quantized, bias, **low("down_a_t", "down_b"), neuron_major=True),
    )


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _active(layer: Any) -> list[str]:
    """Of a LoRA layer the adapters that it adds to its base."""
    apart = not layer.disable_adapters and not layer.merged
    return [name for name in layer.active_adapters if name in layer.lora_A] if apart else []


def _float(tensor: Tensor) -> Tensor:
    return tensor.detach().float().contiguous()
