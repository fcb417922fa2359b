"""Reads Transformers' Mamba and Mamba-2, plain or patched, into the form of which `deftcore.ops.ssm.decode` decodes."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deftcore.models.blocks import base_of
from deftcore.models.decoder_steps import State, check_devices, matrix_of, norm_weight, one_epsilon, prove
from deftcore.models.families import model_type
from deftcore.models.mamba_cache import held_states
from deftcore.nn.linear import Linear4bit, called_plainly
from deftcore.nn.mixer import MixerBlock
from deftcore.ops.decoder_matrix import Matrix
from deftcore.ops.quant4 import dequantize_4bit
from deftcore.ops.ssm.decode import MambaLayer, MambaStack, mamba_step

_PARTS = {"in_proj", "conv1d", "out_proj"}


@dataclass(frozen=True)
class MambaSteps:
    """`mamba_step` as `Decoder` asks for it. The state is the convolutions' windows and the scans' states, into which
    a prompt's padding has gone as Transformers lets it.
    """

    stack: MambaStack
    most_read = 0  # scans go token by token

    def rounded(self) -> "MambaSteps":
        """As `Steps`."""
        return MambaSteps(self.stack.rounded())

    def new_state(self, batch: int) -> State:
        """As `Steps`."""
        return self.stack.new_state(batch)

    def take(self, cache: Any, state: State, length: int) -> None:
        """As `Steps`."""
        for i, (window, memory) in enumerate(zip(*state, strict=True)):
            inputs, scanned = held_states(cache, i)
            batch, _, held = inputs.shape
            reach = min(self.stack.reach, held)
            window[:batch, : self.stack.reach - reach] = 0
            window[:batch, self.stack.reach - reach :] = inputs[..., held - reach :].transpose(1, 2)
            memory[:batch] = scanned.reshape(batch, *memory.shape[1:])

    def step(self, hidden: Tensor, state: State, starts: Tensor, position: int) -> Tensor:
        """As `Steps`."""
        return mamba_step(hidden, self.stack, *state)


def read_mamba(model: Any, length: int) -> MambaStack:
    """A model's weights and sizes for decoding.

    Args:
        length: of prompt and new tokens, at most.

    Raises:
        ValueError: with the reason why the native step cannot decode this model.
    """
    whole: Any = base_of(model)
    if whole is not model:
        raise ValueError("adapters must be merged first (deftcore.merge)")
    core: Any = getattr(model, "base_model", model)
    if not hasattr(model, "generate") or not all(hasattr(core, name) for name in ("layers", "norm_f")):
        raise ValueError(f"{model_type(model)}: {type(core).__name__} has other parts than Mamba's")
    check_devices(model)
    layers = [_layer(block) for block in core.layers]
    first: Any = core.layers[0].mixer
    channels = layers[0].out_proj.weight.shape[1]
    stack = MambaStack(
        layers=layers, norm=norm_weight(core.norm_f), head=matrix_of("the head", model.get_output_embeddings()),
        states=first.ssm_state_size, eps=one_epsilon(core), groups=getattr(first, "n_groups", 1),
        norm_groups=channels // getattr(getattr(first, "norm", None), "group_size", channels),
    )  # fmt: skip
    if not stack.has_kernel:
        raise ValueError("its weights have a dtype that the native step does not read")
    prove(model, MambaSteps(stack), length)
    return stack


def _layer(block: Any) -> MambaLayer:
    mixer = block.mixer
    kind, found = type(mixer).__name__, {name for name, _ in block.mixer.named_children()} - {"act"}
    second = "x_proj" not in found
    if {name for name, _ in block.named_children()} != {"norm", "mixer"} or found != _PARTS | (
        {"norm"} if second else {"x_proj", "dt_proj"}
    ):
        raise ValueError(f"{kind} has other parts than Mamba's: {', '.join(sorted(found))}")
    if not all(called_plainly(module, capturing=False) for module in block.modules()):
        raise ValueError(f"{type(block).__name__} has hooks, or a forward of its own")
    if getattr(mixer, "activation", "silu") not in ("silu", "swish"):
        raise ValueError(f"its activation is {mixer.activation}, not silu")
    if getattr(mixer, "rms_eps", None) is not None:
        raise ValueError(f"{kind} norms the scan's inputs, which the native step does not")
    low, high = getattr(mixer, "time_step_limit", (0.0, math.inf))
    if low > 0 or high < math.inf:
        raise ValueError(f"its steps are held to {low:g}..{high:g} (time_step_limit), and not by Transformers' step")
    if not second and type(mixer.dt_proj) is Linear4bit and not isinstance(mixer, MixerBlock):
        raise ValueError("run deftcore.patch on it first: Transformers' mixers take packed bytes for a matrix")
    taps, bias = mixer.conv1d.weight, mixer.conv1d.bias
    dt_bias = mixer.dt_bias if second else mixer.dt_proj.bias
    return MambaLayer(
        in_proj=matrix_of("in_proj", mixer.in_proj), out_proj=matrix_of("out_proj", mixer.out_proj),
        norm=norm_weight(block.norm), taps=_vector(taps.squeeze(1).t()), taps_bias=_vector(bias),
        a=-torch.exp(_vector(mixer.A_log)), d=_vector(mixer.D), dt_bias=_vector(dt_bias),
        x_proj=None if second else matrix_of("x_proj", mixer.x_proj),
        dt_proj=None if second else _step_matrix(mixer.dt_proj),
        gated_norm=_vector(mixer.norm.weight) if second else None,
    )  # fmt: skip


def _vector(t: Any) -> Any:
    """A copy that is float32 and contiguous; None stays."""
    return None if t is None else t.detach().to(torch.float32, copy=True).contiguous()


def _step_matrix(layer: Any) -> Matrix:
    """dt_proj without its bias, which the scan adds. It is narrow: where its rows in 4 bits are no whole blocks, it is
    decoded.
    """
    if type(layer) is Linear4bit and layer.quantized.shape[1] % layer.quantized.block_size:
        return Matrix(dequantize_4bit(layer.quantized, torch.float32))
    return Matrix(matrix_of("dt_proj", layer).weight)
