"""The page of models that are no language models: what a side is, and how well it did, without losses of an untrained
model to set beside it."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.evidence.dots import Panel, picture
from bench.evidence.report import MEASURES, RESULTS, Claim, cell, costs_line, machine, values_by_side, verdict
from bench.evidence.runs import Entry, Results
from bench.evidence.sides import Side
from bench.markdown import milliseconds, table


@dataclass(frozen=True)
class Adapted:
    """What a section tells of.

    Args:
        name: of its file: results/<name>.jsonl.
        sides: in order.
        measures: keys of `report.MEASURES`.
        drawn: the one of the picture, a share.
        pairs: sides whose runs of one seed are compared.
        head, papers, limits: prose: what was done, what the papers say, what this cannot show.
        claims: what came out, in short.
        costs_of: the name in the file of costs that a set of runs stands under.
    """

    name: str
    sides: Sequence[Side]
    measures: Sequence[str]
    drawn: str
    pairs: Sequence[tuple[str, str]]
    head: str
    papers: str
    limits: str
    claims: Sequence[Claim] = ()
    costs_of: Callable[[str], str] = lambda name: name

    @property
    def results(self) -> Results:
        """Its runs."""
        return Results(RESULTS / f"{self.name}.jsonl")

    def cost(self) -> dict[str, Any]:
        """Step times and peaks; empty where they were not measured."""
        path = RESULTS / f"{self.name}_cost.json"
        return json.loads(path.read_text()) if path.exists() else {}


def adapted_section(told: Adapted) -> str:
    """A section of the page.

    Raises:
        ValueError: a claim that does not follow from the runs.
    """
    entries = told.results.entries()
    runs = [_finite(each) for each in entries if each["kind"] == "run"]
    for claim in told.claims:
        claim.check(runs)
    parts = [told.head]
    if told.claims:
        parts += ["What came out:\n\n" + "\n".join(f"- {claim.text}" for claim in told.claims)]
    parts += [f"![{MEASURES[told.drawn][0]} of every run](evidence-{told.name}.png)"]
    for name in dict.fromkeys(each["set"] for each in runs):
        own = [each for each in runs if each["set"] == name]
        parts += [f"### {name}", *_of_set(told, own, told.cost())]
    if cost := told.cost():
        parts += [costs_line(cost)]
    parts += ["### What the papers say", told.papers, told.limits, machine(entries)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def shares(told: Adapted, path: Path) -> None:
    """A picture of the drawn measure of every run."""
    entries = told.results.entries()
    names = dict.fromkeys(each["set"] for each in entries if each["kind"] == "run")
    panels = []
    for name in names:
        values = values_by_side(told.sides, name, told.drawn, entries)
        percent = [[100 * value for value in own] for own in values]
        panels.append(Panel(name, f"{MEASURES[told.drawn][0]}, %", percent))
    picture(path, [told.sides] * len(panels), panels)


def _finite(entry: Entry) -> Entry:
    return {k: v for k, v in entry.items() if not isinstance(v, float) or math.isfinite(v)}


def _of_set(told: Adapted, runs: Sequence[Entry], cost: Mapping[str, Any]) -> Iterator[str]:
    costs = told.costs_of(runs[0]["set"])
    steps, peaks = cost.get("step", {}).get(costs, {}), cost.get("peak_mb", {}).get(costs, {})
    rows = []
    for side in told.sides:
        own = [each for each in runs if each["side"] == side.name]
        if own:
            took = [each["train_s"] for each in own if "train_s" in each]
            row = [
                side.name,
                len(own),
                f"{own[0]['rate']:g}",
                f"{own[0]['trained']:,}",
                f"{min(took, default=0):.0f} s",
            ]
            row += [milliseconds(1e3 * steps[side.name]["seconds"]), f"{peaks[side.name]:.0f} MB"] if steps else []
            rows.append([*row, *(cell(key, own) for key in told.measures)])
    columns = ["trained", "training, fastest", *(["step", "peak"] if steps else [])]
    yield table(["", "seeds", "rate", *columns, *(MEASURES[key][0] for key in told.measures)], rows)
    said = {pair: verdict(*pair, runs, told.measures) for pair in told.pairs}
    if any(said.values()):
        yield "\n".join(f"- {a} against {b}: {', '.join(found)}." for (a, b), found in said.items() if found)
