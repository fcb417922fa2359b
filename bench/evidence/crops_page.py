"""The page of `bench.evidence.crops`: its prose, and the comparisons that matter."""

from bench.evidence.adapted import Adapted
from bench.evidence.crops import FEW, HELD_BACK, SIDES, STEPS, WIDTH
from bench.evidence.report import claims

HEAD = f"""## Satellite series

`python -m bench.evidence.crops --data FOLDER` moves a small TSViT (width {WIDTH["dim"]}) to fields that it was not
trained on: one Belgian patch after the two others, monthly means on a grid of 10 m, and French series of 2022, monthly,
after those of 2023, every ten days and of other classes. It is trained before for {STEPS["pre"]} steps and adapted for
{STEPS["adapt"]} by each method, from {FEW} labelled pixels, or series, of each class ("few") and from half of all that
there are ("all"); the other half tests. "scratch" begins anew. The seed draws the model, the order and the labels.

Each side tries two rates, and trains at the one with the lowest loss over every {HELD_BACK}th window or series of those
to learn from, after as many steps on the others. The head begins anew for the new classes and trains on every side, the
mixer after it too. "tokens" adapts the class tokens of the temporal encoder, "prompts" puts two tokens before every
block, "drawn" is AdaptFormer's stochastic form."""

PAPERS = """On wheat in the Beqaa: F1 of 84 % at 0.7 % of the parameters, close to full tuning; a table by method could
not be confirmed. TSViT's own figures, trained from nothing: mean IoU 84.8 on Germany's 17 classes, 65.4 on PASTIS, 63.1
on France's 20. They are of other data and measures than the tables above."""


LIMITS = """### What this cannot show

- The model was trained before on two patches, or on one year's 500 series: it knows little that is worth keeping, which
  favours whoever trains most. Of French series it tells only three in four of those that it was trained on.
- Two rates a side are few: several sides chose the higher one, and might have done better above it.
- Seconds of training are of runs beside other work, and compare nothing.
- With few labels seeds of one side lie up to 45 points of F1 apart.
- Windows that learn and windows that test lie side by side in one patch: neighbouring fields are alike, and scores are
  higher than on another region.
- Three seeds: what all agree on happens by chance in one comparison of four."""

CROPS = Adapted(
    name="crops",
    sides=SIDES,
    measures=("accuracy", "macro_f1"),
    drawn="macro_f1",
    pairs=(
        ("full", "scratch"), ("LoRA, r = 4", "full"), ("AdaptFormer, 8", "full"), ("BitFit", "full"),
        ("tokens", "full"), ("LoRA, r = 4", "scratch"), ("LoRA, r = 4", "head"), ("tokens", "head"),
        ("prompts, 2", "head"), ("AdaptFormer, 8, drawn", "AdaptFormer, 8"),
    ),
    head=HEAD,
    papers=PAPERS,
    limits=LIMITS,
    claims=claims("crops"),
    costs_of=lambda name: name.rsplit(",", 1)[0],
)  # fmt: skip
