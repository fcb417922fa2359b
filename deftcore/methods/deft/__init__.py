"""DEFT: fine-tuning that pushes the activations of every MLP towards zero, so that inference can skip their weights.

Runwal, Pedapati, Chen, *From PEFT to DEFT: Parameter Efficient Finetuning for Reducing Activation Density in
Transformers*, AAAI 2025, arXiv 2402.01911.

Any PEFT method trains as before; one differentiable term is added to its loss. Base weights never change.

## Equations

For block l with activations `a` over the N elements whose mask `m` is 1 (padding does not count), and L blocks:

```text
s(a)    = a^2 / (a^2 + eps)             surrogate "l0", eps = 1e-7;  "tanh": tanh(beta |a|);  "l1": |a|
D_l     = sum(m s(a)) / N
loss    = task loss + alpha mean_l(D_l)
density = share of |a| > tau            tau = 0 where the activation has exact zeros (ReLU), sqrt(1e-7) elsewhere
```

In an encoder-decoder model the encoder's mean and the decoder's are added. Sums run over the global batch, however it
is split over accumulation steps and processes. `adaptive="gate"` also learns one scalar a block, `w =
sigmoid(theta)`, which scales the block's output; blocks whose gate closes can be left out. That form is this
project's own: the paper's formula is not public.

SiLU and GELU have no zeros to speak of. Thresholds make some, for a wanted share of neurons:

```text
v       = f(gate x) * (up x)            "product": spares rows of W_down (TEAL, Liu et al., arXiv 2408.14690)
        | f(gate x)                     "gate": spares rows of W_up too, at a higher loss (CATS, arXiv 2404.08763)
cut     = |v| <= tau_l                  tau_l the quantile of |v| in block l, on text
        | |v_j| <= tau_l / s_j          "scaled": s_j the norm of column j of W_down over their mean (CHESS, 2409.01366)
s(v)    = v^2 / (v^2 + tau^2)           the density loss under thresholds: its slope is where they are
```

A model may train under them: forwards cut, gradients go through. Or its activation is swapped for ReLU, and
distillation of the original model's logits draws it back.

## Example

```python
import torch
import transformers
from peft import LoraConfig, get_peft_model

import deftcore

sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=64, hidden_act="relu"))
model = deftcore.patch(get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"])))
density = deftcore.DensityLoss(model, alpha=1.0)
ids = torch.arange(32).view(2, 16)
(model(input_ids=ids, labels=ids).loss + density.loss()).backward()
assert 0 < density.report()["density"] < 1  # share of active neurons
density.detach()
sparse = deftcore.sparsify(model)  # LoRA merged; the MLPs skip inactive neurons
sparse.generate(ids[:, :4], max_new_tokens=4)
```

With `transformers.Trainer`: `class DeftTrainer(ObjectiveTrainerMixin, Trainer)`, from `deftcore.training.trainer`,
and `objective=DensityLoss(model)` among its arguments. In a recipe: `deft: true`, beside any method. Thresholds without
training: `deftcore sparsify`, or

```python
batches = [{"input_ids": ids}]
dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=64))
thresholds = deftcore.calibrate_thresholds(dense, batches, density=0.5)
assert 0.45 < thresholds.density <= 0.5
deftcore.sparsify(dense, thresholds=thresholds)
```

with training: `deft: {enabled: true, density: 0.3, alpha: 0}` in a recipe, `deftcore.ThresholdLoss` beside a loop of
one's own; `swap: true` for ReLU. `deftcore export` finds what such runs have left beside the adapter.

## Where things are

| | |
|---|---|
| objective, gates | `objective.py`, `deftcore/models/gates.py` |
| thresholds that training sees | `trained_thresholds.py` |
| another activation, and distillation | `swap.py`, `deftcore/models/activations.py` |
| thresholds found on text, and on disk | `deftcore/models/thresholds.py`, `deftcore/nn/thresholds.py` |
| the sections `deft:`, `swap:`; under `transformers.Trainer` | `method.py`; `deftcore/training/trainer.py` |
| `deftcore density`, `deftcore export`, `deftcore sparsify` | `measure.py`, `export.py`, `calibrate.py` |
| sparse models on disk, `save_sparse` and `load_sparse` | `files.py` |
| a model's sparse form, `sparsify` | `deftcore/models/sparsify.py`, `deftcore/nn/mlp.py` |
| activation and its density in one pass | `deftcore/ops/density.py`, `csrc/cpu/density.cpp`, `csrc/cuda/density.cu` |
| sparse MLPs | `deftcore/ops/sparse_mlp.py`, `csrc/cpu/sparse_mlp.cpp`, `csrc/cuda/sparse_mlp.cu` |
| the same over 4 bits | `deftcore/ops/sparse_mlp4.py`, `csrc/cpu/sparse_mlp4.cpp`, `csrc/cuda/sparse_mlp4.cu` |

## Costs and limits

- Training: one pass over the activations, which keeps no full-size tensor beyond the plain activation's.
- What density buys is bounded. A gated block reads its gate matrix whole: at most `3 / (1 + 2 density)`, a plain
  block `2 / (1 + density)`. A batch reads the union of its tokens' neurons; beyond 64 tokens, and wherever it would
  not pay, the dense product runs.
- By the product at most `3 / (2 + density)`: gate and up are read whole. A threshold for each neuron of the gate spares
  the up projection in `compile_decoder` alone. Under thresholds training keeps the density loss's tensors, one or two
  of [B, K, F] a block.
- ReLU types are exact. GELU and SiLU have no exact zeros: `tau` decides what is left out, and changes the output a
  little.
- Density falls over some hundred steps, at some cost of the task's loss; `alpha` weighs the two.
- MLPs of the families that `deftcore info --models` lists; not for Mamba, which has none. Experts are refused.
"""

from deftcore.methods.deft import method  # noqa: F401  registers what the room gives to recipes
