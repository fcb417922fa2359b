"""PEFT's LoRA layers and bitsandbytes' 4-bit layers on deftcore's ops, in place and back; merging over 4-bit bases."""

import logging
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from deftcore.methods.mamba.lora import factors
from deftcore.methods.s2ft.model import S2ftLayer
from deftcore.models.blocks import base_of
from deftcore.models.gates import gates_of
from deftcore.models.tied import merge_and_unload, tuned_ties
from deftcore.nn.linear import Linear4bit, MergeReport, called_plainly, dense_layer, merged_4bit, merged_16bit
from deftcore.nn.verify import Case, Proofs, describe, run_linear, test_bed
from deftcore.ops.checks import FLOAT_DTYPES
from deftcore.ops.lora import lora_linear
from deftcore.ops.quantized import QuantizedTensor

logger = logging.getLogger("deftcore")


def obstacle(layer: Any, weight: Tensor | QuantizedTensor, dtype: torch.dtype) -> str:
    """Why the fused op does not cover a LoRA layer as it is now, on an input of `dtype`; empty where it does."""
    base = layer.base_layer
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged:
        return "adapters are merged or disabled"
    if len(active) != 1:
        return f"{len(active)} active adapters"
    name = active[0]
    if name in layer.lora_variant:
        return "a variant of LoRA"
    a, b = layer.lora_A[name], layer.lora_B[name]
    if b.bias is not None:
        return "lora_bias"
    if type(base) not in layer.bases or type(a) is not nn.Linear or type(b) is not nn.Linear:
        return f"{type(a).__name__} and {type(b).__name__} over {type(base).__name__}"
    if not all(map(called_plainly, (base, a, b, layer.lora_dropout[name]))):
        return "hooks on its parts"
    if isinstance(weight, QuantizedTensor):
        computed = base.compute_dtype if dtype == torch.float16 else None
        return "" if computed in (None, dtype) else f"compute_dtype {computed}"
    if weight.requires_grad:
        return "the base weight trains"
    if any(type(t) is not nn.Parameter for t in (weight, a.weight, b.weight)):
        return f"weights are {type(weight).__name__}, {type(a.weight).__name__}"
    if torch.is_autocast_enabled(weight.device.type):  # which leaves float64 alone
        return "float64 under autocast" if torch.float64 in (dtype, weight.dtype, a.weight.dtype) else ""
    masters = (
        dtype.itemsize == 2 and a.weight.dtype == torch.float32 and getattr(layer, "cast_input_dtype_enabled", True)
    )
    if dtype != weight.dtype or a.weight.dtype != b.weight.dtype or not (a.weight.dtype == dtype or masters):
        return f"{a.weight.dtype} factors over {weight.dtype}"
    return ""


def fused_lora(layer: Any, weight: Tensor | QuantizedTensor, x: Tensor) -> Tensor | None:
    """A LoRA layer's forward as one op, or None where the op does not cover it and PEFT's own has to serve."""
    if obstacle(layer, weight, x.dtype):
        return None
    name = next(name for name in layer.active_adapters if name in layer.lora_A)
    a, b, dropout = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.lora_dropout[name]
    bias, drops = layer.base_layer.bias, layer.training and not isinstance(dropout, nn.Identity)
    dropped = dropout(x.to(a.dtype)) if drops else None  # in the factors' dtype, as in PEFT
    if isinstance(weight, QuantizedTensor):  # float32 master factors are cast per call, their gradients come back
        a, b, bias = a.to(x.dtype), b.to(x.dtype), None if bias is None else bias.to(x.dtype)
        dropped = None if dropped is None else dropped.to(x.dtype)
    return lora_linear(x, weight, a, b, scaling=layer.scaling[name], bias=bias, dropped_x=dropped)


class FusedLoraLinear(LoraLinear):
    """PEFT's LoRA layer with its plain forward fused; parameters, names and checkpoints are PEFT's.

    `patch` changes a layer's class to this one and `unpatch` changes it back, so nothing else can differ. Over a
    `Linear4bit` base, merging requantises and unmerging restores the saved bytes.
    """

    bases = (nn.Linear, Linear4bit)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = None if args or kwargs else fused_lora(self, base_weight(self), x)
        return super().forward(x, *args, **kwargs) if y is None else y

    def waits(self) -> str:
        """Why PEFT's own forward runs for now; empty where the op does."""
        weight = base_weight(self)
        return obstacle(self, weight, weight.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        base = self.get_base_layer()
        if not isinstance(base, Linear4bit):
            return super().merge(safe_merge, adapter_names)
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            if name in self.lora_variant or self.lora_bias[name]:
                raise ValueError(f"{name}: only plain LoRA without a bias can be merged into 4 bits")
            merged, report = merged_4bit(base.quantized, self.get_delta_weight(name))
            if safe_merge and not bool(torch.isfinite(merged.scales()).all()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            if not self.merged_adapters:
                self._unmerged = base.quantized
            base.set_quantized(merged)
            self.merged_adapters.append(name)
            warnings.warn(f"merged into 4 bits: {report}", stacklevel=2)
        return None

    def unmerge(self) -> None:
        base = self.get_base_layer()
        if not isinstance(base, Linear4bit) or not self.merged:
            return super().unmerge()
        base.set_quantized(self._unmerged)
        del self._unmerged
        self.merged_adapters.clear()
        return None


def base_weight(layer: Any) -> Tensor | QuantizedTensor:
    base = layer.base_layer
    return base.quantized if isinstance(base, Linear4bit) else base.weight


def patch(model: nn.Module, *, verify: bool = True) -> nn.Module:
    """Runs PEFT's LoRA layers, bitsandbytes' 4-bit layers and Mamba mixers on native ops, in place; returns the model.

    Bases may be `torch.nn.Linear`, deftcore's `Linear4bit` or bitsandbytes'. Layers it leaves alone are logged with the
    reason: other bases, DoRA and other variants, weights that bitsandbytes has repacked. Calls that the op does not
    cover (several active adapters, mixed batches, base weights that train, hooks on a layer's parts) go to PEFT's own
    forward; layers of which that holds already are named too. Mixers of Transformers' Mamba, Mamba-2 and FalconMamba
    become one fused op each, LoRA on any of their projections inside.

    Args:
        model: any module.
        verify: run one layer of every kind, configuration and dtype against what it replaces, on a small random input,
            before any of its kind is replaced: forward and backward, for mixers also a left-padded prefill and two
            cached steps. Where they differ beyond rounding the layer is left alone and named. Verdicts are kept in the
            cache folder; `deftcore info` lists them.

    Raises:
        ValueError: when the model has no such layer at all.
    """
    patched = 0
    left: dict[str, list[str]] = {}  # names by reason, as the next
    waiting: dict[str, list[str]] = {}
    refused: dict[str, list[str]] = {}
    proofs = Proofs() if verify else None
    modules = dict(model.named_modules())
    for name, module in modules.items():
        found = _replacement(module, modules.get(name.rpartition(".")[0]) if name else None)
        if isinstance(found, str):
            if found:
                left.setdefault(found, []).append(name)
            continue
        kind, cases = found
        if type(module) is not kind:
            if not called_plainly(module, hooks=False):
                left.setdefault("its forward was replaced, by Accelerate perhaps", []).append(name)
                continue
            refusal = proofs.refusal(type(module), kind, cases) if proofs else ""
            if refusal:
                refused.setdefault(refusal, []).append(name)
                continue
            module.__class__ = kind
        patched += 1
        reason = module.waits() if hasattr(module, "waits") else ""
        if reason:
            waiting.setdefault(reason, []).append(name)
    if proofs:
        proofs.keep()
    if not (patched or left or refused):
        if any(isinstance(module, Linear4bit) for module in model.modules()):
            return model  # native already
        raise ValueError(
            f"model: {type(model).__name__} has no PEFT LoRA, no bitsandbytes 4-bit layer and no Mamba mixer; call "
            "get_peft_model first"
        )
    logger.info("patch: %d layers on native ops", patched - sum(map(len, waiting.values())))
    for what, found_ones in (("left alone", left), ("PEFT's own forward runs for now", waiting), ("refused", refused)):
        if found_ones:
            logger.warning("patch: %s: %s", what, _by_reason(found_ones))
    if refused:
        warnings.warn(f"deftcore.patch: keep their own forward: {_by_reason(refused)}", stacklevel=2)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Gives the layers their own classes back, in place; returns the model."""
    for module in model.modules():
        if type(module) is FusedLoraLinear:
            module.__class__ = LoraLinear  # type: ignore[assignment]
        else:
            for integration in _integrations():
                integration.unpatch_module(module)
    return model


def _by_reason(names: dict[str, list[str]]) -> str:
    return "; ".join(f"{', '.join(names[reason])} ({reason})" for reason in names)


Replacement = tuple[type, Callable[[], list[Case]]]


def _replacement(module: nn.Module, parent: nn.Module | None) -> Replacement | str:
    """The class to take the place of a module's and the cases that prove it, or why there is none ("": no concern)."""
    if not isinstance(module, LoraLinear):
        results = (integration.replacement(module, parent) for integration in _integrations())
        return next((found for found in results if found), "")
    base = type(module.get_base_layer())
    if type(module) not in (LoraLinear, FusedLoraLinear):
        return type(module).__name__
    if base not in FusedLoraLinear.bases:
        return f"base {base.__name__}"
    if module.lora_variant:
        return f"variant {', '.join(module.lora_variant)}"
    return FusedLoraLinear, lambda: lora_cases(module, getattr(module.get_base_layer(), "quantized", None))


def lora_cases(layer: Any, q: QuantizedTensor | None) -> list[Case]:
    """One case for each adapter of a LoRA layer; `q` is its base's weight where that is in 4 bits."""
    base = layer.get_base_layer()
    dtype = base.weight.dtype if q is None else q.dtype
    cases = []
    for name in layer.lora_A:
        drops = ", dropout" if not isinstance(layer.lora_dropout[name], nn.Identity) else ""
        weight = str(dtype)[6:] if q is None else describe(q)
        factors = f"rank {layer.r[name]} {str(layer.lora_A[name].weight.dtype)[6:]}{drops}"
        label = f"LoRA over {type(base).__name__} ({weight}), {factors}"
        cases.append(Case(label, layer, partial(_lora_bed, layer, name), dtype, run_linear))
    return cases


def _lora_bed(layer: Any, name: str) -> nn.Module:
    unit = lora_ready(test_bed(layer))
    unit._active_adapter = name
    if not isinstance(unit.lora_dropout[name], nn.Identity):
        unit.lora_dropout[name], unit.training = _Dropped(), True
    return unit


def lora_ready(unit: Any) -> Any:
    """A test bed whose LoRA layers are in use, and add about half of what their bases give."""
    for layer in unit.modules():
        if isinstance(layer, LoraLayer):
            layer._disable_adapters = False
            factors_b: Any = layer.lora_B
            for name, b in factors_b.items():
                b.weight.data *= 0.5 / (abs(layer.scaling[name]) or 1.0)
    return unit


class _Dropped(nn.Module):
    """Stands for dropout in a proof: every third feature, whatever the dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1.5 * (torch.arange(x.shape[-1], device=x.device) % 3 != 0)).to(x.dtype)


def _integrations() -> list[Any]:
    """The integrations whose libraries are in use."""
    found: list[Any] = []
    if "bitsandbytes" in sys.modules:
        from deftcore.methods.lora import bitsandbytes

        found.append(bitsandbytes)
    if any(
        f"transformers.models.{kind}.modeling_{kind}" in sys.modules for kind in ("mamba", "mamba2", "falcon_mamba")
    ):
        from deftcore.methods.mamba import patch as mamba

        found.append(mamba)
    return found


def merge(model: Any, *, to: str = "16bit", dtype: torch.dtype | None = None) -> Any:
    """Merges the active LoRA or S2FT adapters of a model over 4-bit bases, and unloads PEFT; adaptive gates too.

    Weights of a quantised model sit on code points, so that a small update is rounded away by a merge into 4 bits; the
    report says how much of it is left. The update was trained on the decoded weights: merging it into the original
    16-bit ones adds an error it has never seen.

    Args:
        model: a PEFT model over `Linear4bit` or (patched) bitsandbytes layers.
        to: "16bit" decodes every 4-bit layer and adds the update with one rounding; "4bit" requantises.
        dtype: of the 16-bit weights; None is the dtype that was quantised.

    Returns:
        The base model, with `deftcore_merge`: a `MergeReport` per merged layer, by name.

    Raises:
        ValueError: naming the argument, or the layer that cannot be merged.
    """
    if to not in ("16bit", "4bit"):
        raise ValueError(f"to: must be '16bit' or '4bit', got {to!r}")
    if dtype is not None and (to == "4bit" or dtype not in FLOAT_DTYPES):
        raise ValueError(f"dtype: must be a floating type, and is for to='16bit' alone, got {dtype} with to={to!r}")
    if not hasattr(model, "merge_and_unload"):
        raise ValueError(f"model: must be a PEFT model, got {type(model).__name__}")
    if hasattr(base_of(model), "deftcore_blocks"):
        raise ValueError("model: is in its sparse form already; merge it before sparsify")
    for name, module in model.named_modules():
        if isinstance(module, (LoraLayer, S2ftLayer)) and hasattr(module.get_base_layer(), "quantized"):
            _check_delta(name, module)
    tuned_ties(model)
    gates = gates_of(model)
    if gates is not None:  # the merged weights are what gets saved
        gates.fold()
    reports: dict[str, MergeReport] = {}
    replaced: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        tuned = module if isinstance(module, (LoraLayer, S2ftLayer)) else None
        base = module.get_base_layer() if tuned is not None else module
        q = getattr(base, "quantized", None)
        if not isinstance(q, QuantizedTensor) or any(name.startswith(f"{done}.") for done in replaced):
            continue
        delta = None if tuned is None else _delta(tuned, q)
        if to == "4bit":
            if delta is None:
                continue
            merged, reports[name] = merged_4bit(q, delta)
            bias = None if base.bias is None else base.bias.detach()
            source: Any = getattr(base, "source_cls", nn.Linear)
            replaced[name] = Linear4bit(merged, bias, compute_dtype=base.compute_dtype, source_cls=source)
            continue
        weight, report = merged_16bit(q, delta, dtype or q.dtype)
        if report is not None:
            reports[name] = report
        replaced[name] = dense_layer(base, weight)
    for name, new in replaced.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, new)
    result = merge_and_unload(model)  # what is left: adapters over dense bases, modules_to_save
    if to == "16bit" and hasattr(getattr(result, "config", None), "quantization_config"):
        del result.config.quantization_config
        for attribute in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_quantized"):
            if hasattr(result, attribute):
                delattr(result, attribute)
    result.deftcore_merge = {name.removeprefix("base_model.model."): report for name, report in reports.items()}
    if reports:
        worst = max(reports.values(), key=lambda r: r.error)
        logger.warning("merge: %d layers into %s; worst: %s", len(reports), to, worst)
    return result


def _check_delta(name: str, layer: Any) -> None:
    """Raises ValueError, naming the layer, where `_delta` does not cover it."""
    if layer.merged:
        raise ValueError(f"{name}: is merged already; unmerge first")
    if isinstance(layer, LoraLayer):
        active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
        if any(adapter in layer.lora_variant or layer.lora_bias[adapter] for adapter in active):
            raise ValueError(f"{name}: only plain LoRA without a bias can be merged")


def _delta(layer: Any, q: QuantizedTensor) -> Tensor | None:
    """The update of a layer's active adapters, float32 [M, K]; None where there is none. As in PEFT, an adapter that is
    turned off counts too: what is merged does not depend on the base's type.
    """
    if isinstance(layer, S2ftLayer):
        return layer.get_delta_weight()
    active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    if not active:
        return None
    total = torch.zeros(q.shape, device=q.device)
    for adapter in active:
        for a, b, rows in factors(layer, adapter):
            part = total if rows is None else total[slice(*rows)]
            part += layer.scaling[adapter] * (b.detach().float() @ a.detach().float())
    return total
