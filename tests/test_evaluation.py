"""What a task measures on validation data: metrics of pooled counts, the best by one of them, what is drawn."""

import json

import pytest
import torch
from conftest import Stopped
from label_task import LabelTask
from safetensors.torch import load_file, save_file
from torch import nn
from two_processes import as_launched, run_in_two

from deftcore.training.config import TrainingConfig
from deftcore.training.loop import train
from deftcore.training.metrics import ConfusionCounts
from deftcore.training.pictures import draw_confusion
from deftcore.training.task import Batches


class SideTask(LabelTask):
    """On which side of a plane a noisy point lies."""

    name, of = "sides", "x"
    metric_names = ("accuracy", "f1")

    def draw(self, example, generator, training):
        noise = torch.randn(3, generator=generator) * (0.3 if training else 0.01)
        return {**example, "x": example["x"] + noise}

    def collate(self, examples):
        return {name: torch.stack([each[name] for each in examples]) for name in ("x", "label")}

    def counts(self, batch, output):
        return ConfusionCounts(2).add(batch["label"], output.logits.argmax(-1)).counts

    def metrics(self, counts):
        found = ConfusionCounts(2).merge(counts)
        return {"accuracy": found.accuracy, "f1": float(found.f1()[1])}

    def report(self, model, examples, counts, folder):
        draw_confusion(ConfusionCounts(2).merge(counts), folder / "confusion.png")
        (folder / "wrong.txt").write_text(str(int(counts.sum() - counts.trace())))


def sides(n, seed):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(n, 3, generator=generator)
    return [{"x": x, "label": (x[0] > 0.3).long()} for x in points]


def save_model(model, folder):
    save_file(dict(model.state_dict()), folder / "model.safetensors")


def run(folder, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    options = {
        "max_steps": 8, "batch_size": 4, "learning_rate": 0.1, "eval_every": 1, "log_every": 1, "save_every": 2,
        "best_by": "f1",
    } | options  # fmt: skip
    validation = options.pop("validation", sides(20, 2))
    result = train(
        model, sides(24, 1), TrainingConfig(**options), folder, validation=validation, task=SideTask(),
        save_model=save_model,
    )  # fmt: skip
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return model, result, [line for line in lines if "eval_loss" in line]


def test_metrics_are_logged_and_choose_the_best(tmp_path):
    model, result, log = run(tmp_path)
    task = SideTask()
    (batch,) = Batches(sides(20, 2), 20, task.collate, shuffle=False, draw=task.draw).epoch(0)
    expected = task.metrics(task.counts(batch, task.output(model, batch)))
    assert {name: getattr(result, name) for name in task.metric_names} == expected
    assert log[-1]["eval_accuracy"] == result.accuracy == json.loads((tmp_path / "result.json").read_text())["accuracy"]
    values = [line["eval_f1"] for line in log]
    assert len(values) == 8
    assert result.best_metric == max(values) > values[0]
    at = values.index(max(values))  # the first of equal ones
    assert result.best_step == log[at]["step"]
    assert result.best_eval_loss == log[at]["eval_loss"]
    best = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    best.load_state_dict(load_file(tmp_path / "best" / "model.safetensors"))
    assert task.metrics(task.counts(batch, task.output(best, batch)))["f1"] == max(values)
    assert {each.name for each in (tmp_path / "evaluation").iterdir()} == {"confusion.png", "wrong.txt"}
    assert int((tmp_path / "evaluation" / "wrong.txt").read_text()) == round(20 * (1 - result.accuracy))


def test_the_best_by_loss_and_by_a_metric_differ(tmp_path):
    """Both see the same run; that by loss has no metric of its best."""
    by_loss, by_metric = run(tmp_path / "loss", best_by="")[1], run(tmp_path / "metric")[1]
    assert by_loss.train_loss == by_metric.train_loss
    assert by_loss.best_metric is None
    assert by_loss.best_eval_loss < by_metric.best_eval_loss


def test_what_is_drawn_is_drawn_again(tmp_path, stopping):
    """A run that was interrupted goes on with the same noise, however often it is evaluated meanwhile."""
    run(tmp_path / "whole")
    stopping()
    with pytest.raises(Stopped):
        run(tmp_path / "parts", eval_every=3)
    _, result, log = run(tmp_path / "parts", eval_every=2)
    whole = [line for line in map(json.loads, (tmp_path / "whole" / "log.jsonl").read_text().splitlines())]
    assert result.train_loss == [line["loss"] for line in whole if "loss" in line][-1]
    evaluated = {line["step"]: line["eval_loss"] for line in whole if "eval_loss" in line}
    assert {line["step"]: line["eval_loss"] for line in log} == {step: evaluated[step] for step in (4, 6, 8)}
    for name in ("final", "trained"):
        (file,) = (tmp_path / "whole" / name).iterdir()
        ours, theirs = load_file(file), load_file(tmp_path / "parts" / name / file.name)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_each_epoch_and_example_is_drawn_for_itself():
    task = SideTask()
    rows = [{"x": torch.zeros(3), "label": torch.tensor(i % 2)} for i in range(6)]

    def drawn(epoch, **options):
        batches = Batches(rows, 2, task.collate, draw=task.draw, **options)
        return torch.cat([batch["x"] for batch in batches.epoch(epoch)])

    assert torch.equal(drawn(1), drawn(1))
    different = torch.cat([drawn(0), drawn(1), drawn(0, seed=1), drawn(0, shuffle=False)])
    assert len(different.unique(dim=0)) == 24
    assert torch.equal(drawn(0, shuffle=False), drawn(1, shuffle=False))  # an evaluation always sees the same
    shares = [drawn(1, process=p, processes=2) for p in (0, 1)]
    assert torch.equal(torch.cat(shares).unique(dim=0), drawn(1).unique(dim=0))


def test_an_undefined_metric_is_left_out(tmp_path):
    """Nothing is best by it either: no label, nor a prediction, of the second class."""
    far = [{"x": torch.tensor([-30.0, 0, 0]), "label": torch.tensor(0)}] * 4
    _, result, log = run(tmp_path, validation=far)
    assert result.accuracy == 1
    assert "eval_f1" not in log[-1]
    assert result.best_metric is None or result.best_metric == 0  # an early model may predict the second class
    with pytest.raises(AttributeError, match="no 'f1'"):
        result.f1  # noqa: B018


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"best_by": "iou"}, "training.best_by: must be a metric of the task, which has accuracy, f1, got 'iou'"),
        ({"validation": None}, "training.best_by: needs validation examples, got 'f1' without any"),
    ],
)
def test_a_best_that_cannot_be_found(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def work(rank, port, folder):
    as_launched(rank, port)
    run(folder / "two", batch_size=2)


def test_two_processes_count_as_one(tmp_path):
    _, one, log = run(tmp_path / "one")
    run_in_two(work, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    two = [line for line in lines if "eval_loss" in line]
    for ours, theirs in zip(log, two, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert json.loads((tmp_path / "two" / "result.json").read_text())["best_metric"] == one.best_metric
    assert (tmp_path / "two" / "evaluation" / "confusion.png").exists()
