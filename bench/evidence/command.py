"""The options that the commands of all experiments share."""

import argparse
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def parser_of(
    experiment: str, told: str | None, sets: Sequence[str] = (), seeds: Sequence[int] = ()
) -> argparse.ArgumentParser:
    """The command `python -m bench.evidence.<experiment>`.

    Args:
        told: what it does.
        sets: of data, among which `--only` chooses; none: there is one.
        seeds: among which `--seeds` chooses; none: there is no such option.
    """
    parser = argparse.ArgumentParser(prog=f"python -m bench.evidence.{experiment}", description=told)
    parser.add_argument("--data", type=Path, required=True, help="the folder of data sets")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of results")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    if sets:
        parser.add_argument("--only", nargs="+", choices=sets, default=list(sets), help="of these sets")
    if seeds:
        parser.add_argument("--seeds", nargs="+", type=int, choices=seeds, default=list(seeds), help="of these seeds")
    parser.add_argument("--cost", action="store_true", help="measure times and peak memory; needs an idle machine")
    parser.add_argument("--peak-of", help="internal: one side's peak memory, as set/side, in this process")
    return parser
