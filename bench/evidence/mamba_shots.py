"""In-context learning in small, for `bench.evidence.mamba`: a few examples of a task in front of a question.

A restaurant is three of its properties, in any order, and the question is one of them: `Restaurant: food[French],
area[riverside], priceRange[high]` and `Food:` wants ` French`. The likeliest of the three values is the answer. All
three properties are asked for equally often, so that a model which only prefers some values is right in a third of
the cases. The instructions that a model is tuned on ask for other properties than the tests.
"""

import random
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed

from bench.evidence.mamba_models import Kind, Texts, arithmetic, load, native
from bench.evidence.sets import SPECS, Row, read_rows
from deftcore.training import TrainingConfig, encode, train

SHOTS = (0, 1, 3, 5)
TESTED = ("food", "priceRange", "area")
TAUGHT = ("name", "near", "customer rating", "eatType", "familyFriendly")
QUESTIONS = 100  # of each property
STEPS, RATE, BATCH = 60, 1e-3, 8
PRECISION = "bf16"

Restaurant = dict[str, str]
Question = tuple[str, str, list[str]]


def restaurants(rows: Sequence[Row]) -> list[Restaurant]:
    """Properties of each meaning representation, once each."""
    found = dict.fromkeys(row["mr"] for row in rows)
    return [dict(re.findall(r"(\w[\w ]*)\[([^\]]*)\]", mr)) for mr in found]


def ask(restaurant: Restaurant, properties: Sequence[str], draw: random.Random) -> Question:
    """A question about one of three properties, the first: prompt, answer, and the values that the prompt has."""
    shown = draw.sample(list(properties), 3)
    listed = ", ".join(f"{name}[{restaurant[name]}]" for name in shown)
    wanted = properties[0]
    return (
        f"Restaurant: {listed}\n{wanted[0].upper()}{wanted[1:]}:",
        f" {restaurant[wanted]}",
        [restaurant[name] for name in shown],
    )


def questions(texts: Texts, wanted: str, shots: int, count: int = QUESTIONS) -> list[Question]:
    """Questions about a property behind some examples of it, all of held-out rows. Those of which two values begin with
    one token are left out, as that is what answers are told by."""
    rows = read_rows(texts.folder / "e2e_nlg" / "test.jsonl")
    able = [each for each in restaurants(rows) if all(name in each for name in TESTED)]
    properties = [wanted, *(name for name in TESTED if name != wanted)]
    draw, found = random.Random(0), []
    while len(found) < count:
        asked, *shown = draw.sample(able, shots + 1)
        prompt, answer, values = ask(asked, properties, draw)
        if len({_first(texts.tokenizer, value) for value in values}) == len(values):
            examples = ["".join(ask(each, properties, draw)[:2]) for each in shown]
            found.append(("\n\n".join([*examples, prompt]), answer, values))
    return found


def _first(tokenizer: Any, value: str) -> int:
    return tokenizer(f" {value}")["input_ids"][0]


@torch.no_grad()
def accuracy(model: Any, texts: Texts, asked: Sequence[Question], batch: int = 20) -> dict[str, float]:
    """How often the right value's first token is the likeliest of the three, and of the whole vocabulary."""
    tokenizer, chosen, free = texts.tokenizer, 0, 0
    model.eval()
    ordered = sorted(asked, key=lambda each: len(each[0]))
    for start in range(0, len(ordered), batch):
        part = ordered[start : start + batch]
        inputs = tokenizer([prompt for prompt, _, _ in part], return_tensors="pt", padding=True,
                           return_token_type_ids=False)  # fmt: skip
        with arithmetic(PRECISION):
            logits = model(**inputs).logits[:, -1].float()
        for row, (_, answer, values) in zip(logits, part, strict=True):
            right, tokens = _first(tokenizer, answer.strip()), [_first(tokenizer, value) for value in values]
            chosen += tokens[int(row[tokens].argmax())] == right
            free += int(row.argmax()) == right
    return {"chosen": chosen / len(asked), "free": free / len(asked)}


def instructions(texts: Texts, seed: int, count: int) -> list[Any]:
    """Examples to tune on: questions about the properties that are taught, descriptions, word problems."""
    draw = random.Random(seed)
    rows, problems = texts.halves("e2e_nlg")[1], texts.halves("gsm8k")[1]
    known = [each for each in restaurants(rows) if sum(name in each for name in TAUGHT) >= 3]
    pairs: list[tuple[str, ...]] = []
    for _ in range(count):
        which, each = draw.random(), draw.choice(known)
        if which < 0.6:
            pairs.append(ask(each, draw.sample([name for name in TAUGHT if name in each], 3), draw)[:2])
        else:
            pairs.append(SPECS["e2e_nlg"].texts(draw.choice(rows)) if which < 0.9 else
                         SPECS["gsm8k"].texts(draw.choice(problems)))  # fmt: skip
    records = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    return encode(records, texts.tokenizer, 160, is_encoder_decoder=False)


def run(kind: Kind, texts: Texts, seed: int | None, cache: Path) -> dict[str, Any]:
    """Accuracy by property and number of examples, of the pre-trained model, or of one tuned with a seed."""
    model = native(load(kind, cache))
    if seed is not None:
        set_seed(seed)
        config = TrainingConfig(
            max_steps=STEPS, batch_size=BATCH, learning_rate=RATE, seed=seed, schedule="linear", warmup_ratio=0.1,
            mixed_precision=PRECISION, log_every=10,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            train(model, instructions(texts, seed, STEPS * BATCH), config, folder, resume=False,
                  label=f"{kind.name}, instructions")  # fmt: skip
    return {
        "accuracy": {
            wanted: {str(shots): accuracy(model, texts, questions(texts, wanted, shots)) for shots in SHOTS}
            for wanted in TESTED
        }
    }
