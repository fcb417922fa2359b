"""Full fine-tuning, PEFT's LoRA and S2FT on the same small real-text model: `python -m bench.compare_finetuning`.

The quickstart's texts (library sources, then the language reference), a model of 40 M weights, equal budgets for LoRA
on all linears and S2FT on down projections, each method in its own process. Writes finetuning_cpu.json and
finetuning_cpu.png to bench/results.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console

from deftcore._files import cache_folder, write_json
from deftcore.cli.quickstart.base_model import Settings, base_model
from deftcore.cli.quickstart.texts import reference_text
from deftcore.training import TrainingConfig, encode, train
from deftcore.training.wrapping import add_adapter

SETTINGS = Settings(
    vocab_size=2048,
    hidden_size=768,
    intermediate_size=2048,
    num_layers=6,
    num_heads=6,
    base_learning_rate=1e-3,
    widening=1,
    base_characters=2_000_000,
    base_steps=80,
)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHODS = {  # method, options, learning rate (the better of those tried on this task)
    "full": ("full", {}, 3e-4),
    "LoRA": ("lora", {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": LINEARS}, 6e-3),
    "S2FT": ("s2ft", {"channel_ratio": 0.069, "targets": ["down"]}, 1.5e-2),
}
RESULTS = Path(__file__).parent / "results"


def run(name, steps, folder):
    """One method: fine-tunes, prints a line of JSON."""
    method, options, rate = METHODS[name]
    base = base_model(SETTINGS, 0, Console(stderr=True))
    model, tokenizer = base.model, base.tokenizer
    training, held_out = reference_text()
    examples, validation = (
        encode([{"text": text}], tokenizer, SETTINGS.max_length, is_encoder_decoder=False)
        for text in (training, held_out)
    )
    torch.manual_seed(0)
    if name == "LoRA":  # PEFT's own layers, not ours
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    else:
        model = add_adapter(model, method, options)
    config = TrainingConfig(
        max_steps=steps, batch_size=SETTINGS.batch_size, learning_rate=rate, schedule="cosine", log_every=1,
        eval_every=max(steps // 5, 1),
    )  # fmt: skip
    marks = []
    model.register_forward_pre_hook(lambda *_: marks.append((time.perf_counter(), model.training)))
    result = train(model, examples, config, folder, validation=validation[:64], resume=False, label=name)
    seconds = [b[0] - a[0] for a, b in itertools.pairwise(marks) if a[1] and b[1]]
    status = Path("/proc/self/status").read_text()
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    print(
        json.dumps(
            {
                "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
                "loss": result.eval_loss,
                "step_ms": 1e3 * sorted(seconds[2:])[len(seconds[2:]) // 2],
                "peak_mb": int(status.split("VmHWM:")[1].split()[0]) / 1024,
                "curve": [[e["step"], e["eval_loss"]] for e in log if "eval_loss" in e],
            }
        )
    )


def plot(report, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    colors = ["#9aa5b1", "#4c78a8", "#e4572e"]
    for color, (name, r) in zip(colors, report["methods"].items(), strict=True):
        axes[0].plot(*zip(*r["curve"], strict=True), marker="o", color=color, label=name)
        for axis, key in ((axes[1], "step_ms"), (axes[2], "peak_mb")):
            axis.bar_label(axis.bar(name, r[key], 0.6, color=color), fmt="%.0f")
    axes[0].set(title="Validation loss, nats a token", xlabel="step")
    axes[0].legend(frameon=False)
    axes[1].set(title="Step, ms")
    axes[2].set(title="Peak memory of the process, MB")
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.compare_finetuning", description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--method", choices=METHODS, help="run this one here and print its figures")
    parser.add_argument("--folder", type=Path, default=cache_folder() / "finetuning", help="for the runs' files")
    args = parser.parse_args()
    if args.method:
        return run(args.method, args.steps, args.folder / args.method)
    base_model(SETTINGS, 0, Console(stderr=True))  # once, for all
    report = {"command": f"python -m bench.compare_finetuning --steps {args.steps}", "methods": {}}
    for name in METHODS:
        command = [sys.executable, "-m", "bench.compare_finetuning", "--method", name, "--steps", str(args.steps),
                   "--folder", str(args.folder)]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        report["methods"][name] = json.loads(done.stdout.splitlines()[-1])
    for name, r in report["methods"].items():
        print(
            f"{name}: {r['trained'] / 1e6:.2f} M trained, loss {r['loss']:.3f}, step {r['step_ms']:.0f} ms, "
            f"peak {r['peak_mb']:.0f} MB"
        )
    write_json(RESULTS / "finetuning_cpu.json", report)
    plot(report, RESULTS / "finetuning_cpu.png")
    return None


if __name__ == "__main__":
    main()
