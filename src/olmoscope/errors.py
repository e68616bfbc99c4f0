"""The one error that a user is meant to read."""


class UserError(ValueError):
    """Something the user can mend: one line that says what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with 1. A broken invariant of our own is an
    `assert` instead, and keeps its traceback.
    """


class AnotherRankFailedError(UserError):
    """Another process of the same training has an error and tells the user; this one only ends."""
