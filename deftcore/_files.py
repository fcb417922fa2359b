"""Files that appear whole or not at all, JSON records, and the folder in which deftcore keeps what it measured."""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

_log = logging.getLogger("deftcore")
Record = TypeVar("Record")
_WAIT = 5.0  # seconds for another process that adds to a table


@contextlib.contextmanager
def replacing_file(target: str | os.PathLike) -> Iterator[Path]:
    """A path beside `target`, of the same suffix, to write to: the file takes target's place when the block ends well.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "picture.png"
    >>> with replacing_file(file) as partial:
    ...     _ = partial.write_bytes(b"...")
    >>> [each.name for each in file.parent.iterdir()]
    ['picture.png']
    """
    target = Path(target)
    partial = _beside(target)
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(target: str | os.PathLike, *, discard: bool = True, only: Sequence[str] = ()) -> Iterator[Path]:
    """A new folder beside `target` that takes its place when the block ends well.

    Args:
        discard: what target holds by then goes; False leaves it and raises.
        only: names of files, one of which tells that what target holds may go; none: anything may.

    Raises:
        FileExistsError: target holds none of `only`, but something else; before anything is written.
        OSError: target holds something that is not to be discarded.
    """
    target = Path(target)
    if only and target.exists() and not any((target / name).is_file() for name in only) and any(target.iterdir()):
        raise FileExistsError(f"folder: {target} exists and holds something else: none of {', '.join(only)}")
    partial = _beside(target)
    partial.mkdir(parents=True)
    try:
        yield partial
        if discard:
            shutil.rmtree(target, ignore_errors=True)
        elif target.exists():
            target.rmdir()
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _beside(target: Path) -> Path:
    """A name in target's folder that nobody has: several processes may write the same file."""
    return target.with_name(f".{target.stem}.{uuid.uuid4().hex[:12]}{target.suffix}")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file whole or not at all."""
    with replacing_file(path) as partial:
        partial.write_text(text)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=1))


def read_record(
    folder: str | os.PathLike, name: str, make: Callable[[dict[str, Any]], Record], *, argument: str = "model"
) -> Record | None:
    """What stands as JSON beside a model or an adapter; None where it does not.

    Args:
        make: of the file's values the record.
        argument: what errors name.

    Raises:
        ValueError: naming the file, when it is damaged.
    """
    file = Path(folder) / name
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text())
        if not isinstance(values, dict):
            raise ValueError("no JSON object")
        return make(values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{argument}: {file} is damaged: {error}") from error


# ---------------------------------------------------------------------------- the cache


def cache_folder() -> Path:
    """`$DEFTCORE_CACHE`, else the user's cache folder for deftcore (on Linux `~/.cache/deftcore`)."""
    if chosen := os.environ.get("DEFTCORE_CACHE"):
        return Path(chosen)
    import platformdirs  # here: the kernels run, and are checked on a bare CUDA image, with PyTorch alone

    return platformdirs.user_cache_path("deftcore", appauthor=False)


def read_table(name: str) -> dict[str, Any]:
    """The JSON object in a file of the cache folder; empty where the file is absent or damaged."""
    try:
        raw = json.loads((cache_folder() / name).read_text())
    except (OSError, ValueError):
        return {}
    return raw if isinstance(raw, dict) else {}


def add_to_table(name: str, entries: dict[str, Any]) -> None:
    """Adds entries to such a file, one process at a time. A folder that cannot be written is only logged."""
    with one_at_a_time(f"{name}.lock", _WAIT):
        _add(name, entries)


def first_in_table(name: str, key: str, value: float) -> float:
    """The number that such a file has under a key; `value`, which is then added, where it has none.

    So that of several processes that measured the same thing at once all go by what one of them found.
    """
    with one_at_a_time(f"{name}.lock", _WAIT):
        kept = read_table(name).get(key)
        if isinstance(kept, float):
            return kept
        _add(name, {key: value})
    return value


def _add(name: str, entries: dict[str, Any]) -> None:
    path = cache_folder() / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, dict(sorted((read_table(name) | entries).items())))
    except OSError as error:
        _log.info("%s: not kept, %s", name, error)


@contextlib.contextmanager
def one_at_a_time(lock: str, wait: float) -> Iterator[None]:
    """Holds a file of the cache folder locked.

    Who holds it may have been stopped: after `wait` seconds, and where there are no locks, it goes on without.
    """
    with contextlib.ExitStack() as held:
        try:
            cache_folder().mkdir(parents=True, exist_ok=True)
            file = held.enter_context((cache_folder() / lock).open("w"))
            given_up = time.monotonic() + wait
            while not _taken(file) and time.monotonic() < given_up:
                time.sleep(0.01)
            held.callback(fcntl.flock, file, fcntl.LOCK_UN)  # a process forked meanwhile has the file open too
        except OSError as error:
            _log.info("%s: not locked, %s", lock, error)
        yield


def _taken(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
