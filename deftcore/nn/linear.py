"""Linear layers with 4-bit weights, and `quantize`, which puts them into a model (QLoRA, arXiv 2305.14314)."""

import difflib
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from deftcore.ops.checks import FLOAT_DTYPES, check_choice
from deftcore.ops.quant4 import linear_4bit, quantize_4bit
from deftcore.ops.quantized import QUANT_TYPES, QuantizedTensor, check_block_size

logger = logging.getLogger("deftcore")

_TENSORS = ("packed", "absmax", "code", "nested_absmax", "nested_code")


class PackedModule(nn.Module):
    """Holds one 4-bit matrix: its tensors are buffers, its metadata plain attributes, its files bitsandbytes' own.

    `.to(device)` moves the bytes; `.half()`, `.bfloat16()` and `.to(dtype)` leave them and their scales alone. Nothing
    ever changes the bytes, in training or evaluation.
    """

    weight: Tensor

    def __init__(self, weight: QuantizedTensor) -> None:
        nn.Module.__init__(self)
        self.set_quantized(weight)

    def set_quantized(self, q: QuantizedTensor) -> None:
        """Replaces the weight."""
        self._fields = {name: getattr(q, name) for name in (
            "shape", "dtype", "quant_type", "block_size", "nested_offset", "storage", "column_blocks")}  # fmt: skip
        for name in _TENSORS:
            tensor = getattr(q, name)
            if name == "packed":  # under the name, and in the form, that PEFT and Transformers look for
                name, tensor = "weight", tensor.view(q.storage).reshape(-1, 1)
            self.register_buffer(name, tensor, persistent=False)
        self._quantized: QuantizedTensor | None = q
        self._source = self.weight

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight. Made anew when the buffers were replaced, as device hooks do."""
        if self._quantized is None or self._source is not self._buffers["weight"]:
            tensors: dict[str, Any] = {name: self._buffers[name] for name in _TENSORS[1:]}
            packed = self.weight.view(torch.uint8).reshape(-1)
            self._quantized, self._source = QuantizedTensor(packed=packed, **tensors, **self._fields), self.weight
        return self._quantized

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_quantized", "_source")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._quantized, self._source = None, self.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedModule":
        held = {name: self._buffers.pop(name) for name in ("weight", *_TENSORS[1:])}

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        try:
            super()._apply(fn, recurse)
        finally:
            for name, tensor in held.items():
                self._buffers[name] = tensor
        for name, tensor in held.items():
            self._buffers[name] = None if tensor is None else moved(tensor)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        q = self.quantized
        state = (q.t() if q.column_blocks else q).state_dict(f"{prefix}weight")
        # Code books are shared by all layers; files may not share memory.
        destination.update({name: t.clone() if name.endswith("quant_map") else t for name, t in state.items()})

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, local_metadata: dict, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        name = f"{prefix}weight"
        rest = {key: t for key, t in state_dict.items() if key != name and not key.startswith(f"{name}.")}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if name not in state_dict:
            missing_keys.append(name)
            return
        if f"{name}.absmax" not in state_dict:
            error_msgs.append(f"{name}: this layer is 4-bit and the state holds {state_dict[name].dtype} weights")
            return
        try:
            q = QuantizedTensor.from_state_dict(state_dict, name)
            q = q.t() if self._fields["column_blocks"] else q
        except ValueError as error:
            error_msgs.append(str(error))
            return
        if q.shape != self._fields["shape"]:
            error_msgs.append(f"{name}: shape must be {tuple(self._fields['shape'])}, got {tuple(q.shape)}")
        else:
            self.set_quantized(q if self.weight.device.type == "meta" else q.to(self.weight.device))


def is_transposed(module: nn.Module) -> bool:
    """Whether the layer stores [in, out] (Transformers' Conv1D, as in GPT-2)."""
    return type(module).__name__ == "Conv1D"


def shape_of(layer: Any) -> tuple[int, int]:
    """[out, in] of a linear layer, dense or packed, or Conv1D."""
    if hasattr(layer, "out_features"):
        return int(layer.out_features), int(layer.in_features)
    rows, columns = layer.weight.shape
    return (columns, rows) if is_transposed(layer) else (rows, columns)


class Linear4bit(PackedModule, nn.Linear):
    """y = x W^T + bias with a packed, frozen W; files are those of bitsandbytes' layer of the same name.

    float32 and bfloat16 inputs are computed in their own dtype, float16 in `compute_dtype` (None: float16).
    `source_cls` is the class of the layer that it stands for: W is [out, in] here also where that one stores [in, out].

    Shapes: x [..., in_features] -> [..., out_features].
    """

    def __init__(
        self,
        weight: QuantizedTensor,
        bias: Tensor | None = None,
        *,
        compute_dtype: torch.dtype | None = None,
        source_cls: type[nn.Module] = nn.Linear,
    ) -> None:
        if weight.dim() != 2:
            raise ValueError(f"weight: must be a matrix [M, K], got shape {tuple(weight.shape)}")
        if bias is not None and bias.shape != (weight.shape[0],):
            raise ValueError(f"bias: shape must be {(weight.shape[0],)}, got {tuple(bias.shape)}")
        super().__init__(weight)
        self.out_features, self.in_features = weight.shape
        self.compute_dtype, self.source_cls = compute_dtype, source_cls
        frozen = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", frozen)

    @classmethod
    def from_linear(cls, linear: Any, *, compute_dtype: torch.dtype | None = None, **options: Any) -> "Linear4bit":
        """A quantised copy of a linear layer or Conv1D; `options` are those of `deftcore.ops.quantize_4bit`."""
        q = quantize_4bit(out_by_in(linear, linear.weight.detach()), **options)
        return cls(q, linear.bias, compute_dtype=compute_dtype, source_cls=type(linear))

    def forward(self, x: Tensor) -> Tensor:
        return linear_packed(x, self.quantized, self.bias, self.compute_dtype)

    @torch.no_grad()
    def scale_output_(self, factor: float) -> None:
        """Multiplies what the layer returns by a number, through the scales and the bias."""
        self.set_quantized(self.quantized.scaled(factor))
        if self.bias is not None:
            self.bias.mul_(factor)

    def extra_repr(self) -> str:
        nested = ", double_quant" if self.nested_absmax is not None else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self._fields['quant_type']}, block_size={self._fields['block_size']}{nested}"
        )


def out_by_in(layer: nn.Module, weight: Any) -> Tensor:
    """The weight that a layer's files hold, as a dense [out, in]."""
    return weight.t().contiguous() if is_transposed(layer) else weight


def dense_layer(packed: Any, weight: Tensor) -> nn.Module:
    """The frozen layer that a 4-bit one (ours or bitsandbytes') stands for, with a weight [out, in] and its bias."""
    kind = getattr(packed, "source_cls", nn.Linear)
    rows, columns = weight.shape
    with torch.device("meta"):
        layer: Any = kind(rows, columns) if kind.__name__ == "Conv1D" else nn.Linear(columns, rows)
    layer.weight = nn.Parameter(out_by_in(layer, weight), requires_grad=False)
    bias = None if packed.bias is None else packed.bias.detach().to(weight.dtype)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return layer


def called_plainly(module: nn.Module, *, hooks: bool = True) -> bool:
    """Whether calling a module runs its class's forward and nothing else.

    Accelerate's offloading puts a forward of its own into the module, others register hooks (`hooks=False` allows
    them). Code that computes with a module's weights instead of calling it asks this first.
    """
    own = vars(module)
    if "forward" in own or "_hf_hook" in own:
        return False
    return not hooks or not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        or _has_any_global_hook()
    )  # fmt: skip


def linear_packed(x: Tensor, q: QuantizedTensor, bias: Tensor | None, compute_dtype: torch.dtype | None) -> Tensor:
    """`linear_4bit` under the module's rules for dtypes."""
    dtype = compute_dtype if x.dtype == torch.float16 and compute_dtype is not None else x.dtype
    bias = bias if bias is None or bias.dtype == dtype else bias.to(dtype)
    if dtype == x.dtype:
        return linear_4bit(x, q, bias)
    return linear_4bit(x.to(dtype), q, bias).to(x.dtype)


def quantize(
    model: Any,
    *,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    skip: Collection[str] = ("lm_head",),
    compute_dtype: torch.dtype | None = None,
) -> Any:
    """Replaces the linear layers (GPT-2's Conv1D among them) of a model in memory by `Linear4bit`, one at a time, in
    place.

    For QLoRA: `quantize`, then `peft.get_peft_model`, then `deftcore.patch`. To load a checkpoint straight into 4 bits,
    without the dense model ever in memory, use `deftcore.load_quantized`.

    Args:
        model: any module; a Transformers model also gets a `config.quantization_config`, so that what it saves loads
            in Transformers with bitsandbytes.
        quant_type, block_size, double_quant: as in `deftcore.ops.quantize_4bit`.
        skip: layers to leave dense, by full name or by its last parts. Weights shared with another module (tied heads)
            always stay.
        compute_dtype: of float16 inputs; see `Linear4bit`.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: naming the argument, or the layer whose weight cannot be quantised; for a PEFT model, or
            one without a linear layer to replace. The model is as it was then.
    """
    if hasattr(model, "peft_config"):
        raise ValueError("model: quantise the base model first, then call get_peft_model")
    options: dict[str, Any] = {"quant_type": quant_type, "block_size": block_size, "double_quant": double_quant}
    names = linears_to_quantize(model, skip)
    check_choice("quant_type", quant_type, QUANT_TYPES)
    check_block_size(block_size)
    for name in names:  # all, before the first is replaced
        _check_weight(name, model.get_submodule(name).weight)
    for name in names:
        parent, _, attribute = name.rpartition(".")
        holder = model.get_submodule(parent)
        try:
            packed = Linear4bit.from_linear(getattr(holder, attribute), compute_dtype=compute_dtype, **options)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        setattr(holder, attribute, packed)
    set_quantization_config(model, skip, compute_dtype=compute_dtype, **options)
    logger.info("quantize: %d linear layers in %s", len(names), quant_type)
    return model


def _check_weight(name: str, weight: Tensor) -> None:
    if weight.dtype not in FLOAT_DTYPES[:3]:
        raise TypeError(f"{name}: weight must be float32, bfloat16 or float16, got {weight.dtype}")
    if not weight.is_meta and not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{name}: weight has values that are not finite; 4-bit blocks cannot hold them")


def linears_to_quantize(model: nn.Module, skip: Collection[str]) -> list[str]:
    """Names of the linear layers that `quantize` replaces; Transformers wants some (T5's wo) in float32.

    Raises:
        ValueError: when there is none, or a name in `skip` (other than lm_head) matches nothing.
    """
    found = [name for name, module in model.named_modules() if type(module) is nn.Linear or is_transposed(module)]
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for wanted in skip:
        if wanted != "lm_head" and not any(is_named(name, [wanted]) for name, _ in model.named_modules()):
            everything = {n for name, _ in model.named_modules() for n in (name, name.rpartition(".")[2])}
            near = difflib.get_close_matches(wanted, everything, 3)
            raise ValueError(f"skip: no module named {wanted!r}" + (f"; near: {', '.join(near)}" if near else ""))
    kept = (*skip, *(getattr(model, "_keep_in_fp32_modules", None) or ()))
    chosen = [
        name
        for name in found
        if not is_named(name, kept) and owners[id(model.get_submodule(name).weight)] == 1  # not tied
    ]
    if not chosen:
        raise ValueError(f"model: {type(model).__name__} has no linear layer (nn.Linear, Conv1D) to quantise")
    return chosen


def is_named(name: str, wanted: Collection[str]) -> bool:
    """Whether a module, or one that holds it, has one of these names: whole, or its last parts."""
    return any(f".{part}." in f".{name}." for part in wanted)


def set_quantization_config(
    model: Any,
    skip: Collection[str],
    *,
    quant_type: str,
    block_size: int,
    double_quant: bool,
    compute_dtype: torch.dtype | None,
) -> None:
    """Writes what Transformers reads to load the model's files with bitsandbytes; block sizes stand in the files."""
    if not hasattr(model, "config"):
        return
    storage = next(m.weight.dtype for m in model.modules() if isinstance(m, Linear4bit))
    model.config.quantization_config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": str(compute_dtype or torch.float32)[6:],
        "bnb_4bit_quant_storage": str(storage)[6:],
        "llm_int8_skip_modules": sorted(skip) or None,
    }


def prepare_for_training(model: Any, *, gradient_checkpointing: bool = True) -> Any:
    """Readies a quantised model for adapters, in place: all weights frozen, norms computed in float32.

    A norm still returns its input's dtype: what follows it, the dense head among them, is in the checkpoint's.

    Args:
        model: a Transformers model after `quantize`.
        gradient_checkpointing: recompute activations in the backward (not reentrant).

    Returns:
        The model.
    """
    model.requires_grad_(False)
    for module in model.modules():
        if "Norm" in type(module).__name__:
            module.float()
            setattr(module, "forward", partial(_norm_in_float32, module.forward))  # noqa: B010
    if gradient_checkpointing:
        checkpoint_activations(model)
        model.config.use_cache = False
    return model


def checkpoint_activations(model: Any) -> None:
    """A Transformers model recomputes its activations in the backward, not reentrant, from now on."""
    enable = getattr(model, "activation_checkpointing_enable", None)  # Transformers 5.23 renamed it
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def _norm_in_float32(forward: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return forward(x.float(), *args, **kwargs).to(x.dtype)


# ---------------------------------------------------------------------------- merging a low-rank update


@dataclass(frozen=True)
class MergeReport:
    """What a merge kept of the update D = scaling B A; norms are Frobenius."""

    relative_size: float  # |D| / |W|
    kept: float  # share of D in the merged weight: <merged - W, D> / |D|^2
    error: float  # |merged - (W + D)| / |D|

    def __str__(self) -> str:
        return (
            f"{100 * self.kept:.1f} % of the update is kept, error {self.error:.3g} of its size "
            f"(update {self.relative_size:.2g} of the weight)"
        )


def merged_4bit(q: QuantizedTensor, delta: Tensor) -> tuple[QuantizedTensor, MergeReport]:
    """q + delta, requantised as q was."""
    before = q.dequantize(torch.float32)
    target = before + delta.float()
    options: dict[str, Any] = {"block_size": q.block_size, "double_quant": q.double_quant}
    merged = quantize_4bit(target, quant_type=q.quant_type, **options)
    merged.dtype, merged.storage = q.dtype, q.storage
    return merged, _report(before, target, merged.dequantize(torch.float32), delta)


def merged_16bit(q: QuantizedTensor, delta: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, MergeReport | None]:
    """The decoded q + delta in `dtype`, rounded once; no report without an update."""
    if delta is None:
        return q.dequantize(dtype), None
    before = q.dequantize(torch.float32)
    target = before + delta.float()
    merged = target.to(dtype)
    return merged, _report(before, target, merged.float(), delta)


def _report(before: Tensor, target: Tensor, merged: Tensor, delta: Tensor) -> MergeReport:
    size = delta.float().norm().clamp(min=torch.finfo(torch.float32).tiny)
    kept = ((merged - before) * delta).sum() / size.square().clamp(min=torch.finfo(torch.float32).tiny)
    return MergeReport(
        float(size / before.norm().clamp(min=1e-30)), float(kept), float((merged - target).norm() / size)
    )
