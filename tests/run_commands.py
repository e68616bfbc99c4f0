"""Run commands of the command line in a process of their own, one after the other: starting up takes seconds."""

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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


def run_commands(commands: Iterable[Sequence[Any]], environment: Mapping[str, str]) -> str:
    """Returns what they print; all must succeed."""
    asked = json.dumps([[str(part) for part in command] for command in commands])
    done = subprocess.run([sys.executable, "-c", CODE, asked], env={**environment, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
