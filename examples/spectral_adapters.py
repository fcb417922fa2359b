"""KaSA and BA-LoRA under Transformers' Trainer, then as plain LoRA: `python examples/spectral_adapters.py`.

Trains a tiny adapter of each (seconds), writes it as a LoRA, and loads that on the original model with PEFT alone.
"""

import tempfile
from typing import Any

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from deftcore import BaLoraConfig, BaLoraPenalty, KasaFactoredConfig, KasaPenalty, export_lora
from deftcore.training.trainer import ObjectiveTrainerMixin


class PenaltyTrainer(ObjectiveTrainerMixin, Trainer):
    """A Trainer that takes an `objective`."""


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))


def train(config: Any, penalty: Any, folder: str) -> Any:
    """The base under an adapter that has learned to count, with the adapter's penalty."""
    model = peft.get_peft_model(base(), config)
    rows = [{"input_ids": ids, "labels": ids} for ids in (torch.arange(start, start + 12) for start in range(2, 50))]
    arguments = TrainingArguments(
        output_dir=folder, max_steps=40, per_device_train_batch_size=8, learning_rate=2e-2, use_cpu=True,
        report_to=[], logging_steps=40, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = PenaltyTrainer(model=model, args=arguments, train_dataset=rows, objective=penalty(model))
    trainer.train()
    return model.eval()


def main() -> None:
    targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
    common: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": "CAUSAL_LM"}
    ids = torch.arange(20, 30).unsqueeze(0)
    for name, config, penalty in (
        ("KaSA", KasaFactoredConfig(**common), KasaPenalty),
        ("BA-LoRA", BaLoraConfig(**common), BaLoraPenalty),
    ):
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            with torch.enable_grad():
                model = train(config, penalty, folder)
            plain = peft.PeftModel.from_pretrained(base().eval(), export_lora(model, f"{folder}/lora"))
            apart = float((plain(ids).logits - model(ids).logits).abs().max())
            print(f"{name}: after 29 comes {int(model(ids).logits[0, -1].argmax())}; as plain LoRA within {apart:.0e}")


if __name__ == "__main__":
    main()
