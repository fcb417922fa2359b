"""What a quantised model needs before it is trained: frozen weights, float32 norms, activations computed twice."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor


def prepare_for_training(model: Any, *, gradient_checkpointing: bool = True) -> Any:
    """Readies a quantised model for adapters, in place: all weights frozen, norms computed in float32.

    A norm still returns its input's dtype: what follows it, the dense head among them, is in the checkpoint's.

    Args:
        model: a Transformers model after `quantize`.
        gradient_checkpointing: recompute activations in the backward (not reentrant).

    Returns:
        The model; parameters keep their shapes, norms' become float32. QLoRA's recipe (arXiv 2305.14314).

    Raises:
        AttributeError: by PyTorch, for `gradient_checkpointing` of a model that is not Transformers'.
    """
    model.requires_grad_(False)
    for module in model.modules():
        if "Norm" in type(module).__name__:
            module.float()
            setattr(module, "forward", partial(_norm_in_float32, module.forward))  # noqa: B010
    if gradient_checkpointing:
        checkpoint_activations(model)
        model.config.use_cache = False
    return model


def checkpoint_activations(model: Any) -> None:
    """A Transformers model recomputes its activations in the backward, not reentrant, from now on."""
    enable = getattr(model, "activation_checkpointing_enable", None)  # Transformers 5.23 renamed it
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def _norm_in_float32(forward: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return forward(x.float(), *args, **kwargs).to(x.dtype)
