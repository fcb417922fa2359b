"""Folders of our own models: written whole, read strictly, or refused by name."""

import dataclasses
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from deftcore.models import own
from deftcore.models.own import OwnConfig, OwnModel, load_own, load_strictly


@dataclasses.dataclass
class ToyConfig(OwnConfig):
    model_type = "toy"
    width: int
    sizes: tuple[int, ...] = (2, 3)
    legacy: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.width < 1:
            raise ValueError(f"width: must be at least 1, got {self.width}")


class Toy(OwnModel):
    config_class = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList(nn.Linear(config.width, size) for size in config.sizes)
        self.norm = nn.BatchNorm1d(config.width)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_model_returns_as_it_was(tmp_path):
    model = Toy(ToyConfig(width=4, sizes=(1, 2, 3)))
    model.norm(torch.randn(5, 4))  # running statistics are state as well
    model.layers[0].weight.requires_grad_(False)
    model.layers[1].bfloat16()
    model.save_pretrained(tmp_path / "deep" / "toy")
    assert names(tmp_path / "deep" / "toy") == ["config.json", "model.safetensors"]
    loaded = Toy.from_pretrained(tmp_path / "deep" / "toy")
    assert loaded.config == model.config
    assert loaded.name_or_path == str(tmp_path / "deep" / "toy")
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
        assert loaded.state_dict()[name].dtype == tensor.dtype
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert Toy.from_pretrained(tmp_path / "deep" / "toy", dtype=torch.float64).layers[1].weight.dtype == torch.float64
    assert pickle.loads(pickle.dumps(loaded)).config == model.config


def test_what_else_a_folder_holds_stays(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("mine")
    first, second = Toy(ToyConfig(width=4)), Toy(ToyConfig(width=4))
    first.save_pretrained(tmp_path)
    second.save_pretrained(tmp_path, state_dict={k: 0 * v for k, v in second.state_dict().items()})
    assert not Toy.from_pretrained(tmp_path).layers[0].weight.any()
    monkeypatch.setattr(own, "save_file", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        first.save_pretrained(tmp_path)
    assert names(tmp_path) == ["config.json", "model.safetensors", "notes.txt"]
    assert not Toy.from_pretrained(tmp_path).layers[0].weight.any()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "other"}, "model_type: must be 'toy', got 'other'"),
        ({"height": 3}, "unknown fields height"),
        ({"width": None}, "config.json: "),
        ({"legacy": "false"}, "legacy: must be true or false, got 'false'"),
        ({"width": 0}, "width: must be at least 1, got 0"),
        ({"width": 5}, r"other shapes layers.0.weight \[2, 4\] for \[2, 5\], .* and 1 more"),
        ({"sizes": [2]}, "unexpected tensors layers.1.bias, layers.1.weight"),
        ({"sizes": [2, 3, 4]}, "missing tensors layers.2.weight, layers.2.bias"),
    ],
)
def test_a_folder_that_does_not_fit(change, told, tmp_path):
    Toy(ToyConfig(width=4)).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=told):
        Toy.from_pretrained(tmp_path)


def test_a_folder_that_is_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder of a model, it has no config\.json"):
        Toy.from_pretrained(tmp_path)
    Toy(ToyConfig(width=4)).save_pretrained(tmp_path / "final")
    with pytest.raises(FileNotFoundError, match=rf"it has no config\.json; did you mean {tmp_path}/final\?"):
        Toy.from_pretrained(tmp_path)
    Toy(ToyConfig(width=4)).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        Toy.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        Toy.from_pretrained(tmp_path)
    for text, message in (
        ("[1", " is damaged: "), ("[1]", " is damaged: no JSON object"),
        ('{"model_type": "toy"}', ": missing fields width"),
    ):  # fmt: skip
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=rf"config\.json{message}"):
            Toy.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8])
def test_dtypes_that_are_none(dtype, tmp_path):
    Toy(ToyConfig(width=4)).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=f"dtype: must be a floating torch.dtype, got {dtype!r}"):
        Toy.from_pretrained(tmp_path, dtype=dtype)


def test_a_file_in_a_folders_place(tmp_path, monkeypatch):
    """Of authors whose files can be read it says how."""
    file = tmp_path / "best.pth"
    file.write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=rf"^model: must be a folder, {file} is a file$"):
        Toy.from_pretrained(file)
    monkeypatch.setattr(ToyConfig, "published", "toys.load_toy")
    for load in (Toy.from_pretrained, lambda path: load_own(path, (Toy, Toy))):
        with pytest.raises(FileNotFoundError, match=r"; toys\.load_toy\(FILE\)\.save_pretrained\(FOLDER\) makes one"):
            load(file)


def test_a_refused_load_changes_nothing(tmp_path):
    model = Toy(ToyConfig(width=4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"file\.pt does not hold a Toy of this config: missing tensors layers.0.bias"):
        load_strictly(model, {"layers.0.weight": torch.ones(2, 4)}, "file.pt")
    with pytest.raises(ValueError, match=r"norm.num_batches_tracked \[\] for integer \[\]"):
        load_strictly(model, before | {"norm.num_batches_tracked": torch.tensor(1.0)}, "file.pt")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_loaded_model_does_not_lean_on_its_file(tmp_path):
    Toy(ToyConfig(width=4)).save_pretrained(tmp_path)
    loaded = Toy.from_pretrained(tmp_path)
    before = loaded.layers[0].weight.clone()
    file = tmp_path / "model.safetensors"
    changed = {name: tensor * 0 for name, tensor in load_file(file).items()}
    other = tmp_path / "other"
    save_file(changed, other)
    file.write_bytes(other.read_bytes())  # in place, as no writer of ours does
    assert torch.equal(loaded.layers[0].weight, before)
