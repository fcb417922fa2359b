"""A model under KaSA."""

from typing import Any

from deftcore.methods.kasa.layer import KasaLinear
from deftcore.methods.lora.paired_model import PairedModel


class KasaModel(PairedModel):
    """Puts `KasaLinear`s into a model; made by `peft.get_peft_model`."""

    layer = KasaLinear
    several_change_weights = True  # what one has truncated another finds truncated

    @classmethod
    def check_shape(cls, config: Any, rank: int, rows: int, columns: int) -> None:
        """Raises ValueError for a rank, or a `truncate_rank`, that is not below the weight's shorter side."""
        config.cut(rank, rows, columns)

    @classmethod
    def awaits_file(cls, config: Any) -> bool:
        """Files of destructive adapters do not hold what was truncated."""
        return config.base_mode == "factored"
