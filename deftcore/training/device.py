"""Which device a task runs on."""

import os

import torch
from accelerate.utils import parse_flag_from_env


def choose_device(wanted: str = "auto") -> torch.device:
    """`auto` is the machine's accelerator, where there is one, and the CPU otherwise; names are PyTorch's: "cpu",
    "cuda", "cuda:1", "mps" ...

    Processes of one launch take the accelerator of their local rank, as Accelerate's do; which ones a single process
    sees is for CUDA_VISIBLE_DEVICES and its like to say. ACCELERATE_USE_CPU hides them all.

    Raises:
        ValueError: for a device that this machine does not have, or that is another process's of the launch.
    """
    accelerators, launched = _accelerators(), "LOCAL_RANK" in os.environ
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    kind = accelerators[0].type if accelerators else "cpu"
    try:
        device = torch.device(kind if wanted == "auto" else wanted)
    except RuntimeError:  # no name of a device
        device = torch.device("meta")
    if device.type == "cpu":
        return torch.device("cpu")
    if device == torch.device(kind):
        device = torch.device(kind, rank)
    whose = f" in process {rank} of a launch" if launched else ""
    if device not in accelerators:
        there = ", ".join(["cpu", *map(str, accelerators)])
        raise ValueError(f"device (--device): must be auto or what this machine has ({there}), got {wanted!r}{whose}")
    if launched and device.index != rank:
        raise ValueError(f"device (--device): must be {kind}, each process takes its own, got {wanted!r}{whose}")
    return device


def _accelerators() -> list[torch.device]:
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or parse_flag_from_env("ACCELERATE_USE_CPU"):
        return []
    return [torch.device(found.type, index) for index in range(torch.accelerator.device_count())]
