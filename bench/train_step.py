"""A LoRA step of a small Llama, each side in a process of its own."""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from rich.progress import track

from bench.harness import console

TRAIN_STEP = """
import json, resource, statistics, sys, time, warnings
warnings.filterwarnings("ignore")
import peft, torch, transformers
import deftcore
from deftcore.methods.deft.objective import DensityLoss
torch.manual_seed(0)
config = transformers.LlamaConfig(vocab_size=2048, hidden_size=512, intermediate_size=4096, num_hidden_layers=4,
                                  num_attention_heads=8, num_key_value_heads=8, hidden_act="relu")
model = peft.get_peft_model(transformers.LlamaForCausalLM(config), peft.LoraConfig(
    r=16, target_modules=["q_proj", "v_proj", "gate_proj"], task_type="CAUSAL_LM"))
if sys.argv[1] != "peft":
    deftcore.patch(model)
objective = DensityLoss(model, surrogate="tanh") if sys.argv[1] == "deft" else None
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
ids = torch.randint(0, 2048, (8, 128))
model.train()
times = []
for step in range(int(sys.argv[2])):
    start = time.perf_counter()
    loss = model(input_ids=ids, labels=ids).loss
    if objective:
        loss = loss + objective.loss()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    times.append(time.perf_counter() - start)
print(json.dumps({"seconds": statistics.median(times[2:]),
                  "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
"""


def bench_train_step(quick):
    """A LoRA step on a 4-layer Llama (8 x 128 tokens): PEFT, patched, patched with DEFT; a process each, in turn.

    A quick run takes the first and the last, at once and of a thread each: a process takes ten seconds to begin.
    """
    sides = {side: [] for side in (("peft", "deft") if quick else ("peft", "patched", "deft"))}
    with ThreadPoolExecutor(len(sides) if quick else 1) as pool:
        for _ in track(range(1 if quick else 3), "training step", console=console):
            for side, found in zip(sides, pool.map(partial(run, quick=quick), sides), strict=True):
                sides[side].append(found)
    return [
        {
            "side": side, "ms": 1e3 * statistics.median(f["seconds"] for f in found),
            "peak_mb": statistics.median(f["peak_mb"] for f in found),
        }
        for side, found in sides.items()
    ]  # fmt: skip


def run(side, quick):
    command = [sys.executable, "-c", TRAIN_STEP, side, "5" if quick else "10"]
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if quick else {})
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)
