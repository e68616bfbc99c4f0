"""Real `olmoscope` commands that start fast, for tests that kill them."""

import json
import os
import subprocess
import sys
from pathlib import Path


class Commands:
    """Starts, awaits and signals `olmoscope` commands through fork_server.py."""

    def __init__(self, folder, **environment):
        self.folder = folder
        self.server = subprocess.Popen([sys.executable, str(Path(__file__).with_name("fork_server.py"))],
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                       env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
                                                         "COLUMNS": "200"} | environment)
        self.started = 0

    def ask(self, **request):
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, *arguments, **constants):
        """Start a command; returns its pid and the file of its output.

        Args:
            constants: values to give to constants of modules, `a__b=1` for olmoscope.a's b.
        """
        self.started += 1
        output = self.folder / f"output-{self.started}"
        pid = self.ask(start=[str(argument) for argument in arguments], output=str(output), constants=constants)
        return pid, output

    def wait(self, pid, seconds=60.0):
        """Exit status (negative: the signal), or None if it still runs after so many seconds."""
        return self.ask(wait=pid, seconds=seconds)

    def run(self, *arguments, **constants):
        """Run a command to its end; returns exit status and output."""
        pid, output = self.start(*arguments, **constants)
        return self.wait(pid), output.read_text()

    def close(self):
        self.server.stdin.close()
        self.server.wait()
