"""Linear layers with 4-bit weights (QLoRA, Dettmers et al., arXiv 2305.14314)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from deftcore.ops.quant4 import linear_4bit, quantize_4bit
from deftcore.ops.quantized import QuantizedTensor

_TENSORS = ("packed", "absmax", "code", "nested_absmax", "nested_code")


class PackedModule(nn.Module):
    """Holds one 4-bit matrix: its tensors are buffers, its metadata plain attributes, its files bitsandbytes' own.

    `.to(device)` moves the bytes; `.half()`, `.bfloat16()` and `.to(dtype)` leave them and their scales alone. Nothing
    ever changes the bytes, in training or evaluation.
    """

    constant_buffers = True  # processes need not send them
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


def dtype_of(layer: Any) -> torch.dtype:
    """The dtype of a layer's weight; of what was quantised, where the weight is packed bytes."""
    if layer.weight.is_floating_point():
        return layer.weight.dtype
    packed = getattr(layer, "quantized", None) or getattr(layer.weight, "quant_state", None)
    return getattr(packed, "dtype", torch.float32)


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
        """x W^T + bias, W decoded on the way (QLoRA, arXiv 2305.14314, eq. 5 without its adapter).

        Args:
            x: [..., in_features], float32, bfloat16 or float16; under autocast in its dtype.

        Returns:
            [..., out_features] in x's dtype, differentiable in x.

        Raises:
            TypeError, ValueError: naming the argument.
        """
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


def called_plainly(module: nn.Module, *, hooks: bool = True, capturing: bool = True) -> bool:
    """Whether calling a module runs its class's forward and nothing else.

    Accelerate's offloading puts a forward of its own into the module, others register hooks (`hooks=False` allows
    them). Once asked for hidden states or attentions, Transformers leaves hooks that do nothing in a call that does not
    ask for them (`capturing=False` allows those). Code that computes with a module's weights instead of calling it asks
    this first.
    """
    own = vars(module)
    if "forward" in own or "_hf_hook" in own:
        return False
    behind: Any = module._forward_hooks.values()
    if not capturing:
        behind = [hook for hook in behind if getattr(hook, "__module__", "") != "transformers.utils.output_capturing"]
    return not hooks or not (
        behind or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        or _has_any_global_hook()
    )  # fmt: skip


def linear_packed(x: Tensor, q: QuantizedTensor, bias: Tensor | None, compute_dtype: torch.dtype | None) -> Tensor:
    """`linear_4bit` under the module's rules for dtypes."""
    dtype = compute_dtype if x.dtype == torch.float16 and compute_dtype is not None else x.dtype
    bias = bias if bias is None or bias.dtype == dtype else bias.to(dtype)
    if dtype == x.dtype:
        return linear_4bit(x, q, bias)
    return linear_4bit(x.to(dtype), q, bias).to(x.dtype)
