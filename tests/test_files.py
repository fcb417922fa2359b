"""Files appear whole or not at all; the cache folder is where the user says."""

import fcntl
import os
import stat
import subprocess
import sys

import pytest

from deftcore import _files
from deftcore._files import (
    add_to_table,
    cache_folder,
    first_in_table,
    one_at_a_time,
    read_table,
    replacing_file,
    replacing_folder,
    write_json,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def half_written(path):
    path.write_text("half")
    raise IsADirectoryError


def test_a_file_is_replaced_whole(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"x": 1})
    with pytest.raises(IsADirectoryError), replacing_file(file) as partial:
        half_written(partial)
    assert file.read_text() == '{\n "x": 1\n}'
    assert names(tmp_path) == ["a.json"]
    with replacing_file(file) as partial:
        partial.write_text("whole")
    assert file.read_text() == "whole"
    assert names(tmp_path) == ["a.json"]


def test_a_folder_is_replaced_whole(tmp_path):
    folder = tmp_path / "deep" / "model"
    with replacing_folder(folder) as partial:
        (partial / "old").write_text("1")
    with pytest.raises(IsADirectoryError), replacing_folder(folder) as partial:
        half_written(partial / "half")
    assert names(folder) == ["old"]
    with replacing_folder(folder) as partial:
        (partial / "new").write_text("3")
    assert names(folder) == ["new"]
    with pytest.raises(OSError, match="not empty"), replacing_folder(folder, discard=False) as partial:
        (partial / "more").write_text("4")
    assert names(folder) == ["new"]
    (folder / "new").unlink()
    with replacing_folder(folder, discard=False) as partial:
        (partial / "more").write_text("4")
    assert names(folder) == ["more"]
    assert names(folder.parent) == ["model"]
    plain = tmp_path / "plain"
    plain.mkdir()
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)  # others may read it


def test_tables(tmp_path, monkeypatch):
    monkeypatch.setenv("DEFTCORE_CACHE", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache"
    assert read_table("t.json") == {}
    add_to_table("t.json", {"b": 1})
    add_to_table("t.json", {"a": 2, "b": 3})
    assert read_table("t.json") == {"a": 2, "b": 3}
    assert first_in_table("t.json", "c", 0.5) == 0.5
    assert first_in_table("t.json", "c", 0.75) == 0.5
    (cache_folder() / "t.json").write_text("[1")
    assert read_table("t.json") == {}
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("DEFTCORE_CACHE", str(tmp_path / "taken"))
    add_to_table("t.json", {"a": 1})  # only logged
    assert first_in_table("t.json", "a", 1.0) == 1.0
    monkeypatch.delenv("DEFTCORE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "deftcore"


def test_processes_add_to_one_table(tmp_path, monkeypatch):
    """None loses what another one adds at the same time."""
    monkeypatch.setenv("DEFTCORE_CACHE", str(tmp_path))
    code = """if True:
        import sys
        from deftcore._files import add_to_table
        sys.stdin.read()
        for i in range(60):
            add_to_table("t.json", {f"{sys.argv[1]} {i}": 1})
    """
    started = [subprocess.Popen([sys.executable, "-c", code, name], stdin=subprocess.PIPE) for name in ("a", "b", "c")]
    for process in started:
        process.stdin.close()
    assert [process.wait(60) for process in started] == [0, 0, 0]
    assert len(read_table("t.json")) == 180


def test_who_was_stopped_with_the_lock_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setenv("DEFTCORE_CACHE", str(tmp_path))
    monkeypatch.setattr(_files, "_WAIT", 0.1)
    with one_at_a_time("t.json.lock", 1.0):
        add_to_table("t.json", {"a": 1})
        assert not _free(tmp_path / "t.json.lock")
    assert _free(tmp_path / "t.json.lock")
    assert read_table("t.json") == {"a": 1}


def test_a_fork_meanwhile_does_not_keep_the_lock(tmp_path, monkeypatch):
    """A forked process has the lock's open file too, as a duplicate of its descriptor has it."""
    monkeypatch.setenv("DEFTCORE_CACHE", str(tmp_path))
    taken, copies = _files._taken, []

    def taken_and_copied(file):
        return taken(file) and copies.append(os.dup(file.fileno())) is None

    monkeypatch.setattr(_files, "_taken", taken_and_copied)
    try:
        for _ in range(2):
            with one_at_a_time("t.lock", 0.0):
                pass
        assert len(copies) == 2  # the second time too
    finally:
        for copy in copies:
            os.close(copy)


def _free(path):
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
