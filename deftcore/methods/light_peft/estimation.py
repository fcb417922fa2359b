"""The first phase: adapters learn as usual, beside masks on heads and channels, and what matters is noted
(arXiv 2406.03792, sections 3.1 and 3.2)."""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deftcore.methods.light_peft.adapters import Site, sites
from deftcore.methods.light_peft.config import LightPeftConfig
from deftcore.methods.light_peft.importance import rank_scores, watch
from deftcore.methods.light_peft.selection import Scores, check_shares, part_of, select_units
from deftcore.models.blocks import base_of, side_of
from deftcore.models.coupled import CONSUMERS, Coupled, find_coupled
from deftcore.models.families import family_of
from deftcore.nn.activations import activation_of
from deftcore.nn.tokens import fitted, token_masks
from deftcore.ops.masks import mask_units
from deftcore.training.objective import Batch, Objective

_LATE = 0.9  # share of the steps behind which an order should be settled


class Estimation(Objective):
    """Masks on a model's heads and channels, which train with its adapters, and the importance of the adapters.

    The loss gets l1 * sum |mask|. Importance is summed on the device over the second half of a run's steps, from the
    gradients that the optimizer will see, before they are clipped. A part whose ratio is 0 is left alone.

        estimation = Estimation(model, config)
        ...                              # train with it as the objective
        estimation.detach()
        kept = select(estimation.structures, estimation.scores(), config)

    Args:
        model: a PEFT model of a Transformers model that the table of families lists; its adapters plain LoRA or
            bottlenecks on linear layers, one on each.
        config: of the ratios, masks and what is kept.

    Raises:
        ValueError: naming the model's part that does not fit.
    """

    name, measure = "light_peft", "mask"
    modules_sum: Tensor
    ranks_sum: Tensor
    steps: Tensor
    settled: Tensor

    def __init__(self, model: Any, config: LightPeftConfig) -> None:
        super().__init__()
        base = base_of(model)
        self.config, self.structures = config, find_coupled(base)
        check_shares(self.structures, config)
        self._sites = tuple(sites(model))
        self._masked = tuple(each for each in self.structures if config.ratio(part_of(each)))
        first = self._sites[0].first
        self._dtype = torch.promote_types(torch.float32, first.dtype)
        options: dict[str, Any] = {"dtype": self._dtype, "device": first.device}
        self.masks = nn.ParameterList([nn.Parameter(torch.ones(each.units, **options)) for each in self._masked])
        ranks = sum(site.first.shape[0] for site in self._sites)
        self.register_buffer("modules_sum", torch.zeros(len(self._sites), **options))
        self.register_buffer("ranks_sum", torch.zeros(ranks, **options))
        self.register_buffer("steps", torch.zeros((), **options))  # how many the sums are of
        self.register_buffer("settled", torch.ones(sum(each.units for each in self._masked), **options))
        self._tally = torch.zeros(2, len(self._sites), **options)  # of the step under way: ratios, tokens
        self._recording = self._open = self._last = False
        self._parts, self._late = 1, False
        self._tokens: dict[str, Tensor | None] = {}
        self._expected: Mapping[str, Any] | None = None
        self._signature = inspect.signature(base.forward)
        self._pair = bool(getattr(base.config, "is_encoder_decoder", False))
        self._behind: list[_Behind] = []
        self._ends = [*self._hook_masks(base), *self._watch_sites(base)]
        for hook in (
            base.register_forward_pre_hook(self._begin, with_kwargs=True),
            base.register_forward_hook(self._end, always_call=True),
        ):
            self._ends.append(hook.remove)

    def detach(self) -> None:
        """Takes masks and hooks off: the model is as it was, but for what its adapters have learnt."""
        for end in self._ends:
            end()
        self._ends.clear()

    # ------------------------------------------------------------------ forward

    def _hook_masks(self, base: nn.Module) -> Iterator[Callable[[], None]]:
        """Masks what the output projections read: heads' outputs, activations. Behind an activation that is known the
        graph keeps its input alone; a gate's masks are those of the product that it is part of."""
        activations = [_activation(base, coupled) for coupled in self._masked]
        uses = Counter(map(id, activations))
        for coupled, mask, act in zip(self._masked, self.masks, activations, strict=True):
            if act is not None and uses[id(act)] == 1:
                assert coupled.mlp is not None
                self._behind.append(_Behind(base, f"{coupled.name}.{coupled.mlp.act}", mask))
                yield self._behind[-1].end
                continue
            for axis in coupled.weights(CONSUMERS):
                hook = partial(_masked, mask, axis.width)
                yield base.get_submodule(axis.module).register_forward_pre_hook(hook).remove

    def _watch_sites(self, base: nn.Module) -> Iterator[Callable[[], None]]:
        family = family_of(base)
        apart = family.attention.apart if family and family.attention else ""
        for i, site in enumerate(self._sites if self.config.module_ratio else ()):
            side = side_of(base, site.name)
            parent, _, last = site.name.rpartition(".")
            if apart and parent.endswith(apart) and last in (family.attention.k, family.attention.v):  # type: ignore
                side = "encoder"  # what cross-attention reads
            yield watch(site, partial(self._record, i, side), lambda: self._open and self._recording, self._dtype)

    def _record(self, i: int, side: str, ratios: Tensor) -> None:
        mask = fitted(self._tokens.get(side), ratios.shape)
        counted = ratios if mask is None else ratios.where(mask, 0)
        self._tally[0, i] += counted.sum()
        self._tally[1, i] += ratios.numel() if mask is None else mask.sum()

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = self._expected or self._signature.bind_partial(*args, **kwargs).arguments
        self._tokens, self._expected = token_masks(given, self._pair), None
        self._open = True
        for each in self._behind:
            each.follow()

    def _end(self, *_: object) -> None:
        self._open = False  # what activation checkpointing computes again is masked, and not counted again

    def expect(self, batch: Batch) -> None:
        self._expected = dict(batch)

    # ------------------------------------------------------------------ steps

    def settings(self) -> dict[str, Any]:
        return asdict(self.config)

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """The masks, in a group of the heads' and one of the channels', without weight decay."""
        config = self.config
        found = []
        for part, factor in (("heads", config.mask_lr_mult_heads), ("ffn", config.mask_lr_mult_ffn)):
            own = [mask for each, mask in zip(self._masked, self.masks, strict=True) if part_of(each) == part]
            if own:
                found.append({"params": own, "weight_decay": 0.0, "lr": rate * factor})
        return found

    def begin(self, window: Sequence[Batch], step: int, steps: int, device: torch.device | None = None) -> None:
        if device is not None:
            self.to(device)
        self._parts, self._last = max(len(window), 1), step + 1 == steps
        self._recording, self._late = step >= steps // 2, step == int(_LATE * steps)
        self._tally = torch.zeros_like(self._tally, device=self.steps.device)

    def share(self, batch: Batch, output: Any) -> Tensor:
        """This micro-batch's share of l1 * sum |mask|."""
        weights = {"heads": self.config.l1_heads, "ffn": self.config.l1_ffn}
        total = self.steps.new_zeros(())
        for part, weight in weights.items():
            own = [mask for each, mask in zip(self._masked, self.masks, strict=True) if part_of(each) == part]
            weight = self.config.l1 if weight is None else weight
            if own and weight:
                total = total + weight * torch.cat(own).abs().sum()
        return total / self._parts

    @torch.no_grad()
    def end(self, scale: float = 1.0) -> None:
        """Notes what this step says of the adapters, and takes the mean of the masks' gradients over processes."""
        self._reduce()
        if self._late:
            self.settled.copy_(self._flat())
        if not self._recording:
            return
        self.steps += 1
        if self.config.module_ratio:
            self.modules_sum += torch.nan_to_num(self._tally[0] / self._tally[1], posinf=0.0, neginf=0.0)
        if self.config.rank_ratio:
            found = [self._rank_scores(site) for site in self._sites]
            self.ranks_sum += torch.nan_to_num(torch.cat(found) / scale, posinf=0.0, neginf=0.0)

    def _rank_scores(self, site: Site) -> Tensor:
        first, second = site.first, site.second
        if first.grad is None or second.grad is None:
            return first.new_zeros(first.shape[0], dtype=self._dtype)
        return rank_scores(first, first.grad, second, second.grad, self._dtype)

    def _reduce(self) -> None:
        """Over processes, in one sum: the masks' gradients and what the forwards showed. All processes are equal
        after."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        grads = [torch.zeros_like(mask) if mask.grad is None else mask.grad for mask in self.masks]
        flat = torch.cat([*grads, self._tally.flatten()])
        dist.all_reduce(flat)
        sizes = [mask.numel() for mask in self.masks]
        *summed, tally = flat.split([*sizes, self._tally.numel()])
        for mask, grad in zip(self.masks, summed, strict=True):
            mask.grad = grad / dist.get_world_size()
        self._tally = tally.view_as(self._tally)

    # ------------------------------------------------------------------ what was found

    def scores(self) -> Scores:
        """What the run so far says; masks count by their absolute value."""
        return self._scores(self._flat())

    def _scores(self, flat: Tensor) -> Scores:
        masks = dict(zip(self._names(), flat.split([each.units for each in self._masked]), strict=True))
        steps = self.steps.clamp(min=1)
        names = [site.name for site in self._sites]
        ranks = (self.ranks_sum / steps).split([site.first.shape[0] for site in self._sites])
        return Scores(
            {name: mask.abs() for name, mask in masks.items()},
            dict(zip(names, (self.modules_sum / steps).unbind(), strict=True)),
            dict(zip(names, ranks, strict=True)),
            masks,
        )

    def _names(self) -> list[str]:
        return [each.name for each in self._masked]

    def _flat(self) -> Tensor:
        return torch.cat([mask.detach() for mask in self.masks]) if len(self.masks) else self.settled.clone()

    def report(self, reduce: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, Any]:
        """Of the last step: the masks' range, and the share of what they prune now that they would not have pruned
        before the last tenth of the steps."""
        if not (self._last and self._masked):
            return {}
        now, settled = self._flat(), self.settled
        kept, before = (select_units(self.structures, self._scores(flat), self.config) for flat in (now, settled))
        gone = {(name, i) for each in self._masked for i in range(each.units) if i not in kept[name := each.name]}
        late = sum(i in before[name] for name, i in gone)
        return {
            "mask_min": float(now.min()), "mask_max": float(now.max()), "mask_decided_late": late / max(len(gone), 1),
        }  # fmt: skip

    def summary(self, report: Mapping[str, Any]) -> dict[str, Any]:
        return dict(report)


def _activation(base: nn.Module, coupled: Coupled) -> nn.Module | None:
    """The module of an MLP's activation, where it is one that `mask_units` knows."""
    if coupled.mlp is None:
        return None
    try:
        act = base.get_submodule(f"{coupled.name}.{coupled.mlp.act}")
        activation_of(act)
    except (AttributeError, ValueError):
        return None
    return act


class _Behind:
    """A mask behind the activation that stands at a place: others, as the density loss, may replace it meanwhile."""

    def __init__(self, base: nn.Module, path: str, mask: Tensor) -> None:
        self._base, self._path, self._mask = base, path, mask
        self._module: nn.Module | None = None
        self._handle: RemovableHandle | None = None
        self.follow()

    def follow(self) -> None:
        """Goes to the module that is there now."""
        now = self._base.get_submodule(self._path)
        if now is not self._module:
            self.end()
            self._module, self._handle = now, now.register_forward_hook(partial(_masked_activation, self._mask))

    def end(self) -> None:
        """Takes the mask off."""
        if self._handle is not None:
            self._handle.remove()


def _masked_activation(mask: Tensor, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return mask_units(output, mask, z=args[0], activation=activation_of(module))


def _masked(mask: Tensor, width: int, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (mask_units(args[0], mask, width), *args[1:])
