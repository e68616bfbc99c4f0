"""An interrupt that Python ignores, because it came inside a callback, comes again."""

import subprocess
import sys

IGNORED = """
import signal, time, weakref
from olmoscope.cli.interrupts import keep_interrupts
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may start what is in the background without it
if {kept}:
    keep_interrupts()

class Module: pass
module = Module()
callback = weakref.ref(module, lambda _: signal.raise_signal(signal.SIGINT))
del module
time.sleep(1.5)
print("went on")
"""


def test_an_interrupt_in_a_callback_is_not_lost():
    def run(kept):
        return subprocess.run([sys.executable, "-c", IGNORED.format(kept=kept)], capture_output=True, text=True,
                              timeout=30)

    assert "went on" in run(False).stdout, "what Python does"
    done = run(True)
    assert done.returncode and not done.stdout and "Exception ignored" not in done.stderr
    assert done.stderr.splitlines()[-1] == "KeyboardInterrupt"


def test_other_exceptions_there_are_shown_as_before():
    code = ("import weakref\nfrom olmoscope.cli.interrupts import keep_interrupts\nkeep_interrupts()\n"
            "class Module: pass\nmodule = Module()\ncallback = weakref.ref(module, lambda _: 1 / 0)\ndel module\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and "Exception ignored in" in done.stderr and "ZeroDivisionError" in done.stderr
