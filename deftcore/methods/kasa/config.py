"""The config of KaSA."""

from dataclasses import dataclass

from peft import LoraConfig

from deftcore.methods.lora.paired import check_plain
from deftcore.ops.checks import check_number
from deftcore.training.adapters import MethodName
from deftcore.training.fields import option

BASE_MODES = ("factored", "destructive")
RULES = ("min", "in_features")
REDUCTIONS = ("mean", "sum")
ORTHO_FORMS = ("paper", "reference")


@dataclass
class KasaFactoredConfig(LoraConfig):
    """Config of KaSA; the fields beside these are `peft.LoraConfig`'s.

    Raises ValueError, naming the field, on a value out of range or a variant of LoRA; TypeError on what is no number.
    """

    truncate_rank: int | None = option(
        None, "How many of the weight's smallest singular values go; None is the rank r."
    )
    truncate_rule: str = option("min", "min; in_features: as the reference code, which leaves wide weights whole.")
    base_mode: str = option("factored", "factored: the weight stays, what goes is subtracted; destructive.")
    beta: float = option(1e-4, "Weight of the penalty on the singular values.")
    gamma: float = option(1e-3, "Weight of the penalty on factors that are not orthonormal.")
    reduction: str = option("mean", "mean over the adapted layers, or sum (PEFT's).")
    ortho_form: str = option("paper", "paper: R x R Gram matrices; reference: the code's, of the other side.")
    svd_device: str | None = option(None, "Where the weights are decomposed; None is where they are.")
    base_hash: dict[str, str] | None = option(None, "Of the weights before, by dtype; set on wrapping.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MethodName("KASA_FACTORED")
        check_plain(self, (True, False, "gaussian"))
        for name, choices in (
            ("truncate_rule", RULES), ("base_mode", BASE_MODES), ("reduction", REDUCTIONS), ("ortho_form", ORTHO_FORMS),
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("beta", "gamma"):
            check_number(name, getattr(self, name), minimum=0.0)
        cut = self.truncate_rank
        if cut is not None and (isinstance(cut, bool) or not isinstance(cut, int) or cut < 0):
            raise ValueError(f"truncate_rank: must be an integer of at least 0, or None, got {cut!r}")

    def cut(self, rank: int, rows: int, columns: int) -> int:
        """How many singular values of a weight [rows, columns] go, for an adapter of a rank.

        Raises:
            ValueError: a rank, or a `truncate_rank`, that is not below the weight's shorter side.
        """
        shorter = min(rows, columns)
        cut = rank if self.truncate_rank is None else self.truncate_rank
        for name, value in (("r", rank), ("truncate_rank", cut)):
            if value >= shorter:
                raise ValueError(
                    f"{name}: must be below {shorter}, the shorter side of {rows} x {columns}, got {value}"
                )
        return cut if self.truncate_rule == "min" else max(0, cut - (columns - shorter))
