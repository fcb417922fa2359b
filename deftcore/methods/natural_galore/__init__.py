"""Natural GaLore: every weight trained, with AdamW's state in a low-rank subspace of each gradient.

- GaLore: Zhao, Zhang, Chen, Wang, Anandkumar, Tian, *GaLore: Memory-Efficient LLM Training by Gradient Low-Rank
  Projection*, arXiv 2403.03507.
- Natural GaLore: Das, *Natural GaLore: Accelerating GaLore for memory-efficient LLM Training and Fine-tuning*,
  arXiv 2410.16029.

`deftcore.NaturalGaLore` stands where `torch.optim.AdamW` stood. Matrices in groups with a `rank` are projected; all
else is AdamW. `proj_type="galore"` is GaLore, `"natural_galore"` multiplies the projected gradient with the inverse of
its damped empirical Fisher, over a window of past ones.

## Equations

For a weight `W [m, n]` with gradient `G`, rank r, window of s steps, T steps from one subspace to the next:

```text
subspace   every T steps: P = leading r singular vectors of G, of the shorter side (right at ties)
project    R = G P  (or P^T G; two-sided P^T G Q),  h = vec(R), the newest of s rows of H
natural    (lambda I + H H^T) c = e_newest,  N = sum_j c_j h_j  = (lambda I + H^T H)^-1 vec(R)
Adam       M <- b1 M + (1 - b1) N,  V <- b2 V + (1 - b2) N^2,  U = M / (sqrt(V) + eps), bias corrected
apply      W <- W - lr scale U P^T,  then  W <- W - lr weight_decay W
switch     Q = P_new^T P_old:  M <- M Q^T,  h_j <- h_j Q^T,  V by LDAdam's rule   (`on_switch`: rotate, keep, reset)
```

## Example

```python
import torch
import transformers

import deftcore

sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=64))
groups = deftcore.galore_param_groups(model, ["attn", "mlp"], rank=4, update_proj_gap=200, scale=0.25)
optimizer = deftcore.NaturalGaLore(groups, lr=1e-2, natural_history=5)
ids = torch.arange(32).view(2, 16)
with optimizer.step_in_backward():  # or without it: loss.backward(), optimizer.step()
    model(input_ids=ids, labels=ids).loss.backward()
print(optimizer.estimate_state_bytes())
print(optimizer.diagnostics()[0])  # rho far below 1: lambda hides the Fisher, the step is GaLore's
```

Under `transformers.Trainer`: `optimizers=(optimizer, None)`; with the arguments that GaLore's users write,
`TrainingArguments(optim_target_modules=["attn", "mlp"], optim_args="rank=64, update_proj_gap=100", ...)`, the optimizer
is `deftcore.methods.natural_galore.trainer.optimizer_of(args, model)`; TRL's `SFTTrainer` the same
(`examples/trl_sft.py`). Recipes: `galore`, `natural-galore`.

## Where things are

| | |
|---|---|
| the optimizer, its hooks in the backward | `optimizer.py`, `backward.py` |
| options of a group, param groups of a model | `options.py`, `groups.py` |
| state: tensors and numbers, its size | `state.py` |
| finding a subspace; taking the state to the next one | `subspace.py`, `refresh.py` |
| the inner optimizer, Adam or another rule | `inner.py` |
| Transformers' Trainer | `trainer.py` |
| what recipes get | `method.py` |
| the step itself | `deftcore/ops/galore.py`, native: `csrc/cpu/galore.cpp`, `csrc/cuda/galore.cu` |
| its products with the subspace | `deftcore/ops/products.py` |
| its definition in plain PyTorch | `deftcore/ops/galore_matrix.py`, `deftcore/ops/natural.py` |

## Costs and limits

- State of a matrix, in numbers: `r a` for P, `2 r b` for the moments, and `s r b` for the window, a the shorter side.
  AdamW holds `2 a b`. At s = 20 the window is ten times the moments: a square matrix saves memory only for r below
  n / 11.5, and the papers' memory tables leave the window out. `estimate_state_bytes()` says what it takes, and a
  group that takes more than AdamW is warned of. `history_dtype="bfloat16"` halves the window.
- Departures from the published code: the solve does not cancel; state follows the subspace (`on_switch="keep"` is
  theirs); one-sided projection as in the paper (`projection="two_sided"` is theirs, with other singular vectors than
  their Tucker decomposition's); subspaces come from one pass of subspace iteration from the old one, G (G^T P), a thin
  QR and Rayleigh-Ritz, in the state's dtype (`refresh="exact"` is an SVD).
- With `damping_mode="absolute"`, gradients far below sqrt(damping) make it plain GaLore; `"relative"` follows them.
- The state is tensors and numbers, and resumes bit for bit; float32 for 16-bit weights, which
  `stochastic_rounding=True` keeps unbiased (bfloat16).
- Data parallelism: gradients that are equal on all processes give equal states. FSDP2: each matrix is gathered for
  its step, and its state is whole on every process; all else is sharded. What FSDP1 or ZeRO-3 has flattened is refused.
- `step_in_backward`, `accumulate_in_subspace`: without clipping by the norm of all gradients. The former neither with
  DistributedDataParallel, whose work it does (`average`), nor with sharded parameters.
- A window that does not hold starts anew with the current gradient; `diagnostics()` counts such failures. They come of
  infinite gradients, and of a lambda that vanishes beside the window's squares: `damping_mode="relative"` then.
- The natural gradient not on MPS, which has no float64: the window's products are summed in it.
"""

from deftcore.methods.natural_galore import method  # noqa: F401  registers what the room gives to recipes
