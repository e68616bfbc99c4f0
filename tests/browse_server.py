"""A real server of `olmoscope browse`, as a process, over the small index; and plain HTTP to it."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def browse_server(folder: Path, *arguments: str, python: str | Path = sys.executable,
                  environment: Mapping[str, str] = os.environ) -> Iterator[int]:
    """`olmoscope browse folder`; yields its port. Ends it as Ctrl-C does, and expects it to end in order."""
    command = [python, "-m", "olmoscope", "browse", str(folder), "--no-open", "--port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**environment, "OMP_NUM_THREADS": "1"})
    assert process.stdout is not None
    first = process.stdout.readline()
    found = re.search(r"http://127\.0\.0\.1:(\d+)/", first)
    assert found, f"{first}\n{process.communicate()[1]}"
    try:
        yield int(found[1])
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 0, errors
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
