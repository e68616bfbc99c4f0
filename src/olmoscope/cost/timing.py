"""Time a few steps of some work, with a progress bar."""

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from olmoscope.progress import bar

T = TypeVar("T")

SECONDS = 20
"""How many seconds a kind of work is timed at most. At least two steps run, of which the first warms up."""


def time_steps(title: str, unit: str, steps: Sequence[T], run: Callable[[T], int]) -> tuple[float, int]:
    """Run the steps until `SECONDS` have passed; the first one, which warms up, is not timed.

    Args:
        run: runs a step, and returns how much it did: tokens, for example.

    Returns:
        Seconds for each unit of what `run` counts, and how many steps were timed.
    """
    done, seconds, timed = 0, 0.0, 0
    with bar(title, len(steps), unit) as advance:
        for number, step in enumerate(steps):
            started = time.monotonic()
            did = run(step)
            if number:
                seconds += time.monotonic() - started
                done += did
                timed += 1
            advance(1)
            if timed and seconds > SECONDS:
                break
    return seconds / done, timed
