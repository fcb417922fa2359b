"""What can be known before weights are read: a model's modules, and what does not fit them."""

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from accelerate import init_empty_weights
from torch import nn

from deftcore._names import near
from deftcore.models.families import POSITION_TABLES
from deftcore.models.folders import model_kind, read_config
from deftcore.nn.quantization import linears_to_quantize


def empty_model(path: str | os.PathLike) -> Any:
    """The model of a Transformers folder, GGUF file or hub id without its weights, on the meta device.

    Raises:
        FileNotFoundError, ImportError, ValueError: when there is no such model; as `read_config`.
    """
    config = read_config(path)
    with init_empty_weights():
        model = model_kind(config).from_config(config)
    model.tie_weights()
    return model


def check_quantize(model: nn.Module, skip: Iterable[str]) -> None:
    """Raises for names in `quantize.skip` that the model does not have."""
    try:
        linears_to_quantize(model, list(skip))
    except ValueError as error:
        raise ValueError(f"quantize.{error}") from error


def check_lengths(model: Any, examples: Iterable[Mapping[str, Any]], what: str = "max_length") -> None:
    """Raises for examples that are longer than a model's table of positions, where it has one; `what` names the
    argument."""
    limit = getattr(model.config, "max_position_embeddings", None)
    tables = {n: m for n, m in model.named_modules() if isinstance(m, nn.Embedding) and n.endswith(POSITION_TABLES)}
    if limit is None or not tables:
        return
    name, table = next(iter(tables.items()))
    if table.padding_idx is not None:  # RoBERTa counts from behind it
        limit -= table.padding_idx + 1
    longest = max((len(example["input_ids"]) for example in examples), default=0)
    if longest > limit:
        raise ValueError(f"{what}: must be at most {limit}, the positions of {name}; an example has {longest} tokens")


def check_names(field: str, wanted: Any, modules: list[str]) -> None:
    """Raises for a name, or a pattern, that fits none of the modules. Names fit by their last parts, a pattern (a
    string) fits whole names.

    Raises:
        ValueError: naming the field, and names that are near.
    """
    if wanted is None or wanted == "all-linear":
        return
    if isinstance(wanted, str):
        try:
            pattern = re.compile(wanted)
        except re.error as error:
            raise ValueError(f"{field}: {wanted!r} is no regular expression: {error}") from error
        if not any(map(pattern.fullmatch, modules)):
            lists = [wanted] if _is_named(wanted, modules) else _last_parts(modules)
            hint = near(wanted, [f"[{name}]" for name in lists])
            raise ValueError(f"{field}: no module fits {wanted!r}, a regular expression over whole names{hint}")
        return
    for name in wanted:
        if not _is_named(name, modules):
            raise ValueError(f"{field}: no module named {name!r}{near(name, _last_parts(modules))}")


def _is_named(name: str, modules: list[str]) -> bool:
    return any(f".{module}".endswith(f".{name}") for module in modules)


def _last_parts(modules: list[str]) -> list[str]:
    return [part for part in dict.fromkeys(module.rpartition(".")[2] for module in modules) if not part.isdigit()]
