"""What Transformers' cache holds for a layer of Mamba or Mamba-2, by release."""

from typing import Any


def held_states(cache: Any, layer: int) -> tuple[Any, Any]:
    """The convolution's inputs [B, C, steps] and the scan's state; None before the first tokens."""
    if hasattr(cache, "get_conv_state"):
        return cache.get_conv_state(layer), cache.get_recurrent_state(layer)
    if not cache.has_previous_state(layer):  # Transformers before 5.21
        return None, None
    held = cache.layers[layer]
    return held.conv_states[0], held.recurrent_states[0]
