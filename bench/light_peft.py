"""Light-PEFT against the same LoRA unpruned: training steps, inference, memory, and what a step of estimation costs.

`python -m bench.light_peft MODEL SIDE` is one process of the memory comparison.
"""

import ctypes
import gc
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from rich.progress import track

import deftcore
from bench.harness import alternate, console
from deftcore.methods.light_peft.adapters import add_adapters
from deftcore.methods.light_peft.baselines import random_scores
from deftcore.methods.light_peft.estimation import Estimation
from deftcore.methods.light_peft.selection import select
from deftcore.models.coupled import find_coupled

RATIO = 1 / 3  # of heads and of channels
# What goes besides: nothing, or as published three quarters of the adapters and half of the others' ranks.
VARIANTS = {"heads and channels": {"module_ratio": 0.0, "rank_ratio": 0.0}, "adapters too": {}}
SIDES = ("LoRA", "estimation", *VARIANTS)
MODELS = {"MiniLM": (6, 384, 32), "Llama": (4, 768, 4)}  # layers, width, sequences of a training batch
LENGTH = 128
STEPS, WARM = 5, 2  # optimizer state exists from the second step on
RECORDING = (7, 10)  # a step in the second half, where importance is summed, and the number of steps


def base_model(name, quick=False):
    """An encoder of MiniLM's shape, or a stack of Llama blocks, with random weights."""
    import transformers as t

    torch.manual_seed(0)
    layers, width, _ = MODELS[name]
    layers = 2 if quick else layers
    if name == "MiniLM":
        return t.BertModel(t.BertConfig(hidden_size=width, num_hidden_layers=layers, intermediate_size=4 * width))
    config = t.LlamaConfig(vocab_size=32, hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers,
                           num_attention_heads=width // 64, use_cache=False)  # fmt: skip
    return t.LlamaModel(config)


class Side:
    """A model with LoRA on all linear layers, as one of SIDES trains it, and an optimizer over what trains."""

    def __init__(self, name, side, quick=False):
        base = base_model(name, quick)
        config = deftcore.LightPeftConfig(head_ratio=RATIO, ffn_ratio=RATIO, dropout=0.0, **VARIANTS.get(side, {}))
        self.whole = linear_weights(base)
        self.model = add_adapters(base, config)
        self.estimation = Estimation(self.model, config) if side == "estimation" else None
        if side in VARIANTS:  # what is cut costs the same whatever chose it
            structures = find_coupled(base)
            deftcore.slim(self.model, select(structures, random_scores(self.model, structures, config), config))
        self.kept = linear_weights(base)
        groups = [{"params": [p for p in self.model.parameters() if p.requires_grad]}]
        self.trained = sum(p.numel() for p in groups[0]["params"])
        groups += self.estimation.groups(1e-5) if self.estimation else []
        self.optimizer = torch.optim.AdamW(groups, lr=1e-5, fused=True)
        self.model.train()

    def step(self, ids):
        batch = {"input_ids": ids}
        if self.estimation:
            self.estimation.begin([batch], *RECORDING)
        output = self.model(**batch)
        loss = output.last_hidden_state.square().mean()
        if self.estimation:
            loss = loss + self.estimation.share(batch, output)
        loss.backward()
        if self.estimation:
            self.estimation.end()
        self.optimizer.step()
        self.optimizer.zero_grad()


def linear_weights(base):
    """Of a base model's linear layers, under adapters or not."""
    return sum(m.weight.numel() for n, m in base.named_modules() if type(m) is torch.nn.Linear and ".lora_" not in n)


def tokens(sequences):
    return torch.randint(0, 32, (sequences, LENGTH))


def bench_light_peft(quick):
    """A row per model and variant, all of a model's sides in turn, step by step, in one process; memory alone in one
    each, unless the run is a quick one: a process takes ten seconds to begin."""
    peaks = {} if quick else peaks_mb()
    models = list(MODELS)[: 1 if quick else None]
    return [row for name in track(models, "Light-PEFT", console=console) for row in rows_of(name, quick, peaks)]


def rows_of(name, quick, peaks):
    layers, width, sequences = MODELS[name]
    sides = {side: Side(name, side, quick) for side in SIDES}
    ids, times = tokens(sequences), {side: [] for side in SIDES}
    for _ in range((2 if quick else STEPS) + WARM):
        for side, each in sides.items():
            start = time.perf_counter()
            each.step(ids)
            times[side].append(time.perf_counter() - start)
    seconds = {side: statistics.median(found[WARM:]) for side, found in times.items()}
    inference = {n: infer({k: v for k, v in sides.items() if k != "estimation"}, n, quick) for n in (1, 32)}
    lora = seconds["LoRA"]
    return [
        {
            "base": name, "layers": layers, "width": width, "tokens": sequences * LENGTH, "dtype": "float32",
            "variant": side, "weights": sides[side].kept / sides[side].whole, "trained": sides[side].trained,
            "lora_trained": sides["LoRA"].trained, "lora_ms": lora * 1e3, "slim_ms": seconds[side] * 1e3,
            "speed_up": lora / seconds[side], "estimation_over_lora": seconds["estimation"] / lora,
            **{f"inference_{n}_ms": found[side] * 1e3 for n, found in inference.items()},
            **{f"inference_{n}": found["LoRA"] / found[side] for n, found in inference.items()},
            **(memory_of(name, side, peaks) if peaks else {}),
        }
        for side in VARIANTS
    ]  # fmt: skip


@torch.no_grad()
def infer(sides, sequences, quick):
    """Seconds of a forward with the adapters merged."""
    ids = tokens(sequences)
    for each in sides.values():
        each.model.eval()
        each.model.merge_adapter()
    repeats = 3 if quick else 5 if sequences > 1 else 15
    found = alternate({side: lambda m=each.model: m(input_ids=ids) for side, each in sides.items()}, repeats)
    for each in sides.values():
        each.model.unmerge_adapter()
    return {side: each["seconds"] for side, each in found.items()}


# ---------------------------------------------------------------------------- memory


def memory_of(name, side, peaks):
    """A row's columns, from all high-water marks."""
    lora, slim = (peaks[name, each] - peaks[name, "idle"] for each in ("LoRA", side))
    return {"lora_peak_mb": lora, "slim_peak_mb": slim, "memory": slim / lora}


def peaks_mb():
    """High-water marks of fresh processes' memory while they train; "idle" has everything but the models."""
    cases = [(name, side) for name in MODELS for side in ("idle", "LoRA", *VARIANTS)]
    with ThreadPoolExecutor(2) as pool:  # of a thread each
        found = pool.map(lambda case: peak_mb(*case), cases)
        return dict(zip(cases, track(found, "memory", total=len(cases), console=console), strict=True))


def peak_mb(*arguments):
    command = [sys.executable, "-m", "bench.light_peft", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout.split()[-1])


def run_for_memory(name, side):
    """Prints what training holds at most; making the model, before it is cut, does not count."""
    idle = side == "idle"
    each = Side(name, "LoRA" if idle else side)
    ids = tokens(1 if idle else MODELS[name][2])[:, : 8 if idle else LENGTH]
    each.step(ids[:1, :8])  # every module is imported
    if idle:
        each = None
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as marks:
        marks.write("5")  # the high-water mark begins anew
    for _ in range(WARM):
        if each:
            each.step(ids)
    with open("/proc/self/status") as status:
        print(next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024)


if __name__ == "__main__":
    run_for_memory(*sys.argv[1:])
