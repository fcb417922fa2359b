"""A function run in two processes, which find each other over a port."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path

import torch

# What the fork server imports once, and its children need not.
multiprocessing.get_context("forkserver").set_forkserver_preload(
    ["torch", "torch.distributed", "accelerate", "transformers", "peft", "deftcore", "deftcore.methods"]
)


def run_in_two(work: Callable[[int, int, Path], None], folder: Path) -> Path:
    """Calls `work(rank, port, folder)` in two processes, waits for both, and returns the folder.

    DTensor's caches keep the process group, and with it Gloo's threads. One that drops the last tensor of a collective
    while the interpreter finalises asks for its lock, is ended inside a destructor, and aborts the process ("terminate
    called without an active exception"). A fork server's children, unlike spawned ones, end by os._exit, without
    finalising anything.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(work, (port, folder), nprocs=2, start_method="forkserver")
    return folder


def as_launched(rank: int, port: int) -> None:
    """Tells this process what `accelerate launch` tells one of two on CPUs."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    torch.set_num_threads(1)
