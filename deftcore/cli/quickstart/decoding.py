"""One fine-tuned model decoded in several forms, side by side: speed, memory, and whether the tokens are the same."""

import shutil
import statistics
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deftcore.cli.quickstart.base_model import Settings
from deftcore.methods.deft.files import save_sparse
from deftcore.methods.lora.merging import merge
from deftcore.models.decoding import greedy_decode
from deftcore.models.sparsify import sparsify


def decode_side_by_side(model: nn.Module, prompts: list[torch.Tensor], settings: Settings) -> dict[str, Any]:
    """Greedy decoding, dense PyTorch against sparse kernels."""
    model.eval()
    rate, same, error = _decode({"dense": model, "sparse": sparsify(deepcopy(model))}, prompts, settings)
    return {
        "dense_tokens_per_s": rate["dense"],
        "sparse_tokens_per_s": rate["sparse"],
        "speed_up": rate["sparse"] / rate["dense"],
        "same_tokens": same["sparse"],
        "largest_logit_difference": error["sparse"],
    }


def _decode(
    sides: dict[str, nn.Module], prompts: list[torch.Tensor], settings: Settings
) -> tuple[dict[str, float], dict[str, bool], dict[str, float]]:
    """Tokens per second of each side, alternating on the same prompts, medians; and whether a side's tokens are those
    of the first, and how far its logits are off."""
    for side in sides.values():  # warms up; the cost model measures its shapes here
        greedy_decode(side, prompts[0], 4)
    times: dict[str, list[float]] = {name: [] for name in sides}
    same, error = dict.fromkeys(sides, True), dict.fromkeys(sides, 0.0)
    first = next(iter(sides))
    for _ in range(settings.rounds):
        for prompt in prompts:
            found = {}
            for name, side in sides.items():
                start = time.perf_counter()
                found[name] = greedy_decode(side, prompt, settings.new_tokens)
                times[name].append(time.perf_counter() - start)
            for name, (tokens, logits) in found.items():
                same[name] &= bool(torch.equal(tokens, found[first][0]))
                error[name] = max(error[name], float((logits - found[first][1]).abs().max()))
    return {name: settings.new_tokens / statistics.median(t) for name, t in times.items()}, same, error


PEAK_MEMORY = """
import sys, torch
from deftcore.methods.deft.files import load_sparse
from deftcore.models.checkpoints import load_model
from deftcore.training.adapters import load_adapter
from deftcore.methods.lora.patch import patch
from deftcore.models.decoding import greedy_decode
kind, folder, *ids = sys.argv[1:]
model = {
    "idle": lambda: None,
    "float32": lambda: load_model(folder),
    "4-bit dense": lambda: patch(load_adapter(load_model(folder), folder + "/adapter")),
    "4-bit sparse": lambda: load_sparse(folder),
}[kind]()
if model is not None:
    greedy_decode(model, torch.tensor([[int(i) for i in ids]]), 8)
with open("/proc/self/status") as status:  # ru_maxrss would count the parent that forked this process
    print(next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024)
"""


def compare_4bit(model: Any, prompts: list[torch.Tensor], settings: Settings, folder: Path) -> dict[str, Any]:
    """Size on disk, peak memory of a fresh process and speed of one fine-tuned model: float32, 4-bit, 4-bit sparse."""
    model.eval()
    folders = {"float32": folder / "float32", "4-bit dense": folder / "4-bit", "4-bit sparse": folder / "4-bit"}
    for path in set(folders.values()):
        shutil.rmtree(path, ignore_errors=True)
    dense = merge(deepcopy(model), to="16bit", dtype=torch.float32)
    dense.save_pretrained(folders["float32"])
    model.save_pretrained(folder / "adapter")
    save_sparse(deepcopy(model).unload(), folders["4-bit dense"], adapter=folder / "adapter")
    sides = {"4-bit dense": model, "4-bit sparse": sparsify(deepcopy(model)), "float32": dense}
    rate, same, error = _decode(sides, prompts, settings)
    ids = [str(i) for i in prompts[0][0].tolist()]
    peak = {}
    for kind in ("idle", *folders):
        command = [sys.executable, "-c", PEAK_MEMORY, kind, str(folders.get(kind, folder)), *ids]
        peak[kind] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    rows = {}
    for kind, path in folders.items():
        size = sum(file.stat().st_size for file in path.rglob("*.safetensors")) / 1e6
        rows[kind] = {"disk_mb": size, "peak_mb": peak[kind], "tokens_per_s": rate[kind]}
    return {
        "rows": rows,
        "idle_mb": peak["idle"],
        "same_tokens": same["4-bit sparse"],
        "same_tokens_as_float32": same["float32"],
        "largest_logit_difference": error["4-bit sparse"],
    }
