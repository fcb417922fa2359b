"""Thresholds of MLP blocks that leave a wanted share of neurons: found on text, kept beside a model."""

import inspect
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deftcore._files import replacing_file
from deftcore.models.block_weights import weight_of
from deftcore.models.blocks import MlpBlock, base_of, find_mlp_blocks
from deftcore.nn.thresholds import CRITERIA, Level, Quantiles, keep_above
from deftcore.nn.tokens import fitted, token_masks
from deftcore.ops.checks import check_choice, check_number
from deftcore.ops.quantized import QuantizedTensor

THRESHOLDS_FILE = "density_thresholds.safetensors"


@dataclass(frozen=True)
class Thresholds:
    """What counts of each MLP block: neurons whose |f(gate x)|, or |f(gate x) * (up x)|, is above a level.

    Args:
        criterion: "gate" spares rows of the up and the down projection, "product" of the down projection alone, at a
            lower loss. In blocks without a gate both are |f(up x)|.
        levels: by block name, a number or one for each neuron [F].
        target: the density that was asked for; None where levels were chosen otherwise.
        densities: by block name, as measured on the text of calibration; empty where they were not.
        tokens: of that text.
    """

    criterion: str
    levels: dict[str, Level]
    target: float | None = None
    densities: dict[str, float] = field(default_factory=dict)
    tokens: int = 0

    def __post_init__(self) -> None:
        check_choice("criterion", self.criterion, CRITERIA)
        for name, level in self.levels.items():
            if isinstance(level, Tensor):
                if level.dim() != 1 or not bool((level >= 0).all()):
                    raise ValueError(f"levels: {name} must be [F], each at least 0, got shape {tuple(level.shape)}")
            else:
                check_number(f"levels: {name}", level, minimum=0.0)

    @property
    def density(self) -> float:
        """The mean of the blocks' densities."""
        return sum(self.densities.values()) / max(len(self.densities), 1)

    def check(self, model: nn.Module, skip: Collection[str] = ()) -> None:
        """Raises ValueError, naming blocks, where these are not the levels of a model's blocks."""
        blocks = {block.name: block for block in find_mlp_blocks(model)}
        missing, unknown = sorted(blocks.keys() - self.levels.keys() - set(skip)), sorted(self.levels.keys() - blocks)
        if missing or unknown:
            raise ValueError(f"thresholds: are of another model: no level of {missing[:5]}, unknown {unknown[:5]}")
        for name, level in self.levels.items():
            neurons = weight_of(blocks[name], "down")[0].shape[1]
            if isinstance(level, Tensor) and level.shape[0] != neurons:
                raise ValueError(f"thresholds: {name} has {neurons} neurons, got {level.shape[0]} levels")

    def save(self, folder: str | os.PathLike) -> Path:
        """Writes density_thresholds.safetensors into a folder, whole or not at all."""
        from safetensors.torch import save_file

        path = Path(folder) / THRESHOLDS_FILE
        about = {"criterion": self.criterion, "target": self.target, "densities": self.densities, "tokens": self.tokens}
        tensors = {
            name: level.detach().float().cpu().contiguous()
            if isinstance(level, Tensor)
            else torch.tensor(level, dtype=torch.float64)
            for name, level in self.levels.items()
        }
        with replacing_file(path) as partial:
            save_file(tensors, partial, {"thresholds": json.dumps(about)})
        return path

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Thresholds | None":
        """Reads what `save` wrote; None where the folder holds none.

        Raises:
            ValueError: naming the file, when it is damaged.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(folder) / THRESHOLDS_FILE
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["thresholds"])
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no dictionary
            levels: dict[str, Level] = {n: t if t.dim() else float(t) for n, t in found.items()}
            return cls(about["criterion"], levels, about["target"], about["densities"], about["tokens"])
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise ValueError(f"thresholds: {path} is damaged: {error}") from error


class Watch:
    """Shows a function what decides over each block's neurons, and puts in its place what it returns.

    Args:
        model: plain or adapted, not yet in its sparse form.
        criterion: as in `Thresholds`.
        see: (index of the block, values [..., F], mask [...] of the tokens that count, or None for all) to the values
            that the model goes on with.
    """

    def __init__(self, model: nn.Module, criterion: str, see: Callable[[int, Tensor, Tensor | None], Tensor]) -> None:
        check_choice("criterion", criterion, CRITERIA)
        base: Any = base_of(model)
        if hasattr(base, "deftcore_blocks"):
            raise ValueError("model: is in its sparse form already")
        self.blocks, self._see = find_mlp_blocks(model), see
        self._masks: dict[str, Tensor | None] = {}
        self._signature = inspect.signature(base.forward)
        self._pair = bool(getattr(base.config, "is_encoder_decoder", False)) if hasattr(base, "config") else False
        self._handles = [base.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for index, block in enumerate(self.blocks):
            if criterion == "gate":
                self._handles.append(block.activation.get().register_forward_hook(partial(self._behind, index)))
            else:
                self._handles.append(block.down.get().register_forward_pre_hook(partial(self._before, index)))

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._masks = token_masks(self._signature.bind_partial(*args, **kwargs).arguments, self._pair)

    def _shown(self, index: int, values: Tensor) -> Tensor:
        return self._see(index, values, fitted(self._masks.get(self.blocks[index].side), values.shape[:-1]))

    def _behind(self, index: int, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return self._shown(index, output)

    def _before(self, index: int, module: nn.Module, args: tuple) -> tuple:
        return (self._shown(index, args[0]), *args[1:])

    def stop(self) -> None:
        """The model is as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def channel_scales(block: MlpBlock) -> Tensor:
    """Of each neuron the norm of its column of W_down, over the mean of all: [F] float32."""
    weight, _, low = weight_of(block, "down")
    dense = weight.dequantize(torch.float32) if isinstance(weight, QuantizedTensor) else weight.detach().float()
    if low is not None:
        dense = dense + low.scaling * low.b.detach().float() @ low.a.detach().float()
    norms = dense.norm(dim=0)
    return norms / norms.mean().clamp(min=torch.finfo(torch.float32).tiny)


@torch.no_grad()
def calibrate_thresholds(
    model: Any, batches: Iterable[Mapping[str, Any]], *, density: float | Mapping[str, float] = 0.5,
    criterion: str = "product", scaled: bool = False,
) -> Thresholds:  # fmt: skip
    """The lowest thresholds that leave at most a share of each block's neurons on a text, token by token.

    By the product, as TEAL does (Liu et al., arXiv 2408.14690), or by the gate, as CATS does (Lee et al., arXiv
    2404.08763). Magnitudes are counted, not sampled: equal text and weights, equal thresholds. The text is read twice
    where a threshold of one block is to see what those of the blocks before it leave.

    Args:
        model: a Transformers model or its PEFT model, not yet in its sparse form. It runs in eval mode.
        batches: what it is called with, mappings of tensors; tokens under an `attention_mask` of 0 do not count.
        density: share of neurons to keep, above 0, at most 1; of all blocks, or by block name.
        criterion: "product" or "gate", as in `Thresholds`.
        scaled: a threshold for each neuron, tau / s, where s is the norm of its column of W_down over their mean: what
            counts is how much a neuron adds to the block's output (as CHESS chooses by channel, He et al., arXiv
            2409.01366).

    Raises:
        TypeError, ValueError: naming the argument, the block, or what the text lacks.
    """
    blocks = find_mlp_blocks(model)
    names = [block.name for block in blocks]
    wanted = dict(density) if isinstance(density, Mapping) else dict.fromkeys(names, density)
    if unknown := sorted(wanted.keys() ^ set(names)):
        raise ValueError(f"density: must name every MLP block and no other, got it wrong for {', '.join(unknown[:5])}")
    for share in wanted.values():
        if not 0 < check_number("density", share, minimum=0.0) <= 1:
            raise ValueError(f"density: must be above 0, at most 1, got {share}")
    scales = [channel_scales(block) for block in blocks] if scaled else [None] * len(blocks)
    counted = [Quantiles() for _ in blocks]

    def see(index: int, values: Tensor, mask: Tensor | None) -> Tensor:
        scale, seen = scales[index], values if mask is None else values[mask]
        counted[index].add(seen if scale is None else seen.float() * scale.to(seen.device))
        return values

    training = model.training
    watch = Watch(model, criterion, see)
    model.eval()
    try:
        for batch in batches:
            model(**batch)
    finally:
        watch.stop()
        model.train(training)
    levels: dict[str, Level] = {}
    densities = {}
    for block, quantiles, scale in zip(blocks, counted, scales, strict=True):
        level, densities[block.name] = quantiles.level(wanted[block.name])
        levels[block.name] = level if scale is None else (level / scale).cpu()
    tokens = counted[0].total // max(weight_of(blocks[0], "down")[0].shape[1], 1)
    return Thresholds(criterion, levels, math.fsum(wanted.values()) / len(wanted), densities, tokens)


class Thresholded:
    """A model with thresholds in its forward while the context lasts: what `sparsify` would give, before it.

    Args:
        model: plain or adapted.
        thresholds: of its blocks.

    Raises:
        ValueError: as `Thresholds.check`.
    """

    def __init__(self, model: Any, thresholds: Thresholds) -> None:
        thresholds.check(model)
        self._model, self._thresholds = model, thresholds
        self._active: dict[str, int] = dict.fromkeys(thresholds.levels, 0)
        self._elements = dict(self._active)

    def __enter__(self) -> "Thresholded":
        self._watch = Watch(self._model, self._thresholds.criterion, self._see)
        return self

    def __exit__(self, *_: object) -> None:
        self._watch.stop()

    def _see(self, index: int, values: Tensor, mask: Tensor | None) -> Tensor:
        name = self._watch.blocks[index].name
        kept = keep_above(values, self._thresholds.levels[name])
        seen = kept if mask is None else kept[mask]
        self._active[name] += int(torch.count_nonzero(seen.detach()))
        self._elements[name] += seen.numel()
        return kept

    def densities(self) -> dict[str, float]:
        """By block name, the share of neurons that have counted, token by token; padding has not."""
        return {name: self._active[name] / max(n, 1) for name, n in self._elements.items()}
