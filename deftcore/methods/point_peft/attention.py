"""What a classifier sees of a cloud: its patches, and the attention of its class token to them, laid on the points."""

from typing import Any

import torch
from torch import Tensor, nn

from deftcore import ops
from deftcore.methods.point_peft.backbone import PointTransformer
from deftcore.methods.point_peft.patches import Patches


@torch.no_grad()
def attention_to_points(model: nn.Module, cloud: Tensor) -> tuple[Tensor, Tensor]:
    """The attention that the class token of the last block pays to each point's patch, [N], and the logits [classes].

    Means over heads; a point's patch is the one whose centre is nearest. Of adapted models too.

    Args:
        model: with a `PointTransformer` in it; its mode is left as it was.
        cloud: [N, 3].

    Raises:
        ValueError: there is no such backbone in it.
    """
    backbone = _backbone(model)
    last: Any = backbone.blocks[-1]
    seen: list[Tensor] = []  # by its attention, of which an adapter may use the parts alone
    handle = last.norm1.register_forward_hook(lambda module, inputs, normed: seen.append(normed))
    training = model.training
    try:
        logits = model.eval()(points=cloud.unsqueeze(0)).logits[0]
    finally:
        handle.remove()
        model.train(training)
    query, key, _ = last.attention.split(seen[-1])
    weights = torch.softmax(query[:, :, :1] @ key.transpose(-1, -2) / query.shape[-1] ** 0.5, -1).mean(1)[0, 0]
    centres = backbone.group(cloud.unsqueeze(0)).centres
    nearest, _ = ops.knn(centres, cloud.unsqueeze(0).to(centres.dtype), 1)
    return weights[-centres.shape[1] :][nearest[0, :, 0]], logits


@torch.no_grad()
def patches_of(model: nn.Module, cloud: Tensor) -> Patches:
    """The patches that a classifier cuts a cloud [N, 3] into, as a batch of one.

    Raises:
        ValueError: there is no `PointTransformer` in it.
    """
    return _backbone(model).group(cloud.unsqueeze(0))


def _backbone(model: nn.Module) -> PointTransformer:
    found = next((each for each in model.modules() if isinstance(each, PointTransformer)), None)
    if found is None:
        raise ValueError(f"model: must hold a PointTransformer, got {type(model).__name__}")
    return found
