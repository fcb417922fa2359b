"""Which of the processes that a launcher started this is."""

import os


def is_first_process() -> bool:
    """Whether this is the one that speaks."""
    return int(os.environ.get("RANK", "0")) == 0
