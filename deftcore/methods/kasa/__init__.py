"""KaSA: LoRA in the form of a singular value decomposition, beside a weight without its smallest components.

Wang, Jiang, Park, Kim, Tang, *KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models*, ICLR 2025,
arXiv 2412.06071.

The r smallest singular components of each adapted weight are held to be noise and go; the update has singular values
of its own, which are trained and penalised, beside factors that are kept near orthonormal. In the paper's code, and in
PEFT's variant, what goes is cut out of the weight for good. Here it stands beside the weight as two factors that are
subtracted: the base is shared and can stay in 4 bits, an adapter can be turned off exactly, several of different ranks
share a model, and each is exported as a plain LoRA of rank 2r on the original weights.

## Equations

For a weight `W = U S V^T [M, K]`, whose r smallest components are `D = E F^T`, `E = U_r S_r [M, r]`, `F = V_r [K, r]`:

```text
forward    y = x W^T - (x F) E^T + s ((drop(x) A^T) * sigma) B^T + b      s = alpha / r (alpha / sqrt(r) with rsLoRA)
start      A uniform (Kaiming), B zero, sigma standard normal: y = x (W - D)^T + b
loss       task + mean over layers of beta L2 + gamma L3
           L2 = sum sigma^2                      L3 = |B^T B - I|_F + |A A^T - I|_F
backward   dsigma = s sum (x A^T) * (dy B),  dA = s (dy B * sigma)^T x,  dB = s dy^T (x A^T * sigma)
export     A' = [s sigma A; F^T],  B' = [B, -E],  scaling 1
```

## Example

```python
import tempfile

import torch
import transformers
from peft import PeftModel, get_peft_model

from deftcore import KasaFactoredConfig, KasaPenalty, export_lora

sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=64))
model = get_peft_model(base, KasaFactoredConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
penalty = KasaPenalty(model)  # beta and gamma are the config's
ids = torch.arange(32).view(2, 16)
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3, weight_decay=0.0)
(model(input_ids=ids, labels=ids).loss + penalty.loss()).backward()
optimizer.step()
folder = tempfile.mkdtemp()
export_lora(model, folder)  # plain LoRA, which PEFT loads without deftcore; `deftcore export --lora` from files
plain = PeftModel.from_pretrained(model.unload(), folder)
```

Under `transformers.Trainer` the penalty is an objective: `class KasaTrainer(ObjectiveTrainerMixin, Trainer)` from
`deftcore.training.trainer`, with `objective=KasaPenalty(model)` (`examples/spectral_adapters.py`); under TRL's
`SFTTrainer` the same (`examples/trl_sft.py`). Adapters of PEFT's own KaSA variant are read and written by
`load_peft_kasa` and `save_peft_kasa`. Recipes: `kasa`, and `qkasa` over a base in 4 bits.

## Where things are

| | |
|---|---|
| config | `config.py` |
| the layer, the tuned model | `layer.py`, `model.py` |
| what is taken out of a weight, and kept in the cache folder | `truncation.py` |
| the penalties | `penalty.py` |
| PEFT's own adapters | `interchange.py` |
| what recipes get | `method.py` |
| LoRA beside a frozen pair, its export | `deftcore/methods/lora/paired.py`, `deftcore/methods/lora/exporting.py` |
| smallest singular triplets | `deftcore/ops/subspace.py` |
| LoRA as one op | `deftcore/ops/lora.py` |

## Costs and limits

- Over LoRA: r (M + K) more frozen numbers a layer, and the products with them, which are columns of LoRA's own.
- The cut can break a model: SmolLM2 stays far behind LoRA in every seed, training makes up for it only in part
  (`docs/evidence.md`); MiniLM bears it. Compare the loss after wrapping with that of the model before.
- Weights are decomposed once, on wrapping: about one product and two factorisations of the shorter side's square in
  float64. What was found is kept in the cache folder by a hash of the weight, 4 r (M + K) bytes each.
- An adapter knows its base by a hash, in the dtypes that it may be loaded in; another base is refused.
- `base_mode="destructive"` is the paper's way: the weight is truncated in place, in its own dtype, requantised where it
  is in 4 bits; disabling the adapter does not bring it back, and it cannot be exported.
- Of several active adapters the updates add up, and the weight is truncated once, by the highest rank.
- sigma has no weight decay while beta is above 0, in recipes and under the Trainer mixin.
- The paper sums nothing over layers explicitly: its code takes the mean (the default), PEFT the sum.
- Embeddings, convolutions and 8-bit layers are refused by name.
"""

from deftcore.methods.kasa import method  # noqa: F401  registers what the room gives to recipes
from deftcore.methods.kasa.config import KasaFactoredConfig
from deftcore.methods.kasa.model import KasaModel
from deftcore.training.adapters import register_with_peft

register_with_peft("KASA_FACTORED", KasaFactoredConfig, KasaModel)
