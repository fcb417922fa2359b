"""Proof before use: what passes is on and remembered, what fails is off and named, and nobody's process ends."""

import itertools
import json
import signal
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager
from dataclasses import asdict
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from deftcore import ops
from deftcore._files import add_to_table, cache_folder, one_at_a_time, read_table
from deftcore.cli import main
from deftcore.ops import kernels, proof, proof_case, proof_cases, proof_child, timing
from deftcore.ops.proof import Place, ProofError, Verdict, prove, remembered

PLACE = Place("cpu", "a GPU, a driver")
EMULATED = kernels.runs_cuda(torch.empty(0))
emulated = pytest.mark.skipif(not EMULATED, reason="needs a build with DEFTCORE_CUDA=emulate, under DEFTCORE_EMULATE=1")

# A child that has the pipe, and kernels that do what their names say.
CHILD = """
import json, os, signal, sys, time
from multiprocessing.connection import Connection
path, pipe, device, limit, *kernels = sys.argv[1:]
pipe = Connection(int(pipe), readable=False)
if "no start" in kernels:
    sys.exit("no start at all")
pipe.send_bytes(b"{}")
for kernel in kernels:
    with open(os.environ["PROOF_RUNS"], "a") as file:
        print(os.getpid() if kernel.startswith("pid") else kernel, file=file)
    reason, unknown = "", ""
    if kernel == "hangs":
        time.sleep(1000)
    if kernel.startswith("SIG"):
        if kernel != "SIGKILL":  # a shell's background jobs, these tests' for one, begin with SIGINT ignored
            signal.signal(getattr(signal, kernel), signal.SIG_DFL)
        os.kill(os.getpid(), getattr(signal, kernel))
    if kernel == "real-time signal":
        os.kill(os.getpid(), signal.SIGRTMIN + 1)
    if kernel == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kernel == "ends":
        sys.exit(3)
    if kernel == "group" and os.getpgrp() != os.getpid():
        reason = "ends with its parent's group"
    if kernel == "slow":
        time.sleep(0.5)
    if kernel == "wrong":
        reason = "differs by 2"
    if kernel == "switch":
        reason = os.environ["DEFTCORE_CUDA_KERNELS"]
    if kernel == "no memory":
        unknown = "out of memory"
    difference = None if kernel == "exact" else 0.5
    pipe.send_bytes(json.dumps({"reason": reason, "difference": difference, "unknown": unknown}).encode())
    if reason:
        break
"""


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """An empty cache folder, and a process that has asked for no kernel yet."""
    monkeypatch.setenv("DEFTCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DEFTCORE_CUDA_KERNELS", "proved")
    monkeypatch.setattr(kernels, "_off_on", {})
    kernels._warn_fallback.cache_clear()


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Makes the child above the one that proves; a function that lists the kernels that ran since the last call."""
    path = tmp_path / "runs"
    monkeypatch.setenv("PROOF_RUNS", str(path))
    monkeypatch.setattr(proof, "_COMMAND", (sys.executable, "-c", CHILD))

    def since() -> list[str]:
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    return since


def reasons(found):
    return {kernel: verdict.reason for kernel, verdict in found.items()}


# ---------------------------------------------------------------------------- any build: a child that only talks


def test_one_child_proves_all(runs):
    found = prove(["pid", "good", "pid of the same"], PLACE)
    assert len(set(runs()[::2])) == 1
    assert reasons(found) == {"pid": "", "good": "", "pid of the same": ""}


def test_what_fails_is_named_and_the_rest_goes_on(runs, monkeypatch):
    seen = []
    monkeypatch.setattr(proof, "LIMIT", 3)
    found = prove(["good", "wrong", "hangs", "crashes", "ends", "last"], PLACE, limit=3, report=seen.append)
    assert reasons(found) == {
        "good": "", "wrong": "differs by 2", "hangs": "timed out after 3 s", "crashes": "crashed with signal SIGSEGV",
        "ends": "ended with status 3", "last": "",
    }  # fmt: skip
    assert seen == list(found.values())
    assert runs() == ["good", "wrong", "hangs", "crashes", "ends", "last"]
    assert remembered(list(found), PLACE) == found
    assert found["good"].place == PLACE.words
    assert found["crashes"].difference is None


def test_verdicts_are_remembered(runs):
    found = prove(["good", "wrong"], PLACE)
    assert runs() == ["good", "wrong"]
    assert remembered(["good", "wrong", "other"], PLACE) == found
    assert prove(["good", "wrong", "other"], PLACE).keys() == {*found, "other"}
    assert runs() == ["other"]
    prove(["good"], Place("cpu", "a GPU, another driver"))
    assert runs() == ["good"]
    prove(["good", "wrong"], PLACE, again=True)
    assert runs() == ["good", "wrong"]


def test_a_damaged_table_is_as_good_as_none(runs):
    prove(["good"], PLACE)
    (cache_folder() / "proved.json").write_text('{"good')
    assert remembered(["good"], PLACE) == {}
    assert reasons(prove(["good"], PLACE)) == {"good": ""}
    (key,) = read_table("proved.json")
    add_to_table("proved.json", {key: {"kernel": "good", "of another": "layout"}})
    assert remembered(["good"], PLACE) == {}
    runs()


@pytest.mark.parametrize(
    "change",
    [{"reason": None}, {"reason": 0}, {"difference": "0.5"}, {"difference": []}, {"date": None}, {"place": "a GPU"},
     {"kernel": "other"}, {"kernel": ["good"]}],
    ids=str,
)  # fmt: skip
def test_a_damaged_verdict_is_none(gpu, runs, monkeypatch, change):
    """It is made anew where it is needed, and nobody passes by it."""
    prove(["good"], PLACE)
    ((key, entry),) = read_table("proved.json").items()
    add_to_table("proved.json", {key: entry | change})
    assert remembered(["good"], PLACE) == {}
    monkeypatch.setattr(kernels, "KERNELS", ("good",))
    assert main(["info"]) == 0
    assert main(["gpu-check"]) == 0
    assert runs() == ["good", "good"]
    assert remembered(["good"], PLACE)["good"].reason == ""


def test_no_verdict_without_a_run(runs, monkeypatch):
    """What stopped the proof says nothing about a kernel: nothing is kept of it."""
    for kernel, says in (("no start", "ended with status 1 before it began: no start at all"), ("no memory", "memory")):
        with pytest.raises(ProofError, match=says):
            prove(["good", kernel], PLACE)
        assert kernel not in remembered(["good", kernel], PLACE)
    assert remembered(["good"], PLACE).keys() == {"good"}
    monkeypatch.setattr(proof, "_COMMAND", ("/nonexistent",))
    with pytest.raises(ProofError, match="no child process"):
        prove(["other"], PLACE)
    assert reasons(prove(["good"], PLACE)) == {"good": ""}


def test_without_a_temporary_folder_or_descriptors_first_use_warns_once(gpu, runs, monkeypatch):
    monkeypatch.setattr(kernels, "KERNELS", ("good", "other"))
    for module, name in ((proof.tempfile, "TemporaryFile"), (proof, "Pipe"), (proof.fcntl, "fcntl")):
        with monkeypatch.context() as lacks:
            lacks.setattr(module, name, Mock(side_effect=OSError("nothing is left")))
            lacks.setattr(kernels, "_off_on", {})
            with pytest.warns(UserWarning, match="could not be proved, no child process: nothing is left") as caught:
                assert not any(kernels.cuda_enabled(op) for op in ("good", "other", "good"))
            assert len(caught) == 1
    assert runs() == []
    assert kernels.cuda_enabled("good")


def test_what_is_no_folder_in_the_import_path(runs, tmp_path, monkeypatch):
    """An import passes over what is no str; a text with a zero in it cannot be told to a child."""
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path, None, b"folder"])
    assert reasons(prove(["good"], PLACE)) == {"good": ""}
    monkeypatch.setattr(sys, "path", [*sys.path, "a\0b"])
    with pytest.raises(ProofError, match="no child process"):
        prove(["other"], PLACE)


CLOSED = """
import json, os, sys
numbers, child = json.loads(sys.argv[1]), sys.argv[2]
from deftcore.ops import proof
proof._COMMAND = (sys.executable, "-c", child)
for number in numbers:
    os.close(number)
found = proof.prove(["good", "wrong"], proof.Place("cpu", "a GPU"))
os._exit(0 if [verdict.reason for verdict in found.values()] == ["", "differs by 2"] else 1)
"""


@pytest.mark.parametrize("locks", [True, False])
@pytest.mark.parametrize("numbers", [[0, 1, 2], [1, 2]], ids=str)
def test_standard_streams_may_be_closed(runs, monkeypatch, numbers, locks):
    """As a service's are: what is opened first has their numbers then, the pipe too."""
    if not locks:
        monkeypatch.setenv("DEFTCORE_CACHE", "/dev/null/cache")
    command = [sys.executable, "-c", CLOSED, json.dumps(numbers), CHILD]
    assert subprocess.run(command, timeout=120, check=False).returncode == 0
    assert runs() == ["good", "wrong"]


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_who_stops_the_child_says_nothing_about_a_kernel(runs, name):
    with pytest.raises(ProofError, match=f"the child process was sent {name}"):
        prove(["good", name, "last"], PLACE)
    assert remembered(["good", name, "last"], PLACE).keys() == {"good"}


def test_a_signal_without_a_name(runs):
    with pytest.raises(ProofError, match=f"the child process was sent signal {signal.SIGRTMIN + 1}"):
        prove(["real-time signal"], PLACE)


def test_the_child_is_out_of_reach_of_the_terminal(runs):
    """Ctrl-C goes to a whole process group."""
    assert reasons(prove(["group"], PLACE)) == {"group": ""}


def test_a_short_limit_is_of_this_run_alone(runs, monkeypatch):
    assert reasons(prove(["hangs", "good"], PLACE, limit=0.5)) == {"hangs": "timed out after 0.5 s", "good": ""}
    assert remembered(["hangs", "good"], PLACE).keys() == {"good"}
    monkeypatch.setattr(proof, "LIMIT", 0.5)
    assert reasons(prove(["hangs"], PLACE, limit=0.5)) == reasons(remembered(["hangs"], PLACE))


def test_of_several_at_once_one_proves(runs):
    found = []
    threads = [threading.Thread(target=lambda: found.append(prove(["slow", "good"], PLACE))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert runs() == ["slow", "good"]
    assert found[0] == found[1] == found[2]


def test_a_process_that_was_stopped_is_not_waited_for_without_end(runs, monkeypatch):
    monkeypatch.setattr(proof, "_WAIT", 0.3)
    with one_at_a_time("proved.lock", 0.3):
        assert reasons(prove(["good"], PLACE)) == {"good": ""}
    assert runs() == ["good"]


def test_a_folder_that_cannot_be_written(runs, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DEFTCORE_CACHE", str(tmp_path / "file" / "cache"))
    assert reasons(prove(["good", "wrong"], PLACE)) == {"good": "", "wrong": "differs by 2"}


def test_the_child_proves_nothing_itself(runs):
    assert reasons(prove(["switch"], PLACE)) == {"switch": "off"}


def test_another_driver_or_build_is_another_place(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    words = []
    for driver, module in (("driver 580", b"one"), ("driver 581", b"one"), ("driver 581", b"two")):
        (tmp_path / "module").write_bytes(module)
        monkeypatch.setattr(proof.importlib.util, "find_spec", lambda name: Mock(origin=tmp_path / "module"))
        monkeypatch.setattr(proof, "_driver", lambda driver=driver: driver)
        proof._build.cache_clear()
        words.append(Place.of(torch.device("cuda", 0)).words)
    proof._build.cache_clear()
    assert len(set(words)) == 3
    assert words[0].startswith("GPU (9.0), driver 580, CUDA ")
    one, another = (Place.of(torch.device("cuda", number)) for number in range(2))
    assert (one.device, another.device) == ("cuda:0", "cuda:1")
    assert one.words == another.words  # a verdict is a model's


# ---------------------------------------------------------------------------- any build: what is on


@pytest.fixture
def gpu(monkeypatch):
    """A build with CUDA kernels, and a GPU to be asked about."""
    monkeypatch.setattr(kernels, "HAS_CUDA", True)
    monkeypatch.setattr(kernels, "has_gpu", lambda: True)
    monkeypatch.setattr(kernels, "gpu", lambda device=None: torch.device("cpu"))
    monkeypatch.setattr(Place, "of", lambda device: PLACE)


def test_the_variable(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "HAS_CUDA", True)
    monkeypatch.setattr(kernels, "has_gpu", lambda: True)
    for mode, on in (("off", False), ("all", True)):
        monkeypatch.setenv("DEFTCORE_CUDA_KERNELS", mode)
        assert all(kernels.cuda_enabled(op) == on for op in kernels.KERNELS)
        assert not kernels.cuda_enabled("another")
    monkeypatch.setenv("DEFTCORE_CUDA_KERNELS", "yes")
    with pytest.raises(ValueError, match="DEFTCORE_CUDA_KERNELS: must be off, proved or all, got 'yes'"):
        kernels.cuda_enabled("density")
    monkeypatch.setenv("DEFTCORE_CUDA_KERNELS", "all")
    monkeypatch.setattr(kernels, "has_gpu", lambda: False)
    assert kernels.why_off("density") == "no GPU"
    assert main(["info"]) == 0
    assert "kernel density: cpu on, cuda off, no GPU\n" in capsys.readouterr().out
    monkeypatch.setattr(kernels, "HAS_CUDA", False)
    assert not any(kernels.cuda_enabled(op) for op in kernels.KERNELS)


def test_first_use_proves_once(gpu, runs, monkeypatch):
    monkeypatch.setattr(kernels, "KERNELS", ("good", "wrong"))
    assert kernels.cuda_enabled("good")
    assert not kernels.cuda_enabled("wrong")
    assert kernels.why_off("wrong") == "differs by 2"
    assert runs() == ["good", "wrong"]
    monkeypatch.setattr(kernels, "_off_on", {})  # as in the next process
    assert kernels.cuda_enabled("good")
    assert not kernels.cuda_enabled("wrong")
    assert runs() == []


@pytest.fixture
def two_gpus(monkeypatch):
    """Two GPUs of compute capability 9.0; {its number: whether its current stream captures}, to be changed."""
    current, captures = [0], {0: False, 1: False}

    @contextmanager
    def as_current(device):
        before, current[0] = current[0], device.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", as_current)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captures[current[0]])
    return captures


def test_nothing_is_proved_while_a_graph_is_made(gpu, two_gpus, runs, monkeypatch):
    """What is known holds; what is not is off, and stays so: what was captured must stay true."""
    monkeypatch.setattr(kernels, "KERNELS", ("good", "later"))
    prove(["good"], PLACE)
    runs()
    monkeypatch.setattr(kernels, "gpu", lambda device=None: torch.device("cuda", 0))
    two_gpus[0] = True
    with pytest.warns(UserWarning, match="cuda:0: not proved .*; run `deftcore gpu-check` first"):
        assert not kernels.cuda_enabled("later")
    assert kernels.cuda_enabled("good")
    two_gpus[0] = False
    assert not kernels.cuda_enabled("later")
    assert runs() == []


def test_each_device_has_its_own_current_stream(two_gpus):
    two_gpus[1] = True
    assert [kernels.capturing(torch.device("cuda", number)) for number in range(2)] == [False, True]
    assert not kernels.capturing(torch.device("cpu"))


def test_nothing_is_run_on_a_gpu_that_is_too_old(gpu, two_gpus, runs, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "KERNELS", ("good",))
    monkeypatch.setattr(kernels, "gpu", lambda device=None: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    why = "the kernels need compute capability 8.0, Tesla T4 has 7.5"
    assert kernels.why_off("good") == why
    assert main(["gpu-check"]) == 2
    assert why in capsys.readouterr().err
    assert main(["info"]) == 0
    assert f"kernel good: cpu on, cuda off, {why}" in capsys.readouterr().out
    assert runs() == []


def test_a_proof_that_cannot_be_made_is_warned_of(gpu, runs, monkeypatch):
    monkeypatch.setattr(kernels, "KERNELS", ("good", "no memory", "other"))
    with pytest.warns(UserWarning, match="could not be proved, out of memory"):
        assert kernels.cuda_enabled("good")
    assert kernels.why_off("other") == "could not be proved, out of memory"


def test_only_switches_others_off(monkeypatch):
    monkeypatch.setattr(kernels, "HAS_CUDA", True)
    with kernels.only("density"):
        assert [op for op in kernels.KERNELS if kernels.cuda_enabled(op)] == ["density"]
        with kernels.only():
            assert not kernels.cuda_enabled("density")
        assert kernels.cuda_enabled("density")


def test_every_kernel_has_cases():
    assert set(proof_cases.CASES) == set(kernels.KERNELS)


def test_gpu_check_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(kernels, "HAS_CUDA", False)
    assert main(["gpu-check"]) == 2
    assert "this build has no CUDA kernels" in capsys.readouterr().err
    monkeypatch.setattr(kernels, "HAS_CUDA", True)
    monkeypatch.setattr(kernels, "has_gpu", lambda: False)
    assert main(["gpu-check"]) == 2
    assert "no GPU: PyTorch finds none" in capsys.readouterr().err
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kernels"]["density"]["cuda"] == "off, no GPU"


def test_gpu_check(gpu, runs, capsys, monkeypatch):
    monkeypatch.setattr(kernels, "KERNELS", ("good", "wrong"))
    assert main(["gpu-check"]) == 1
    place, *lines = capsys.readouterr().out.splitlines()
    assert place == PLACE.words
    assert [line.split(maxsplit=1) for line in lines] == [
        ["good", "passed, largest difference 5.0e-01"], ["wrong", "differs by 2"],
        ["1", "of 2 kernels passed; off: wrong"],
    ]  # fmt: skip
    assert main(["gpu-check", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert runs() == ["good", "wrong"]
    assert Verdict(**found["kernels"]["wrong"]).reason == "differs by 2"
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    date = found["kernels"]["wrong"]["date"]
    assert f"kernel wrong: cpu on, cuda off, differs by 2, {date} on {PLACE.words}" in text
    assert "kernel good: cpu on, cuda on, proved, " in text
    assert main(["gpu-check", "--again", "--timeout", "9"]) == 1
    assert runs() == ["good", "wrong"]
    for seconds in ("0", "-1", "nan", "inf", "1e10", "86401"):
        assert main(["gpu-check", "--again", "--timeout", seconds]) == 2
        error = capsys.readouterr().err
        assert error == f"deftcore: --timeout: must be above 0 and at most 86400, a day, got {float(seconds)}\n"
    assert main(["gpu-check", "--again", "--timeout", "86400"]) == 1
    assert runs() == ["good", "wrong"]
    monkeypatch.setattr(kernels, "KERNELS", ("good", "new"))
    assert main(["info"]) == 0
    assert "kernel new: cpu on, cuda unproved" in capsys.readouterr().out
    assert main(["gpu-check"]) == 0
    monkeypatch.setattr(kernels, "KERNELS", ("exact",))
    assert main(["gpu-check"]) == 0
    assert capsys.readouterr().out.splitlines()[-2].split() == ["exact", "passed"]


# ---------------------------------------------------------------------------- the emulator as the GPU

BROKEN = """
import ctypes
from deftcore.ops.kernels import native
real = native.cuda.density
def wrong(args, stream):
    real(args, stream)
    ctypes.c_int64.from_address(args.active_count).value += 1
def raises(args, stream):
    raise RuntimeError("an illegal memory access was encountered")
native.cuda.density = wrong
native.cuda.gated_act = lambda args, stream: ctypes.PyDLL(None).sleep(1000)
native.cuda.grouped_delta = lambda args, stream: ctypes.string_at(0)
native.cuda.causal_conv1d_backward = raises
"""


@emulated
def test_broken_kernels_stay_off(monkeypatch, capsys):
    """Each is named and falls back, the others run, this process goes on, and nothing is proved twice."""
    head, code, script = proof._COMMAND
    monkeypatch.setattr(proof, "_COMMAND", (head, code, script.replace("main(", f"exec({BROKEN!r}); main(", 1)))
    some = ("density", "gated_act", "grouped_delta", "causal_conv1d", "dequantize_4bit", "selective_state_update")
    monkeypatch.setattr(kernels, "KERNELS", some)
    assert main(["gpu-check", "--timeout", "10"]) == 1
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:-1])
    assert lines["density"].startswith("differs by ")
    assert lines["gated_act"] == "timed out after 10 s"
    assert lines["grouped_delta"] == "crashed with signal SIGSEGV"
    assert lines["causal_conv1d"].startswith("failed, RuntimeError: an illegal memory access was encountered (")
    assert all(lines[kernel].startswith("passed") for kernel in some[4:])
    a = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    monkeypatch.setattr(proof, "_COMMAND", ("/nonexistent",))
    with pytest.warns(UserWarning, match="deftcore.density: .* for cpu and torch.float32 .differs by"):
        assert ops.density(a).item() == 0.25
    assert [kernel for kernel in some if kernels.cuda_enabled(kernel)] == ["dequantize_4bit", "selective_state_update"]


@emulated
def test_first_use_of_a_kernel(monkeypatch, caplog):
    """The real proof, in a child, at the first call of an op; then the kernel runs."""
    monkeypatch.setattr(kernels, "KERNELS", ("density", "quantize_4bit"))
    calls = []
    real = kernels.native.cuda.density
    monkeypatch.setattr(kernels.native.cuda, "density", lambda *args: (calls.append(1), real(*args)))
    assert ops.density(torch.tensor([[1.0, 0.0, 0.0, 0.0]])).item() == 0.25
    assert len(calls) == 1
    assert "proving the CUDA kernels on cpu, once" in caplog.text
    assert remembered(["density"], Place.of(kernels.gpu()))["density"].reason == ""


@emulated
@pytest.mark.parametrize("compiled", [True, False], ids=["torch.compile", "FakeTensorMode alone"])
def test_first_use_while_a_trace_is_made(compiled, monkeypatch):
    """A trace asks for no kernel; the first run proves it, and it runs."""
    monkeypatch.setattr(kernels, "KERNELS", ("causal_conv1d",))
    calls = Mock(side_effect=kernels.native.cuda.causal_conv1d)
    monkeypatch.setattr(kernels.native.cuda, "causal_conv1d", calls)
    x, weight = torch.randn(2, 3, 9), torch.randn(3, 4)
    conv = ops.causal_conv1d
    if compiled:
        torch.compiler.reset()
        conv = torch.compile(conv, backend="aot_eager", fullgraph=True)
    else:
        with FakeTensorMode() as mode:
            assert conv(mode.from_tensor(x), mode.from_tensor(weight)).shape == x.shape
    assert not remembered(kernels.KERNELS, Place.of(kernels.gpu()))  # a trace is the same with and without kernels
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = conv(x, weight)
    assert calls.call_count == 1
    assert kernels.cuda_enabled("causal_conv1d")
    torch.testing.assert_close(found, F.conv1d(F.pad(x, (3, 0)), weight[:, None], groups=3))


def native_functions():
    cuda = getattr(kernels.native, "cuda", None)
    names = [name for name in dir(cuda) if not name.startswith("_")] if EMULATED else ["emulated kernels"]
    return [name for name in names if not name.endswith(("_workspace", "_tokens"))]


@emulated
@pytest.mark.parametrize("function", native_functions())
def test_cases_reach_every_function(function, monkeypatch):
    """A function that does nothing fails its kernel, and no other."""
    kernel = KERNEL_OF.get(function, function.removesuffix("_backward"))
    monkeypatch.setattr(kernels.native.cuda, function, lambda args, stream: None)
    reason = proof_child._report(kernel, torch.device("cpu"))["reason"]
    assert reason.startswith(("differs by ", "failed, ValueError: w: has values that are not finite"))
    other = "density" if kernel != "density" else "gated_act"
    assert proof_child.check(other, torch.device("cpu"))[0] == ""


KERNEL_OF = {
    "galore_update": "galore_step",
    "causal_conv1d_update": "causal_conv1d",
    "ssd": "mamba_chunk_scan",
    "ssd_backward": "mamba_chunk_scan",
}


@emulated
def test_a_few_wrong_bits_are_seen():
    """One element of many off by a hundredth of the largest."""
    exact = torch.randn(50, 50, dtype=torch.float64)
    plain = exact.float()
    ours = plain.clone()
    assert proof_child._compare(ours, plain, exact)[0] == ""
    ours[3, 4] += 1e-3 * exact.abs().max()
    assert proof_child._compare(ours, plain, exact)[0].startswith("differs by ")
    ours[3, 4] = torch.nan
    assert proof_child._compare(ours, plain, exact)[0].startswith("differs by ")


def test_no_error_is_allowed_by_values_that_are_not_finite():
    """Where PyTorch's own float16 overflows, or float64 does, a case shows nothing: it passes no kernel."""
    half, exact = torch.tensor([1.0, torch.inf]).half(), torch.tensor([1.0, 1e6], dtype=torch.float64)
    for ours, plain, right in (
        (torch.tensor([torch.nan, 0.0]).half(), half, exact),
        (half, half, exact),
        (half, half, torch.tensor([1.0, torch.inf], dtype=torch.float64)),
        (half, torch.tensor([1.0, torch.nan]).half(), exact),
    ):
        with pytest.raises(ArithmeticError, match="PyTorch's own result"):
            proof_child._compare(ours, plain, right)


@pytest.fixture
def doubles(monkeypatch):
    """A kernel "doubles" whose case calls one function, whatever is switched on; to be given that function."""

    def given(run):
        monkeypatch.setattr(kernels, "HAS_CUDA", True)
        case = proof_case.Case("one", run, (torch.ones(2, dtype=torch.float64),), gradients=False)
        monkeypatch.setitem(proof_cases.CASES, "density", lambda numbers: [case])
        return proof_child._report("density", torch.device("cpu"))

    return given


def raises(error, *, of_kernel):
    def run(x):
        if kernels.cuda_enabled("density") == of_kernel:
            raise error
        return 2 * x

    return run


def test_what_the_reference_raises_is_not_the_kernels_fault(doubles):
    assert doubles(lambda x: 2 * x)["reason"] == ""
    error = RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED when calling cublasSgemm")
    assert doubles(raises(error, of_kernel=True))["reason"] == f"failed, RuntimeError: {error} (one, float32)"
    message = doubles(raises(error, of_kernel=False))
    assert message == {"reason": "unknown", "unknown": f"density: RuntimeError: {error}"}


def test_fewer_results_than_the_references(doubles):
    found = doubles(lambda x: (x,) if kernels.cuda_enabled("density") else (x, 2 * x))
    assert found["reason"] == "gives 1 tensors, not 2 (one, float32)"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_others_have_is_nobodys_fault(doubles, error):
    for of_kernel in (True, False):
        assert doubles(raises(error, of_kernel=of_kernel))["unknown"].startswith("density: ")


def test_a_fault_that_the_device_reports_late_is_the_kernels(doubles, monkeypatch):
    """Also where the kernel's own run has raised something else by then."""

    def synchronize(device):
        if kernels.cuda_enabled("density"):
            raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(proof_child, "Numbers", Mock())
    for run in (lambda x: 2 * x, raises(torch.OutOfMemoryError(), of_kernel=True)):
        doubles(run)
        message = proof_child._report("density", torch.device("cuda"))
        assert message["reason"].startswith("failed, RuntimeError: an illegal memory access was encountered")


# ---------------------------------------------------------------------------- proved, and the faster


@pytest.fixture
def clock(monkeypatch):
    """A GPU on which a call takes as many seconds as it returns; the number of calls made."""
    calls = []

    def seconds(call, device, launch):
        calls.append(1)
        return call()

    monkeypatch.setattr(timing, "runs_cuda", lambda x: True)
    monkeypatch.setattr(timing, "seconds", seconds)
    monkeypatch.setattr(timing, "_pays", {})
    return calls


def test_the_faster_is_taken_and_remembered(clock, monkeypatch):
    x = torch.empty(0)
    for op, ours, theirs, pays in (("a", 1.0, 2.0, True), ("b", 2.0, 1.0, False), ("c", 1.0, 1.0, True)):
        for known in ({}, {}):  # the second time from the file
            monkeypatch.setattr(timing, "_pays", known)
            assert timing.native_pays(op, x, (4, 8), lambda ours=ours: ours, lambda theirs=theirs: theirs) == pays
    assert len(clock) == 3 * 10
    timing.native_pays("a", x, (8, 8), lambda: 1.0, lambda: 2.0)
    timing.native_pays("a", x.half(), (4, 8), lambda: 1.0, lambda: 2.0)
    assert len(clock) == 5 * 10


def test_where_nothing_is_timed(clock, monkeypatch):
    def choose(op="op"):
        return timing.native_pays(op, torch.empty(0), (1,), lambda: 2.0, lambda: 1.0)

    for mode in ("all", "off"):
        monkeypatch.setenv("DEFTCORE_CUDA_KERNELS", mode)
        assert choose()
    monkeypatch.setenv("DEFTCORE_CUDA_KERNELS", "proved")
    with monkeypatch.context() as captures:
        captures.setattr(timing, "capturing", lambda device: True)
        assert choose()
    assert clock == []
    assert not choose()
    monkeypatch.setattr(timing, "capturing", lambda device: True)
    assert not choose()  # known by now

    def no_memory():
        raise torch.OutOfMemoryError

    monkeypatch.setattr(timing, "capturing", lambda device: False)
    for theirs in (no_memory, lambda: 1.0):  # another process, in which there would be memory, takes the same way
        monkeypatch.setattr(timing, "_pays", {})
        assert timing.native_pays("big", torch.empty(0), (1,), lambda: 2.0, theirs)
    assert sorted(read_table("cost_model.json").values()) == [0.0, 2.0]


TIMED = ("linear_4bit", "grouped_delta", "mamba_chunk_scan")


@pytest.fixture(params=[True, False], ids=["native is faster", "native is slower"])
def race(request, monkeypatch):
    """The emulated device, its kernels proved, and a clock by which native code is always faster, or never."""
    verdicts = {proof._key(name, PLACE): asdict(Verdict(name, "", 0.0, PLACE.words, "")) for name in TIMED}
    add_to_table("proved.json", verdicts)
    monkeypatch.setattr(kernels, "KERNELS", TIMED)
    monkeypatch.setattr(Place, "of", lambda device: PLACE)
    monkeypatch.setattr(timing, "_pays", {})
    times = itertools.cycle([1.0, 2.0] if request.param else [2.0, 1.0])

    def seconds(call, device, launch):
        call()
        return next(times)

    monkeypatch.setattr(timing, "seconds", seconds)
    return request.param


@pytest.fixture
def calls(monkeypatch):
    """How often a native function ran, by name."""
    found = {}
    for name in ("linear_4bit", "grouped_delta", "ssd", "ssd_backward"):
        found[name] = Mock(side_effect=getattr(kernels.native.cuda, name))
        monkeypatch.setattr(kernels.native.cuda, name, found[name])
    return lambda name: found[name].call_count


@emulated
def test_both_ways_give_the_product(race, calls):
    q, x, bias = ops.quantize_4bit(torch.randn(24, 128)), torch.randn(3, 128), torch.randn(24)
    for _ in range(2):
        torch.testing.assert_close(ops.linear_4bit(x, q, bias), x @ q.dequantize().t() + bias)
    assert calls("linear_4bit") == 7 + 2 * race


@emulated
def test_what_is_added_in_place_is_timed_on_copies(race, calls):
    a, b = torch.randn(4, 128), torch.randn(24, 4)
    x, index = torch.randn(2, 20, 128), torch.tensor([0, -1])
    y = ops.grouped_delta_linear(x, torch.zeros(24, 128), [ops.LowRankDelta(a, b)], index)
    torch.testing.assert_close(y, torch.stack([x[0] @ a.t() @ b.t(), torch.zeros(20, 24)]), rtol=1e-4, atol=1e-4)
    assert calls("grouped_delta") == 7 + race
    few = ops.grouped_delta_linear(x[:, :1], torch.zeros(24, 128), [ops.LowRankDelta(a, b)], index)
    torch.testing.assert_close(few, y[:, :1], rtol=1e-4, atol=1e-4)
    assert calls("grouped_delta") == 8 + race  # decoding is native


@emulated
def test_forward_and_backward_of_a_scan_choose_for_themselves(race, calls):
    shapes = ((1, 70, 2, 5), (1, 70, 2), (2,), (1, 70, 1, 6), (1, 70, 1, 6), (2,))
    x, dt, a, b, c, d = (torch.randn(shape) for shape in shapes)
    grads = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in (x, dt, -a.exp(), b, c, d)]
        y = ops.mamba_chunk_scan(*leaves[:5], 64, leaves[5], dt_softplus=True)
        grads.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for ours, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-4, atol=1e-4)
    assert calls("ssd") == 7 + race
    assert calls("ssd_backward") == 7 + race
