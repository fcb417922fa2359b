"""The authors' checkpoints of TSViT (github.com/michaeltrs/DeepSatModels), and of its wheat adaptation, by name."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from deftcore.methods.tsvit.model import TSViT
from deftcore.models.own import load_strictly
from deftcore.models.published import Source, published_tensors, told
from deftcore.ops.checks import check_count

_MIXER = "mlp_change.weight"
_BATCHED = ("class_tokens.weight", "positions")  # theirs have a dimension more, of size 1
# Ours and theirs of what is there once, of an encoder, and of its layers.
_ONCE = {
    "class_tokens.weight": "temporal_token",
    "positions": "space_pos_embedding",
    "patch.weight": "to_patch_embedding.1.weight",
    "patch.bias": "to_patch_embedding.1.bias",
    "dates.weight": "to_temporal_embedding_input.weight",
    "dates.bias": "to_temporal_embedding_input.bias",
    "head.norm.weight": "mlp_head.0.weight",
    "head.norm.bias": "mlp_head.0.bias",
    "head.pixels.weight": "mlp_head.1.weight",
    "head.pixels.bias": "mlp_head.1.bias",
    "mixer.weight": _MIXER,
    "mixer.bias": "mlp_change.bias",
}
_ENCODERS = {"temporal": "temporal_transformer", "spatial": "space_transformer"}
_LAYER = {
    "attention.norm": "0.norm",
    "attention.qkv": "0.fn.to_qkv",
    "attention.projection": "0.fn.to_out.0",
    "mlp.norm": "1.norm",
    "mlp.fc1": "1.fn.net.0",
    "mlp.fc2": "1.fn.net.3",
}


def published_name(name: str) -> str:
    """What the authors call a parameter of a TSViT.

    Raises:
        KeyError: they have none of this name.

    >>> published_name("spatial.layers.3.mlp.fc1.bias")
    'space_transformer.layers.3.1.fn.net.0.bias'
    """
    if name in _ONCE:
        return _ONCE[name]
    encoder, _, rest = name.partition(".")
    if rest.startswith("norm."):
        return f"{_ENCODERS[encoder]}.{rest}"
    number, _, rest = rest.removeprefix("layers.").partition(".")
    part, _, kind = rest.rpartition(".")
    return f"{_ENCODERS[encoder]}.layers.{number}.{_LAYER[part]}.{kind}"


def load_published(source: Source, *, heads: int = 4, legacy_layout: bool = True, **options: Any) -> TSViT:
    """The TSViT in a checkpoint of the authors' code, or of its wheat adaptation: all tensors by name and value.

    Args:
        source: a file that `torch.save` wrote, or the names and tensors themselves.
        heads: which no tensor tells.
        legacy_layout: whether its pixels are in the order that the code had until June 2026.
        options: `band_mean` and `band_std` of `TSViT`; the authors normalise before.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no file of tensors; the names of those that are missing, unexpected, or of a shape that does
            not go with the others.
    """
    theirs, where = published_tensors(source), told(source)
    model = TSViT(**_sizes(theirs, heads, where), legacy_layout=legacy_layout, **options)
    names = {name: published_name(name) for name, _ in model.named_parameters()}
    _check_names(theirs, names.values(), where)
    ours = {name: theirs[published] for name, published in names.items()}
    for name in _BATCHED:
        ours[name] = ours[name].squeeze(0)
    load_strictly(model, ours | dict(model.named_buffers()), where)
    return model.eval()


def _sizes(theirs: Mapping[str, Tensor], heads: int, where: str) -> dict[str, Any]:
    """The arguments of `TSViT` that a checkpoint's shapes tell."""
    named = {"tokens": "class_tokens.weight", "positions": "positions", "patch": "patch.weight",
             "pixels": "head.pixels.weight", "qkv": "temporal.layers.0.attention.qkv.weight",
             "fc1": "temporal.layers.0.mlp.fc1.weight"}  # fmt: skip
    _check_names(theirs, [published_name(name) for name in named.values()], where, others=True)
    shape = {short: theirs[published_name(name)].shape for short, name in named.items()}
    if flat := [published_name(named[short]) for short, size in shape.items() if len(size) < 2]:
        raise ValueError(f"source: {where} is no checkpoint of TSViT's: no matrices: {', '.join(flat)}")
    dim, side, columns = shape["tokens"][-1], math.isqrt(shape["pixels"][0]), shape["qkv"][0]
    check_count("heads", heads)
    if columns % (3 * heads):
        raise ValueError(f"heads: must divide the {columns // 3} columns of q, k and v, got {heads}")
    return {
        "num_classes": shape["tokens"][-2],
        "image_size": math.isqrt(shape["positions"][-2]) * side,
        "patch_size": side,
        "channels": shape["patch"][1] // side**2,
        "dim": dim,
        "heads": heads,
        "dim_head": columns // (3 * heads),
        "temporal_depth": _depth(theirs, "temporal"),
        "spatial_depth": _depth(theirs, "spatial"),
        "mlp_ratio": shape["fc1"][0] // dim,
        "mixed_classes": len(theirs[_MIXER]) if _MIXER in theirs else None,
    }


def _depth(theirs: Mapping[str, Tensor], encoder: str) -> int:
    start = f"{_ENCODERS[encoder]}.layers."
    return max(1, len({name.removeprefix(start).partition(".")[0] for name in theirs if name.startswith(start)}))


def _check_names(theirs: Mapping[str, Tensor], expected: Collection[str], where: str, *, others: bool = False) -> None:
    missing = [name for name in expected if name not in theirs]
    unexpected = [] if others else [name for name in theirs if name not in set(expected)]
    wrong = [f"{what}: {', '.join(n)}" for what, n in (("missing", missing), ("unexpected", unexpected)) if n]
    if wrong:
        raise ValueError(f"source: {where} is no checkpoint of TSViT's: tensors {'; '.join(wrong)}")
