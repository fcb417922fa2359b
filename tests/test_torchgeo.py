"""The examples under TorchGeo and TerraTorch, against what the two document: neither installs beside the tests'
PyTorch (torchvision), and TorchGeo 0.10 needs Python 3.12."""

import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

EXAMPLES = Path(__file__).parents[1] / "examples"


class SpatioTemporalSegmentation(nn.Module):
    """What TorchGeo 0.10 says of its task: hparams hold its arguments, kwargs those it does not know, `length` of a
    batch goes to the model as `lengths`."""

    def __init__(self, model="convlstm", in_channels=3, num_classes=None, num_labels=None, **kwargs):
        super().__init__()
        self.kwargs = kwargs
        self.hparams = {"in_channels": in_channels, "num_classes": num_classes, "num_labels": num_labels, **kwargs}
        self.configure_models()

    def forward(self, x, **kwargs):
        return self.model(x, **kwargs)

    def step(self, batch):
        kwargs = {"lengths": batch["length"]} if "length" in batch else {}
        return nn.functional.cross_entropy(self(batch["image"], **kwargs).squeeze(1), batch["mask"])


@pytest.fixture
def modules(monkeypatch):
    """Puts modules of these contents in the place of packages."""

    def put(contents):
        for name, values in contents.items():
            module = ModuleType(name)
            module.__dict__.update(values)
            monkeypatch.setitem(sys.modules, name, module)

    return put


def test_torchgeo(modules):
    modules({"torchgeo": {}, "torchgeo.tasks": {"SpatioTemporalSegmentation": SpatioTemporalSegmentation}})
    modules({"lightning": {}, "lightning.pytorch": {"Trainer": SimpleNamespace}})
    task = runpy.run_path(str(EXAMPLES / "torchgeo_tsvit.py"))["TSViTSegmentation"](
        in_channels=4, num_classes=3, image_size=8, patch_size=2, dim=32, heads=2, dim_head=16, temporal_depth=1,
        spatial_depth=1, doy=[15, 46, 74, 105], lora=2,
    )  # fmt: skip
    image, mask = torch.randn(2, 4, 4, 8, 8), torch.randint(0, 3, (2, 8, 8))
    loss = task.step({"image": image, "mask": mask, "length": torch.tensor([4, 2])})
    loss.backward()
    trained = {name for name, p in task.named_parameters() if p.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)
    padded = task(image, lengths=torch.tensor([4, 2]))
    torch.testing.assert_close(padded[:1], task(image[:1]))
    torch.testing.assert_close(padded[1:], task(image[1:, :2]))
    with pytest.raises(AssertionError):  # the last two frames do show without lengths
        torch.testing.assert_close(padded[1:], task(image[1:]))


def test_terratorch(modules, capsys):
    """Its factory: the method is a key of PEFT's table, the arguments are the config's."""

    def get_peft_backbone(peft_config, backbone):
        kind = PEFT_TYPE_TO_CONFIG_MAPPING[peft_config["method"]]
        return get_peft_model(backbone, kind(**peft_config["peft_config_kwargs"]))

    utils = {"get_peft_backbone": get_peft_backbone}
    modules({"terratorch": {}, "terratorch.models": {}, "terratorch.models.peft_utils": utils})
    runpy.run_path(str(EXAMPLES / "terratorch_tsvit.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["LORA", "BITFIT", "BOTTLENECK"]
    assert all("changed by 0.0e+00" in line for line in lines)
