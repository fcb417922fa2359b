"""What was trained, on disk."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from deftcore.nn.sharding import is_sharded, whole


def save_trained(model: Any, folder: Path, processor: Any = None) -> None:
    """Writes what was trained (the adapter, of a slim model with its record, or a whole model) and its tokenizer or the
    like, and opens it again to be sure. Every process must call it where the model is sharded (FSDP2); the first one's
    files count.

    Args:
        model, processor: with `save_pretrained`, as those of PEFT and Transformers.

    Raises:
        RuntimeError: nothing was written.
    """
    options = {"state_dict": _whole_state(model)} if any(map(is_sharded, model.parameters())) else {}
    model.save_pretrained(folder, **options)
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        return
    if processor is not None:
        processor.save_pretrained(folder)
    written = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            written += sum(tensors.get_slice(key).get_shape() != [0] for key in tensors.keys())  # noqa: SIM118
    if not written:
        raise RuntimeError(f"{folder}: nothing was saved")


def _whole_state(model: Any) -> dict[str, Any]:
    """The state of a sharded model, of a PEFT model what trains and buffers, in whole tensors."""
    state = model.state_dict()
    if hasattr(model, "peft_config"):
        kept = {name for name, p in model.named_parameters() if p.requires_grad}
        kept.update(name for name, _ in model.named_buffers())  # of adapters, which PEFT tells from the model's
        state = {key: value for key, value in state.items() if key in kept}
    return {key: whole(value) for key, value in state.items()}
