"""Progress bars: what is being done, how far, how fast, how long still."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from olmoscope.units import format_count

console = Console(stderr=True)
"""Progress and messages for people go to standard error; results go to standard output."""


class _Rate(ProgressColumn):
    """How much is done, and units per second as rich measures it."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        done = f"{task.percentage:.0f}%" if task.total else format_count(task.completed)
        return Text(done + ("" if speed is None else f" {format_count(speed)} {task.fields['unit']}/s"))


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
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=12), _Rate(),
               TimeRemainingColumn(compact=True, elapsed_when_finished=True), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(doing, total=total, completed=done, unit=unit, note="")

        def advance(amount: float, note: str | None = None) -> None:
            if note is None:
                progress.update(task, advance=amount)
            else:
                progress.update(task, advance=amount, note=note)

        yield advance
