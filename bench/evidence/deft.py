"""DEFT on MiniLM, five ways to tune it: `python -m bench.evidence.deft --data FOLDER`.

FOLDER holds a folder per data set, as `bench.evidence.sets` reads them. LoRA, LoRA over 4 bits, bottlenecks, prompts
and prefixes train alone, with the density loss, and with it and a gate a block; then LoRA with other weights of that
loss. Every run is a line of results/deft.jsonl, so that a second call goes on where the first one stopped; `--minutes`
stops it in time, `--only` and `--seeds` choose a part. `--cost` measures steps and peak memory instead, on an idle
machine, into results/deft_cost.json.
"""

import inspect
import itertools
import logging
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MethodType
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn
from torch.optim import Optimizer

from bench.evidence import cost
from bench.evidence.command import parser_of
from bench.evidence.measures import evaluating
from bench.evidence.runs import Entry, Results, about, begin, settings
from bench.evidence.sets import SPECS, Data
from bench.evidence.sides import Ready, Side
from deftcore._files import write_json
from deftcore.methods.deft.objective import DensityLoss
from deftcore.models.blocks import base_of, find_mlp_blocks
from deftcore.nn.quantization import quantize
from deftcore.nn.tokens import fitted
from deftcore.training import TrainingConfig, train
from deftcore.training.loop import Diverged
from deftcore.training.metrics import ConfusionCounts
from deftcore.training.options import make_config
from deftcore.training.registry import Method, Setup, wrap_by_peft
from deftcore.training.task import Batches

_log = logging.getLogger(__name__)
SEEDS = (0, 1, 2)
LENGTHS = {"mr_sentiment": 32, "banking77": 24, "qnli": 48}  # tokens at most
SETS = tuple(LENGTHS)
BATCH, STEPS = 8, 1000
TEST = 1000  # held-out examples at most
TAUS = (10**-3.5, 0.1)  # the specification's threshold of smooth activations, and a coarser one
# Slope of the surrogate, which is to lie where GELU's activations do, -0.17..0. In trials on mr_sentiment 20 at a
# weight of 2 lost twice the accuracy that 5 did, for half the density.
BETA = 5.0
SWEEP = (0.5, 1.0, 2.0)  # weights of the density loss


class GatedDensityLoss(DensityLoss):
    """ADA-DEFT's, whose gates move within so few steps."""

    RATE = 0.1

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """Gates at a rate of their own."""
        return [{**group, "lr": self.RATE} for group in super().groups(rate)]


def _forward_with_past(self: Any, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
    return type(self).forward(self, *args, cache=past_key_values, **kwargs)


def _wrap_prefix(model: Any, config: Any, setup: Setup) -> Any:
    """PEFT looks for an argument `past_key_values`, which encoders have under another name."""
    wrapped = wrap_by_peft(model, config, setup)
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        model.forward = MethodType(_forward_with_past, model)
    return wrapped


PREFIX = Method(name="prefix", summary="PEFT's.", config=peft.PrefixTuningConfig, wrap=_wrap_prefix)


@dataclass(frozen=True)
class DeftSide(Side):
    """A method alone, or with the density loss.

    Args:
        alpha: weight of the loss; 0: alone.
        beta: slope of its surrogate tanh(beta |a|), which decides how large an activation may be that it still moves.
        ramp: share of the steps over which the weight rises from 0, so that the task is learnt first.
        gamma: weight of the gates' mean; 0: no gates.
    """

    alpha: float = 0.0
    beta: float = BETA
    ramp: float = 0.3
    gamma: float = 0.0

    def make(self, model: Any, targets: tuple[str, ...], task_type: str) -> Ready:
        """The model that trains, with its objective and its optimizer."""
        method = self.record
        if method.quantized:
            model = quantize(model, skip=("classifier",))
        config = make_config(method, model, {"task_type": task_type, **self.options})
        wrapped = method.wrap(model, config, Setup())
        objective = None
        if self.alpha:
            kind, more = (
                (GatedDensityLoss, {"adaptive": "gate", "gamma": self.gamma}) if self.gamma else (DensityLoss, {})
            )
            objective = kind(wrapped, alpha=self.alpha, surrogate="tanh", beta=self.beta, ramp=self.ramp, **more)
        made: list[Optimizer] = []

        def optimizer(trained: Any, training: TrainingConfig) -> Optimizer:
            own = [p for p in trained.parameters() if p.requires_grad]
            made.append(torch.optim.AdamW(own, lr=training.learning_rate, weight_decay=training.weight_decay))
            return made[-1]

        return Ready(wrapped, objective, optimizer, made)


_LINEAR = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "key", "value", "dense"]}
# name, method, options, rate, weight of the density loss, colour
_MADE: tuple[tuple[str, Any, dict[str, Any], float, float, str], ...] = (
    ("LoRA", "lora", _LINEAR, 1e-3, 1.5, "#4c78a8"),
    ("QLoRA", "qlora", _LINEAR, 1e-3, 1.5, "#72b7b2"),
    ("bottleneck", "bottleneck", {"reduction_factor": 16}, 2e-3, 2.0, "#2e8b57"),
    ("prompt", "prompt", {"num_virtual_tokens": 16}, 1e-2, 2.0, "#f2a541"),
    ("prefix", PREFIX, {"num_virtual_tokens": 16}, 1e-2, 2.0, "#d6618f"),
)
METHODS = tuple(name for name, *_ in _MADE)
FORMS = ("", " + DEFT", " + ADA-DEFT")
GAMMA = 0.1


def _sides() -> Iterator[DeftSide]:
    for name, method, options, rate, alpha, color in _MADE:
        common = {"method": method, "rates": (rate,) * 3, "options": options, "color": color}
        yield DeftSide(name, **common)
        yield DeftSide(name + FORMS[1], **common, alpha=alpha)
        yield DeftSide(name + FORMS[2], **common, alpha=alpha, gamma=GAMMA)


SIDES = tuple(_sides())
SWEPT = tuple(replace(SIDES[1], name=f"LoRA, alpha {alpha:g}", alpha=alpha) for alpha in SWEEP)


def data_of(name: str, folder: Path) -> Data:
    """A set in the length and number of steps of these runs."""
    length = LENGTHS[name]
    spec = replace(SPECS[name], max_length=length, longest=length, batch_size=BATCH, steps=STEPS, test=TEST)
    return Data(spec, folder)


# ---------------------------------------------------------------------------- measures


class Thresholded(nn.Module):
    """An activation whose small values are zero, and how many of it are not.

    Args:
        inner: the activation.
        tau: the largest magnitude that is left out.
    """

    def __init__(self, inner: nn.Module, tau: float) -> None:
        super().__init__()
        self.inner, self.tau, self.mask = inner, tau, torch.ones(1, 1, dtype=torch.bool)
        self.active = self.exact = self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        """The activation, thresholded."""
        a = self.inner(x)
        keep = a.abs() > self.tau
        mask = fitted(self.mask, a.shape[:-1])
        counted, own = (keep, a) if mask is None else (keep[mask], a[mask])
        self.active += int(counted.sum())
        self.exact += int((own == 0).sum())
        self.seen += counted.numel()
        return torch.where(keep, a, torch.zeros_like(a))


@contextmanager
def thresholded(model: Any, tau: float) -> Iterator[list[Thresholded]]:
    """A model whose MLP activations are thresholded while it lasts."""
    sites = [block.activation for block in find_mlp_blocks(model)]
    before = [site.get() for site in sites]
    placed = [Thresholded(inner, tau) for inner in before]

    def tell(_: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        for each in placed:
            each.mask = kwargs["attention_mask"] != 0

    for site, each in zip(sites, placed, strict=True):
        site.set(each)
    handle = base_of(model).register_forward_pre_hook(tell, with_kwargs=True)
    try:
        yield placed
    finally:
        handle.remove()
        for site, inner in zip(sites, before, strict=True):
            site.set(inner)


@torch.no_grad()
def tell_classes(model: Any, data: Data) -> dict[str, float]:
    """Loss and metrics over held-out examples."""
    counts, loss = ConfusionCounts(data.spec.classes), 0.0
    examples = sorted(data.test, key=lambda each: len(each["input_ids"]))
    with evaluating(model, data):
        for batch in Batches(examples, 32, data.task.collate, shuffle=False).epoch(0):
            output = data.task.output(model, batch)
            loss += float(output.loss) * len(batch["labels"])
            counts.add(batch["labels"], output.logits.argmax(-1))
    found = {"loss": loss / counts.total, "accuracy": counts.accuracy, "macro_f1": counts.macro_f1}
    found["matthews"] = 0.0 if math.isnan(counts.matthews) else counts.matthews
    return found | ({"f1": float(counts.f1()[1].nan_to_num())} if data.spec.classes == 2 else {})


def score(model: Any, data: Data) -> Entry:
    """Metrics as trained; densities, the share of zeros, and accuracies where what is below a threshold is left out."""
    found: Entry = tell_classes(model, data)
    for i, tau in enumerate(TAUS):
        with thresholded(model, tau) as placed:
            told = tell_classes(model, data)
        density = [each.active / max(each.seen, 1) for each in placed]
        mean = sum(density) / len(density)
        if i == 0:
            found |= {"density": mean, "density_blocks": density, "energy": energy(mean),
                      "zeros_before": sum(each.exact / max(each.seen, 1) for each in placed) / len(placed),
                      "zeros": 1 - mean, "thresholded": told["accuracy"]}  # fmt: skip
        else:
            found |= {"density_coarse": mean, "thresholded_coarse": told["accuracy"], "energy_coarse": energy(mean)}
    return found


def energy(density: float) -> float:
    """What is left of the products, and of the weights read, of an MLP at one token: its up projection whole, of the
    down projection the active rows."""
    return (1 + density) / 2


def run(side: DeftSide, data: Data, seed: int) -> Entry:
    """Trains and measures."""
    training = settings(data, side.rates[0], seed, data.spec.steps)
    found: Entry = {"kind": "run", "set": data.spec.name, "side": side.name, "seed": seed, "rate": side.rates[0],
                    "steps": data.spec.steps, "alpha": side.alpha, "gamma": side.gamma}  # fmt: skip
    ready, start, cpu = begin(side, data, seed), time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        try:
            train(ready.model, data.train, training, folder, task=data.task, objective=ready.objective, resume=False,
                  optimizer=lambda model: ready.optimizer(model, training), label=side.name)  # fmt: skip
        except Diverged as error:
            return found | {"diverged": error.step}
    found |= {"trained": ready.trained(), "train_s": time.perf_counter() - start}
    if isinstance(ready.objective, DensityLoss):
        ready.objective.detach()  # gates stay
        found |= {"gates": list(ready.objective.gate_values().values())} if side.gamma else {}
    return (
        found | score(ready.model, data) | {"seconds": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}
    )


# ---------------------------------------------------------------------------- the command


def jobs(seeds: Sequence[int], only: Sequence[str]) -> Iterator[tuple[str, str, DeftSide, int]]:
    """Kind, set, side and seed: a seed is there for every side before the next, method by method; the first one's sweep
    comes last."""
    yield from (("run", name, side, seed) for seed, side, name in itertools.product(seeds, SIDES, only))
    if SEEDS[0] in seeds:
        yield from (("sweep", name, side, SEEDS[0]) for name, side in itertools.product(only, SWEPT))


def run_all(results: Results, folder: Path, only: Sequence[str], seeds: Sequence[int], minutes: float) -> None:
    """Adds the runs that are missing."""
    start, data = time.monotonic(), {name: data_of(name, folder) for name in only}
    if not results.find(kind="about"):
        results.add({"kind": "about", **about()})
    for kind, name, side, seed in jobs(seeds, only):
        if results.find(kind=kind, set=name, side=side.name, seed=seed):
            continue
        if time.monotonic() - start > 60 * minutes:
            return
        try:
            results.add(run(side, data[name], seed) | {"kind": kind})
        except Exception:  # the others are worth having
            _log.exception("%s, %s, seed %d", name, side.name, seed)


def measure(folder: Path, path: Path) -> None:
    """Step times, sides in turn in one process, and peaks, each of a process of its own."""
    found: dict[str, Any] = {"about": about(), "threads": torch.get_num_threads(), "step": {}}
    found["step"] = {name: cost.steps(SIDES, data_of(name, folder)) for name in SETS}
    pairs = [(name, side.name) for name in SETS for side in SIDES]
    write_json(path, found | {"peak_mb": cost.peaks("bench.evidence.deft", pairs, folder)})


def main() -> None:
    """The command."""
    parser = parser_of("deft", __doc__, SETS, SEEDS)
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    if args.peak_of:
        name, _, wanted = args.peak_of.partition("/")
        cost.print_peak(next(side for side in SIDES if side.name == wanted), data_of(name, args.data))
    elif args.cost:
        measure(args.data, args.results / "deft_cost.json")
    else:
        run_all(Results(args.results / "deft.jsonl"), args.data, args.only, args.seeds, args.minutes)


if __name__ == "__main__":
    main()
