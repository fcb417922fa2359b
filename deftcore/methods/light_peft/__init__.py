"""Light-PEFT: prune the frozen base and the adapters early, then train the small model.

Gu, Fu, Liu, Shen, Lin, Wang, *Light-PEFT: Lightening Parameter-Efficient Fine-Tuning via Early Pruning*, Findings of
ACL 2024, arXiv 2406.03792.

In a short first phase adapters learn as usual. Beside them learn soft masks, one per head and one per MLP channel, and
two things are noted of each adapter: how much it adds to its layer's output, and how much each of its ranks moves the
loss. Then the lowest heads, channels, adapters and ranks are cut out for real, and the second phase trains what is
left: fewer weights to compute with, and fewer to train.

## Equations

Of a block with heads `o_i` and MLP activations `a_c`, masks `m` that start at 1, and an adapter with `dY = c B A x`
beside `Y`:

```text
masks      o'_i = m_i o_i,  a'_c = m_c a_c          what the output projections read
loss       task + l1 (sum |m_heads| + sum |m_channels|)
gradient   dL/dm_i = sum over tokens <dL/do'_i, o_i> + l1 sign(m_i)                  channels alike
adapter    I = mean over the second half of the steps of  mean over tokens of |dY_t| / |Y_t|
rank       s_k = mean over the same steps of  |mean_in(A_k * dL/dA_k)| + |mean_out(B_k * dL/dB_k)|
selection  of n scores the floor(ratio n + 1e-6) lowest go, of equal ones those behind first
           heads: |m| in each layer; channels: |m| over all layers; adapters: I over all; ranks: s over all that stay
```

A bottleneck's `dY` is its branch, its `Y` what the branch is added to. Of grouped queries whole groups go, by the sum
of their heads' masks, or as many heads of each group where the ratio is less than one group. What stays keeps its
weights; its masks are dropped (`keep_masks="reset"`, the paper's) or multiplied into the weights that read it
(`"fold"`).

## Example

```python
import torch
import transformers
from peft import LoraConfig, get_peft_model

from deftcore import LightPeftConfig, slim
from deftcore.methods.light_peft.estimation import Estimation
from deftcore.methods.light_peft.selection import select

sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=64))
model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]))
config, batch = LightPeftConfig(estimate_steps=6), {"input_ids": torch.arange(32).view(2, 16)}
estimation = Estimation(model, config)  # an objective
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
for group in estimation.groups(1e-3):
    optimizer.add_param_group(group)
for step in range(6):
    estimation.begin([batch], step, 6)
    output = model(**batch, labels=batch["input_ids"])
    (output.loss + estimation.share(batch, output)).backward()
    estimation.end()
    optimizer.step()
    optimizer.zero_grad()
estimation.detach()
kept = select(estimation.structures, estimation.scores(), config)
print(slim(model, kept))  # in place; a new optimizer trains what is left
```

`deftcore train light-peft` runs both phases, and goes on where it was stopped: inside the first, between
them, or in the second, which begins with a fresh optimizer and schedule.

What comes out is a task, `final/`, for the whole base: `deftcore.load_slim(base, "runs/light-peft/final")` is the slim
model, any number of them over one base in memory, and `deftcore.expand(...)` the adapters in full shape. Both, and
models that stand alone: "Slim models" of docs/library.md. `deftcore generate` and `deftcore export` take it as
`--adapter`.

## Where things are

| | |
|---|---|
| config | `config.py` |
| the adapters of the first phase | `adapters.py` |
| masks, running sums: the first phase as an objective | `estimation.py` |
| importance of adapters and ranks | `importance.py` |
| what stays | `selection.py` |
| what recipes get: both phases | `method.py` |
| random and magnitude pruning, to compare with | `baselines.py` |
| base and adapters cut down to it, and back | `slimming.py`, `deftcore/models/slimming.py` |
| tasks over a shared base | `plug.py`, `deftcore/models/slim_files.py` |
| what stays, as a record | `deftcore/models/kept.py` |
| heads and channels of a model | `deftcore/models/coupled.py` |
| masks on activations | `deftcore/ops/masks.py` |

## Costs and limits

- The first phase adds L (H + F) trained numbers, and two products with an adapter's rank per adapter and step in its
  second half. Sums are kept on the device; the loop waits for none of them.
- With AdamW at 3e-4 over 800 steps a mask moves by about 0.1 at most: only their order says anything. The phase's
  result has their range, and the share of what is pruned that the last tenth of the steps decided.
- A ratio of 0 leaves a part as it is, bit for bit. Ratios that are less than one head, or group, are refused.
- `uniform` results load in Transformers where the config has a field for the size of a head (Llama's, Phi-3's and T5's
  families); of others channels alone may go then. All others load with `deftcore.load_model` and in the commands.
- A task fits the base that it was cut from, which is compared; its folder is what `deftcore generate --adapter` takes.
- Stacks whose layers share a table of position biases (T5) share their heads' masks too.
- In several processes all see the same sums, and the first one's selection counts.
- Adapters are plain LoRA or bottlenecks on linear layers, one on each. Merged adapters, other variants, latent
  attention and architectures that the table of families does not list are refused by name.
"""

from deftcore.methods.light_peft import method  # noqa: F401  registers what the room gives to recipes
