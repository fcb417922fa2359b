"""TSViT under TorchGeo's task for series, with an adapter: `python examples/torchgeo_tsvit.py` trains a tiny one.

Needs TorchGeo 0.10 or newer, and with it Python 3.12: `pip install torchgeo`. Its `SpatioTemporalSegmentation` gives a
model `image` [B, T, C, H, W], and where series differ in length `length` [B]; it knows no dates. So the model here is
given the days on which its frames are taken, as those of a monthly composite.
"""

from collections.abc import Sequence

import torch
from lightning.pytorch import Trainer
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchgeo.tasks import SpatioTemporalSegmentation

import deftcore


class Dated(nn.Module):
    """A TSViT, or one with an adapter, for series whose frames are always of the same days.

    Args:
        model: takes x, doy and mask.
        doy: days of the year, as many as the longest series has frames.
    """

    def __init__(self, model: nn.Module, doy: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("doy", torch.tensor(doy))

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits [B, K, H, W] of x [B, T, C, H, W]; frames behind `lengths` [B] are padding."""
        doy = self.doy[: x.shape[1]].expand(len(x), -1)
        if lengths is None:
            return self.model(x, doy)
        usable = torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(1)
        return self.model(x, doy.masked_fill(~usable, 0), usable)


class TSViTSegmentation(SpatioTemporalSegmentation):
    """Further arguments are those of `deftcore.TSViT`, and `doy` and `lora`, the rank (0: all weights train)."""

    def configure_models(self) -> None:
        options = dict(self.kwargs)
        doy, rank = options.pop("doy"), options.pop("lora", 0)
        classes = self.hparams["num_classes"] or self.hparams["num_labels"] or 1
        model = deftcore.TSViT(classes, channels=self.hparams["in_channels"], **options)
        # From a checkpoint: deftcore.TSViT.from_pretrained(folder), or load_published for the authors' own.
        adapted = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear")) if rank else model
        self.model = Dated(adapted, doy)


def main() -> None:
    torch.manual_seed(0)
    mask = torch.randint(0, 3, (16, 4, 4)).repeat_interleave(2, 1).repeat_interleave(2, 2)  # fields of 2 x 2 pixels
    image = torch.randn(16, 12, 4, 8, 8) + mask[:, None, None] * torch.linspace(-1, 1, 12)[:, None, None, None]
    samples = [{"image": x, "mask": y, "length": 12 - i % 3} for i, (x, y) in enumerate(zip(image, mask, strict=True))]
    task = TSViTSegmentation(
        in_channels=4, num_classes=3, lr=1e-2, image_size=8, patch_size=2, dim=32, heads=2, dim_head=16,
        temporal_depth=1, spatial_depth=1, doy=[15, 46, 74, 105, 135, 166, 196, 227, 258, 288, 319, 349], lora=4,
    )  # fmt: skip
    trainer = Trainer(
        max_epochs=15, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False
    )
    loader = DataLoader(samples, batch_size=8)
    before = float(trainer.validate(task, loader, verbose=False)[0]["val_loss"])
    trainer.fit(task, loader, loader)
    after = float(trainer.validate(task, loader, verbose=False)[0]["val_loss"])
    trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
    print(f"loss {before:.3f} -> {after:.3f}; {trained:,} of {sum(p.numel() for p in task.parameters()):,} trained")


if __name__ == "__main__":
    main()
