"""Density against loss of a SwiGLU model: `python -m bench.evidence.thresholds --data FOLDER`.

FOLDER holds a folder per data set, as `bench.evidence.sets` reads them. SmolLM2-135M on gsm8k and e2e_nlg, as it is and
tuned by LoRA: dense, with thresholds in its forward, with DEFT's loss besides, with ReLU in the place of SiLU. Every
run is a line of results/thresholds.jsonl, so that a second call goes on where the first one stopped; `--minutes` stops
it in time, `--side` does one side alone. `--cost` measures decoding instead, on an idle machine, into
results/thresholds_cost.json.
"""

import copy
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import set_seed

import deftcore
from bench.evidence.command import parser_of
from bench.evidence.measures import evaluating, score
from bench.evidence.runs import Entry, Results, about
from bench.evidence.sets import SPECS, Data
from bench.harness import alternate
from deftcore._files import write_json
from deftcore.models.blocks import find_mlp_blocks
from deftcore.models.thresholds import Thresholded, calibrate_thresholds
from deftcore.nn.mlp import SkippedMLP
from deftcore.training import TrainingConfig, train
from deftcore.training.objective import Objective
from deftcore.training.task import Batches
from deftcore.training.wrapping import add_adapter

_log = logging.getLogger(__name__)
SEEDS = (0, 1, 2)
RATE = 1.5e-3
LORA = {"r": 8, "lora_alpha": 16}
CALIBRATION, TEST = 16, 32  # examples
SETS = {
    name: replace(SPECS[name], test=TEST, tuning=CALIBRATION, batch_size=batch_size, steps=steps)
    for name, batch_size, steps in (("gsm8k", 4, 80), ("e2e_nlg", 8, 80))
}
# What each model is measured at: criterion, a threshold for each neuron, densities.
GRID = (
    ("product", False, (0.7, 0.5, 0.4, 0.3)),
    ("product", True, (0.3,)),
    ("gate", False, (0.7, 0.5)),
    ("gate", True, (0.5,)),
)

# What is decoded with: criterion, density, and which of the MLP's three matrices are read by active rows alone.
DECODED = {"product 0.5": ("product", 0.5, 1), "product 0.3": ("product", 0.3, 1), "gate 0.5": ("gate", 0.5, 2)}
EXACTNESS = {"exact": "", "int8": ", int8"}  # by `activations`, what a side's name ends in


@dataclass(frozen=True)
class Side:
    """How a model is tuned.

    Args:
        name: in results.
        thresholds: options of `ThresholdLoss`; None trains without.
        swap: options of `SwapLoss`; None keeps SiLU.
        density: options of `DensityLoss`, where there are no thresholds.
        color: in pictures.
    """

    name: str
    thresholds: dict[str, Any] | None = None
    swap: dict[str, Any] | None = None
    density: dict[str, Any] | None = None
    color: str = "#777777"

    def objectives(self, model: Any) -> list[Objective]:
        """Beside the task's loss."""
        found: list[Objective] = [] if self.swap is None else [deftcore.SwapLoss(model, **self.swap)]
        if self.thresholds is not None:
            found.append(deftcore.ThresholdLoss(model, **self.thresholds))
        elif self.density is not None:
            found.append(deftcore.DensityLoss(model, **self.density))
        return found


PRODUCT, GATE = {"density": 0.3, "scaled": True}, {"density": 0.5, "criterion": "gate", "scaled": True}
SIDES = (
    Side("LoRA", color="#4c78a8"),
    Side("LoRA + product", PRODUCT | {"alpha": 0.0}, color="#e4572e"),
    Side("LoRA + gate", GATE | {"alpha": 0.0}, color="#2e8b57"),
    Side("LoRA + DEFT + product", PRODUCT | {"alpha": 1.0}, color="#c9a227"),
    Side("LoRA + DEFT + gate", GATE | {"alpha": 1.0}, color="#8e5ea2"),
    Side("ReLU + LoRA + DEFT", swap={"distill": 1.0}, density={"alpha": 1.0}, color="#9aa5b1"),
    Side("ReLU + LoRA + DEFT + gate", GATE | {"alpha": 1.0}, {"distill": 1.0}, color="#7db8da"),
)


def points(model: Any, data: Data, entry: Entry) -> Entry:
    """The loss of a model with all its neurons, and with thresholds that leave a share of them, chosen on the last
    training examples."""
    calibration = Batches(data.tuning, 8, data.task.collate, shuffle=False)
    entry["loss"] = score(model, data, data.test)["loss"]
    entry["zeros"] = zeros(model, data)
    entry["points"] = []
    for criterion, scaled, densities in GRID:
        for target in densities:
            with evaluating(model, data):
                batches = ({k: v for k, v in batch.items() if k != "labels"} for batch in calibration.epoch(0))
                found = calibrate_thresholds(model, batches, density=target, criterion=criterion, scaled=scaled)
            with Thresholded(model, found) as measured:
                loss = score(model, data, data.test)["loss"]
            densities_found = measured.densities().values()
            entry["points"].append({"criterion": criterion, "scaled": scaled, "target": target, "loss": loss,
                                    "density": sum(densities_found) / len(densities_found)})  # fmt: skip
    return entry


def zeros(model: Any, data: Data) -> float:
    """The share of a model's gates that are exactly zero on the held-out examples."""
    names = [block.name for block in find_mlp_blocks(model)]
    with Thresholded(model, deftcore.Thresholds("gate", dict.fromkeys(names, 0.0))) as measured:
        score(model, data, data.test)
    densities = measured.densities().values()
    return 1 - sum(densities) / len(densities)


def run(side: Side, data: Data, seed: int) -> Entry:
    """Trains and measures."""
    spec, start = data.spec, time.perf_counter()
    model = data.model()
    set_seed(seed)
    model = add_adapter(model, "lora", LORA | {"target_modules": list(spec.base.targets), "task_type": "CAUSAL_LM"})
    objectives = side.objectives(model)
    config = TrainingConfig(
        max_steps=spec.steps, batch_size=spec.batch_size, learning_rate=RATE, seed=seed, schedule="linear",
        warmup_ratio=0.1, mixed_precision=spec.base.mixed_precision, log_every=4,
    )  # fmt: skip
    entry: Entry = {"kind": "run", "set": spec.name, "side": side.name, "seed": seed, "rate": RATE, "steps": spec.steps}
    before = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = train(
            model, data.train, config, folder, task=data.task, objective=objectives, resume=False,
            label=f"{spec.name} {side.name}",
        )  # fmt: skip
    entry |= {"train_loss": result.train_loss, "train_s": time.perf_counter() - before}
    shown = Batches(data.train, spec.batch_size, data.task.collate, seed=seed)
    tokens = sum(int(b["attention_mask"].sum()) for b, _ in zip(_epochs(shown), range(spec.steps), strict=False))
    entry |= {"tokens": tokens, "tokens_per_s": tokens / entry["train_s"]}
    for objective in objectives:
        if isinstance(objective, deftcore.DensityLoss):
            objective.detach()
    points(model, data, entry)
    return entry | {"seconds": time.perf_counter() - start}


def _epochs(batches: Batches) -> Iterator[Mapping[str, Any]]:
    for epoch in range(1000):
        yield from batches.epoch(epoch)


def untrained(data: Data) -> Entry:
    """The pre-trained model's own figures."""
    return points(data.model(), data, {"kind": "untrained", "set": data.spec.name})


def cost(data: Data, path: Path, new: int = 48) -> None:
    """Tokens per second by `compile_decoder` in 4 bits: dense, with thresholds, and without any MLP, which is what no
    sparsity can pass; sides alternate."""
    model, tokenizer = data.model(), data.spec.base.tokenizer()
    calibration = list(Batches(data.tuning, 8, data.task.collate, shuffle=False).epoch(0))
    packed = deftcore.quantize(model)
    models, densities = {"dense": packed}, {}
    for name, (criterion, target, _) in DECODED.items():
        found = calibrate_thresholds(packed, calibration, density=target, criterion=criterion, scaled=True)
        models[name] = deftcore.sparsify(copy.deepcopy(packed), thresholds=found)
        densities[name] = found.density
    models["no MLP"] = copy.deepcopy(packed)
    for layer in models["no MLP"].base_model.layers:
        layer.mlp = SkippedMLP()
    decoders = {name + EXACTNESS[activations]: deftcore.compile_decoder(each, max_length=new + 96,
                                                                        activations=activations)
                for activations in EXACTNESS for name, each in models.items()}  # fmt: skip
    ids = tokenizer(next(iter(data.references)), return_tensors="pt").input_ids[:, :48]
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    sides = {name: lambda d=d: d.generate(ids, **options) for name, d in decoders.items()}
    result: dict[str, Any] = {"about": about(), "new": new, "densities": densities,
                              "reasons": {n: d.reason for n, d in decoders.items()}}  # fmt: skip
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        times = alternate(sides, 5)
        result[f"threads_{threads}"] = {name: new / each["seconds"] for name, each in times.items()}
    write_json(path, result)


def main() -> None:
    """The command."""
    parser = parser_of("thresholds", __doc__, list(SETS))
    parser.add_argument("--side", choices=[side.name for side in SIDES], help="this one alone")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    data = {name: Data(spec, args.data) for name, spec in SETS.items()}
    if args.cost:
        cost(data["gsm8k"], args.results / "thresholds_cost.json")
        return
    results, start = Results(args.results / "thresholds.jsonl"), time.monotonic()
    if not results.find(kind="about"):
        results.add({"kind": "about", **about()})
    for seed in SEEDS:
        for name in args.only:
            sides = [side for side in SIDES if args.side in (None, side.name)]
            if not results.find(kind="untrained", set=name):
                results.add(untrained(data[name]))
            for side in sides:
                if time.monotonic() - start > 60 * args.minutes:
                    return
                if not results.find(kind="run", set=name, side=side.name, seed=seed):
                    _log.info("%s, %s, seed %d", name, side.name, seed)
                    results.add(run(side, data[name], seed))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
