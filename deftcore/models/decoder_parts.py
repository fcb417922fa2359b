"""Reads a Llama-like Transformers model into the form of which `deftcore.ops.decoder` decodes."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deftcore.models.blocks import base_of, find_mlp_blocks
from deftcore.models.decoder_matrices import SPARSE, MlpParts, read_matrix, read_mlp
from deftcore.models.decoder_steps import State, check_devices, norm_weight, one_epsilon, prove
from deftcore.models.families import Attention, family_of, model_type
from deftcore.nn.linear import called_plainly
from deftcore.ops.decoder import Block, DecoderStack, decode_step

_NORMS = ("input_layernorm", "post_attention_layernorm")
_CHANGING_ROTATIONS = ("dynamic", "longrope")  # their tables depend on the length so far


@dataclass(frozen=True)
class LlamaSteps:
    """`decode_step` as `Decoder` asks for it. The state is the keys and the values."""

    stack: DecoderStack
    most_read = 16  # SmolLM2's shape, one thread: 8 tokens in 43 ms, by Transformers 64; 32 in 137, 112

    def rounded(self) -> "LlamaSteps":
        """As `Steps`."""
        return LlamaSteps(self.stack.rounded())

    def new_state(self, batch: int) -> State:
        """As `Steps`."""
        return self.stack.new_cache(batch)

    def take(self, cache: Any, state: State, length: int) -> None:
        """As `Steps`; layers that see a window may hold the last positions."""
        for layer, k, v in zip(cache.layers, *state, strict=True):
            batch, _, held, _ = layer.keys.shape
            k[:batch, :, length - held : length] = layer.keys
            v[:batch, :, length - held : length] = layer.values

    def step(self, hidden: Tensor, state: State, starts: Tensor, position: int) -> Tensor:
        """As `Steps`."""
        return decode_step(hidden, self.stack, *state, starts, position)


def read_stack(model: Any, length: int) -> DecoderStack:
    """A model's weights and sizes for decoding.

    Args:
        length: positions of the cache.

    Raises:
        ValueError: with the reason why the native step cannot decode this model.
    """
    for name in getattr(model, "active_adapters", ()) if base_of(model) is not model else ():
        if model.peft_config[name].is_prompt_learning:
            raise ValueError(f"{name}: an adapter of prompts has no native step")
    model = base_of(model)
    family = family_of(model)
    if family is None or family.attention is None or family.attention.fused or not hasattr(model, "generate"):
        raise ValueError(f"{model_type(model) or type(model).__name__} is no Llama-like model that generates text")
    check_devices(model)
    core: Any = model.base_model
    layers: Any = getattr(core, "layers", ())
    if not all(hasattr(core, name) for name in ("layers", "norm", "rotary_emb")) or len(layers) == 0:
        raise ValueError(f"{type(core).__name__} has other parts than Llama's")
    for layer in layers:
        _check_parts(layer, family.attention)
    dense = {}
    if not all(isinstance(layer.mlp, SPARSE) for layer in layers):
        dense = {block.up.holder: block for block in find_mlp_blocks(model)}
    mlps = [read_mlp(layer.mlp, dense) for layer in layers]
    blocks = [_block(layer, mlp, family.attention) for layer, mlp in zip(layers, mlps, strict=True)]
    first: Any = layers[0].self_attn
    activations = {mlp.activation for mlp in mlps if mlp.activation} or {"silu"}
    if len(activations) > 1:
        raise ValueError(f"its blocks have several activations: {', '.join(sorted(activations))}")
    scales = {layer.self_attn.scaling for layer in layers}
    if len(scales) > 1:
        raise ValueError(f"its attentions differ in their scaling: {', '.join(f'{each:g}' for each in sorted(scales))}")
    cosine, sine = _rotations(core.rotary_emb, first.head_dim, length)
    head = model.get_output_embeddings()
    if not all(called_plainly(module, capturing=False) for top in (core.norm, head) for module in top.modules()):
        raise ValueError("its last norm or its head has hooks, or a forward of its own")
    stack = DecoderStack(
        blocks=blocks, norm=norm_weight(core.norm), head=read_matrix("the head", head), cosine=cosine, sine=sine,
        heads=blocks[0].q.shape[0] // first.head_dim, activation=activations.pop(), eps=one_epsilon(core),
        scale=scales.pop(),
    )  # fmt: skip
    if not stack.has_kernel:
        raise ValueError("its weights have a dtype that the native step does not read")
    thresholds = any(block.tau or block.taus is not None for block in blocks)
    prove(model, LlamaSteps(stack), length, thresholds=thresholds)
    return stack


def _check_parts(layer: Any, attention: Attention) -> None:
    found = {name for name, _ in layer.named_children()}
    if found != {"self_attn", "mlp", *_NORMS}:
        raise ValueError(f"{type(layer).__name__} has other parts than Llama's: {', '.join(sorted(found))}")
    known = {*attention.projections, "q_norm", "k_norm"}
    extra = {name for name, _ in layer.self_attn.named_children()} - known
    if extra:
        raise ValueError(f"{type(layer).__name__} has other parts than Llama's: {', '.join(sorted(extra))}")
    if not all(called_plainly(module, capturing=False) for module in layer.modules()):
        raise ValueError(f"{type(layer).__name__} has hooks, or a forward of its own")


def _block(layer: Any, mlp: MlpParts, attention: Attention) -> Block:
    own: Any = layer.self_attn
    norms = [getattr(own, name, None) for name in ("q_norm", "k_norm")]
    window = getattr(own, "sliding_window", None)
    if not hasattr(own, "sliding_window") and not hasattr(own, "layer_type"):
        window = getattr(own.config, "sliding_window", None)  # one for all layers, as in Mistral
    paths = (attention.q, attention.k, attention.v, attention.o)
    q, k, v, o = (read_matrix(path, getattr(own, path)) for path in paths)
    q_norm, k_norm = (None if norm is None else norm_weight(norm) for norm in norms)
    block = Block(
        q, k, v, o, mlp.gate, mlp.up, mlp.down, norm_weight(layer.input_layernorm),
        norm_weight(layer.post_attention_layernorm), q_norm, k_norm, tau=mlp.tau, taus=mlp.taus,
        by_product=mlp.by_product,
    )  # fmt: skip
    if window == 1:
        raise ValueError("its sliding window is 1, under which Transformers' cache keeps more than the window")
    return dataclasses.replace(block, window=window) if window else block


def _rotations(rotary: Any, size: int, length: int) -> tuple[Tensor, Tensor]:
    kind = getattr(rotary, "rope_type", "default")
    if kind in _CHANGING_ROTATIONS:
        raise ValueError(f"its rotary positions ({kind}) change with the length")
    try:
        cosine, sine = rotary(torch.zeros(1, 1), torch.arange(length).unsqueeze(0))
    except TypeError as error:
        raise ValueError(f"its rotary positions are of another kind ({error})") from None
    if cosine.shape[-1] != size:
        raise ValueError(f"its rotary positions turn {cosine.shape[-1]} of {size} channels of a head")
    return cosine[0].float().contiguous(), sine[0].float().contiguous()
