"""Mamba, Mamba-2 and a Llama in low precision and in context: `python -m bench.evidence.mamba --data FOLDER --cache F`.

FOLDER holds e2e_nlg and gsm8k, as `bench.evidence.sets` reads them; the three models are pre-trained on them first and
kept in the folder `--cache`. Then each is tuned on descriptions of restaurants in float32, bfloat16 and float16, whole
and by LoRA on each set of buffers; and it is shown a few examples of a task, before and after it has learnt to follow
instructions. Every run is a line of results/mamba.jsonl, so that a second call goes on where the first one stopped;
`--minutes` stops it in time, `--only` chooses among pre-training, precision and shots.
"""

import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import set_seed
from torch import Tensor

from bench.evidence import mamba_shots
from bench.evidence.command import parser_of
from bench.evidence.mamba_models import (
    DTYPES,
    KINDS,
    Kind,
    Pretraining,
    Texts,
    arithmetic,
    load,
    loss_of,
    native,
    pretrain,
)
from bench.evidence.runs import Entry, Results, about
from bench.evidence.sets import SPECS, Row, read_rows
from deftcore.methods.mamba.stability import divergence, exponents
from deftcore.models.families import is_mamba
from deftcore.training import TrainingConfig, encode, train
from deftcore.training.loop import Diverged
from deftcore.training.task import Batch, Batches
from deftcore.training.text import TextTask
from deftcore.training.wrapping import add_adapter

_log = logging.getLogger(__name__)
PARTS = ("pretraining", "precision", "shots")
SEEDS = (0, 1, 2)
PRECISIONS = tuple(DTYPES)  # float32 first: the others are compared with it
LORA = {"r": 8, "lora_alpha": 16}
SPEC = SPECS["e2e_nlg"]


@dataclass(frozen=True)
class Tuning:
    """Sizes of a run on descriptions.

    Args:
        steps, batch_size: of training.
        longest: tokens of an example; longer ones are left out.
        test: held-out examples that the loss is of.
        fixed: tokens of the texts that logits and states are compared on.
        generated: prompts, and new tokens at most.
    """

    steps: int = 24
    batch_size: int = 8
    longest: int = 128
    test: int = 48
    fixed: int = 64
    generated: tuple[int, int] = (16, 32)


@dataclass(frozen=True)
class Side:
    """How a model is tuned.

    Args:
        name: in results.
        rate: learning rate.
        targets: buffers that LoRA is on; () trains all weights.
        options: more fields of the adapter's config.
    """

    name: str
    rate: float = 4e-3
    targets: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def make(self, model: Any) -> Any:
        """The model that trains, on deftcore's kernels."""
        if not self.targets:
            return native(model)
        method = "mamba-lora" if is_mamba(model) else "lora"
        return add_adapter(model, method, LORA | {"target_modules": list(self.targets), **self.options})


FULL = Side("full", 1e-3)
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
SIDES = {
    "Mamba": (
        FULL,
        Side("LoRA x_proj", targets=("x_proj",)),
        Side("LoRA x_proj, split", targets=("x_proj",), options={"split": True}),
        Side("LoRA in_proj", targets=("in_proj",)),
        Side("LoRA all", targets=("in_proj", "x_proj", "dt_proj", "out_proj")),
    ),
    "Mamba-2": (
        FULL,
        Side("LoRA in_proj", targets=("in_proj",)),
        Side("LoRA in_proj, split", targets=("in_proj",), options={"split": True}),
        Side("LoRA all", targets=("in_proj", "out_proj")),
    ),
    "Llama": (
        FULL,
        Side("LoRA attention", targets=_ATTENTION),
        Side("LoRA all", targets=(*_ATTENTION, "gate_proj", "up_proj", "down_proj")),
    ),
}


@dataclass(frozen=True)
class Descriptions:
    """What the runs tune on and are measured by: e2e_nlg, less the rows that the models were pre-trained on."""

    texts: Texts
    tuning: Tuning

    @cached_property
    def train(self) -> list[Any]:
        """Examples to train on."""
        return self._examples(self.texts.halves(SPEC.name)[1])

    @cached_property
    def test(self) -> list[Any]:
        """Held-out examples."""
        return self._examples(self._held_out)[: self.tuning.test]

    @cached_property
    def fixed(self) -> list[Batch]:
        """Batches of held-out texts of one length, of which every token is predicted."""
        length = self.tuning.fixed
        cut = [{"input_ids": e["input_ids"][:length]} for e in self.test if len(e["input_ids"]) >= length]
        return list(Batches(cut, 8, TextTask().collate, shuffle=False).epoch(0))

    @cached_property
    def references(self) -> dict[str, list[str]]:
        """Held-out prompts, and all texts that are right."""
        found: dict[str, list[str]] = {}
        for row in self._held_out:
            found.setdefault(SPEC.texts(row)[0], []).append(row["ref"])
        return dict(list(found.items())[: self.tuning.generated[0]])

    @cached_property
    def _held_out(self) -> list[Row]:
        rows = read_rows(self.texts.folder / SPEC.name / "test.jsonl")
        return rows[::7] + [row for i, row in enumerate(rows) if i % 7]  # neighbours share a meaning

    def _examples(self, rows: Sequence[Row]) -> list[Any]:
        pairs = [dict(zip(("prompt", "completion"), SPEC.texts(row), strict=True)) for row in rows]
        found = encode(pairs, self.texts.tokenizer, self.tuning.longest + 1, is_encoder_decoder=False)
        return [each for each in found if len(each["input_ids"]) <= self.tuning.longest]


# ---------------------------------------------------------------------------- measures


@torch.no_grad()
def bleu(model: Any, data: Descriptions, precision: str) -> float:
    """Of greedy descriptions, against all references."""
    import sacrebleu

    tokenizer, answers = data.texts.tokenizer, list(data.references.values())
    inputs = tokenizer(list(data.references), return_tensors="pt", padding=True, return_token_type_ids=False)
    model.eval()
    with arithmetic(precision):
        output = model.generate(**inputs, max_new_tokens=data.tuning.generated[1], do_sample=False)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    first = [text.strip().split("\n")[0] for text in texts]
    columns = [[each[i] if i < len(each) else None for each in answers] for i in range(max(map(len, answers)))]
    return sacrebleu.corpus_bleu(first, columns).score


def measure(model: Any, reference: Any, data: Descriptions, precision: str) -> Entry:
    """A model in a precision: task metrics, largest exponents, and how far it is from `reference` in float32."""
    model.eval()
    found: Entry = {"loss": loss_of(model, data.test, precision), "bleu": bleu(model, data, precision)}
    if reference is not None:
        away = divergence(reference.eval(), model, data.fixed, "fp32" if precision == "no" else precision)
        found |= {name: away[name] for name in ("mean_abs_logit", "kl", "loss_difference")}
        found |= {"deviation": away["deviation"][-1], "slope": away["slope"][-1]}
    if is_mamba(model):
        with arithmetic(precision):
            layers = list(exponents(model, data.fixed).values())
        found["exponents"] = [each["max"] for each in layers]
        found["mean_exponents"] = [each["mean"] for each in layers]
    return found


# ---------------------------------------------------------------------------- runs


def parts_of(model: Any) -> dict[str, Tensor]:
    """What trains of a model."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def tuned(kind: Kind, side: Side, data: Descriptions, seed: int, precision: str, cache: Path) -> Any:
    """A tuned model.

    Raises:
        Diverged: with the step.
    """
    model = load(kind, cache)
    set_seed(seed)
    model = side.make(model)
    config = TrainingConfig(
        max_steps=data.tuning.steps, batch_size=data.tuning.batch_size, learning_rate=side.rate, seed=seed,
        schedule="linear", warmup_ratio=0.1, mixed_precision=precision, log_every=10,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        train(model, data.train, config, folder, resume=False, label=f"{kind.name} {side.name} {precision}")
    return model


def in_float32(kind: Kind, side: Side, seed: int, cache: Path) -> Any:
    """The model that was tuned in float32 with a seed; None where there is none."""
    path = _kept(kind, side, seed, cache)
    if not path.exists():
        return None
    set_seed(seed)
    model = side.make(load(kind, cache))
    model.load_state_dict(torch.load(path, weights_only=True), strict=False)
    return model


def _kept(kind: Kind, side: Side, seed: int, cache: Path) -> Path:
    return cache / "tuned" / f"{kind.name}, {side.name}, {seed}.pt"


def run(kind: Kind, side: Side, data: Descriptions, seed: int, precision: str, cache: Path) -> Entry:
    """Trains and measures; in float32 it is kept, and compared with seed 0, in another precision with its own seed."""
    found: Entry = {"kind": "run", "set": SPEC.name, "model": kind.name, "side": side.name, "precision": precision,
                    "seed": seed, "rate": side.rate, "steps": data.tuning.steps}  # fmt: skip
    start = time.process_time()
    try:
        model = tuned(kind, side, data, seed, precision, cache)
    except Diverged as error:
        return found | {"diverged": error.step}
    parts = parts_of(model)
    found |= {"trained": sum(p.numel() for p in parts.values()), "train_cpu_s": time.process_time() - start}
    if precision == PRECISIONS[0]:
        path = _kept(kind, side, seed, cache)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(parts, path)
        reference = in_float32(kind, side, SEEDS[0], cache) if seed != SEEDS[0] else None
    else:
        reference = in_float32(kind, side, seed, cache)
    return found | measure(model, reference, data, precision) | {"cpu_s": time.process_time() - start}


def untrained(kind: Kind, data: Descriptions, precision: str, cache: Path) -> Entry:
    """The pre-trained model in a precision, against itself in float32."""
    found = {"kind": "untrained", "set": SPEC.name, "model": kind.name, "precision": precision}
    reference = None if precision == PRECISIONS[0] else native(load(kind, cache))
    return found | measure(native(load(kind, cache)), reference, data, precision)


# ---------------------------------------------------------------------------- the command


def jobs(only: Sequence[str], seeds: Sequence[int], models: Sequence[str]) -> Iterator[Entry]:
    """What names each line of the results, in their order: a seed is there for every side before the next."""
    kinds = [kind for kind in KINDS if kind.name in models]
    if "pretraining" in only:
        yield from ({"kind": "pretrained", "model": kind.name} for kind in kinds)
    if "precision" in only:
        yield from ({"kind": "untrained", "model": k.name, "precision": p} for k in kinds for p in PRECISIONS)
    for seed in seeds:
        if "shots" in only:
            named = [{"kind": "shots", "model": kind.name, "tuned": False} for kind in kinds if seed == SEEDS[0]]
            yield from (*named, *({"kind": "shots", "model": k.name, "tuned": True, "seed": seed} for k in kinds))
        if "precision" in only:
            for kind in kinds:
                for side in SIDES[kind.name]:
                    for precision in PRECISIONS:
                        yield {"kind": "run", "model": kind.name, "side": side.name, "seed": seed,
                               "precision": precision}  # fmt: skip


def do(job: Entry, texts: Texts, data: Descriptions, cache: Path) -> Entry:
    """The line that a job names."""
    kind = next(kind for kind in KINDS if kind.name == job["model"])
    if job["kind"] == "pretrained":
        return job | pretrain(kind, texts, cache)
    if job["kind"] == "untrained":
        return untrained(kind, data, job["precision"], cache)
    if job["kind"] == "shots":
        return job | mamba_shots.run(kind, texts, job.get("seed"), cache)
    side = next(side for side in SIDES[kind.name] if side.name == job["side"])
    return run(kind, side, data, job["seed"], job["precision"], cache)


def run_all(
    results: Results, texts: Texts, data: Descriptions, cache: Path, *, only: Sequence[str], seeds: Sequence[int],
    models: Sequence[str], minutes: float,
) -> None:  # fmt: skip
    """Adds the lines that are missing."""
    start = time.monotonic()
    if not results.find(kind="about"):
        results.add({"kind": "about", **about()})
    for job in jobs(only, seeds, models):
        if results.find(**job):
            continue
        if time.monotonic() - start > 60 * minutes:
            return
        try:
            results.add(do(job, texts, data, cache))
        except Exception:  # the others are worth having
            _log.exception("%s", job)


def main() -> None:
    """The command."""
    names = [kind.name for kind in KINDS]
    parser = parser_of("mamba", __doc__, PARTS, SEEDS)
    parser.add_argument("--cache", type=Path, required=True, help="the folder of the pre-trained models")
    parser.add_argument("--steps", type=int, default=Pretraining.steps, help="of pre-training")
    parser.add_argument("--models", nargs="+", choices=names, default=names, help="of these models")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    texts = Texts(args.data, Pretraining(steps=args.steps))
    run_all(Results(args.results / "mamba.jsonl"), texts, Descriptions(texts, Tuning()), args.cache, only=args.only,
            seeds=args.seeds, models=args.models, minutes=args.minutes)  # fmt: skip


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
