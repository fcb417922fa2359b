"""Published checkpoints of Point-MAE and Point-BERT, read by the names of their tensors."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from deftcore.methods.point_peft.backbone import PointConfig, PointTransformer
from deftcore.methods.point_peft.classifier import PointClassifier, PointClassifierConfig
from deftcore.models.own import load_strictly
from deftcore.models.published import Source, published_tensors, told

# What the names of a file begin with that holds a pre-training, and what of it is not the backbone's.
_PRETRAINING = {"MAE_encoder.": (), "transformer_q.": ("mask_token", "lm_head.", "cls_head.")}
_RENAMED = [
    (r"^encoder\.first_conv\.", "encoder.point."),
    (r"^encoder\.second_conv\.1\.", "encoder.token.0."),
    (r"^encoder\.second_conv\.3\.", "encoder.token.2."),
    (r"^reduce_dim\.", "reduce."),
    (r"^pos_embed\.", "position."),
    (r"^cls_token$", "class_token"),
    (r"^cls_pos$", "class_position"),
    (r"^blocks\.blocks\.", "blocks."),
    (r"^(blocks\.\d+)\.attn\.qkv\.", r"\1.attention.qkv."),
    (r"^(blocks\.\d+)\.attn\.proj\.", r"\1.attention.projection."),
    (r"^cls_head_finetune\.", "head."),
]
_MIXER = "encoder.second_conv.0."  # over [largest of the patch ; own], 256 columns each


def load_backbone(source: Source, **config: Any) -> PointTransformer:
    """The backbone of a published checkpoint: of Point-MAE's or Point-BERT's pre-training, or of a fine-tuned one,
    whose head is left out. Point-MAE pre-trains without a class token: that, and its position, are random then.

    Args:
        source: a file that `torch.save` wrote, or the names and tensors themselves.
        config: fields of `PointConfig` that the tensors do not tell: `heads`, `patches`, `patch_points`, rates. Sizes
            that they tell may be given too, to be sure of them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no checkpoint; or naming what it lacks, has besides, or has in other shapes.
    """
    tensors, pretraining = read_published(source)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
    model = PointTransformer(PointConfig(**_sizes(tensors) | config))
    if pretraining == "MAE_encoder.":
        own = {name: each.detach() for name, each in model.named_parameters(recurse=False)}
        tensors = own | tensors
    load_strictly(model, tensors, told(source))
    return model.eval()


def load_classifier(source: Source, **config: Any) -> PointClassifier:
    """The classifier of a checkpoint of Point-MAE's fine-tuning, backbone and head.

    Args:
        source, config: with fields of `PointClassifierConfig`, as for `load_backbone`.

    Raises:
        FileNotFoundError, ValueError: as `load_backbone`; Point-BERT's heads have other layers, and are refused.
    """
    tensors, _ = read_published(source)
    sizes = _sizes(tensors) | _read_rows(tensors, classes="head.8.weight", head_width="head.0.weight")
    model = PointClassifier(PointClassifierConfig(**sizes | config))
    named = {name if name.startswith("head.") else f"backbone.{name}": each for name, each in tensors.items()}
    load_strictly(model, named, told(source))
    return model.eval()


def read_published(source: Source) -> tuple[dict[str, Tensor], str]:
    """The tensors of a checkpoint under the names that `PointTransformer` and the head of `PointClassifier` ("head.")
    have for them, others under their own; and the prefix of the backbone's in a file of a pre-training, else "".

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is no checkpoint of tensors.
    """
    tensors = published_tensors(source)
    for prefix, others in _PRETRAINING.items():
        if any(name.startswith(prefix) for name in tensors):
            own = {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}
            return renamed({name: each for name, each in own.items() if not name.startswith(others)}), prefix
    return renamed(tensors), ""


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published names and shapes to ours; what has no name of ours keeps its own."""
    found = {}
    for name, tensor in tensors.items():
        if tensor.dim() == 3 and tensor.shape[-1] == 1 and name.startswith("encoder."):
            tensor = tensor.squeeze(-1)  # of convolutions over points
        if name == f"{_MIXER}weight" and tensor.dim() == 2 and tensor.shape[1] == 512:
            found["encoder.patch.weight"], found["encoder.own.weight"] = (each.clone() for each in tensor.split(256, 1))
        elif name == f"{_MIXER}bias":
            found["encoder.patch.bias"] = tensor
        else:
            for pattern, ours in _RENAMED:
                name = re.sub(pattern, ours, name)
            found[name] = tensor
    return found


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of `PointConfig` that the tensors tell."""
    sizes = _read_rows(tensors, width="norm.weight")
    if depths := [int(found[1]) for name in tensors if (found := re.match(r"blocks\.(\d+)\.norm1\.", name))]:
        sizes["depth"] = max(depths) + 1
    if "blocks.0.mlp.fc1.bias" in tensors and "width" in sizes:
        sizes["mlp_ratio"] = tensors["blocks.0.mlp.fc1.bias"].shape[0] / sizes["width"]
    if "reduce.weight" in tensors:
        sizes |= _read_rows(tensors, encoder_width="encoder.token.2.weight")
    return sizes


def _read_rows(tensors: Mapping[str, Tensor], **names: str) -> dict[str, Any]:
    """The first size of tensors, for those that are there."""
    return {field: tensors[name].shape[0] for field, name in names.items() if name in tensors and tensors[name].dim()}
