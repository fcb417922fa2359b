"""What the room gives to recipes: full training whose optimizer is GaLore's, or Natural GaLore's."""

from dataclasses import dataclass, fields
from typing import Any

from deftcore.methods.lora.method import wrap_full
from deftcore.methods.natural_galore.groups import ALL_LINEAR, galore_param_groups
from deftcore.methods.natural_galore.optimizer import NaturalGaLore
from deftcore.methods.natural_galore.options import GaloreOptions, NaturalOptions
from deftcore.ops.checks import check_number
from deftcore.training.config import TrainingConfig
from deftcore.training.decay import spare_from_decay, without_decay
from deftcore.training.fields import Count, option
from deftcore.training.registry import Method, register


@dataclass
class _Recipe:
    """What a recipe says beside the options of projected matrices."""

    target_modules: list[str] | str = option(
        ALL_LINEAR, "Parts of names, or patterns of whole names; all-linear: but the output."
    )
    betas: tuple[float, float] = option((0.9, 0.999), "Of Adam.")
    eps: float = option(1e-6, "Of Adam, outside the root.")


@dataclass
class GaloreConfig(GaloreOptions, _Recipe):
    """`adapter:` of `method: galore`."""

    rank: int | None = 128


@dataclass
class NaturalGaloreConfig(NaturalOptions, _Recipe):
    """`adapter:` of `method: natural-galore`."""

    rank: int | None = 128


_OWN = [each.name for each in fields(_Recipe)]


def _groups(model: Any, config: Any, proj_type: str) -> list[dict[str, Any]]:
    options = {each.name: getattr(config, each.name) for each in fields(config) if each.name not in _OWN}
    return galore_param_groups(model, config.target_modules, proj_type=proj_type, **options)


def _method(proj_type: str, **record: Any) -> Method:
    def make(model: Any, config: Any, training: TrainingConfig) -> NaturalGaLore:
        optimizer = NaturalGaLore(
            _groups(model, config, proj_type),
            lr=training.learning_rate,
            betas=config.betas,
            eps=config.eps,
            weight_decay=training.weight_decay,
        )
        spare_from_decay(optimizer, without_decay(model))
        return optimizer

    def check(model: Any, config: Any) -> None:
        check_number("eps", config.eps, minimum=0.0)
        _groups(model, config, proj_type)

    return Method(wrap=wrap_full, check=check, optimizer=make, limits={"rank": Count}, float32=True, **record)


register(
    _method(
        "galore",
        name="galore",
        summary="Every weight, with AdamW's state in a subspace of each matrix's gradient.",
        paper="arXiv 2403.03507",
        config=GaloreConfig,
    )
)
register(
    _method(
        "natural_galore",
        name="natural-galore",
        summary="GaLore with natural gradients, from a window of past ones in the subspace.",
        paper="arXiv 2410.16029",
        config=NaturalGaloreConfig,
    )
)
