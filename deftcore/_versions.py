"""The releases of other packages that deftcore is tested with: the one table; pyproject.toml's ranges agree with it.

`python deftcore/_versions.py` prints the oldest ones as pip takes them.
"""

import re
import warnings
from importlib import metadata
from typing import NamedTuple


class Tested(NamedTuple):
    """A package's range as pyproject.toml has it, and the two releases that the tests run with."""

    allowed: str
    oldest: str
    newest: str


TESTED: dict[str, Tested] = {
    "torch": Tested(">=2.11", "2.13.0", "2.13.0"),
    "transformers": Tested(">=5.15,<6", "5.15.0", "5.24.0"),
    "peft": Tested(">=0.21,<0.22", "0.21.0", "0.21.2"),
    "accelerate": Tested(">=1.15", "1.15.0", "1.15.0"),
    "bitsandbytes": Tested("==0.50.2", "0.50.2", "0.50.2"),
}
_warned: set[str] = set()


def installed(name: str) -> str:
    """The version of an installed package, "" without it; nothing is imported."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def describe() -> dict[str, str]:
    """Of each package what is installed and what is tested."""
    found = {}
    for name, tested in TESTED.items():
        ends = " to ".join(dict.fromkeys((tested.oldest, tested.newest)))
        found[name] = f"{installed(name) or 'not installed'} (tested: {ends}; allowed: {tested.allowed})"
    return found


def warn_untested(*names: str) -> None:
    """One warning for those of the packages that are newer than tested, by their minor version, or too old to use."""
    odd = []
    for name in set(names) - _warned:
        version, tested = installed(name), TESTED[name]
        lowest = tested.allowed.split(",")[0].lstrip(">=")
        if version and _minor(version) > _minor(tested.newest):
            odd.append(f"{name} {version} is newer than {tested.newest}")
        elif version and _minor(version) < _minor(lowest):
            odd.append(f"{name} {version} is older than {lowest}")
    _warned.update(names)
    if odd:
        warnings.warn(f"deftcore is not tested with what is installed: {'; '.join(sorted(odd))}", stacklevel=3)


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


if __name__ == "__main__":
    print(*(f"{name}=={tested.oldest}" for name, tested in TESTED.items()))
