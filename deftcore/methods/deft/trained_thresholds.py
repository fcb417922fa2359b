"""DEFT under thresholds: the model trains as it will run."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deftcore.methods.deft.objective import DensityLoss
from deftcore.models.blocks import find_mlp_blocks
from deftcore.models.thresholds import Thresholds, channel_scales
from deftcore.nn.activations import activation_of
from deftcore.nn.observed import Tally, is_aside
from deftcore.nn.thresholds import BACKWARDS, CRITERIA, keep_above
from deftcore.ops.checks import check_choice, check_number
from deftcore.ops.density import DEFAULT_EPS

_SAMPLE = 65536  # values of a block, at most, that a step's quantile is taken of
_MOMENTUM = 0.9  # of a level from step to step
_FLAT = 1e9  # levels above which s has no slope left


@dataclass
class _Unit:
    """What the base class asks of an observed activation."""

    deftcore_activation: str
    tally: Tally = field(default_factory=Tally)


class ThresholdLoss(DensityLoss):
    """Thresholds that leave a wanted share of each MLP block's neurons, in the model's forward while it trains; and
    alpha * the density loss of DEFT (arXiv 2402.01911), its slope where these thresholds are.

        objective = ThresholdLoss(model, density=0.3)
        loss = model(**batch).loss + objective.loss()
        deftcore.sparsify(model, thresholds=objective.thresholds())

    Every training forward moves the levels a tenth of the way to the quantiles of its own activations; in evaluation
    they stand still. s(v) = v^2 / (v^2 + level^2) is a half at a level, however large activations are: at the default
    1e-7 of `DensityLoss` nothing that SiLU gives would feel a slope.

    Args:
        model: a Transformers model or its PEFT model.
        density: share of neurons to keep, above 0, at most 1.
        criterion, scaled: as in `calibrate_thresholds`. The norms that scale are those that the model has now.
        backward: "straight" (what is cut gets a gradient as if it were not) or "mask" (it gets none).
        alpha, mask_policy, block_weights, ramp, adaptive, gamma: as in `DensityLoss`.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    def __init__(
        self, model: Any, *, density: float = 0.5, criterion: str = "product", scaled: bool = False,
        backward: str = "straight", **options: Any,
    ) -> None:  # fmt: skip
        if not 0 < check_number("density", density, minimum=0.0) <= 1:
            raise ValueError(f"density: must be above 0, at most 1, got {density}")
        check_choice("criterion", criterion, CRITERIA)
        check_choice("backward", backward, BACKWARDS)
        if unknown := sorted(options.keys() - {"alpha", "mask_policy", "block_weights", "ramp", "adaptive", "gamma"}):
            raise TypeError(f"{', '.join(unknown)}: not with thresholds, which say where the slope is")
        super().__init__(model, **options)
        for site, observed in zip(self._blocks, self._observed, strict=True):
            site.activation.set(observed.inner)  # what decides is watched by hooks, behind it or before W_down
        self.density, self.criterion, self.backward = density, criterion, backward
        blocks = find_mlp_blocks(model)
        self._scales = [channel_scales(block) if scaled else None for block in blocks]
        self._units = [_Unit(activation_of(block.activation.get())) for block in blocks]
        units: Any = self._units  # they have of an observed activation what the base class asks for
        self._observed = tuple(units)
        self.levels: Tensor
        self.register_buffer("levels", torch.full((len(blocks),), math.nan, device=next(model.parameters()).device))
        for index, block in enumerate(blocks):
            if criterion == "gate":
                self._handles.append(block.activation.get().register_forward_hook(partial(self._behind, index)))
            else:
                self._handles.append(block.down.get().register_forward_pre_hook(partial(self._before, index)))

    # ------------------------------------------------------------------ in the forward

    def _behind(self, index: int, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return self._cut(index, module, output)

    def _before(self, index: int, module: nn.Module, args: tuple) -> tuple:
        return (self._cut(index, module, args[0]), *args[1:])

    def _cut(self, index: int, module: nn.Module, values: Tensor) -> Tensor:
        if is_aside():
            return values
        unit, recorder, scale = self._units[index], self._recorder, self._scales[index]
        if scale is not None and scale.device != values.device:
            scale = self._scales[index] = scale.to(values.device)
        mask = recorder.mask(self._blocks[index].side, values)
        # A recomputation under activation checkpointing, with the recorder closed, must cut where the forward has.
        if recorder.open and (module.training or bool(self.levels[index].isnan())):
            self._follow(index, values, mask, scale)
        level = self.levels[index].to(values.device)
        level = level if scale is None else level / scale
        kept = keep_above(values, level, self.backward)
        total = None
        if recorder.options.alpha != 0 and module.training and torch.is_grad_enabled():
            total = surrogate_sum(values, level, mask)
        if recorder.open:
            seen = kept.detach() if mask is None else kept.detach()[mask != 0]
            tokens = seen.shape[:-1].numel()
            unit.tally.width = values.shape[-1]
            if total is not None:
                unit.tally.sums.append(total)
                unit.tally.tokens.append(tokens)
            unit.tally.blind = total is None and module.training
            unit.tally.active = unit.tally.active + torch.count_nonzero(seen)
            unit.tally.elements = unit.tally.elements + seen.numel()
        return kept

    @torch.no_grad()
    def _follow(self, index: int, values: Tensor, mask: Tensor | None, scale: Tensor | None) -> None:
        seen = values.detach() if mask is None else values.detach()[mask != 0]
        size = seen.abs().float() if scale is None else seen.abs().float() * scale
        every = max(size.numel() // _SAMPLE, 1)
        while math.gcd(every, size.shape[-1]) > 1:  # all neurons in turn
            every += 1
        sample = size.reshape(-1)[::every]
        if sample.numel() == 0:
            return
        rank = min(max(math.ceil((1 - self.density) * sample.numel()), 1), sample.numel())
        found = sample.kthvalue(rank).values.to(self.levels.device)
        before = self.levels[index]
        self.levels[index] = torch.where(before.isnan(), found, _MOMENTUM * before + (1 - _MOMENTUM) * found)

    def loss(self, *, tokens: Mapping[str, float] | None = None, parts: int = 1) -> Tensor:
        """As of `DensityLoss`.

        Raises:
            RuntimeError: also where no forward has run through the activations, as where another module computes an
                MLP as a whole.
        """
        if bool(self.levels.isnan().any()):
            missing = [b.name for b, level in zip(self._blocks, self.levels.tolist(), strict=True) if math.isnan(level)]
            raise RuntimeError(f"ThresholdLoss.loss: no forward has shown the values of {', '.join(missing[:5])}")
        return super().loss(tokens=tokens, parts=parts)

    def end(self, scale: float = 1.0) -> None:
        """The mean over processes of the levels, and what the gates have to share."""
        super().end(scale)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self.levels)
            self.levels /= dist.get_world_size()

    # ------------------------------------------------------------------ what came out

    def settings(self) -> dict[str, Any]:
        """As of `DensityLoss`, and what the thresholds were asked for."""
        return super().settings() | {
            "density": self.density, "criterion": self.criterion, "scaled": self._scales[0] is not None,
            "backward": self.backward,
        }  # fmt: skip

    def thresholds(self) -> Thresholds:
        """The levels as they stand.

        Raises:
            RuntimeError: no forward has run yet.
        """
        if bool(self.levels.isnan().any()):
            raise RuntimeError("ThresholdLoss.thresholds: no forward of the model has run")
        levels = {
            block.name: float(level) if scale is None else (level / scale).cpu()
            for block, level, scale in zip(self._blocks, self.levels.cpu(), self._scales, strict=True)
        }
        return Thresholds(self.criterion, levels, self.density)

    def report(self, reduce: Any = lambda x: x) -> dict[str, Any]:
        """As of `DensityLoss`: an active neuron is one that is not cut. `tau` is the mean of the levels."""
        return super().report(reduce) | {"tau": float(self.levels.mean())}

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the gates, where there are any, and density_thresholds.safetensors, where `deftcore export` looks."""
        super().save(folder)
        if not bool(self.levels.isnan().any()):
            self.thresholds().save(folder)

    def load(self, folder: str | os.PathLike) -> None:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: the folder has no thresholds.
            ValueError: they are of another criterion, or model.
        """
        super().load(folder)
        found = Thresholds.load(folder)
        if found is None:
            raise FileNotFoundError(f"thresholds: {Path(folder)} has none")
        names = [block.name for block in self._blocks]
        if found.criterion != self.criterion or sorted(found.levels) != sorted(names):
            raise ValueError(f"thresholds: {Path(folder)} has those of the {found.criterion} of another model or run")
        for index, (name, scale) in enumerate(zip(names, self._scales, strict=True)):
            level = torch.as_tensor(found.levels[name])
            self.levels[index] = (level if scale is None else level * scale.cpu()).float().mean()


def surrogate_sum(values: Tensor, level: Tensor, mask: Tensor | None) -> Tensor:
    """The sum over tokens that count of v^2 / (v^2 + level^2), in float32 or wider.

    Args:
        values: [..., F]; level: a scalar or [F]; mask: [...] or None.
    """
    wide = values if values.dtype == torch.float64 else values.float()
    scale = level.to(wide.dtype).square().clamp(min=DEFAULT_EPS).rsqrt()
    square = (wide * scale).clamp(-_FLAT, _FLAT).square()  # value and slope are finite at 0 and at any v
    s = 1 - 1 / (1 + square)  # its slope has no difference in it
    if mask is not None:  # select, so that NaN and infinity at masked tokens change nothing
        s = torch.where((mask != 0).unsqueeze(-1), s, torch.zeros_like(s))
    return s.sum()
