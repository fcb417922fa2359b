"""What is measured on a trained model."""

import re
from collections.abc import Sequence
from typing import Any

import torch

from bench.evidence.sets import Data, elsewhere
from deftcore.training.task import Batches


@torch.no_grad()
def score(model: Any, data: Data, examples: Sequence[Any]) -> dict[str, float]:
    """The mean loss over examples, nats a token or text, and of classes the accuracy."""
    task, loss, right, count = data.task, 0.0, 0, 0
    batches = Batches(sorted(examples, key=lambda each: len(each["input_ids"])), 8, task.collate, shuffle=False)
    with evaluating(model, data):
        for batch in batches.epoch(0):
            output, predictions = task.output(model, batch), task.predictions(batch)
            loss, count = loss + float(output.loss) * predictions, count + predictions
            if data.spec.classes:
                right += int((output.logits.argmax(-1) == batch["labels"]).sum())
    return {"loss": loss / count} | ({"accuracy": right / count} if data.spec.classes else {})


@torch.no_grad()
def other_domain(model: Any, data: Data, texts: Sequence[str] | None = None) -> torch.Tensor | float:
    """How a model stands on texts of another domain: of a language model its mean loss, nats a token; of a classifier
    the mean vector of each text below its head, normalised.

    Args:
        texts: None for those of `elsewhere`.
    """
    tokenizer, texts = data.spec.base.tokenizer(), elsewhere(data) if texts is None else texts
    if not data.spec.classes:
        examples = [{"input_ids": tokenizer(text)["input_ids"][: data.spec.max_length]} for text in texts]
        return score(model, data, examples)["loss"]
    found = []
    with evaluating(model, data):
        for text in texts:
            inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=data.spec.max_length)
            hidden = model(**inputs, output_hidden_states=True).hidden_states[-1].mean(1)[0]
            found.append(torch.nn.functional.normalize(hidden, dim=0))
    return torch.stack(found)


def forgetting(before: torch.Tensor | float, after: torch.Tensor | float) -> dict[str, float]:
    """What training cost elsewhere: the rise of the loss, or one minus the mean cosine of the vectors."""
    if isinstance(before, torch.Tensor):
        return {"drift": 1.0 - float((before * after).sum(-1).mean())}
    return {"elsewhere": float(after), "forgot": float(after) - before}


@torch.no_grad()
def generation(model: Any, data: Data) -> dict[str, float]:
    """Greedy answers to held-out prompts, graded. The model is left in bfloat16."""
    model.eval().to(torch.bfloat16)
    return graded(data, answers(model, data.spec.base.tokenizer(), list(data.references), data.spec.generated[1]))


@torch.no_grad()
def answers(model: Any, tokenizer: Any, prompts: Sequence[str], new: int | Sequence[int]) -> list[str]:
    """What a model says to each prompt, greedily.

    Args:
        new: tokens at most, of all or of each.
    """
    tokenizer.padding_side = "left"
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True)
    most = [new] * len(prompts) if isinstance(new, int) else new
    output = model.generate(**inputs, max_new_tokens=max(most), do_sample=False, pad_token_id=0)
    said = output[:, inputs["input_ids"].shape[1] :]
    return [tokenizer.decode(row[:m], skip_special_tokens=True) for row, m in zip(said, most, strict=True)]


def graded(data: Data, texts: Sequence[str]) -> dict[str, float]:
    """BLEU of answers to a set's prompts against all references, or the share whose last number is right."""
    references = list(data.references.values())
    if data.spec.name == "gsm8k":
        right = sum(last_number(text) == each[0] for text, each in zip(texts, references, strict=True))
        return {"exact": right / len(texts)}
    import sacrebleu

    most = max(map(len, references))
    columns = [[each[i] if i < len(each) else None for each in references] for i in range(most)]
    return {"bleu": sacrebleu.corpus_bleu([text.strip() for text in texts], columns).score}


def last_number(text: str) -> str | None:
    """The last number of a text, without commas and a point at its end.

    >>> last_number("so 3 + 1,200 = <<3+1200=1203>>1,203.")
    '1203'
    """
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return found[-1].replace(",", "") if found else None


class evaluating:
    """A model in evaluation and in the arithmetic that its set trains in."""

    def __init__(self, model: Any, data: Data) -> None:
        self.model = model
        enabled = data.spec.base.mixed_precision == "bf16"
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=enabled)

    def __enter__(self) -> None:
        self.model.eval()
        self.autocast.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.autocast.__exit__(*error)
