"""What to say about a name that nobody knows."""

import difflib
from collections.abc import Iterable


def near(name: str, known: Iterable[str]) -> str:
    """What to say behind an unknown name: the known ones that resemble it, or else all of them.

    >>> near("sgd", ["adamw", "sgdm"])
    '; did you mean sgdm?'
    """
    names = [str(each) for each in known]
    found = difflib.get_close_matches(name, names, 3)
    return f"; did you mean {' or '.join(found)}?" if found else f"; known: {', '.join(names)}"
