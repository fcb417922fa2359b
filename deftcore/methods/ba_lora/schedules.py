"""How the weights of BA-LoRA's penalties move over a run's steps."""

import math

from deftcore.ops.checks import check_choice

SCHEDULES = ("constant", "two_phase", "linear_warmup", "quadratic_warmup")
CONSISTENCY_SCHEDULES = ("constant", "cosine", "adaptive")
FLOOR = 0.1  # what is left of the consistency's weight at the end, or for a teacher that knows nothing


def consistency_factor(schedule: str, step: int, steps: int) -> float:
    """The factor of the consistency's weight at a step of `steps`: for "cosine" from 1 to 0.1, else 1.

    >>> [round(consistency_factor("cosine", step, 4), 3) for step in (0, 2, 4)]
    [1.0, 0.55, 0.1]
    """
    check_choice("schedule", schedule, CONSISTENCY_SCHEDULES)
    if schedule != "cosine":
        return 1.0
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))


def adaptive_factor(entropy: float, vocabulary: int) -> float:
    """The factor of the consistency's weight by the teacher's mean entropy: 1 where it is certain, 0.1 where it is
    uniform over the vocabulary."""
    share = entropy / math.log(vocabulary) if vocabulary > 1 else 0.0
    return FLOOR + (1 - FLOOR) * (1 - share)


def rising_factor(schedule: str, step: int, steps: int, warmup_ratio: float = 0.2, ramp_ratio: float = 0.05) -> float:
    """The factor of the other weights: "two_phase" waits for the warm-up and then rises over the ramp, "linear_warmup"
    and "quadratic_warmup" rise over the warm-up; ratios of `steps`, cut to whole steps.

    >>> [rising_factor("two_phase", step, 40) for step in (0, 8, 9, 10, 40)]
    [0.0, 0.0, 0.5, 1.0, 1.0]
    """
    check_choice("schedule", schedule, SCHEDULES)
    if schedule == "constant":
        return 1.0
    warmup = int(warmup_ratio * steps)
    if schedule == "two_phase":
        return min(max(step - warmup, 0) / max(int(ramp_ratio * steps), 1), 1.0)
    share = min(step / max(warmup, 1), 1.0)
    return share if schedule == "linear_warmup" else share**2
