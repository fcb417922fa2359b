"""Natural GaLore, KaSA and BA-LoRA under TRL's SFTTrainer: `pip install trl && python examples/trl_sft.py`.

Each teaches a tiny model to count (seconds). An optimizer and a PEFT model are what any Trainer takes; penalties come
as an `objective`, by a mixin.
"""

import tempfile
from typing import Any

import peft
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from deftcore import BaLoraConfig, BaLoraPenalty, KasaFactoredConfig, KasaPenalty
from deftcore.methods.natural_galore.trainer import optimizer_of
from deftcore.training.trainer import ObjectiveTrainerMixin


class PenaltySftTrainer(ObjectiveTrainerMixin, SFTTrainer):
    """An SFTTrainer that takes an `objective`."""


def tokenizer() -> PreTrainedTokenizerFast:
    """Numbers as words."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", *map(str, range(62))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))


def trainer_of(method: str, folder: str) -> SFTTrainer:
    arguments = SFTConfig(
        folder, max_steps=60, per_device_train_batch_size=8, learning_rate=2e-2, max_length=16, logging_steps=60,
        save_strategy="no", report_to=[], use_cpu=True, bf16=False, disable_tqdm=True,
        optim_args="rank=8, update_proj_gap=20, scale=1, natural_history=5",  # read for Natural GaLore alone
    )  # fmt: skip
    rows = [{"text": " ".join(map(str, range(start, start + 12)))} for start in range(48)]
    common: dict[str, Any] = {
        "args": arguments, "train_dataset": Dataset.from_list(rows), "processing_class": tokenizer()
    }  # fmt: skip
    if method == "Natural GaLore":
        model = base()
        return SFTTrainer(model=model, optimizers=(optimizer_of(arguments, model), None), **common)
    config, penalty = {"KaSA": (KasaFactoredConfig, KasaPenalty), "BA-LoRA": (BaLoraConfig, BaLoraPenalty)}[method]
    targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
    adapted = peft.get_peft_model(base(), config(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    return PenaltySftTrainer(model=adapted, objective=penalty(adapted), **common)


def main() -> None:
    ids = torch.tensor([tokenizer()("20 21 22 23 24 25 26 27 28 29")["input_ids"]])
    for method in ("Natural GaLore", "KaSA", "BA-LoRA"):
        with tempfile.TemporaryDirectory() as folder:
            trainer = trainer_of(method, folder)
            trainer.train()
        with torch.no_grad():
            following = tokenizer().decode(trainer.model.eval()(ids).logits[0, -1].argmax())
        print(f"{method}: loss {trainer.state.log_history[0]['loss']:.2f}; after 29 comes {following}")


if __name__ == "__main__":
    main()
