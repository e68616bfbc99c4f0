"""Progress bars: what is being done, how far, how fast, how long still."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

console = Console(stderr=True)
"""Progress and messages for people go to standard error; results go to standard output."""


class _Rate(ProgressColumn):
    """Units per second, as rich measures it."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{_short(speed)} {task.fields['unit']}/s")


class _Amount(MofNCompleteColumn):
    """`1.2M/5.0M tokens`."""

    def render(self, task: Task) -> Text:
        total = "?" if task.total is None else _short(task.total)
        return Text(f"{_short(task.completed)}/{total} {task.fields['unit']}")


@contextlib.contextmanager
def bar(doing: str, total: float | None, unit: str, done: int = 0) -> Iterator[Callable[..., None]]:
    """Show a bar while the block runs.

    Args:
        doing: what the line says, e.g. `collecting`.
        total: how much there is to do, or None if nobody knows.
        unit: what is counted, e.g. `tokens`.
        done: how much an earlier run already did.

    Yields:
        `advance(amount, note="")`: count `amount` more and show `note` at the end of the line.
    """
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), _Amount(), _Rate(),
               TimeRemainingColumn(compact=True), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(doing, total=total, completed=done, unit=unit, note="")

        def advance(amount: float, note: str | None = None) -> None:
            if note is None:
                progress.update(task, advance=amount)
            else:
                progress.update(task, advance=amount, note=note)

        yield advance


def _short(number: float) -> str:
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"
