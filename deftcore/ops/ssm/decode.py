"""One step of decoding with Mamba or Mamba-2: a token of each sequence through all layers in one native call."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deftcore.ops._library import define
from deftcore.ops.checks import check_float, check_like, check_shape
from deftcore.ops.decoder_matrix import (
    Addressed,
    Matrix,
    check_vector,
    enlist,
    enlisted,
    matrix_row,
    rms_normed,
    rounded_layer,
)
from deftcore.ops.kernels import address, backend, give_workspace, native, stream
from deftcore.ops.ssm.scan import MAX_STATES


@dataclass(frozen=True, eq=False)
class MambaLayer:
    """A layer's weights. D are the channels, H heads of Mamba-2, W the convolution's taps, C what it runs over: D, in
    Mamba-2 D + 2 G N. Rows of `in_proj` are x and z, in Mamba-2 z, x with B and C, and dt.
    """

    in_proj: Matrix  # [2 D, d]; [D + C + H, d]
    out_proj: Matrix  # [d, D]
    norm: Tensor  # [d], before the mixer; this and what follows float32 and contiguous
    taps: Tensor  # [W, C], the newest last
    taps_bias: Tensor | None  # [C]
    a: Tensor  # [D, N], negative; [H]
    d: Tensor  # [D]; [H]
    dt_bias: Tensor | None  # [D]; [H]
    x_proj: Matrix | None = None  # of Mamba: [R + 2 N, D]
    dt_proj: Matrix | None = None  # of Mamba: [D, R]
    gated_norm: Tensor | None = None  # of Mamba-2: [D]

    @property
    def matrices(self) -> tuple[Matrix | None, ...]:
        """In the native struct's order."""
        return (self.in_proj, self.x_proj, self.dt_proj, self.out_proj)


@dataclass(eq=False)
class MambaStack(Addressed):
    """All that a step computes with, from the embedding on; either all layers are Mamba's or all are Mamba-2's.

    Raises:
        TypeError, ValueError: naming the field.
    """

    layers: list[MambaLayer]
    norm: Tensor  # [d] float32
    head: Matrix  # [vocabulary, d]
    states: int  # N
    eps: float  # of the norms
    groups: int = 1  # G, of B and C
    norm_groups: int = 1  # of the gated norm
    number: int = field(init=False)  # under which the op finds it

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("layers: must be at least one")
        if not 1 <= self.states <= MAX_STATES:
            raise ValueError(f"states: must be in 1..{MAX_STATES}, got {self.states}")
        self.width, self.channels = self.norm.shape[0], self.layers[0].out_proj.weight.shape[1]
        self.second = self.layers[0].x_proj is None
        self.mixed = self.channels + (2 * self.groups * self.states if self.second else 0)
        self.reach = self.layers[0].taps.shape[0] - 1
        self.heads = self.layers[0].d.shape[0] if self.second else 1
        for layer in self.layers:
            self._check(layer)
        check_vector("norm", self.norm, (self.width,))
        _check_matrix("head", self.head, (self.head.weight.shape[0], self.width))
        self._held: list[Tensor] = []
        self._layers = torch.tensor([self._row(layer) for layer in self.layers])
        self._head = torch.tensor(matrix_row(self.head, self._held))
        self.number = enlist(self)

    def _check(self, layer: MambaLayer) -> None:
        width, channels, states, heads = self.width, self.channels, self.states, self.heads
        if channels % heads or heads % self.groups or channels % self.norm_groups:
            raise ValueError(
                f"groups, norm_groups: must divide the heads ({heads}, of {channels} channels) and the channels, got "
                f"{self.groups}, {self.norm_groups}"
            )
        scalars = (heads,) if self.second else (channels,)
        _check_matrix("in_proj", layer.in_proj, (channels + self.mixed + (heads if self.second else 0), width))
        _check_matrix("out_proj", layer.out_proj, (width, channels))
        if self.second != (layer.x_proj is None) or self.second != (layer.dt_proj is None):
            raise ValueError("x_proj, dt_proj: Mamba's layers have both, Mamba-2's none")
        if layer.x_proj is not None and layer.dt_proj is not None:
            rank = layer.dt_proj.weight.shape[1]
            _check_matrix("x_proj", layer.x_proj, (rank + 2 * states, channels))
            _check_matrix("dt_proj", layer.dt_proj, (channels, rank))
        check_vector("norm", layer.norm, (width,))
        check_vector("taps", layer.taps, (self.reach + 1, self.mixed))
        check_vector("a", layer.a, scalars if self.second else (channels, states))
        check_vector("d", layer.d, scalars)
        for name, t, shape in (("taps_bias", layer.taps_bias, (self.mixed,)), ("dt_bias", layer.dt_bias, scalars)):
            if t is not None:
                check_vector(name, t, shape)
        if self.second != (layer.gated_norm is not None):
            raise ValueError("gated_norm: Mamba-2's layers have it, Mamba's do not")
        if layer.gated_norm is not None:
            check_vector("gated_norm", layer.gated_norm, (channels,))

    @property
    def has_kernel(self) -> bool:
        """Whether the native step reads all weights."""
        matrices = [self.head, *(m for layer in self.layers for m in layer.matrices)]
        return all(m is None or m.has_kernel for m in matrices)

    def rounded(self) -> "MambaStack":
        """Whose weights in 4 bits round what they are multiplied with, and whose head is in int8."""
        return replace(self, layers=[rounded_layer(layer) for layer in self.layers], head=self.head.rounded())

    def new_state(self, batch: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Windows [layers, batch, W - 1, C] of the convolutions, the newest last, and states [layers, batch, D, N]."""
        count = len(self.layers)
        windows = torch.zeros((count, batch, self.reach, self.mixed), dtype=dtype)
        return windows, torch.zeros((count, batch, self.channels, self.states), dtype=dtype)

    def native_args(self, hidden: Tensor, windows: Tensor, states: Tensor, out: Tensor) -> Any:
        dt_proj = self.layers[0].dt_proj
        return native.MambaStep(
            layers=address(self._layers), head=address(self._head), norm=address(self.norm), hidden=address(hidden),
            windows=address(windows), memory=address(states), logits=address(out), workspace=0,
            count=len(self.layers), tokens=hidden.shape[0], batch=states.shape[1], width=self.width,
            channels=self.channels, states=self.states, taps=self.reach + 1, vocabulary=out.shape[1],
            rank=0 if dt_proj is None else dt_proj.weight.shape[1], heads=self.heads, groups=self.groups,
            norm_groups=self.norm_groups, eps=self.eps,
        )  # fmt: skip

    def _row(self, layer: MambaLayer) -> list[int]:
        matrices = [n for m in layer.matrices for n in matrix_row(m, self._held)]
        vectors = (layer.norm, layer.taps, layer.taps_bias, layer.a, layer.d, layer.dt_bias, layer.gated_norm)
        return [*matrices, *map(address, vectors)]


def _check_matrix(name: str, matrix: Matrix, shape: tuple[int, ...]) -> None:
    if tuple(matrix.weight.shape) != shape:
        raise ValueError(f"{name}: must be {shape}, got shape {tuple(matrix.weight.shape)}")
    if matrix.lora_a is not None or matrix.neuron_major:
        raise ValueError(f"{name}: must be without lora_a and neuron_major, which Mamba's step does not read")


def mamba_step(hidden: Tensor, stack: MambaStack, windows: Tensor, states: Tensor) -> Tensor:
    """Logits of the next token: head(norm(layers(hidden))); windows and states move on by one token, in place.

    A layer is x + out(y) with the mixer of Mamba (Gu and Dao, arXiv 2312.00752, section 3.4) or Mamba-2 (Dao and Gu,
    arXiv 2405.21060, section 7) over norm x. Inference only.

    Args:
        hidden: [B, d], embeddings of the tokens; float32 has a native kernel.
        windows: [layers, at least B, W - 1, C] in hidden's dtype, contiguous, as is `states`.
        states: [layers, as many, D, N].

    Returns:
        [B, vocabulary] in hidden's dtype.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_float("hidden", hidden)
    if hidden.dim() != 2 or hidden.shape[0] < 1 or hidden.shape[1] != stack.width:
        raise ValueError(f"hidden: must be [at least 1, {stack.width}], got shape {tuple(hidden.shape)}")
    for name, t, rest in (
        ("windows", windows, (stack.reach, stack.mixed)), ("states", states, (stack.channels, stack.states)),
    ):  # fmt: skip
        check_like(name, t, "hidden", hidden)
        if t.dim() != 4 or t.shape[1] < hidden.shape[0]:
            raise ValueError(f"{name}: must hold {hidden.shape[0]} sequences, got shape {tuple(t.shape)}")
        check_shape(name, t, (len(stack.layers), t.shape[1], *rest), "the model's")
        if not t.is_contiguous():
            raise ValueError(f"{name}: must be contiguous, got strides {t.stride()}")
    if states.shape[1] != windows.shape[1]:
        raise ValueError(f"states: must hold {windows.shape[1]} sequences as windows, got {states.shape[1]}")
    return _mamba_step(hidden.contiguous(), stack.number, windows, states, stack.head.weight.shape[0])


def _mamba_step_impl(hidden: Tensor, stack: int, windows: Tensor, states: Tensor, vocabulary: int) -> Tensor:
    whole = enlisted(stack)
    kernels = backend("mamba_step", hidden) if hidden.dtype == torch.float32 and whole.has_kernel else None
    if kernels is None or not hasattr(kernels, "mamba_step"):
        return mamba_step_ref(hidden, whole, windows, states)
    out = hidden.new_empty(hidden.shape[0], vocabulary)
    args = whole.native_args(hidden, windows, states, out)
    _held = give_workspace(args, kernels.mamba_step_workspace(args), hidden)
    kernels.mamba_step(args, stream(hidden))
    return out


def _mamba_step_fake(hidden: Tensor, stack: int, windows: Tensor, states: Tensor, vocabulary: int) -> Tensor:
    return hidden.new_empty(hidden.shape[0], vocabulary)


_mamba_step = define(
    "mamba_step(Tensor hidden, int stack, Tensor(a!) windows, Tensor(b!) states, int vocabulary) -> Tensor",
    _mamba_step_impl,
    _mamba_step_fake,
)


# ---------------------------------------------------------------------------- reference


def mamba_step_ref(hidden: Tensor, stack: MambaStack, windows: Tensor, states: Tensor) -> Tensor:
    """`mamba_step` by PyTorch, in hidden's dtype."""
    x, tokens = hidden, hidden.shape[0]
    for layer, window, memory in zip(stack.layers, windows, states, strict=True):
        x = x + layer.out_proj(_mixed_ref(x, layer, stack, window[:tokens], memory[:tokens]))
    return stack.head(rms_normed(x, stack.norm, stack.eps))


def _mixed_ref(x: Tensor, layer: MambaLayer, stack: MambaStack, window: Tensor, memory: Tensor) -> Tensor:
    """A layer up to its last product, [B, D]; window [B, W - 1, C] and memory [B, D, N] move on."""
    channels, states, wide = stack.channels, stack.states, x.dtype
    bias = 0 if layer.dt_bias is None else layer.dt_bias.to(wide)
    parts = layer.in_proj(rms_normed(x, layer.norm, stack.eps))
    if stack.second:
        z, mixed, dt = parts.split([channels, stack.mixed, stack.heads], -1)
    else:
        mixed, z = parts.chunk(2, -1)
    held = torch.cat((window, mixed.unsqueeze(1)), 1)
    window.copy_(held[:, 1:])
    offset = 0 if layer.taps_bias is None else layer.taps_bias.to(wide)
    u = F.silu((held * layer.taps.to(wide)).sum(1) + offset)
    if layer.x_proj is None or layer.dt_proj is None:
        u, b, c = u.split([channels, *2 * [stack.groups * states]], -1)
    else:
        low, b, c = layer.x_proj(u).split([layer.dt_proj.weight.shape[1], states, states], -1)
        dt = layer.dt_proj(low)
    b, c = (t.unflatten(-1, (stack.groups, states)).repeat_interleave(channels // stack.groups, 1) for t in (b, c))
    size = channels // dt.shape[1]  # channels that share a step
    step = F.softplus(dt + bias).repeat_interleave(size, 1).unsqueeze(-1)
    a = layer.a.to(wide).reshape(dt.shape[1], -1).repeat_interleave(size, 0)
    memory.copy_(torch.exp(step * a) * memory + step * b * u.unsqueeze(-1))
    y = ((c * memory).sum(-1) + layer.d.to(wide).repeat_interleave(size) * u) * F.silu(z)
    if layer.gated_norm is None:
        return y
    grouped = y.unflatten(-1, (stack.norm_groups, -1))
    return rms_normed(grouped, torch.ones(()), stack.eps).flatten(-2) * layer.gated_norm.to(wide)
