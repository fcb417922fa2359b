"""A model under BA-LoRA."""

from typing import Any

from deftcore.methods.ba_lora.layer import BaLoraLinear
from deftcore.methods.lora.paired_model import PairedModel


class BaLoraModel(PairedModel):
    """Puts `BaLoraLinear`s into a model; made by `peft.get_peft_model`."""

    layer = BaLoraLinear

    @classmethod
    def check_shape(cls, config: Any, rank: int, rows: int, columns: int) -> None:
        """Raises ValueError for a rank above the weight's shorter side, or a scaling of 0."""
        if rank > min(rows, columns):
            raise ValueError(
                f"r: must be at most {min(rows, columns)}, the shorter side of {rows} x {columns}, got {rank}"
            )
        if not config.lora_alpha > 0:
            raise ValueError(f"lora_alpha: must be above 0, got {config.lora_alpha}")
