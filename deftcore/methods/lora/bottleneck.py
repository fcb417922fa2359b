"""Bottleneck adapters: y + s * up(f(down(y))) after the MLP (Pfeiffer et al., arXiv 2005.00052), or the parallel form
y + s * up(f(down(x))) on the MLP's input (AdaptFormer, Chen et al., arXiv 2205.13535)."""

from dataclasses import dataclass, field
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from deftcore.models.families import FAMILIES, MLP_FORMS, check_part
from deftcore.nn.linear import dtype_of, is_transposed, shape_of
from deftcore.ops.checks import check_count, check_flag, check_number
from deftcore.training.adapters import MethodName
from deftcore.training.fields import option
from deftcore.training.tuners import GathersShards, NeverMerged, PlacesConfig, WrapperLayer

_NON_LINEARITIES = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


@dataclass
class BottleneckConfig(PlacesConfig):
    """Config of bottleneck adapters.

    Raises ValueError, naming the field, on a value out of range.
    """

    reduction_factor: int = option(16, "Model width over bottleneck width.")
    r: int | None = option(None, "Bottleneck width, in place of reduction_factor's.")
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Bottleneck widths of some modules, by name or pattern, as LoRA's."}
    )
    bottleneck_bias: bool = option(True, "Whether down and up have biases.")
    init_std: float | None = option(None, "Spread of a normal start of down and up; None starts up at zero.")
    non_linearity: str = option("relu", "relu, gelu or silu, inside the bottleneck.")
    parallel: bool = option(False, "Read the MLP's input, not its output (AdaptFormer).")
    scaling: float = option(1.0, "Factor of the adapter's output; AdaptFormer uses 0.1.")
    dropout: float = option(0.0, "Dropout on the adapter's input.")
    stochastic: bool = option(False, "Two down projections, one drawn per call in training, their mean else.")
    target_modules: list[str] | str | None = option(
        None, "Modules that return the MLP's output; None picks them by model type."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MethodName("BOTTLENECK")
        check_count("reduction_factor", self.reduction_factor)
        for name, width in (("r", self.r), *(("rank_pattern", width) for width in self.rank_pattern.values())):
            if width is not None:
                check_count(name, width)
        for name in ("bottleneck_bias", "parallel", "stochastic"):
            check_flag(name, getattr(self, name))
        check_number("scaling", self.scaling)
        if self.init_std is not None:
            check_number("init_std", self.init_std, minimum=0.0)
        if self.non_linearity not in _NON_LINEARITIES:
            raise ValueError(f"non_linearity: must be one of {', '.join(_NON_LINEARITIES)}, got {self.non_linearity!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: must be in [0, 1), got {self.dropout}")
        if isinstance(self.target_modules, list):
            self.target_modules = sorted(set(self.target_modules))


class DrawnLinear(nn.Module):
    """Two linear layers [M] -> [F]: in training each call runs one of them, drawn anew by the generator of x's device,
    else their mean (AdaMix, Wang et al., arXiv 2205.12410, without its loss of consistency). The one that was not drawn
    has a gradient of zeros."""

    def __init__(self, in_features: int, out_features: int, **options: Any) -> None:
        super().__init__()
        self.choices = nn.ModuleList(nn.Linear(in_features, out_features, **options) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """[..., F] for x [..., M]."""
        drawn = torch.randint(2, (), device=x.device) == 1 if self.training else None  # no number for Python to wait on
        weight: Any = self._mixed("weight", drawn)
        bias = self._mixed("bias", drawn)
        return nn.functional.linear(x, weight, bias)

    def _mixed(self, name: str, drawn: Tensor | None) -> Tensor | None:
        first, second = (getattr(choice, name) for choice in self.choices)
        if first is None:
            return None
        return torch.stack([first, second]).mean(0) if drawn is None else torch.where(drawn, second, first)


class BottleneckLayer(WrapperLayer, NeverMerged):
    """Wraps the module that returns an MLP's, or an attention's, output. `up` starts at zero, unless `init_std` says
    otherwise: the model is unchanged at first.
    """

    no_merge = "a bottleneck adapter is not linear and cannot be merged into the weights"
    adds_to_block = True  # to the block's output: gates and the sparse form go beneath
    shown_as = "bottleneck"
    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("configs", "bottleneck_dropout")

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig, r: int | None = None
    ) -> None:
        super().__init__(base_layer)
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.bottleneck_dropout = nn.ModuleDict()
        self.configs: dict[str, BottleneckConfig] = {}
        self._tap: torch.utils.hooks.RemovableHandle | None = None
        self._tapped = False  # which `forward` asks in place of the handle, as graphs cannot hold one
        self._mlp_input: Tensor | None = None
        self.update_layer(adapter_name, config, r)

    def update_layer(self, adapter_name: str, config: BottleneckConfig, r: int | None = None, **_: Any) -> None:
        """Adds an adapter: down [F, M], up [M, F], in the dtype of the layer beneath.

        Args:
            r: F; None is the config's r, or M / reduction_factor.

        Raises:
            ValueError: the module beneath is neither a linear layer nor an MLP module.
        """
        base = self.get_base_layer()
        reference = _output_projection(base)
        width = shape_of(reference)[0]
        size = r or config.r or max(width // config.reduction_factor, 1)
        options: dict[str, Any] = {
            "bias": config.bottleneck_bias, "device": reference.weight.device, "dtype": dtype_of(reference)
        }  # fmt: skip
        self.configs[adapter_name] = config
        up = nn.Linear(size, width, **options)
        down = (DrawnLinear if config.stochastic else nn.Linear)(width, size, **options)
        self.bottleneck_down[adapter_name] = down
        self.bottleneck_up[adapter_name] = up
        self.bottleneck_dropout[adapter_name] = nn.Dropout(config.dropout)
        if config.init_std is not None:
            for weight in (p for name, p in down.named_parameters() if name.endswith("weight")):
                nn.init.normal_(weight, std=config.init_std)
            nn.init.normal_(up.weight, std=config.init_std)
        else:
            nn.init.zeros_(up.weight)
        if config.bottleneck_bias:
            nn.init.zeros_(up.bias)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def tap(self, first: nn.Module) -> None:
        """Reads the MLP's input at its first projection, where the layer calls the projections itself."""
        if self._tap is None:
            self._tap, self._tapped = first.register_forward_pre_hook(self._remember), True

    def untap(self) -> None:
        """Undoes `tap`, when the layer is unloaded."""
        if self._tap is not None:
            self._tap.remove()
            self._tap, self._tapped = None, False

    def _remember(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._mlp_input = args[0]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The module's output [..., M] plus s * up(f(down(.))) of each active adapter, in the output's dtype.

        Raises:
            RuntimeError: parallel, where the MLP's first projection has not run.
        """
        y = self.base_layer(x, *args, **kwargs)
        mlp_input, self._mlp_input = (self._mlp_input if self._tapped else x), None
        if self.disable_adapters:
            return y
        for name in self.active_adapters:
            if name in self.bottleneck_down:
                config = self.configs[name]
                source = mlp_input if config.parallel else y
                y = y + config.scaling * self._adapt(name, source).to(y.dtype)
        return y

    def _adapt(self, name: str, x: Tensor | None) -> Tensor:
        if x is None:
            raise RuntimeError("BottleneckLayer: the MLP's first projection has not run before its last")
        down = self.bottleneck_down[name]
        up: Any = self.bottleneck_up[name]
        hidden = down(self.bottleneck_dropout[name](x.to(up.weight.dtype)))
        return up(getattr(torch.nn.functional, self.configs[name].non_linearity)(hidden))


class BottleneckModel(GathersShards):
    """Puts `BottleneckLayer`s into a model; made by `peft.get_peft_model`."""

    prefix: str = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping = {kind: f.adapter_targets for kind, f in FAMILIES.items() if f.adapter_targets}  # type: ignore  # noqa: RUF012

    def _prepare_adapter_config(self, peft_config: BottleneckConfig, model_config: dict) -> Any:  # type: ignore
        if peft_config.target_modules is None:
            check_part(model_config.get("model_type", ""), "MLP")
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: BottleneckConfig, model: nn.Module) -> None:  # type: ignore[override]
        """Refuses, by name, what a bottleneck cannot go on, before anything changes."""
        for key, module in model.named_modules():
            if key and self._check_target_module_exists(peft_config, key):
                base = module.get_base_layer() if isinstance(module, BottleneckLayer) else module
                _output_projection(base)
                if peft_config.parallel and isinstance(base, nn.Linear):
                    self._first_projection(key)

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        widths = peft_config.rank_pattern
        r = widths.get(get_pattern_key(list(widths), current_key))
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config, r)
            layer = target
        else:
            layer = BottleneckLayer(target, adapter_name, peft_config, r)
            if adapter_name != self.active_adapter:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)
        if peft_config.parallel and isinstance(layer.get_base_layer(), nn.Linear):
            layer.tap(self._first_projection(current_key))

    def _first_projection(self, key: str) -> nn.Module:
        """The first projection of an MLP whose layer calls the projections itself, by the path of its last."""
        for form in MLP_FORMS:
            if not form.whole and f".{key}".endswith(f".{form.down}"):
                return self.model.get_submodule(key.removesuffix(form.down) + form.up)
        raise ValueError(
            f"target_modules: {key} is a linear layer whose MLP input is not known; "
            "parallel adapters go on whole MLP modules, OPT's fc2 or BERT's output.dense"
        )

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own would copy `weight` to whole MLP modules, which have none; the adapter was made on their device.
        if isinstance(child, BottleneckLayer):
            child.untap()
        setattr(parent, child_name, new_module)


def _output_projection(module: nn.Module) -> Any:
    """The linear layer, or Conv1D, that gives the module's output."""
    for name in dict.fromkeys(form.down for form in MLP_FORMS):
        child: Any = getattr(module, name, None)
        child = getattr(child, "base_layer", child)
        if isinstance(child, nn.Linear) or is_transposed(child):
            return child
    if isinstance(module, nn.Linear) or is_transposed(module):
        return module
    raise ValueError(f"target_modules: {type(module).__name__} is neither a linear layer nor an MLP module")
