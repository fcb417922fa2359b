"""The page of `bench.evidence.points`: its prose, and the comparisons that matter."""

from bench.evidence.adapted import Adapted
from bench.evidence.points import BATCH, HELD_BACK, SIDES, SIZES, STEPS
from bench.evidence.report import claims
from bench.markdown import table

HEAD = f"""## Point clouds

`python -m bench.evidence.points --data FOLDER` tells the 26 classes of `ldraw_points`, 1024 points of each of 1135
parts to train on and 379 to test. A Point-MAE of {SIZES.depth} blocks of width {SIZES.width}, {SIZES.patches} patches
of {SIZES.patch_points} points, is pre-trained once, for {STEPS["pre"]} steps on the training clouds without classes.
Each side and seed goes on from it for {STEPS["adapt"]} steps of {BATCH} clouds, but for "scratch", which begins anew;
the seeds draw the head, the adapter, the order and the changes of clouds.

Each side tries three or four rates, and trains at the one with the lowest loss over every {HELD_BACK}th training cloud
of a class, after {STEPS["try"]} steps on the others; none chose the highest or the lowest. Point-PEFT has its defaults,
with a memory bank of the training clouds; LoRA is on queries, keys, values and projections. The head trains on every
side and is counted. The last model is tested once, without voting; neither clouds to train on nor those to test are
turned."""

PAPERS = (
    "Point-PEFT's own figures: accuracy, without voting, and trained parameters.\n\n"
    + table(
        ["", "PB-T50-RS, full tuning", "Point-PEFT", "ModelNet40, full tuning", "Point-PEFT"],
        [
            ["Point-BERT", "83.1, 22.1 M", "85.0, 0.6 M", "92.7", "93.4, 0.6 M"],
            ["Point-MAE, scans turned", "88.1, 22.1 M", "89.1, 0.7 M", "93.2", "94.2, 0.8 M"],
            ["Point-M2AE, scans turned", "88.1, 12.9 M", "88.2, 0.7 M", "93.4, 15.3 M", "94.1, 0.6 M"],
        ],
    )
    + "\n\nRows of scans that were turned in training lie 3 to 4.5 points above plain ones of the same method: they "
    "are never to be compared with each other, nor with the table above, whose clouds are others and are not turned."
)

LIMITS = f"""### What this cannot show

- The backbone was pre-trained on 1135 clouds, those that it then learns the classes of; the papers' on ShapeNet.
  What a frozen backbone knows decides what its adapters can reach, so that this favours full tuning.
- {STEPS["adapt"]} steps are 10 passes, the papers' 300: who learns fastest is ahead, and "scratch" is far from its end.
  The head is 13 % of the model here; in the papers full tuning trains thirty times what Point-PEFT does.
- Rates were chosen in runs of a third of the length, by clouds that the pre-training has seen.
- In these runs weight decay, 0.05, reached biases and norms too, which it spares since.
- Seconds of training are of runs beside other work, and compare nothing.
- An accuracy of 379 clouds is known to 2 or 3 points. What three seeds agree on happens by chance in one comparison of
  four, and all seeds share one pre-trained model.
- Parts of one library, uniform samples of clean surfaces: nothing is said of scans."""

POINTS = Adapted(
    name="points",
    sides=SIDES,
    measures=("accuracy", "mean_class_accuracy", "loss"),
    drawn="accuracy",
    pairs=(
        ("Point-PEFT", "full tuning"), ("Point-PEFT", "head alone"), ("Point-PEFT", "LoRA, r = 8"),
        ("Point-PEFT", "BitFit"), ("Point-PEFT", "AdaptFormer, 16"), ("full tuning", "scratch"),
    ),
    head=HEAD,
    papers=PAPERS,
    limits=LIMITS,
    claims=claims("points"),
)  # fmt: skip
