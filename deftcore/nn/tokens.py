"""Which positions of a batch count, per side of a model; padding does not."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_KEY_VALUE_PROMPTS = ("PREFIX_TUNING", "CARTRIDGE")  # of PEFT's prompt learning


def token_masks(batch: Mapping[str, Any], is_encoder_decoder: bool) -> dict[str, Tensor | None]:
    """Which tokens of a batch count, per side: [B, K] boolean, or None where the batch does not say."""
    attention = batch.get("attention_mask")
    if isinstance(attention, Tensor) and attention.dim() != 2:  # a mask per query and key says nothing of tokens
        attention = None
    padding = None if attention is None else attention != 0
    if not is_encoder_decoder:
        return {"model": padding}
    decoder, labels = batch.get("decoder_attention_mask"), batch.get("labels")
    if decoder is None and labels is not None:
        decoder = labels != -100
    return {"encoder": padding, "decoder": None if decoder is None else decoder != 0}


def fitted(mask: Tensor | None, tokens: torch.Size) -> Tensor | None:
    """A mask [B, K] for the tokens of an activation, in their shape; None where it says nothing of them.

    Args:
        tokens: [B, T] or flattened already [B * T]. T may be less than K, where cached keys and prefix tokens precede
            the positions that run now, and more, where virtual prompt tokens do, which are real positions and count.
    """
    rows = tokens.numel()
    if mask is None or rows % mask.shape[0]:
        return None
    length = rows // mask.shape[0]
    if mask.shape[1] >= length:
        mask = mask[:, mask.shape[1] - length :]
    else:
        mask = torch.cat((mask.new_ones((mask.shape[0], length - mask.shape[1])), mask), dim=1)
    return mask.reshape(tokens)


def positions(batch: Mapping[str, Any], side: str, *, rows: bool = False) -> int:
    """Number of positions of one side of a batch, padding included; with `rows`, of its sequences."""
    prefix = "decoder_" if side == "decoder" else ""
    names = [f"{prefix}input_ids", f"{prefix}inputs_embeds", *(["labels"] if prefix else [])]
    given = next((batch[name] for name in names if batch.get(name) is not None), None)
    if given is None:
        raise ValueError(f"batch: must have one of {', '.join(names)}, got {', '.join(batch)}")
    return given.shape[0] if rows else given.shape[:2].numel()


def virtual_tokens(model: Any) -> int:
    """How many positions PEFT's prompt learning puts before the input; prefixes of keys and values are none."""
    config = getattr(model, "active_peft_config", None) if hasattr(model, "get_base_model") else None
    kind = getattr(config, "peft_type", None)
    if not getattr(config, "is_prompt_learning", False) or getattr(kind, "value", kind) in _KEY_VALUE_PROMPTS:
        return 0
    return int(getattr(config, "num_virtual_tokens", 0))
