"""Reads a Transformers model into the form of which `deftcore.ops.decoder` decodes, and proves that it is the same."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from deftcore.models.blocks import base_of, find_mlp_blocks
from deftcore.models.families import Attention, family_of, model_type
from deftcore.nn.activations import activation_of
from deftcore.nn.linear import Linear4bit, called_plainly
from deftcore.ops.decoder import Block, DecoderStack, Matrix, decode_step

_NORMS = ("input_layernorm", "post_attention_layernorm")
_CHANGING_ROTATIONS = ("dynamic", "longrope")  # their tables depend on the length so far
_PROOF_STEPS = 3
_CLOSE = 2e-3  # of the largest logit, in float32
_CLOSE_16 = 5e-2  # where Transformers rounds every activation to 16 bits


def read_stack(model: Any, length: int) -> DecoderStack:
    """A model's weights and sizes for decoding.

    Args:
        length: positions of the cache.

    Raises:
        ValueError: with the reason why the native step cannot decode this model.
    """
    family = family_of(model)
    whole: Any = base_of(model)
    if whole is not model:
        raise ValueError("adapters must be merged first (deftcore.merge)")
    if family is None or family.attention is None or family.attention.fused or not hasattr(model, "generate"):
        raise ValueError(f"{model_type(model) or type(model).__name__} is no Llama-like model that generates text")
    devices = {t.device.type for t in model.parameters()}
    if devices != {"cpu"}:
        raise ValueError(f"the native step is for CPUs, the model is on {', '.join(sorted(devices))}")
    core: Any = model.base_model
    mlps = find_mlp_blocks(model)
    layers: Any = getattr(core, "layers", ())
    if not all(hasattr(core, name) for name in ("layers", "norm", "rotary_emb")) or len(mlps) != len(layers):
        raise ValueError(f"{type(core).__name__} has other parts than Llama's")
    blocks = [_block(layer, mlp, family.attention) for layer, mlp in zip(layers, mlps, strict=True)]
    first: Any = layers[0].self_attn
    activations = {activation_of(mlp.activation.get()) for mlp in mlps}
    if len(activations) > 1:
        raise ValueError(f"its blocks have several activations: {', '.join(sorted(activations))}")
    epsilons = {_eps(module) for name, module in core.named_modules() if name.endswith("norm")}
    if len(epsilons) > 1:
        raise ValueError(f"its norms have several epsilons: {', '.join(f'{each:g}' for each in sorted(epsilons))}")
    cosine, sine = _rotations(core.rotary_emb, first.head_dim, length)
    head = model.get_output_embeddings()
    stack = DecoderStack(
        blocks=blocks, norm=_norm(core.norm), head=_matrix("the head", head), cosine=cosine, sine=sine,
        heads=blocks[0].q.weight.shape[0] // first.head_dim, activation=activations.pop(), eps=epsilons.pop(),
        scale=first.scaling,
    )  # fmt: skip
    if not stack.has_kernel:
        raise ValueError("its weights have a dtype that the native step does not read")
    _prove(model, stack)
    return stack


def embedded(model: Any, tokens: Tensor) -> Tensor:
    """Embeddings of tokens [B] as a step takes them, [B, D] float32."""
    return model.get_input_embeddings()(tokens).float()


def copy_cache(cache: Any, keys: Tensor, values: Tensor, length: int) -> None:
    """Copies Transformers' cache of `length` positions into ours; layers that see a window may hold the last ones."""
    for layer, k, v in zip(cache.layers, keys, values, strict=True):
        batch, _, held, _ = layer.keys.shape
        k[:batch, :, length - held : length] = layer.keys
        v[:batch, :, length - held : length] = layer.values


def _block(layer: Any, mlp: Any, attention: Attention) -> Block:
    found = {name for name, _ in layer.named_children()}
    if found != {"self_attn", "mlp", *_NORMS}:
        raise ValueError(f"{type(layer).__name__} has other parts than Llama's: {', '.join(sorted(found))}")
    own: Any = layer.self_attn
    known = {*attention.projections, "q_norm", "k_norm"}
    extra = {name for name, _ in own.named_children()} - known
    if extra or mlp.gate is None:
        raise ValueError(f"{type(layer).__name__} has other parts than Llama's: {', '.join(sorted(extra)) or 'MLP'}")
    if not all(called_plainly(module) for module in layer.modules()):
        raise ValueError(f"{type(layer).__name__} has hooks, or a forward of its own")
    norms = [getattr(own, name, None) for name in ("q_norm", "k_norm")]
    window = getattr(own, "sliding_window", None)
    if not hasattr(own, "sliding_window") and not hasattr(own, "layer_type"):
        window = getattr(own.config, "sliding_window", None)  # one for all layers, as in Mistral
    q, k, v, o = (_matrix(path, getattr(own, path)) for path in (attention.q, attention.k, attention.v, attention.o))
    gate, up, down = (_matrix(slot.attribute, slot.get()) for slot in (mlp.gate, mlp.up, mlp.down))
    q_norm, k_norm = (None if norm is None else _norm(norm) for norm in norms)
    block = Block(
        q, k, v, o, gate, up, down, _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm), q_norm, k_norm
    )
    return dataclasses.replace(block, window=window) if window else block


def _matrix(name: str, layer: Any) -> Matrix:
    if type(layer) not in (nn.Linear, Linear4bit):
        raise ValueError(f"{name}: {type(layer).__name__} has no native step")
    bias = None if layer.bias is None else layer.bias.detach().float().contiguous()
    try:
        return Matrix(layer.quantized if isinstance(layer, Linear4bit) else layer.weight.detach(), bias)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _norm(module: Any) -> Tensor:
    """What a norm multiplies with: its weight, or 1 + its weight."""
    weight = module.weight.detach().float()
    with torch.no_grad():
        plain = module(torch.ones_like(module.weight)).float()
    choices = (weight, 1 + weight)
    return min(choices, key=lambda w: float((plain - w).abs().max())).contiguous()


def _eps(module: Any) -> float:
    return float(getattr(module, "variance_epsilon", None) or module.eps)


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


@torch.no_grad()
def _prove(model: Any, stack: DecoderStack) -> None:
    """Raises ValueError where a few steps on made-up tokens, one sequence padded, differ from the model's own."""
    generator = torch.Generator().manual_seed(0)
    length = min(2 + _PROOF_STEPS, stack.cosine.shape[0])
    rows = stack.head.weight.shape[0]
    tokens = torch.randint(rows, (2, length), generator=generator)
    tokens = tokens.clamp(max=model.get_input_embeddings().weight.shape[0] - 1)
    starts = torch.tensor([0, min(1, length - 1)])
    mask = (torch.arange(length) >= starts[:, None]).long()
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    training = model.training
    model.eval()
    try:
        theirs = model(input_ids=tokens, attention_mask=mask, position_ids=places, use_cache=False).logits.float()
    finally:
        model.train(training)
    keys, values = stack.new_cache(2)
    for position in range(length):
        awake = starts <= position
        first = torch.where(awake, starts, position)
        ours = decode_step(embedded(model, tokens[:, position]), stack, keys, values, first, position)
        bound = _CLOSE if model.dtype == torch.float32 else _CLOSE_16
        wanted = theirs[awake, position]
        error, scale = float((ours[awake] - wanted).abs().max()), float(wanted.abs().max())
        if not error <= bound * max(scale, 1e-30):
            raise ValueError(f"its logits differ from a native step's by {error:.3g} of {scale:.3g}")
