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
from torch import Tensor

from deftcore.cli.quickstart.base_model import Settings
from deftcore.methods.deft.files import save_sparse
from deftcore.methods.lora.merging import merge
from deftcore.models.decoder import compile_decoder
from deftcore.models.sparsify import sparsify


def continued(writer: Any, prompt: Tensor, new_tokens: int) -> Tensor:
    """A model's or a decoder's greedy continuation of a prompt [1, L], all of its length."""
    options = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "pad_token_id": 0}
    return writer.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[:, prompt.shape[1] :]


def decode_side_by_side(model: Any, prompts: list[Tensor], settings: Settings) -> dict[str, Any]:
    """Greedy decoding by Transformers, and by `compile_decoder` of the dense model and of its sparse form."""
    model.eval()
    dense, sparse = (
        _decoder(model, prompts, settings),
        _decoder(sparsify(deepcopy(model), path="sparse"), prompts, settings),
    )
    rate, same = _decode({"dense": dense, "sparse": sparse, "Transformers": model}, prompts, settings)
    return {
        "transformers_tokens_per_s": rate["Transformers"],
        "dense_tokens_per_s": rate["dense"],
        "sparse_tokens_per_s": rate["sparse"],
        "speed_up": rate["sparse"] / rate["dense"],
        "same_tokens": same["sparse"],
        "same_tokens_as_transformers": same["Transformers"],
        "not_native": dense.reason or sparse.reason,
    }


def _decoder(model: Any, prompts: list[Tensor], settings: Settings) -> Any:
    return compile_decoder(model, max_length=prompts[0].shape[1] + settings.new_tokens)


def _decode(
    sides: dict[str, Any], prompts: list[Tensor], settings: Settings
) -> tuple[dict[str, float], dict[str, bool]]:
    """Tokens per second of each side, alternating on the same prompts, medians; and whether a side's tokens are those
    of the first."""
    for side in sides.values():  # warms up; the cost model measures its shapes here
        continued(side, prompts[0], 4)
    times: dict[str, list[float]] = {name: [] for name in sides}
    same, first = dict.fromkeys(sides, True), next(iter(sides))
    for _ in range(settings.rounds):
        for prompt in prompts:
            found = {}
            for name, side in sides.items():
                start = time.perf_counter()
                found[name] = continued(side, prompt, settings.new_tokens)
                times[name].append(time.perf_counter() - start)
            for name, tokens in found.items():
                same[name] &= bool(torch.equal(tokens, found[first]))
    return {name: settings.new_tokens / statistics.median(t) for name, t in times.items()}, same


PEAK_MEMORY = """
import torch
from deftcore.cli.quickstart.decoding import continued
from deftcore.methods.deft.files import load_sparse
from deftcore.models.checkpoints import load_model
from deftcore.models.decoder import compile_decoder
from deftcore.training.adapters import load_adapter
from deftcore.methods.lora.patch import patch
kind, folder, *ids = sys.argv[1:]
model = {
    "idle": lambda: None,
    "float32": lambda: load_model(folder),
    "4-bit dense": lambda: patch(load_adapter(load_model(folder), folder + "/adapter")),
    "4-bit sparse": lambda: load_sparse(folder),
}[kind]()
if model is not None:
    continued(compile_decoder(model.eval(), max_length=len(ids) + 8), torch.tensor([[int(i) for i in ids]]), 8)
with open("/proc/self/status") as status:  # ru_maxrss would count the parent that forked this process
    print(next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024)
"""


def compare_4bit(model: Any, prompts: list[Tensor], settings: Settings, folder: Path) -> dict[str, Any]:
    """Size on disk, peak memory of a fresh process and speed of one fine-tuned model: float32, 4-bit, 4-bit sparse."""
    model.eval()
    folders = {"float32": folder / "float32", "4-bit dense": folder / "4-bit", "4-bit sparse": folder / "4-bit"}
    for path in set(folders.values()):
        shutil.rmtree(path, ignore_errors=True)
    dense = merge(deepcopy(model), to="16bit", dtype=torch.float32)
    dense.save_pretrained(folders["float32"])
    model.save_pretrained(folder / "adapter")
    save_sparse(deepcopy(model).unload(), folders["4-bit dense"], adapter=folder / "adapter")
    forms = {"4-bit dense": model, "4-bit sparse": sparsify(deepcopy(model), path="sparse"), "float32": dense}
    sides = {name: _decoder(form, prompts, settings) for name, form in forms.items()}
    rate, same = _decode(sides, prompts, settings)
    ids = [str(i) for i in prompts[0][0].tolist()]
    # Which deftcore they import is not for the folder to decide in which this process was started.
    command = [sys.executable, "-c", f"import sys\nsys.path[:] = {sys.path!r}\n{PEAK_MEMORY}"]
    started = {
        kind: subprocess.Popen(
            [*command, kind, str(folders.get(kind, folder)), *ids], stdout=subprocess.PIPE, text=True
        )
        for kind in ("idle", *folders)
    }
    peak = {kind: _last_number(process) for kind, process in started.items()}
    rows = {}
    for kind, path in folders.items():
        size = sum(file.stat().st_size for file in path.rglob("*.safetensors")) / 1e6
        rows[kind] = {"disk_mb": size, "peak_mb": peak[kind], "tokens_per_s": rate[kind]}
    return {
        "rows": rows,
        "idle_mb": peak["idle"],
        "same_tokens": same["4-bit sparse"],
        "same_tokens_as_float32": same["float32"],
        "not_native": next((side.reason for side in sides.values() if side.reason), ""),
    }


def _last_number(process: Any) -> float:
    printed, _ = process.communicate()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return float(printed.split()[-1])
