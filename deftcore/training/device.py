"""Which device a task runs on."""

import os

import torch
from accelerate.utils import parse_flag_from_env


def choose_device(wanted: str = "auto") -> torch.device:
    """`auto` is the machine's accelerator, where there is one, and the CPU otherwise; a name must be one of them.

    Processes of one launch take the accelerator of their local rank, as Accelerate's do; which ones a single process
    sees is for CUDA_VISIBLE_DEVICES and its like to say. ACCELERATE_USE_CPU hides them all.

    Raises:
        ValueError: for a device that this machine does not have.
    """
    kinds = ["cpu"]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        kinds.append(accelerator.type)
    if wanted not in ("auto", *kinds):
        raise ValueError(f"device: must be auto or what this machine has ({', '.join(kinds)}), got {wanted!r}")
    kind = kinds[-1] if wanted == "auto" else wanted
    if kind == "cpu":
        return torch.device(kind)
    return torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")))
