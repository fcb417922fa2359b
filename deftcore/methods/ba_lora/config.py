"""The config of BA-LoRA."""

from dataclasses import dataclass

from peft import LoraConfig

from deftcore.methods.ba_lora.schedules import CONSISTENCY_SCHEDULES, SCHEDULES
from deftcore.methods.lora.paired import check_plain
from deftcore.ops.checks import check_count, check_number
from deftcore.training.adapters import MethodName
from deftcore.training.fields import option

BASE_MODES = ("factored", "pissa")
VARIANTS = ("v6", "v5")
FORMS = ("nlg", "nlu")
# Weights of consistency, diversity and spectral term, and k, where a config leaves them out: by variant and form.
PUBLISHED = {
    ("v6", "nlg"): (0.025, 0.005, 0.005, 10),
    ("v6", "nlu"): (0.15, 0.03, 0.03, 5),
    ("v5", "nlg"): (1e-4, 3e-4, 1e-4, 3),
    ("v5", "nlu"): (1e-4, 3e-4, 1e-4, 3),
}


@dataclass
class BaLoraConfig(LoraConfig):
    """Config of BA-LoRA; the fields beside these are `peft.LoraConfig`'s. Weights and `k` that are None are the
    published ones of the variant and form.

    Raises ValueError, naming the field, on a value out of range, a variant of LoRA, or dropout; TypeError on what is no
    number.
    """

    base_mode: str = option("factored", "factored: the weight stays; pissa: the residual takes its place.")
    svd_niter: int | None = option(16, "Iterations of the randomised decomposition; None decomposes exactly.")
    variant: str = option("v6", "v6 (ICLR 2026), or v5, of the preprint before.")
    form: str | None = option(None, "nlg, nlu; None: nlu for task_type SEQ_CLS, else nlg.")
    consistency: float | None = option(None, "Weight of staying with the pre-trained logits.")
    diversity: float | None = option(None, "Weight of the diversity of outputs.")
    spectral: float | None = option(None, "Weight of the largest singular values' share.")
    k: int | None = option(None, "How many singular values count as the largest.")
    temperature: float = option(2.0, "Of the consistency; v5 has 1 for nlg.")
    top_k: int = option(20, "Logits in the nlg diversity; 0, and v5, the whole vocabulary.")
    consistency_schedule: str = option("cosine", f"Of its weight: {', '.join(CONSISTENCY_SCHEDULES)}.")
    schedule: str = option("two_phase", f"Of the other weights: {', '.join(SCHEDULES)}.")
    warmup_ratio: float = option(0.2, "Share of the steps in which these wait, or rise.")
    ramp_ratio: float = option(0.05, "Share in which they rise afterwards, for two_phase.")
    shift: bool = option(True, "Count positions that predict a label; false: as the authors', with a label.")
    base_hash: dict[str, str] | None = option(None, "Of the weights before, by dtype; set on wrapping.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MethodName("BA_LORA")
        check_plain(self, (True,))
        if self.lora_dropout:
            raise ValueError(
                f"lora_dropout: must be 0, or the start is not the pre-trained model, got {self.lora_dropout}"
            )
        for name, choices in (
            ("base_mode", BASE_MODES), ("variant", VARIANTS), ("form", (None, *FORMS)), ("schedule", SCHEDULES),
            ("consistency_schedule", CONSISTENCY_SCHEDULES),
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: must be one of {', '.join(map(str, choices))}, got {getattr(self, name)!r}")
        for name in ("consistency", "diversity", "spectral"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), minimum=0.0)
        check_number("temperature", self.temperature, minimum=0.0, strict=True)
        for name in ("warmup_ratio", "ramp_ratio"):
            if check_number(name, getattr(self, name), minimum=0.0) > 1:
                raise ValueError(f"{name}: must be at most 1, got {getattr(self, name)}")
        for name, least, optional in (("k", 1, True), ("top_k", 0, False), ("svd_niter", 0, True)):
            value = getattr(self, name)
            if optional and value is None:
                continue
            check_count(name, value, minimum=least)

    @property
    def of_classes(self) -> bool:
        """Whether the penalties are those of classifiers."""
        kind = getattr(self.task_type, "value", self.task_type)
        return self.form == "nlu" or (self.form is None and kind == "SEQ_CLS")

    def weights(self) -> tuple[float, float, float]:
        """Of consistency, diversity and spectral term, before any schedule."""
        published = PUBLISHED[self.variant, "nlu" if self.of_classes else "nlg"][:3]
        given = self.consistency, self.diversity, self.spectral
        first, second, third = (
            float(own if mine is None else mine) for mine, own in zip(given, published, strict=True)
        )
        return first, second, third

    def largest(self) -> int:
        """k, the published one where it is None."""
        return PUBLISHED[self.variant, "nlu" if self.of_classes else "nlg"][3] if self.k is None else self.k
