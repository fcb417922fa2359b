"""How far long work has come, on standard error: on a terminal alone and gone at the end, but for a run's own bar."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    track,
)
from rich.table import Column
from rich.text import Text

from deftcore._processes import is_first_process

T = TypeVar("T")


def tracked(items: Iterable[T], label: str, total: int | None = None, *, quick: bool = False) -> Iterable[T]:
    """The items, with a bar; the first process shows it.

    Args:
        total: how many there are, where they do not know it.
        quick: not worth showing.
    """
    console = Console(stderr=True)
    return track(items, label, total=total, console=console, transient=True, disable=quick or _is_hidden(console))


@contextmanager
def working(label: str) -> Iterator[None]:
    """A bar without an end and the time, around work of which nobody knows how long it takes."""
    columns, console = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()), Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=_is_hidden(console), redirect_stdout=False,
        redirect_stderr=False,  # bars of other libraries go on
    ) as progress:  # fmt: skip
        progress.add_task(label, total=None)
        yield


def steps_bar(console: Console, *, disable: bool = False) -> Progress:
    """The bar of a training run, whose task has a field `note`: where the line is too long, bar and note give way,
    counts and times never."""
    whole = Column(no_wrap=True)
    columns = (
        TextColumn("{task.description}", table_column=whole.copy()), BarColumn(bar_width=20),
        MofNCompleteColumn(table_column=whole.copy()), TimeElapsedColumn(table_column=whole.copy()),
        TimeRemainingColumn(table_column=whole.copy()), _Note(),
    )  # fmt: skip
    return Progress(*columns, console=console, disable=disable)


class _Note(ProgressColumn):
    """The note of a task in one line, cut where there is no room."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["note"], no_wrap=True, overflow="ellipsis")


def _is_hidden(console: Console) -> bool:
    return not console.is_terminal or not is_first_process()
