"""Lyapunov exponents of Mamba models, and how far mixed-precision runs drift from float32 (arXiv 2406.00209).

The protocol: one model fine-tuned with LoRA in float32 and in each precision, same seed and data order; after given
numbers of steps both are compared on a fixed set. Two float32 runs of different seeds are the yardstick.
"""

import copy
import itertools
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from deftcore._files import replacing_file, write_json
from deftcore.models.checkpoints import load_model
from deftcore.models.families import is_mamba
from deftcore.models.preflight import empty_model
from deftcore.nn.mamba import MambaBlock
from deftcore.nn.mamba2 import Mamba2Block
from deftcore.ops.ssm.lyapunov import lyapunov_exponents
from deftcore.training.config import TrainingConfig
from deftcore.training.device import choose_device
from deftcore.training.fields import (
    Count,
    DataFile,
    Length,
    Needed,
    OutputFolder,
    Positive,
    Text,
    Whole,
    checked,
    one_of,
)
from deftcore.training.loop import Diverged, train
from deftcore.training.task import Batches, Task
from deftcore.training.text import TextData, TextTask
from deftcore.training.wrapping import add_adapter

_EVALUATION = 8  # batches of the fixed set
_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
Batch = dict[str, Tensor]


@torch.no_grad()
def exponents(model: nn.Module, batches: Sequence[Batch]) -> dict[str, dict[str, float]]:
    """Exponents of each (patched) mixer over all rows of the batches.

    Returns, by layer name: `max`, `min` and `mean` over rows, channels and states, the mean step, the number of steps,
    and the memory length -1 / max in steps.
    """
    mixers: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, (MambaBlock, Mamba2Block))}
    if not mixers:
        raise ValueError(
            f"model: {type(model).__name__} has no Mamba mixer on deftcore's ops; call deftcore.patch first"
        )
    found: dict[str, list[tuple[Tensor, Tensor, int]]] = {name: [] for name in mixers}
    mask: list[Tensor | None] = [None]

    def watch(name: str) -> Any:
        def hook(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            steps = module.steps(hidden, mask[0])
            values = lyapunov_exponents(steps, module.decay(), mask=mask[0])
            count = steps.shape[0] * steps.shape[2] if mask[0] is None else int(mask[0].sum())
            kept = steps if mask[0] is None else steps * mask[0].unsqueeze(1)
            found[name].append((values, kept.sum(dtype=torch.float64) / (steps.shape[1] * count), count))

        return hook

    handles = [m.register_forward_pre_hook(watch(name), with_kwargs=True) for name, m in mixers.items()]
    try:
        for batch in batches:
            padding = batch.get("attention_mask")
            mask[0] = None if padding is None or bool(padding.all()) else padding
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    report = {}
    for name, rows in found.items():
        values = torch.cat([v.flatten() for v, _, _ in rows])
        total = sum(count for _, _, count in rows)
        largest = float(values.max())
        report[name] = {
            "max": largest, "min": float(values.min()), "mean": float(values.mean()),
            "mean_step": float(sum(mean * count for _, mean, count in rows)) / total, "steps": total,
            "memory": -1 / largest if largest else math.inf,
        }  # fmt: skip
    return report


@torch.no_grad()
def divergence(reference: nn.Module, other: nn.Module, batches: Sequence[Batch], precision: str) -> dict[str, Any]:
    """How far `other`, run in `precision`, is from `reference` in float32 on the same batches.

    Returns mean |logit difference|, mean KL of the next-token distributions (nats), the difference of the losses, and
    by layer the relative deviation |h - h'| / |h| over time with the fitted slope of its logarithm after its peak.
    """
    sums, count, curves = [0.0, 0.0, 0.0], 0, []
    for batch in batches:
        exact = reference(**batch, output_hidden_states=True)
        with _precision(precision, batch["input_ids"].device.type):
            low = other(**batch, output_hidden_states=True)
        keep = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        a, b = exact.logits.float()[keep], low.logits.float()[keep]
        sums[0] += float((a - b).abs().mean(-1).sum())
        sums[1] += float(F.kl_div(b.log_softmax(-1), a.log_softmax(-1), reduction="sum", log_target=True))
        sums[2] += float(low.loss - exact.loss) * int(keep.sum())
        count += int(keep.sum())
        curves.append(
            torch.stack(
                [
                    ((h.float() - g.float()).norm(dim=-1) / h.float().norm(dim=-1).clamp(min=1e-12)).mean(0)
                    for h, g in zip(exact.hidden_states, low.hidden_states, strict=True)
                ]
            )
        )
    shortest = min(c.shape[1] for c in curves)
    curve = torch.stack([c[:, :shortest] for c in curves]).mean(0).cpu()
    return {
        "mean_abs_logit": sums[0] / count, "kl": sums[1] / count, "loss_difference": sums[2] / count,
        "deviation": curve.tolist(), "slope": [_slope(row) for row in curve],
    }  # fmt: skip


def _slope(curve: Tensor) -> float:
    """Of log(deviation) from its peak on, per token."""
    start = int(curve.argmax())
    tail = curve[start:].clamp(min=1e-12).log().double()
    if len(tail) < 2:
        return 0.0
    t = torch.arange(len(tail), dtype=torch.float64)
    t = t - t.mean()
    return float((t * (tail - tail.mean())).sum() / t.square().sum())


@contextmanager
def _precision(precision: str, device: str) -> Iterator[None]:
    dtype = _DTYPES[precision]
    with nullcontext() if dtype is None else torch.autocast(device, dtype=dtype):
        yield


@checked
def run(
    model: Needed,
    data: DataFile,
    output: OutputFolder,
    *,
    precisions: Sequence[Annotated[str, one_of("bf16", "fp16")]] = ("bf16",),
    steps: Annotated[Sequence[Whole], Field(min_length=1)] = (0, 10, 100),
    against: Text = "",
    seeds: Count = 1,
    max_length: Length = 256,
    batch_size: Count = 4,
    learning_rate: Positive = 2e-4,
    device: Text = "auto",
) -> dict[str, Any]:
    """The whole protocol; writes report.json and lyapunov.png to `output`.

    A run whose loss is no number any more stands under `diverged`, with the step, and is not in later checkpoints.

    Raises:
        FileNotFoundError, ValueError: naming the argument.
    """
    where = choose_device(device)
    if not is_mamba(empty_model(model)):
        raise ValueError(f"model: {model} is not a Mamba, Mamba-2 or FalconMamba model")
    if against:
        empty_model(against)
    folder = Path(output)
    report: dict[str, Any] = {"steps": sorted(set(steps)), "precisions": list(precisions), "models": {}}
    for path in filter(None, (model, against)):
        report["models"][path] = _protocol(
            path, data, report["steps"], precisions, seeds, max_length, batch_size, learning_rate, where
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", report)
    _draw(report, folder / "lyapunov.png")
    return report


def _protocol(
    path: str, data: str, steps: list[int], precisions: Sequence[str], seeds: int, max_length: int, batch_size: int,
    learning_rate: float, device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    task = TextTask.of_model(path, empty_model(path))
    examples = task.read(data, TextData(train=data, max_length=max_length))
    base = cast(Any, load_model(path)).to(device)
    fixed, rest = examples[: _EVALUATION * batch_size], examples[_EVALUATION * batch_size :] or examples
    evaluation = list(Batches(fixed, batch_size, task.collate, shuffle=False, device=device).epoch(0))
    runs = [(precision, seed) for seed in range(seeds) for precision in ("fp32", *precisions)]
    if seeds == 1:
        runs.append(("fp32", 1))  # the yardstick: another seed in float32
    report: dict[str, Any] = {
        "mamba": is_mamba(base), "type": base.config.model_type,
        "parameters": sum(p.numel() for p in base.parameters()),
        "evaluation_tokens": sum(len(e["input_ids"]) for e in fixed), "diverged": [], "checkpoints": [],
    }  # fmt: skip
    trained = {}
    for precision, seed in runs:
        config = TrainingConfig(
            max_steps=steps[-1], batch_size=batch_size, learning_rate=learning_rate, schedule="constant",
            warmup_ratio=0, max_grad_norm=0, mixed_precision="no" if precision == "fp32" else precision, seed=seed,
        )  # fmt: skip
        label = f"{Path(path).name}, {precision} seed {seed}"
        trained[precision, seed], lost = trained_parts(copy.deepcopy(base), rest, config, steps, task, label)
        if lost is not None:
            report["diverged"].append({"precision": precision, "seed": seed, "step": lost})
    reference, other = _adapted(copy.deepcopy(base)).eval(), _adapted(base).eval()
    for step in steps:
        entry: dict[str, Any] = {"step": step, "runs": []}
        for precision, seed in runs:
            own, exact = trained[precision, seed], trained["fp32", 0 if precision == "fp32" else seed]
            if own is exact or step not in own or step not in exact:
                continue
            reference.load_state_dict(exact[step], strict=False)
            other.load_state_dict(own[step], strict=False)
            result = divergence(reference, other, evaluation, precision)
            if report["mamba"]:
                with _precision(precision, device.type):
                    result["lyapunov"] = exponents(other, evaluation)
            entry["runs"].append({"precision": precision, "seed": seed, **result})
        if report["mamba"] and step in trained["fp32", 0]:
            reference.load_state_dict(trained["fp32", 0][step], strict=False)
            entry["lyapunov"] = exponents(reference, evaluation)
        report["checkpoints"].append(entry)
    return report


def _adapted(model: Any) -> Any:
    options: dict[str, Any] = {"r": 8, "lora_alpha": 16}
    if is_mamba(model):
        return add_adapter(model, "mamba-lora", options)
    return add_adapter(model, "lora", options | {"target_modules": "all-linear"})


def trained_parts(
    base: Any, examples: list[Any], config: TrainingConfig, steps: Sequence[int], task: Task, label: str
) -> tuple[dict[int, dict[str, Tensor]], int | None]:
    """What the adapter holds after each of the numbers of steps, the last of which is the run's; and the step at which
    the run diverged, where it did: numbers from there on are missing."""
    torch.manual_seed(config.seed)
    model = _adapted(base)
    found: dict[int, dict[str, Tensor]] = {}
    done = itertools.count()

    def keep(*_: Any) -> None:  # in front of a forward, which is one step's: so many steps have been made before
        step = next(done)
        if step in steps:
            found[step] = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    handle = model.register_forward_pre_hook(keep)
    try:
        if config.max_steps:
            with tempfile.TemporaryDirectory() as folder:
                train(model, examples, config, folder, task=task, label=label)
    except Diverged as error:
        return found, error.step
    finally:
        handle.remove()
    keep()
    return found, None


def lines(report: dict[str, Any]) -> list[str]:
    """What the command prints."""
    found = []
    for path, result in report["models"].items():
        found.append(f"{path}: {result['parameters'] / 1e6:.1f} M parameters")
        for run in result["diverged"]:
            found.append(f"  {run['precision']} seed {run['seed']}: diverged, no loss at step {run['step']}")
        for entry in result["checkpoints"]:
            if "lyapunov" in entry:
                worst = max(layer["max"] for layer in entry["lyapunov"].values())
                found.append(f"  step {entry['step']}: largest exponent {worst:.3e} nats per token")
            for each in entry["runs"]:
                found.append(
                    f"  step {entry['step']}, {each['precision']} seed {each['seed']}: mean |logit difference| "
                    f"{each['mean_abs_logit']:.4f}, KL {each['kl']:.2e}, loss {each['loss_difference']:+.4f}, "
                    f"slope of the deviation in the last layer {each['slope'][-1]:+.1e}"
                )
    return found


def _draw(report: dict[str, Any], path: Path) -> None:
    """Exponents per layer, and deviation over time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for result in report["models"].values():
        kind = result["type"]
        last = result["checkpoints"][-1]
        if "lyapunov" in last:
            layers = last["lyapunov"].values()
            left.plot([-layer["max"] for layer in layers], "o-", label=f"{kind}: largest")
            left.plot([-layer["mean"] for layer in layers], "x:", label=f"{kind}: mean")
        for each in last["runs"]:
            right.plot(each["deviation"][-1], label=f"{kind} {each['precision']} seed {each['seed']}")
    left.set(xlabel="layer", ylabel="-exponent (nats per token)", yscale="log", title="Lyapunov exponents")
    right.set(
        xlabel="token", ylabel="|h - h'| / |h|, last layer", yscale="log", title=f"after {report['steps'][-1]} steps"
    )
    for axis in (left, right):
        axis.legend(fontsize=7)
    figure.tight_layout()
    with replacing_file(path) as partial:
        figure.savefig(partial, dpi=120)
    plt.close(figure)
