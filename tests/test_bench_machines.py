"""Of which kind of machine a figure is: file names, labels of forced levels, and the page's sections."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WIDE = ["scalar", "avx2", "avx512", "avx512bf16"]
FORCED = "forced, not a measurement of that level"


@pytest.fixture(autouse=True)
def bench_is_found(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)


@pytest.mark.parametrize(
    ("available", "kind"),
    [
        (WIDE, "avx512"),
        (WIDE[:3], "avx512"),
        (WIDE[:2], "avx2"),
        (["scalar"], "scalar"),
        (["lanes16", *WIDE], "avx512"),
    ],
)
def test_a_kind_is_the_best_level_of_the_machine(available, kind, tmp_path):
    from bench.machines import describe, headline, result_file

    head = describe(isa=available[-1], available=available)
    assert (head["kind"], head["forced"]) == (kind, None)
    assert headline(head).startswith(f"{kind}: ")
    assert "forced" not in headline(head)
    assert result_file(head, results=tmp_path) == tmp_path / f"cpu-{kind}.json"
    assert result_file(head, quick=True, results=tmp_path) == tmp_path / "quick" / f"cpu-{kind}.json"
    assert result_file(head, tmp_path / "own.json") == tmp_path / "own.json"


@pytest.mark.parametrize("isa", WIDE[:3])
def test_a_forced_level_is_labelled_and_never_a_result(isa, tmp_path):
    from bench.machines import describe, headline, result_file

    head = describe(isa=isa, available=WIDE)
    assert head["kind"] == "avx512"  # the machine's, not the level's
    assert FORCED in head["forced"]
    assert FORCED in headline(head)
    for quick in (False, True):
        with pytest.raises(ValueError, match=r"DEFTCORE_CPU_ISA: .*--output"):
            result_file(head, quick=quick, results=tmp_path)
    for inside in (tmp_path / "cpu-avx2.json", tmp_path / "quick" / "x.json"):
        with pytest.raises(ValueError, match=FORCED):
            result_file(head, inside, results=tmp_path)
    assert result_file(head, tmp_path / "x.json", results=tmp_path / "results") == tmp_path / "x.json"


def test_a_gpu_has_no_forced_level(tmp_path):
    from bench.machines import describe, result_file

    head = describe("cuda", isa="avx2", available=WIDE)
    assert head["forced"] is None
    assert result_file(head, results=tmp_path) == tmp_path / "cuda.json"


def test_the_kind_is_printed_first_and_a_forced_run_is_refused(monkeypatch, capsys):
    from bench import __main__ as command
    from bench.machines import describe

    monkeypatch.setattr(command, "describe", lambda device: describe(device, isa="avx2", available=WIDE))
    monkeypatch.setattr(sys, "argv", ["bench", "--only", "overhead"])
    with pytest.raises(SystemExit):
        command.main()
    out = capsys.readouterr()
    assert out.out.startswith("avx512: ")
    assert FORCED in out.out.splitlines()[0]
    assert "--output" in out.err


def test_a_run_keeps_where_other_families_were_measured():
    from bench.machines import keep_origins

    file = {"machine": "old", "streaming_gb_per_s": 20.0, "gated": [{}], "tsvit": [{}], "notes": {},
            "measured": {"tsvit": {"machine": "older"}}}  # fmt: skip
    keep_origins(file)
    assert file["measured"] == {
        "tsvit": {"machine": "older"}, "gated": {"machine": "old", "streaming_gb_per_s": 20.0},
    }  # fmt: skip


def test_a_family_that_is_measured_again_loses_its_note():
    from bench.machines import put_down

    file = {"machine": "new", "streaming_gb_per_s": 30.0, "measured": {}, "notes": {"gated": "old", "tsvit": "old"}}
    put_down(file, "gated", [{"ratio": 2.0}], 1.23)
    assert file["gated"] == [{"ratio": 2.0}]
    assert file["notes"] == {"tsvit": "old"}
    assert file["measured"] == {"gated": {"machine": "new", "streaming_gb_per_s": 30.0, "seconds": 1.2}}
    before = json.loads(json.dumps(file))
    put_down(file, "gated", [], 0.1)  # its peer is not there: what was measured with it is not lost
    assert file == before


@pytest.fixture
def results(monkeypatch, tmp_path):
    from bench import tables

    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "finetuning_cpu.json").write_text(json.dumps({"command": "x", "methods": {}}))
    return tmp_path


def a_file(kind="avx2", forced=None):
    rows = [{"op": "density", "microseconds": 2.0}]
    return {"kind": kind, "forced": forced, "machine": "a processor", "python": "3", "streaming_gb_per_s": 20.0,
            "measured": {"overhead": {"machine": "another processor"}}, "overhead": rows}  # fmt: skip


def test_the_page_has_a_section_per_kind_and_says_which_are_missing(results):
    from bench import tables

    (results / "cpu-avx2.json").write_text(json.dumps(a_file()))
    page = tables.page()
    assert "Not measured yet: CPU with AVX-512, NVIDIA GPU." in page
    for kind, text in tables.KINDS.items():
        measured, _, rest = page.partition(f"## {text}\n")[2].partition("\n## ")
        assert rest
        assert ("Not measured yet" in measured) == (kind != "avx2")
    assert "`python -m bench --only overhead` on another processor." in page
    assert "a processor; another processor; Python 3" in page
    assert "20 GB/s" not in page  # of the last family measured, whichever that was
    own = {"overhead": {"machine": "another processor", "streaming_gb_per_s": 12.0}}
    (results / "cpu-avx2.json").write_text(json.dumps(a_file() | {"measured": own}))
    assert "on another processor, which streamed 12 GB/s." in tables.page()


def test_the_page_takes_no_forced_figures(results):
    from bench import tables

    (results / "cpu-avx2.json").write_text(json.dumps(a_file(forced=f"avx2 on a machine with avx512: {FORCED}")))
    with pytest.raises(ValueError, match=FORCED):
        tables.page()


def test_every_result_file_bears_its_kind_as_its_name():
    from bench.machines import RESULTS

    for path in RESULTS.glob("cpu*.json"):
        file = json.loads(path.read_text())
        assert (path.stem, file["forced"]) == (f"cpu-{file['kind']}", None)
        assert file["measured"].keys() == {name for name, rows in file.items() if isinstance(rows, list) and rows}


def test_decoding_has_a_line_per_measured_row_and_names_what_was_not():
    from bench.decode_tables import decode
    from bench.targets import AVX512, standing

    row = {"model": "a model", "dtype": "NF4", "threads": 2, "exact_per_s": 50.0, "transformers_per_s": 10.0,
           "llama_cpp_q4_1_per_s": 80.0, "llama_cpp_q4_0_not_repacked_per_s": 40.0, "exact_share_of_bandwidth": 0.3,
           "exact_over_llama_cpp": 0.5}  # fmt: skip
    skipped = {"model": "another", "dtype": "NF4", "skipped": "no decoder"}
    table, missing = decode({"decode": [row, skipped]}, AVX512)
    assert "| a model | 2 | 50.0 |  | 10.0 |  | 80.0 | 40.0 (not repacked) | 0.50x |  | 0.30 |" in table
    assert missing == "Not measured: another: no decoder."
    found = {what: (measured, state) for what, _, measured, state in standing({"decode": [row, skipped]}, AVX512)}
    measured, state = found[
        "decoding a Llama-like model in 4 bits, one sequence, exact, over llama.cpp's best, which rounds inputs"
    ]
    assert (measured, state) == ("0.5 (a model, NF4, 2 threads)", "**short** in 1 of 1")


def test_models_for_llama_cpp_have_their_shapes(tmp_path):
    gguf = pytest.importorskip("gguf")
    from bench.gguf_models import write_llama, write_mamba

    path = tmp_path / "llama.gguf"
    write_llama(path, "Q4_1", width=64, blocks=2, heads=4, kv_heads=2, neurons=96, words=128)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert len(found) == 3 + 2 * 9
    assert list(found["blk.1.ffn_down.weight"].shape) == [96, 64]
    assert list(found["blk.0.attn_k.weight"].shape) == [64, 32]
    weights = gguf.quants.dequantize(found["output.weight"].data, found["output.weight"].tensor_type)
    assert weights.shape == (128, 64)
    assert abs(weights.mean()) < 0.01
    assert weights.std() == pytest.approx(64**-0.5, rel=0.1)

    path = tmp_path / "mamba.gguf"
    write_mamba(path, width=32, blocks=1, states=16, taps=4, words=16)
    found = {tensor.name: list(tensor.shape) for tensor in gguf.GGUFReader(path).tensors}
    assert found["blk.0.ssm_a"] == [16, 64]
    assert found["blk.0.ssm_conv1d.weight"] == [4, 64]


@pytest.mark.parametrize(("limit", "calls"), [(0.0, 1), (float("inf"), 4)])
def test_a_quick_comparison_begins_no_round_behind_its_time(monkeypatch, limit, calls):
    from bench import harness

    monkeypatch.setitem(harness.LIMIT, "seconds", limit)
    seen = []
    times = harness.alternate({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 3)
    assert seen == ["a", "b"] * calls
    assert all(each["seconds"] > 0 for each in times.values())
