"""The page of `bench.evidence.thresholds`: prose, tables and a picture from its runs."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from bench.evidence.command import RESULTS
from bench.evidence.report import machine
from bench.evidence.runs import Entry, Results
from bench.evidence.thresholds import CALIBRATION, DECODED, GRID, RATE, SETS, SIDES, TEST
from bench.markdown import table

HEAD = f"""## Thresholds on a SwiGLU model

`python -m bench.evidence.thresholds --data FOLDER`: SmolLM2-135M-Instruct, whose SiLU has no zeros, as it is and tuned
by LoRA of rank 8 on every linear layer (rate {RATE:g}, all sides alike). Thresholds leave a share of each block's
neurons; they are chosen on {CALIBRATION} training examples, and loss and density are those of {TEST} held-out ones.
"product" is gate times up and spares rows of the down projection, "gate" spares those of the up projection too;
"each" is a threshold for each neuron, by the norm of its column of W_down. Sides named after a criterion trained
under its thresholds for each neuron, 0.3 of the product or 0.5 of the gate, those with DEFT under its loss besides;
"ReLU" has ReLU in the place of SiLU and learns from the original model's logits too."""

FOUND = """What came out of the first seed on gsm8k, over LoRA's dense model:

- Training under the thresholds halves what they cost: 0.3 of the product +5 % in place of +9 %, 0.5 by the gate +8 % in
  place of +19 %. The 3 % that were hoped for are not reached in 80 steps.
- DEFT's loss besides changes nothing at these densities.
- ReLU in the place of SiLU leaves a third of the neurons, at +72 %: so few steps do not bring the model back.
- Decoding in 4 bits gains 0.99x to 1.18x from thresholds on one thread, and loses on two, in a model of 576 by 1536.
  On one thread the MLPs take half of a token's time, with activations in int8 three fifths; the rest is the head of
  49,152 words, which is in float32 unless activations are in int8, and attention. So half of the neurons by the gate
  would bring 1.2x if their weights were all that counts, with int8 1.25x. Times are of a machine with other guests."""

LIMITS = """### What this cannot show

- Runs are of 80 steps, some hundred examples: less than an epoch. Swapped activations need far more to come back; what
  ProSparse and others trained on are billions of tokens.
- One model, whose weights were rounded to 4 bits before, and one rate for all sides, LoRA's.
- Densities are of single tokens; a batch reads the union of its tokens' neurons."""


def section(results: Path = RESULTS) -> str:
    """The experiment's part of the page; empty where nothing has run."""
    entries = Results(results / "thresholds.jsonl").entries()
    if not any(each["kind"] == "run" for each in entries):
        return ""
    parts = [HEAD, FOUND, "![density and loss of every side](evidence-thresholds.png)"]
    for name in SETS:
        rows = list(_rows(name, entries))
        if rows:
            columns = [label(criterion, each, d) for criterion, each, densities in GRID for d in densities]
            parts += [f"### {name}, density and loss", "Held-out loss over that of LoRA's dense model of the same "
                      "seed, less one: mean over seeds and, in brackets, lowest and highest.",
                      table(["", "seeds", "dense", *columns], rows)]  # fmt: skip
    cost = results / "thresholds_cost.json"
    if cost.exists():
        parts += ["### Decoding in 4 bits", _cost(json.loads(cost.read_text()))]
    return "\n\n".join(part.strip() for part in [*parts, LIMITS, machine(entries)]) + "\n"


def label(criterion: str, each: bool, density: float) -> str:
    """A column's name."""
    return f"{criterion} {density:g}" + ", each" * each


def _rows(name: str, entries: Sequence[Entry]) -> Iterator[list[Any]]:
    runs = [each for each in entries if each["kind"] == "run" and each["set"] == name]
    dense = {each["seed"]: each["loss"] for each in runs if each["side"] == SIDES[0].name}
    for side in SIDES:
        own = [each for each in runs if each["side"] == side.name and each["seed"] in dense]
        if not own:
            continue
        values = [[each["loss"] / dense[each["seed"]] - 1 for each in own]]
        for criterion, scaled, densities in GRID:
            values += [[loss_at(e, criterion, scaled, d) / dense[e["seed"]] - 1 for e in own] for d in densities]
        yield [side.name, len(own), *(_spread(each) for each in values)]
    for each in entries:
        if each["kind"] == "untrained" and each["set"] == name:
            changes = [loss_at(each, c, s, d) / each["loss"] - 1 for c, s, densities in GRID for d in densities]
            yield [
                "*untrained*, over its own dense loss",
                "",
                f"{each['loss']:.3f} nats",
                *(f"{c:+.1%}" for c in changes),
            ]


def loss_at(entry: Entry, criterion: str, scaled: bool, target: float) -> float:
    """A model's loss at one of the points."""
    wanted = {"criterion": criterion, "scaled": scaled, "target": target}
    return next(p["loss"] for p in entry["points"] if all(p[name] == value for name, value in wanted.items()))


def _spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:+.1%}"
    return f"{mean(values):+.1%} ({min(values):+.1%} to {max(values):+.1%})"


def _cost(cost: dict[str, Any]) -> str:
    threads = sorted(name for name in cost if name.startswith("threads_"))
    rows = []
    for name in cost["reasons"]:
        side, *_ = name.partition(",")
        dense = "dense" + name[len(side) :]
        bound = [f"{_bound(cost, t, side, dense):.2f}x" if side in DECODED else "" for t in threads]
        rates = [cost[t][name] for t in threads]
        over = [f"{rate / cost[t][dense]:.2f}x" for rate, t in zip(rates, threads, strict=True)]
        density = f"{cost['densities'][side]:.2f}" if side in DECODED else ""
        rows.append([name, density, *(f"{rate:.0f}" for rate in rates), *over, *bound, cost["reasons"][name]])
    counts = ["1 thread" if t == "threads_1" else f"{t.partition('_')[2]} threads" for t in threads]
    titles = [f"{what}, {count}" for what in ("tokens/s", "over dense", "by weights left") for count in counts]
    return table(["", "density", *titles, "why not natively"], rows) + (
        '\n\n"no MLP" reads no weight of any MLP, the rest and the head alone. "by weights left" is what the density '
        "would give if an MLP took the share of its time that is left of its weights. "
        f"{cost['about']['machine']}; sides alternate in one process; medians of 5."
    )


def _bound(cost: dict[str, Any], threads: str, side: str, dense: str) -> float:
    """What a side could gain over dense decoding."""
    all_of_it, rest = 1 / cost[threads][dense], 1 / cost[threads][dense.replace("dense", "no MLP")]
    matrices = DECODED[side][2]
    left = (3 - matrices + matrices * cost["densities"][side]) / 3
    return all_of_it / (rest + left * (all_of_it - rest))


def draw(path: Path, results: Path = RESULTS) -> None:
    """A picture: density and loss of every side's runs, mean over seeds, a panel for each set and criterion."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    entries = Results(results / "thresholds.jsonl").entries()
    names = [n for n in SETS if any(e["kind"] == "run" and e["set"] == n for e in entries)]
    if not names:
        return
    figure, axes = plt.subplots(len(names), 2, figsize=(8, 3.2 * len(names)), layout="constrained", squeeze=False)
    for line, name in zip(axes, names, strict=True):
        for axis, criterion in zip(line, ("product", "gate"), strict=True):
            _panel(axis, name, criterion, entries)
    axes[0][0].legend(fontsize=6)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _panel(axis: Any, name: str, criterion: str, entries: Sequence[Entry]) -> None:
    for side in SIDES:
        runs = [e for e in entries if e["kind"] == "run" and e["set"] == name and e["side"] == side.name]
        targets = [(s, d) for c, s, densities in GRID if c == criterion for d in densities]
        for scaled, style in ((False, "o-"), (True, "s:")):
            own = [d for s, d in targets if s == scaled]
            if runs and own:
                losses = [mean(loss_at(each, criterion, scaled, d) for each in runs) for d in own]
                axis.plot(own, losses, style, color=side.color, markersize=4, label=None if scaled else side.name)
    axis.set_title(f"{name}, by the {criterion}", fontsize=9)
    axis.set_xlabel("density", fontsize=8)
    axis.set_ylabel("held-out loss", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(color="#eeeeee")
