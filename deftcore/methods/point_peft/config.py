"""The config of Point-PEFT."""

import math
import os
from dataclasses import dataclass
from typing import Any

from peft import PeftConfig

from deftcore.methods.point_peft.bank import MemoryBank
from deftcore.ops.checks import check_count
from deftcore.training.adapters import MethodName
from deftcore.training.fields import option

_CHOICES = {
    "prompts": ("token", "gated", "none"),
    "local_scale": ("width", "head"),
    "pooling": ("max", "max+mean"),
    "init": ("identity", "reference"),
}
_COUNTS = ("prompt_tokens", "prompt_rank", "rank", "local_width", "local_heads")
_OPTIONAL_COUNTS = ("local_centres", "local_neighbours", "propagation_neighbours")


@dataclass
class PointPeftConfig(PeftConfig):
    """Config of Point-PEFT. The defaults are the paper's for ScanObjectNN, but for `init`.

    Raises ValueError, naming the field, on a value out of range; TypeError on a bank that is none.
    """

    prompts: str = option("token", "token: prompts stand among the keys; gated: beside them, by a gate from 0; none.")
    prompt_tokens: int = option(10, "Prompts a block, P; with a bank P - 2 rows are used.")
    prompt_blocks: int | None = option(None, "How many blocks, from the first, have prompts; None is the first half.")
    prompt_rank: int = option(8, "Inner width of the networks over retrieved rows.")
    prompt_dropout: float = option(0.1, "Dropout on the learned prompts.")
    memory: bool = option(True, "Whether prompts are enriched from a memory bank.")
    bank: Any = option(None, "The MemoryBank, or its file; the model keeps its rows.")
    normalize_query: bool = option(False, "Unit length also for the cloud's own feature, as a row of the bank has.")
    exclude_self: bool = option(False, "In training the row of a cloud is hidden from it; needs its index.")
    rank: int = option(16, "Inner width of the two networks of each block.")
    dropout: float = option(0.1, "Dropout inside these networks.")
    geometry: bool = option(True, "Whether patches are mixed with their neighbours.")
    local_centres: int | None = option(None, "Local groups; None is half the patches.")
    local_neighbours: int | None = option(None, "Patches of a local group; None is half a patch's points.")
    local_width: int = option(18, "Width of the local attention.")
    local_heads: int = option(6, "Its heads.")
    local_scale: str = option("width", "Of its scores: width^(-1/2), as the paper's code, or a head's width.")
    pooling: str = option("max", "Over a local group: max, or max+mean.")
    propagation_neighbours: int | None = option(
        None, "Local groups that a patch hears from; None is all, PointNet++ takes 3."
    )
    gamma_c: float = option(0.3, "How much of a local centre's own token is added.")
    gamma_p: float = option(0.3, "How much of the neighbours; under init identity it is learned, from 0.")
    gamma_f: float = option(0.7, "How much of the network behind the MLP.")
    tune_biases: bool = option(True, "Whether biases of the blocks train too.")
    init: str = option("identity", "identity: all but prompts start without effect; reference.")
    modules_to_save: list[str] | None = option(None, "Modules trained and saved whole; None is a classifier's head.")
    bank_rows: int | None = option(None, "Rows of the bank; set on wrapping.")
    base_hash: dict[str, str] | None = option(None, "Of the backbone that the bank is of, by dtype; set on wrapping.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MethodName("POINT_PEFT")
        self.target_modules = None  # which PEFT reads; the backbone is found by what it is
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in (*_COUNTS, *_OPTIONAL_COUNTS, "prompt_blocks"):
            value = getattr(self, name)
            if value is None and name not in _COUNTS:
                continue
            least = 0 if name == "prompt_blocks" else 1
            check_count(name, value, minimum=least)
        if self.bank is not None and not isinstance(self.bank, (str, os.PathLike, MemoryBank)):
            raise TypeError(f"bank: must be a MemoryBank or its file, got {type(self.bank).__name__}")
        for name in ("dropout", "prompt_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: must be in [0, 1), got {getattr(self, name)!r}")
        for name in ("gamma_c", "gamma_p", "gamma_f"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}: must be a finite number, got {getattr(self, name)!r}")
        if self.local_width % self.local_heads:
            raise ValueError(f"local_heads: must divide local_width {self.local_width}, got {self.local_heads}")
        if self.uses_bank and self.prompt_tokens < 3:
            raise ValueError(f"prompt_tokens: must be at least 3 with a memory bank, got {self.prompt_tokens}")

    @property
    def uses_bank(self) -> bool:
        """Whether prompts are enriched from a bank."""
        return self.memory and self.prompts != "none" and self.prompt_blocks != 0

    @property
    def retrieved(self) -> int:
        """Rows that a cloud takes from the bank, K."""
        return self.prompt_tokens - 2

    def blocks_with_prompts(self, depth: int) -> int:
        """How many blocks of a stack have prompts, L.

        Raises:
            ValueError: there are fewer blocks.
        """
        if self.prompts == "none":
            return 0
        blocks = (depth + 1) // 2 if self.prompt_blocks is None else self.prompt_blocks
        if blocks > depth:
            raise ValueError(f"prompt_blocks: must be at most the backbone's {depth} blocks, got {blocks}")
        return blocks
