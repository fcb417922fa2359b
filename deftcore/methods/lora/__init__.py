"""LoRA, QLoRA, bottleneck adapters, prompts: PEFT's methods on native kernels, and the ground that other rooms share.

- LoRA: Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen, *LoRA: Low-Rank Adaptation of Large Language Models*,
  arXiv 2106.09685.
- QLoRA: Dettmers, Pagnoni, Holtzman, Zettlemoyer, *QLoRA: Efficient Finetuning of Quantized LLMs*, arXiv 2305.14314.
- Bottleneck adapters: Pfeiffer et al., *AdapterFusion*, arXiv 2005.00052; the parallel form: Chen et al.,
  *AdaptFormer*, arXiv 2205.13535; two down projections, of which each call draws one: Wang et al., *AdaMix*, arXiv
  2205.12410.
- BitFit: Ben Zaken, Goldberg, Ravfogel, *BitFit*, arXiv 2106.10199.
- Prompt tuning: Lester, Al-Rfou, Constant, arXiv 2104.08691. Prefix tuning: Li, Liang, arXiv 2101.00190. Both are
  PEFT's, as they are.

PEFT wraps, saves, loads and merges. deftcore changes how the wrapped layers compute, in place and back
(`patch`, `unpatch`), keeps the frozen weights in 4 bits, and adds two configs that PEFT lacks, `BottleneckConfig` and
`BitFitConfig`.

## Equations

```text
LoRA        y = x W^T + b + s (drop(x) A^T) B^T        W [M, K] frozen, A [R, K], B [M, R], s = alpha / R
QLoRA       W = code[nibble] scale[block]              NF4 or FP4, blocks of 64; scales in 8 bits (double quantisation)
bottleneck  y = MLP(x) + s up(f(down(MLP(x))))         parallel, as AdaptFormer: ... + s up(f(down(x)))
            stochastic: down is down_0 or down_1, drawn by each call in training; (down_0 + down_1) / 2 else
BitFit      y = f(x; W, b')                            b' starts at b, or at 0 where a linear layer has none
backward    dB = s dy^T (x A^T),  dA = s (dy B)^T x,  dx = dy W + s (dy B) A;  none for W
```

## Example

```python
import torch
import transformers
from peft import LoraConfig, get_peft_model

import deftcore

sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=64))
model = deftcore.prepare_for_training(deftcore.quantize(model))  # without this line: LoRA, not QLoRA
model = deftcore.patch(get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")))
ids = torch.arange(32).view(2, 16)
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
model(input_ids=ids, labels=ids).loss.backward()
optimizer.step()  # B starts at zero: before a step there is nothing to merge
merged = deftcore.merge(model, to="16bit")  # a dense model again
print(merged.deftcore_merge["model.layers.0.mlp.up_proj"])  # what the merge lost
```

From files straight into 4 bits, tensor by tensor: `deftcore.load_quantized(folder)`. `patch` also takes the layers of
models that Transformers loaded with bitsandbytes. `BottleneckConfig(reduction_factor=16)` goes to `get_peft_model`
like any config of PEFT's, and so does `BitFitConfig()`. Recipes: `lora`, `qlora`, `bottleneck`, `bitfit`, `prompt`,
`prefix`, and `full` without any adapter.

## Where things are

| | |
|---|---|
| `patch`, `unpatch`, and how a room registers replacements | `patch.py` |
| PEFT's LoRA layer fused, its proof | `layer.py`, `proof.py` |
| LoRA beside a frozen pair of factors: layer, model, export | `paired.py`, `paired_model.py`, `exporting.py` |
| the weight below it, however it is kept | `base_weights.py` |
| bitsandbytes' layers | `bitsandbytes.py` |
| plain layers in 16 bits | `linear16.py`, `deftcore/nn/linear16.py` |
| 16-bit products | `deftcore/ops/products.py`, `csrc/cpu/product.cpp` |
| `merge` over 4-bit bases | `merging.py` |
| bottleneck adapters: config, layer, model | `bottleneck.py` |
| BitFit: config, layer, model | `bitfit.py` |
| what recipes get | `method.py` |
| 4-bit layers, `quantize` | `deftcore/nn/linear.py`, `deftcore/nn/quantization.py` |
| loading into 4 bits | `deftcore/models/quantized_files.py` |
| LoRA as one op | `deftcore/ops/lora.py` |
| 4-bit products | `deftcore/ops/quant4.py`, `csrc/cpu/quant4.cpp`, `csrc/cpu/quant4_gemm.cpp`, `csrc/cuda/quant4.cu` |

## Costs and limits

- A layer is replaced after a proof: it runs against PEFT's forward and backward on a small random input, about 0.1 s
  for each kind of layer, once; verdicts are kept in the cache folder. `verify=False` skips that.
- DoRA and other variants, several active adapters, mixed batches, layers with hooks or offloaded weights keep PEFT's
  own forward; `patch` names them.
- Weights in NF4 take 4.13 bits each. Files are bitsandbytes' own, byte for byte, both ways.
- Merging into 4 bits rounds most of a small update away; `deftcore_merge` says how much. `to="16bit"`, or exporting
  with the adapter unmerged, keeps it.
- Bottleneck adapters are not linear and cannot be merged. `stochastic=True` keeps both down projections in the file
  and has no loss of its own; a recomputed forward draws what the first one drew.
- BitFit trains parameters called `bias` of modules without children, of any kind: linear layers, norms, convolutions.
  A merge writes them into the module and is exact; for a bias that a linear layer lacked, up to one rounding.
"""

from deftcore.methods.lora import method  # noqa: F401  registers what the room gives to recipes
from deftcore.methods.lora.bitfit import BitFitConfig, BitFitModel
from deftcore.methods.lora.bottleneck import BottleneckConfig, BottleneckModel
from deftcore.methods.lora.patch import register_replacements
from deftcore.training.adapters import register_with_peft

register_with_peft("BITFIT", BitFitConfig, BitFitModel)
register_with_peft("BOTTLENECK", BottleneckConfig, BottleneckModel)
register_replacements("PEFT LoRA", "deftcore.methods.lora.layer", ["peft"])
register_replacements("bitsandbytes 4-bit layer", "deftcore.methods.lora.bitsandbytes", ["bitsandbytes"])
register_replacements("16-bit linear layer", "deftcore.methods.lora.linear16", ["torch"], beneath=False)
