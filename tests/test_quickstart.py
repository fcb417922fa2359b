"""Where the quickstart's base model starts, its number of steps, what counting gives, and a given model."""

import math
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deftcore.cli.quickstart.base_model import precision
from deftcore.cli.quickstart.ngrams import NGrams
from deftcore.cli.quickstart.start import induction_room, start_from_bigrams, start_induction, steps_within, widen


def llama(**sizes):
    options = {"vocab_size": 12, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
               "num_attention_heads": 2, "tie_word_embeddings": False} | sizes  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**options))


def test_start_from_bigrams():
    """The untrained model's likeliest next token is the text's, and its loss is near that of the counted table."""
    generator = torch.Generator().manual_seed(1)
    step = torch.multinomial(torch.full((12, 12), 0.1) + 9 * torch.eye(12).roll(5, 1), 4000, True, generator=generator)
    tokens = [0]
    for i in range(4000):
        tokens.append(int(step[tokens[-1], i]))
    text = torch.tensor(tokens)
    model = llama()
    start_from_bigrams(model, text)
    with torch.no_grad():
        logits = model(text[None, :-1]).logits[0]
    counts = torch.zeros(12, 12).index_put_((text[:-1], text[1:]), torch.ones(4000), accumulate=True) + 1e-9
    table = (counts / counts.sum(1, keepdim=True)).log()
    best = float(torch.nn.functional.nll_loss(table[text[:-1]], text[1:]))
    assert float(torch.nn.functional.cross_entropy(logits, text[1:])) < 1.2 * best
    assert torch.equal(logits.argmax(1), (text[:-1] + 5) % 12)
    narrow = llama(hidden_size=8)  # not all of the table fits
    start_from_bigrams(narrow, text)
    assert all(parameter.isfinite().all() for parameter in narrow.parameters())


def test_start_induction():
    """Where a token came before, the untrained model expects what followed it, and goes on from counts elsewhere."""
    size, generator = 64, torch.Generator().manual_seed(2)
    text = torch.randint(0, size, (4000,), generator=generator)  # from which counting learns nothing
    model = llama(vocab_size=size, hidden_size=192, num_attention_heads=2, intermediate_size=8)
    room = induction_room(model)
    assert 0 < room < 192
    assert induction_room(llama(num_hidden_layers=1)) == 0
    start_from_bigrams(model, text, room=room)
    start_induction(model, 0)
    once = torch.stack([torch.randperm(size, generator=generator)[:20] for _ in range(8)])
    with torch.no_grad():
        logits = model(torch.cat((once, once), 1)).logits
    assert (logits[:, 20:-1].argmax(2) == once[:, 1:]).float().mean() > 0.95
    assert (logits[:, :20].argmax(2)[:, :-1] == once[:, 1:]).float().mean() < 0.2


def test_widen():
    model, ids = llama(), torch.arange(10)[None]
    before = model(ids).logits
    widen(model, 3)
    torch.testing.assert_close(model(ids).logits, before)
    assert model.model.layers[1].mlp.down_proj.weight.shape == (16, 72)
    assert LlamaForCausalLM(model.config).load_state_dict(model.state_dict())


def test_steps_within_a_time():
    model, batch = llama(), {"input_ids": torch.ones(2, 4, dtype=torch.int64)}
    batch["labels"] = batch["input_ids"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert steps_within(model, batch, 1e-9, least=20, most=50, mixed_precision="no") == 20
    assert steps_within(model, batch, 1e9, least=20, most=50, mixed_precision="bf16") == 50
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_steps_within_a_time_count_the_rest_of_a_step(monkeypatch):
    """Of timed steps of 2, 1 and 5 seconds the middle one, and a third on top."""
    model, batch = llama(), {"input_ids": torch.ones(2, 4, dtype=torch.int64)}
    batch["labels"] = batch["input_ids"]
    clock = iter([0.0, 2.0, 2.0, 3.0, 3.0, 8.0])
    monkeypatch.setattr("deftcore.cli.quickstart.start.time.perf_counter", lambda: next(clock))
    assert steps_within(model, batch, 55.0, least=1, most=100, mixed_precision="no") == 20


def kneser_ney(text, history, word, size, order):
    """Of one word, by its definition: interpolated, modified discounts, continuation counts below the highest order."""
    grams = [tuple(text[i : i + order]) for i in range(len(text) - order + 1)]
    levels = {order: Counter(grams)}
    for length in range(order - 1, 0, -1):
        levels[length] = Counter(gram[1:] for gram in levels[length + 1])

    def probability(history):
        length = len(history) + 1
        counts = levels[length]
        seen = {gram[-1]: count for gram, count in counts.items() if gram[:-1] == history}
        shorter = probability(history[1:]) if history else 1 / size
        if not seen:
            return shorter
        n = Counter(counts.values())
        discounts = [0.0, 0.5, 1.0, 1.5]
        if n[1] and n[2] and n[3]:
            y = n[1] / (n[1] + 2 * n[2])
            found = (1 - 2 * y * n[2] / n[1], 2 - 3 * y * n[3] / n[2], 3 - 4 * y * n[4] / n[3])
            discounts = [0.0, *(min(max(d, 0.1), k) for k, d in enumerate(found, 1))]
        taken = {each: discounts[min(count, 3)] for each, count in seen.items()}
        kept = seen.get(word, 0) - taken.get(word, 0.0)
        return (kept + sum(taken.values()) * shorter) / sum(seen.values())

    return probability(tuple(history))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_n_grams(order):
    """Against the definition, word by word; and the probabilities of all words add up to 1."""
    size, random = 5, Random(order)
    text = random.choices(range(size - 1), [8, 4, 2, 1], k=60)  # the last word never comes
    unseen = [*random.choices(range(size), k=12), size - 1]
    model = NGrams(torch.tensor(text), size, order)
    found = model.nats(torch.tensor(unseen))
    for i, nats in enumerate(found.tolist()):
        history, word = unseen[i : i + order - 1], unseen[i + order - 1]
        assert nats == pytest.approx(-math.log(kneser_ney(text, history, word, size, order)), rel=1e-12)
        every = [float(model.nats(torch.tensor([*history, each]))) for each in range(size)]
        assert sum(math.exp(-each) for each in every) == pytest.approx(1, rel=1e-12)


def test_n_grams_fit_their_codes():
    tokens = torch.randint(0, 49_152, (400,), generator=torch.Generator().manual_seed(0))
    model = NGrams(tokens, 49_152)
    assert model.order == 3
    assert bool((model.nats(tokens) < 2).all())


@pytest.mark.parametrize(
    ("flags", "level", "wanted"),
    [("avx512_bf16", "AVX512", "bf16"), ("amx_bf16", "AVX512", "bf16"), ("avx512_bf16", "AVX2", "no"),
     ("avx512f", "AVX512", "no")],
)  # fmt: skip
def test_precision_is_what_is_in_use(monkeypatch, flags, level, wanted):
    """A processor that PyTorch is told to use in part only has no fast 16-bit products."""
    monkeypatch.setattr(Path, "exists", lambda self: True)
    monkeypatch.setattr(Path, "read_text", lambda self: f"flags: fpu {flags}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: level)
    assert precision() == wanted
