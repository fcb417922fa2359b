"""The config of Light-PEFT."""

from dataclasses import dataclass, field

from deftcore.ops.checks import check_choice, check_count, check_number

ADAPTERS = ("lora", "bottleneck")
IMPORTANCE = ("estimated", "random", "magnitude")


@dataclass
class LightPeftConfig:
    """Config of Light-PEFT (arXiv 2406.03792): which adapters, how long they are watched, how much goes.

    Raises TypeError or ValueError, naming the field, on a value out of range.
    """

    adapter: str = field(default="lora", metadata={"help": "lora or bottleneck."})
    r: int = field(default=8, metadata={"help": "Rank of LoRA, width of bottlenecks."})
    lora_alpha: float = field(default=16, metadata={"help": "LoRA's update is scaled by lora_alpha / r."})
    scaling: float = field(default=1.0, metadata={"help": "Factor of a bottleneck's output."})
    non_linearity: str = field(default="relu", metadata={"help": "relu, gelu or silu, inside a bottleneck."})
    parallel: bool = field(default=False, metadata={"help": "Bottlenecks read the MLP's input (AdaptFormer)."})
    dropout: float | None = field(
        default=None, metadata={"help": "On an adapter's input; None is 0.05 of LoRA, 0.1 of bottlenecks."}
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Linear layers with an adapter. None: of LoRA all of attention and MLP, of bottlenecks the "
                          "last of each."},
    )  # fmt: skip
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained and saved whole."})

    estimate_steps: int = field(default=800, metadata={"help": "Steps of the first phase."})
    head_ratio: float = field(default=1 / 3, metadata={"help": "Share of the heads that go, in [0, 1)."})
    ffn_ratio: float = field(default=1 / 3, metadata={"help": "Share of the MLP channels that go, in [0, 1)."})
    module_ratio: float = field(default=0.75, metadata={"help": "Share of the adapters that go, in [0, 1)."})
    rank_ratio: float = field(default=0.5, metadata={"help": "Share of the others' ranks that go, in [0, 1)."})
    ffn_scope: str = field(default="global", metadata={"help": "layer: as many in each; global: over all layers."})
    rank_scope: str = field(default="global", metadata={"help": "layer: as many of each adapter; global: over all."})
    head_granularity: str | None = field(
        default=None,
        metadata={"help": "Of grouped queries: whole groups (group), or as many heads of each (head). None is group, "
                          "head where the ratio is less than one group."},
    )  # fmt: skip
    rule: str = field(
        default="floor", metadata={"help": "floor: that share, rounded down; quantile: all up to it, the authors'."}
    )
    round_to: int = field(default=1, metadata={"help": "Round kept channels up to a multiple of this."})
    uniform: bool = field(
        default=False, metadata={"help": "As many heads and channels in every layer: Transformers loads the result."}
    )
    allow_empty: bool = field(default=False, metadata={"help": "Whether a layer may lose all heads or channels."})
    keep_masks: str = field(
        default="reset", metadata={"help": "What becomes of the masks of what stays: reset, or fold into weights."}
    )
    requantize: bool = field(
        default=False, metadata={"help": "Over 4 bits: round weights again whose blocks a cut goes through."}
    )

    l1: float = field(default=1e-4, metadata={"help": "Weight of the masks' absolute sum in the loss."})
    l1_heads: float | None = field(default=None, metadata={"help": "Of heads alone; None is l1."})
    l1_ffn: float | None = field(default=None, metadata={"help": "Of channels alone; None is l1."})
    mask_lr_mult_heads: float = field(default=1.0, metadata={"help": "Rate of the heads' masks over the adapters'."})
    mask_lr_mult_ffn: float = field(default=1.0, metadata={"help": "Rate of the channels' masks over the adapters'."})
    importance: str = field(
        default="estimated", metadata={"help": "What is pruned: estimated, or to compare with, random or magnitude."}
    )
    seed: int = field(default=42, metadata={"help": "Of random importance."})

    def __post_init__(self) -> None:
        check_choice("adapter", self.adapter, ADAPTERS)
        check_choice("importance", self.importance, IMPORTANCE)
        check_choice("rule", self.rule, ("floor", "quantile"))
        check_choice("keep_masks", self.keep_masks, ("reset", "fold"))
        if self.head_granularity is not None:
            check_choice("head_granularity", self.head_granularity, ("group", "head"))
        for name in ("ffn_scope", "rank_scope"):
            check_choice(name, getattr(self, name), ("layer", "global"))
        for name in ("head_ratio", "ffn_ratio", "module_ratio", "rank_ratio"):
            if check_number(name, getattr(self, name), minimum=0.0) >= 1:
                raise ValueError(f"{name}: must be below 1 (nothing would be left), got {getattr(self, name)}")
        for name in ("r", "estimate_steps", "round_to"):
            check_count(name, getattr(self, name))
        for name in ("l1", "l1_heads", "l1_ffn", "mask_lr_mult_heads", "mask_lr_mult_ffn"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), minimum=0.0)
        if self.importance != "estimated" and self.keep_masks == "fold":
            raise ValueError(f"keep_masks: importance {self.importance} has no masks to fold")

    def ratio(self, part: str) -> float:
        """Share of a structure's units that go.

        Args:
            part: "heads" or "ffn".
        """
        return self.head_ratio if part == "heads" else self.ffn_ratio
