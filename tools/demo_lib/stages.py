"""What a demo shows while it runs, and how it ends.

Tool of `make demo` and `make demo-finetune`. Proof: tests/tools/test_demo.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column

from .runs import ChildError

__all__ = ["Stages", "exit_code", "shown", "staged"]


class Stages:
    """One line of progress a stage, added as it begins."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None

    def begin(self, name: str, total: int | None = None) -> None:
        self._task = self._progress.add_task(name, total=total, note="")

    def update(self, done: int, note: str) -> None:
        assert self._task is not None
        self._progress.update(self._task, completed=done, note=note)

    def end(self, note: str) -> None:
        assert self._task is not None
        total = self._progress.tasks[self._task].total or 1
        self._progress.update(self._task, total=total, completed=total, note=note)
        self._progress.stop_task(self._task)


@contextmanager
def staged(console: Console) -> Iterator[Stages]:
    """Stages, drawn until the block ends."""
    whole = Column(no_wrap=True, min_width=36)
    columns = (
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description}", table_column=whole),
        BarColumn(10),
        TimeElapsedColumn(table_column=Column(no_wrap=True, min_width=7)),
        TextColumn("[dim]{task.fields[note]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
    )
    with Progress(*columns, console=console) as progress:
        yield Stages(progress)


def exit_code(console: Console, work: Callable[[], int | None]) -> int:
    """Do it: 0 or what it returns, 1 behind the log of a child that failed, 130 on Ctrl-C."""
    try:
        return work() or 0
    except ChildError as failure:
        for line in failure.tail:
            console.print(escape(line), highlight=False, soft_wrap=True)
        console.print(f"[red]demo: {escape(str(failure))}[/]", highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 130


def shown(path: Path) -> str:
    """`path` as seen from here, where it lies below."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
