"""Where the quickstart's base model starts, and its number of steps."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deftcore.cli.quickstart.start import start_from_bigrams, steps_within


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


def test_steps_within_a_time():
    model, batch = llama(), {"input_ids": torch.ones(2, 4, dtype=torch.int64)}
    batch["labels"] = batch["input_ids"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert steps_within(model, batch, 1e-9, least=20, most=50, mixed_precision="no") == 20
    assert steps_within(model, batch, 1e9, least=20, most=50, mixed_precision="bf16") == 50
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
