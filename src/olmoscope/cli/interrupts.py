"""Ctrl-C is not lost where Python cannot raise it.

Python runs a signal's handler between any two instructions of the main thread. If these are in a callback that must not
raise, such as those that importlib runs after each import, it prints `Exception ignored in` and continues. So an
interrupt that came while torch was imported could be lost, and the process did all of its work.
"""

import _thread
import sys
import threading

AGAIN_SECONDS = 0.05
"""By then the callback has ended."""


def keep_interrupts() -> None:
    """From now on, interrupt this process again if an interrupt was ignored."""
    sys.unraisablehook = _unraisable


def _unraisable(ignored: "sys.UnraisableHookArgs") -> None:
    if not issubclass(ignored.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(ignored)
        return
    again = threading.Timer(AGAIN_SECONDS, _thread.interrupt_main)
    again.daemon = True
    again.start()
