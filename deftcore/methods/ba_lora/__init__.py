"""BA-LoRA: an adapter that starts as the largest part of each weight, with three penalties on what the model says.

Chang, Chang, Wu, *BA-LoRA: Bias-Alleviating Low-Rank Adaptation to Mitigate Catastrophic Inheritance in Large Language
Models*, ICLR 2026, arXiv 2408.04556. The start is PiSSA's: Meng, Wang, Zhang, arXiv 2404.02948.

The penalties are on logits, never on weights: staying with the pre-trained model (knowledge drift), outputs that differ
(collapse), and logits whose spectrum is concentrated (fitting noise). The weight stays as it is: the adapter is counted
from frozen copies of what it started from, so that step 0 is the pre-trained model exactly, in any dtype, the base can
stay in 4 bits, and the pre-trained model is this one with its adapter off. No second model is loaded.

## Equations

For a weight `W = U S V^T`, s = alpha / r; M tokens that count, logits Z [M, V], teacher's P, student's Q:

```text
start         A = A0 = (S_r/s)^1/2 V_r^T,  B = B0 = U_r (S_r/s)^1/2
forward       y = x W^T + s x (B A - B0 A0)^T + b  =  x W^T + s (x [A - A0; A0]^T) [B, B - B0]^T + b
loss          task + l1 CR + l2 DR + l3 SVDR
tokens        CR = T^2 mean KL(P_T | Q_T)     DR = -mean entropy of the K largest     SVDR = -sum_{i<=k} s_i / |Z|_F
classes       CR the same, over the batch     DR = sum_{i != j} C_ij^2 / D            SVDR = -sum_{i<=k} s_i / sum s_i
schedules     l1 (0.1 + 0.45 (1 + cos(pi t / T)));  l2, l3: 0 for a fifth of the steps, then up over a twentieth
export        A' = s [A - A0; A0],  B' = [B, B - B0],  scaling 1
```

## Example

```python
import torch
import transformers
from peft import get_peft_model

from deftcore import BaLoraConfig, BaLoraPenalty

sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=64))
model = get_peft_model(base, BaLoraConfig(r=8, lora_alpha=8, task_type="CAUSAL_LM"))
penalty = BaLoraPenalty(model)
batch = {"input_ids": torch.arange(32).view(2, 16), "labels": torch.arange(32).view(2, 16)}
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-5)
output = model(**batch)
(output.loss + penalty.loss(batch, output.logits)).backward()
optimizer.step()
```

Under `transformers.Trainer` the penalty is an objective: `class BaLoraTrainer(ObjectiveTrainerMixin, Trainer)` from
`deftcore.training.trainer`, with `objective=BaLoraPenalty(model)` (`examples/spectral_adapters.py`); under TRL's
`SFTTrainer` the same (`examples/trl_sft.py`). `deftcore.export_lora(model, folder)`, or `deftcore export --lora` from
files, writes a plain LoRA of rank 2r on the original weights. Recipes: `ba-lora`, and `qba-lora` over a base in 4 bits.

## Where things are

| | |
|---|---|
| config, with the published weights of each variant and form | `config.py` |
| the layer, the tuned model | `layer.py`, `model.py` |
| the penalties as an objective, the pre-trained model's logits | `penalty.py` |
| schedules of the weights | `schedules.py` |
| what recipes get | `method.py` |
| the penalties on logits of tokens, and of classes | `deftcore/ops/logits.py`, `deftcore/ops/class_logits.py` |
| LoRA beside a frozen pair, its export | `deftcore/methods/lora/paired.py`, `deftcore/methods/lora/exporting.py` |

## Costs and limits

- Over LoRA: one forward of the pre-trained model a step, while the consistency's weight is above 0, and its logits.
  Under TRL's `SFTTrainer`, whose loss needs no logits, one forward more for those of the model itself.
- The penalties make no float32 copy of the logits: the forward keeps a few numbers a token, of which and the logits
  the backward makes the gradient. The spectral term of `variant="v5"` copies the logits, in their own dtype.
- `base_mode="pissa"` puts W - s B0 A0 in the weight's place, as published: one adapter a model, and an identity at
  step 0 that holds up to the rounding of the weights.
- Covariances and singular values are those of a micro-batch, on each process its own.
- Classifiers: the spectral term is inert where k is at least min(N, D), as on all of GLUE with the published k = 5; all
  three are with one output; one example a batch has no covariance. Each is warned of once.
- A classifier's new head starts at random, and consistency holds it to that start: give it the weight 0 there, or train
  the head before.
- The positions that count are those that predict a label; the authors' code takes those that have one
  (`shift=False`), and so leaves out the first token of an answer.
- `variant="v5"` has the terms of the preprint before. Dropout is refused: the start would not be the pre-trained model.
"""

from deftcore.methods.ba_lora import method  # noqa: F401  registers what the room gives to recipes
from deftcore.methods.ba_lora.config import BaLoraConfig
from deftcore.methods.ba_lora.model import BaLoraModel
from deftcore.training.adapters import register_with_peft

register_with_peft("BA_LORA", BaLoraConfig, BaLoraModel)
