"""The page of `bench.evidence.light_peft`: its prose, and the comparisons that matter."""

from bench.evidence.light_peft import SETS, SIDES
from bench.evidence.report import Experiment

HEAD = """## Light-PEFT

`python -m bench.evidence.light_peft --data FOLDER` trains MiniLM on the same three sets of classes and SmolLM2 on the
same descriptions. LoRA has rank 8 on every linear layer of the blocks, alpha 16, dropout 0.05. Light-PEFT starts from
it, watches for a quarter of the steps that are to come, cuts a third or half of the heads and channels out of the base,
three adapters in four, half the ranks of the rest, as in the authors' script, and trains what is left for as many steps
as LoRA. "random" and "magnitude" cut a third as well, after the same first phase, but by chance, or where weights are
small.

All sides train at the rate that LoRA's tries chose above; nothing else was tuned, which favours LoRA. "base" counts
the numbers of the base model, embeddings among them: MiniLM's are half of it, and are not cut."""

PAPERS = (
    ("Light-PEFT, 1/2", "LoRA", "over 40 % of the base cut with 25 % of the adapters' numbers, scores comparable on "
     "GLUE, SuperGLUE and question answering (abstract); training 1.6x faster in 39 % less memory, inference 1.6x "
     "faster in 48 % less, RoBERTa and OPT up to 6.7 B (a digest, not checked against the paper)"),
    ("Light-PEFT, 1/3", "LoRA", "the ratio of the authors' script; by count a third fewer products: 1.5x at most"),
)  # fmt: skip

EXTRAS = """### At another rate

Sides that ran once, `mr_sentiment`, seed 0, at about three times LoRA's rate. What is cut wants it higher: what sets
above say of Light-PEFT against LoRA is of LoRA's rate, and less than Light-PEFT can do."""

LIMITS = """### What this cannot show

- The first phase is of 8 to 36 steps, the authors' of 800: masks have hardly moved when they decide, and both phases
  together are a short fine-tuning. A base that lost a third of its channels has more to learn again than it has time.
- Models this small have less to spare than those of the paper, of 355 M to 6.7 B weights.
- Rates are LoRA's; an adapter with an eighth of the numbers wants a higher one.
- Accuracies of 400 to 600 texts are known to 2 or 3 points, BLEU of 24 prompts to several. Only what all seeds agree on
  is called better or worse; with three seeds that happens by chance in one comparison of four.
- The second phase is as long as LoRA's whole training, as published: the first phase comes on top of it."""

LIGHT = Experiment(
    name="light_peft",
    sides={name: SIDES for name in SETS},
    pairs=(
        ("Light-PEFT, 1/3", "LoRA"), ("Light-PEFT, 1/2", "LoRA"), ("Light-PEFT, 1/2", "Light-PEFT, 1/3"),
        ("Light-PEFT, 1/3", "random, 1/3"), ("Light-PEFT, 1/3", "magnitude, 1/3"),
    ),
    head=HEAD,
    papers=PAPERS,
    extras=EXTRAS,
    limits=LIMITS,
)  # fmt: skip
