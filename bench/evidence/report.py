"""Tables, verdicts and pictures from the files of an experiment."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from bench.evidence.command import RESULTS
from bench.evidence.dots import Panel, picture
from bench.evidence.runs import Entry, Results
from bench.evidence.sets import SPECS
from bench.evidence.sides import Side
from bench.markdown import milliseconds, table

# How large what a run trained was: its column, how a value reads.
SIZES = {
    "trained": ("trained", lambda numbers: f"{numbers / 1e6:.2f} M"),
    "state_bytes": ("state", lambda held: f"{held / 1e6:.1f} MB"),
    "base": ("base", lambda numbers: f"{numbers / 1e6:.1f} M"),
}
# What a run measured: its column, how a value reads, whether less is better.
MEASURES = {
    "loss": ("loss", "{:.3f}", True),
    "accuracy": ("accuracy", "{:.1%}", False),
    "mean_class_accuracy": ("mean class accuracy", "{:.1%}", False),
    "macro_f1": ("macro F1", "{:.1%}", False),
    "matthews": ("Matthews", "{:.3f}", False),
    "density": ("density", "{:.1%}", True),
    "zeros": ("zeros", "{:.1%}", False),
    "thresholded": ("accuracy thresholded", "{:.1%}", False),
    "energy": ("energy proxy", "{:.2f}", True),
    "density_coarse": ("density, coarse", "{:.1%}", True),
    "thresholded_coarse": ("accuracy thresholded, coarse", "{:.1%}", False),
    "bleu": ("BLEU", "{:.1f}", False),
    "exact": ("exact number", "{:.0%}", False),
    "forgot": ("loss elsewhere, rise", "{:+.3f}", True),
    "forgot_reviews": ("loss on reviews, rise", "{:+.3f}", True),
    "forgot_task": ("loss on the other task, rise", "{:+.3f}", True),
    "drift": ("drift elsewhere", "{:.3f}", True),
}


@dataclass(frozen=True)
class Claim:
    """A sentence, and the comparisons that it follows from.

    Args:
        text: the sentence.
        ours, other: the sides.
        measure: a key of `MEASURES`.
        verdicts: by set "better", "worse" or "disagree".
    """

    text: str
    ours: str
    other: str
    measure: str
    verdicts: Mapping[str, str]

    def check(self, entries: Sequence[Entry]) -> None:
        """Raises ValueError where the runs say something else."""
        for name, wanted in self.verdicts.items():
            runs = [each for each in entries if each["kind"] == "run" and each["set"] == name]
            said = verdict(self.ours, self.other, runs, [self.measure])
            if not any(wanted in each for each in said):
                raise ValueError(f"claim: {self.text!r} needs {wanted!r} on {name}, the runs say {said}")


def claims(experiment: str) -> list[Claim]:
    """Those of claims.yaml."""
    return [Claim(**values) for values in _claims().get(experiment, ())]


@cache
def _claims() -> dict[str, list[dict[str, Any]]]:
    return yaml.safe_load(Path(__file__).with_name("claims.yaml").read_text())


@dataclass(frozen=True)
class Experiment:
    """What a page tells of.

    Args:
        name: of its files: results/<name>.jsonl, results/<name>_cost.json, docs/evidence-<name>.png.
        sides: by set.
        pairs: sides whose runs of one seed are compared: ours, and what it is measured against.
        head, limits: prose: what was done, what this cannot show.
        papers: claims of the papers, each of two sides: ours, other, the claim.
        extras: prose above the table of sides that ran once; "" for none.
    """

    name: str
    sides: Mapping[str, Sequence[Side]]
    pairs: Sequence[tuple[str, str]]
    head: str
    papers: Sequence[tuple[str, str, str]]
    limits: str
    extras: str = ""

    @property
    def claims(self) -> list[Claim]:
        """What came out, in short."""
        return claims(self.name)

    @property
    def results(self) -> Results:
        """Its runs."""
        return Results(RESULTS / f"{self.name}.jsonl")

    def cost(self) -> dict[str, Any] | None:
        """Step times and peaks, where they were measured."""
        path = RESULTS / f"{self.name}_cost.json"
        return json.loads(path.read_text()) if path.exists() else None


def section(experiment: Experiment) -> str:
    """An experiment's part of the page.

    Raises:
        ValueError: a claim that does not follow from the runs.
    """
    entries = experiment.results.entries()
    cost = experiment.cost()
    for claim in experiment.claims:
        claim.check(entries)
    parts = [experiment.head]
    parts += ["What came out:\n\n" + "\n".join(f"- {claim.text}" for claim in experiment.claims)] * bool(
        experiment.claims
    )
    parts += [f"![losses of every run; arrows: above the untrained model's](evidence-{experiment.name}.png)"]
    for name in experiment.sides:
        runs = [each for each in entries if each["kind"] == "run" and each["set"] == name]
        if runs:
            parts += [f"### {name}, {SPECS[name].base.name}", *_of_set(experiment, name, entries, runs)]
    if experiment.extras and (extras := [each for each in entries if each["kind"] == "extra"]):
        parts += [experiment.extras, _extras(extras)]
    if cost is not None:
        parts += ["### Time and memory", *_costs(cost)]
    parts += ["### What the papers claim", _beside(experiment, entries)]
    parts += [experiment.limits, machine(entries)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _of_set(experiment: Experiment, name: str, entries: list[Entry], runs: list[Entry]) -> Iterator[str]:
    spec = SPECS[name]
    texts = "texts" if spec.classes else "answers"
    yield (
        f"{spec.steps} steps of {spec.batch_size} examples; {spec.test} held-out {texts}. Mean and, in brackets, "
        "lowest and highest over seeds."
    )
    measured, sized = ([key for key in kinds if any(key in each for each in runs)] for kinds in (MEASURES, SIZES))
    rows = []
    untrained = [each for each in entries if each["kind"] == "untrained" and each["set"] == name]
    if untrained:
        rows.append(["*untrained*", "", "", *[""] * len(sized), *(cell(key, untrained[:1]) for key in measured)])
    for side in experiment.sides[name]:
        own = [each for each in runs if each["side"] == side.name]
        if not own:
            continue
        rate = f"{own[0]['rate']:g}" + " (edge)" * (own[0]["rate"] in (*side.rates[:1], *side.rates[-1:]))
        sizes = (next((SIZES[key][1](each[key]) for each in own if key in each), "") for key in sized)
        rows.append([side.name, len(own), rate, *sizes, *(cell(key, own) for key in measured)])
    columns = [*(SIZES[key][0] for key in sized), *(MEASURES[key][0] for key in measured)]
    yield table(["", "seeds", "rate", *columns], rows)
    said = {f"{ours} against {other}": verdict(ours, other, runs, measured) for ours, other in experiment.pairs}
    if any(said.values()):
        yield "\n".join(f"- {pair}: {', '.join(found)}." for pair, found in said.items() if found)


def cell(key: str, entries: Sequence[Entry]) -> str:
    """A measure of a side's runs: mean, and lowest and highest over seeds."""
    _, form, _ = MEASURES[key]
    values = [each[key] for each in entries if key in each]
    if not values:
        return "diverged" if any("diverged" in each for each in entries) else ""
    if len(values) == 1:
        return form.format(values[0])
    return f"{form.format(mean(values))} ({form.format(min(values))} to {form.format(max(values))})"


def verdict(ours: str, other: str, runs: Sequence[Entry], measured: Sequence[str]) -> list[str]:
    """What the seeds that both sides have say of two sides: they saw the same examples in the same order."""
    by_seed = [{each["seed"]: each for each in runs if each["side"] == name} for name in (ours, other)]
    said = []
    for key in measured:
        column, form, less = MEASURES[key]
        pairs = [(by_seed[0][seed].get(key), each.get(key)) for seed, each in by_seed[1].items() if seed in by_seed[0]]
        differences = [a - b for a, b in pairs if a is not None and b is not None]
        if len(differences) < 2:
            continue
        better = {(difference < 0) == less for difference in differences if difference}
        agree = len(better) == 1 and all(differences)
        what = f"{'better' if better.pop() else 'worse'} in all {len(differences)} seeds" if agree else "seeds disagree"
        signed = form if "+" in form else form.replace(":", ":+")
        said.append(f"{column} {signed.format(mean(differences))} ({what})")
    return said


def _beside(experiment: Experiment, entries: list[Entry]) -> str:
    rows = []
    for ours, other, claim in experiment.papers:
        here, cheaper = [], []
        for name in experiment.sides:
            runs = [each for each in entries if each["kind"] == "run" and each["set"] == name]
            found = verdict(ours, other, runs, ["bleu" if SPECS[name].references else "accuracy", "loss"])
            here += [f"{name}: {', '.join(found)}"] if found else []
            ratios = list(_ratios(ours, other, runs, _costs_by(experiment.cost() or {}, name)))
            cheaper += [f"{name}: {', '.join(ratios)}"] if ratios else []
        rows.append([f"{ours} against {other}", claim, "; ".join(here) or "too few runs", "; ".join(cheaper)])
    return table(["", "paper", "here", "size and cost here"], rows)


def _ratios(ours: str, other: str, runs: list[Entry], costs: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """How many times as large or as dear one side is as another."""
    sizes = {SIZES[key][0]: {each["side"]: each[key] for each in runs if key in each} for key in SIZES}
    for column, values in (sizes | costs).items():
        if ours in values and other in values and values[ours] != values[other]:
            yield f"{column} {values[ours] / values[other]:.2f}x"


def _extras(extras: list[Entry]) -> str:
    measured = [key for key in MEASURES if any(key in each for each in extras)]
    rows = [
        [each["side"], f"{each['rate']:g}", *(cell(key, [each]) for key in measured)]
        for each in sorted(extras, key=lambda each: each["side"])
    ]
    return table(["", "rate", *(MEASURES[key][0] for key in measured)], rows)


def _costs_by(cost: dict[str, Any], name: str) -> dict[str, dict[str, float]]:
    """What was measured on a set, by what it is and by side: seconds, and MB of the peak."""
    if name not in cost.get("step", {}):
        return {}
    found = {"step": {side: step["seconds"] for side, step in cost["step"][name].items()}}
    found |= {f"inference of {count}": each for count, each in cost.get("inference", {}).get(name, {}).items()}
    found |= {"training": cost["training"][name]} if "training" in cost else {}
    return found | {"peak": cost["peak_mb"].get(name, {})}


def _costs(cost: dict[str, Any]) -> Iterator[str]:
    for name, steps in cost["step"].items():
        columns = _costs_by(cost, name)
        rows = [
            [side, *(_cost(column, values[side]) if side in values else "" for column, values in columns.items()),
             f"{step['spread']:.0%}", f"{step['first']:.1f} s"]
            for side, step in steps.items()
        ]  # fmt: skip
        title = f"{name}, {SPECS[name].batch_size} examples"
        yield table([title, *columns, "quartiles of steps apart", "first step"], rows)
    yield (
        costs_line(cost)
        + " The first step finds subspaces, where a method has them."
        + " Training is all steps, the first phase's and the cut among them; its peak is the larger of the two phases'."
        * ("training" in cost)
    )


def costs_line(cost: Mapping[str, Any]) -> str:
    """How steps and peaks were measured."""
    return (
        f"Steps and peaks: {cost['about']['machine']}, {cost['threads']} thread{'s' if cost['threads'] > 1 else ''}, "
        "with nothing beside; sides alternate in one process; medians. Peaks are of two steps in a process for each "
        "side, on one thread."
    )


def _cost(column: str, value: float) -> str:
    return f"{value:.0f} MB" if column == "peak" else f"{value:.1f} s" if value >= 10 else milliseconds(1e3 * value)


def machine(entries: Sequence[Entry]) -> str:
    """Where an experiment's runs were made."""
    about = next(each for each in entries if each["kind"] == "about")
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return f"Machine: {about['machine']}. Versions: {versions}."


def losses(experiment: Experiment, path: Path) -> None:
    """A picture of the loss of every run."""
    entries = experiment.results.entries()
    names = [name for name in experiment.sides if any(e["kind"] == "run" and e["set"] == name for e in entries)]
    panels = [
        Panel(
            name,
            "held-out loss; dashed: untrained",
            values_by_side(experiment.sides[name], name, "loss", entries),
            next(each["loss"] for each in entries if each["kind"] == "untrained" and each["set"] == name),
        )
        for name in names
    ]
    picture(path, [experiment.sides[name] for name in names], panels)


def values_by_side(sides: Sequence[Side], name: str, measure: str, entries: Sequence[Entry]) -> list[list[float]]:
    """A measure of each side's runs on a set."""
    runs = [each for each in entries if each["kind"] == "run" and each["set"] == name and measure in each]
    return [[each[measure] for each in runs if each["side"] == side.name] for side in sides]
