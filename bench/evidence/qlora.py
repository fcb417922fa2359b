"""LoRA over a base in 4 bits, and over float32: `python -m bench.evidence.qlora --data FOLDER`.

FOLDER holds a folder per data set, as `bench.evidence.sets` reads them. SmolLM2-135M on gsm8k and e2e_nlg; after
training the loss of each form: with the adapter beside the base, merged into 16 bits, merged and quantised again. Every
run is a line of results/qlora.jsonl, so that a second call goes on where the first one stopped; `--minutes` stops it in
time, `--seeds` does some alone. The rate is the one that `bench.evidence.spectral` found for LoRA. `--cost` measures
peak memory instead, into results/qlora_cost.json.
"""

import copy
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import deftcore
from bench.evidence import cost
from bench.evidence.command import parser_of
from bench.evidence.fused import put_on, taken_out
from bench.evidence.measures import score
from bench.evidence.runs import Entry, Results, about, fit
from bench.evidence.sets import SPECS, Data
from bench.evidence.sides import Side
from bench.evidence.spectral import LORA, LORA_SIDE
from deftcore._files import write_json
from deftcore.training.registry import Method, Setup, find

_log = logging.getLogger(__name__)
SEEDS = (0, 1, 2)
SETS = ("e2e_nlg", "gsm8k")
TRIED_ON = "e2e_nlg"
# The base alone: what its linear layers are quantised by, or the dtype of all of it.
BASES: dict[str, dict[str, Any] | torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "NF4": {"double_quant": False},
    "NF4, double": {},
    "FP4": {"quant_type": "fp4", "double_quant": False},
}
AGAIN: dict[str, Any] = {}  # how a merged float32 base is quantised: NF4, double


def _over_4bits(model: Any, config: Any, setup: Setup, **options: Any) -> Any:
    return find("qlora").wrap(deftcore.quantize(model, **options), config, setup)


def _quantised(name: str, **options: Any) -> Method:
    return Method(name=name, summary="For comparison.", config=peft.LoraConfig, wrap=partial(_over_4bits, **options))


FLOAT32 = replace(LORA_SIDE, name="float32")
NF4 = Side("NF4", _quantised("nf4", double_quant=False), (), LORA, "#2e8b57")
DOUBLE = Side("NF4, double", _quantised("nf4-double"), (), LORA, "#e4572e")
SIDES = (FLOAT32, DOUBLE, NF4)


def stored(model: torch.nn.Module) -> int:
    """Bytes of a model's tensors as a file has them, shared ones once."""
    found = {(t.data_ptr(), t.numel()): t.numel() * t.element_size() for t in model.state_dict().values()}
    return sum(found.values())


def base_form(name: str, data: Data) -> tuple[Any, Data]:
    """The pre-trained model in one of `BASES`, and the set in the arithmetic that it is measured in."""
    model, options = data.model(), BASES[name]
    dtype = options if isinstance(options, torch.dtype) else torch.bfloat16
    plain = replace(data, spec=replace(data.spec, base=replace(data.spec.base, mixed_precision="no")))
    if isinstance(options, dict):
        deftcore.quantize(model, **options)
    return model.to(dtype), plain


def base(name: str, data: Data) -> Entry:
    """The loss of the pre-trained model in a form, nothing trained."""
    model, plain = base_form(name, data)
    return {
        "kind": "base",
        "set": data.spec.name,
        "side": name,
        "bytes": stored(model),
        **score(model, plain, data.test),
    }


def merged(model: Any, side: Side, data: Data) -> Entry:
    """The losses of what a tuned model is merged into, all else of it in bfloat16, and how much of the update is kept
    in 4 bits."""
    adapter, found = taken_out(model), {}
    onto = put_on(data.model(), adapter)
    if side is FLOAT32:
        sixteen, four = copy.deepcopy(onto), deftcore.quantize(copy.deepcopy(onto), **AGAIN)
    else:
        sixteen = deftcore.merge(copy.deepcopy(model), to="16bit", dtype=torch.bfloat16)
        four = deftcore.merge(copy.deepcopy(model), to="4bit")
        reports = four.deftcore_merge.values()
        found["kept"] = sum(report.kept for report in reports) / len(reports)
        found["update"] = sum(report.relative_size for report in reports) / len(reports)
        found["original"] = score(onto, data, data.test)["loss"]
    for name, form in (("sixteen", sixteen), ("four", four)):
        form = form.to(torch.bfloat16)
        found |= {name: score(form, data, data.test)["loss"], f"{name}_bytes": stored(form)}
    return found


def run(side: Side, data: Data, seed: int, rate: float) -> Entry:
    """Trains and measures every form."""
    start = time.perf_counter()
    ready, found = fit(side, data, seed, rate, data.spec.steps)
    found = {"kind": "run", **found}
    if "diverged" in found:
        return found
    found |= score(ready.model, data, data.test) | merged(ready.model, side, data)
    return found | {"bytes": stored(ready.model), "seconds": time.perf_counter() - start}


def run_all(results_in: Path, folder: Path, only: Sequence[str], seeds: Sequence[int], minutes: float) -> None:
    """Adds the runs that are missing to a folder of results, from a folder of data sets."""
    torch.set_num_threads(1)
    start, results = time.monotonic(), Results(results_in / "qlora.jsonl")
    data, rate = {name: Data(SPECS[name], folder) for name in SETS}, _rate(results_in)
    if not results.find(kind="about"):
        results.add({"kind": "about", **about()})
    jobs = [("base", name, form, partial(base, form, data[name])) for name in only for form in BASES]
    for sides in (SIDES[:2], SIDES[2:]):  # without double quantisation last
        jobs += [("run", name, side.name, partial(run, side, data[name], seed, rate), seed)
                 for seed in seeds for name in only for side in sides]  # fmt: skip
    for kind, name, side, do, *seed in jobs:
        if results.find(kind=kind, set=name, side=side, **({"seed": seed[0]} if seed else {})):
            continue
        if time.monotonic() - start > 60 * minutes:
            break
        try:
            results.add(do())
        except Exception:  # the others are worth having
            _log.exception("%s, %s, %s", kind, name, side)


def _rate(results_in: Path) -> float:
    return Results(results_in / "spectral.jsonl").best_rate(LORA_SIDE, TRIED_ON)


def main() -> None:
    """The command."""
    parser = parser_of("qlora", __doc__, SETS, SEEDS)
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    if args.peak_of:
        name, _, wanted = args.peak_of.partition("/")
        side = next(each for each in SIDES if each.name == wanted)
        cost.print_peak(replace(side, rates=(1e-4,) * 3), Data(SPECS[name], args.data))
    elif args.cost:
        pairs = [(TRIED_ON, side.name) for side in SIDES]
        found = {"about": about(), "peak_mb": cost.peaks("bench.evidence.qlora", pairs, args.data)}
        write_json(args.results / "qlora_cost.json", found)
    else:
        run_all(args.results, args.data, args.only, args.seeds, args.minutes)


if __name__ == "__main__":
    main()
