"""How much adapters matter: their share of a layer's output, and first-order scores of their ranks (arXiv 2406.03792,
section 3.2)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deftcore.methods.light_peft.adapters import Site
from deftcore.methods.lora.bottleneck import BottleneckLayer

Record = Callable[[Tensor], None]  # takes ||dY|| / ||Y|| of every token of a forward


def rank_scores(first: Tensor, first_grad: Tensor, second: Tensor, second_grad: Tensor, dtype: torch.dtype) -> Tensor:
    """|mean over in of A * dA| + |mean over out of B * dB|, per rank.

    Args:
        first, first_grad: [r, in].
        second, second_grad: [out, r].
        dtype: what it is computed in.

    Returns:
        [r].
    """
    inner = torch.linalg.vecdot(first.to(dtype), first_grad.to(dtype), dim=1) / first.shape[1]
    outer = torch.linalg.vecdot(second.to(dtype), second_grad.to(dtype), dim=0) / second.shape[0]
    return inner.abs() + outer.abs()


class _Remembered(nn.Dropout):
    """A dropout that knows what it gave last."""

    last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """As `torch.nn.Dropout`, on any x."""
        self.last = super().forward(x)
        return self.last


def watch(site: Site, record: Record, is_open: Callable[[], bool], dtype: torch.dtype) -> Callable[[], None]:
    """Calls `record` with ||dY_t|| / ||Y_t|| of the tokens [...] of every forward while `is_open`.

    dY is what the adapter adds, Y what it is added to; nothing of their size is kept. Dropout on the adapter's input is
    that of the forward.

    Returns:
        What ends it.
    """
    watcher = _watch_bottleneck if isinstance(site.layer, BottleneckLayer) else _watch_lora
    return watcher(site, record, is_open, dtype)


def _watch_lora(site: Site, record: Record, is_open: Callable[[], bool], dtype: torch.dtype) -> Callable[[], None]:
    """From the output alone, so that the layer stays one op: with z = drop(x) A^T, ||dY||^2 = c^2 z B^T B z^T and
    ||Y||^2 = ||Y + dY||^2 - 2 c (Y + dY) B z^T + ||dY||^2."""
    layer, scaling = site.layer, site.layer.scaling[site.adapter]
    dropout = layer.lora_dropout[site.adapter]
    remembered = None
    if isinstance(dropout, nn.Dropout):
        layer.lora_dropout[site.adapter] = remembered = _Remembered(dropout.p).train(dropout.training)

    @torch.no_grad()
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x, own = args[0], None
        if remembered is not None:
            own, remembered.last = remembered.last, None
        if not is_open():
            return
        a, b = site.first, site.second
        with torch.autocast(output.device.type, enabled=False):
            x = x if own is None else own
            z, across = ((y @ factor.to(y.dtype)).to(dtype) for y, factor in ((x, a.t()), (output, b)))
            wide = b.to(dtype)
            added = ((z @ (wide.t() @ wide)) * z).sum(-1).clamp(min=0) * scaling**2
            total = torch.linalg.vector_norm(output, dim=-1, dtype=dtype).square()
            base = (total - 2 * scaling * (across * z).sum(-1) + added).clamp(min=0)
            record(added.sqrt() / base.sqrt())

    handle = layer.register_forward_hook(hook)

    def end() -> None:
        handle.remove()
        if remembered is not None:
            layer.lora_dropout[site.adapter] = dropout.train(remembered.training)

    return end


def _watch_bottleneck(
    site: Site, record: Record, is_open: Callable[[], bool], dtype: torch.dtype
) -> Callable[[], None]:
    layer: Any = site.layer
    norms: list[Tensor] = []  # of Y, then of the branch

    @torch.no_grad()
    def part(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if is_open():
            norms.append(torch.linalg.vector_norm(output, dim=-1, dtype=dtype))

    @torch.no_grad()
    def whole(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if is_open():
            base, branch = norms
            norms.clear()
            record(abs(layer.configs[site.adapter].scaling) * branch / base)

    up = layer.bottleneck_up[site.adapter]
    handles = [layer.base_layer.register_forward_hook(part), up.register_forward_hook(part)]
    handles.append(layer.register_forward_hook(whole))

    def end() -> None:
        for handle in handles:
            handle.remove()

    return end
