"""The page of `bench.evidence.crops`: its prose, and the comparisons that matter."""

from bench.evidence.adapted import Adapted
from bench.evidence.crops import FEW, SIDES, STEPS, WIDTH

HEAD = f"""## Satellite series

`python -m bench.evidence.crops --data FOLDER` moves a small TSViT (width {WIDTH["dim"]}) to fields that it was not
trained on: one Belgian patch after the two others, monthly means on a grid of 10 m, and French series of 2022, monthly,
after those of 2023, every ten days and of other classes. It is trained before for {STEPS["pre"]} steps and adapted for
{STEPS["adapt"]} by each method, from {FEW} labelled pixels, or series, of each class ("few") and from half of all that
there are ("all"); the other half tests. "scratch" begins anew. The seed draws the model, the order and the labels.

Rates were not tried: 1e-3 where the whole model trains, 3e-3 for the others. The mixer trains on every
side, the head where the side's kind asks for it."""

PAPERS = """On wheat in the Beqaa: F1 of 84 % at 0.7 % of the parameters, close to full tuning; a table by method could
not be confirmed. TSViT's own figures, trained from nothing: mean IoU 84.8 on Germany's 17 classes, 65.4 on PASTIS, 63.1
on France's 20. They are of other data and measures than the tables above."""

LIMITS = """### What this cannot show

- The model was trained before on two patches, or on one year's 500 series: it knows little that is worth keeping, which
  favours whoever trains most. One rate for each kind of side may favour either.
- Windows that learn and windows that test lie side by side in one patch: neighbouring fields are alike, and scores are
  higher than on another region.
- Three seeds: what all agree on happens by chance in one comparison of four."""

CROPS = Adapted(
    name="crops",
    sides=list(SIDES),
    measures=("accuracy", "macro_f1"),
    pairs=(
        ("full", "scratch"), ("LoRA, r = 4", "full"), ("AdaptFormer, 8", "full"), ("BitFit", "full"),
        ("LoRA, r = 4", "head"),
    ),
    head=HEAD,
    papers=PAPERS,
    limits=LIMITS,
    set_of=lambda entry: f"{entry['set']}, {entry['labels']} labels",
)  # fmt: skip
