"""The page of `bench.evidence.qlora`."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from bench.evidence.command import RESULTS
from bench.evidence.dots import Panel, picture
from bench.evidence.qlora import BASES, SETS, SIDES
from bench.evidence.report import claims, machine
from bench.evidence.runs import Entry, Results
from bench.evidence.sides import Side
from bench.markdown import table

HEAD = """# QLoRA on a pre-trained model

<!-- Made by `python -m bench.evidence` from the files in bench/evidence/results. Do not edit: the tests compare. -->

The paper (Dettmers et al., arXiv 2305.14314) says that LoRA on every linear layer over a base in NF4 reaches what LoRA
over 16 bits does, that NF4 is better than FP4, and that double quantisation costs nothing and saves 0.37 bits a weight.
It does not say what becomes of the adapter when it is merged.

`python -m bench.evidence.qlora --data FOLDER` trains SmolLM2-135M-Instruct on descriptions from data (`e2e_nlg`, 32
steps of 4) and on answers to word problems (`gsm8k`, 20 steps of 2), with LoRA of rank 8 on every linear layer, at the
rate that LoRA over float32 was found to like, bfloat16 autocast; the same examples in the same order for every side."""

FORMS = {
    "loss": "adapter beside the base",
    "sixteen": "merged, bfloat16",
    "four": "merged, NF4 again",
    "original": "adapter on the float32 weights",
}

# Beside the claims that are checked.
FOUND = """- NF4 is better than FP4, as the paper says.
- Merged into bfloat16 the tuned model is what it was, to 0.004.
- Merged into 4 bits again it is lost: 2 to 7 % of the update is kept, and between 56 and 84 % of what training gained
  are gone. Serve the adapter beside the 4-bit base, or merge into 16 bits. What was trained over float32 and quantised
  after it fares far better, and loses 12 to 22 %: there weights do not lie on code points, to which a small update is
  rounded back.
- On the unquantised weights the adapter of NF4 is better than on its own base on `gsm8k`, by 0.02 to 0.05 in every
  seed; on `e2e_nlg` seeds disagree."""

_SHORT = {"loss": "beside", "sixteen": "bfloat16", "four": "NF4 again", "original": "on float32"}

READING = """The adapter beside the base is the model as it trained. Merged into bfloat16 the base is decoded and the
update added (`deftcore.merge`); NF4 again is that sum quantised once more, with double quantisation where the base had
it or was float32. Then what was trained over 4 bits, on the weights as they were before they were quantised. Nats per
held-out answer token: mean and, in brackets, lowest and highest over seeds. "kept" is the share of the update that is
in the weights after the merge into 4 bits, its projection; a mean over layers."""

LIMITS = """## What this cannot show

- The weights come from a file of 4 bits (Q4_1, blocks of 32) and are "float32" only as its decoded values: NF4 rounds
  rounded weights.
- 24 and 32 held-out answers, one model of 135 M weights, one rate; small models lose more to 4 bits than large ones.
- The updates are of 20 and 32 steps at a high rate; longer training at lower rates changes weights by other amounts,
  and 4 bits keep the less of an update, the smaller it is.
- Peaks are of a model whose head and embeddings, a fifth of its weights, stay in float32 while it trains."""


def page() -> str:
    """The page; empty where nothing has run."""
    entries = Results(RESULTS / "qlora.jsonl").entries()
    if not any(each["kind"] == "run" for each in entries):
        return ""
    for claim in claims("qlora"):
        claim.check(entries)
    found = [*(f"- {claim.text}" for claim in claims("qlora")), FOUND]
    parts = [HEAD, "What came out of three seeds:\n\n" + "\n".join(found)]
    parts += ["![loss of every form of every run](evidence-qlora.png)", "## The base alone", _bases(entries)]
    parts += ["## After training", READING]
    for name in SETS:
        rows = list(_rows(name, entries))
        if rows:
            parts.append(table([name, "seeds", *FORMS.values(), "kept"], rows))
    parts += ["## Size", *_sizes(entries, RESULTS / "qlora_cost.json"), LIMITS, machine(entries)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _bases(entries: Sequence[Entry]) -> str:
    found = {(each["side"], each["set"]): each for each in entries if each["kind"] == "base"}
    rows = []
    for form in BASES:
        own = [found[form, name] for name in SETS if (form, name) in found]
        if own:
            losses = (_change(found, form, name) for name in SETS)
            rows.append([form, *losses, f"{own[0]['bytes'] / 1e6:.0f} MB"])
    told = "What is not a linear layer of the blocks, and all arithmetic, is bfloat16 but in the first line."
    return table(["", *(f"{name}, loss" for name in SETS), "tensors"], rows) + f"\n\n{told}"


def _change(found: dict[tuple[str, str], Entry], form: str, name: str) -> str:
    if (form, name) not in found:
        return ""
    loss, exact = found[form, name]["loss"], found.get(("float32", name), {}).get("loss")
    return f"{loss:.3f}" + (f" ({loss / exact - 1:+.1%})" if exact and form != "float32" else "")


def _rows(name: str, entries: Sequence[Entry]) -> Iterator[list[Any]]:
    runs = [each for each in entries if each["kind"] == "run" and each["set"] == name]
    for side in SIDES:
        own = [each for each in runs if each["side"] == side.name]
        if own:
            kept = [each["kept"] for each in own if "kept" in each]
            cells = (_spread([each[form] for each in own if form in each]) for form in FORMS)
            yield [side.name, len(own), *cells, f"{mean(kept):.0%}" if kept else ""]


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "".join(f"{value:.3f}" for value in values)
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _sizes(entries: Sequence[Entry], path: Path) -> Iterator[str]:
    peaks = json.loads(path.read_text())["peak_mb"]["e2e_nlg"] if path.exists() else {}
    rows = []
    for side in SIDES:
        own = next((each for each in entries if each["kind"] == "run" and each["side"] == side.name), None)
        if own is not None:
            sizes = (f"{own[key] / 1e6:.0f} MB" for key in ("bytes", "sixteen_bytes", "four_bytes"))
            rows.append([side.name, *sizes, *([f"{peaks[side.name]:.0f} MB"] if peaks else [])])
    yield table(["", *list(FORMS.values())[:3], *(["peak while training"] if peaks else [])], rows)
    yield (
        "Bytes of the tensors as they are measured: what is not in 4 bits, embeddings among it, is float32 where the "
        "adapter stands beside the base, and bfloat16 in what was merged."
        + " Peaks are of two steps of 4 examples of `e2e_nlg` in a process for each side, on one thread."
        * bool(peaks)
    )


def draw(path: Path) -> None:
    """A picture: the loss of every form of every run; nothing where nothing has run."""
    entries = Results(RESULTS / "qlora.jsonl").entries()
    rows = [(side, key, told) for side in SIDES for key, told in _SHORT.items()]
    panels, shown = [], []
    for name in SETS:
        runs = [each for each in entries if each["kind"] == "run" and each["set"] == name]
        values = {
            (side.name, told): [each[key] for each in runs if each["side"] == side.name and key in each]
            for side, key, told in rows
        }
        if runs:
            own = [(side, told) for side, _, told in rows if values[side.name, told]]
            shown.append([Side(f"{side.name}: {told}", "lora", (), color=side.color) for side, told in own])
            panels.append(Panel(name, "held-out loss", [values[side.name, told] for side, told in own]))
    if panels:
        picture(path, shown, panels)
