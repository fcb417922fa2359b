"""The config of S2FT."""

from dataclasses import dataclass

from peft import PeftConfig

from deftcore.ops.checks import check_count
from deftcore.training.adapters import MethodName
from deftcore.training.fields import option

STRATEGIES = ("random", "weight", "activation", "product", "gradient")
DATA_STRATEGIES = ("activation", "product", "gradient")
TARGETS = ("o", "down", "v", "up", "gate", "q", "k")
_RECOMPUTE = ("none", "up", "gate_up")


@dataclass
class S2ftConfig(PeftConfig):
    """Config of S2FT.

    Raises ValueError, naming the field, on a value out of range.
    """

    channel_ratio: float = option(0.02, "Share of the MLP channels trained, in (0, 1).")
    head_ratio: float | None = option(None, "Share of the heads trained, in (0, 1); None spends what the channels do.")
    targets: list[str] | None = option(
        None, f"Of {', '.join(TARGETS)}; None is o and down, down alone on grouped queries."
    )
    strategy: str = option("random", f"How to score units: {', '.join(STRATEGIES)}.")
    order: str = option("largest", "Which scores to take: largest or smallest.")
    budget: str = option("layer", "layer: equal counts; global: over all layers at once.")
    head_granularity: str | None = option(None, "group: whole key-value groups (default for grouped queries); head.")
    round_to: int = option(1, "Round channel counts up to a multiple of this.")
    seed: int = option(0, "Of the random strategy.")
    storage: str = option("shared", "shared: in place; split: beside the weight (FSDP2; always for 4-bit).")
    master: str | None = option(None, "fp32: optimise a float32 copy of the slice; none. None is fp32 for 16 bits.")
    recompute: str = option(
        "none", "Of a gated MLP's two products, what the backward computes again: none, up or gate_up."
    )
    exclude: dict[str, list[int]] | None = option(None, "Units not to select, as in `indices` of another adapter.")
    indices: dict[str, list[int]] | None = option(
        None, "Selected units per weight; None selects when the model is wrapped."
    )
    base_hash: dict[str, str] | None = option(None, "Of the slices before training, by dtype; set on wrapping.")
    target_modules: list[str] | None = option(None, "Set on wrapping.")
    modules_to_save: list[str] | None = option(None, "Modules trained and saved whole.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MethodName("S2FT")
        for name in ("channel_ratio", "head_ratio"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{name}: must be above 0 and below 1 (all of it is full fine-tuning), got {value}")
        for name, choices in (
            ("strategy", STRATEGIES), ("order", ("largest", "smallest")), ("budget", ("layer", "global")),
            ("storage", ("shared", "split")), ("recompute", _RECOMPUTE),
            ("head_granularity", (None, "group", "head")), ("master", (None, "fp32", "none")),
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: must be one of {', '.join(map(str, choices))}, got {getattr(self, name)!r}")
        check_count("round_to", self.round_to)
        for target in self.targets or []:
            if target not in TARGETS:
                raise ValueError(f"targets: must be among {', '.join(TARGETS)}, got {target!r}")
        if self.targets is not None and not self.targets:
            raise ValueError(f"targets: must name at least one of {', '.join(TARGETS)}, got []")

    @property
    def needs_data(self) -> bool:
        """Whether `select_channels` has to run over batches before wrapping."""
        return self.indices is None and self.strategy in DATA_STRATEGIES
