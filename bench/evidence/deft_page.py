"""The page of `bench.evidence.deft`: its prose, what the density loss cost and brought, and its weight's picture."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean

from bench.evidence.adapted import Adapted, adapted_section
from bench.evidence.deft import BATCH, BETA, FORMS, LENGTHS, METHODS, SETS, SIDES, STEPS, SWEPT, TAUS, TEST
from bench.evidence.report import claims
from bench.evidence.runs import Entry
from bench.markdown import table

_LENGTHS = ", ".join(f"{length} ({name})" for name, length in LENGTHS.items())
HEAD = f"""## DEFT

`python -m bench.evidence.deft --data FOLDER` tunes MiniLM, a BERT with GELU, for classes of texts, each cut to
{_LENGTHS} tokens: {STEPS} steps of {BATCH} texts. LoRA and QLoRA have
rank 8 on every linear layer of the blocks, bottlenecks reduce the width by 16, prompts and prefixes have 16 virtual
tokens; the head is new and trains on every side. "DEFT" adds the density loss with the surrogate
tanh({BETA:g} |a|), "ADA-DEFT" a gate on each block too, in this project's form: the paper's formula is not public.
Rates and weights of the loss are one for all sets and were not tuned for each.

Density is the share of activations above {TAUS[0]:.2e} in magnitude, over held-out tokens without padding, a mean over
blocks, in bfloat16 autocast as all of it. "zeros" is what a threshold there leaves out, "accuracy thresholded" that of
the model without it; "coarse" is the same at {TAUS[1]:g}. The energy proxy is the share of an MLP's products, and of
the weights that it reads, which are left at one token: its up projection whole, of the down projection the active
rows."""

PAPERS = """The paper's protocol: AdamW, linear decay after 6 % of warm-up, rate 3e-4, 10 epochs of GLUE in batches of
64 padded to 128 tokens, padding counted, weight of the loss 1, exact zeros. Here steps are a thousand, padding is not
counted, and the threshold is the one above: GELU has exact zeros only where its numbers run out, and few of them.

RoBERTa-large on GLUE: density lower than plain tuning's by up to 44.94 % (second version; 50.72 % in the first).
Flan-T5-XXL on SQuAD: 53.19 % in the encoder, 90.60 % in the decoder. Tables by task and method, and ratios of energy,
could not be read; ADA-DEFT's are of models of 3 and 11 billion weights, whose run time fell by 8.79 % and 2.79 %."""

LIMITS = f"""### What this cannot show

- {STEPS * BATCH:,} texts, one or two epochs, where the paper has 10.
- An accuracy of {TEST} texts is known to 2 points; what three seeds agree on happens by chance in one comparison of
  four.
- MiniLM's MLPs are 1536 wide: nothing is said of models a hundred times larger.
- Seconds of training are of runs beside other work, and compare nothing.
- One weight of the loss serves all sets; the picture over weights is of LoRA and one seed.
- Sides, sets and seeds that are not in the tables were not run."""

DEFT = Adapted(
    name="deft",
    sides=SIDES,
    measures=("accuracy", "macro_f1", "matthews", "density", "zeros", "thresholded", "energy", "density_coarse",
              "thresholded_coarse"),
    drawn="density",
    pairs=tuple((name + form, name) for name in METHODS for form in FORMS[1:]),
    head=HEAD,
    papers=PAPERS,
    limits=LIMITS,
    claims=claims("deft"),
)  # fmt: skip
LOST, FELL = 0.01, 0.5  # of accuracy, at most; of density, at least


def deft_section() -> str:
    """The section, with the picture over weights of the loss."""
    entries = DEFT.results.entries()
    parts = [adapted_section(DEFT), "### What the loss brought, and cost", *_brought(entries)]
    if any(each["kind"] == "sweep" for each in entries):
        parts.append("![accuracy against density, over weights of the loss](evidence-deft-alpha.png)")
    return "\n\n".join(part.strip() for part in parts) + "\n"


def changes(entries: Sequence[Entry], ending: str = "") -> dict[tuple[str, str], list[tuple[float, float]]]:
    """By method and form, of each set that has both: the relative fall of density, and the loss of thresholded accuracy
    against plain tuning's own, unthresholded; means over the seeds that both have.

    Args:
        ending: of the measures' names, which says the threshold.
    """
    density, thresholded = f"density{ending}", f"thresholded{ending}"
    runs = {(e["set"], e["side"], e["seed"]): e for e in entries if e["kind"] == "run" and "density" in e}
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for name in METHODS:
        for form in FORMS[1:]:
            for of in SETS:
                seeds = [s for at, side, s in runs if (at, side) == (of, name) and (of, name + form, s) in runs]
                pairs = [(runs[of, name, seed], runs[of, name + form, seed]) for seed in seeds]
                if pairs:
                    fell = 1 - mean(b[density] for _, b in pairs) / mean(a[density] for a, _ in pairs)
                    lost = mean(a["accuracy"] for a, _ in pairs) - mean(b[thresholded] for _, b in pairs)
                    found.setdefault((name, form), []).append((fell, lost))
    return found


def _brought(entries: Sequence[Entry]) -> Iterator[str]:
    yield (
        "Against plain tuning of the same seeds at the same threshold, a number for each set that is there, in their "
        f"order above. Reached: a mean fall of {FELL:.0%} or more at a mean loss of at most {LOST:.0%} of accuracy, "
        "thresholded here and not there."
    )
    columns, found = [""], [changes(entries, ending) for ending in ("", "_coarse")]
    for tau in TAUS:
        columns += [f"above {tau:.2g}: density fell by", "accuracy lost", "reached"]
    rows = []
    for name, form in found[0]:
        rows.append([name + form])
        for each in found:
            pairs = each[name, form]
            rows[-1] += ["; ".join(f"{value:+.1%}" for value in values) for values in zip(*pairs, strict=True)]
            rows[-1].append("yes" if reached(pairs) else "no")
    yield table(columns, rows)


def reached(pairs: Sequence[tuple[float, float]]) -> bool:
    """Whether density fell by half or more, and accuracy by no more than a point, on average over sets."""
    fell, lost = (mean(values) for values in zip(*pairs, strict=True))
    return fell >= FELL and lost <= LOST


def draw_sweep(path: Path) -> None:
    """Accuracy against density for each weight of the loss, a line for each set; nothing without such runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    entries = [each for each in DEFT.results.entries() if "density" in each and each["seed"] == 0]
    names = [name for name in SETS if any(each["kind"] == "sweep" and each["set"] == name for each in entries)]
    if not names:
        return
    figure, axes = plt.subplots(1, len(names), figsize=(3.4 * len(names), 3), layout="constrained", squeeze=False)
    for axis, name in zip(axes.flat, names, strict=True):
        own = {each["side"]: each for each in entries if each["set"] == name}
        sides = sorted((*SIDES[:2], *SWEPT), key=lambda side: side.alpha)
        points = [own[side.name] | {"alpha": side.alpha} for side in sides if side.name in own]
        for ending, tau, style in zip(("", "_coarse"), TAUS, ("o-", "s:"), strict=True):
            x, y = ([100 * each[key + ending] for each in points] for key in ("density", "thresholded"))
            axis.plot(x, y, style, color=SIDES[0].color, label=f"above {tau:.2g}")
            for each, at in zip(points, zip(x, y, strict=True), strict=True):
                axis.annotate(f"{each['alpha']:g}", at, textcoords="offset points", xytext=(4, 4), fontsize=7)
        axis.set(title=name, xlabel="density, %", ylabel="accuracy thresholded, %")
        axis.grid(color="#eeeeee")
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)
