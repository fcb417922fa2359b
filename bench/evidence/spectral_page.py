"""The page of `bench.evidence.spectral`: its prose, and the comparisons that matter."""

from bench.evidence.report import Experiment
from bench.evidence.spectral import SIDES

HEAD = """## Natural GaLore, KaSA, BA-LoRA

`python -m bench.evidence.spectral --data FOLDER` trains SmolLM2-135M-Instruct (weights as 4-bit GGUF, read into
float32) on answers to word problems (`gsm8k`) and on descriptions from data (`e2e_nlg`), and MiniLM on sentiment, 77
intents and entailment, through the mean of its tokens' states. What trains is every linear layer of the blocks, in
bfloat16 autocast over float32 weights; embeddings and norms are frozen for every method, and a classifier's head
trains.

Budgets are of optimizer state: adapters have rank 8 on every linear layer; GaLore's rank is 8, Natural GaLore's 4,
since its window of 6 past gradients in bfloat16 takes the rest (compare "state"; AdamW's is 8 bytes a number). Full
training is there as the bound on what a budget could matter. Each method gets four learning rates, a factor of about
three apart, and trains at the one with the lowest loss over rows at the end of the training file: after a whole run of
seed 0 on classes, where a quarter of a run chose rates at which the whole one falls apart, and after a quarter of a run
on texts, where no more could be afforded (`gsm8k` takes the rates of `e2e_nlg`). Where the four lie was settled by
earlier, shorter runs, so that the best of those is inside; "edge" marks a best rate that is the lowest or highest tried
all the same. Other options are as published: KaSA with alpha 16, beta 1e-4 and gamma 1e-3, PiSSA and BA-LoRA with alpha
equal to the rank, BA-LoRA with the penalties of its version 6, `update_proj_gap` 200. galore-torch's GaLore and PEFT's
KaSA run in the same loop.

Loss is nats per held-out answer token, or per text; elsewhere is the loss on sentences of an encyclopaedia, for
classifiers one minus the cosine between the mean vectors of such sentences before and after."""

PAPERS = (
    ("Natural GaLore", "GaLore (galore-torch)", "log perplexity on C4 lower by 0.02 to 0.03 from 60 M to 350 M weights "
     "and by 0.10 at 1.1 B, where GaLore's own paper gives a better baseline than the one compared with; GLUE 86.05 "
     "against 85.89 at rank 4, RoBERTa-base; state counted without the window"),
    ("Natural GaLore", "LoRA", "GLUE 86.05 against 85.61 at rank 4; 30 % less memory, not measured"),
    ("KaSA", "LoRA", "GLUE 86.3 against 85.2, RoBERTa-base, best epoch on the set that is reported"),
    ("BA-LoRA", "PiSSA", "GSM8K 55.86 against 51.48, LLaMA-2-7B; GLUE 90.67 against 89.47, DeBERTa-v3-base"),
    ("BA-LoRA", "LoRA", "GSM8K 55.86 against 42.68; GLUE 90.67 against 88.56"),
)  # fmt: skip

EXTRAS = """### Damping, and KaSA's cut

Sides that ran once, `e2e_nlg`, seed 0, one rate for all. Natural GaLore's damping is 1e-3 by default, as in the
authors' code; `relative` multiplies it with the window's mean squared norm. Of KaSA, how many of the smallest singular
values are taken from each weight: published is the rank, 8 here. One run says nothing of a difference smaller than that
between the seeds above: of the dampings none. With nothing cut KaSA learns as LoRA does; one value is enough to cost a
fifth of a nat here and most of one elsewhere."""

LIMITS = """### What this cannot show

- Runs are of 20 to 144 steps, 40 to 2,300 examples: the beginning of a fine-tuning, not its end. A method that starts
  slower and ends higher looks worse here than it is. The papers train for thousands of steps.
- One model of 135 M and one of 22 M weights. SmolLM2's were rounded to 4 bits before, which fills the smallest
  singular values: KaSA may fare better on weights that were not.
- No run reaches `update_proj_gap`: GaLore's subspaces are those of the first batch, and nothing is seen of how state
  survives a switch.
- Held-out examples are 24 to 32 of texts and 400 to 600 of classes: an accuracy of 600 texts is known to about 2
  points, BLEU of 24 prompts to several, and exact numbers, with this model near none right, not at all. Only what all
  seeds agree on is called better or worse; with three seeds that happens by chance in one comparison of four.
- BA-LoRA's consistency holds a classifier to the pre-trained one, whose head is new and knows nothing.
- Seconds in the result file are of a busy machine, and say nothing of speed.
- On texts learning rates were chosen on runs of 8 steps, which favours rates that are fast at first."""

SPECTRAL = Experiment(
    name="spectral",
    sides=SIDES,
    pairs=(
        ("Natural GaLore", "GaLore (galore-torch)"), ("Natural GaLore", "LoRA"), ("KaSA", "KaSA (PEFT)"),
        ("KaSA", "LoRA"), ("BA-LoRA", "PiSSA"), ("BA-LoRA", "LoRA"), ("full", "LoRA"),
    ),
    head=HEAD,
    papers=PAPERS,
    extras=EXTRAS,
    limits=LIMITS,
)  # fmt: skip
