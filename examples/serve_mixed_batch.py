"""Decodes one batch whose rows use different S2FT adapters: `python examples/serve_mixed_batch.py`.

Trains two tiny adapters on one base (seconds), takes them out of the model, and serves both at once beside the base.
"""

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deftcore import DeltaAdapter, S2ftConfig, extract_adapter, serve


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
            bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )
    )  # fmt: skip


def train_to_say(token: int, seed: int) -> DeltaAdapter:
    """An adapter that has learned to repeat one token."""
    model = peft.get_peft_model(base(), S2ftConfig(channel_ratio=0.2, seed=seed, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-2, fused=True)
    ids = torch.randint(1, 64, (8, 12))
    ids[:, 4:] = token
    for _ in range(30):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return extract_adapter(model)


def main() -> None:
    adapters = {"sevens": train_to_say(7, 1), "nines": train_to_say(9, 2)}
    served = serve(base(), adapters)
    prompts = torch.randint(1, 64, (3, 6))
    with served.rows(["sevens", None, "nines"]) as model:
        tokens = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=8, do_sample=False)
    for name, row in zip(("sevens", "the base", "nines"), tokens.tolist(), strict=True):
        print(f"{name}: {row[:6]} -> {row[6:]}")


if __name__ == "__main__":
    main()
