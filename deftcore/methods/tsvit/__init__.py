"""TSViT: maps of crops from satellite series, by a Transformer over dates and then over the picture, per class.

- The model: Tarasiou, Chavez, Zafeiriou, *ViTs for SITS: Vision Transformers for Satellite Image Time Series*, CVPR
  2023, arXiv 2301.04944.
- Adapted to winter wheat: Zahweh, Nasrallah, Shukor, Faour, Ghandour, *Empirical Study of PEFT Techniques for
  Winter-Wheat Segmentation*, Environ. Sci. Proc. 2024, 29(1), 50, arXiv 2310.01825.

Each patch of p x p pixels is read through the year, K learned class tokens in front, every frame with the code of its
day; then each class's outputs are read over the picture, for each class by itself, and give the logits of its pixels.

## Equations

For a series x [B, T, C, H, W], days doy [B, T], n = H / p:

```text
tokens    z = x' W_p + b_p + E[doy] + b_E                  x' [B, n^2, T, p^2 C] the pixels of a patch, E [366, d]
time      c = Encoder([class tokens; z])[: K]              [B, n^2, K, d]; masked frames are no keys
space     s = Encoder(c^T + positions)                     [B, K, n^2, d]; a class does not see the others
logits    y[i p + u, j p + v] = (LN(s) W_h + b_h)[u p + v] of patch (i, j);    with a mixer: y M^T + m over classes
Encoder   x <- x + Attn(LN x),  x <- x + W_2 gelu(W_1 LN x + b_1) + b_2,  a LayerNorm at the end
```

## Example

```python
import torch

import deftcore
from deftcore.methods.tsvit.adapting import adapt_classes
from deftcore.methods.tsvit.losses import segmentation_loss

model = deftcore.TSViT(num_classes=19, image_size=24, patch_size=2, channels=10, temporal_depth=1, spatial_depth=1)
x, doy = torch.randn(1, 9, 10, 24, 24), torch.arange(15, 285, 30).unsqueeze(0)
usable = torch.ones(1, 9, dtype=torch.bool)
usable[0, 3] = False  # a cloud
logits = model(x, doy, usable)  # [1, 19, 24, 24]

adapt_classes(model, 1)  # wheat or not: a layer over the classes, 20 parameters
labels = torch.randint(0, 2, (1, 24, 24))
labels[:, :8] = -100  # nobody knows
segmentation_loss(model(x, doy, usable), labels).backward()
```

The authors' weights: `load_published("best.pth")` of `checkpoints.py`, and for pictures in their packed form
`model(*unpack(packed, legacy_dates=True))`. A model that was trained on PASTIS as it is stored takes `band_mean` and
`band_std` from `inputs.py`: `TSViT(..., band_mean=PASTIS_MEAN, band_std=PASTIS_STD)`.

`deftcore train wheat-tsvit` trains on scenes in `.npz` files or folders of GeoTIFFs, with a year or an
area held out, and `deftcore map` draws a whole scene; `series.py` says what they hold. `examples/torchgeo_tsvit.py`
puts the model under TorchGeo's task, `examples/terratorch_tsvit.py` adapters on it by TerraTorch's factory.

## Where things are

| | |
|---|---|
| the model | `model.py`, `encoder.py`, `heads.py` |
| days, masks, bands, the authors' packed form | `inputs.py` |
| other classes: `head`, `token`, `extend` | `adapting.py` |
| prompts in attention, class tokens as adapters | `prompts.py`, `tokens.py`, `tuner.py` |
| what recipes get | `method.py` |
| losses over labelled pixels | `losses.py` |
| the authors' checkpoints | `checkpoints.py` |
| series: a scene; on disk, arrays and GeoTIFFs | `scene.py`, `series.py`, `geotiff.py` |
| from a series to the model's input: bands, units, codes, windows | `reading.py` |
| years or areas held out | `splits.py` |
| what a recipe trains on: `task: crops` | `task.py`, `predicting.py` |
| whole scenes: `deftcore map` | `map.py`, `tiling.py`, `deftcore/cli/map.py` |

## Costs and limits

- Pictures are square and of the size that the model was made for; `resize_positions` makes it another.
- Attention is `scaled_dot_product_attention`: no [heads, T, T] is kept. The last layer over dates computes the class
  tokens' rows alone.
- Weights of the authors' code from before June 2026 have their pixels in scrambled order: `legacy_layout=True`, which
  `load_published` sets, reads them as they were trained.
- What `data.head` makes new must train: the mixer, or of `token` and `extend` the class tokens, which is what
  `method: tsvit-tokens` trains, all or, with `adapter.tokens`, the last; other methods say `modules_to_save`.
- Day 366 has the row of day 365.
- Without a mask padding takes part in attention, as where the authors' weights were trained.
- `deftcore map` reads a row of tiles of GeoTIFFs at a time, and averages logits where tiles overlap; scenes in `.npz`
  files, and those to train on, lie in memory as they are stored.
- The values of days are not looked at inside `torch.compile`.
"""

from deftcore.methods.tsvit import method  # noqa: F401  registers what the room gives to recipes
from deftcore.methods.tsvit.prompts import TSViTPromptConfig, TSViTPromptModel
from deftcore.methods.tsvit.tokens import TSViTTokenConfig, TSViTTokenModel
from deftcore.training.adapters import register_with_peft

register_with_peft("TSVIT_PROMPT", TSViTPromptConfig, TSViTPromptModel)
register_with_peft("TSVIT_TOKEN", TSViTTokenConfig, TSViTTokenModel)
