"""The page of `bench.evidence.s2ft`: its prose, fused and served adapters, costs by batch size."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from bench.evidence.command import RESULTS
from bench.evidence.dots import Panel, picture
from bench.evidence.report import MEASURES, Experiment, costs_line, section, values_by_side
from bench.evidence.runs import Entry, Results
from bench.evidence.s2ft import FUSED, SETS, SHARE, SIDES
from bench.evidence.spectral import FULL, LORA_SIDE
from bench.markdown import milliseconds, table

HEAD = f"""# S2FT on a pre-trained model

<!-- Made by `python -m bench.evidence` from the files in bench/evidence/results. Do not edit: the tests compare. -->

`python -m bench.evidence.s2ft --data FOLDER` trains SmolLM2-135M-Instruct on answers to word problems (`gsm8k`) and on
descriptions from data (`e2e_nlg`), as on [the page of other methods](evidence.md): bfloat16 autocast over float32
weights, embeddings and norms frozen, the same examples in the same order for every side. S2FT trains {SHARE:.1%} of the
channels of each down projection, drawn anew in every seed, for the second set others than for the first; that is as
many numbers as LoRA of rank 8 on every linear layer has. DoRA is PEFT's, at LoRA's rank and rate; full training is of
every linear layer. LoRA's and full training's rates are those that `bench.evidence.spectral` chose, S2FT's is the best
of {", ".join(f"{rate:g}" for rate in SIDES[0].rates)} after a quarter of a run on `e2e_nlg`, seed 0.

Loss is nats per held-out answer token. Elsewhere is the loss on 12 sentences of an encyclopaedia, reviews are 24
sentences on films, the other task is `gsm8k`'s held-out answers for `e2e_nlg` and the other way around; each as the
rise over the pre-trained model's. LoRA's and full training's runs that are not in results/s2ft.jsonl are those of
`bench.evidence.spectral`, which were made on another machine and have no reviews and no other task."""

FOUND = """Beside what follows, of S2FT against LoRA at like numbers of trained weights:

- A step of one example takes 0.64 of LoRA's time, 0.51 of full training's, 0.37 of DoRA's (PEFT's).
- Two adapters on different channels become one model for both tasks at a rise of 0.02 to 0.05 (`gsm8k`) and 0.00 to
  0.04 (`e2e_nlg`); the sum of two of LoRA's costs 0.10 to 0.15 on `gsm8k`, two to six times as much, and 0.03 to 0.05
  on `e2e_nlg`. That is as the paper says.
- In a mixed batch each row is as good as alone, to 0.004, with S2FT and with LoRA.
- DoRA's quality, and how S2FT on the same channels fuses, stand in the tables where they were run; what is not there
  was not."""

PAPERS = (
    ("S2FT", "full", "LLaMA-7B to LLaMA3-8B, commonsense: between 0.7 points behind and 3.0 ahead; arithmetic 1.1 "
     "behind to 1.9 ahead"),
    ("S2FT", "LoRA", "commonsense 3.8 to 5.4 points ahead, arithmetic 0.4 to 2.1; less forgetting"),
    ("S2FT", "DoRA", "commonsense 1.4 to 3.7 points ahead, arithmetic 0.6 to 2.1; a step of 7B in about half the time"),
)  # fmt: skip

FUSING = """## Fused, and served to a batch of both tasks

Adapters of both tasks on one base, everything in bfloat16. "alone": the task's own adapter in the weights. "fused":
both adapters' sum in the weights, one model for both tasks. "mixture": batches of both tasks, each row with its own
adapter beside the base (`deftcore.serve`). What stands there is the held-out loss with the own adapter, and by how much
it rises; mean and, in brackets, lowest and highest over seeds. "met" is the share of changed channels that both
adapters change: of S2FT's none, unless both tasks train the same ones. The paper fuses LLaMA3-8B's adapters of
commonsense and arithmetic: S2FT's fall by 2.6 and 4.3 points, where they meet by 4.6 and 7.4, LoRA's by 3.3 and 5.6."""

LIMITS = """## What this cannot show

- Runs are of 20 and 32 steps, 40 and 128 examples: the beginning of a fine-tuning. The paper trains three epochs of
  170,000 examples; what it says of full training being matched is said of the end.
- One model of 135 M weights, that were rounded to 4 bits before, with 24 and 32 held-out answers.
- Exact numbers are of 12 questions in seed 0, and this model is near none right: they say nothing. BLEU is of 24
  prompts.
- The best of S2FT's rates is the highest tried. One more try, at 0.009, ended at 2.222 where 0.003 did at 2.234: a
  higher rate may be a little better.
- S2FT's budget is spent on down projections alone, as the paper does where heads share keys; LoRA's on every layer.
- With three seeds, all agree by chance in one comparison of four."""

PEERS = (LORA_SIDE.name, FULL.name)


class _Joined(Results):
    """Runs, and those of the same protocol that `bench.evidence.spectral` made, where there are none here."""

    def entries(self) -> list[Entry]:
        own = super().entries()
        known = {(each["set"], each["side"], each["seed"]) for each in own if each["kind"] == "run"}
        names = {name for name, *_ in known}
        peers = Results(RESULTS / "spectral.jsonl").find(kind="run")
        return own + [each for each in peers if each["side"] in PEERS and each["set"] in names
                      and (each["set"], each["side"], each["seed"]) not in known]  # fmt: skip


class _Experiment(Experiment):
    @property
    def results(self) -> Results:
        return _Joined(RESULTS / f"{self.name}.jsonl")


EXPERIMENT = _Experiment(
    name="s2ft",
    sides=dict.fromkeys(SETS, SIDES),
    pairs=(("S2FT", "LoRA"), ("S2FT", "DoRA"), ("S2FT", "full"), ("S2FT, same channels", "S2FT")),
    head=f"{HEAD}\n\n{FOUND}",
    papers=PAPERS,
    limits=LIMITS,
)


def page() -> str:
    """The page; empty where nothing has run."""
    entries = EXPERIMENT.results.entries()
    if not any(each["kind"] == "run" for each in entries):
        return ""
    parts = [*_fused(entries), *_costs(RESULTS / "s2ft_batches.json"), LIMITS]
    told = section(replace(EXPERIMENT, limits="\n\n".join(parts)))
    return told.replace("\n### ", "\n## ")


def _fused(entries: Sequence[Entry]) -> Iterator[str]:
    runs = [each for each in entries if each["kind"] == "fused"]
    if not runs:
        return
    yield FUSING
    columns = [f"{name}, {form}" for name in SETS for form in ("alone", "fused", "mixture")]
    rows = []
    for side in FUSED:
        own = [each for each in runs if each["side"] == side.name]
        if own:
            met = f"{own[0]['shared'] / own[0]['channels']:.0%}" if "channels" in own[0] else ""
            rows.append([side.name, len(own), *(cell for name in SETS for cell in _changes(name, own)), met])
    yield table(["loss", "seeds", *columns, "met"], rows)
    yield "Answers, graded, of seed 0: BLEU of 24 prompts, exact numbers of 12 questions."
    graded = [each for each in runs if each["seed"] == 0]
    yield table(
        ["answers", *columns],
        [[each["side"], *(_grade(each[form][name]) for name in SETS for form in ("alone", "fused", "mixture"))]
         for each in graded],
    )  # fmt: skip


def _changes(name: str, runs: Sequence[Entry]) -> Iterator[str]:
    yield _spread([each["alone"][name]["loss"] for each in runs], "{:.3f}")
    for form in ("fused", "mixture"):
        yield _spread([each[form][name]["loss"] - each["alone"][name]["loss"] for each in runs], "{:+.3f}")


def _spread(values: Sequence[float], form: str) -> str:
    whole = form.format(mean(values))
    return whole + (f" ({form.format(min(values))} to {form.format(max(values))})" if len(values) > 1 else "")


def _grade(found: dict[str, float]) -> str:
    return next((MEASURES[key][1].format(found[key]) for key in ("bleu", "exact") if key in found), "")


def _costs(path: Path) -> Iterator[str]:
    if not path.exists():
        return
    cost: dict[str, Any] = json.loads(path.read_text())
    (steps,), peaks = cost["step"].values(), cost["peak_mb"]
    yield "## Time and memory"
    rows = []
    for side, step in steps.items():
        held = (f"{found[side]:.0f} MB" for found in peaks.values())
        rows.append([side, milliseconds(1e3 * step["seconds"]), f"{step['spread']:.0%}", *held])
    columns = ["e2e_nlg", "step of one example", "quartiles apart", *(f"peak, {batch} examples" for batch in peaks)]
    yield table(columns, rows)
    yield costs_line(cost)


def draw(path: Path) -> None:
    """A picture: the loss of every run, and what it cost elsewhere; nothing where nothing has run."""
    entries = EXPERIMENT.results.entries()
    names = [name for name in SETS if any(e["kind"] == "run" and e["set"] == name for e in entries)]
    panels = []
    for name in names:
        (untrained,) = (each["loss"] for each in entries if each["kind"] == "untrained" and each["set"] == name)
        losses, *rises = (values_by_side(SIDES, name, key, entries) for key in ("loss", "forgot", "forgot_task"))
        panels.append(Panel(name, "held-out loss; dashed: untrained", losses, untrained))
        panels += [
            Panel(name, what, values)
            for what, values in zip(("rise of the loss elsewhere", "rise on the other task"), rises, strict=True)
        ]
    if panels:
        picture(path, [SIDES] * len(panels), panels)
