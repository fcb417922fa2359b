"""Adaptive gates (ADA-DEFT): one learned scalar per MLP block, and all that has to know of them."""

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deftcore._files import replacing_file
from deftcore.models.blocks import MlpBlock, base_of, find_mlp_blocks
from deftcore.nn.linear import is_transposed

GATES_FILE = "density_gates.safetensors"
_FIRST_THETA = 4.0


class Gates(nn.Module):
    """w = sigmoid(theta) per MLP block: Y = w * MLP(X), beneath an adapter that adds to Y and before the residual.

    The gates hook themselves onto the model, travel with its copies, and move on when PEFT wraps a gated layer or
    takes it out again; `gates_of` finds them. They belong to the model's function until they are folded or detached.

    Raises:
        ValueError: when a block's layer could not take its gate in later, naming it; or the model has gates already.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if gates_of(model) is not None:
            raise ValueError("model: has adaptive gates already; `gates_of(model)` returns them")
        self._blocks = find_mlp_blocks(model)
        self.names = [block.name for block in self._blocks]
        self.check()
        device = next(model.parameters()).device
        self.theta = nn.Parameter(torch.full((len(self.names),), _FIRST_THETA, device=device))
        self._gated: list[nn.Module] = []
        self._handles: list[Any] = []
        self._base_handle = base_of(model).register_forward_pre_hook(self._follow)
        self._follow()

    # ------------------------------------------------------------------ on the model

    def _follow(self, *_: Any) -> None:
        """Puts each gate on the module that returns its block's output now."""
        outputs = [block.output.get() for block in self._blocks]
        if len(self._gated) == len(outputs) and all(a is b for a, b in zip(self._gated, outputs, strict=True)):
            return
        for handle in self._handles:
            handle.remove()
        self._handles = [
            output.register_forward_hook(partial(self._scale, index)) for index, output in enumerate(outputs)
        ]
        self._gated = outputs

    def _scale(self, index: int, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output * torch.sigmoid(self.theta[index]).to(output.device, output.dtype)

    def detach(self) -> None:
        """Takes the gates off: every block counts in full again."""
        for handle in (self._base_handle, *self._handles):
            handle.remove()
        self._handles, self._gated = [], []

    def check(self) -> None:
        """Raises ValueError, naming the first layer that cannot take its gate in."""
        for block in self._blocks:
            _factors_of(block)

    @torch.no_grad()
    def fold(self) -> None:
        """Multiplies each gate into its block's down projection, adapters inside it included, and detaches.

        Raises:
            ValueError: as `check`; nothing was changed then.
        """
        self.check()
        for block, w in zip(self._blocks, self.values().values(), strict=True):
            for multiply in _factors_of(block):
                multiply(w)
        self.detach()

    # ------------------------------------------------------------------ training

    def mean(self) -> Tensor:
        """Mean of w over the blocks, in the graph."""
        return torch.sigmoid(self.theta).mean()

    def reduce_gradient(self) -> None:
        """The mean over processes of theta's gradient, as DistributedDataParallel takes it of the model's; call it
        once per step, after the last backward."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        if self.theta.grad is None:
            self.theta.grad = torch.zeros_like(self.theta)
        dist.all_reduce(self.theta.grad)
        self.theta.grad /= dist.get_world_size()

    # ------------------------------------------------------------------ values and files

    def values(self) -> dict[str, float]:
        """w per block name."""
        return dict(zip(self.names, torch.sigmoid(self.theta.detach()).tolist(), strict=True))

    def skippable(
        self, w_skip: float, max_skip: int | None, evaluate: Callable[[Sequence[str]], float] | None, margin: float
    ) -> list[str]:
        """As `DensityLoss.skippable`."""
        values = self.values()
        candidates = sorted((name for name in values if values[name] < w_skip), key=values.__getitem__)
        if evaluate is None:
            return candidates[:max_skip]
        accepted: list[str] = []
        limit = evaluate([]) + margin
        for name in candidates:
            if max_skip is not None and len(accepted) >= max_skip:
                break
            if evaluate([*accepted, name]) <= limit:
                accepted.append(name)
        return accepted

    def save(self, folder: str | os.PathLike) -> None:
        """Writes density_gates.safetensors, whole or not at all."""
        from safetensors.torch import save_file

        with replacing_file(Path(folder) / GATES_FILE) as partial:
            save_file({"theta": self.theta.detach().cpu()}, partial, {"blocks": json.dumps(self.names)})

    @torch.no_grad()
    def load(self, folder: str | os.PathLike) -> None:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: when the folder has no gates.
            ValueError: naming the file, when it is damaged or of another model.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(folder) / GATES_FILE
        if not path.is_file():
            raise FileNotFoundError(f"gates: no such file: {path}")
        try:
            with safe_open(path, "pt") as file:
                theta = file.get_tensor("theta")
                names = json.loads((file.metadata() or {})["blocks"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"gates: {path} is damaged: {error}") from error
        if names != self.names or theta.shape != self.theta.shape:
            raise ValueError(f"gates: {path} is of another model: blocks {names[:3]}, here {self.names[:3]}")
        self.theta.copy_(theta)

    def extra_repr(self) -> str:
        return f"blocks={len(self.names)}"


def gates_of(model: Any) -> Gates | None:
    """The gates that are on a model, or None."""
    for hook in base_of(model)._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, Gates):
            return owner
    return None


def load_gates(model: Any, folder: str | os.PathLike) -> Gates | None:
    """Puts the gates that a folder holds onto a model; None where it holds none."""
    if not (Path(folder) / GATES_FILE).is_file():
        return None
    gates = gates_of(model) or Gates(model)
    gates.load(folder)
    return gates


def _factors_of(block: MlpBlock) -> list[Callable[[float], Any]]:
    """What multiplies a block's output by a number, part by part; changes nothing yet.

    Raises:
        ValueError: naming the layer.
    """
    down = block.down.get() if block.container is not None else block.output.get()
    return _factors(f"{block.name}.{block.down.attribute}", down)


def _factors(where: str, layer: Any) -> list[Callable[[float], Any]]:
    if hasattr(layer, "scale_output_"):
        return [layer.scale_output_]
    if hasattr(layer, "lora_B"):  # PEFT's LoRA layer, known by its attributes: nn does not import PEFT
        if layer.lora_variant:
            raise ValueError(f"{where}: gates fold into plain LoRA alone, not into DoRA and other variants")
        if layer.merged and not layer.base_layer.weight.is_floating_point():
            raise ValueError(f"{where}: is merged into 4 bits; unmerge it first")
        low = [t.mul_ for b in layer.lora_B.values() for t in (b.weight, b.bias) if t is not None]
        return [*_factors(where, layer.base_layer), *low]
    if (isinstance(layer, nn.Linear) or is_transposed(layer)) and layer.weight.is_floating_point():
        return [tensor.mul_ for tensor in (layer.weight, layer.bias) if tensor is not None]
    raise ValueError(
        f"{where}: gates fold into torch.nn.Linear, Linear4bit, patched bitsandbytes layers, and LoRA or S2FT over "
        f"them, got {type(layer).__name__}"
    )
