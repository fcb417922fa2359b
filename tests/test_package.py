"""The house: layers, instruction sets, the OpenMP runtime, the command line, doctests."""

import doctest
import io
import json
import os
import re
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from rich.console import Console

import deftcore
from deftcore import _versions
from deftcore._versions import TESTED
from deftcore.cli.main import main
from deftcore.models.checkpoints import load_model
from deftcore.ops.kernels import native
from deftcore.training.wrapping import add_adapter

TESTS = Path(__file__).parent


def run_python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, cwd="/", timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_ops_need_pytorch_alone():
    extras = ("transformers", "peft", "accelerate")
    code = f"import sys, deftcore.ops, deftcore.nn; print([m for m in {extras} if m in sys.modules])"
    assert run_python(code) == "[]"


def test_one_openmp_runtime():
    """After import exactly one libgomp is mapped, and thread counts are PyTorch's."""
    code = (
        "import torch, deftcore.ops as ops\n"
        "ops.sparse_down(torch.ones(1, 4096), torch.ones(4096, 512), path='sparse')\n"
        "names = {line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line or 'iomp' in line}\n"
        "print(len(names))"
    )
    assert run_python(code) == "1"


def test_alternating_with_pytorch_costs_nothing():
    """One pool of threads: a loop over both libraries takes about the sum of its parts (2x allows for noise)."""
    a, w = torch.ones(1, 2048), torch.ones(2048, 1024)
    x = torch.ones(256, 256)

    def median(*parts):
        times = []
        for _ in range(30):
            start = time.perf_counter()
            for part in parts:
                part()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    ours, theirs = lambda: deftcore.ops.sparse_down(a, w, path="sparse"), lambda: x @ x
    median(ours, theirs)
    assert median(ours, theirs) < 2 * (median(ours) + median(theirs)) + 1e-4


KERNEL_TESTS = (
    "density",
    "sparse_mlp",
    "quant4",
    "quant4_int8",
    "sparse_mlp4",
    "partial_linear",
    "grouped_delta",
    "masks",
    "ssm",
    "ssd",
    "conv1d",
    "mamba",
    "logits",
    "extremes",
    "galore_step",
    "decoder",
    "decoder_forms",
)


@pytest.mark.slow
@pytest.mark.parametrize("isa", native.isa_available().split())
def test_kernels_on_every_isa(isa):
    """The kernel tests again, in a process held to one instruction set."""
    if isa == native.isa_name():
        pytest.skip("this process runs it")
    files = [str(TESTS / f"test_{name}.py") for name in KERNEL_TESTS]
    chosen = "not fuzz and not compile and not opcheck and not aliases and not dropout"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *files],
        env=os.environ | {"DEFTCORE_CPU_ISA": isa}, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]


def test_kernels_leave_threads_to_one_place():
    """A kernel that asks OpenMP itself can size its buffers by one number and split its work by another."""
    sources = [p for p in (TESTS.parent / "csrc" / "cpu").iterdir() if p.name != "threads.h"]
    assert len(sources) > 10
    assert [p.name for p in sources if "omp_" in p.read_text() or "pragma omp" in p.read_text()] == []


def test_unknown_isa_is_refused():
    code = "import torch, deftcore.ops as ops\ntry: ops.density(torch.ones(2, 2))\nexcept ValueError as e: print(e)"
    assert "DEFTCORE_CPU_ISA: this machine has scalar" in run_python(code, DEFTCORE_CPU_ISA="neon")


@pytest.mark.parametrize(
    "name",
    [
        "density",
        "gated_linear",
        "grouped_delta",
        "logits",
        "lora",
        "masks",
        "partial_linear",
        "quant4",
        "sparse_down",
        "sparse_mlp",
        "ssm",
        "ssm.conv1d",
        "ssm.lyapunov",
        "ssm.scan",
        "ssm.ssd",
    ],
)
def test_docstring_examples(name):
    result = doctest.testmod(sys.modules[f"deftcore.ops.{name}"], extraglobs={"torch": torch})
    assert result.attempted > 0
    assert result.failed == 0


def test_kernels_are_named_as_they_are_asked_for():
    from deftcore.ops.kernels import CPU_ONLY, KERNELS

    asked = set()
    for path in Path(deftcore.__file__).parent.rglob("*.py"):
        asked |= set(re.findall(r'backend\("(\w+)"', path.read_text()))
    assert asked == {*KERNELS, *CPU_ONLY}


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = deftcore.nothing
    assert deftcore.sparsify is not None


# ---------------------------------------------------------------------------- command line


def test_versions_agree_with_pyproject():
    """One table: pyproject's ranges are its ranges, and their lower ends are what is tested (torch's is read only)."""
    project = (TESTS.parent / "pyproject.toml").read_text()
    for name, tested in TESTED.items():
        assert re.findall(rf'"{name}([<>=][^";]*)', project) == [tested.allowed], name
        lowest = re.match(r"[>=]=([0-9.]+)", tested.allowed)[1]
        assert name == "torch" or tested.oldest.startswith(lowest), name
    done = subprocess.run([sys.executable, _versions.__file__], capture_output=True, text=True, timeout=60)
    assert f"transformers=={TESTED['transformers'].oldest} peft=={TESTED['peft'].oldest}" in done.stdout


@pytest.mark.parametrize(
    ("versions", "says"),
    [
        ({"transformers": "5.24.9", "peft": "0.21.0"}, ""),
        ({"transformers": "5.25.0.dev0", "peft": "0.22.1"}, "peft 0.22.1 is newer than .*; transformers 5.25.0.dev0"),
        ({"transformers": "6.0"}, "transformers 6.0 is newer"),
        ({"transformers": "5.9.1", "peft": ""}, "transformers 5.9.1 is older than 5.15"),
    ],
)
def test_a_release_beyond_the_tested_ends_warns_once(versions, says, monkeypatch):
    monkeypatch.setattr(_versions, "_warned", set())
    monkeypatch.setattr(_versions, "installed", lambda name: versions.get(name, ""))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            _versions.warn_untested("transformers", "peft")
    assert len(seen) == bool(says)
    assert not says or re.search(says, str(seen[0].message))


def test_info(capsys):
    assert main(["info", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["cpu_isa"] in result["cpu_isa_available"]
    assert result["kernels"]["sparse_down"]["cpu"] == "on"
    assert result["versions"]["torch"].startswith(f"{torch.__version__} (tested: {TESTED['torch'].oldest}")
    assert main(["info"]) == 0
    assert "cpu_isa" in capsys.readouterr().out


def test_bench(capsys):
    assert main(["bench", "--shape", "64x96", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)["break_even"]
    assert set(table) == {"1", "2", "4", "8", "16", "32", "64"}


def save_base(folder, model=None, **sizes):
    """A small model (a Llama where none is given), a tokenizer and a text."""
    from conftest import tiny_model

    from deftcore.cli.quickstart.base_model import make_tokenizer

    text = "the quick brown fox jumps over the lazy dog. " * 40
    tokenizer = make_tokenizer(text, 300)
    model = tiny_model("llama") if model is None else model
    if sizes:
        model.config.update(sizes)
        model = type(model)(model.config)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "data.txt").write_text(text)


def train_on_disk(recipe, tmp_path, capsys, **sizes):
    """Four steps of a recipe on a small model into tmp_path/run: the model's folder, and what was printed."""
    base = tmp_path / "base"
    base.mkdir()
    save_base(base, **sizes)
    capsys.readouterr()
    overrides = [f"model={base}", f"data.train={base / 'data.txt'}", f"data.validation={base / 'data.txt'}",
                 f"output={tmp_path / 'run'}", "training.max_steps=4", "data.max_length=16"]  # fmt: skip
    assert main(["train", recipe, *overrides, "--json"]) == 0
    return base, json.loads(capsys.readouterr().out)


def test_train_export_density(tmp_path, capsys):
    """The path of a user's own model: train from a recipe, export, measure, load."""
    base, result = train_on_disk("deft-lora", tmp_path, capsys)
    assert result["steps"] == 4
    final = str(tmp_path / "run" / "final")
    assert main(["density", str(base), str(base / "data.txt"), "--adapter", final, "--max-length", "16", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["density"] == pytest.approx(result["density"], abs=0.02)
    assert main(["export", str(base), str(tmp_path / "out"), "--adapter", final]) == 0
    model = deftcore.load_sparse(tmp_path / "out")
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    assert main(["export", str(base), str(tmp_path / "out"), "--adapter", final]) == 2
    (tmp_path / "run" / "final" / "adapter_model.safetensors").write_bytes(b"damaged")
    assert main(["export", str(base), str(tmp_path / "out2"), "--adapter", final]) == 2
    assert not (tmp_path / "out2").exists()


def test_train_export_density_4bit(tmp_path, capsys):
    """The same with QLoRA: the 4-bit model and its adapter go out unmerged, or merged into 16 bits."""
    base, result = train_on_disk("deft-qlora", tmp_path, capsys, intermediate_size=128)
    final, data = str(tmp_path / "run" / "final"), str(base / "data.txt")
    arguments = ["--adapter", final, "--quantize", "nf4", "--json"]
    assert main(["density", str(base), data, "--max-length", "16", *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["loss"] == pytest.approx(result["eval_loss"], rel=0.02)
    assert main(["export", str(base), str(tmp_path / "out"), "--skip", "model.layers.1.mlp", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["unmerged_adapter"]
    assert main(["export", str(base), str(tmp_path / "unmerged"), *arguments]) == 0
    assert main(["export", str(base), str(tmp_path / "merged"), "--merge", "16bit", *arguments]) == 0
    ids = torch.tensor([[1, 2, 3]])
    unmerged, merged = (deftcore.load_sparse(tmp_path / name) for name in ("unmerged", "merged"))
    kinds = [type(m).__name__ for m in unmerged.modules()]
    assert kinds.count("SparseMLP4bit") == 2
    assert kinds.count("FusedLoraLinear") == 8  # q, k, v, o
    torch.testing.assert_close(unmerged(ids).logits, merged(ids).logits, rtol=1e-3, atol=1e-4)
    skipped = deftcore.load_sparse(tmp_path / "out")
    assert [block.kind for block in skipped.deftcore_blocks] == ["gated", "skipped"]
    assert skipped(ids).logits.isfinite().all()
    assert main(["export", str(base), str(tmp_path / "x"), "--merge", "4bit"]) == 2


@pytest.mark.parametrize(("family", "precision"), [("mamba", "bf16"), ("falcon_mamba", "fp16"), ("mamba2", "no")])
def test_train_mamba(tmp_path, capsys, family, precision):
    """LoRA on a Mamba's buffers from the shipped recipe; the adapter loads; DEFT is refused."""
    import peft
    from test_mamba import model_of

    save_base(tmp_path, model_of(family))
    capsys.readouterr()
    overrides = [f"model={tmp_path}", f"data.train={tmp_path / 'data.txt'}", f"data.validation={tmp_path / 'data.txt'}",
                 f"output={tmp_path / 'run'}", "training.max_steps=6", "data.max_length=16", "training.log_every=1",
                 f"training.mixed_precision={precision}", "training.learning_rate=1e-2"]  # fmt: skip
    assert main(["train", "mamba-lora", *overrides, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert result["eval_loss"] < next(entry["loss"] for entry in log if "loss" in entry)
    from deftcore.models.checkpoints import load_model

    model = peft.PeftModel.from_pretrained(load_model(str(tmp_path)), tmp_path / "run" / "final")
    ids = torch.tensor([[1, 2, 3]])
    before = model(ids).logits
    torch.testing.assert_close(deftcore.patch(model)(ids).logits, before, rtol=1e-3, atol=1e-4)
    assert main(["train", "mamba-lora", *overrides, "deft=true", f"output={tmp_path / 'other'}"]) == 2
    assert "not defined for Mamba" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["s2ft", "qs2ft"])
def test_train_export_s2ft(tmp_path, capsys, method):
    """S2FT from a recipe, selected by activations, with the density loss; exported un-permuted."""
    base = tmp_path / "base"
    base.mkdir()
    save_base(base, intermediate_size=128)
    capsys.readouterr()
    overrides = [f"model={base}", f"data.train={base / 'data.txt'}", f"data.validation={base / 'data.txt'}",
                 f"output={tmp_path / 'run'}", "training.max_steps=4", "data.max_length=16", f"method={method}",
                 "adapter.channel_ratio=0.1", "deft=true"]  # fmt: skip
    assert main(["train", "s2ft", *overrides, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    final, data = str(tmp_path / "run" / "final"), str(base / "data.txt")
    arguments = ["--adapter", final, "--json", *(["--quantize", "nf4"] if method == "qs2ft" else [])]
    assert main(["density", str(base), data, "--max-length", "16", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(result["eval_loss"], rel=0.02)
    assert main(["export", str(base), str(tmp_path / "out"), *arguments]) == 0
    assert not json.loads(capsys.readouterr().out)["unmerged_adapter"]
    assert deftcore.load_sparse(tmp_path / "out")(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    with pytest.raises(ValueError, match="batches: strategy"):
        add_adapter(load_model(base), "s2ft", {"strategy": "activation"})


def lines_of_example(name):
    """What a file of examples/ prints."""
    example = Path(__file__).parents[1] / "examples" / name
    done = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_serving_example():
    """The example serves two adapters in one batch: each row repeats what its adapter has learned."""
    lines = dict(line.split(":", 1) for line in lines_of_example("serve_mixed_batch.py"))
    assert lines["sevens"].endswith("-> [7, 7, 7, 7, 7, 7, 7, 7]")
    assert lines["nines"].endswith("-> [9, 9, 9, 9, 9, 9, 9, 9]")


def test_spectral_example():
    """KaSA and BA-LoRA learn under the Trainer, and are the same model as plain LoRA."""
    lines = [line for line in lines_of_example("spectral_adapters.py") if "as plain LoRA" in line]
    assert [line.split(":")[0] for line in lines] == ["KaSA", "BA-LoRA"]
    for line in lines:
        assert "after 29 comes 30" in line
        assert float(line.rsplit(maxsplit=1)[1]) < 1e-4


QUICKSTART = {
    "vocab_size": 400, "hidden_size": 48, "intermediate_size": 256, "max_length": 32, "batch_size": 4, "base_steps": 4,
    "tune_steps": 3, "base_characters": 300_000, "base_validation": 8, "validation": 8, "new_tokens": 6, "prompts": 1,
    "rounds": 1,
}  # fmt: skip


def test_quickstart_small(tmp_path):
    """The whole quickstart at a size for tests."""
    from deftcore.cli.quickstart.base_model import Settings, base_model
    from deftcore.cli.quickstart.showcase import run

    settings = Settings(**QUICKSTART)
    report = run(tmp_path, settings)
    assert report["runs"]["LoRA + DEFT"]["same_tokens"]
    assert (tmp_path / "quickstart.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "report.json").read_text())["density_ratio"] == report["density_ratio"]
    assert (tmp_path / "lora-deft" / "final" / "adapter_model.safetensors").exists()
    assert report["runs"]["LoRA + DEFT"]["same_tokens_as_transformers"]
    assert not report["runs"]["LoRA + DEFT"]["not_native"]
    assert not report["remark"]
    assert report["base"]["n_grams"]["order"] == 5
    assert 0 < report["n_grams"]["bits_per_byte"] < 8
    assert report["samples"].keys() == {"prompt", *report["runs"]}
    again = base_model(settings, 0, Console(stderr=True))
    assert again.cached, "the base model would be trained again"
    assert again.learnt.items() <= report["base"].items()


def test_quickstart_of_a_given_model(tmp_path):
    """With its own activation, which it says hardly ever is 0, and with ReLU."""
    from conftest import tiny_model

    from deftcore.cli.quickstart.base_model import Settings
    from deftcore.cli.quickstart.report import show
    from deftcore.cli.quickstart.showcase import run

    (tmp_path / "base").mkdir()
    save_base(tmp_path / "base", tiny_model("llama", "silu"))
    settings = Settings(**QUICKSTART | {"base_steps": 0, "tune_steps": 2, "max_length": 16})
    for activation, density in (("", (0.9, 1.0)), ("relu", (0.0, 0.8))):
        report = run(tmp_path / "out", settings, model=str(tmp_path / "base"), activation=activation)
        assert density[0] < report["runs"]["base"]["density"] <= density[1]
        assert bool(report["remark"]) == (not activation)
        assert report["runs"]["LoRA + DEFT"]["same_tokens_as_transformers"]
        printed = io.StringIO()
        show(report, Console(file=printed, width=150))
        assert ("silu" in printed.getvalue()) == (not activation)
        assert "The model takes" in printed.getvalue()


@pytest.mark.slow
def test_quickstart_in_4_bits(tmp_path):
    """Peaks are measured in four processes."""
    from deftcore.cli.quickstart.base_model import Settings
    from deftcore.cli.quickstart.showcase import run

    four_bit = run(tmp_path, Settings(**QUICKSTART), quantize="nf4")["four_bit"]
    rows = four_bit["rows"]
    assert {"float32", "4-bit dense", "4-bit sparse"} == rows.keys()
    assert rows["4-bit sparse"]["disk_mb"] < rows["float32"]["disk_mb"]
    assert four_bit["same_tokens"]
