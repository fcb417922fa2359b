"""BitFit: only biases train (Ben Zaken, Goldberg, Ravfogel, arXiv 2106.10199)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge, check_target_module_exists
from torch import Tensor, nn
from torch.func import functional_call

from deftcore.models.preflight import check_names
from deftcore.nn.linear import dtype_of, is_transposed, shape_of
from deftcore.training.adapters import MethodName
from deftcore.training.fields import option
from deftcore.training.tuners import PlacedTuner, PlacesConfig, RestoringLayer, check_finite


@dataclass
class BitFitConfig(PlacesConfig):
    """Config of BitFit: each chosen module's bias gets a copy that trains. Modules are chosen by what they are, one
    without children that has a parameter `bias`; names only narrow the choice.
    """

    target_modules: list[str] | str | None = option(
        None, "Modules whose biases train, by name or pattern; None is all that have one."
    )
    new_biases: list[str] | str | None = option(
        None, "Linear layers without a bias, by name or pattern, that get one of zeros."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MethodName("BITFIT")
        for name in ("target_modules", "new_biases"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, sorted(set(getattr(self, name))))


def has_bias(module: nn.Module) -> bool:
    """Whether a module has a bias of its own, and no children."""
    return module._parameters.get("bias") is not None and next(module.children(), None) is None


def with_biases(module: nn.Module, biases: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """What a module returns with other biases, by their names in it, in their places; in its own ones' dtypes."""
    own = {name: bias.to(module.get_parameter(name).dtype) for name, bias in biases.items()}
    return functional_call(module, own, args, kwargs)


class BitFitLayer(RestoringLayer):
    """A module run with another bias; several active adapters' changes add up."""

    shown_as = "bitfit"
    adapter_layer_names = ("bitfit_bias",)
    bias_alone = True  # a merge leaves the weight

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BitFitConfig) -> None:
        super().__init__(base_layer)
        self.bitfit_bias = nn.ParameterDict()
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BitFitConfig, **_: Any) -> None:
        """Adds an adapter that starts from the module's bias, or from zeros [M]."""
        start = self._original()
        if start is None:
            base = self.base_layer
            start = torch.zeros(shape_of(base)[0], device=base.weight.device, dtype=dtype_of(base))
        self.bitfit_bias[adapter_name] = nn.Parameter(start.detach().clone())
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _original(self) -> Tensor | None:
        return self._before if self.merged else self.base_layer.bias

    def _sum(self, names: list[str]) -> Tensor:
        """The bias of some adapters, as an adapter keeps it: of one, its own."""
        original = self._original()
        total: Any = self.bitfit_bias[names[0]]
        for name in names[1:]:
            other = self.bitfit_bias[name]
            total = total + (other if original is None else other - original.to(other.dtype))
        return total

    def _trained(self) -> Tensor | None:
        """The bias to run with in place of the module's, in its dtype; None: there is none."""
        active = [name for name in self.active_adapters if name in self.bitfit_bias]
        if self.disable_adapters or self.merged or not active:
            return None
        base = self.base_layer
        return self._sum(active).to(dtype_of(base) if base.bias is None else base.bias.dtype)

    @property
    def bias(self) -> Any:
        """What the module adds now, for code that reads it."""
        trained = self._trained()
        return self.base_layer.bias if trained is None else trained

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output, with the active adapters' bias in its own one's place."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        trained = self._trained()
        if trained is None:
            return self.base_layer(*args, **kwargs)
        if self.base_layer.bias is None:
            y = self.base_layer(*args, **kwargs)
            return y + trained.to(y.dtype)
        return with_biases(self.base_layer, {"bias": trained}, *args, **kwargs)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Writes the adapters' bias into the module, which gets one where it has none.

        Raises:
            ValueError: with `safe_merge`, values that are not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.bitfit_bias]
        if not names:
            return
        merged = self._sum([*self.merged_adapters, *names])
        if safe_merge:
            check_finite(merged, names[0])
        base = self.base_layer
        if not self.merged:
            self._before = None if base.bias is None else base.bias.detach().clone()
        if base.bias is None:
            base.bias = nn.Parameter(merged.to(dtype_of(base), copy=True), requires_grad=False)
        else:
            base.bias.copy_(merged)  # in place: another module may share it
        self.merged_adapters.extend(names)

    def restore(self) -> None:
        """Gives the module its own bias back, or none."""
        if self._before is None:
            self.base_layer.bias = None
        else:
            self.base_layer.bias.copy_(self._before)


class BitFitModel(PlacedTuner):
    """Puts `BitFitLayer`s into a model; made by `peft.get_peft_model`."""

    prefix: str = "bitfit_"
    tuner_layer_cls = BitFitLayer

    def places(self, config: BitFitConfig, model: nn.Module) -> dict[str, Any]:
        """Modules with a bias, or that get one."""
        return {name: () if found else found for name, found in _choose(model, config).items()}


def _choose(model: nn.Module, config: BitFitConfig) -> dict[str, Any]:
    """By module: True for each that gets an adapter, PEFT's mark for what the config excludes.

    Raises:
        ValueError: naming the field, where one matches nothing, or a module that cannot have a bias.
    """
    modules: dict[str, Any] = {}
    for name, module in model.named_modules():
        parent = modules.get(name.rpartition(".")[0])
        if name and not isinstance(parent, BaseTunerLayer):
            modules[name] = module
    bases = {name: module.base_layer if isinstance(module, BitFitLayer) else module for name, module in modules.items()}
    biased = {name for name, base in bases.items() if has_bias(base)}
    targets = config.target_modules
    if targets is None:
        targets = sorted({name.rpartition(".")[2] for name in biased})  # a list: patterns know no layer numbers
    check_names("new_biases", config.new_biases, list(modules))
    old = replace(config, target_modules=targets)
    new = replace(config, target_modules=config.new_biases or [])
    found: dict[str, Any] = {}
    for name, base in bases.items():
        named, added = check_target_module_exists(old, name), check_target_module_exists(new, name)
        if name in biased:
            found[name] = added or named
        elif added and _is_linear(base):
            found[name] = added
        elif added and isinstance(config.new_biases, list):
            raise ValueError(f"new_biases: {name} must be a linear layer, got {type(base).__name__}")
        elif named and isinstance(config.target_modules, list):
            raise ValueError(f"target_modules: {name} has no bias; a linear layer named in new_biases gets one")
    if not any(found.values()):
        asked = "" if config.target_modules is None else f" of target_modules {config.target_modules}"
        raise ValueError(
            f"model: {type(model).__name__} has no module with a bias{asked}; new_biases names linear layers to get one"
        )
    return found


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_transposed(module)
