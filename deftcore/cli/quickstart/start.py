"""Where the quickstart's base model starts, and how many steps fit into its time."""

import time
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def start_from_bigrams(model: Any, tokens: Tensor) -> None:
    """Makes a Llama with an own head predict each token from the one before it, as counted: embedding and head become
    the factors of the table of log-probabilities, as far as their width goes, and the blocks add nothing yet.

    Args:
        tokens: [N] int64, the training text.
    """
    size, width = model.lm_head.weight.shape
    counts = torch.zeros(size, size)
    counts.index_put_((tokens[:-1], tokens[1:]), torch.ones(len(tokens) - 1), accumulate=True)
    single = torch.bincount(tokens, minlength=size) + 0.5
    kinds = (counts > 0).sum(1, keepdim=True).clamp(min=1)  # Witten and Bell: what is new counts as often as it came
    table = ((counts + kinds * single / single.sum()) / (counts.sum(1, keepdim=True) + kinds)).log()
    left, values, right = torch.linalg.svd(table - table.mean(1, keepdim=True))
    rank = min(width, size)
    root = values[:rank].sqrt()
    rows = left[:, :rank] * root
    norm = rows.norm(dim=1).mean() / width**0.5  # the final norm divides by each row's own
    model.model.embed_tokens.weight.zero_()[:, :rank] = rows / norm / 2
    model.lm_head.weight.zero_()[:, :rank] = right[:rank].T * root * norm
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()


def steps_within(
    model: Any, batch: dict[str, Tensor], seconds: float, *, least: int, most: int, mixed_precision: str
) -> int:
    """How many steps of training fit into a time here, from three timed ones; in tens. The model stays as it is."""
    model.train()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision == "bf16"):
            loss = model(**batch).loss
        loss.backward()
        model.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - start)
    fit = int(seconds / (1.15 * min(times)))  # the optimizer's share on top
    return min(max(fit // 10 * 10, least), most)
