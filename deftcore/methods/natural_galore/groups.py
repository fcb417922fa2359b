"""Which matrices of a model are projected."""

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from deftcore._names import near
from deftcore.methods.natural_galore.options import options_in
from deftcore.nn.linear import is_transposed

ALL_LINEAR = "all-linear"


def galore_param_groups(
    model: nn.Module, target_modules: str | Iterable[str] = ALL_LINEAR, *, rank: int = 128, **options: Any
) -> list[dict[str, Any]]:
    """Param groups of a model's trainable parameters: the projected matrices with rank and options, and the rest.

        deftcore.NaturalGaLore(deftcore.galore_param_groups(model, ["attn", "mlp"], rank=128, scale=0.25), lr=1e-2)

    Args:
        target_modules: linear layers by parts of their names, or by patterns that whole names match, as Transformers'
            `optim_target_modules`; text is one pattern, "all-linear" all of them but the output layer.
        rank, options: of the projected group; see `deftcore.NaturalGaLore`.

    Raises:
        ValueError, TypeError: naming an option; a target that matches nothing, with near names.
    """
    options_in({"rank": rank, **options})
    output = getattr(model, "get_output_embeddings", lambda: None)()
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}  # which a linear may share
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) or is_transposed(m)}
    names = target_modules if isinstance(target_modules, str) else list(target_modules)
    chosen = [n for n, m in linear.items() if (m is not output if names == ALL_LINEAR else _is_target(n, names))]
    weights = {id(linear[name].weight): linear[name].weight for name in chosen}
    targets = [p for key, p in weights.items() if getattr(p, "requires_grad", False) and key not in embeddings]
    training = [name for name, m in linear.items() if getattr(m.weight, "requires_grad", False)]
    asked: list[Any] = [names] if isinstance(names, str) else [[name] for name in names]
    unmet = [each for each in asked if names != ALL_LINEAR and not any(_is_target(name, each) for name in training)]
    if unmet or not targets:
        text = ", ".join("".join(each) for each in unmet or asked)
        parts = {part for name in training for part in name.split(".") if not part.isdigit()}
        raise ValueError(f"target_modules: {text!r} matches no linear layer that trains{near(text, sorted(parts))}")
    known = {id(p) for p in targets}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    return [{"params": targets, "rank": rank, **options}, *([{"params": others}] if others else [])]


def _is_target(name: str, wanted: str | list[str]) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(each in name or re.fullmatch(each, name) for each in wanted)
