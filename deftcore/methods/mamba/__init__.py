"""Mamba: fine-tuning of Mamba, Mamba-2 and FalconMamba on fused blocks, with LoRA inside, and how stable they are.

Halloran, Gulati, Roysdon, *Mamba State-Space Models Are Lyapunov-Stable Learners*, TMLR 2025, arXiv 2406.00209.
The blocks: Gu, Dao, *Mamba*, arXiv 2312.00752; Dao, Gu, *Mamba-2*, arXiv 2405.21060.

`deftcore.patch` turns Transformers' mixers into one op each, for training, prefill and cached decoding. LoRA may sit
on any projection inside, `dt_proj` and `out_proj` too, of which Transformers bypasses the one and PEFT refuses the
other. Checkpoints stay Transformers' and PEFT's.

## Equations

For input `u`, steps `delta = softplus(.) > 0`, `A < 0`, state `h` in float32:

```text
h_t = exp(delta_t A) h_(t-1) + delta_t B_t u_t       y_t = C_t h_t + D u_t        out = (y silu(z)) W_out^T
[dt, B, C] = u W_x^T                                  one fused projection (the "buffer"); on Mamba-2 part of in_proj
tied   [dt, B, C] += s (u A_x^T) B_x^T                one pair of rank r: all slices see the same r features
split  one pair of rank r for each slice
lambda = mean_t(delta_t A) <= 0                       Lyapunov exponent: how fast a disturbed state is forgotten
```

## Example

```python
import torch
import transformers
from peft import get_peft_model

import deftcore

config = transformers.MambaConfig(vocab_size=64, hidden_size=32, state_size=8, num_hidden_layers=2)
model = transformers.MambaForCausalLM(config)
adapter = deftcore.MambaLoraConfig(r=4, lora_alpha=8)  # x_proj and in_proj; target_modules=[...], split=True
model = deftcore.patch(get_peft_model(model, adapter))
ids = torch.arange(32).view(2, 16)
model(input_ids=ids, labels=ids).loss.backward()
model.eval().generate(input_ids=ids[:, :4], max_new_tokens=4)
```

`install_kernel_aliases()`, of `kernel_aliases.py`, puts the scans where other code imports `mamba_ssm` and
`causal_conv1d`. Recipe: `mamba-lora`. The stability of a model, and how far mixed precision drifts from float32:

```console
$ deftcore lyapunov ./my-mamba test.jsonl --precisions bf16 --steps 0,10
```

## Where things are

| | |
|---|---|
| LoRA on the buffers: config, layer, model | `lora.py` |
| Transformers' mixers on the fused blocks | `mixers.py`, `deftcore/nn/mamba.py`, `deftcore/nn/mamba2.py` |
| the ops under `mamba_ssm`'s names | `kernel_aliases.py` |
| Lyapunov exponents, mixed-precision drift | `stability.py`, `deftcore/ops/ssm/lyapunov.py` |
| what recipes get | `method.py` |
| whole blocks, scans, convolution | `deftcore/ops/ssm` |
| kernels | `csrc/cpu/ssm.cpp`, `csrc/cpu/ssd.cpp`, `csrc/cpu/state_update.cpp`, `csrc/cpu/conv1d.cpp`, `csrc/cuda` |

## Costs and limits

- Time and memory are linear in the length; Transformers' own loop is quadratic in training. With a frozen base the
  backward keeps the block's input projection and a state every 32 tokens, and computes the rest again.
- `A_log`, `D`, steps and states are float32 in every precision. 4-bit bases work: `deftcore.quantize(model)` first.
- DoRA and LoRA on `conv1d` are refused. Split adapters cannot be averaged into one.
- Several tokens after a filled cache continue from its state. Packed sequences: on Mamba-2, by `seq_idx`.
- That tying regularises is the paper's claim in its first versions; its last no longer makes it. Measure it.
- The paper's public text gives no ranks or rates: the defaults, and those of the recipe, are this project's.
- The CUDA scans are first versions, sequential in time. DEFT is not defined for Mamba, which has no MLP.
"""

from deftcore.methods.lora.patch import register_replacements
from deftcore.methods.mamba import method  # noqa: F401  registers what the room gives to recipes
from deftcore.methods.mamba.lora import MambaLoraConfig, MambaLoraModel
from deftcore.models.families import with_part
from deftcore.training.adapters import register_with_peft

register_with_peft("MAMBA_LORA", MambaLoraConfig, MambaLoraModel)
# Not before a model needs them: a modelling file keeps the kernels that it finds when it is imported.
register_replacements(
    "Mamba mixer",
    "deftcore.methods.mamba.mixers",
    [f"transformers.models.{kind}.modeling_{kind}" for kind in with_part("Mamba mixer")],
)
