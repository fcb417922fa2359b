"""Adapters of deftcore by TerraTorch's factory: `python examples/terratorch_tsvit.py`.

TerraTorch looks the `method` of a `peft_config` up in PEFT's table of configs, and hands `peft_config_kwargs` to what
it finds there. Importing `deftcore.methods` puts deftcore's own into that table, so that TerraTorch's YAML files can
name them as any other:

    model_args:
      peft_config:
        method: BOTTLENECK
        peft_config_kwargs: {r: 8, target_modules: [fc2]}
"""

import warnings

import torch
from terratorch.models.peft_utils import get_peft_backbone

import deftcore
import deftcore.methods

CONFIGS = {
    "LORA": {"r": 4, "target_modules": ["qkv", "projection", "fc1", "fc2"]},
    "BITFIT": {"new_biases": ["qkv"]},
    "BOTTLENECK": {"r": 8, "target_modules": ["fc2"]},
}


def main() -> None:
    warnings.filterwarnings("ignore", message="PEFT method .* has not been tested")
    x, doy = torch.randn(1, 9, 10, 24, 24), torch.arange(15, 285, 30).unsqueeze(0)
    for method, options in CONFIGS.items():
        torch.manual_seed(0)
        model = deftcore.TSViT(num_classes=19, image_size=24, patch_size=2, channels=10).eval()
        with torch.no_grad():
            before = model(x, doy)
        adapted = get_peft_backbone({"method": method, "peft_config_kwargs": options}, model)
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        with torch.no_grad():
            change = float((adapted(x, doy) - before).abs().max())
        print(f"{method}: {trained:,} parameters train; logits changed by {change:.1e} before the first step")


if __name__ == "__main__":
    main()
