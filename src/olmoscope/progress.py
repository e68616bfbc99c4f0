"""Progress: what is being done, how far it is, how fast it goes, how long it will still take.

A terminal gets a bar that moves. Anything else (a file, a pipe, CI) gets a line every 10 s and one at the end.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from time import monotonic

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from olmoscope.terminal import Terminal
from olmoscope.units import format_count, format_seconds

console = Terminal(stderr=True)
"""Progress and messages for people go to standard error; results go to standard output."""

LINE_SECONDS = 10
"""Seconds between two lines if there is no terminal."""
RECENT_LINES = 3
"""A line's rate is measured over this many lines: it soon forgets a slow start, and a short pause does not show."""


def nobody(count: int) -> None:
    """An `advance` that shows nothing, to use in place of what `bar` yields."""


@contextlib.contextmanager
def bar(doing: str, total: float | None, unit: str, done: int = 0) -> Iterator[Callable[..., None]]:
    """Show a bar, or print lines, while the block runs.

    Args:
        doing: what is being done, e.g. `collecting`.
        total: how much there is to do, or None if unknown.
        unit: what is counted, e.g. `tokens`.
        done: how much an earlier run already did.

    Yields:
        `advance(amount, note="")`: count `amount` more and show `note` at the end of the line.
    """
    if not _moves():
        lines = _Lines(doing, total, unit, done)
        try:
            yield lines.advance
        finally:
            lines.end()
        return
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


@contextlib.contextmanager
def step_line(doing: str) -> Iterator[None]:
    """Announce a job whose progress cannot be counted, and say how long it took unless it fails.

    Args:
        doing: what is being done, e.g. `compiling kernels, once`.
    """
    started = monotonic()
    if _moves():
        with console.status(doing, spinner="dots" if console.encoding.startswith("utf") else "line"):
            yield
    else:
        _print(f"{doing} ...")
        yield
    _print(f"{doing}: took {format_seconds(monotonic() - started)}")


class _Rate(ProgressColumn):
    """How much is done, and units per second as rich measures it."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        done = f"{task.percentage:.0f}%" if task.total else format_count(task.completed)
        return Text(done + ("" if speed is None else f" {format_count(speed)} {task.fields['unit']}/s"))


class _Lines:
    """A bar's counterpart for a log. It prints lines when something is counted, so it needs no thread."""

    def __init__(self, doing: str, total: float | None, unit: str, done: float) -> None:
        self._doing, self._total, self._unit, self._done, self._note = doing, total, unit, done, ""
        self._start = (monotonic(), done)
        self._recent = deque([self._start], maxlen=RECENT_LINES)

    def advance(self, amount: float, note: str | None = None) -> None:
        self._done += amount
        self._note = self._note if note is None else note
        now = monotonic()
        finished = self._total is not None and self._done >= self._total  # the last line will say so
        if finished or now - self._recent[-1][0] < LINE_SECONDS:
            return
        speed = self._speed(now, self._recent[0])
        left = (self._total - self._done) / speed if self._total and speed else None
        self._line(speed, "" if left is None else f"about {format_seconds(left)} left")
        self._recent.append((now, self._done))

    def end(self) -> None:
        now = monotonic()
        if self._done > self._start[1]:
            self._line(self._speed(now, self._start), f"took {format_seconds(now - self._start[0])}")

    def _speed(self, now: float, since: tuple[float, float]) -> float:
        """Units per second since an earlier time, given as (time, units done by then)."""
        then, had = since
        return (self._done - had) / max(now - then, 1e-3)

    def _line(self, speed: float, time: str) -> None:
        done = f"{format_count(self._done)} {self._unit}"
        if self._total:
            share = min(100, int(100 * self._done / self._total))
            done = f"{share}%, {format_count(self._done)} of {format_count(self._total)} {self._unit}"
        parts = [done, f"{format_count(speed)} {self._unit}/s", time, self._note]
        _print(f"{self._doing}: {', '.join(part for part in parts if part)}")


def _moves() -> bool:
    """Whether standard error is a terminal whose lines can be redrawn."""
    return console.is_terminal and not console.is_dumb_terminal


def _print(line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False, markup=False)
