"""Run as a script, with modules to import: a process that has imported them, and forks a process for each request.

Otherwise starting Python costs 3 to 7 seconds of imports. The forked processes are real and get real signals; only
their start is short. The protocol is one JSON value per line: {"start": [arguments], "output": file} is answered with
the pid; {"wait": pid, "seconds": s} with the exit status (negative: the signal), or null if it still runs. "start" may
come with:

    "errors": a file for standard error, which goes to "output" otherwise
    "environment": the variables of the new process, instead of this one's
    "code": Python to run instead of the `olmoscope` command
    "constants": {name: value for a constant of a module}
"""

import importlib
import json
import os
import signal
import sys
import time
import traceback

from numba.core.registry import cpu_target
from numba.np.ufunc import parallel

COMMAND = "from olmoscope.cli.app import main\nmain()"


def main() -> None:
    # A shell that starts the tests in the background makes them ignore Ctrl-C; here it must have its usual effect.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for module in sys.argv[1:]:
        importlib.import_module(module)
    # What numba reads before the first kernel of a process takes half a second. No kernel may run here: forked
    # processes would lack the threads that it starts.
    cpu_target.typing_context.refresh()
    cpu_target.target_context.refresh()

    for line in sys.stdin:
        request = json.loads(line)
        answer = start(request) if "start" in request else wait(request["wait"], request["seconds"])
        print(json.dumps(answer), flush=True)


def start(request: dict) -> int:
    output = _opened(request["output"])  # before the fork, since the caller may read the files at once
    errors = _opened(request["errors"]) if "errors" in request else os.dup(output)
    pid = os.fork()
    if pid:
        os.close(output)
        os.close(errors)
        return pid
    status = 1
    try:
        # Close standard input: the server's requests are not for this process.
        for number, file in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, errors)):
            os.dup2(file, number)
            os.close(file)
        if (environment := request.get("environment")) is not None:
            os.environ.clear()
            os.environ.update(environment)
            if "olmoscope.progress" in sys.modules:  # its console read COLUMNS and others when it was made
                sys.modules["olmoscope.progress"].console.__init__(stderr=True)
        parallel._set_init_process_lock()  # a command that is killed while it holds the lock must not block the next

        for name, value in request.get("constants", {}).items():
            module, constant = name.rsplit("__", 1)
            setattr(importlib.import_module(f"olmoscope.{module.replace('__', '.')}"), constant, value)
        sys.argv = ["olmoscope", *request["start"]]
        exec(compile(request.get("code", COMMAND), "<forked>", "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as end:
        status = _status(end.code)
    except BaseException:  # noqa: BLE001 (the child must never continue as a second server)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _opened(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)


def _status(code: object) -> int:
    """The exit status of SystemExit, as Python itself interprets it."""
    if isinstance(code, int) or code is None:
        return code or 0
    print(code, file=sys.stderr)
    return 1


def wait(pid: int, seconds: float) -> int | None:
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(0.002)


if __name__ == "__main__":
    main()
