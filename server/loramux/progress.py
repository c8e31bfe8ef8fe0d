"""Progress bars for long work at start and on models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextmanager
def bars(console: Console, *titles: str) -> Iterator[tuple[Callable[[int, int], None], ...]]:
    """A bar a title, the first from the beginning and the others once they count; nothing where there is no terminal.

    Yields a function (done, total) for each, to be called from any thread.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:

        def counting(title: str) -> Callable[[int, int], None]:
            first = title == titles[0]
            task = bar.add_task(title, start=first, total=None, visible=first)

            def count(done: int, total: int) -> None:
                bar.start_task(task)
                bar.update(task, completed=done, total=total, visible=True)

            return count

        yield tuple(map(counting, titles))
