"""What to say about a name that nobody knows."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path


def near(name: str, known: Iterable[str]) -> str:
    """What to say behind an unknown name: the known ones that resemble it, or else all of them.

    >>> near("sgd", ["adamw", "sgdm"])
    '; did you mean sgdm?'
    """
    names = [str(each) for each in known]
    found = difflib.get_close_matches(name, names, 3)
    return f"; did you mean {' or '.join(found)}?" if found else f"; known: {', '.join(names)}"


def final_instead(folder: str | os.PathLike, file: str) -> str:
    """What to say behind a folder without a file, where it is a run's whose final/ has it."""
    final = Path(folder) / "final"
    return f"; did you mean {final}?" if (final / file).is_file() else ""
