"""What the documentation says holds: pages made from files are up to date."""

from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_benchmarks_page_is_what_the_result_files_make(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from bench import tables

    assert tables.PAGE.read_text() == tables.page(), "run python -m bench.tables"
