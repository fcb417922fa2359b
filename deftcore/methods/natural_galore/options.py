"""The options of a group of matrices, as a recipe and a param group give them."""

from dataclasses import dataclass, fields
from typing import Any

import torch

from deftcore._names import near
from deftcore.ops.checks import check_choice, check_count, check_number
from deftcore.ops.natural import DAMPING_MODES, FISHER_NORMS
from deftcore.training.fields import option

PROJ_TYPES = ("galore", "natural_galore")
SIDES = ("auto", "left", "right")
PROJECTIONS = ("one_sided", "two_sided")
REFRESHES = ("warm", "exact")
SWITCHES = ("rotate", "keep", "reset")
HISTORY_DTYPES = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}
# What galore-torch's users write: all are plain GaLore there.
_GALORE_TORCH: dict[str, dict[str, str]] = {
    "std": {}, "left": {"side": "left"}, "right": {"side": "right"}, "full": {"projection": "two_sided"}
}  # fmt: skip


@dataclass
class GaloreOptions:
    """Options of GaLore. Raises ValueError or TypeError, naming the field."""

    rank: int | None = option(None, "Of the subspace; None is AdamW on whole gradients.")
    update_proj_gap: int = option(200, "Steps from one subspace to the next.")
    scale: float = option(0.25, "What an update is multiplied with, beside the rate.")
    projection: str = option("one_sided", "one_sided: rows or columns; two_sided: both, so that R is rank x rank.")
    side: str = option("auto", "Of a one-sided subspace: left, right; auto takes the shorter, right at ties.")
    refresh: str = option("warm", "How a subspace is found: warm, from the one before it; exact, by SVD.")
    on_switch: str = option(
        "rotate", "What becomes of the state then: rotate into the new one; keep, as published; reset."
    )
    flatten: bool = option(False, "Whether [out, ...] weights count as [out, rest].")
    stochastic_rounding: bool = option(False, "Of updates into bfloat16 weights.")
    seed: int = option(0, "Of random starts of subspaces, and of stochastic rounding.")

    def __post_init__(self) -> None:
        for name, least in (("rank", 1), ("update_proj_gap", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None or name != "rank":
                check_count(name, value, minimum=least)
        if self.seed >= 2**32:
            raise ValueError(f"seed: must be below 2^32, got {self.seed}")
        self.scale = check_number("scale", self.scale, minimum=0.0, strict=True)
        for name, choices in (
            ("projection", PROJECTIONS), ("side", SIDES), ("refresh", REFRESHES), ("on_switch", SWITCHES)
        ):  # fmt: skip
            check_choice(name, getattr(self, name), choices)
        for name in ("flatten", "stochastic_rounding"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: must be a bool, got {getattr(self, name)!r}")


@dataclass
class NaturalOptions(GaloreOptions):
    """Options of Natural GaLore. Raises ValueError or TypeError, naming the field."""

    natural_history: int = option(20, "Projected gradients in the window, with this step's.")
    history_every: int = option(1, "Keep every so many steps' gradient in the window.")
    history_dtype: str | None = option(None, "Of the window: float32, bfloat16; None is that of the rest of the state.")
    damping: float = option(1e-3, "lambda of the damped Fisher. The paper names none; 1e-3 is the published code's.")
    damping_mode: str = option("absolute", "absolute, as published; relative: times the window's mean squared norm.")
    fisher_norm: str = option("sum", "Over the window: sum, as published; mean.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("natural_history", "history_every"):
            check_count(name, getattr(self, name))
        if isinstance(self.history_dtype, torch.dtype):
            self.history_dtype = str(self.history_dtype).removeprefix("torch.")
        if self.history_dtype not in HISTORY_DTYPES:
            raise ValueError(f"history_dtype: must be None, 'float32' or 'bfloat16', got {self.history_dtype!r}")
        self.damping = check_number("damping", self.damping, minimum=0.0, strict=True)
        check_choice("damping_mode", self.damping_mode, DAMPING_MODES)
        check_choice("fisher_norm", self.fisher_norm, FISHER_NORMS)


@dataclass
class GroupOptions(NaturalOptions):
    """All options of a param group. `proj_type` also takes galore-torch's names, all of which are plain GaLore."""

    proj_type: str = "natural_galore"

    def __post_init__(self) -> None:
        if self.proj_type in _GALORE_TORCH:
            for name, value in _GALORE_TORCH[self.proj_type].items():
                setattr(self, name, value)
            self.proj_type = "galore"
        if self.proj_type not in PROJ_TYPES:
            raise ValueError(
                f"proj_type: no {self.proj_type!r}{near(str(self.proj_type), [*PROJ_TYPES, *_GALORE_TORCH])}"
            )
        super().__post_init__()


OPTION_NAMES = tuple(each.name for each in fields(GroupOptions))


def options_in(group: dict[str, Any]) -> dict[str, Any]:
    """A group's options, checked and in one spelling.

    Raises:
        ValueError, TypeError: naming the option.
    """
    found = GroupOptions(**{name: group[name] for name in OPTION_NAMES if name in group})
    return {name: getattr(found, name) for name in OPTION_NAMES}
