"""The seam: what a method is given for one record, and that nothing else has to know it."""

import json
import random
import re
import shutil
import sys
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import pydantic
import pytest
import torch
import yaml
from conftest import Stopped
from label_task import LabelTask
from safetensors.torch import load_file, save_file
from test_package import save_base
from torch import nn

import deftcore
from deftcore.cli.main import main
from deftcore.models.checkpoints import load_model
from deftcore.training import Recipe, TextData, TrainingConfig, load_recipe, train
from deftcore.training.adapters import load_adapter
from deftcore.training.config import DataConfig
from deftcore.training.fields import OPTIONS, Positive
from deftcore.training.objective import Objective
from deftcore.training.recipe import complete
from deftcore.training.registry import (
    GROUP,
    Method,
    Section,
    Setup,
    all_methods,
    all_sections,
    all_tasks,
    find,
    load_rooms,
    register,
)
from deftcore.training.run import train_recipe
from deftcore.training.run_folder import RunFolder

PAGE = Path(__file__).parents[1] / "docs" / "add-a-method.md"


def tensors_in(folder):
    return {path.name: load_file(path) for path in Path(folder).glob("*.safetensors")}


def assert_same(a, b):
    assert a.keys() == b.keys() != set()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)


# ---------------------------------------------------------------------------- the method of the documentation


@pytest.fixture(scope="module")
def gain(tmp_path_factory):
    """The file that docs/add-a-method.md shows, as a package that is installed; and a base model beside it."""
    root = tmp_path_factory.mktemp("gain")
    code = re.search(r"^```py\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)[1]
    assert len(code.splitlines()) <= 60
    (root / "gain.py").write_text(code)
    (root / "gain-1.0.dist-info").mkdir()
    (root / "gain-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: gain\nVersion: 1.0\n")
    (root / "gain-1.0.dist-info" / "entry_points.txt").write_text(f"[{GROUP}]\ngain = gain\n")
    (root / "base").mkdir()
    save_base(root / "base", intermediate_size=128)
    (root / "r.yaml").write_text(
        yaml.safe_dump({
            "model": str(root / "base"), "output": "", "method": "gain", "adapter": {"start": 0.1},
            "data": {"train": str(root / "base" / "data.txt"), "max_length": 16},
            "training": {"max_steps": 4, "save_every": 2, "log_every": 1, "learning_rate": 1e-2},
        })
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(root)
        load_rooms.cache_clear()
        yield root
    load_rooms.cache_clear()


def test_a_method_of_another_package_is_listed(gain, capsys):
    assert main(["methods", "--json"]) == 0
    (found,) = [each for each in json.loads(capsys.readouterr().out)["methods"] if each["name"] == "gain"]
    assert found["summary"] == "A factor per output feature."
    assert main(["methods", "--help"]) == 0
    assert "List the methods" in capsys.readouterr().out


def test_it_trains_resumes_and_is_exported(gain, tmp_path, stopping, capsys):
    """From a recipe, by the commands alone."""
    whole, parts, out = (str(tmp_path / name) for name in ("whole", "parts", "out"))
    assert main(["train", str(gain / "r.yaml"), f"output={whole}"]) == 0
    stopping()
    with pytest.raises(Stopped):
        main(["train", str(gain / "r.yaml"), f"output={parts}"])
    assert main(["train", str(gain / "r.yaml"), f"output={parts}"]) == 0
    stored = tensors_in(f"{whole}/final")
    assert_same(stored, tensors_in(f"{parts}/final"))
    factors = torch.stack([*stored["adapter_model.safetensors"].values()])
    assert factors.shape == (2, load_model(gain / "base").config.hidden_size)
    assert (factors != 0.1).any()
    assert main(["train", str(gain / "r.yaml"), f"output={parts}", "adapter.start=0.2"]) == 2
    assert "adapter.start: 0.1 -> 0.2" in capsys.readouterr().err

    assert main(["export", str(gain / "base"), out, "--adapter", f"{whole}/final"]) == 0
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        adapted = load_adapter(load_model(gain / "base"), f"{whole}/final").eval()
        torch.testing.assert_close(deftcore.load_sparse(out)(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)
        base = load_model(gain / "base").eval()
        assert (adapted(ids).logits - base(ids).logits).abs().max() > 1e-3
    assert main(["density", out, str(gain / "base" / "data.txt"), "--max-length", "16"]) == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.strat=1", "adapter.strat: unknown; did you mean start"),
        ("adapter.start=much", "adapter.start: must be a number, got 'much'"),
        (
            "adapter.target_modules=[down_prj]",
            "adapter.target_modules: no module named 'down_prj'; did you mean down",
        ),
        ("method=gian", "method: no method 'gian'; did you mean gain"),
    ],
)
def test_its_mistakes_are_named(gain, tmp_path, capsys, override, message):
    assert main(["train", str(gain / "r.yaml"), f"output={tmp_path / 'x'}", override]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_run_is_another_one_with_other_options(gain, tmp_path, stopping, capsys):
    """A config that is not PEFT's counts as PEFT's does, and so does the kind of data."""
    train_it = ["train", str(gain / "r.yaml"), f"output={tmp_path / 'run'}"]
    stopping()
    with pytest.raises(Stopped):
        main(train_it)
    assert main([*train_it, "adapter.start=0.2"]) == 2
    assert "adapter.start: 0.1 -> 0.2" in capsys.readouterr().err
    found = json.loads((tmp_path / "run" / "run.json").read_text())["depends_on"]
    assert (found["task"], found["run_format"]) == ("text", 2)


def test_a_finished_run_of_an_older_version_is_finished(gain, tmp_path, caplog):
    train_it = ["train", str(gain / "r.yaml"), f"output={tmp_path / 'run'}", "training.max_steps=1"]
    assert main(train_it) == 0
    file = tmp_path / "run" / "run.json"
    found = json.loads(file.read_text())
    found["depends_on"] = {k: v for k, v in found["depends_on"].items() if k not in ("task", "run_format")}
    file.write_text(json.dumps(found))
    assert main(train_it) == 0
    assert "already finished" in caplog.text


def test_a_recipe_that_is_made_by_hand(gain, tmp_path):
    data, training = TextData(train=str(gain / "base" / "data.txt"), max_length=16), TrainingConfig(max_steps=1)
    options = {"model": str(gain / "base"), "method": "gain", "training": training}
    assert train_recipe(Recipe(**options, data=data, output=str(tmp_path / "run"))).steps == 1
    plain = Recipe(**options, data=DataConfig(train=data.train), output="x")
    assert complete(plain).data == TextData(train=data.train)


def test_objectives_of_one_name_are_refused():
    with pytest.raises(ValueError, match="objective: each must have a name of its own, got confidence, confidence"):
        train(nn.Linear(2, 2), [1], TrainingConfig(), "x", objective=[Confidence(0.1), Confidence(0.2)])


@pytest.fixture
def broken(gain, tmp_path, monkeypatch):
    """Packages whose methods cannot be used, beside one whose can."""
    (tmp_path / "greedy.py").write_text(
        "from deftcore.training.registry import Method, register\nregister(Method(name='lora', summary='Mine.'))\n"
    )
    (tmp_path / "needy.py").write_text("import needed_by_needy\n")
    for name in ("greedy", "needy", "absent"):
        (tmp_path / f"{name}-1.0.dist-info").mkdir()
        (tmp_path / f"{name}-1.0.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: 1.0\n")
        (tmp_path / f"{name}-1.0.dist-info" / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {name}\n")
    monkeypatch.syspath_prepend(tmp_path)
    load_rooms.cache_clear()
    yield
    load_rooms.cache_clear()


def test_a_method_that_cannot_be_used_is_left_out(broken, gain, capsys, caplog):
    assert main(["methods", "--json"]) == 0
    names = [each["name"] for each in json.loads(capsys.readouterr().out)["methods"]]
    assert {"lora", "gain"} <= set(names)
    assert names.count("lora") == 1
    for line in (
        "absent (absent) is left out: ModuleNotFoundError: No module named 'absent'",
        "greedy (greedy) is left out: ValueError: name: there is a method 'lora' already",
        "needy (needy) is left out: ModuleNotFoundError: No module named 'needed_by_needy'",
    ):
        assert sum(line in message for message in caplog.messages) == 1


def test_what_is_no_record_and_names_of_other_fields():
    for record in (Objective, DataConfig, "lora", None):
        with pytest.raises(TypeError, match="record: must be a Method, a Section or a subclass of Task, got "):
            register(record)
    for taken in (*(each.name for each in fields(Recipe)), "to_dict"):
        with pytest.raises(ValueError, match=f"name: every recipe has '{taken}' already"):
            register(Section(name=taken, summary="", config=CloudData, make=lambda model, config: None))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (lambda: Method(name="x", summary="s", config=int), "config: must be a dataclass, got <class 'int'>"),
        (lambda: Method(name=None, summary="s"), "record: its name and summary must be text, got None"),
        (lambda: Section(name="my-section", summary="s", config=HeadConfig, make=None), "'my-section' cannot be"),
    ],
)
def test_records_that_recipes_could_not_use(record, message):
    with pytest.raises((TypeError, ValueError), match=message):
        register(record())


def test_a_phase_needs_a_recipe():
    with pytest.raises(RuntimeError, match=r"phase: the method trains something .*; start it from a recipe"):
        Setup().phase(None, "warm", {})


def test_names_are_unique_and_near_ones_are_said(gain):
    with pytest.raises(ValueError, match="method: no method 'gian'; did you mean gain"):
        find("gian")
    with pytest.raises(ValueError, match="there is a method 'lora' already"):
        register(Method(name="lora", summary=""))
    for record in (*all_methods(), *all_sections()):
        assert record.summary.endswith(".")
        assert "\n" not in record.summary
        assert len(record.summary) < 100


def places(run):
    """The places of the package that training calls while `run` runs, up to the loop: each once while it lasts."""
    package, found = f"{Path(deftcore.__file__).parent}/", []

    @cache
    def place(file):
        parts = file.removeprefix(package).split("/") if file.startswith(package) else [""]
        return "loop" if parts[-1] == "loop.py" else "/".join(parts[: 2 if parts[0] == "methods" else 1])

    def watch(frame, event, _):
        here, caller = place(frame.f_code.co_filename) if event == "call" else "", frame.f_back
        if here != "loop" and not here.startswith(("models", "methods")):
            return
        while caller is not None and not place(caller.f_code.co_filename):  # decorators, PEFT
            caller = caller.f_back
        called = caller is not None and place(caller.f_code.co_filename) == "training"
        if called and "loop" not in found and found[-1:] != [here]:
            found.append(here)

    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize(("method", "adapter"), [("lora", "{r: 2}"), ("s2ft", "{channel_ratio: 0.2}")])
def test_a_recipe_goes_through_each_room_twice(gain, tmp_path, method, adapter):
    """Without weights, then with them; docs/architecture.md tells it."""
    words = [f"output={tmp_path}", f"method={method}", f"adapter={adapter}", "deft=true", "training.max_steps=1"]
    recipe = load_recipe(gain / "r.yaml", words)
    way = ["models", f"methods/{method}", "methods/deft"]
    assert places(lambda: train_recipe(recipe))[:7] == [*way, *way, "loop"]


# ---------------------------------------------------------------------------- another kind of data


class Cloud(nn.Module):
    """Classifies sets of points: an encoder, its maximum over points, a head."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, points):
        return self.head(self.encoder(points).relu().amax(1))

    def save_pretrained(self, folder):
        save_file({name: p.detach().contiguous() for name, p in self.state_dict().items()}, folder / "w.safetensors")


@pydantic.dataclasses.dataclass(frozen=True, config=OPTIONS)
class CloudData(DataConfig):
    scale: Positive = 1.0


class CloudTask(LabelTask):
    """Lines of JSON: points [N, 3] and a label."""

    name, of, config = "clouds", "points", CloudData

    @classmethod
    def load_model(cls, path, **options):
        model = Cloud()
        model.load_state_dict(load_file(Path(path) / "w.safetensors"))
        return model

    def read(self, path, config):
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        return [row | {"points": (config.scale * torch.tensor(row["points"])).tolist()} for row in rows]

    def collate(self, examples):
        return {name: torch.tensor([each[name] for each in examples]) for name in ("points", "label")}


@dataclass
class HeadConfig:
    warm_steps: int = 2
    weight: float = 0.1


class Confidence(Objective):
    """A loss on the logits, which grows over the run; and what it measures."""

    name, measure, needs_output = "confidence", "certainty", True

    def __init__(self, weight):
        super().__init__()
        self.weight, self.seen = weight, []

    def settings(self):
        return {"weight": self.weight}

    def begin(self, window, step, steps, device=None):
        self.scale = self.weight * step / steps / len(window)

    def share(self, batch, output):
        self.observe(batch, output)
        return self.scale * output.logits.square().mean()

    def observe(self, batch, output):
        self.seen.append(float(output.logits.detach().softmax(-1).amax(-1).mean()))

    def reset(self):
        self.seen = []

    def report(self, reduce=lambda x: x):
        return {"certainty": sum(self.seen) / max(len(self.seen), 1)}

    def summary(self, report):
        return dict(report)


def wrap(model, config, setup):
    """Trains all for a few steps, then the head alone, from data that it looks at."""
    assert [len(batch["label"]) for batch in setup.batches(0.01, 6)] == [4, 2]
    setup.phase(model, "warm", {"max_steps": config.warm_steps, "save_every": 0}, objective=Confidence(config.weight))
    model.encoder.requires_grad_(False)
    return model


@pytest.fixture
def clouds(tmp_path, monkeypatch):
    """A recipe of a method that trains a part of a plain module, by its own optimizer, on points."""
    for table, records in (("_METHODS", all_methods()), ("_TASKS", all_tasks())):
        monkeypatch.setattr(f"deftcore.training.registry.{table}", {record.name: record for record in records})
    register(CloudTask)
    register(
        Method(
            name="head", summary="The head alone.", config=HeadConfig, task=CloudTask, wrap=wrap,
            check=lambda model, config: None, objective=lambda model, config: Confidence(config.weight),
            optimizer=lambda model, config, training: torch.optim.SGD(model.head.parameters(), training.learning_rate),
        )
    )  # fmt: skip
    torch.manual_seed(0)
    (tmp_path / "model").mkdir()
    Cloud().save_pretrained(tmp_path / "model")
    rows = [{"points": torch.randn(5, 3).add(3 * (i % 2)).tolist(), "label": i % 2} for i in range(12)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = {
        "model": str(tmp_path / "model"), "output": "", "method": "head", "adapter": {"warm_steps": 3},
        "data": {"train": str(tmp_path / "train.jsonl"), "validation": str(tmp_path / "train.jsonl"), "scale": 0.5},
        "training": {
            "max_steps": 6, "batch_size": 4, "save_every": 2, "eval_every": 3, "log_every": 1, "learning_rate": 0.1,
        },
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    return lambda name, *more: load_recipe(tmp_path / "r.yaml", [f"output={tmp_path / name}", *more])


def test_a_task_prepares_the_model_and_holds_out(clouds, tmp_path):
    """Before the method wraps it, without weights and with them; what is held out need not be a file."""
    seen = []

    class Prepared(CloudTask):
        name = "prepared"

        def prepare(self, model, config):
            seen.append((next(model.parameters()).device.type, config.scale))
            with torch.no_grad():
                model.encoder.bias.fill_(7.0)
            return model

        def read(self, path, config):
            return super().read(path, config)[:-3]

        def held_out(self, config):
            return super().read(config.train, config)[-3:]

    register(Prepared)
    assert train_recipe(clouds("run", "task=prepared", "data.validation=")).eval_loss is not None
    assert seen == [("meta", 0.5), ("cpu", 0.5)]
    assert load_file(tmp_path / "run" / "final" / "w.safetensors")["encoder.bias"].sub(7).abs().max() < 2
    depends_on = json.loads((tmp_path / "run" / "run.json").read_text())["depends_on"]
    assert depends_on["data.train"].startswith("9 examples")
    assert depends_on["data.validation"].startswith("3 examples")


def test_data_that_is_no_text_in_two_phases(clouds, tmp_path, stopping):
    """An interrupted main run finds its first phase done, and ends where the whole one ends."""
    result = train_recipe(clouds("whole"))
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    log, (middle, end) = ([line for line in lines if key in line] for key in ("loss", "eval_loss"))
    assert {"loss", "certainty", "certainty_loss", "learning_rate", "step"} == log[0].keys()
    assert log[0]["certainty_loss"] == 0 < log[5]["certainty_loss"]
    assert 0.5 < result.certainty < 1
    assert result.certainty == end["eval_certainty"] != middle["eval_certainty"]
    assert result.eval_loss == end["eval_loss"] < middle["eval_loss"]
    before, warm, after = (
        load_file(tmp_path / "model" / "w.safetensors"),
        load_file(tmp_path / "whole" / "warm" / "trained" / "trainable.safetensors"),
        load_file(tmp_path / "whole" / "final" / "w.safetensors"),
    )
    assert not torch.equal(before["encoder.weight"], warm["encoder.weight"])
    assert torch.equal(warm["encoder.weight"], after["encoder.weight"])
    assert not torch.equal(warm["head.weight"], after["head.weight"])

    for first in ("warm", "main"):  # where the run is interrupted
        parts = clouds(f"parts-{first}")
        if first == "main":
            stopping()
            with pytest.raises(Stopped):
                train_recipe(parts)
        else:
            shutil.copytree(tmp_path / "whole" / "warm", tmp_path / f"parts-{first}" / "warm")
        stamp = (tmp_path / f"parts-{first}" / "warm" / "result.json").stat().st_mtime_ns
        assert train_recipe(parts).train_loss == result.train_loss
        assert (tmp_path / f"parts-{first}" / "warm" / "result.json").stat().st_mtime_ns == stamp
        assert_same(tensors_in(tmp_path / "whole" / "final"), tensors_in(tmp_path / f"parts-{first}" / "final"))


@pytest.fixture
def phases(clouds, monkeypatch):
    """A recipe of a method that trains in two phases and in the main run, each time on what chance made of before."""

    def wrap(model, config, setup):
        for name, part in (("first", model.encoder), ("second", model.head)):
            with torch.no_grad():
                part.weight.add_(random.random() * torch.rand(1) * (1 if model.training else 2))
            setup.phase(model, name, {"max_steps": 4}, objective=Confidence(0.1))
        with torch.no_grad():
            model.head.bias.add_(random.random() * torch.rand(1) * (1 if model.training else 2))
        return model

    method = Method(name="phased", summary="Two before.", task=CloudTask, wrap=wrap, check=lambda model, config: None)
    register(method)
    return lambda name, *more: clouds(name, "method=phased", "adapter={}", *more)


def test_a_run_of_phases_resumes_exactly(phases, tmp_path, stopping):
    """Inside each phase, between them, and in the main run."""
    random.seed(5)  # what the process did before makes no difference
    result = train_recipe(phases("whole"))
    parts = phases("parts")
    for at in ("first", "second", ""):
        stopping()
        with pytest.raises(Stopped):
            train_recipe(parts)
        assert [p.name for p in (tmp_path / "parts" / at / "checkpoints").iterdir()] == ["step-00000002"]
        assert not (tmp_path / "parts" / at / "result.json").exists()
    assert train_recipe(parts).train_loss == result.train_loss
    assert_same(tensors_in(tmp_path / "whole" / "final"), tensors_in(tmp_path / "parts" / "final"))


def test_another_run_is_refused_before_a_phase_trains(phases, tmp_path):
    def files():
        return {path for path in (tmp_path / "x").rglob("*") if path.is_file()}

    train_recipe(phases("x", "method=head", "adapter={warm_steps: 1}"))
    before = files()
    with pytest.raises(ValueError, match=r'x holds another run, method: "head" -> "phased"; train anew'):
        train_recipe(phases("x"))
    assert files() == before
    shutil.rmtree(tmp_path / "x")
    train_recipe(phases("x"))
    shutil.rmtree(tmp_path / "x" / "first")
    before = files()
    for change, message in (
        ("training.learning_rate=0.2", r"training\.learning_rate: 0\.1 -> 0\.2"),
        ("data.scale=2", r"data\.scale: 0\.5 -> 2\.0"),
        ("data.validation=", r"data\.validation: .* -> null"),
    ):
        with pytest.raises(ValueError, match=rf"x holds another run, which differs in\n  {message}\n"):
            train_recipe(phases("x", change))
    assert files() == before


def test_restarting_forgets_phases(phases, tmp_path, stopping):
    """All of them, once: an interrupted new run goes on from nothing old. Others' files stay."""
    more = ("training.learning_rate=0.2",)
    train_recipe(phases("x", "method=head", "adapter={warm_steps: 1}"))
    (tmp_path / "x" / "notes").mkdir()
    (tmp_path / "x" / "notes" / "run.json").write_text("{}")
    stopping()
    with pytest.raises(Stopped):
        train_recipe(phases("x"), resume=False)
    assert {p.name for p in (tmp_path / "x").iterdir()} == {"first", "notes", "recipe.yaml"}
    train_recipe(phases("x"))
    stopping()
    with pytest.raises(Stopped):
        train_recipe(phases("x", *more), resume=False)
    assert {p.name for p in (tmp_path / "x").iterdir()} == {"first", "notes", "recipe.yaml"}
    train_recipe(phases("x", *more))
    train_recipe(phases("fresh", *more))
    assert_same(tensors_in(tmp_path / "fresh" / "final"), tensors_in(tmp_path / "x" / "final"))
    (tmp_path / "x" / "second" / "mine.txt").write_text("")
    train_recipe(phases("x", "method=head", "adapter={warm_steps: 1}"), resume=False)
    assert [p.name for p in (tmp_path / "x" / "second").iterdir()] == ["mine.txt"]
    assert not (tmp_path / "x" / "first").exists()


@pytest.mark.parametrize("name", ["final", "checkpoints", "result.json", "a/b", "..", ""])
def test_names_of_phases(tmp_path, name):
    with pytest.raises(ValueError, match="name: must be one for a folder beside"):
        RunFolder(tmp_path, {}).phase(name)


def test_its_recipe_and_run_are_its_own(clouds):
    """Fields of the data are the task's; data, options and settings of the objective decide which run it is."""
    with pytest.raises(ValueError, match=r"data\.max_length: unknown"):
        clouds("x", "data.max_length=4")
    with pytest.raises(ValueError, match=r"adapter\.weight: must be a number, got 'much'"):
        clouds("x", "adapter.weight=much")
    train_recipe(clouds("x"))
    with pytest.raises(ValueError, match=r"data\.scale: 0\.5 -> 2\.0"):
        train_recipe(clouds("x", "data.scale=2", "adapter.warm_steps=3"))
    with pytest.raises(ValueError, match=r"adapter\.weight: 0\.1 -> 0\.3"):
        train_recipe(clouds("x", "adapter.weight=0.3"))


def test_a_method_of_text_on_other_data(clouds, tmp_path):
    """`task:` of a recipe: PEFT's LoRA on a plain module, over points."""
    more = [
        "method=lora",
        "task=clouds",
        "adapter={r: 2, target_modules: [encoder, head]}",
        "training.learning_rate=0.01",
    ]
    result = train_recipe(clouds("lora", *more))
    lines = [json.loads(line) for line in (tmp_path / "lora" / "log.jsonl").read_text().splitlines()]
    evaluated = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert evaluated[0] > evaluated[1] == result.eval_loss
    (stored,) = tensors_in(tmp_path / "lora" / "final").values()
    assert len(stored) == 4
    with pytest.raises(ValueError, match=r"task: no task 'cloud'; did you mean clouds\?"):
        clouds("x", "task=cloud")
