"""How ops are registered: the tensors' own GPU is the current one while an op runs."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from deftcore import ops
from deftcore.ops import _library


@pytest.mark.parametrize("current", [0, 1])
def test_a_gpu_that_is_not_current_becomes_it(monkeypatch, current):
    """Stands in for two GPUs: an op sizes its workspace by the current one and launches there."""
    devices = [current]

    class Device:
        def __init__(self, device):
            self.index = torch.device(device).index

        def __enter__(self):
            devices.append(self.index)

        def __exit__(self, *_):
            devices.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: devices[-1])
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(_library, "HAS_CUDA", True)
    with FakeTensorMode():
        x = torch.empty(2, device="cuda:1")
    seen = []
    _library._as_kernel(lambda *args: seen.append((args, devices[-1])), [])(3, x, None)
    assert seen == [((3, x, None), 1)]
    assert devices == [current]


@pytest.mark.parametrize("name", ops.op_names())
def test_every_op_has_a_tensor_that_says_where_it_runs(name):
    first = getattr(torch.ops.deftcore, name).default._schema.arguments[0]
    assert str(first.type) in ("Tensor", "List[Tensor]")  # a list of weights is never empty
