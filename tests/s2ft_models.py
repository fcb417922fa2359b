"""Small S2FT models for the tests."""

import peft
import torch
from conftest import task_type, tiny_model

from deftcore.methods.s2ft.config import S2ftConfig
from deftcore.methods.s2ft.layer import S2ftLayer

# One of each form, and those whose parts differ in detail (biases, norms of queries and keys).
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "opt", "gpt2", "gpt_neox", "bert", "roberta", "t5")
ALL = ["o", "down", "v", "up", "q", "k"]


def scaled(family, dtype=torch.float32, activation="silu"):
    """A tiny model with weights large enough that a wrong order shows."""
    model = tiny_model(family, activation if family != "t5" else "gated-gelu").to(dtype).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2:
                p.mul_(1 if family == "t5" else 4)  # T5 starts large
            elif name.endswith("bias"):
                p.copy_(torch.randn(p.shape, generator=generator).to(dtype) * 0.3)
    return model


def wrap(model, family="llama", **options):
    config = S2ftConfig(**({"channel_ratio": 0.2, "head_ratio": 0.5, "task_type": task_type(family)} | options))
    return peft.get_peft_model(model, config)


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def layers_of(model):
    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, S2ftLayer)}


def train(model, batch, steps=3, optimizer=torch.optim.AdamW, lr=1e-2, **options):
    optimizer = optimizer(trainable(model), lr=lr, **options)
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model
