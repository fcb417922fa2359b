"""Adapters written as plain LoRA are anybody's: PEFT gives their logits in a process that cannot have deftcore."""

import subprocess
import sys

import peft
import pytest
import torch
from conftest import tiny_batch, tiny_model
from test_package import save_base

import deftcore
from deftcore.cli.main import main
from deftcore.methods.kasa.interchange import save_peft_kasa
from deftcore.methods.lora.exporting import export_lora
from deftcore.models.checkpoints import load_model
from deftcore.training.adapters import load_adapter

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}  # Linear, Conv1D
CONFIGS = {"kasa": deftcore.KasaFactoredConfig, "ba-lora": deftcore.BaLoraConfig}
ELSEWHERE = """
import sys, warnings
class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "deftcore":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NotInstalled())
import peft, torch, transformers
warnings.simplefilter("error", UserWarning)  # PEFT warns of keys that do not fit
ids = torch.load(sys.argv[1] + "/ids.pt")
for name in sys.argv[2:]:
    base = transformers.AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{name}/base").eval()
    model = peft.PeftModel.from_pretrained(base, f"{sys.argv[1]}/{name}/lora").eval()
    with torch.no_grad():
        found = [model(input_ids=ids).logits, model.merge_and_unload()(input_ids=ids).logits]
    torch.save(found, f"{sys.argv[1]}/{name}/logits.pt")
assert "deftcore" not in sys.modules
"""


def adapted(family, config):
    """One that has been trained a little."""
    options = {"r": 3, "lora_alpha": 6, "target_modules": TARGETS[family], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(tiny_model(family), config(**options))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(3):
        model(**tiny_batch(family)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_plain_peft_gives_the_same_logits(tmp_path):
    ids = tiny_batch("llama")["input_ids"]
    torch.save(ids, tmp_path / "ids.pt")
    expected = {}
    for family in TARGETS:
        for kind, config in CONFIGS.items():
            name = f"{family}-{kind}"
            tiny_model(family).save_pretrained(tmp_path / name / "base")
            model = adapted(family, config)
            deftcore.export_lora(model, tmp_path / name / "lora")
            with torch.no_grad():
                expected[name] = model(input_ids=ids).logits
                with model.disable_adapter():
                    assert (expected[name] - model(input_ids=ids).logits).abs().max() > 1e-2, "nothing was trained"
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path), *expected]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, ours in expected.items():
        for theirs in torch.load(tmp_path / name / "logits.pt"):
            torch.testing.assert_close(
                theirs, ours, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("method", ["kasa", "qba-lora"])
def test_the_command(tmp_path, capsys, method):
    """From a run's folder; over a base in 4 bits the factors are those beside its decoded weights."""
    base, run, out = (tmp_path / name for name in ("base", "run", "out"))
    base.mkdir()
    save_base(base)
    (tmp_path / "r.yaml").write_text(
        f"{{model: {base}, output: {run}, method: {method}, data: {{train: {base / 'data.txt'}, max_length: 16}}, "
        "adapter: {r: 2, target_modules: [q_proj, v_proj]}, training: {max_steps: 2, batch_size: 2}}"
    )
    assert main(["train", str(tmp_path / "r.yaml")]) == 0
    packed = ["--quantize", "nf4"] if method == "qba-lora" else []
    command = ["export", str(base), str(out), "--lora", "--adapter", str(run / "final"), *packed]
    assert main([*command, "--skip", "model.layers.0.mlp"]) == 2
    assert "skip: is not for --lora" in capsys.readouterr().err
    assert main(["export", str(base), str(out), "--lora"]) == 2
    assert "adapter: must be a folder with an adapter" in capsys.readouterr().err
    assert not out.exists()
    assert main([*command, "--json"]) == 0
    assert '"rank": 4' in capsys.readouterr().out
    options = {"quantize": {"quant_type": "nf4"}} if packed else {}
    ours, theirs = load_adapter(load_model(base, **options), run / "final"), load_model(base, **options)
    theirs = peft.PeftModel.from_pretrained(theirs, out)
    ids = tiny_batch("llama")["input_ids"]
    with torch.no_grad():
        expected, found = (each.eval()(input_ids=ids).logits for each in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("write", [export_lora, save_peft_kasa])
def test_a_folder_of_something_else_is_left_alone(tmp_path, write):
    (tmp_path / "thesis.txt").write_text("...")
    with pytest.raises(FileExistsError, match="holds something else"):
        write(adapted("llama", deftcore.KasaFactoredConfig), tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["thesis.txt"]
