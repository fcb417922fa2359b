"""How calls are timed, and that all processes go by one measurement."""

from types import SimpleNamespace

import pytest
import torch

from deftcore._files import add_to_table, read_table
from deftcore.ops import kernels, paths, proof, timing

CUDA = torch.device("cuda:0")


class Gpu:
    """A GPU's queue and its host, each with a clock of its own in seconds."""

    def __init__(self, monkeypatch, cycles):
        self.host = self.idle_from = 0.0
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: self.host))
        monkeypatch.setattr(torch.cuda, "_sleep", lambda n: self.launch(n / cycles))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: self.wait())
        monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))

    def launch(self, seconds):
        self.host += 1e-5
        self.idle_from = max(self.host, self.idle_from) + seconds

    def wait(self):
        self.host = max(self.host, self.idle_from)


class Event:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.at = max(self.gpu.host, self.gpu.idle_from)

    def synchronize(self):
        self.gpu.wait()

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


@pytest.mark.parametrize("cycles", [1e9, 2.6e9])
def test_the_launches_of_a_long_call_are_not_its_time(monkeypatch, cycles):
    """300 launches, which take the host three milliseconds and the device a third of one; the first call loads code."""
    gpu, first = Gpu(monkeypatch, cycles), [3.0]

    def long():
        gpu.host += first.pop() if first else 0.0
        for _ in range(300):
            gpu.launch(1e-6)

    found = timing.medians(lambda _: (long, lambda: gpu.launch(2e-4)), CUDA)
    assert found == pytest.approx([3e-4, 2e-4])
    assert gpu.host < 3.5  # no sleep as long as the first call


def test_calls_take_turns():
    order = []
    timing.medians(lambda n: [lambda: order.append((n, "a")), lambda: order.append((n, "b"))], torch.device("cpu"))
    assert order == [(n, name) for n in range(7) for name in "ab"]


def test_the_first_measurement_is_everybodys(monkeypatch, tmp_path):
    """Of two processes that measure at once the later one goes by what the earlier one found."""
    monkeypatch.setenv("DEFTCORE_CACHE", str(tmp_path))
    monkeypatch.setattr(timing, "runs_cuda", lambda x: True)
    monkeypatch.setattr(timing, "_pays", {})
    monkeypatch.setenv("DEFTCORE_CUDA_KERNELS", "proved")

    def measured_elsewhere(calls, device):
        add_to_table(timing.COST_MODEL, {f"{kernels.machine_name(x)} op 1 float32": 0.5})
        return [2.0, 1.0]

    x = torch.empty(0)
    monkeypatch.setattr(timing, "medians", measured_elsewhere)
    assert timing.native_pays("op", x, (1,), lambda: None, lambda: None)
    assert list(read_table(timing.COST_MODEL).values()) == [0.5]


def test_the_first_break_even_is_everybodys(monkeypatch, tmp_path):
    monkeypatch.setenv("DEFTCORE_CACHE", str(tmp_path))
    like, key = torch.empty(0), f"{kernels.machine_name(torch.empty(0))} 3x5 float32 tokens=1"
    monkeypatch.setattr(paths, "_known", {})
    monkeypatch.setattr(paths, "_measure", lambda *_: add_to_table(timing.COST_MODEL, {key: 0.25}) or 0.75)
    assert paths.break_even_density(like, 1, 3, 5, None, None) == 0.25


def test_what_a_measurement_depends_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    like, names = SimpleNamespace(device=CUDA), set()
    for driver, build in (("driver 1", "a"), ("driver 2", "a"), ("driver 1", "b")):
        with monkeypatch.context() as changed:
            changed.setattr(proof, "_driver", lambda driver=driver: driver)
            changed.setattr(proof, "_build", lambda build=build: build)
            changed.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="U"))
            names.add(kernels.machine_name(like))
    assert len(names) == 3
