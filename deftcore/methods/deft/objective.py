"""The density loss of DEFT."""

import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deftcore.models.blocks import ActivationSite, Slot, base_of, find_mlp_blocks, side_of
from deftcore.models.gates import Gates, gates_of
from deftcore.nn.observed import ObservedActivation, Options, Recorder, Tally, is_aside
from deftcore.nn.tokens import positions, token_masks, virtual_tokens
from deftcore.ops.checks import check_choice, check_number
from deftcore.ops.density import DEFAULT_EPS, SURROGATES, default_tau
from deftcore.training.objective import Batch, Objective

_SIDES = ("model", "encoder", "decoder")


class DensityLoss(Objective):
    """Density loss of DEFT (arXiv 2402.01911): alpha * mean over blocks of sum(m s(a)) / N, added to the task loss.

    Attaches to the activations of every MLP block; the task loss and all weights stay as they are. Encoder-decoder
    models add the encoder's mean and the decoder's.

        density = DensityLoss(model, alpha=1.0)
        loss = model(**batch).loss + density.loss()
        density.report()["density"]      # share of active neurons since the last reset()
        density.detach()                 # the model as it was

    Under activation checkpointing, call backward before the next forward: the recomputation uses the token masks of
    the last one.

    Args:
        model: a Transformers model or its PEFT model. Its forward arguments attention_mask, decoder_attention_mask
            and labels say which tokens count.
        alpha: weight of the density loss; 0 leaves training bit for bit as without it and only reports.
        surrogate, eps, beta, tau: as in `deftcore.ops.act_density`.
        mask_policy: "exclude_padding" (encoder and decoder-only models by attention mask, decoders by labels != -100),
            or "count_padding", the reference code's.
        block_weights: one weight per block, scaled to mean 1; None is 1 each.
        ramp: share of the training steps over which alpha rises linearly from 0; needs `set_progress`.
        adaptive: "gate" learns one scalar per block, w = sigmoid(theta), that scales the block's output (theta starts
            at 4; see `gate_values`, `skippable`, `fold_gates`). Gates that the model has already are taken over. They
            stay on the model after `detach`. Adapters' own files do not hold them: `gates.save(folder)` writes them
            beside, where `deftcore density`, `export` and the Trainer look. This project's definition, not the paper's.
        gamma: weight of mean(w) in the loss, for `adaptive="gate"`.
        modules: activation modules to watch instead of the model's MLP blocks, by name; not with gates.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    name, measure = "deft", "density"

    def __init__(
        self,
        model: Any,
        *,
        alpha: float = 1.0,
        surrogate: str = "l0",
        eps: float = DEFAULT_EPS,
        beta: float = 20.0,
        tau: float | None = None,
        mask_policy: str = "exclude_padding",
        block_weights: Sequence[float] | None = None,
        ramp: float = 0.0,
        adaptive: str | None = None,
        gamma: float = 0.0,
        modules: Iterable[str] | None = None,
    ) -> None:
        super().__init__()
        alpha = check_number("alpha", alpha, minimum=0.0)
        check_choice("surrogate", surrogate, SURROGATES)
        check_number("eps", eps, minimum=0.0, strict=True)
        check_number("beta", beta, minimum=0.0, strict=True)
        if tau is not None:
            check_number("tau", tau, minimum=0.0)
        check_choice("mask_policy", mask_policy, ("exclude_padding", "count_padding"))
        check_choice("adaptive", adaptive, ("gate", None))  # type: ignore[arg-type]
        self.gamma = check_number("gamma", gamma, minimum=0.0)
        self.ramp = check_number("ramp", ramp, minimum=0.0)
        self.progress = 1.0
        self._window: dict[str, Any] = {}  # of the step under way, for `loss`
        if adaptive and modules is not None:
            raise ValueError("modules: adaptive gates are of MLP blocks; give modules or adaptive, not both")
        self._recorder = Recorder(Options(alpha, surrogate, float(eps), float(beta), tau, mask_policy))
        self._handles: list[Any] = []
        self._blocks: list[ActivationSite] = (
            [*find_mlp_blocks(model)] if modules is None else _named_blocks(model, modules)
        )
        weights = [1.0] * len(self._blocks) if block_weights is None else [float(w) for w in block_weights]
        if len(weights) != len(self._blocks) or min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(f"block_weights: must be {len(self._blocks)} weights >= 0, not all 0, got {block_weights}")
        mean = sum(weights) / len(weights)
        self._weights = [w / mean for w in weights]
        self.gates = (gates_of(model) or Gates(model)) if adaptive == "gate" else None
        observed = [ObservedActivation(_unobserved(b), b.side, self._recorder) for b in self._blocks]
        for block, activation in zip(self._blocks, observed, strict=True):
            activation.train(model.training)
            block.activation.set(activation)
        self._observed = tuple(observed)  # a tuple: the model owns them, not this module
        base = base_of(model)
        self._signature = inspect.signature(base.forward)
        self._pair = bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))
        self._expected: Mapping[str, Any] | None = None
        self.virtual_tokens = virtual_tokens(model)
        self._handles.append(base.register_forward_pre_hook(self._begin, with_kwargs=True))
        self._handles.append(base.register_forward_hook(self._end, always_call=True))

    # ------------------------------------------------------------------ hooks

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """A new forward: forget the sums of the last, and read which tokens count."""
        if is_aside():
            return
        for activation in self._observed:
            activation.tally.sums.clear()
            activation.tally.tokens.clear()
        recorder = self._recorder
        recorder.masks = {}
        if recorder.options.mask_policy == "exclude_padding":
            given = self._expected or self._signature.bind_partial(*args, **kwargs).arguments
            recorder.masks = token_masks(given, self._pair)
        self._expected = None
        recorder.open = True

    def _end(self, *_: object) -> None:
        self._recorder.open = False  # the masks stay: a recomputation under checkpointing needs them

    def expect(self, batch: Batch) -> None:
        """Reads which tokens count in the next forward from this batch, not from what the model is called with."""
        self._expected = dict(batch)

    # ------------------------------------------------------------------ loss

    def settings(self) -> dict[str, Any]:
        """What the loss was made with, as plain values: equal settings, equal loss."""
        return asdict(self._recorder.options) | {
            "blocks": [block.name for block in self._blocks],
            "block_weights": self._weights,
            "ramp": self.ramp,
            "adaptive": "gate" if self.gates is not None else None,
            "gamma": self.gamma,
        }

    def set_progress(self, progress: float) -> None:
        """Tells how much of training is done, 0 to 1, for `ramp`."""
        self.progress = progress

    @property
    def alpha(self) -> float:
        """The weight in force now."""
        full = self._recorder.options.alpha
        return full * min(self.progress / self.ramp, 1.0) if self.ramp > 0 else full

    def loss(self, *, tokens: Mapping[str, float] | None = None, parts: int = 1) -> Tensor:
        """alpha * density loss of the last forward (+ gamma * mean gate), a scalar; reads each forward once.

        Args:
            tokens: unmasked tokens per side in the whole global batch, where gradient accumulation splits it (see
                `window_tokens`). The result is then this micro-batch's share, to be summed (not averaged) over
                micro-batches.
            parts: how many micro-batches are summed.

        In a process group the counts are summed over processes, and the result is scaled so that the mean of the
        processes' gradients, as DistributedDataParallel takes it, is the gradient of the global ratio.

        Raises:
            RuntimeError: when no forward ran since the last call, or it ran without a graph.
        """
        device = self._device()
        if self._recorder.options.alpha == 0:
            return self._gate_loss(device) / parts
        tallies = [activation.tally for activation in self._observed]
        if any(tally.blind for tally in tallies):
            raise RuntimeError(
                "DensityLoss.loss: the forward ran without a graph. Under reentrant checkpointing call "
                "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
            )
        if not all(tally.sums for tally in tallies):
            raise RuntimeError("DensityLoss.loss: no training forward of the model has run since the last call")
        world = _world()
        local = torch.stack([torch.as_tensor(sum(t.tokens), dtype=torch.float64, device=device) for t in tallies])
        if tokens is not None:
            calls = [len(t.tokens) for t in tallies]
            counts = [float(tokens[b.side]) * n for b, n in zip(self._blocks, calls, strict=True)]
            totals = torch.tensor(counts, dtype=torch.float64, device=device)
        else:
            totals = local.clone()
            if world > 1:
                dist.all_reduce(totals)
        result = torch.zeros((), dtype=torch.float32, device=device)
        for side in _SIDES:
            terms, weights = [], []
            for i, block in enumerate(self._blocks):
                if block.side != side:
                    continue
                counted = totals[i] > 0  # an empty mask leaves the block out of the mean
                total = torch.stack(tallies[i].sums).sum()
                scale = (self._weights[i] / (totals[i] * tallies[i].width).clamp(min=1)).to(total.dtype)
                terms.append(torch.where(counted, total * scale, torch.zeros_like(total)))
                weights.append(counted)
            if terms:
                blocks = torch.stack(weights).sum().clamp(min=1)
                result = result + torch.stack(terms).sum().to(device) / blocks
        for tally in tallies:
            tally.sums.clear()
            tally.tokens.clear()
        return self.alpha * world * result + self._gate_loss(device) / parts

    def begin(self, window: Sequence[Batch], step: int, steps: int, device: torch.device | None = None) -> None:
        """A step begins; see `deftcore.training.objective.Objective`."""
        self.set_progress(step / max(steps, 1))
        self._window = {"tokens": self.window_tokens(window, device=device), "parts": max(len(window), 1)}

    def share(self, batch: Batch, output: Any) -> Tensor:
        """`loss` of the micro-batch that the last forward saw, as its share of the step that `begin` announced."""
        return self.loss(**self._window)

    def end(self, scale: float = 1.0) -> None:
        """The mean over processes of the gates' gradient."""
        if self.gates is not None:
            self.gates.reduce_gradient()

    def _gate_loss(self, device: torch.device) -> Tensor:
        if self.gates is None or self.gamma == 0:
            return torch.zeros((), device=device)
        return self.gamma * self.gates.mean().to(device)

    def _device(self) -> torch.device:
        for activation in self._observed:
            if isinstance(activation.tally.active, Tensor):
                return activation.tally.active.device
        return torch.device("cpu")

    # ------------------------------------------------------------------ report

    def count_tokens(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """Tokens per side of a batch that the loss will count, for `loss(tokens=...)`."""
        counts = {}
        for side, mask in token_masks(batch, self._pair).items():
            if mask is None or self._recorder.options.mask_policy == "count_padding":
                count = positions(batch, side)
            else:
                count = int(mask.sum())
            # PEFT puts virtual tokens before the input alone: a decoder's own positions stay as they are.
            rows = 0 if side == "decoder" else positions(batch, side, rows=True)
            counts[side] = float(count + rows * self.virtual_tokens)
        return counts

    def window_tokens(
        self, batches: Iterable[Mapping[str, Any]], *, device: torch.device | None = None
    ) -> dict[str, float]:
        """Tokens per side that the loss will count in the micro-batches of one step, over all processes.

        Args:
            device: where the process group sums; None is the CPU.
        """
        sides = ("encoder", "decoder") if self._pair else ("model",)
        totals = torch.zeros(len(sides), dtype=torch.float64, device=device)
        for batch in batches:
            counts = self.count_tokens(batch)
            totals += torch.tensor([counts[side] for side in sides], dtype=torch.float64, device=device)
        if _world() > 1:
            dist.all_reduce(totals)
        return dict(zip(sides, totals.tolist(), strict=True))

    def report(self, reduce: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, Any]:
        """Densities since the last `reset`: model (unweighted mean of blocks), sides, blocks; and what was counted.

        Args:
            reduce: sums a tensor over processes, where there are several.
        """
        tallies = [activation.tally for activation in self._observed]
        counts = reduce(torch.tensor([[float(t.active), float(t.elements)] for t in tallies], dtype=torch.float64))
        elements = {b.name: float(n) for b, n in zip(self._blocks, counts[:, 1], strict=True)}
        blocks = {
            b.name: float(n) / max(elements[b.name], 1.0) for b, n in zip(self._blocks, counts[:, 0], strict=True)
        }
        seen = [b for b in self._blocks if elements[b.name] > 0]
        sides = {side: [blocks[b.name] for b in seen if b.side == side] for side in _SIDES}
        options, first = self._recorder.options, self._observed[0]
        tau = default_tau(first.deftcore_activation) if options.tau is None else options.tau
        return {
            "density": sum(blocks[b.name] for b in seen) / max(len(seen), 1),
            **{side: sum(d) / len(d) for side, d in sides.items() if d and side != "model"},
            "blocks": blocks,
            "tau": tau,
            "mask_policy": options.mask_policy,
            "tokens": int(elements[self._blocks[0].name] / max(first.tally.width, 1)),
        }

    def summary(self, report: Mapping[str, Any]) -> dict[str, Any]:
        """Density, and by block; nothing where no token was counted."""
        return {"density": report["density"], "density_blocks": report["blocks"]} if report["tokens"] else {}

    def reset(self) -> None:
        """Starts the report anew."""
        for activation in self._observed:
            activation.tally = Tally()

    def detach(self) -> None:
        """Puts the model's own activations back and stops watching. Gates stay: the model was trained with them."""
        for block, activation in zip(self._blocks, self._observed, strict=True):
            if block.activation.get() is activation:  # not a later loss's
                block.activation.set(activation.inner)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # ------------------------------------------------------------------ adaptive gates

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the gates, where there are any, beside the adapter or model in a folder."""
        if self.gates is not None:
            self.gates.save(folder)

    def load(self, folder: str | os.PathLike) -> None:
        """Reads what `save` wrote."""
        if self.gates is not None:
            self.gates.load(folder)

    def gate_values(self) -> dict[str, float]:
        """w = sigmoid(theta) per block name; empty without `adaptive="gate"`."""
        return {} if self.gates is None else self.gates.values()

    def skippable(
        self,
        *,
        w_skip: float = 0.05,
        max_skip: int | None = None,
        evaluate: Callable[[Sequence[str]], float] | None = None,
        margin: float = 0.0,
    ) -> list[str]:
        """Names of blocks whose gate is below w_skip, lowest first, for `sparsify(skip=...)`.

        Args:
            max_skip: at most so many; None is no limit.
            evaluate: validation loss with the named blocks left out; a block is kept when leaving it out as well
                raises the loss by more than `margin` over that with none left out.
        """
        return [] if self.gates is None else self.gates.skippable(w_skip, max_skip, evaluate, margin)

    def fold_gates(self) -> None:
        """Multiplies each gate into its block's down projection (adapters inside the block included), and removes the
        gates. From then on base and adapter belong together: save the merged or exported model.

        Raises:
            ValueError: naming a layer that cannot take its gate in; nothing was changed then.
        """
        if self.gates is not None:
            self.gates.fold()
            self.gates = None

    def extra_repr(self) -> str:
        options = self._recorder.options
        return f"blocks={len(self._blocks)}, alpha={options.alpha}, surrogate={options.surrogate}"


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _unobserved(block: ActivationSite) -> nn.Module:
    module = block.activation.get()
    while isinstance(module, ObservedActivation):
        module = module.inner
    return module


def _named_blocks(model: nn.Module, names: Iterable[str]) -> list[ActivationSite]:
    """Activation modules by name."""
    blocks, modules = [], dict(model.named_modules())
    for name in names:
        if name not in modules or not name:
            near = [n for n in modules if n.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]][:5]
            raise ValueError(
                f"modules: the model has no module {name!r}" + (f"; near: {', '.join(near)}" if near else "")
            )
        parent, _, attribute = name.rpartition(".")
        if any("Experts" in type(modules[path]).__name__ for path in _paths(parent)):
            raise ValueError(f"modules: {name} is inside experts, which regroup the tokens: no mask applies there")
        slot = Slot(modules[parent], attribute)
        blocks.append(ActivationSite(name, side_of(base_of(model), name), slot))
    if not blocks:
        raise ValueError("modules: must name at least one activation module, got none")
    return blocks


def _paths(name: str) -> list[str]:
    """A module's name and those of the modules around it."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
