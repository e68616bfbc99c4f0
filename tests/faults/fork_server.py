"""Run as a script: a process that has imported everything, and forks an `olmoscope` command for each request.

Killing a command and starting it again costs 4 seconds of imports otherwise. The commands are real processes and get
real signals; only their start is short. One JSON value a line: {"start": [arguments], "output": file, "constants":
{name: value for a constant of a module}} is answered with the pid; {"wait": pid, "seconds": s} with the exit status
(negative: the signal), or null if it still runs.
"""

import importlib
import json
import os
import signal
import sys
import time
import traceback


def main() -> None:
    # A shell that starts the tests in the background makes them ignore Ctrl-C; here it must mean what it says.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import transformers.models.olmo3.modeling_olmo3  # noqa: F401


    for line in sys.stdin:
        request = json.loads(line)
        answer = start(request) if "start" in request else wait(request["wait"], request["seconds"])
        print(json.dumps(answer), flush=True)


def start(request: dict) -> int:
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    pid = os.fork()
    if pid:
        os.close(output)
        return pid
    os.dup2(output, 1)
    os.dup2(output, 2)
    status = 70
    try:
        from numba.np.ufunc import parallel

        from olmoscope.cli.app import main as command

        parallel._set_init_process_lock()  # a command that is killed while it holds the lock must not stop the next

        for name, value in request["constants"].items():
            module, constant = name.rsplit("__", 1)
            setattr(importlib.import_module(f"olmoscope.{module.replace('__', '.')}"), constant, value)
        sys.argv = ["olmoscope", *request["start"]]
        command()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 (the child must never go on as a second server)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


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
