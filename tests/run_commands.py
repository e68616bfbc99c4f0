"""Run several commands one after another in one new process, since starting up takes seconds."""

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from commands import run_forked

CODE = """
import json, sys
from olmoscope.cli import app as cli
for command in json.loads(sys.argv[1]):
    sys.argv = ["olmoscope", *command]
    print("$", *command, flush=True)
    try:
        cli.main()
    except SystemExit as done:
        if done.code:
            sys.exit(f"{command}: exit status {done.code}")
"""


def run_commands(commands: Iterable[Sequence[Any]], environment: Mapping[str, str], *, fresh: bool = False) -> str:
    """Returns their output; all must succeed.

    Args:
        environment: the environment, which may name a hub.
        fresh: whether to start a new Python, for an environment with other libraries.
    """
    asked = json.dumps([[str(part) for part in command] for command in commands])
    environment = {**environment, "OMP_NUM_THREADS": "1"}
    if fresh:
        done = subprocess.run([sys.executable, "-c", CODE, asked], env=environment, capture_output=True, text=True)
    else:
        done = run_forked(asked, environment=environment, hub=True, timeout=600, code=CODE)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
