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
pre-training 60 % of the patches hidden, their points a told by linear(decoder([norm(blocks(seen)) ; mask tokens])),
             true points b:  loss = mean |a - nearest b|^2 + mean |b - nearest a|^2
```

## Example

```python
import torch

import deftcore
from deftcore.methods.point_peft.pretraining import PointMae, PointMaeConfig

clouds = torch.randn(4, 128, 3)
sizes = {"width": 48, "depth": 2, "heads": 6, "patches": 16, "patch_points": 8}
pre = PointMae(PointMaeConfig(**sizes, decoder_depth=1))
pre(clouds).loss.backward()
model = deftcore.PointClassifier.on(pre.backbone, classes=5)
model(clouds, labels=torch.tensor([0, 4, 2, 2])).loss.backward()
```

A published checkpoint is read by `load_backbone("pretrain.pth", heads=6, patches=64)` of
`deftcore.methods.point_peft.checkpoints`, a fine-tuned Point-MAE with its head by `load_classifier`; sizes are those of
its tensors, and what is missing, left over or of another shape is named. LoRA and other adapters of PEFT go on the
same model: `LoraConfig(target_modules=["qkv", "projection"], modules_to_save=["head"])`.

## Where things are

| | |
|---|---|
| the backbone, its blocks, the patches of a cloud | `backbone.py`, `blocks.py`, `patches.py` |
| the classifier | `classifier.py` |
| masked pre-training | `pretraining.py` |
| published checkpoints | `checkpoints.py`, `deftcore/models/published.py` |
| sets of clouds: formats, what is in a set | `formats.py`, `data.py` |
| what a model sees of a cloud | `augment.py` |
| tasks: classes, pre-training | `task.py`, `pretraining_task.py` |
| what a cloud is, by a trained classifier | `predicting.py` |
| where a classifier looks | `attention.py` |
| folders of models | `deftcore/models/own.py` |

## Costs and limits

- Clouds of a batch have the same number of points. A batch of one cloud cannot train a head, which has BatchNorm.
- BatchNorm whose weight is frozen keeps its statistics, in training too: a frozen backbone stays as it is, byte by
  byte.
- Point-MAE pre-trains without a class token; a backbone from it starts with a random one, which fine-tuning trains.
- Heads of Point-BERT's fine-tuning have other layers and are not read; its pre-trained backbone is.
- Point-M2AE is not among the backbones: its three stages have patches, widths and positions of their own and pool
  tokens from one to the next, so it is three stacks of blocks and no single one with one set of centres; nor has it a
  class token.
"""

from deftcore.methods.point_peft.pretraining_task import PointPretrainingTask
from deftcore.methods.point_peft.task import PointTask
from deftcore.training.registry import register

register(PointTask)
register(PointPretrainingTask)
