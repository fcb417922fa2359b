"""TSViT at PASTIS's shape against the same module whose attention is written out, as the authors' code does."""

from functools import partial

import torch
from rich.progress import track
from torch import nn

from bench.harness import alternate, console
from deftcore import TSViT
from deftcore.methods.tsvit.encoder import Attention, Encoder

SIZES = {"num_classes": 19, "image_size": 24, "patch_size": 2, "channels": 10}  # PASTIS, 1 657 476 parameters
FRAMES = 60


class WrittenOut(Attention):
    """softmax(q k^T / sqrt(d_h)) v, with [N, heads, L, L] kept for the backward."""

    def forward(self, x, mask=None, *, queries=None, prompt=None):
        q, k, v = (self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1))).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
        return self.projection((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class WholeEncoder(Encoder):
    """One that computes all rows of its last layer and then takes those that were asked for."""

    def forward(self, x, mask=None, keep=None):
        return super().forward(x, mask)[:, :keep]


def written_out(model):
    for module in model.modules():
        if isinstance(module, Attention):
            module.__class__ = WrittenOut
        elif isinstance(module, Encoder):
            module.__class__ = WholeEncoder
    return model


def kept_mb(run):
    """What a forward keeps for the backward, in MB, each piece of memory once."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept.values()) / 2**20


def bench_tsvit(device, quick):
    """A row per batch, with and without a mask of frames."""
    torch.manual_seed(0)
    ours = TSViT(**SIZES).to(device)
    theirs = written_out(TSViT(**SIZES).to(device))
    theirs.load_state_dict(ours.state_dict())
    cases = [(1, False)] if quick else [(batch, masked) for batch in (1, 4) for masked in (False, True)]
    return [row(ours, theirs, *case, device, quick) for case in track(cases, "TSViT", console=console)]


def row(ours, theirs, batch, masked, device, quick):
    x = torch.randn(batch, FRAMES, SIZES["channels"], *(SIZES["image_size"],) * 2, device=device)
    doy = (torch.arange(FRAMES, device=device) * 6 + 1).expand(batch, -1)
    mask = (torch.rand(batch, FRAMES, device=device) < 0.75) if masked else None
    found = {"series": batch, "mask": masked, "dtype": "float32"}
    for what in ("forward", "both"):
        sides = {name: partial(step, model, x, doy, mask, what) for name, model in (("ours", ours), ("plain", theirs))}
        times = alternate(sides, 2 if quick else 7, device, graph=False)
        seconds = {name: each["seconds"] for name, each in times.items()}
        found |= {f"{what}_{name}_ms": each * 1e3 for name, each in seconds.items()}
        found["ratio" if what == "both" else f"{what}_ratio"] = seconds["plain"] / seconds["ours"]
    found |= {f"kept_{name}_mb": kept_mb(partial(m, x, doy, mask)) for name, m in (("ours", ours), ("plain", theirs))}
    return found


def step(model: nn.Module, x, doy, mask, what):
    with torch.set_grad_enabled(what == "both"):
        loss = model(x, doy, mask).square().mean()
    if what == "both":
        torch.autograd.grad(loss, list(model.parameters()))
