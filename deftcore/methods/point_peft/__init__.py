"""Point-PEFT: a frozen transformer of point clouds, adapted to classification.

Tang, Zhang, Guo, Ma, Zhao, Wang, Wang, Li, *Point-PEFT: Parameter-Efficient Fine-Tuning for 3D Pre-trained Models*,
AAAI 2024, arXiv 2310.03059.

## Equations

```text
patches    G centres by farthest point sampling, the S nearest points of each, less the centre
tokens     x = [class ; encoder(patches)],  position p = [class position ; mlp(centres)]
block l    x <- x + p;   x <- x + attention(norm1(x));   x <- x + mlp(norm2(x))
logits     head([class ; largest over the patches] of norm(x))
```

## Example

```python
import torch

from deftcore.methods.point_peft.classifier import PointClassifier, PointClassifierConfig

config = PointClassifierConfig(width=48, depth=2, heads=6, patches=16, patch_points=8, classes=5)
model = PointClassifier(config)
model(torch.randn(2, 128, 3), labels=torch.tensor([0, 4])).loss.backward()
```

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

- Clouds of a batch have the same number of points.
"""

from deftcore.methods.point_peft.pretraining_task import PointPretrainingTask
from deftcore.methods.point_peft.task import PointTask
from deftcore.training.registry import register

register(PointTask)
register(PointPretrainingTask)
