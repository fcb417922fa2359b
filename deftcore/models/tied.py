"""Merging an adapter into one of two modules that share a weight: embeddings tied to the head."""

from typing import Any

from torch import nn

from deftcore.models.blocks import base_of


def tuned_ties(model: Any) -> list[nn.Module]:
    """The tuned layers' base modules whose weight another module shares: a merge in place would move that one too.

    Raises:
        ValueError: naming both, where they are not the input and output embeddings: nothing else stays untied in files.
    """
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append((name, module))
    layers: Any = [m for m in model.modules() if hasattr(m, "get_base_layer") and hasattr(m, "merge")]
    tuned = [m.get_base_layer() for m in layers if not getattr(m, "bias_alone", False)]
    ends = _embeddings(model)
    found: list[nn.Module] = []
    for layer in tuned:
        group = owners.get(id(layer._parameters.get("weight")), [])
        if len(group) < 2 or any(layer is other for other in found):
            continue
        if any(all(module is not end for end in ends) for _, module in group):
            name = next(name for name, module in group if module is layer)
            others = ", ".join(_plain(name) for name, module in group if module is not layer)
            raise ValueError(
                f"{_plain(name)}: shares its weight with {others}, which merging the adapter would change too, and the "
                "files of this model cannot hold them apart; leave the adapter unmerged"
            )
        found.append(layer)
    return found


def merge_and_unload(model: Any) -> Any:
    """PEFT's `merge_and_unload`, with each weight that a tuned layer shares copied first.

    Where input and output embeddings end apart, `config.tie_word_embeddings` becomes False, as the files need it.

    Raises:
        ValueError: as `tuned_ties`; nothing was changed then.
    """
    for layer in tuned_ties(model):
        weight: Any = layer.weight
        layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    merged = model.merge_and_unload()
    weights = [end.weight for end in _embeddings(merged) if hasattr(end, "weight")]
    config = getattr(merged, "config", None)
    if config is not None and len(weights) == 2 and weights[0] is not weights[1]:
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        for part in (config, text):
            if getattr(part, "tie_word_embeddings", False):
                part.tie_word_embeddings = False
    return merged


def _embeddings(model: Any) -> list[nn.Module]:
    """A Transformers model's input and output embeddings, beneath adapters and PEFT's copies of saved modules."""
    base: Any = base_of(model)
    found = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(base, name, lambda: None)()
        if module is not None:
            module = module.get_base_layer() if hasattr(module, "get_base_layer") else module
            found.append(getattr(module, "original_module", module))
    return found


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.").removesuffix(".base_layer")
