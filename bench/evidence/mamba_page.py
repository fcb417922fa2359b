"""The page of `bench.evidence.mamba`, docs/evidence-mamba.md: prose, tables and a picture from its runs."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from bench.evidence.command import RESULTS
from bench.evidence.mamba import LORA, PRECISIONS, SIDES, Tuning
from bench.evidence.mamba_models import KINDS
from bench.evidence.mamba_shots import BATCH, QUESTIONS, SHOTS, STEPS, TAUGHT, TESTED
from bench.evidence.report import machine
from bench.evidence.runs import Entry, Results
from bench.markdown import table

TUNING = Tuning()
LOW = PRECISIONS[1:]
HEAD = """# Mamba: low precision, and learning in context

<!-- Made by `python -m bench.evidence` from bench/evidence/results/mamba.jsonl. Do not edit: the tests compare. -->

Halloran, Gulati, Roysdon (arXiv 2406.00209) say that a Mamba's state recurrence has no positive Lyapunov exponent, that
fine-tuning it in mixed precision therefore departs from float32 no more than a Transformer's does, by LoRA on its
fused buffers as by full training, and that instruction tuning makes up for what Mambas lack in learning from examples
in the prompt. Their models have 130 M to 2.8 B parameters and were pre-trained by others. Here are three of about 3 M,
pre-trained in minutes: the protocol in small, at a fortieth to a thousandth of the size.

```bash
python -m bench.evidence.mamba --data FOLDER --cache MODELS                       # all of it
python -m bench.evidence.mamba --data FOLDER --cache MODELS --only precision --seeds 0 --minutes 9
python -m bench.evidence                                                          # this page
```

FOLDER holds `e2e_nlg` and `gsm8k` as JSON lines, MODELS receives the pre-trained models. A second call goes on where
the first one stopped. The exponents and the distance from float32 of a model of your own: `deftcore lyapunov`.

![distance from float32, answers behind examples, exponents](evidence-mamba.png)"""

PRETRAINED = """## The models

Width 256, a byte-pair vocabulary of 2048, tied embeddings; trained in bfloat16 on the same {steps} steps of
{batch_size} x {length} tokens at one rate ({rate:g}, cosine): half of the training rows of e2e_nlg and gsm8k, the
topics of `pydoc` and docstrings of the standard library. Bits per byte of held-out text. Everything below tunes on the
other halves."""

PRECISION = f"""## Tuning in low precision

{TUNING.steps} steps of {TUNING.batch_size} restaurants' descriptions, under autocast with float32 master weights,
float16 with loss scaling; LoRA of rank {LORA["r"]}, on the buffers that a side is named after, "split" with a pair
of factors for each slice of a buffer instead of one that ties them. One rate for all LoRA, another one for full
training, in all models. A run in low precision is measured in that precision and compared with the float32 run of the
same seed: the loss over {TUNING.test} held-out examples, BLEU of {TUNING.generated[0]} greedy descriptions, the KL
divergence of next tokens over texts of {TUNING.fixed} tokens. The last columns are the yardstick: float32 runs of other
seeds against the first one."""

LYAPUNOV = """## Lyapunov exponents

The largest of any layer, channel and state over the held-out texts, in nats a token: 0 would never forget. "Tuned" is
the range over all sides, precisions and seeds. The Transformer has no recurrence to measure."""

IN_CONTEXT = f"""## Learning in context

A restaurant with three properties in any order, and the question for one of them, behind 0 to 5 solved examples of the
same question: the answer is the likeliest of the three values, of held-out restaurants, {QUESTIONS} questions for
each of {", ".join(TESTED)}; all three are asked for equally often, so chance is 33 %.
Instructions: {STEPS} steps of {BATCH} examples, questions about other properties
({", ".join(TAUGHT)}), descriptions and word problems, full training. Mean, and
lowest to highest over seeds."""

LIMITS = """## What this cannot show

- Models of 3 M parameters, one reading of their training text: that a precision harms them or does not says little
  about models a thousand times as large.
- Learning in context was not reached: where the column "any token" is at 0 % a model never names a value by itself.
  A mean over 300 questions has a standard error of 3 points, and the best of three columns lies above zero by chance,
  so accuracies near 33 % and gains of a few points are none, and their shares say nothing of the paper's. MMLU and
  Winogrande, the paper's tasks, are out of such models' reach.
- One rate for all pre-training suits the Mambas better than the Llama, whose bits per byte are higher; what it loses
  in low precision may be of that model. Rounding that training amplifies is no larger than another seed's effect.
- A few steps of tuning at one rate. The paper gives neither ranks nor rates.
- float16 and bfloat16 are a CPU's: products accumulate in float32, and `A_log`, `D`, steps and states are float32 in
  all of deftcore's blocks."""


def page(results: Path = RESULTS) -> str:
    """The page; empty where nothing has run."""
    entries = Results(results / "mamba.jsonl").entries()
    parts = [HEAD]
    for head, rows in (
        ("", _pretrained(entries)),
        (PRECISION, _precision(entries)),
        (LYAPUNOV, _exponents(entries)),
        (IN_CONTEXT, _shots(entries)),
    ):
        parts += [*filter(None, [head]), *found] if (found := list(rows)) else []
    if len(parts) == 1:
        return ""
    return "\n\n".join(part.strip() for part in [*parts, _paper(entries), LIMITS, machine(entries)]) + "\n"


def _pretrained(entries: Sequence[Entry]) -> Iterator[str]:
    found = [each for each in entries if each["kind"] == "pretrained"]
    if found:
        yield PRETRAINED.format(**found[0]["sizes"])
        names = list(found[0]["bits_per_byte"])
        rows = [
            [e["model"], f"{e['parameters'] / 1e6:.2f} M", f"{e['tokens']:,}", f"{e['cpu_s'] / 60:.1f} min",
             *(f"{e['bits_per_byte'][name]:.2f}" for name in names)]
            for e in found
        ]  # fmt: skip
        yield table(["", "parameters", "tokens", "processor time", *names], rows)


# ---------------------------------------------------------------------------- precision


def apart(entries: Sequence[Entry], model: str, side: str, precision: str) -> list[dict[str, Any]]:
    """How far each run in a precision is from the float32 run of its seed: loss, BLEU, KL; or that it diverged."""
    runs = _runs(entries, model=model, side=side)
    exact = {each["seed"]: each for each in runs if each["precision"] == PRECISIONS[0] and "loss" in each}
    found: list[dict[str, Any]] = []
    for each in runs:
        if each["precision"] == precision and "diverged" in each:
            found.append({"diverged": each["diverged"]})
        elif each["precision"] == precision and each["seed"] in exact:
            of = exact[each["seed"]]
            found.append({"kl": each["kl"], **{key: each[key] - of[key] for key in ("loss", "bleu")}})
    return found


def between_seeds(entries: Sequence[Entry], model: str, side: str) -> list[dict[str, float]]:
    """How far float32 runs of other seeds are from the first one."""
    runs = [each for each in _runs(entries, model=model, side=side, precision=PRECISIONS[0]) if "loss" in each]
    first = next((each for each in runs if "kl" not in each), None)
    others = [each for each in runs if "kl" in each]
    if first is None:
        return []
    return [{"kl": each["kl"], **{key: each[key] - first[key] for key in ("loss", "bleu")}} for each in others]


def _runs(entries: Sequence[Entry], **values: Any) -> list[Entry]:
    return [e for e in entries if e["kind"] == "run" and all(e.get(name) == value for name, value in values.items())]


def _precision(entries: Sequence[Entry]) -> Iterator[str]:
    untrained = [each for each in entries if each["kind"] == "untrained"]
    rows = []
    for kind in KINDS:
        own = {each["precision"]: each for each in untrained if each["model"] == kind.name}
        if len(own) == len(PRECISIONS):
            exact = own[PRECISIONS[0]]
            changes = [f"{own[p]['loss'] - exact['loss']:+.4f}, KL {own[p]['kl']:.1e}" for p in LOW]
            rows.append([kind.name, f"{exact['loss']:.3f}", f"{exact['bleu']:.1f}", *changes])
    if rows:
        yield (
            "The losses are high because they count what pre-training hardly showed, the end of a text and the names "
            "of other restaurants, which models this small do not copy. Before tuning, in inference alone:"
        )
        yield table(["", "loss", "BLEU", *LOW], rows)
    for kind in KINDS:
        rows = [row for side in SIDES[kind.name] if (row := _side(entries, kind.name, side.name))]
        if rows:
            yield f"{kind.name}, tuned; differences are means of their magnitudes:"
            names = [f"{p}: {what}" for p in LOW for what in ("loss", "BLEU", "KL", "diverged")]
            yield table(["", "trained", "seeds", "loss", "BLEU", *names, "seeds: loss", "BLEU", "KL"], rows)


def _side(entries: Sequence[Entry], model: str, side: str) -> list[Any]:
    exact = [e for e in _runs(entries, model=model, side=side, precision=PRECISIONS[0]) if "loss" in e]
    if not exact:
        return []
    row = [side, f"{exact[0]['trained']:,}", len(exact), _range([e["loss"] for e in exact], "{:.3f}"),
           f"{mean(e['bleu'] for e in exact):.1f}"]  # fmt: skip
    for precision in LOW:
        found = apart(entries, model, side, precision)
        row += [*_magnitudes(found), f"{sum('diverged' in each for each in found)} of {len(found)}"]
    return [*row, *_magnitudes(between_seeds(entries, model, side))]


def _magnitudes(found: Sequence[dict[str, Any]]) -> list[str]:
    done = [each for each in found if "kl" in each]
    if not done:
        return ["", "", ""]
    loss, bleu, kl = (mean(abs(each[key]) for each in done) for key in ("loss", "bleu", "kl"))
    return [f"{loss:.4f}", f"{bleu:.1f}", f"{kl:.1e}"]


def _range(values: Sequence[float], form: str) -> str:
    if len(values) == 1:
        return form.format(values[0])
    return f"{form} ({form} to {form})".format(mean(values), min(values), max(values))


# ---------------------------------------------------------------------------- exponents and examples


def _exponents(entries: Sequence[Entry]) -> Iterator[str]:
    rows = []
    for kind in KINDS:
        before = [max(e["exponents"]) for e in entries if e["kind"] == "untrained" and e["model"] == kind.name
                  and e["precision"] == PRECISIONS[0] and "exponents" in e]  # fmt: skip
        after = [max(e["exponents"]) for e in _runs(entries, model=kind.name) if "exponents" in e]
        if before and after:
            memory = f"{-1 / before[0]:,.0f}" if before[0] else "no end"
            rows.append([kind.name, f"{before[0]:.2e}", memory, f"{min(after):.2e} to {max(after):.2e}", len(after)])
    if rows:
        yield table(["", "pre-trained", "memory, tokens", "tuned", "runs"], rows)


def accuracies(entries: Sequence[Entry], model: str, tuned: bool, measure: str = "chosen") -> dict[int, list[float]]:
    """Mean over properties of each model's accuracy, by number of examples."""
    own = [e for e in entries if e["kind"] == "shots" and e["model"] == model and e["tuned"] == tuned]
    return {
        shots: [mean(each["accuracy"][wanted][str(shots)][measure] for wanted in TESTED) for each in own]
        for shots in SHOTS
        if own
    }


def _shots(entries: Sequence[Entry]) -> Iterator[str]:
    rows = []
    for tuned in (False, True):
        for kind in KINDS:
            found = accuracies(entries, kind.name, tuned)
            if found:
                free = mean(accuracies(entries, kind.name, tuned, "free")[SHOTS[-1]])
                when = "after instructions" if tuned else "pre-trained"
                rows.append([kind.name, when, *(_range(values, "{:.0%}") for values in found.values()),
                             f"{gain(found):+.1%}", f"{free:.0%}"])  # fmt: skip
    if rows:
        columns = [f"{shots} example{'s' * (shots != 1)}" for shots in SHOTS]
        yield table(["", "", *columns, "best over none", f"any token, {SHOTS[-1]}"], rows)


def gain(found: dict[int, list[float]]) -> float:
    """What examples add: the best mean accuracy behind some, less that behind none."""
    return max(mean(values) for shots, values in found.items() if shots) - mean(found[0])


# ---------------------------------------------------------------------------- the paper


SHARES = {"Mamba": ("38 %", "81 %"), "Mamba-2": ("82 %", "132 %")}  # before and after instructions


def _paper(entries: Sequence[Entry]) -> str:
    rows = []
    measured = [e for e in entries if "exponents" in e]
    if measured:
        most = max(max(each["exponents"]) for each in measured)
        held = "Holds" if most <= 0 else "Does not hold"
        rows.append(["The largest exponent of the state recurrence is never positive, by construction.",
                     f"{held}: {most:.1e} at most, in {len(measured)} models."])  # fmt: skip
    said = (
        "Low precision departs from float32 by no more than in Transformers (mean difference in MMLU, float16: "
        "Mamba 0.1, Pythia 0.14, OpenELM 0.54)."
    )
    for precision in LOW:
        apart_by = [_mean_kl(entries, kind.name, precision) for kind in KINDS]
        found = [value for value in apart_by if value is not None]
        if len(found) == len(KINDS):
            held = "Holds" if max(found[:-1]) <= found[-1] else "Does not hold"
            told = ", ".join(f"{kind.name} {value:.1e}" for kind, value in zip(KINDS, found, strict=True))
            rows.append([said, f"{held} in {precision} by KL, all sides together: {told}."])
    for kind in KINDS[:-1]:
        for tuned, figure in zip((False, True), SHARES[kind.name], strict=True):
            own, control = (accuracies(entries, name, tuned) for name in (kind.name, KINDS[-1].name))
            if own and control:
                when = "after instructions" if tuned else "pre-trained"
                share = f", {gain(own) / gain(control):.0%}" if gain(control) >= 0.02 else ", no share to speak of"
                rows.append([f"{kind.name} has {figure} of Transformers' gain by examples, {when}.",
                             f"{gain(own):+.1%} against {gain(control):+.1%}{share}."])  # fmt: skip
    return "## What the paper says, what was found\n\n" + table(["the paper", "here"], rows)


def _mean_kl(entries: Sequence[Entry], model: str, precision: str) -> float | None:
    found = [
        each["kl"] for side in SIDES[model] for each in apart(entries, model, side.name, precision) if "kl" in each
    ]
    return mean(found) if found else None


def draw(path: Path, results: Path = RESULTS) -> None:
    """A picture: the distance of every run from float32, accuracy behind examples, largest exponents by layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    entries = Results(results / "mamba.jsonl").entries()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained", width_ratios=(1.3, 1, 1))
    names = []
    for kind in KINDS:
        for side in SIDES[kind.name]:
            lines = [(apart(entries, kind.name, side.name, p), mark) for p, mark in zip(LOW, "o^", strict=True)]
            for found, mark in (*lines, (between_seeds(entries, kind.name, side.name), "|")):
                values = [each["kl"] for each in found if "kl" in each]
                left.plot(values, [len(names)] * len(values), mark, color=kind.color, alpha=0.75, markersize=6)
            names.append(f"{kind.name}: {side.name}")
        for tuned, style in ((False, "o:"), (True, "o-")):
            found = {shots: mean(values) for shots, values in accuracies(entries, kind.name, tuned).items()}
            label = f"{kind.name}, {'instructed' if tuned else 'pre-trained'}"
            middle.plot(list(found), list(found.values()), style, color=kind.color, label=label)
        measured = [e for e in entries if e.get("model") == kind.name and "exponents" in e]
        for each in measured:
            style = {"color": kind.color, "alpha": 0.25} if each["kind"] == "run" else {"color": "#000000", "ls": ":"}
            right.plot([-value for value in each["exponents"]], **style)
    left.set_yticks(range(len(names)), names, fontsize=7)
    left.invert_yaxis()
    left.set(xscale="log", xlabel="KL from float32, nats", title="o bf16, ^ fp16, | other seeds")
    middle.axhline(1 / 3, color="#bbbbbb", ls="--")
    middle.set(xlabel="examples", ylabel="accuracy", title="in context")
    middle.legend(fontsize=7)
    right.set(xlabel="layer", ylabel="-largest exponent", yscale="log", title="dotted: pre-trained")
    figure.savefig(path, dpi=130)
    plt.close(figure)
