"""From logits to a loss over the labelled pixels, and to classes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from deftcore.ops.checks import check_float, check_number


def segmentation_loss(logits: Tensor, labels: Tensor, *, ignore_index: int = -100, dice: float = 0.0) -> Tensor:
    """The mean cross-entropy of the labelled pixels, binary for one logit; 0, with gradient 0, where there are none.

    Args:
        logits: [B, Q, H, W].
        labels: integer [B, H, W], below Q, or for Q = 1 0 and 1.
        ignore_index: the label of pixels that have none.
        dice: weight of a second term, 1 - Dice: the mean over the Q classes of
            1 - (2 sum p y + 1) / (sum p + sum y + 1), sums over the batch's labelled pixels.

    Returns:
        A scalar, float32 for halves.

    Raises:
        TypeError, ValueError: logits are no floating [B, Q, H, W]; labels is not integer, of another shape, or has a
            label that is none; dice is negative, or no finite number.
    """
    _check(logits, labels, ignore_index)
    classes = logits.shape[1]
    check_number("dice", dice, minimum=0.0)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = labels.long()  # bytes have no -100
    labelled = labels != ignore_index
    target = labels.masked_fill(~labelled, 0)
    if classes == 1:
        each = F.binary_cross_entropy_with_logits(logits[:, 0], target.to(logits.dtype), reduction="none")
    else:
        each = F.cross_entropy(logits, target, reduction="none")
    loss = each.masked_fill(~labelled, 0.0).sum() / labelled.sum().clamp(min=1)
    return loss + dice * _dice(logits, target, labelled) if dice else loss


def _dice(logits: Tensor, target: Tensor, labelled: Tensor) -> Tensor:
    p = logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)
    y = torch.stack([target == k for k in range(logits.shape[1])], 1) if logits.shape[1] > 1 else target.unsqueeze(1)
    p, y = (each.to(p.dtype).masked_fill(~labelled.unsqueeze(1), 0.0) for each in (p, y))
    both, total = (p * y).sum((0, 2, 3)), (p + y).sum((0, 2, 3))
    return (1 - (2 * both + 1) / (total + 1)).mean()


def predicted_classes(logits: Tensor) -> Tensor:
    """int64 [B, H, W] of logits [B, Q, H, W]: the largest; of one logit 1 where it is positive."""
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)


def _check(logits: Tensor, labels: Tensor, ignore_index: int) -> None:
    check_float("logits", logits)
    if logits.ndim != 4:
        raise ValueError(f"logits: must be [B, Q, H, W], got {list(logits.shape)}")
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: must be a Tensor, got {type(labels).__name__}")
    classes = max(logits.shape[1], 2)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels: must be integers, got {labels.dtype}")
    shape = [logits.shape[0], *logits.shape[2:]]
    if list(labels.shape) != shape:
        raise ValueError(f"labels: must be {shape} (B, H, W of logits), got {list(labels.shape)}")
    if not torch.compiler.is_compiling():
        labels = labels.long()
        wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= classes))]
        if wrong.numel():
            raise ValueError(f"labels: must be 0 to {classes - 1}, or {ignore_index} for none, got {wrong[0].item()}")
