"""Point-PEFT: a frozen transformer of point clouds, adapted to classification.

Tang, Zhang, Guo, Ma, Zhao, Wang, Wang, Li, *Point-PEFT: Parameter-Efficient Fine-Tuning for 3D Pre-trained Models*,
AAAI 2024, arXiv 2310.03059. The backbones: Point-MAE (Pang et al., arXiv 2203.06604) and Point-BERT (Yu et al.,
arXiv 2111.14819).

## Equations

```text
patches      G centres by farthest point sampling, the S nearest points of each, less the centre
tokens       x = [class ; encoder(patches)],  position p = [class position ; mlp(centres)]
block l      x <- x + p;   x <- x + attention(norm1(x));   x <- x + mlp(norm2(x))
logits       head([class ; largest over the patches] of norm(x))

memory       phi_i = the largest over cloud i's normalised patch tokens, of unit length; q that of the cloud at hand
             R = [q ; softmax(s)' F ; F],  s the P - 2 highest cosines of q with the bank, F their rows
prompts      P_l = dropout(E_l) + R + A_l(R):  keys and values of block l beside its own, without an output
adapted      x <- x + p;   x <- x + attention(norm1(x), P_l);   f = mlp(norm2(x));   x <- x + f + gamma_f A(f)
block        z_j = largest over a local group of (x + attention(norm(x)))               groups of near patches
             x_i <- x_i + gamma_p sum_j u_ij (gelu(batchnorm(z_j)) + gamma_c x_j)       u ~ 1 / |c_i - c_j|^2
             x <- x + A'(x)                             A: W2 act(W1 x + b1) + b2, act(z) = z sigmoid(1.702 z)
pre-training 60 % of the patches hidden, their points a told by linear(decoder([norm(blocks(seen)) ; mask tokens])),
             true points b:  loss = mean |a - nearest b|^2 + mean |b - nearest a|^2
```

## Example

```python
import torch
from peft import get_peft_model

from deftcore import PointClassifier, PointPeftConfig
from deftcore.methods.point_peft.bank import MemoryBank
from deftcore.methods.point_peft.pretraining import PointMae, PointMaeConfig

clouds, sizes = torch.randn(8, 128, 3), {"width": 48, "depth": 2, "heads": 6, "patches": 16, "patch_points": 8}
pre = PointMae(PointMaeConfig(**sizes, decoder_depth=1))
pre(clouds).loss.backward()  # and so on
bank = MemoryBank.build(pre.backbone, clouds.split(4))
base = PointClassifier.on(pre.backbone, classes=5)
model = get_peft_model(base, PointPeftConfig(bank=bank, prompt_tokens=5))
model(clouds, labels=torch.arange(8) % 5).loss.backward()
model.print_trainable_parameters()
```

A published checkpoint is read by `load_backbone("pretrain.pth", heads=6, patches=64)` of
`deftcore.methods.point_peft.checkpoints`, a fine-tuned Point-MAE with its head by `load_classifier`; sizes are those of
its tensors, and what is missing, left over or of another shape is named. LoRA and other adapters of PEFT go on the
same model: `LoraConfig(target_modules=["qkv", "projection"], modules_to_save=["head"])`, `BitFitConfig(...)`,
`BottleneckConfig(parallel=True, target_modules=["mlp"], ...)`, which is AdaptFormer.

The frozen backbone is not touched: what trains stands beside it and takes its blocks' parts in other order. So the
adapter turned off is the backbone, bit for bit, and several adapters share one. Blocks of any backbone will do that has
`group`, `embed`, `blocks` (a `BlockStack`), `norm` and a class token as `PointTransformer` has.

## Where things are

| | |
|---|---|
| the backbone, its blocks, the patches of a cloud | `backbone.py`, `blocks.py`, `patches.py` |
| the classifier | `classifier.py` |
| the adapter: config, in PEFT, what it does in the backbone's place | `config.py`, `model.py`, `layer.py` |
| memory bank and look-up; prompts | `bank.py`, `prompts.py` |
| local groups, mixing, propagation | `geometry.py` |
| the small networks; biases | `adapters.py`, `deftcore/methods/lora/bitfit.py` |
| what recipes get | `method.py` |
| masked pre-training | `pretraining.py` |
| published checkpoints | `checkpoints.py`, `deftcore/models/published.py` |
| sets of clouds: formats, what is in a set | `formats.py`, `data.py` |
| what a model sees of a cloud | `augment.py` |
| tasks: classes, pre-training | `task.py`, `pretraining_task.py` |
| what a cloud is, by a trained classifier | `predicting.py` |
| where a classifier looks | `attention.py` |
| folders of models | `deftcore/models/own.py` |

## Costs and limits

- Of a Point-MAE of 22 million weights 0.71 million train, 0.27 million of them a head of 15 classes.
- With a bank every cloud goes through the frozen backbone once more, without gradients.
  The bank is a buffer of the adapter, M x C numbers: it moves, and is saved, with it. One is built from each backbone
  and set of clouds, and refused with others.
- `init="identity"` (the default) starts at the backbone, but for prompts as tokens, which take attention from the
  first step on; `prompts="gated"` starts there too. `init="reference"` is the authors' start, and is not the identity.
- `exclude_self` hides a cloud's own row of the bank from it in training. The authors' code shows it, and at test there
  is none.
- Recomputed activations (`gradient_checkpointing`) end before each block's BatchNorm, which sees a batch once.
- Different from the authors' code, where that mixes clouds of a batch, takes other centres than the tokens', applies
  a second softmax, or lets frozen statistics drift: see the tests against its values with these faults avoided.
- Clouds of a batch have the same number of points. A batch of one cloud cannot train a head, which has BatchNorm.
- BatchNorm whose weight is frozen keeps its statistics, in training too: a frozen backbone stays as it is, byte by
  byte.
- Point-MAE pre-trains without a class token; a backbone from it starts with a random one, which fine-tuning trains.
- Heads of Point-BERT's fine-tuning have other layers and are not read; its pre-trained backbone is.
- Point-M2AE is not among the backbones: its three stages have patches, widths and positions of their own and pool
  tokens from one to the next, so it is three stacks of blocks and no single one with one set of centres; nor has it a
  class token.
"""

from deftcore.methods.point_peft import method  # noqa: F401  registers what the room gives to recipes
from deftcore.methods.point_peft.config import PointPeftConfig
from deftcore.methods.point_peft.model import PointPeftModel
from deftcore.methods.point_peft.pretraining_task import PointPretrainingTask
from deftcore.methods.point_peft.task import PointTask
from deftcore.training.adapters import register_with_peft
from deftcore.training.registry import register

register_with_peft("POINT_PEFT", PointPeftConfig, PointPeftModel)
register(PointTask)
register(PointPretrainingTask)
