"""The config of Light-PEFT."""

from dataclasses import dataclass

from deftcore.ops.checks import check_choice, check_count, check_number
from deftcore.training.fields import option

ADAPTERS = ("lora", "bottleneck")
IMPORTANCE = ("estimated", "random", "magnitude")


@dataclass
class LightPeftConfig:
    """Config of Light-PEFT (arXiv 2406.03792): which adapters, how long they are watched, how much goes.

    Raises TypeError or ValueError, naming the field, on a value out of range.
    """

    adapter: str = option("lora", "lora or bottleneck.")
    r: int = option(8, "Rank of LoRA, width of bottlenecks.")
    lora_alpha: float = option(16, "LoRA's update is scaled by lora_alpha / r.")
    scaling: float = option(1.0, "Factor of a bottleneck's output.")
    non_linearity: str = option("relu", "relu, gelu or silu, inside a bottleneck.")
    parallel: bool = option(False, "Bottlenecks read the MLP's input (AdaptFormer).")
    dropout: float | None = option(None, "On an adapter's input; None is 0.05 of LoRA, 0.1 of bottlenecks.")
    target_modules: list[str] | str | None = option(
        None, "Linear layers with an adapter. None: of LoRA all of attention and MLP, of bottlenecks the last of each."
    )
    modules_to_save: list[str] | None = option(None, "Modules trained and saved whole.")

    estimate_steps: int = option(800, "Steps of the first phase.")
    head_ratio: float = option(1 / 3, "Share of the heads that go, in [0, 1).")
    ffn_ratio: float = option(1 / 3, "Share of the MLP channels that go, in [0, 1).")
    module_ratio: float = option(0.75, "Share of the adapters that go, in [0, 1).")
    rank_ratio: float = option(0.5, "Share of the others' ranks that go, in [0, 1).")
    ffn_scope: str = option("global", "layer: as many in each; global: over all layers.")
    rank_scope: str = option("global", "layer: as many of each adapter; global: over all.")
    head_granularity: str | None = option(
        None,
        "Of grouped queries: whole groups (group), or as many heads of each (head). None is group, head where the "
        "ratio is less than one group.",
    )
    rule: str = option("floor", "floor: that share, rounded down; quantile: all up to it, the authors'.")
    round_to: int = option(1, "Round kept channels up to a multiple of this.")
    uniform: bool = option(False, "As many heads and channels in every layer: Transformers loads the result.")
    allow_empty: bool = option(False, "Whether a layer may lose all heads or channels.")
    keep_masks: str = option("reset", "What becomes of the masks of what stays: reset, or fold into weights.")
    requantize: bool = option(False, "Over 4 bits: round weights again whose blocks a cut goes through.")

    l1: float = option(1e-4, "Weight of the masks' absolute sum in the loss.")
    l1_heads: float | None = option(None, "Of heads alone; None is l1.")
    l1_ffn: float | None = option(None, "Of channels alone; None is l1.")
    mask_lr_mult_heads: float = option(1.0, "Rate of the heads' masks over the adapters'.")
    mask_lr_mult_ffn: float = option(1.0, "Rate of the channels' masks over the adapters'.")
    importance: str = option("estimated", "What is pruned: estimated, or to compare with, random or magnitude.")
    seed: int = option(42, "Of random importance.")

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
