"""Decoding token by token."""

import torch
from torch import Tensor, nn


@torch.no_grad()
def greedy_decode(model: nn.Module, input_ids: Tensor, new_tokens: int) -> tuple[Tensor, Tensor]:
    """Greedy continuation with a key-value cache: tokens [B, new_tokens] and the logits they were taken from.

    A plain loop rather than `generate`, so that what is timed is the model.
    """
    output = model(input_ids=input_ids, use_cache=True)
    cache = next(name for name in ("cache", "past_key_values", "cache_params") if name in output)  # by the release
    tokens, logits = [], []
    for step in range(new_tokens):
        last = output.logits[:, -1]
        logits.append(last)
        tokens.append(last.argmax(-1, keepdim=True))
        if step + 1 < new_tokens:
            output = model(input_ids=tokens[-1], use_cache=True, **{cache: output[cache]})
    return torch.cat(tokens, 1), torch.stack(logits, 1)
