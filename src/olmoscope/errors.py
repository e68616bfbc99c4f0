"""The one error that a user is meant to read."""

import difflib
from collections.abc import Collection


class UserError(ValueError):
    """Something the user can fix: one line that says what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with 1. A broken invariant of our own is an
    `assert` instead, and keeps its traceback.
    """


class AnotherRankFailedError(UserError):
    """Another process of the same training run failed and reports its error to the user; this one just exits."""


class LostRankError(UserError):
    """Another process of the same command is gone, so there is nobody left to exchange anything with."""


def did_you_mean(name: str, names: Collection[str]) -> str:
    """The end of a message about an unknown name: up to three similar names; empty if there are none."""
    found = difflib.get_close_matches(name, list(names), n=3, cutoff=0.45)
    return f"; did you mean {' or '.join(found)}?" if found else ""
