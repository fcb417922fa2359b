"""A recipe's whole way, for tests of methods: training, a run that is interrupted and goes on, export."""

import json

import pytest
import torch
from conftest import Stopped
from safetensors.torch import load_file
from test_package import save_base

import deftcore
from deftcore.cli.main import main


def check_recipe(folder, stopping, capsys, recipe, method, *options):
    """What a method's run logged, an entry per line; it ends bit for bit where an interrupted one does, and its adapter
    is merged into a model that runs.

    Args:
        folder: an empty one.
        stopping: the fixture.
        options: of the recipe, beside a tiny model and its data.
    """
    base = folder / "base"
    base.mkdir()
    save_base(base)
    options = [recipe, f"method={method}", f"model={base}", f"data.train={base / 'data.txt'}",
               "deft=true", "adapter.r=4", "data.max_length=16", "training.save_every=2", *options]  # fmt: skip
    assert main(["train", *options, f"output={folder / 'whole'}"]) == 0
    stopping()
    with pytest.raises(Stopped):
        main(["train", *options, f"output={folder / 'parts'}"])
    assert main(["train", *options, f"output={folder / 'parts'}"]) == 0
    whole, parts = (load_file(folder / n / "final" / "adapter_model.safetensors") for n in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    more = ["--quantize", "nf4", "--merge", "16bit"] if method.startswith("q") else []
    capsys.readouterr()
    out = ["export", str(base), str(folder / "out"), "--adapter", str(folder / "whole" / "final"), *more]
    assert main(out) == 0, capsys.readouterr().err
    assert deftcore.load_sparse(folder / "out")(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    return [json.loads(line) for line in (folder / "whole" / "log.jsonl").read_text().splitlines()]
