"""The command line's mistakes: one line that names the option or field, before any weights are read; and devices."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import tiny_model
from point_clouds import tiny_mae
from safetensors.torch import load_file
from test_package import save_base

import deftcore
from deftcore.cli import generation
from deftcore.cli.main import main
from deftcore.cli.quickstart import real_model, showcase
from deftcore.methods.deft import export, measure
from deftcore.methods.mamba import stability
from deftcore.training import text
from deftcore.training.device import choose_device

TRAIN = ["train", "r.yaml"]
DENSITY = ["density", "base", "base/data.txt"]
SPARSIFY = ["sparsify", "base", "--data", "base/data.txt", "-o", "out"]
EXPORT = ["export", "base", "out"]
GENERATE = ["generate", "base", "hello"]
LYAPUNOV = ["lyapunov", "mamba", "base/data.txt"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with models, data, a recipe, and things that are in the way."""
    from test_mamba import model_of

    root = tmp_path_factory.mktemp("place")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "ffn_dim": 72, "num_attention_heads": 4}
    config = transformers.OPTConfig(vocab_size=64, word_embed_proj_dim=32, max_position_embeddings=20, **sizes)
    short = transformers.OPTForCausalLM(config)
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4))
    models = {"base": None, "gpt2": tiny_model("gpt2"), "bloom": bloom, "mamba": model_of("mamba"), "short": short}
    for name, model in models.items():
        (root / name).mkdir()
        save_base(root / name, model, **({"intermediate_size": 128} if name == "base" else {}))
    (root / "file").write_text("x")
    (root / "empty.txt").write_text("")
    (root / "full").mkdir()
    (root / "full" / "x").write_text("x")
    tiny_mae().save_pretrained(root / "clouds")
    (root / "earlier" / "final").mkdir(parents=True)  # what two runs left
    for name in ("adapter_config.json", "config.json"):
        (root / "earlier" / "final" / name).write_text("{}")
    (root / "r.yaml").write_text(
        "{model: base, output: run, data: {train: base/data.txt, max_length: 16}, adapter: {r: 4}, "
        "training: {max_steps: 2}}"
    )
    return root


MISTAKES = [
    ([*TRAIN, "adapter.rr=3"], "adapter.rr: unknown; did you mean r"),
    ([*TRAIN, "adapter.target_modules=[q_proj"], "adapter.target_modules: '[q_proj' is not YAML"),
    ([*TRAIN, "adapter.target_modules=[q_proj, nope]"], "adapter.target_modules: no module named 'nope'; known: "),
    ([*TRAIN, "adapter.target_modules=[q_prj]"], "no module named 'q_prj'; did you mean q_proj"),
    (
        [*TRAIN, "adapter.target_modules=.*q_prj"],
        "no module fits '.*q_prj', a regular expression over whole names; did you mean [q_proj]",
    ),
    (
        [*TRAIN, "adapter.target_modules=q_proj"],
        "no module fits 'q_proj', a regular expression over whole names; did you mean [q_proj]?",
    ),
    ([*TRAIN, "adapter.target_modules=(q_proj"], "adapter.target_modules: '(q_proj' is no regular expression: missing"),
    (
        [*TRAIN, "adapter.modules_to_save=[lm_hed]"],
        "adapter.modules_to_save: no module named 'lm_hed'; did you mean lm",
    ),
    ([*TRAIN, "adapter.r=0"], "adapter.r: must be at least 1, got 0"),
    ([*TRAIN, "adapter.lora_dropout=3"], "adapter.lora_dropout: must be at most 1, got 3"),
    ([*TRAIN, "training.max_steps=.inf"], "training.max_steps: must be a finite number, got inf"),
    ([*TRAIN, "training.learning_rate=.nan"], "training.learning_rate: must be a finite number, got nan"),
    ([*TRAIN, "model=bse"], "model: no such folder: bse"),
    ([*TRAIN, "model=./bse"], "model: no such folder: ./bse"),
    ([*TRAIN, "model=a/b/c"], "model: no such folder: a/b/c"),
    ([*TRAIN, "model=bse/"], "model: no such folder: bse/"),
    ([*TRAIN, "model=file"], "model: must be a folder or a GGUF file, file is neither"),
    ([*TRAIN, "model=full"], "model: full is no Transformers folder, it has no config.json"),
    ([*TRAIN, "data.train=nope.txt"], "data.train: no such file: nope.txt"),
    (
        [*TRAIN, "data.train=full", "data.validation=no"],
        "data.train: must be a file, full is a folder; data.validation",
    ),
    ([*TRAIN, "data.train=empty.txt"], "data.train: empty.txt is empty"),
    ([*TRAIN, "data.validation=empty.txt"], "data.validation: empty.txt is empty"),
    ([*TRAIN, "output=file"], "output: must be a folder to write to"),
    ([*TRAIN, "output=file/x"], "output: must be a folder to write to"),
    ([*TRAIN, "--device", "tpu"], "device (--device): must be auto or what this machine has (cpu"),
    ([*TRAIN, "method=qlora", "quantize.skip=[lm_hd]"], "quantize.skip: no module named 'lm_hd'; near: lm_head"),
    ([*TRAIN, "method=s2ft", "adapter={targets: [fc]}"], "adapter: targets: must be among o, down, v"),
    ([*TRAIN, "method=mamba-lora"], "MambaLoraConfig is for mamba, falcon_mamba, mamba2 models, got 'llama'"),
    (
        [*TRAIN, "method=s2ft", "adapter.lora_alpha=2"],
        "adapter: method s2ft does not take r, lora_alpha, which other methods do; adapter={...} replaces all",
    ),
    ([*TRAIN, "method=bottleneck", "adapter={target_modules: [mlpp]}"], "no module named 'mlpp'; did you mean mlp"),
    (
        [*TRAIN, "method=prefix", "adapter={num_virtual_tokens: 2}", "training.gradient_checkpointing=true"],
        "training.gradient_checkpointing: must be false with method prefix",
    ),
    ([*TRAIN, "model=bloom", "deft=true"], "deft: model: BloomForCausalLM has no MLP block of a known family"),
    (
        [*TRAIN, "model=short", "data.max_length=21"],
        "max_length: must be at most 20, the positions of model.decoder.emb",
    ),
    (
        ["density", "short", "base/data.txt"],
        "max_length: must be at most 20, the positions of model.decoder.embed_positi",
    ),
    (["train", "none.yaml"], "recipe: no such file: none.yaml"),
    (["train", "full"], "recipe: is a folder: full"),
    (["train"], "Missing argument 'RECIPE'. (see deftcore train --help)"),
    (["trian"], "No such command 'trian'. Did you mean 'train'? (see deftcore --help)"),
    ([], "Missing command. (see deftcore --help)"),
    ([*DENSITY, "--batch-size", "0"], "batch_size: must be at least 1, got 0"),
    ([*DENSITY, "--max-length", "0"], "max_length: must be at least 2, got 0"),
    ([*DENSITY, "--max-length", "nan"], "Invalid value for '--max-length': 'nan' is not a valid int"),
    ([*DENSITY, "--batch-size", "-1", "--max-length", "1"], "got 1; batch_size: must be at least 1, got -1"),
    ([*DENSITY, "--adapter", "full"], "adapter: must be the folder of an adapter, full has no adapter_config.json"),
    ([*DENSITY, "--adapter", "nope"], "adapter: no such folder: nope"),
    ([*DENSITY, "--quantize", "int8"], "Invalid value for '--quantize': 'int8' is not one of 'nf4', 'fp4'"),
    ([*DENSITY, "--device", ""], "device (--device): must be auto or what this machine has"),
    ([*DENSITY, "--bogus"], "No such option '--bogus'"),
    ([*DENSITY, "--adaptr", "x"], "No such option '--adaptr'. Did you mean '--adapter'?"),
    (["density", "bse", "base/data.txt"], "model: no such folder: bse"),
    (["density", "", "base/data.txt"], "model: is needed"),
    (["density", "clouds", "base/data.txt"], "model: must be a language model, clouds is one of the task points"),
    (["lyapunov", "clouds", "base/data.txt"], "model: must be a language model, clouds is one of the task points"),
    (["generate", "clouds", "hello"], "model: must be a language model, clouds is one of the task points"),
    (["density", "base", ""], "data: is needed"),
    (["density", "base", "full"], "data: must be a file, full is a folder"),
    (["density", "base", "empty.txt"], "data: empty.txt is empty"),
    ([*SPARSIFY, "--validation", "empty.txt"], "validation: empty.txt is empty"),
    (["export", "bse", "out"], "model: no such folder: bse"),
    (["export", "base", "full"], "output: must be a new folder, full exists and is not empty"),
    (["export", "base", "file"], "output: must be a folder to write to"),
    (["export", "base", "file/x"], "output: must be a folder to write to"),
    (["export", "base", ""], "output: is needed"),
    (["export", "bloom", "out"], "model: BloomForCausalLM has no MLP block of a known family"),
    ([*EXPORT, "--skip", "nope"], "skip: no MLP block named nope; the model has model.layers.0.mlp"),
    ([*EXPORT, "--merge", "4bit"], "merge: is for an adapter over a 4-bit base, there is no adapter, got '4bit'"),
    (
        [*EXPORT, "--merge", "4bit", "--adapter", "earlier/final"],
        "merge: is for a base in 4 bits, base needs quantize (--quantize nf4) too, got '4bit'",
    ),
    ([*EXPORT, "--adapter", "earlier"], "earlier has no adapter_config.json; did you mean earlier/final?"),
    (["density", "earlier", "base/data.txt"], "earlier is no Transformers folder, it has no config.json; did you mean"),
    ([*EXPORT, "--adapter", "nope"], "adapter: no such folder: nope"),
    ([*LYAPUNOV, "--steps", "-1"], "steps: must be at least 0, got -1"),
    ([*LYAPUNOV, "--steps"], "Option '--steps' requires an argument"),
    ([*LYAPUNOV, "--steps", ","], "steps: is needed"),
    ([*LYAPUNOV, "--steps", "1,x"], "Invalid value for '--steps': 'x' is not a valid integer"),
    ([*LYAPUNOV, "--precisions", "bf16,fp8"], "Invalid value for '--precisions': 'fp8' is not one of"),
    ([*LYAPUNOV, "--seeds", "0"], "seeds: must be at least 1, got 0"),
    ([*LYAPUNOV, "--learning-rate", "nan"], "learning_rate: must be a finite number, got nan"),
    ([*LYAPUNOV, "--learning-rate", "0"], "learning_rate: must be above 0, got 0.0"),
    ([*LYAPUNOV, "--against", "bse"], "model: no such folder: bse"),
    ([*LYAPUNOV, "--output", "file"], "output: must be a folder to write to"),
    (["lyapunov", "base", "base/data.txt"], "model: base is not a Mamba, Mamba-2 or FalconMamba model"),
    (["lyapunov", "mamba", "none.txt"], "data: no such file: none.txt"),
    (["bench", "--shape", "big"], "--shape: must be WIDTHxNEURONS"),
    (["bench", "--shape", "0x0"], "--shape: must be WIDTHxNEURONS, two whole numbers of at least 1, got '0x0'"),
    (["bench", "--shape", "4x-4"], "--shape: must be WIDTHxNEURONS"),
    (["bench", "--shape", ""], "--shape: must be WIDTHxNEURONS"),
    (["bench", "--dtype", "int8"], "Invalid value for '--dtype': 'int8' is not one of"),
    ([*GENERATE, "--max-new-tokens", "0"], "max_new_tokens: must be at least 1, got 0"),
    ([*GENERATE, "--temperature", "nan"], "temperature: must be a finite number, got nan"),
    ([*GENERATE, "--temperature", "-1"], "temperature: must be at least 0, got -1.0"),
    ([*GENERATE, "--top-p", "0", "--seed", "-1"], "seed: must be at least 0, got -1; top_p: must be above 0, got 0.0"),
    ([*GENERATE, "--adapter", "full"], "adapter: must be the folder of an adapter"),
    ([*GENERATE, "--device", "tpu"], "device (--device): must be auto or what this machine has"),
    ([*GENERATE, "--chat"], "chat: the tokenizer of base has no chat template"),
    (["generate", "bse", "hello"], "model: no such folder: bse"),
    (["generate"], "Missing argument 'MODEL'"),
    (["quickstart", "--seed", "-1"], "seed: must be at least 0, got -1"),
    (["quickstart", "--output", "file"], "output: must be a folder to write to"),
    (["quickstart", "--output", ""], "output: is needed"),
    (["quickstart", "--model", "bse"], "model: no such folder: bse"),
    (["quickstart", "--model", "file"], "model: must be a folder or a GGUF file, file is neither"),
    (["quickstart", "--model", "mamba"], "it is made of Mamba mixers and has no MLP"),
    (["quickstart", "--activation", "relu"], "activation: is for a given model (--model), got 'relu'"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_a_mistake_is_one_line_before_weights_are_read(place, monkeypatch, capsys, arguments, message):
    def no_weights(*_, **__):
        raise AssertionError("weights were read")

    for module in (text, measure, export, stability, generation):
        monkeypatch.setattr(module, "load_model", no_weights)
    monkeypatch.setattr(generation, "load_sparse", no_weights)
    monkeypatch.setattr(showcase, "base_model", no_weights)
    monkeypatch.setattr(real_model, "load_model", no_weights)
    monkeypatch.chdir(place)
    before = sorted(place.iterdir())
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert error.startswith("deftcore: ")
    assert "\n" not in error
    assert sorted(place.iterdir()) == before


def test_without_a_network_a_missing_model_is_one_line(place):
    """No retries, and no notices of other libraries on the way."""
    script = "import sys; from deftcore.cli.main import main; sys.exit(main(['density', 'bse', 'base/data.txt']))"
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=place, env=os.environ | nowhere, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("deftcore: model: no such folder: bse")


@pytest.mark.parametrize("arguments", [["methods"], ["info"], ["methods", "--help"], ["--help"]], ids=" ".join)
def test_nobody_reads_on(arguments):
    """As behind `| head -1`: no failure, and no word of it."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        command = [sys.executable, "-m", "deftcore", *arguments]
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=100, check=False)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_unwritable_output_is_refused(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setattr(
        os, "access", lambda path, mode: not os.fspath(path).endswith("full")
    )  # root may write anywhere
    assert main([*TRAIN, "output=full/run"]) == 2
    assert "output: must be a folder to write to, " in (error := capsys.readouterr().err)
    assert "full is not writable" in error


def test_train_gpt2_in_4_bits(place, tmp_path, monkeypatch, capsys):
    """Layers that store [in, out]; a family without a density report trains without one. The adapter serves."""
    monkeypatch.chdir(place)
    assert main([*TRAIN, "model=gpt2", "method=qlora", f"output={tmp_path}", "data.validation=base/data.txt"]) == 0
    printed = capsys.readouterr().out
    assert "eval_loss" in printed
    assert f"best checkpoint at {tmp_path}/best (step 2, loss " in printed
    assert printed.endswith(f"final: {tmp_path}/final\n")
    model = deftcore.load_quantized("gpt2")
    from deftcore.training.adapters import load_adapter

    adapted = deftcore.patch(load_adapter(model, tmp_path / "final"))
    assert adapted(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("model", "method", "precision"),
    [("base", "qlora", "no"), ("base", "full", "fp16"), ("base", "prompt", "bf16"), ("gpt2", "lora", "bf16")],
)
def test_train_16bit_checkpoints(place, tmp_path, monkeypatch, capsys, model, method, precision, dtype):
    """A run ends where that on the same weights in float32 ends, up to the precision's rounding; what is trained is
    float32."""
    base = transformers.AutoModelForCausalLM.from_pretrained(place / model, dtype=dtype)
    for name, stored in (("low", dtype), ("exact", torch.float32)):
        base.to(stored).save_pretrained(tmp_path / name)
        transformers.AutoTokenizer.from_pretrained(place / model).save_pretrained(tmp_path / name)
    monkeypatch.chdir(place)
    adapter = {
        "prompt": "{num_virtual_tokens: 2}",
        "prefix": "{num_virtual_tokens: 2}",
        "qs2ft": "{channel_ratio: 0.2}",
    }
    options = [f"method={method}", f"adapter={adapter.get(method, '{}')}", "training.learning_rate=1e-3"]
    options += ["training.log_every=1", "training.max_steps=3", f"training.mixed_precision={precision}"]
    losses = []
    for name in ("low", "exact"):
        assert main([*TRAIN, *options, f"model={tmp_path / name}", f"output={tmp_path / 'run' / name}"]) == 0
        log = (tmp_path / "run" / name / "log.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in log])
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=0.01 if torch.bfloat16 in (dtype, _autocast(precision)) else 2e-3)
    stored = load_file(next((tmp_path / "run" / "low" / "final").glob("*.safetensors")))
    assert {tensor.dtype for tensor in stored.values()} - {torch.int32} <= {torch.float32}


def _autocast(precision):
    return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def test_exports_are_what_they_say(place, tmp_path, monkeypatch, capsys):
    """An export with its adapter beside it is measured with it; one without its skipped blocks is not taken for a
    model whose blocks Transformers would make up."""
    monkeypatch.chdir(place)
    run, out, less = (str(tmp_path / name) for name in ("run", "out", "less"))
    options = ["method=qlora", "adapter={r: 4, init_lora_weights: false}", f"output={run}"]
    assert main([*TRAIN, *options]) == 0
    capsys.readouterr()
    export = ["export", "base", "--adapter", f"{run}/final"]
    assert main([*export, out, "--quantize", "nf4"]) == 0
    assert capsys.readouterr().out == f"{out}: 2 blocks, 0 skipped; adapter unmerged beside 4-bit weights\n"
    assert main([*export, f"{tmp_path}/dense", "--quantize", "nf4", "--merge", "16bit"]) == 0
    assert capsys.readouterr().out.endswith("; adapter merged into float32 weights\n")
    assert main(["export", "base", less, "--skip", "model.layers.1.mlp"]) == 0
    assert capsys.readouterr().out == f"{less}: 2 blocks, 1 skipped; float32 weights\n"
    found = []
    for arguments in (["base", "--adapter", f"{run}/final", "--quantize", "nf4"], [out], ["base", "--quantize", "nf4"]):
        assert main(["density", arguments[0], "base/data.txt", *arguments[1:], "--max-length", "16", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert found[0] != pytest.approx(found[2], rel=1e-4)
    assert main([*TRAIN, f"model={out}"]) == 2
    assert "has an unmerged adapter beside it" in capsys.readouterr().err
    for command in (["density", less, "base/data.txt"], ["export", less, f"{tmp_path}/again"]):
        assert main(command) == 2
        assert "lacks weights (an export without its skipped blocks" in capsys.readouterr().err
    assert deftcore.load_sparse(less)(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


# ---------------------------------------------------------------------------- devices


class Gpu:
    """A machine with an accelerator, as far as the choice goes."""

    def __init__(self, monkeypatch, kind="cuda", count=2):
        device = None if kind is None else torch.device(kind)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: device)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)


def test_choice_of_device(monkeypatch):
    Gpu(monkeypatch, None)
    assert choose_device() == choose_device("cpu") == choose_device("cpu:0") == torch.device("cpu")
    must = r"device \(--device\): must be"
    for wanted in ("cuda", "cuda:0", "meta", "gpu", ""):
        with pytest.raises(ValueError, match=rf"{must} auto or what this machine has \(cpu\), got '{wanted}'$"):
            choose_device(wanted)
    Gpu(monkeypatch, "mps", 1)
    assert choose_device() == choose_device("mps") == choose_device("mps:0") == torch.device("mps", 0)
    Gpu(monkeypatch)
    assert choose_device() == choose_device("cuda") == torch.device("cuda", 0)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert choose_device("cpu") == torch.device("cpu")
    for wanted in ("cuda:2", "cuda:x", "mps", "mps:0"):
        with pytest.raises(ValueError, match=rf"this machine has \(cpu, cuda:0, cuda:1\), got '{wanted}'$"):
            choose_device(wanted)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device() == choose_device("cuda") == choose_device("cuda:1") == torch.device("cuda", 1)
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match=rf"{must} cuda, each process takes its own, got 'cuda:0' in process 1 of a"):
        choose_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    for wanted in ("auto", "cuda"):
        with pytest.raises(ValueError, match=rf"\(cpu, cuda:0, cuda:1\), got '{wanted}' in process 2 of a launch"):
            choose_device(wanted)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert choose_device() == torch.device("cpu")


class Moved(Exception):
    """Where a model was moved to."""


@pytest.mark.parametrize(
    ("arguments", "device"),
    [
        (TRAIN, "cuda:0"),
        ([*TRAIN, "device=cpu"], "cpu"),
        ([*TRAIN, "device=cuda", "--device", "cpu"], "cpu"),
        (DENSITY, "cuda:0"),
        ([*DENSITY, "--device", "cpu"], "cpu"),
        (EXPORT, "cuda:0"),
        (LYAPUNOV, "cuda:0"),
        ([*TRAIN, "device=cpu", "--device", "cuda:1"], "cuda:1"),
        ([*TRAIN, "device=cuda:1"], "cuda:1"),
        ([*DENSITY, "--device", "cuda:1"], "cuda:1"),
        ([*EXPORT, "--device", "cuda:1"], "cuda:1"),
        ([*LYAPUNOV, "--device", "cuda:1"], "cuda:1"),
        (GENERATE, "cuda:0"),
        ([*GENERATE, "--device", "cuda:1"], "cuda:1"),
    ],
)
def test_every_task_uses_the_accelerator(place, monkeypatch, arguments, device):
    def to(self, where):
        raise Moved(str(where))

    Gpu(monkeypatch)
    monkeypatch.setattr(transformers.PreTrainedModel, "to", to)
    monkeypatch.chdir(place)
    with pytest.raises(Moved) as moved:
        main(arguments)
    assert str(moved.value) == device


@pytest.mark.cuda
def test_train_density_export_on_a_gpu(place, tmp_path, monkeypatch, capsys):
    """The same losses and densities as on the CPU, up to TF32 and the order of sums."""
    monkeypatch.chdir(place)
    found = {}
    for device in ("cpu", "auto"):
        for name in ("lora", "qlora", "s2ft"):
            run = tmp_path / f"{name}-{device}"
            adapter = "adapter={channel_ratio: 0.2, strategy: activation}" if name == "s2ft" else "adapter.r=4"
            options = [f"method={name}", adapter, f"output={run}", "data.validation=base/data.txt", "deft=true"]
            torch.cuda.reset_peak_memory_stats()
            assert main([*TRAIN, *options, "--device", device, "--json"]) == 0
            result = json.loads(capsys.readouterr().out)
            assert (torch.cuda.max_memory_allocated() > 100_000) == (device == "auto")
            quantize = ["--quantize", "nf4"] if name == "qlora" else []
            arguments = ["--adapter", str(run / "final"), *quantize, "--device", device, "--json"]
            assert main([*DENSITY, "--max-length", "16", *arguments]) == 0
            report = json.loads(capsys.readouterr().out)
            assert report["loss"] == pytest.approx(result["eval_loss"], rel=1e-3)
            found[name, device] = (result["eval_loss"], result["density"])
            assert main(["export", "base", str(run / "out"), *arguments]) == 0
            capsys.readouterr()
    for name in ("lora", "qlora"):
        assert found[name, "auto"] == pytest.approx(found[name, "cpu"], rel=0.02)
    output = ["--output", str(tmp_path / "lyapunov"), "--steps", "0,2", "--max-length", "16"]
    assert main([*LYAPUNOV, *output, "--precisions", "bf16,fp16"]) == 0
