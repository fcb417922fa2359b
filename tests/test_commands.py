"""The commands as a whole: their help, what they list, and what a plain install of the package can run."""

import json
import shlex
import subprocess
import sys
from unittest.mock import Mock

import click

import deftcore
from deftcore.cli.main import app, main
from deftcore.cli.shared import Listed
from deftcore.models.families import FAMILIES, describe
from deftcore.training.registry import all_methods, all_tasks, uses


def test_help(capsys):
    """Every command says what it does, the default of each option, and shows an example that parses."""
    for name, command in app.commands.items():
        assert main([name, "--help"]) == 0
        text = capsys.readouterr().out
        examples = [shlex.split(line) for line in text.splitlines() if line.startswith("    deftcore ")]
        assert len(examples) == 1
        assert examples[0][:2] == ["deftcore", name]
        with command.make_context(name, examples[0][2:], parent=click.Context(app)):
            pass
        for option in command.params:
            if isinstance(option, click.Option):
                assert option.help, (name, option.name)
                assert option.is_flag or "default" in option.get_help_extra(click.Context(command, show_default=True))
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"deftcore {deftcore.__version__}\n"


def test_lists_of_methods_and_models(capsys):
    """Every method that a recipe can name, and every architecture of the table."""
    assert main(["methods", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    assert [entry["name"] for entry in found["methods"]] == [method.name for method in all_methods()]
    assert [entry["name"] for entry in found["tasks"]] == [task.name for task in all_tasks()]
    for entry in [*found["methods"], *found["sections"], *found["tasks"]]:
        assert f"  {entry['name']} " in text
        assert entry["summary"] in text
    assert main(["info", "--models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [kind for line in lines if not line.startswith("  ") for kind in line.split(", ")] == list(FAMILIES)
    assert r"  adapter targets: .*\.layer\.\d+\.output\.dense" in lines
    assert "  MLP: gate gate_proj, up up_proj, down down_proj, act act_fn" in lines
    assert main(["info", "--models", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == describe(uses())


def test_spaces_in_lists():
    assert Listed(click.Choice(["bf16", "fp16"])).convert("bf16, fp16", None, None) == ["bf16", "fp16"]
    assert Listed(int).convert(" 0,10 ,100, ", None, None) == [0, 10, 100]


def test_a_module_of_another_package_is_not_in_the_extra(capsys, monkeypatch):
    for name, hint in (
        ("peft.tuners", "needs peft: pip install 'deftcore[train]'"),
        ("other", "No module named 'other'"),
    ):
        error = ModuleNotFoundError(f"No module named {name!r}", name=name)
        monkeypatch.setattr(app.commands["info"], "callback", Mock(side_effect=error))
        assert main(["info"]) == 2
        assert capsys.readouterr().err == f"deftcore: {hint}\n"


def test_a_plain_install_has_help_and_info():
    """Nothing beyond the core dependencies is imported; what needs more says what to install."""
    script = """
import sys
extra = "accelerate matplotlib peft pydantic yaml rich safetensors tokenizers transformers".split()
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in extra:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
from deftcore.cli import main
assert main(["--help"]) == 0
assert "torch" not in sys.modules and "numpy" not in sys.modules
assert main(["info"]) == 0
assert main(["train", "--help"]) == 0
assert main(["train", "deft-lora"]) == 2
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "cpu_isa: " in done.stdout
    assert done.stderr.splitlines()[-1].endswith(": pip install 'deftcore[train]'")
