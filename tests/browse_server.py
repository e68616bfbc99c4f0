"""A real server of `olmoscope browse`, as a process, over the small index; and plain HTTP to it."""

import http.client
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from commands import shared_commands

BROWSE = ("--no-open", "--port", "0")


@contextmanager
def browse_server(folder: Path) -> Iterator[int]:
    """`olmoscope browse folder`; yields its port. Ends it as Ctrl-C does, and expects a clean exit."""
    commands = shared_commands()
    pid, output, errors = commands.start_as({**os.environ, "OMP_NUM_THREADS": "1"}, "browse", folder, *BROWSE)
    ended = None
    while ended is None and not output.read_text().endswith("\n"):
        ended = commands.wait(pid, 0.02)
    port = _port(output.read_text(), errors.read_text())
    try:
        yield port
    finally:
        os.kill(pid, signal.SIGINT)
        _ended_in_order(commands.wait(pid, 30), errors.read_text())


@contextmanager
def installed_browse_server(folder: Path, python: Path, environment: Mapping[str, str]) -> Iterator[int]:
    """The same with another Python."""
    command = [python, "-m", "olmoscope", "browse", str(folder), *BROWSE]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**environment, "OMP_NUM_THREADS": "1"})
    assert process.stdout is not None
    first = process.stdout.readline()
    port = _port(first, "" if first else process.communicate()[1])
    try:
        yield port
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        _ended_in_order(process.returncode, errors)


def _port(said: str, errors: str) -> int:
    found = re.search(r"http://127\.0\.0\.1:(\d+)/", said)
    assert found, f"{said}\n{errors}"
    return int(found[1])


def _ended_in_order(status: int | None, errors: str) -> None:
    assert status == 0, errors
    assert "Traceback" not in errors, errors


def ask(port: int, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None,
        host: str | None = None) -> tuple[int, Any, dict[str, str]]:
    """Status, JSON (or text) and headers of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    sent = {"Host": host or f"127.0.0.1:{port}", **({"Content-Type": "application/json"} if body is not None else {}),
            **(headers or {})}
    connection.request(method, path, json.dumps(body) if body is not None else None, sent)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    given = {name.lower(): value for name, value in answer.getheaders()}
    return answer.status, json.loads(text) if given.get("content-type") == "application/json" else text, given
