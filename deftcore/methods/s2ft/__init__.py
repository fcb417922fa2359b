"""S2FT: a few attention heads and MLP channels of each block, trained in place.

Yang, Leng, Guo, Zhao, Nakada, Zhang, Yao, Chen, *S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by
Structured Sparsity*, NeurIPS 2024, arXiv 2412.06289.

Heads and channels are permuted so that the selected ones lie side by side in each weight. That slice is an ordinary
`nn.Parameter` on the weight's own memory: the forward is the model's, the backward computes the slice's gradient
alone, and any optimiser works. The update can be taken out, put back, fused with others, and served beside them.

## Equations

For a weight `W [out, in]`, selected channels `S` and `dy` the gradient of `y = x W^T`:

```text
o, down (input channels)              dW[:, S] = dy^T x[:, S]
v, up, gate, q, k (output channels)   dW[S, :] = dy[:, S]^T x
permutation                           rows P of gate and up, columns P of down: the same function, undone bit for bit
score of a channel                    random, |w|, |activation|, their product, or |gradient|  (`strategy`, `order`)
adapter                               (S, W[.., S] - W_before[.., S]): numbers of channels and one dense block
```

## Example

```python
import torch
import transformers
from peft import get_peft_model

from deftcore import DeltaHost, S2ftConfig, extract_adapter, select_channels

sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=64))
ids = torch.arange(32).view(2, 16)
batch = {"input_ids": ids, "labels": ids}
config = S2ftConfig(channel_ratio=0.1, strategy="activation", order="smallest")
model = get_peft_model(base, select_channels(base, config, [batch]))  # random and weight need no data, and no call
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3, fused=True)
model(**batch).loss.backward()
optimizer.step()
adapter = extract_adapter(model)  # .save("law.safetensors") writes it
plain = model.unload()  # the base again, heads and channels in their own order
host = DeltaHost(plain)
host.switch(adapter)  # writes the slices; host.remove() restores them bit for bit
```

`fuse` adds adapters up and says where they met; `serve` gives each row of a batch an adapter of its own
(`examples/serve_mixed_batch.py`). Recipes: `s2ft`, and `qs2ft` over a base in 4 bits.

## Where things are

| | |
|---|---|
| config | `config.py` |
| which channels: selection, scores | `selection.py`, `scores.py` |
| coupled structures and their permutation | `deftcore/models/coupled.py` |
| the tuned model, layer and gated MLP | `model.py`, `layer.py`, `gated_mlp.py` |
| adapters taken out, applied, fused; their base's fingerprints | `delta.py`, `deftcore/nn/fingerprints.py` |
| many adapters at once | `serving.py`, `deftcore/ops/grouped_delta.py` |
| what recipes get | `method.py` |
| partial backward, products over slices | `deftcore/ops/partial_linear.py` |
| gated activation and down projection as one op | `deftcore/ops/gated_linear.py` |
| kernels of the gated activation, and of many adapters | `csrc/cpu/partial_linear.cpp`, `csrc/cuda/partial_linear.cu` |

## Costs and limits

- A step costs `2 + p` products a linear layer where full fine-tuning costs 3, p the share that trains; gradients and
  optimiser state are p times full fine-tuning's. `recompute="gate_up"` keeps a gated MLP's input alone, for about a
  fifth of the step's time.
- One adapter trains at a time: it lives in the weights. Extract it, then switch.
- 16-bit weights get a float32 master of the slice (`master="none"` trains in place). Over 4 bits, and with
  `storage="split"` (FSDP2), the slice stands beside the weight.
- Grouped queries: whole key-value groups by default, and `down` alone unless `targets` says more.
- Families as `deftcore info --models` lists them; tied weights, other tuners on the same layers and tensor
  parallelism are refused by name.
"""

from deftcore.methods.s2ft import method  # noqa: F401  registers what the room gives to recipes
from deftcore.methods.s2ft.config import S2ftConfig
from deftcore.methods.s2ft.model import S2ftModel
from deftcore.training.adapters import register_with_peft

register_with_peft("S2FT", S2ftConfig, S2ftModel)
