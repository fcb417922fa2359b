"""Where the quickstart's base model starts, and how many steps fit into its time."""

import statistics
import time
from typing import Any

import torch
from torch import Tensor

_STRENGTH = 6.0  # nats that an expected token gains
_MATCH = 10.0  # nats by which a head prefers what it looks for


@torch.no_grad()
def start_from_bigrams(model: Any, tokens: Tensor, *, room: int = 0) -> None:
    """Makes a Llama with an own head predict each token from the one before it, as counted: embedding and head become
    the factors of the table of log-probabilities, as far as their width goes, and the blocks add nothing yet.

    Args:
        tokens: [N] int64, the training text.
        room: last channels that stay empty.
    """
    size, width = model.lm_head.weight.shape
    counts = torch.zeros(size, size)
    counts.index_put_((tokens[:-1], tokens[1:]), torch.ones(len(tokens) - 1), accumulate=True)
    single = torch.bincount(tokens, minlength=size) + 0.5
    kinds = (counts > 0).sum(1, keepdim=True).clamp(min=1)  # Witten and Bell: what is new counts as often as it came
    table = ((counts + kinds * single / single.sum()) / (counts.sum(1, keepdim=True) + kinds)).log()
    left, values, right = torch.linalg.svd(table - table.mean(1, keepdim=True))
    rank = min(width - room, size)
    root = values[:rank].sqrt()
    rows = left[:, :rank] * root
    norm = rows.norm(dim=1).mean() / width**0.5  # the final norm divides by each row's own
    model.model.embed_tokens.weight.zero_()[:, :rank] = rows / norm / 2
    model.lm_head.weight.zero_()[:, :rank] = right[:rank].T * root * norm * (2 if room else 1)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()


def induction_room(model: Any) -> int:
    """Channels that `start_induction` takes; 0 where there are no two blocks to put it in."""
    return 3 * _code_size(model) + 1 if len(model.model.layers) > 1 else 0


@torch.no_grad()
def start_induction(model: Any, seed: int) -> None:
    """Makes a Llama also expect what followed a token when it last came: its first head copies the token before each
    into channels beside it, and the second block's first head looks there for the token at hand, and copies what it
    finds to the output (Olsson et al., arXiv 2209.11895). Takes the last `induction_room` channels, which
    `start_from_bigrams` left empty: a random code of the token, of the one before, of the expected one, and a constant.
    """
    size, width = model.lm_head.weight.shape
    code, part = _code_size(model), width**0.5 / 2  # the norm of each part of a hidden state
    own, before, expected, one = (width - 1 - k * code for k in (3, 2, 1, 0))
    signs = torch.randint(0, 2, (size, code), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    model.model.embed_tokens.weight[:, own : own + code] = signs * part / code**0.5
    model.model.embed_tokens.weight[:, one] = part
    model.lm_head.weight[:, expected : expected + code] = signs * _STRENGTH / code**0.5 / part

    first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    head, half = first.head_dim, first.head_dim // 2
    for attention in (first, second):
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight[:head] = 0
    # Rotated by its place, the constant is most like the one a place before.
    _, sine = model.model.rotary_emb(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.int64))
    angles = sine[0, 0, :half].asin()
    fast = angles > 0.1
    cosine = angles.cos()
    scale = (_MATCH * head**0.5 / (1 - cosine[fast]).sum()).sqrt() / part * 0.75**0.5
    first.q_proj.weight[:half, one] = scale * fast
    first.k_proj.weight[:half, one] = scale * fast * cosine
    first.k_proj.weight[half:head, one] = scale * fast * angles.sin()
    place = torch.arange(code)
    slow = half - 1 - place // 2 + half * (place % 2)  # channels that rotation hardly turns
    second.q_proj.weight[slow, own + place] = (_MATCH * head**0.5) ** 0.5 / part
    second.k_proj.weight[slow, before + place] = (_MATCH * head**0.5) ** 0.5 / part
    for attention, to, norm in ((first, before, 0.75**0.5), (second, expected, 1.0)):
        attention.v_proj.weight[place, own + place] = norm
        attention.o_proj.weight[to + place, place] = 1


@torch.no_grad()
def widen(model: Any, times: int) -> None:
    """Cuts every neuron of a Llama's MLPs into so many equal parts, which together compute what it did."""
    for layer in model.model.layers:
        for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
            projection.weight = torch.nn.Parameter(projection.weight.repeat(times, 1))
            projection.out_features *= times
        layer.mlp.down_proj.weight = torch.nn.Parameter(layer.mlp.down_proj.weight.repeat(1, times) / times)
        layer.mlp.down_proj.in_features *= times
        layer.mlp.intermediate_size *= times
    model.config.intermediate_size *= times


def _code_size(model: Any) -> int:
    return 7 * model.model.layers[0].self_attn.head_dim // 16


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
    # A third on top for the optimizer, the density loss and the loop.
    fit = int(seconds / (1.35 * statistics.median(times)))
    return min(max(fit // 10 * 10, least), most)
