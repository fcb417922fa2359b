"""bench/gpu_report.py: the result file of a run whose steps may have been stopped anywhere."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from bench import gpu_report
from bench.gpu_report import main
from deftcore.ops import proof

BENCH = Path(gpu_report.__file__).parent

TESTS = """<testsuites><testsuite><testcase name="a"/><testcase name="b"><failure/></testcase>
<testcase name="c"><skipped/></testcase></testsuite></testsuites>"""
PROOF = {"place": "here", "kernels": {"density": {"reason": ""}, "ssd": {"reason": "differs"}}}


@pytest.fixture
def work(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "machine.json").write_text(json.dumps({"device": "NVIDIA X1 80GB", "commit": "abc"}))
    (folder / "steps").write_text("build 0 71\n")
    return folder


def result_of(work):
    status = main(work, work.parent)
    return json.loads((work.parent / "nvidia-x1-80gb.json").read_text()), status


def test_after_the_first_step(work):
    result, status = result_of(work)
    assert (result["device"], result["commit"]) == ("NVIDIA X1 80GB", "abc")
    assert result["steps"] == {"build": {"exit": 0, "seconds": 71}}
    assert result["compute_sanitizer"] == "not run"
    assert [result[key] for key in ("proof", "static", "pytest_exit", "figures")] == [None] * 4
    assert result["tests"] == {}
    assert status == 0


def test_after_all_steps(work, capsys):
    (work / "steps").write_text("build 0 71\nproof 1 20\ntests 1 60\ncompute-sanitizer 9 30\nbenchmarks 0 150\n")
    (work / "proof.json").write_text(json.dumps(PROOF))
    (work / "tests.xml").write_text(TESTS)
    (work / "figures.json").write_text('{"density": []}')
    result, status = result_of(work)
    assert result["proof"] == PROOF
    assert (result["pytest_exit"], result["tests"]) == (1, {"a": "passed", "b": "failure", "c": "skipped"})
    assert result["compute_sanitizer"] == "exit 9"
    assert result["figures"] == {"density": []}
    assert status == 1
    assert "kernel ssd: differs; b failure" in capsys.readouterr().out


def test_files_that_were_cut_off_do_not_cost_the_others(work):
    (work / "steps").write_text("build 0 71\ntests 137 110\n")
    (work / "proof.json").write_text('{"place": ')
    (work / "tests.xml").write_text(TESTS[:30])
    (work / "figures.json").write_text('{"density": []}')
    result, status = result_of(work)
    assert (result["proof"], result["tests"], result["figures"]) == (None, {}, {"density": []})
    assert result["steps"]["tests"] == {"exit": 137, "seconds": 110}
    assert status == 1


def test_a_proof_that_was_stopped_leaves_its_verdicts(work, monkeypatch, capsys):
    (work / "steps").write_text("build 0 71\nproof 124 60\n")
    (work / "proof.json").write_text("")
    monkeypatch.setenv("DEFTCORE_CACHE", str(work / "cache"))
    monkeypatch.setattr(proof, "_in_child", lambda *_: iter([("differs", 1.0, True)]))
    verdict = asdict(proof.prove(["ssd"], proof.Place("cpu", "here"))["ssd"])
    result, status = result_of(work)
    assert result["proof"] == {"kernels": {"ssd": verdict}}
    assert status == 1
    assert "kernel ssd: differs" in capsys.readouterr().out


def test_every_family_that_takes_a_device_is_measured():
    families = re.findall(r'"(\w+)": lambda: (.*)', (BENCH / "__main__.py").read_text())
    on_a_gpu = {name for name, call in families if "args.device" in call and not name.endswith("_tuned_allocator")}
    script = (BENCH / "gpu_check.sh").read_text().replace("\\\n", " ")
    assert set(re.search(r"python3 -m bench --device cuda .*--only (.*)", script)[1].split()) == on_a_gpu
